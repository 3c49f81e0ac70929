"""`wit-trl sweep` as users run it: in processes of its own, which are killed, and what it refuses."""

import contextlib
import json
import re
import time
from pathlib import Path

import optuna
import psutil
import pytest
import torch
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from safetensors.torch import load_file

from wit_trl.cli import main, sft
from wit_trl.sweep.arguments import BASELINE, PAPER_PAIRS, SweepArguments
from wit_trl.sweep.command import parse_sweep_flags

from ..forks import Fork, wit_trl


@pytest.fixture
def flags(make_model, tokenizer, prompt_completion, tmp_path, monkeypatch):
    """The flags of a small sweep, whose files are in the working directory."""
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("data").mkdir()
    prompt_completion.select(range(16)).to_json("data/train.jsonl")
    prompt_completion.select(range(16, 24)).to_json("data/test.jsonl")
    prompt_completion.select(range(4)).to_json("other.jsonl")
    return (
        *("--model_name_or_path", "model", "--dataset_name", "data", "--eval_dataset", "other=other.jsonl"),
        *("--max_steps", "3", "--max_length", "64", "--learning_rate", "1e-2", "--retention_prompts", "2"),
        *("--use_cpu", "True", "--bf16", "False", "--output_dir", "sweep"),
    )


@pytest.fixture
def start(flags):
    """A function that starts a sweep in a process of its own."""
    sweeps = []

    def start(*arguments):
        sweeps.append(Fork(wit_trl, "sweep", *flags, *arguments, COLUMNS="200"))
        return sweeps[-1]

    yield start
    for sweep in sweeps:
        sweep.process.kill()
        sweep.finish()


def wait_for(condition):
    for _ in range(1200):
        if result := condition():
            return result
        time.sleep(0.1)
    raise AssertionError(f"waited for {condition} in vain")


def trials():
    """The trials that Optuna has, as it shows them to anybody."""
    storage = JournalStorage(JournalFileBackend("sweep/study.log"))
    return optuna.load_study(study_name=Path("sweep/study_name.txt").read_text(), storage=storage).trials


def training_of(sweep, number):
    """The process that trains a trial, once it does. Its launcher, the child of the sweep, writes the same log."""
    log = str(Path(f"sweep/trial_{number}/log.txt").absolute())

    def find():
        for process in psutil.Process(sweep.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has ended
                files = [file.path for file in process.open_files()]
                if log in files and process.ppid() != sweep.process.pid:
                    return process
        return None

    return wait_for(find)


def table(output):
    return re.search(r"^Means over the seeds.*?^Written", output, flags=re.DOTALL | re.MULTILINE)[0]


def test_sweep_survives_what_is_killed_and_ends_in_the_same_table(start, flags, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    search = ("--ratios", "0", "1", "--seeds", "1", "--hub_token", "hf_secret")
    monkeypatch.delenv("HF_TOKEN", raising=False)  # which is put back after the test
    sweep = start(*search)
    training = training_of(sweep, 1)
    first_result = Path("sweep/trial_0/result.json").read_bytes()
    sweep.process.kill()
    training.wait(20)  # nobody waits for it any more

    sweep = start(*search)
    killed = training_of(sweep, 2)
    killed.kill()
    status, output = sweep.finish(200)
    assert status == 0, output
    assert "failed. The end of sweep/trial_2/log.txt:" in output
    assert "SIGKILL ended a process of the training" in output
    assert "1 of 2 trials failed" in output

    workers = [start(*search), start(*search)]
    statuses, outputs = zip(*(worker.finish(200) for worker in workers), strict=True)
    assert statuses == (0, 0), outputs
    assert table(outputs[0]) == table(outputs[1])
    done = [trial.params for trial in trials() if trial.state == TrialState.COMPLETE]
    assert sorted((trial["prompt_loss_weight"], trial["seed"]) for trial in done) == [(0, 1), (1, 1)]
    assert Path("sweep/trial_0/result.json").read_bytes() == first_result

    # Nothing is left to do
    capsys.readouterr()
    main(["sweep", *flags, *search])
    assert "..." not in capsys.readouterr().out
    check_files(capsys)


def check_files(capsys):
    lines = [json.loads(line) for line in Path("sweep/sweep.jsonl").read_text().splitlines()]
    assert [(line["ratio"], line["seed"]) for line in lines] == [(0, 1), (1, 1)]
    best = yaml.safe_load(Path("sweep/best.yaml").read_text())
    (of_best,) = (line for line in lines if line["prompt_loss_weight"] == best["prompt_loss_weight"])
    assert of_best["metrics"]["eval_completion_loss"] == min(line["metrics"]["eval_completion_loss"] for line in lines)
    assert [line["folder"] for line in lines if Path("sweep", line["folder"], "model").exists()] == [of_best["folder"]]
    texts = [file for file in Path("sweep").rglob("*") if file.is_file() and b"hf_secret" in file.read_bytes()]
    assert texts == []
    # It trains the same model, and ends in the same loss
    sft.main(["--config", "sweep/best.yaml", "--disable_tqdm", "True"])
    logged = re.findall(r"'eval_completion_loss': '([\d.]+)'", capsys.readouterr().out)
    assert float(logged[-1]) == pytest.approx(of_best["metrics"]["eval_completion_loss"], rel=2e-4)
    kept, trained = (
        load_file(f"sweep/{folder}/model.safetensors") for folder in (f"{of_best['folder']}/model", "best")
    )
    assert kept.keys() == trained.keys()
    assert all(torch.equal(kept[name], trained[name]) for name in kept)
    assert Path("sweep/sweep.png").read_bytes().startswith(b"\x89PNG")
    assert Path("sweep/sweep.html").read_text().count("Held-out prompt") == 3


def test_failing_trial_is_recorded_and_the_sweep_goes_on_on_two_processes(start):
    launched = ("--accelerate_config", "multi_gpu", "--num_processes", "2")
    status, output = start("--pairs", "1e38,1", "--seeds", "1", "--keep", "none", *launched).finish()
    assert status == 0, output
    failed = next(line for line in map(json.loads, Path("sweep/sweep.jsonl").read_text().splitlines()) if line["error"])
    assert "error: The training diverged: eval_" in failed["error"]
    assert failed["prompt_loss_weight"] == 1e38
    assert "1 of 2 trials failed" in output
    assert not list(Path("sweep").glob("*/model"))
    # What happened before the first trial, and how long it will take
    told = ["with the log sweep/base/log.txt", "loading the model", "training", "measuring", "all 2 together"]
    assert [text for text in told if text in output] == told


def test_what_fails_before_any_training_ends_the_sweep(flags):
    with pytest.raises(SystemExit, match=r"error: The model cannot be measured. The end of sweep/base/log.txt"):
        main(["sweep", *flags, "--dataset_test_split", "missing"])
    assert "The data set has no split 'missing', only" in Path("sweep/base/log.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt_loss_weight", "0.2"], "--prompt_loss_weight has no place in a sweep: --ratios or --pairs sets"),
        (["--prompt_loss_weight", "0"], "--prompt_loss_weight has no place in a sweep: --ratios or --pairs sets"),
        (["--seed", "7"], "--seed has no place in a sweep: --seeds sets the seed of each trial"),
        (["--resume_from_checkpoint", "True"], "--resume_from_checkpoint has no place in a sweep"),
        (["--push_to_hub"], "--push_to_hub has no place in a sweep: train with best.yaml and push that"),
        (["--num_machines", "2"], "--num_machines has no place in a sweep: a trial runs on one machine"),
        (["--accelerate_config", "fsdp_multi_node"], "--num_machines has no place in a sweep"),
        (["--pairs", "0.2", "0.8"], r"--pairs is \['0.2', '0.8'\], but each must be two numbers, such as 0.2,0.8"),
        (
            ["--metric", "eval_mean_token_accuracy"],
            "--metric is eval_mean_token_accuracy, which depends on the weights",
        ),
        (["--pairs", "0.2,0.8", "--grid", "paper"], "--pairs and --grid both name the pairs"),
        (["--ratios", "-1"], r"The pair \(-1.0, 1.0\) has a weight that is negative or not finite"),
        (["--ratios", "nan"], r"The pair \(nan, 1.0\) has a weight that is negative or not finite"),
        (["--pairs", "0,0"], r"The pair \(0.0, 0.0\) has .* no weight above 0"),
        (["--retention_prompts", "-1"], "--retention_prompts is -1, but it must not be negative"),
        (["--eval_dataset", "other.jsonl"], "--eval_dataset is 'other.jsonl', but must be name=data set"),
        (["--eval_dataset", "retention=other.jsonl"], "is not `retention`"),
        (["--eval_dataset", "a=b", "a=c"], "is used once"),
        (["--metric", "bleu"], "--metric is bleu, but must be of an evaluation, such as eval_completion_loss"),
        (["--model_init_kwargs", '{"token": "hf_x"}'], "--model_init_kwargs has a token, which the files of the sweep"),
        (["--aws_secret_access_key", "x"], "--aws_secret_access_key has no place in a sweep"),
        (["--grid", "all"], "Argument --grid: invalid choice"),
        (["--ratio", "1"], "There is no flag --ratio. Did you mean --ratios?"),
        (["--model_name_or_path", "model"], "Pass both --model_name_or_path and --dataset_name, or neither"),
    ],
)
def test_contradictions_are_refused_before_anything_runs(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main(["sweep", *arguments])
    assert not list(tmp_path.iterdir())


def test_extra_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "optuna" else True)
    with pytest.raises(SystemExit, match=r"error: This needs optuna. Install it with `pip install optuna`"):
        main(["sweep"])


def test_pairs_that_are_searched():
    with pytest.raises(ValueError, match="--seeds has no value"):
        SweepArguments(seeds=[])
    assert SweepArguments().all_pairs() == [(ratio, 1.0) for ratio in (0.0, 0.1, 0.25, 0.5, 1.0)]
    assert SweepArguments(ratios=[0.3, 0.3]).all_pairs() == [BASELINE, (0.3, 1.0)]
    assert SweepArguments(pairs=["0.2,0.8", "0,1"]).all_pairs() == [BASELINE, (0.2, 0.8)]
    assert sorted(SweepArguments(grid="paper").all_pairs()) == PAPER_PAIRS


def test_yaml_file_may_have_a_single_value_and_pairs_of_numbers(tmp_path):
    for text in ("pairs: 0.2,0.8", "pairs: [[0.2, 0.8]]"):
        (tmp_path / "sweep.yaml").write_text(f"{text}\nseeds: 3\neval_dataset: other=o.jsonl\n")
        sweep = parse_sweep_flags(["--config", str(tmp_path / "sweep.yaml")]).make(SweepArguments)
        assert sweep.all_pairs() == [BASELINE, (0.2, 0.8)]
        assert (sweep.seeds, sweep.eval_dataset) == ([3], ["other=o.jsonl"])
