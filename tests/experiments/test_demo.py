from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from l2l_prune.experiments import demo as demo_module
from l2l_prune.experiments.cli import app
from l2l_prune.experiments.demo import demo_configs
from l2l_prune.experiments.report.results import conclusions
from l2l_prune.experiments.run_result import Progress, RunResult
from l2l_prune.experiments.running.run import run
from l2l_prune.fewshot.evaluation import Mean
from l2l_prune.fewshot.models import Conv4
from tests.experiments.conftest import run_here

COMMAND = [sys.executable, "-m", "l2l_prune", "demo"]


def test_the_same_seed_gives_the_same_run():
    config = dataclasses.replace(demo_configs(20, 0.5, 3, eval_tasks=2)[1], channels=8)
    runs = [list(run(config)) for _ in range(2)]
    for messages in runs:
        assert [m.iteration for m in messages[:-1]] == list(range(1, 21))
        assert all(isinstance(m, Progress) for m in messages[:-1])
    a, b = (messages[-1] for messages in runs)
    assert a.train == b.train
    assert a.test == b.test
    assert all(torch.equal(a.weights[k], b.weights[k]) for k in a.weights)
    phases = [m.phase for m in runs[0][:-1]]
    assert phases == ["pretrain"] * 3 + ["prune"] * 10 + ["retrain"] * 7


def result(name, test):
    return RunResult(name, Mean((0.9, 0.9)), Mean(test), 1.0)


def test_another_control_is_compared_too():
    full, pruned, small = (
        result(name, (score, score - 0.01, score + 0.01))
        for name, score in (("dense", 0.7), ("RigL", 0.6), ("small", 0.5))
    )
    lines = conclusions([full, pruned, small], {"RigL": "small"})
    assert [line.split(" on test")[0] for line in lines[:-1]] == [
        "RigL - dense",
        "small - dense",
        "RigL - small",
    ]
    assert "+10.0" in lines[2]
    assert "better" in lines[2]
    assert "did not raise test accuracy above that of dense" in lines[-1]


def test_verdicts_say_what_happened():
    dense = result("dense", (0.5, 0.5, 0.5))
    better, worse, same = (
        result("DSD", values) for values in ((0.6, 0.61, 0.62), (0.4, 0.41, 0.42), (0.3, 0.5, 0.7))
    )
    assert "better" in conclusions([dense, better])[0]
    assert "One seed only" in conclusions([dense, better])[-1]
    for other, word in ((worse, "worse"), (same, "not significant")):
        lines = conclusions([dense, other])
        assert word in lines[0]
        assert "did not raise" in lines[-1]


@pytest.fixture(
    scope="module",
    params=["here", pytest.param("command", marks=[pytest.mark.slow, pytest.mark.process])],
)
def demo(request, tmp_path_factory):
    """As short as it goes: in this process with a small network, and the command as it is."""
    folder = tmp_path_factory.mktemp("demo") / "runs" / "demo"
    arguments = ["--iterations", "20", "--eval-tasks", "5", "--out", str(folder)]
    if request.param == "command":
        environment = {**os.environ, "COLUMNS": "100"}
        done = subprocess.run(
            [*COMMAND, *arguments], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        return folder, done.stdout, 64

    def small(*settings):
        return [
            dataclasses.replace(config, channels=config.channels // 8)
            for config in demo_configs(*settings)
        ]

    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        patch.setattr(demo_module, "demo_configs", small)
        patch.setenv("COLUMNS", "100")
        result = CliRunner().invoke(app, ["demo", *arguments])
    assert result.exit_code == 0, result.output
    return folder, result.stdout, 8


def test_demo_prints_one_table_with_four_methods(demo):
    _, out, _ = demo
    rows = [line for line in out.splitlines() if "│" in line]
    assert [row.split("│")[1].strip() for row in rows] == [
        "dense",
        "DSD",
        "RigL",
        "narrow",
    ]
    for row in rows:
        assert row.count("±") == 3
    for pair in ("DSD - dense", "RigL - dense", "RigL - narrow"):
        assert f"{pair} on test tasks" in out


def test_demo_writes_results_curves_and_plain_weights(demo):
    folder, _, channels = demo
    names = sorted(p.name for p in folder.iterdir() if p.name != ".lock")
    assert names[:2] == ["curves.csv", "curves.png"]
    places = sorted(folder.glob("reptile-*"))
    assert names[2:] == [place.name for place in places]
    entries = {}
    for place in places:
        (entry,) = json.loads((place / "results.json").read_text())["runs"]
        entries[entry["config"]["name"]] = entry
        model = Conv4(ways=5, channels=entry["config"]["channels"])
        (weights,) = place.glob("*.pt")
        model.load_state_dict(torch.load(weights, weights_only=True))
    assert entries.keys() == {"dense", "DSD", "RigL", "narrow"}
    full, small = (entries[name]["config"]["channels"] for name in ("dense", "narrow"))
    assert full == channels > small
    for entry in entries.values():
        tasks = entry["config"]["final_tasks"]
        for part in ("train", "test"):
            values = entry[part]["per_task"]
            assert len(values) == tasks
            assert entry[part]["mean"] == pytest.approx(sum(values) / tasks)
        assert entry["curve"][-1]["iteration"] == 20
    sparsities = [point["sparsity"] for point in entries["DSD"]["curve"]]
    assert max(sparsities) == pytest.approx(0.5, abs=0.01)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.process
def test_ctrl_c_stops_everything_and_writes_no_result(tmp_path):
    process = subprocess.Popen(
        [*COMMAND, "--iterations", "5000", "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that runs the tests in the background lets them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 600
        while len(children(process.pid)) < 2:  # the first run, beside the resource tracker
            assert time.monotonic() < deadline
            time.sleep(0.5)
        time.sleep(3)
        workers = children(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=600)
        assert process.returncode == 130
        assert "stopped by Ctrl-C" in out
        assert not list((tmp_path / "out").rglob("results.json"))
        deadline = time.monotonic() + 120
        while any(map(alive, workers)):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def children(pid):
    tasks = Path(f"/proc/{pid}/task")
    if not tasks.exists():
        return []
    return [c for t in tasks.iterdir() for c in (t / "children").read_text().split()]


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--sparsity", "1.5"], "--sparsity"),
        (["--sparsity", "0"], "--sparsity"),
        (["--iterations", "3"], "--iterations"),
        (["--iterations", "ten"], "--iterations"),
        (["--seed", "-1"], "--seed"),
        (["--out", __file__], "--out"),
    ],
)
def test_bad_arguments_are_named(arguments, culprit):
    result = CliRunner().invoke(app, ["demo", *arguments])
    assert result.exit_code == 2
    assert culprit in result.stderr


@pytest.mark.process
def test_version_and_help():
    done = subprocess.run(
        [sys.executable, "-m", "l2l_prune", "--version"], capture_output=True, text=True
    )
    assert done.stdout.startswith("l2l-prune 0.")
    assert "--iterations" in CliRunner().invoke(app, ["demo", "--help"]).stdout
