"""What a person sees of runs, on a terminal and in a pipe."""

from __future__ import annotations

import io
import os
import re
import sys
import warnings

import pytest
from rich.console import Console

from l2l_prune.experiments.config import make_config
from l2l_prune.experiments.run_result import Progress
from l2l_prune.experiments.running import display as module
from l2l_prune.experiments.running.display import Display
from l2l_prune.experiments.running.processes import run_all
from l2l_prune.experiments.running.run_folder import Outcome
from l2l_prune.experiments.running.storage import run_name

LONG = {"dropout": 0.1, "weight_decay": 0.01, "retrain": 0.1}


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def watched(clock, console, **options):
    """A run of 100 meta-iterations, 10 seconds each, until the 40th."""
    config = make_config("reptile", "dsd", iterations=100, **{**LONG, **options})
    with Display([config], 0, console) as display:
        display.started(config)
        for iteration in range(1, 41):
            clock.now += 10
            display.progress(config, Progress(iteration, "prune", 0.5, 0.617, 0.548))
    return config, display


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_the_live_line_has_phase_accuracy_and_time_left_at_any_width(clock, width):
    file = io.StringIO()
    watched(clock, Console(file=file, force_terminal=True, width=width, color_system=None))
    last = re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", file.getvalue()).splitlines()[-1].rstrip()
    assert last.startswith("DSD, retra")
    assert " ".join(last.split()).endswith("40% prune 50% train 62 test 55 0:10:00")
    assert len(last) <= width


def test_on_a_very_narrow_console_the_time_left_stays(clock):
    file = io.StringIO()
    watched(clock, Console(file=file, force_terminal=True, width=40, color_system=None))
    last = re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", file.getvalue()).splitlines()[-1].rstrip()
    assert " ".join(last.split()).endswith("40% prune 50% 0:10:00")
    assert len(last) <= 40


def test_a_name_may_hold_brackets(clock):
    """Rich would take them for markup, and stop at a closing one."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=140, color_system=None)
    watched(clock, console, name="x [/y] [bold]")
    assert "x [/y] [bold] seed 0" in file.getvalue()


def test_in_a_pipe_there_is_a_line_for_each_point_of_the_curves(clock):
    file = io.StringIO()
    config, display = watched(clock, Console(file=file, width=80))
    display.ended(config, Outcome(run_name(config), None, 0.5, 0.25))
    lines = file.getvalue().splitlines()
    title = "DSD, retrain 10%, dropout 0.1, decay 0.01 seed 0"
    assert lines[0] == f"{title}: starting"
    assert lines[1] == f"{title}: 10/100, prune 50%, train 62 test 55, 0:15:00 left"
    assert lines[2:4] == [
        f"{title}: 20/100, prune 50%, train 62 test 55, 0:13:20 left",
        f"{title}: 30/100, prune 50%, train 62 test 55, 0:11:40 left",
    ]
    assert lines[5] == f"1/1 {title}: train 50.0, test 25.0 (0:00:00 left)"


def test_a_run_that_compiles_says_so(clock):
    file = io.StringIO()
    watched(clock, Console(file=file, width=200), compile=True)
    assert file.getvalue().splitlines()[0].endswith(": compiling")


def talkative(config, folder, logger, tell):
    """A run whose libraries print, to Python's streams and past them."""
    print("a notice")
    sys.stderr.write("another notice\n")
    os.write(2, b"CUDA initialization: found no driver\n")
    warnings.warn_explicit("a library's warning", UserWarning, "/lib/python/torch/cuda.py", 1)
    warnings.warn_explicit("our own warning", UserWarning, Display.__init__.__code__.co_filename, 1)
    sys.stdout.flush()
    return Outcome(run_name(config), None, 0.5, 0.5)


@pytest.mark.process
def test_what_libraries_print_goes_to_a_file(tmp_path, capfd):
    config = make_config("reptile", "dense", iterations=20)
    file = io.StringIO()
    (outcome,) = run_all([config], tmp_path, Console(file=file, width=200), work=talkative)
    assert outcome.error is None
    out, err = capfd.readouterr()
    assert "notice" not in out + err + file.getvalue()
    assert "dense seed 0: our own warning" in file.getvalue().splitlines()
    log = (tmp_path / "logs" / f"{run_name(config)}.txt").read_text()
    words = ("a notice", "another notice", "CUDA initialization", "a library's warning")
    assert all(word in log for word in words)
    assert "library" not in out + err + file.getvalue()
