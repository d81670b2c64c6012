"""Sweeps on two local workers: restartable, and one failed run does not lose the others."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import filelock
import pytest
from rich.console import Console
from typer.testing import CliRunner

from l2l_prune.experiments.cli import app
from l2l_prune.experiments.report.comparisons import read_comparisons
from l2l_prune.experiments.running.processes import run_all
from l2l_prune.experiments.running.run_folder import Outcome
from l2l_prune.experiments.running.storage import run_name
from l2l_prune.experiments.running.sweep import check_arms, expand, sweep

BASE = {
    "algorithm": "reptile",
    "iterations": 20,
    "channels": 4,
    "tasks": 1,
    "final_tasks": 2,
    "curve_tasks": 2,
}


def test_a_grid_is_every_combination_and_the_dense_run_once():
    grid = {"schedule": ["dense", "dsd"], "sparsity": [0.3, 0.5], "shots": [1, 5], "seeds": 2}
    configs = expand(BASE, grid)
    assert len(configs) == (1 + 2) * 2 * 2
    assert len({run_name(c) for c in configs}) == 12
    assert {c.seed for c in configs} == {0, 1}
    assert expand({**BASE, "schedule": "iht"}, {"seed": [7]})[0].seed == 7


def test_several_grids_are_joined_and_early_seeds_come_first():
    grids = [
        {"schedule": ["dense", "dsd"], "seeds": 2},
        {"schedule": ["dsd"], "retrain": [0.0, 0.1], "seeds": 2},
        {"schedule": ["dense"], "retrain": [0.0], "seed": [0]},  # the dense run once more
    ]
    configs = expand({**BASE, "iterations": 40}, grids)
    names = ["dense", "DSD", "DSD, no retrain", "DSD, retrain 10%"]
    assert [(c.name, c.seed) for c in configs] == [(n, s) for s in (0, 1) for n in names]


def test_replicates_have_a_seed_and_its_split_each_and_come_one_after_the_other():
    grids = [
        {"method": "dense", "channels": [4, 8], "replicates": 3},
        {"method": "dsd", "replicates": 3},
        {"method": "iht", "seed": [101], "split": 101},
    ]
    configs = expand({**BASE, "seed": 7}, grids)
    arms = [("dense", 4), ("dense", 8), ("DSD", 4)]
    wanted = [(*arm, number) for number in (100, 101, 102) for arm in arms]
    wanted.insert(6, ("IHT", 4, 101))
    assert [(c.name, c.channels, c.seed) for c in configs] == wanted
    assert all(config.split == config.seed for config in configs)


@pytest.mark.parametrize(
    ("base", "grid", "words"),
    [
        (BASE, {"method": "dsd", "replicates": 2, "seeds": 2}, "give seeds or replicates, not"),
        (BASE, {"method": "dsd", "replicates": 2, "split": 1}, "give replicates or split, not"),
        (BASE, {"method": "dsd", "replicates": 0}, "replicates"),
        (BASE, {"method": ["dense", ["dsd"]]}, "method must list single values"),
        ({**BASE, "chanels": 3, "schedule": "dsd"}, {}, "chanels"),
        (BASE, {}, "method"),
        (BASE, [], "grid must not be empty"),
        ({**BASE, "chanels": 3, "method": "dsd"}, {}, "did you mean channels"),
        ({**BASE, "method": ["dsd"]}, {}, r"method of \[base\] must be one value"),
        (BASE, {"schedule": ["dsd"], "sparsity": [2.0]}, "sparsity"),
        ({}, {"schedule": ["dsd"]}, "algorithm"),
    ],
)
def test_bad_grids(base, grid, words):
    with pytest.raises((TypeError, ValueError), match=words):
        expand(base, grid)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("cluster", [None, "local"])
def test_a_failed_run_does_not_lose_the_others_and_a_second_sweep_mends_it(tmp_path, cluster):
    if cluster:
        pytest.importorskip("submitit")
    configs = expand({**BASE, "schedule": "dense"}, {"seeds": 3})
    # A folder where the run wants to write a file: one of the three cannot end.
    obstacle = tmp_path / run_name(configs[1]) / "curves.csv"
    obstacle.mkdir(parents=True)
    text = io.StringIO()
    outcomes = sweep(configs, tmp_path, Console(file=text, width=200), jobs=2, cluster=cluster)
    assert [outcome.error is None for outcome in outcomes] == [True, False, True]
    assert "IsADirectoryError" in outcomes[1].error
    assert "Traceback" in (obstacle.parent / "error.txt").read_text()
    obstacle.rmdir()
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/results.json")}
    assert len(stamps) == 2

    outcomes = sweep(configs, tmp_path, Console(file=text, width=200), jobs=2, cluster=cluster)
    assert all(outcome.error is None for outcome in outcomes)
    assert "2 of 3 runs had finished before" in text.getvalue()
    last = text.getvalue().splitlines()[-1]
    assert re.fullmatch(r"3/3 .*: train \d+\.\d, test \d+\.\d \(0:00:00 left\)", last)
    assert not (obstacle.parent / "error.txt").exists()
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())
    for config in configs:
        run = json.loads((tmp_path / run_name(config) / "results.json").read_text())["runs"][0]
        assert run["config"]["seed"] == config.seed
    assert not list(tmp_path.glob("*/checkpoint.pt"))


def kill_itself_once(config, folder, logger, tell):
    """Stands for a worker that the kernel kills for its memory."""
    mark = folder / "killed"
    if config.seed == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return Outcome(run_name(config), None)


def kill_itself_always(config, folder, logger, tell):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.process
@pytest.mark.slow
def test_a_killed_worker_does_not_lose_the_others(tmp_path):
    configs = expand({**BASE, "schedule": "dense"}, {"seeds": 3})
    console = Console(file=io.StringIO())
    outcomes = list(run_all(configs, tmp_path, console, jobs=2, work=kill_itself_once))
    assert sorted(outcome.name for outcome in outcomes) == sorted(map(run_name, configs))
    assert [outcome.error for outcome in outcomes] == [None] * 3
    outcomes = list(run_all(configs, tmp_path, console, jobs=2, work=kill_itself_always))
    assert len(outcomes) == 3
    assert all("was killed" in outcome.error for outcome in outcomes)
    for config in configs:  # a report reads it
        assert "was killed" in (tmp_path / run_name(config) / "error.txt").read_text()


@pytest.mark.process
@pytest.mark.slow
def test_workers_end_with_a_killed_sweep_and_the_next_one_goes_on(tmp_path):
    settings = {**BASE, "schedule": '"dense"', "algorithm": '"reptile"', "iterations": 5000}
    lines = [f"{key} = {value}" for key, value in settings.items()]
    (tmp_path / "grid.toml").write_text("\n".join(["[base]", *lines]))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "l2l_prune", "sweep", str(tmp_path / "grid.toml")]
    sweeping = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not list(out.glob("*/checkpoint.pt")):
            assert time.monotonic() < deadline
            assert sweeping.poll() is None
            time.sleep(0.5)
    finally:
        sweeping.kill()
        sweeping.wait()
    (place,) = (path.parent for path in out.glob("*/checkpoint.pt"))
    with filelock.FileLock(place / ".lock", timeout=60):  # else the worker trains on for minutes
        assert (place / "checkpoint.pt").exists()
        assert not (place / "results.json").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("[base", "sweep.toml"),
        ("[bass]\nx = 1\n", "may hold only the tables"),
        ("[base]\nchanels = 3\n", "chanels"),
        ("[base]\n[comparison]\n", "begin with [[comparison]]"),
        ('[base]\n[[comparison]]\nfamly = "A"\n', "has no famly"),
        (
            '[base]\nalgorithm = "reptile"\nmethod = "dense"\n[grid]\nways = [5, 31]\n',
            "the train split is too small: ways=31",
        ),
    ],
)
def test_bad_files_are_told_in_a_line(tmp_path, text, words):
    file = tmp_path / "sweep.toml"
    if text is not None:
        file.write_text(text)
    result = CliRunner().invoke(app, ["sweep", str(file), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


PLAN = """
[base]
algorithm = "reptile"
iterations = 4
[[grid]]
method = "dense"
replicates = 2
[[grid]]
method = "dsd"
criterion = "random"
replicates = 2
[[comparison]]
family = "A"
treatment = {treatment}
control = {{ name = "dense" }}
"""


@pytest.mark.parametrize(
    ("treatment", "words"),
    [
        ('{ name = "DSD, randm" }', "no run is DSD, randm; the runs are: dense; DSD, random"),
        ("{ channels = 64 }", "channels 64 means both"),
    ],
)
def test_a_comparison_of_runs_that_the_sweep_will_not_have_is_refused(tmp_path, treatment, words):
    file, out = tmp_path / "plan.toml", tmp_path / "out"
    file.write_text(PLAN.format(treatment=treatment))
    result = CliRunner().invoke(app, ["sweep", str(file), "--out", str(out)])
    assert result.exit_code == 2
    assert f"{file}: comparison " in result.stderr
    assert words in result.stderr
    assert not out.exists()


def test_a_comparison_may_name_what_another_program_adds_to_the_scores(tmp_path):
    """As docs/results/study/more-steps.toml does."""
    [stated] = read_comparisons(
        [{"family": "A", "treatment": {"name": "DSD", "steps": 50}, "control": {"name": "dense"}}]
    )
    configs = expand(BASE, {"method": ["dense", "dsd"]})
    assert check_arms(configs, [stated]) == ["steps"]
