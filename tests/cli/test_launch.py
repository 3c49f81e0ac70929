"""`wit-trl sft` up to the processes that it starts, and what its flags become."""

import dataclasses
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from trl.scripts.utils import DatasetConfig

from wit_trl import cli
from wit_trl.cli import arguments, inspect, launch, sft
from wit_trl.cli.names import check_mixture
from wit_trl.sweep.arguments import SweepArguments


CONFIGS = Path(__file__).parents[2] / "accelerate_configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
# What takes seconds to import, and says nothing about flags
NOT_FOR_HELP = (
    *("datasets", "peft", "transformers.modeling_utils", "transformers.trainer", "transformers.models.llama"),
    *("trl.trainer.sft_trainer", "optuna", "scipy", "matplotlib", "wit_trl.trainer", "wit_trl.embedded", "triton"),
)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function that runs `wit-trl sft` and returns the flags of the launcher and the arguments of the training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(launch, "default_config_file", tmp_path / "none")
    launched = []
    monkeypatch.setattr(launch, "launch_command", launched.append)

    def run(*args):
        cli.main(["sft", *map(str, args)])
        flags = launched.pop()
        assert flags.module
        assert flags.training_script == "wit_trl.cli.sft"
        return flags, arguments.Flags(arguments.TRAINING_TYPES, flags.training_script_args).check()

    return run


@pytest.fixture
def error(monkeypatch, tmp_path):
    """A function that runs a command and returns the one sentence it ends in."""
    monkeypatch.chdir(tmp_path)

    def error(*args):
        with pytest.raises(SystemExit) as ended:
            cli.main(list(map(str, args)))
        assert ended.value.code.startswith("error: ")
        return ended.value.code

    return error


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_configuration_by_name_and_by_path(path, run):
    assert Path(run("--accelerate_config", path.stem)[0].config_file).read_text() == path.read_text()
    assert run(f"--accelerate_config={path}")[0].config_file == str(path)


def test_configurations_of_a_wheel_are_found(run, tmp_path, monkeypatch):
    (tmp_path / "shipped.yaml").write_text((CONFIGS / "fsdp.yaml").read_text())
    monkeypatch.setattr(launch, "_CONFIG_FOLDERS", [tmp_path, tmp_path / "none"])
    assert run("--accelerate_config", "shipped")[0].config_file == str(tmp_path / "shipped.yaml")


def test_unknown_configuration_is_refused(error):
    message = error("sft", "--accelerate_config", "fsdb")
    assert "--accelerate_config is fsdb, but there is no such file. Shipped are deepspeed_ulysses, " in message


def test_flags_reach_the_launcher_or_the_training(run, tmp_path):
    config = {"accelerate_config": "fsdp", "num_processes": 4, "same_network": True, "tpu": False, "max_steps": 3}
    config |= {"learning_rate": 0.1, "env": {"OMP_NUM_THREADS": "3"}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    flags, checked = run(
        *("--num_processes", 2, "--config", "config.yaml", "--use_cpu", "True", "--bf16", "False", "--same_network"),
        *("false", "--learning_rate", 2, "--main-process-port=5", "--dataset_name", 2),
        *("--model_name_or_path", "model"),
    )
    assert Path(flags.config_file).stem == "fsdp"
    assert (flags.num_processes, flags.main_process_port, flags.same_network, flags.tpu) == (2, 5, True, False)
    args = checked.training
    assert (args.max_steps, args.learning_rate, args.use_cpu, checked.script.dataset_name) == (3, 2, True, "2")
    assert {"--num_processes", "--same_network", "--main-process-port=5"}.isdisjoint(flags.training_script_args)
    assert flags.num_cpu_threads_per_process is None  # OMP_NUM_THREADS says how many
    assert run("--config=config.yaml", "--use_cpu")[0].num_processes == 4


@pytest.mark.parametrize(
    ("args", "threads"),
    [
        ([], 8),
        (["--num_processes", 2], 4),
        (["--num_processes", 16], 1),
        (["--num_processes", 4, "--num_machines", 2], 4),
        (["--accelerate_config", "single_device"], 8),
        (["--accelerate_config", "multi_gpu"], 1),
        (["--accelerate_config", "multi_gpu", "--num_processes", 2], 4),
        (["--num_cpu_threads_per_process", 3], 3),
    ],
)
def test_processes_on_a_cpu_share_all_cores(args, threads, run):
    flags, _ = run(*args, "--use_cpu", "True")
    assert flags.num_cpu_threads_per_process == threads


def test_precision_of_a_file_for_gpus_is_left_out_on_a_cpu(run):
    assert run("--accelerate_config", "multi_gpu", "--use_cpu")[0].mixed_precision == "no"
    asked_for = run("--accelerate_config", "multi_gpu", "--use_cpu", "--mixed_precision", "bf16")[0]
    assert asked_for.mixed_precision == "bf16"


def test_several_processes_on_a_cpu_need_no_file(run):
    assert run("--num_processes", 2, "--use_cpu")[0].multi_gpu
    assert not run("--use_cpu")[0].multi_gpu
    assert not run("--num_processes", 2, "--cpu")[0].multi_gpu  # of which accelerate takes one alone


def test_on_a_gpu_the_launcher_decides(run, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    flags, _ = run("--accelerate_config", "multi_gpu")
    assert (flags.num_cpu_threads_per_process, flags.mixed_precision) == (None, None)
    assert run("--accelerate_config", "multi_gpu", "--use_cpu")[0].mixed_precision == "no"


def failed(exitcode):
    return ChildFailedError("wit-trl", {1: ProcessFailure(1, 1, exitcode, "none")})


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (subprocess.CalledProcessError(3, "python"), 3),
        (subprocess.CalledProcessError(-9, "python"), 137),
        (failed(3), 3),
        (failed(-9), 137),
        (SignalException("", signal.SIGTERM), 143),
        (KeyboardInterrupt(), 130),
        (subprocess.CalledProcessError(-15, "python"), 143),
    ],
)
def test_status_is_that_of_the_training(failure, status, monkeypatch, capsys):
    def launch_command(_):
        raise failure

    monkeypatch.setattr(launch, "launch_command", launch_command)
    monkeypatch.setattr(launch.psutil, "wait_procs", lambda processes, timeout: ([], []))
    with pytest.raises(SystemExit) as ended:
        cli.main(["sft"])
    assert ended.value.code == status
    said = {
        130: "Interrupted. With --resume_from_checkpoint True, it goes on from its last checkpoint.\n",
        137: "error: SIGKILL ended a process of the training. Often there was too little memory.\n",
        143: "" if isinstance(failure, SignalException) else "error: SIGTERM ended a process of the training.\n",
    }
    assert capsys.readouterr().err == said.get(status, "")


@pytest.mark.parametrize("command", ["sft", "inspect"])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--learning_rat", "1"], "There is no flag --learning_rat. Did you mean --learning_rate?"),
        (["--promt-loss-weight=1"], "There is no flag --promt-loss-weight. Did you mean --prompt_loss_weight?"),
        (["--num_proceses", "2"], "There is no flag --num_proceses. Did you mean --num_processes?"),
        (["--qqqq"], "There is no flag --qqqq. `wit-trl {} -h` lists the flags."),
        (["--config", "key.yaml"], "There is no flag --max_step. Did you mean --max_steps?"),
        (["--config", "key.yaml", "--config=key.yaml"], "--config is given 2 times. Put all flags into one file."),
        (["--config"], "Argument --config: expected one argument. `wit-trl {} -h` lists the flags."),
        (["--max_steps", "many"], "Argument --max_steps: invalid int value: 'many'. `wit-trl {} -h` lists"),
        (["--num_processes", "many"], "Argument --num_processes/--num-processes: invalid int value: 'many'. `accel"),
        (["--max_steps", "1", "data.jsonl"], "'data.jsonl' is the value of no flag. Remove it, or put its flag before"),
    ],
)
def test_misspelled_flag_is_named_with_the_nearest(args, message, command, error, tmp_path):
    (tmp_path / "key.yaml").write_text("max_step: 3\nnum_processes: 2\n")
    assert error(command, *args).startswith(f"error: {message.format(command)}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("grid: false", "Argument --grid: invalid choice: 'False' (choose from 'paper')"),
        ("keep: some", "Argument --keep: invalid choice: 'some' (choose from 'best', 'all', 'none')"),
        ("ratios: null", "flags.yaml sets `ratios` to null. Give it a value, or remove the line."),
        ("ratios: [0, many]", "Argument --ratios: invalid float value: 'many'"),
        ("prompt_loss_weight: yes", "Argument --prompt_loss_weight: invalid float value: 'True'"),
        ("max_length: 16.0", "Argument --max_length: invalid int value: '16.0'"),
        ("max_steps: null", "flags.yaml sets `max_steps` to null."),
        ("use_cpu: maybe", "Argument --use_cpu: Truthy value expected"),
        ("config: other.yaml", "flags.yaml has the key `config`, but one file must hold all flags. Join the two."),
        ("- max_steps", "flags.yaml must be a YAML mapping of flags to values, and so must be `env` in it."),
        ("env: 3", "flags.yaml must be a YAML mapping of flags to values, and so must be `env` in it."),
    ],
)
def test_value_in_a_file_is_checked_as_on_the_command_line(line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("flags.yaml").write_text(line)
    with pytest.raises(ValueError, match=re.escape(message)):
        arguments.Flags((SweepArguments, *arguments.TRAINING_TYPES), ["--config=flags.yaml"])


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        (
            "rows.jsonl",
            "`datasets` is 'rows.jsonl', but must be a list with an entry for each data set, as `- path: data",
        ),
        ("{path: rows.jsonl}", "`datasets` is {'path': 'rows.jsonl'}, but must be a list with an entry"),
        (
            "[rows.jsonl]",
            "Entry 0 of `datasets` is 'rows.jsonl', but must be a mapping with a path, as `- path: data.js",
        ),
        ("[{path: a}, [b]]", "Entry 1 of `datasets` is ['b'], but must be a mapping with a path"),
        ("[{fraction: 1}]", "Entry 0 of `datasets` is {'fraction': 1}, but must be a mapping with a path"),
        ("[{path: a, weight: 1}]", "Entry 0 of `datasets` has the key 'weight', but may have path, name, data_dir, da"),
        (
            "[{path: null}]",
            "Entry 0 of `datasets` has `path: None`, which must be a text. Correct it, or remove the ke",
        ),
        ("[{path: a, 3: b}]", "Entry 0 of `datasets` has the key 3, but may have path"),
        ("[{path: ''}]", "has `path: ''`, which must be a text."),
        ("[{path: a, split: 3}]", "has `split: 3`, which must be a text."),
        ("[{path: a, split: null}]", "has `split: None`, which must be a text."),
        ("[{path: a, name: 3}]", "has `name: 3`, which must be a text."),
        ("[{path: a, data_dir: [b]}]", "has `data_dir: ['b']`, which must be a text."),
        ("[{path: a, columns: x}]", "has `columns: 'x'`, which must be a list of texts."),
        ("[{path: a, columns: [1]}]", "has `columns: [1]`, which must be a list of texts."),
        (
            "[{path: a, data_files: 3}]",
            "has `data_files: 3`, which must be a text, a list of texts or a mapping of spl",
        ),
        ("[{path: a, data_files: {train: 3}}]", "has `data_files: {'train': 3}`, which must be a text, a list"),
        ("[{path: a, fraction: half}]", "has `fraction: 'half'`, which must be a number above 0."),
        ("[{path: a}, {path: a, fraction: true}]", "Entry 1 of `datasets` has `fraction: True`, which must be a nu"),
        ("[{path: a, fraction: 0}]", "has `fraction: 0`, which must be a number above 0."),
        ("[{path: a, fraction: -1}]", "has `fraction: -1`, which must be a number above 0."),
        ("[{path: a, fraction: .nan}]", "has `fraction: nan`, which must be a number above 0."),
        ("[{path: a, fraction: .inf}]", "has `fraction: inf`, which must be a number above 0."),
    ],
)
def test_mixture_is_checked_by_entry(mixture, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("flags.yaml").write_text(f"datasets: {mixture}")
    with pytest.raises(ValueError, match=re.escape(message)):
        arguments.Flags(arguments.TRAINING_TYPES, ["--config=flags.yaml"])


def test_keys_of_a_mixture():
    texts = {"path": "a", "name": "b", "data_dir": "c", "split": "train[:9]"}
    for entry in (
        texts | {"data_files": "d", "columns": ["x", "y"], "fraction": 2},
        texts | {"data_files": ["d", "e"], "fraction": 0.5, "columns": None},
        {"path": "a", "name": None, "data_dir": None, "data_files": {"train": "d", "test": ["e", "f"]}},
    ):
        check_mixture([entry])
    check_mixture([dict.fromkeys((field.name for field in dataclasses.fields(DatasetConfig)), None) | texts])


@pytest.mark.parametrize(("args", "warned"), [([], False), (["--gradient_checkpointing", "True"], True)])
def test_default_of_trl_that_is_deprecated_warns_where_the_user_set_it(args, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        arguments.Flags(
            arguments.TRAINING_TYPES, ["--use_cpu", "--model_name_or_path=m", "--dataset_name=d", *args]
        ).check()
    assert any("`gradient_checkpointing` is deprecated" in str(warning.message) for warning in caught) == warned


def test_values_of_a_file(tmp_path):
    (tmp_path / "flags.yaml").write_text(
        "eval_strategy: no\nlearning_rate: 1e-3\nmax_length: null\nreport_to: [none]\nrole_loss_weights: {tool: 0.5}\n"
        "output_dir: -out\ndatasets: [{path: a, fraction: 0.5}]\nbf16: false\ncompletion_turns: all\n"
        "env: {WIT_TEST: 1}\nmax_steps: 3\n"
    )
    given = arguments.Flags(arguments.TRAINING_TYPES, ["--config", str(tmp_path / "flags.yaml"), "--max_steps=4"]).given
    assert os.environ.pop("WIT_TEST") == "1"
    assert given == {
        "eval_strategy": "no",
        "learning_rate": 1e-3,
        "max_length": None,
        "report_to": ["none"],
        "role_loss_weights": {"tool": 0.5},
        "output_dir": "-out",
        "datasets": [{"path": "a", "fraction": 0.5}],
        "bf16": False,
        "completion_turns": "all",
        "max_steps": 4,
    }


def test_error_is_printed_as_data_and_not_at_full_length(capsys):
    with pytest.raises(SystemExit) as ended, arguments.errors_in_one_sentence():
        raise ValueError("a\x1b[2J\r[red]b\nc" + "d" * 1_000_000 + "the remedy")
    assert ended.value.code.startswith("error: a\\x1b[2J\\r[red]b\nc")
    assert re.search(r"d \[\.\.\. 99\d,\d\d\d characters \.\.\.\] d+the remedy$", ended.value.code)
    assert len(ended.value.code) < 5000


def test_only_one_process_of_a_machine_says_what_is_wrong(monkeypatch):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit, match="error: wrong"), arguments.errors_in_one_sentence():
            raise ValueError("wrong")
    assert slept == [20]  # until the first process has ended the others


def test_debug_shows_the_traceback(monkeypatch):
    for main in (sft.main, inspect.main):
        with pytest.raises(ValueError, match="There is no flag"):
            main(["--debug", "--qqqq"])
    with pytest.raises(ValueError, match="There is no flag"):
        cli.main(["sft", "--qqqq", "--debug"])
    monkeypatch.setattr(launch, "launch_command", lambda launched: calls.append(launched.training_script_args))
    calls = []
    cli.main(["sft", "--debug", "--max_steps", "1"])
    assert calls == [["--max_steps", "1", "--debug"]]
    # With a value it is a flag of the training
    assert arguments.split_debug(["--debug", "underflow_overflow"]) == (["--debug", "underflow_overflow"], False)


@pytest.mark.parametrize(
    ("command", "last"),
    [
        ("sft", "embedded default: .* It takes the flags of `accelerate launch` too, .* and --accelerate_config"),
        ("sweep", "embedded default: .* It takes the flags of `accelerate launch` too, .* and --accelerate_config"),
        ("inspect", "embedded default: .* The flags of `accelerate launch`, and --accelerate_config, are ignored"),
        ("check", r"it checks tiny models\. It uses one process\."),
    ],
)
def test_help_lists_the_flags(command, last, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "-h"])
    assert ended.value.code == 0
    output = capsys.readouterr().out
    first, *_, epilog = output.split("\n\n")[1:]
    assert first.startswith("Weighted Instruction Tuning:\n")
    assert "--completion_turns" in first
    assert ("--html" in first) == (command == "inspect")
    assert "--learning-rate" not in output
    for flag in ("--chat_template_loss_weight", "--model_name_or_path", "--config", "--max_steps"):
        assert f" {flag} " in output
    refused = (
        "--prompt_loss_weight",
        "--completion_loss_weight",
        "--seed",
        "--push_to_hub",
        "--resume_from_checkpoint",
    )
    for flag in refused:
        assert (f" {flag} " in output) == (command != "sweep")
    assert re.search(r"--no_print_weight_report\s+The same as --print_weight_report False\.\n", output)
    epilog = " ".join(epilog.split())
    assert re.search(last, epilog)
    assert epilog.endswith("--debug without a value shows the traceback of an error.")


@pytest.mark.parametrize("command", ["sft", "inspect", "sweep"])
def test_file_that_is_not_there_is_told_before_anything_that_reads_data_is_imported(
    command, error, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wit_trl.cli.loading", None)
    args = (command, "--model_name_or_path", "model")
    (tmp_path / "data.tsv").touch()
    (tmp_path / "mixture.yaml").write_text("datasets: [{path: mixture.yaml/..}, {path: lost.json.gz}]")
    for name, message in (
        ("lost.jsonl", "There is no file lost.jsonl, or it is empty."),
        ("data.tsv", "data.tsv cannot be loaded. Files of .jsonl, "),
    ):
        assert error(*args, "--dataset_name", name).startswith(f"error: {message}")
    assert error(*args, "--config", "mixture.yaml") == "error: There is no file lost.json.gz, or it is empty."
    assert error(*args, "--datasets", "lost.csv") == "error: There is no file lost.csv, or it is empty."
    if command == "sweep":
        assert error(command, "--eval_dataset", "other=lost.csv") == "error: There is no file lost.csv, or it is empty."
    assert error(*args, "--config", "lost.yaml") == "error: --config is lost.yaml, but there is no such file."


def test_version_is_what_a_bug_report_needs(monkeypatch, capsys):
    version = importlib.metadata.version

    def without_peft(name):
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError
        return version(name)

    monkeypatch.setattr("importlib.metadata.version", without_peft)
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert not ended.value.code
    facts = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert list(facts)[:6] == ["wit_trl", "python", "platform", "torch", "cuda", "device"]
    assert facts["torch"] == torch.__version__
    assert facts["transformers"] == version("transformers")
    assert facts["peft"] == "not installed"
    assert {"trl", "datasets", "accelerate", "bitsandbytes", "deepspeed"} < set(facts)


def test_module_runs_and_help_needs_no_torch():
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['x', '-h']; "
    code += "runpy.run_module('wit_trl', run_name='__main__')"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("usage: wit-trl [-h] [--version] {sft,sweep,inspect,check}")


def test_modules_of_the_working_folder_are_not_imported(tmp_path):
    for name in ("torch", "yaml", "pathlib"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the file of the working folder')")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    environment["PYTHONPATH"] = str(CONFIGS.parent)
    command = [sys.executable, "-m", "wit_trl", "--version"]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert process.stdout.startswith("wit_trl: "), process.stderr


def test_help_of_a_command_imports_flags_alone():
    code = f"""if True:
        import contextlib, sys
        from wit_trl.cli import main
        for command in ("sft", "inspect", "sweep", "check"):
            sys.argv = ["wit-trl", command, "-h"]
            with contextlib.suppress(SystemExit):
                main()
            print(f"\\n{{command}}: imported", [name for name in {NOT_FOR_HELP} if sys.modules.get(name)])"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    for command in ("sft", "inspect", "sweep", "check"):
        assert f"usage: wit-trl {command} [flags]" in process.stdout
        assert f"\n{command}: imported []\n" in process.stdout
