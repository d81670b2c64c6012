"""Event files, read back by TensorBoard itself."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

from l2l_prune.experiments.cli import app
from l2l_prune.experiments.config import make_config
from l2l_prune.experiments.running.run import RunResult, run

SETTINGS = {"iterations": 20, "channels": 4, "tasks": 1, "final_tasks": 2}


def scalars(folder):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(folder))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(e.step, round(e.value, 5)) for e in accumulator.Scalars(tag)] for tag in tags}


def expected(curve):
    return {
        "accuracy/train": [(p.iteration, round(p.train.mean, 5)) for p in curve],
        "accuracy/test": [(p.iteration, round(p.test.mean, 5)) for p in curve],
        "accuracy/gap": [(p.iteration, round(p.train.mean - p.test.mean, 5)) for p in curve],
        "sparsity": [(p.iteration, round(p.sparsity, 5)) for p in curve],
    }


def test_a_stopped_and_resumed_run_logs_its_curve_once(tmp_path):
    pytest.importorskip("tensorboard")
    config = make_config("reptile", "dsd", **SETTINGS)
    stopped = run(config, tmp_path / "c.pt", checkpoint_every=7, events=tmp_path / "events")
    for _ in range(12):  # points at 8, 10 and 12 came after the checkpoint
        next(stopped)
    stopped.close()
    *_, result = run(config, tmp_path / "c.pt", checkpoint_every=7, events=tmp_path / "events")
    assert isinstance(result, RunResult)
    assert [p.iteration for p in result.curve] == list(range(2, 21, 2))
    assert scalars(tmp_path / "events") == expected(result.curve)


@pytest.mark.parametrize("command", ["run", "sweep"])
@pytest.mark.slow
def test_the_commands_write_them(tmp_path, command):
    pytest.importorskip("tensorboard")
    out = tmp_path / "out"
    if command == "run":
        arguments = ["run", "--schedule", "dense", "--iterations", "20", "--channels", "4"]
        arguments += ["--tasks", "1", "--eval-tasks", "2"]
    else:
        grid = 'schedule = "dense"\nalgorithm = "reptile"\n'
        grid += "".join(f"{key} = {value}\n" for key, value in SETTINGS.items())
        (tmp_path / "grid.toml").write_text(f"[base]\n{grid}")
        arguments = ["sweep", str(tmp_path / "grid.toml")]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out), "--tensorboard"])
    assert result.exit_code == 0, result.output
    (events,) = out.rglob("events.out.*")
    (file,) = out.rglob("results.json")
    curve = json.loads(file.read_text())["runs"][0]["curve"]
    found = scalars(events.parent)["accuracy/test"]
    assert found == [(p["iteration"], round(p["test"], 5)) for p in curve]


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = make_config("reptile", "dense", **SETTINGS)
    with pytest.raises(ImportError, match=r"l2l-prune\[tensorboard\]"):
        next(run(config, events=tmp_path))
    assert list(tmp_path.iterdir()) == []
