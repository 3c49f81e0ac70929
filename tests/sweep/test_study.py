"""The trials of a sweep, held by Optuna: each is done once, whoever dies."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from optuna.trial import TrialState
from rich.console import Console

from wit_trl.sweep.arguments import BASELINE, RETENTION_METRIC, TASK_METRIC
from wit_trl.sweep.report import html_page, plot, show, table
from wit_trl.sweep.results import SweepResults
from wit_trl.sweep.study import SweepStudy, TrialSettings, lost_file
from wit_trl.sweep.worker import time_left


REPOSITORY = Path(__file__).parents[2]
WANTED = [TrialSettings((ratio, 1.0), seed) for seed in (1, 2) for ratio in (0.0, 0.25, 1.0)]
# Takes a trial, says which, and goes on living
WORKER = """
import sys, time
from pathlib import Path
from wit_trl.sweep.study import SweepStudy
study = SweepStudy(Path(sys.argv[1]), None, {})
trial = study.take()
print(trial.number, flush=True)
time.sleep(300)
"""


@pytest.fixture
def study(tmp_path):
    return SweepStudy(tmp_path, None, {})


@pytest.fixture
def other_worker(tmp_path):
    """A function that starts another process that takes a trial, and returns the process with the trial's number."""
    processes = []

    def start():
        command = [sys.executable, "-c", WORKER, str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
        processes.append(process)
        return process, int(process.stdout.readline())

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def finish(study):
    """Runs what is left, and returns what was run."""
    done = []
    while (trial := study.take()) is not None:
        (study.folder_of(trial) / "result.json").write_text("{}")
        study.tell(trial, 1.0, seconds=0.0)
        done.append(TrialSettings.of(trial))
    return done


def test_every_trial_is_done_once(study, tmp_path):
    study.add(WANTED)
    assert finish(study) == WANTED
    again = SweepStudy(tmp_path, None, {})
    again.add(WANTED)
    assert again.take() is None
    again.add([*WANTED, TrialSettings((0.5, 1.0), 1)])
    assert finish(again) == [TrialSettings((0.5, 1.0), 1)]


def test_trial_has_its_weights_and_seed_in_the_eyes_of_optuna(study):
    study.add(WANTED[1:2])
    finish(study)
    assert study.trials[0].params == {"prompt_loss_weight": 0.25, "completion_loss_weight": 1.0, "seed": 1}


def test_trial_of_a_living_worker_is_not_taken_and_that_of_a_dead_one_is(study, other_worker):
    study.add(WANTED)
    process, number = other_worker()
    assert number == 0
    assert finish(study) == WANTED[1:]
    assert any(trial.state == TrialState.RUNNING for trial in study.trials)
    study.add(WANTED)  # as if started again
    assert study.take() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert finish(study) == WANTED[:1]
    assert [trial.state for trial in study.trials] == [TrialState.FAIL] + [TrialState.COMPLETE] * 6


def test_only_one_worker_takes_over_from_a_dead_one(study, other_worker):
    study.add(WANTED[:2])
    process, _ = other_worker()
    process.kill()
    process.wait()
    _, number = other_worker()
    assert number == 1
    _, number = other_worker()
    assert number == 2  # the first one again
    assert study.take() is None


def test_worker_that_died_before_it_made_a_folder_is_noticed(study, tmp_path):
    study.add(WANTED[:1])
    study._study.ask()
    assert finish(SweepStudy(tmp_path, None, {})) == WANTED[:1]


def test_failed_trial_is_tried_again_at_the_next_start_alone(study, tmp_path):
    study.add(WANTED[:2])
    study.tell(study.take(), None, error="out of memory", seconds=1.0)
    assert finish(study) == WANTED[1:2]
    again = SweepStudy(tmp_path, None, {})
    again.add(WANTED[:2])
    assert finish(again) == WANTED[:1]


def test_other_settings_are_refused_once_there_is_a_trial(tmp_path):
    storage = f"sqlite:///{tmp_path / 'trials.db'}"
    (tmp_path / "base").mkdir()
    SweepStudy(tmp_path, storage, {"learning_rate": 1.0})
    assert (tmp_path / "base").exists()
    study = SweepStudy(tmp_path, storage, {"learning_rate": 2.0})
    assert not (tmp_path / "base").exists()  # it was measured for a start that never came to a trial
    study.add(WANTED)
    with pytest.raises(ValueError, match=r"has trials with another learning_rate, model_name_or_path\. Choose another"):
        SweepStudy(tmp_path, storage, {"learning_rate": 3.0, "model_name_or_path": "model"})
    assert len(SweepStudy(tmp_path, storage, {"learning_rate": 2.0}).trials) == len(WANTED)


def test_folder_can_be_renamed_and_two_folders_of_one_name_share_a_database(tmp_path):
    storage = f"sqlite:///{tmp_path / 'trials.db'}"
    folders = [tmp_path / "a" / "sweep", tmp_path / "b" / "sweep"]
    for folder in folders:
        folder.mkdir(parents=True)
        SweepStudy(folder, storage, {}).add(WANTED[:1])
    renamed = folders[0].rename(tmp_path / "renamed")
    assert [len(SweepStudy(folder, storage, {}).trials) for folder in (renamed, folders[1])] == [1, 1]


def write_trial(folder, completion_nll, metrics, seed=0):
    """What a trial writes, with the losses of rows of 10 prompt tokens and 5 completion tokens."""
    folder.mkdir(exist_ok=True)
    count = len(completion_nll)
    rows = {"prompt_nll": np.full(count, 10.0), "prompt_tokens": np.full(count, 10)}
    rows |= {"completion_nll": completion_nll, "completion_tokens": np.full(count, 5)}
    Dataset.from_dict(rows).to_parquet(folder / "rows.parquet")
    Dataset.from_dict(rows).to_parquet(folder / "other_rows.parquet")
    loss = float(np.sum(completion_nll)) / (5 * count)
    metrics = {TASK_METRIC: loss, "eval_prompt_loss": 1.0, "eval_other_completion_loss": loss} | metrics
    result = {
        "metrics": metrics,
        "greater_is_better": {},
        "prompts": ["Say <b>{hi}</b>"],
        "answers": [f"answer of {folder.name}"],
    }
    (folder / "result.json").write_text(json.dumps(result))
    return loss


@pytest.fixture
def make_results(study, tmp_path):
    """A function that returns the results of trials that differ by what a ratio and a seed add to every row, and by
    noise."""

    def make(effect, ratios=(0.0, 0.25, 1.0), seeds=(1, 2, 3), metric=TASK_METRIC, fail=(), clips=False, pairs=None):
        generator = np.random.default_rng(0)
        base = generator.gamma(4, 2, 100)
        write_trial(tmp_path / "base", base + 1, {})
        pairs = pairs or [(ratio, 1.0) for ratio in ratios]
        study.add([TrialSettings(pair, seed) for pair in pairs for seed in seeds])
        while (trial := study.take()) is not None:
            settings = TrialSettings.of(trial)
            if settings in fail:
                study.tell(trial, None, error="CUDA out of memory", seconds=2.0)
                continue
            rows = base + effect * settings.pair[0] + settings.seed + generator.normal(0, 0.1, 100)
            loss = write_trial(study.folder_of(trial), rows, {"eval_accuracy": settings.pair[0]})
            study.tell(trial, loss, seconds=1.0)
        return SweepResults(study, metric, greater_is_better=None, clips=clips)

    return make


def test_better_ratio_is_named_with_what_it_gains_and_costs(make_results):
    results = make_results(effect=-2.0)
    conclusion, *others = results.sentences()
    assert conclusion.startswith("Among 0, 0.25, 1, for this model, data, budget and metric: 1 does best, -0.4")
    assert conclusion.endswith("on eval_completion_loss against 0 (3 seeds).")
    assert others[0].startswith("0.25 against 0: gains -0.0")
    assert "gains -0.4" in others[1]
    assert others[2].startswith("Held-out rows of the task itself tend to prefer the ratio 0.")
    assert results.best.settings.pair == (1.0, 1.0)
    assert results.best.settings.seed == 1  # which adds least


@pytest.mark.parametrize("effect", [0.0, 2.0])
def test_no_difference_is_said_where_there_is_none_or_0_is_best(effect, make_results):
    results = make_results(effect)
    if effect:
        assert results.sentences()[0].endswith("metric: 0 does best on eval_completion_loss.")
        assert results.best.settings.pair == BASELINE
    else:
        assert "metric: no difference found." in results.sentences()[0]


def test_one_seed_says_that_it_gives_no_interval(make_results):
    results = make_results(effect=-2.0, seeds=(1,))
    assert results.sentences()[0].endswith("One seed gives no interval.")
    console = Console(file=io.StringIO(), width=80)
    show(console, results)
    assert "±" not in console.file.getvalue()
    assert "intervals" not in console.file.getvalue()


def test_metric_of_which_more_is_better(make_results):
    results = make_results(effect=0.0, metric="eval_accuracy")
    assert results.best.settings.pair == (1.0, 1.0)
    assert "1 does best, +1.000 ± 0.000 on eval_accuracy against 0" in results.sentences()[0]


def test_unknown_metric_is_refused_with_what_there_is(make_results):
    with pytest.raises(
        ValueError, match=r"--metric is eval_bleu, which the trials do not have\. They have: .*eval_accuracy"
    ):
        make_results(effect=0.0, metric="eval_bleu")


def test_failed_trials_are_told_and_all_of_them_are_an_error(make_results):
    failed = TrialSettings((1.0, 1.0), 2)
    results = make_results(effect=-2.0, fail=[failed])
    assert "1 of 9 trials failed; sweep.jsonl has the ends of their logs." in results.sentences()
    assert [trial.error for trial in results.trials if trial.settings == failed] == ["CUDA out of memory"]
    assert "(2 seeds)" in results.sentences()[0]


def test_sweep_of_failures_is_an_error(make_results):
    with pytest.raises(ValueError, match=r"All 1 trials failed\. The last one says:\nCUDA out of memory"):
        make_results(effect=0.0, ratios=(0.0,), seeds=(1,), fail=[TrialSettings(BASELINE, 1)])


def test_pairs_without_a_baseline_are_not_compared(make_results):
    results = make_results(effect=-2.0, fail=[TrialSettings(BASELINE, seed) for seed in (1, 2, 3)])
    assert results.sentences()[0].endswith("nothing can be compared, because no trial of the ratio 0 is done.")
    assert results.best.settings.pair == (1.0, 1.0)


def test_clipping_and_replicates_are_told(make_results, tmp_path):
    pairs = [BASELINE, (0.0, 0.5), (0.5, 1.0), (0.4, 0.8)]
    results = make_results(effect=0.0, pairs=pairs)
    assert (
        "Without clipping, pairs of one ratio are replicates of one training: (0, 0.5) = 0, 0.5 = (0.4, 0.8)."
        in results.sentences()
    )
    results.clips = True
    assert any(sentence.startswith("The trials clip gradients") for sentence in results.sentences())


@pytest.mark.parametrize(
    ("file", "content"), [("result.json", None), ("result.json", ""), ("rows.parquet", None), ("rows.parquet", "")]
)
def test_trial_that_lost_a_file_is_told_and_repeated_alone(file, content, make_results, study, tmp_path):
    make_results(effect=0.0)
    lost = tmp_path / "trial_2" / file
    lost.unlink()
    if content is not None:
        lost.write_text(content)
    wanted = [TrialSettings((ratio, 1.0), seed) for ratio in (0.0, 0.25, 1.0) for seed in (1, 2, 3)]
    assert study.add(wanted) == {wanted[2]: lost}
    assert len(SweepResults(study, TASK_METRIC, None, False).done) == 8
    assert study.add(wanted) == {}
    assert finish(study) == [wanted[2]]


@pytest.mark.parametrize("kept", [1, -1])
def test_line_of_the_journal_that_was_cut_off_is_mended(kept, study, tmp_path):
    """A full disk cuts off what is written last."""
    study.add(WANTED)
    other_worker = SweepStudy(tmp_path, None, {})
    study.tell(study.take(), None, error="disk full", seconds=1.0)
    journal = tmp_path / "study.log"
    whole = journal.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    journal.write_bytes(whole[: len(whole) - len(last)] + last[:kept])
    study._lock_of_trial.release()  # its worker has died
    assert finish(other_worker) == [*WANTED[1:], WANTED[0]]
    again = SweepStudy(tmp_path, None, {})
    again.add(WANTED)
    assert again.take() is None


def test_frontier_has_what_is_not_beaten_on_both_axes(make_results):
    results = make_results(effect=0.0)
    values = {(0.0, 1.0): (1.0, 3.0), (0.25, 1.0): (2.0, 2.0), (1.0, 1.0): (2.5, 2.5)}
    results.mean = lambda pair, metric: values[pair][metric != TASK_METRIC]
    assert [pair for pair in results.pairs if results.is_frontier(pair, RETENTION_METRIC)] == [BASELINE, (0.25, 1.0)]


def test_page_in_a_browser(make_results, probe, tmp_path):
    results = make_results(effect=-2.0, metric="eval_accuracy")
    (tmp_path / "page.html").write_text(html_page(results, "model: {tiny} <b>", plot(results)), encoding="utf-8")
    report = probe(tmp_path / "page.html")
    assert report["title"] == "wit-trl sweep"
    assert (report["naturalWidth"], report["naturalHeight"]) > (1200, 300)
    pieces = report["pieces"]
    assert all(piece["right"] <= report["innerWidth"] for piece in pieces)
    text = "".join(piece["text"] for piece in pieces)
    for sentence in results.sentences():
        assert sentence.split() == text[text.index(sentence[:20]) :].split()[: len(sentence.split())]
    assert "Held-out prompt 1\nSay <b>{hi}</b>\n" in text
    answers = re.findall(r"^(\S+): answer of (\w+)$", text, flags=re.MULTILINE)
    assert answers == [("before", "base"), ("0", "trial_0"), ("0.25", "trial_3"), ("1", "trial_6")]


def test_table_fits_a_terminal_and_marks_what_was_chosen(make_results):
    results = make_results(effect=-2.0)
    console = Console(file=io.StringIO(), width=80)
    show(console, results)
    shown = console.file.getvalue()
    for metric in ("eval_completion_loss", "eval_other_completion_loss"):
        assert "The intervals are of 95%" in shown
        assert re.search(rf"{metric} +before +[\d.]+\s+0 +3 +[\d.]+\s+0.25 +3 +[\d.]+ +-0.\d+ ± 0.\d+\s", shown)


def test_metric_with_brackets_is_shown_as_it_is(make_results, monkeypatch):
    results = make_results(effect=-2.0)
    results.benchmarks["eval_[/b]_[a]"] = True
    monkeypatch.setattr(SweepResults, "mean", lambda *args: 0.5)
    monkeypatch.setattr(SweepResults, "difference", lambda *args: None)
    console = Console(file=io.StringIO(), width=200)
    console.print(table(results))
    assert "eval_[/b]_[a]" in console.file.getvalue()


@pytest.mark.parametrize("lost", ["result.json", "shown_prompts.json", "answers.parquet", "retention_rows.parquet"])
def test_a_base_that_lost_a_file_is_noticed(lost, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for name in ("result.json", "shown_prompts.json"):
        (base / name).write_text("{}")
    for name in ("answers.parquet", "retention_rows.parquet"):
        Dataset.from_dict({"a": [1]}).to_parquet(base / name)
    assert lost_file(base) is None
    (base / lost).write_text("")
    assert lost_file(base) == base / lost


def test_time_left_is_that_of_the_rounds_to_come(study):
    study.add([TrialSettings(BASELINE, seed) for seed in range(8)])
    for seconds in (50, 70):
        study.tell(study.take(), 1.0, seconds=seconds)
    study.tell(study.take(), None, seconds=1, error="out of memory")
    study.take()
    assert time_left(study.trials) == timedelta(minutes=5)  # 1 runs, 4 wait
    study.take()
    assert time_left(study.trials) == timedelta(minutes=3)  # 2 run, 3 wait
