"""A training ends with `wit-trl sft`, however that ends, and imports nothing from the working folder."""

import contextlib
import multiprocessing
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from wit_trl import cli
from wit_trl.cli import launch


REPOSITORY = Path(__file__).parents[2]
# In the place of `wit_trl.cli.sft`: as that does, without a model
TRAINING = """
import csv, pathlib, signal, sys, time
from wit_trl.cli import end_with_launcher
end_with_launcher()
def stop(*_):
    pathlib.Path("signal").touch()
    sys.exit(3)
if "catch" in sys.argv:
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, stop)
pathlib.Path("started").touch()
time.sleep(100)
"""


def run_launcher(args):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which `nohup` around the tests would have it ignore
    with Path("stderr").open("w") as file, contextlib.redirect_stderr(file):
        launch.main(["--use_cpu", *args], "training")


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """A function that launches a training in this folder, and returns its launcher and the training."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "training.py").write_text(TRAINING)
    # A module of the standard library by its name
    (tmp_path / "csv.py").write_text("raise SystemExit('imported from the working folder')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'modules'}{os.pathsep}{REPOSITORY}")
    monkeypatch.chdir(tmp_path)
    started = []

    def launch(*args):
        process = multiprocessing.get_context("fork").Process(target=run_launcher, args=(args,))
        process.start()
        started.append(process)
        wait_until((tmp_path / "started").exists)
        return process, psutil.Process(process.pid).children()[0]

    yield launch
    for process in started:
        process.kill()


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "too late"
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT", "SIGKILL"])
def test_training_ends_with_the_launcher(name, launched, tmp_path):
    launcher, training = launched()
    number = signal.Signals[name]
    os.kill(launcher.pid, number)
    wait_until(lambda: not training.is_running() or training.status() == psutil.STATUS_ZOMBIE)
    launcher.join(10)
    assert launcher.exitcode == (-9 if name == "SIGKILL" else 128 + number)
    said = {"SIGINT": "Interrupted. With --resume_from_checkpoint True, it goes on from its last checkpoint.\n"}
    killed = "" if name == "SIGKILL" else f"error: {name} ended a process of the training.\n"
    assert (tmp_path / "stderr").read_text() == said.get(name, killed)


def test_signal_reaches_a_training_that_handles_it(launched, tmp_path):
    launcher, _ = launched("--dataset_name", "catch")
    os.kill(launcher.pid, signal.SIGTERM)
    launcher.join(10)
    assert launcher.exitcode == 3
    assert (tmp_path / "signal").exists()


def test_training_without_a_launcher_goes_on(monkeypatch):
    """As behind `accelerate launch`, from a shell that ends."""
    monkeypatch.delenv(cli.LAUNCHER, raising=False)
    monkeypatch.setattr("threading.Thread", None)
    cli.end_with_launcher()
