"""The documentation against the package: its Python runs, its commands are parsed, its links lead somewhere."""

import ast
import doctest
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

import wit_trl.data.collator
from wit_trl.cli import arguments, check, inspect, launch
from wit_trl.sweep.arguments import SweepArguments
from wit_trl.sweep.command import parse_sweep_flags, settings_of

from . import test_paper
from .helpers import make_trainer
from .reference import formula
from .trainer import test_subclass


REPOSITORY = Path(__file__).parent.parent
PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8")
    for path in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md")))
}
README = PAGES["README.md"]


def blocks(page, language):
    """The fenced blocks of a page in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.DOTALL | re.MULTILINE)


def commands():
    """The commands of all pages, in blocks and within sentences, as (page, command)."""
    for page, text in PAGES.items():
        lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        for command in lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]:
            if re.match(r"(wit-trl|accelerate launch|make) [\w-]", command):
                yield page, command


COMMANDS = sorted(set(commands()))


def test_rows_in_the_documentation_train_with_their_weights(make_model, tokenizer, config_kwargs):
    (lines,) = blocks("docs/data.md", "json lines")
    weights = []
    for line in lines.splitlines():
        trainer = make_trainer(make_model, tokenizer, [json.loads(line)], config_kwargs)
        weights.append(trainer.train_dataset[0]["token_weights"])
    assert [set(row) for row in weights[:2]] == [{0.5}, {0.5, 1}]
    assert len(weights[2]) == 3


def test_three_rows_of_the_readme_log_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("README.md", "python")
    said = ast.literal_eval(next(block for block in blocks("README.md", "text") if block.startswith("{'loss'")))
    exec(code, {})
    output = capsys.readouterr().out
    assert "What is weighted in 3 rows" in output
    (line,) = re.findall(r"^\{'loss'.*\}$", output, flags=re.MULTILINE)
    logged = ast.literal_eval(line)
    assert list(logged) == list(said)
    for name, value in said.items():  # the last digits differ between machines
        tolerance = {"abs": 0.1} if "accuracy" in name else {"rel": 0.05}
        assert float(logged[name]) == pytest.approx(float(value), **tolerance), name


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md" and blocks(page, "python")])
def test_python_in_the_documentation_prints_what_it_says(
    page, prompt_completion, make_model, tokenizer, config_kwargs, capsys
):
    trainer = make_trainer(make_model, tokenizer, None, config_kwargs, train_dataset=prompt_completion.select(range(4)))
    code = "\n".join(blocks(page, "python"))
    capsys.readouterr()
    namespace = {"trainer": trainer, "tokenizer": tokenizer, "__name__": "documentation"}
    exec(code, namespace)
    said = re.findall(r"^print\(.*\)  # (.+)$", code, flags=re.MULTILINE)
    printed = capsys.readouterr().out.splitlines()
    assert said or "print(" not in code
    assert [text.split(" = ")[0] for text in said] == printed
    assert page != "docs/weights.md" or "2.763" in printed


def test_losses_of_ones_own_are_those_that_are_tested():
    def classes(source):
        found = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
        return {node.name: ast.unparse(node) for node in found}

    documented = classes("\n".join(blocks("docs/weights.md", "python")))
    tested = classes(Path(test_subclass.__file__).read_text(encoding="utf-8"))
    examples = classes((REPOSITORY / "examples" / "token_factors.py").read_text(encoding="utf-8"))
    assert set(documented) == {"Regularised", "OnFullLogits", "ProFitTrainer"}
    assert documented.pop("ProFitTrainer") == examples["ProFitTrainer"]
    assert documented == {name: tested[name] for name in documented}
    of_the_paper = classes(Path(test_paper.__file__).read_text(encoding="utf-8"))
    documented = classes("\n".join(blocks("docs/reproduce.md", "python")))
    assert documented == {"DecaysAll": of_the_paper["DecaysAll"]}


def test_loop_of_ones_own_takes_the_step_of_the_formula():
    """The loop ends with the gradients of both micro-batches."""
    torch.manual_seed(0)
    code = "\n".join(blocks("docs/weights.md", "python"))
    loop = code[code.index("import torch\nfrom wit_trl import DataCollatorForWIT") : code.index("optimizer.step()")]
    namespace = {}
    exec(loop, namespace)
    model = namespace["model"]
    loss, _ = formula(model, namespace["rows"], (0.2, 0.8))
    for parameter, expected in zip(
        model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(parameter.grad, expected)


def test_two_names_change():
    (diff,) = blocks("README.md", "diff")
    after = "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("-"))
    before = "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("+"))
    compile(before, "before", "exec")
    (imported,) = (node for node in ast.parse(after).body if isinstance(node, ast.ImportFrom))
    names = [alias.name for alias in imported.names]
    assert all(hasattr(wit_trl, name) for name in names)
    (call,) = (
        node for node in ast.walk(ast.parse(after)) if isinstance(node, ast.Call) and "Config" in ast.unparse(node.func)
    )
    wit_trl.WITSFTConfig(
        **{keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}, use_cpu=True, report_to="none"
    )


def test_names_in_the_documentation_exist():
    """What follows `wit_trl.` or `trainer.`, and the arguments of `WITSFTConfig`."""
    text = "\n".join(PAGES.values())
    for name in re.findall(r"\bfrom wit_trl import ([\w, ]+)", text):
        assert all(hasattr(wit_trl, part) for part in name.split(", ")), name
    for name in re.findall(r"`trainer\.(\w+)\(", text):
        assert hasattr(wit_trl.WITSFTTrainer, name), name
    fields = wit_trl.WITSFTConfig.__dataclass_fields__
    for name in re.findall(r"`(?:WITSFTConfig\()?(\w+)=(?:True|False|None|[\d.\"])", text):
        assert name in fields or name in ("resume_from_checkpoint", "modules_to_save"), name


@pytest.fixture
def in_a_folder(tmp_path, monkeypatch):
    """A folder with the files that commands name."""
    monkeypatch.chdir(tmp_path)
    for name in ("accelerate_configs", "examples", "Makefile"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (configuration,) = blocks("README.md", "yaml")
    assert yaml.safe_load(configuration)["model_name_or_path"]
    for name in ("training.yaml", "best.yaml"):
        (tmp_path / name).write_text(configuration)


def check_training(flags):
    parsed = arguments.Flags(arguments.TRAINING_TYPES, flags, prog="documentation")
    parsed.check()
    return parsed


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_are_parsed(page, command, in_a_folder, capsys):
    program, *args = shlex.split(command, comments=True)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", Path("Makefile").read_text(), flags=re.MULTILINE)
        assert args[0] in targets, f"{page}: there is no target {args[0]}"
    elif program == "accelerate":
        launched = arguments.launch_parser().parse_args(args[1:])
        assert launched.config_file is None or Path(launched.config_file).is_file()
        assert Path(launched.training_script).is_file()
        parsed = check_training(launched.training_script_args)
        assert parsed.launch_on_line == []
    elif args[0].startswith("-"):
        assert args in (["--version"], ["--help"])
    elif args[1:] == ["-h"]:
        assert args[0] in ("sft", "sweep", "inspect", "check")
    elif args[0] == "sft":
        parsed = check_training(args[1:])
        launched = arguments.parse_launch_flags(parsed.launch_flags, "module")
        if launched.accelerate_config is not None:
            assert launch.accelerate_config_file(launched.accelerate_config).is_file()
    elif args[0] == "sweep":
        parsed = parse_sweep_flags(args[1:])
        parsed.make(SweepArguments)
        settings = settings_of(parsed)
        assert settings["max_grad_norm"] == 0
        assert "prompt_loss_weight" not in settings  # which training.yaml has
    elif args[0] == "check":
        parsed = arguments.Flags((check.CheckArguments, *arguments.TRAINING_TYPES), args[1:])
        parsed.make(check.CheckArguments)
        parsed.check()
        assert parsed.launch_on_line == []
    else:
        assert args[0] == "inspect"
        parsed = arguments.Flags((inspect.InspectionArguments, *arguments.TRAINING_TYPES), args[1:])
        parsed.make(inspect.InspectionArguments)
        parsed.check(inspect._DataConfig)
        assert parsed.launch_on_line == []


def test_a_flag_that_does_not_exist_is_found(in_a_folder):
    with pytest.raises(ValueError, match="There is no flag --prompt_weight"):
        test_commands_are_parsed("page", "wit-trl sft --prompt_weight 0.2", None, None)
    assert {command.split()[0] for _, command in COMMANDS} == {"wit-trl", "accelerate", "make"}
    assert len(COMMANDS) > 20


def anchors(text):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = ((REPOSITORY / page).parent / name).resolve() if name else REPOSITORY / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{page}: {link}"


def test_files_that_are_named_exist():
    for page, text in PAGES.items():
        for name in re.findall(r"\b(?:accelerate_configs|benchmarks|docs|examples|tests|wit_trl)/[\w*./-]*[\w/]", text):
            assert list(REPOSITORY.glob(name)), f"{page}: {name}"


def test_example_of_the_collator():
    module = wit_trl.data.collator
    test = doctest.DocTestFinder(recurse=False).find(module.DataCollatorForWIT, globs={})[0]
    # The closing fence of the Markdown block is no output
    test.examples = doctest.DocTestParser().get_examples(test.docstring.replace("```", ""))
    assert doctest.DocTestRunner().run(test) == (0, len(test.examples))
    assert test.examples
