"""A run's own folder: what it writes and removes there, and what it leaves alone."""

from __future__ import annotations

import itertools
import json
import os

import filelock
import pytest
from typer.testing import CliRunner

from l2l_prune._basics.files import replace_file
from l2l_prune.experiments.cli import app
from l2l_prune.experiments.config import make_config
from l2l_prune.experiments.report.results import read_result
from l2l_prune.experiments.running import run_folder
from l2l_prune.experiments.running.checkpoint import (
    load_checkpoint,
    remove_checkpoint,
    save_checkpoint,
)
from l2l_prune.experiments.running.run import run
from l2l_prune.experiments.running.run_folder import run_into
from l2l_prune.experiments.running.storage import finished_run, locked_folder, run_name


def settings(**options):
    small = {"channels": 2, "tasks": 1, "final_tasks": 2, "curve_tasks": 1, "inner_steps": 1}
    return make_config("reptile", "dense", iterations=10, **{**small, **options})


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_finished_run_removes_its_own_checkpoint_and_nothing_else(tmp_path):
    stopped, other = settings(seed=0), settings(seed=1)
    for config in (stopped, other):
        place = tmp_path / run_name(config)
        place.mkdir()
        (place / "notes.txt").write_text("mine")
        list(itertools.islice(run(config, place / "checkpoint.pt", checkpoint_every=2), 7))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine.pt").write_text("mine")
    before = content(tmp_path)
    assert run_into(other, tmp_path).error is None
    gone = before.keys() - content(tmp_path).keys()
    assert gone == {f"{run_name(other)}/checkpoint.pt{more}" for more in ("", ".previous")}
    assert all(content(tmp_path)[name] == before[name] for name in before.keys() - gone)
    progress, *_ = run(stopped, tmp_path / run_name(stopped) / "checkpoint.pt")
    assert progress.iteration == 7  # and not 1


@pytest.mark.parametrize("inner_lr", [1e30, 1e15])
def test_a_diverged_run_fails_and_says_so(inner_lr, tmp_path):
    config = settings(inner_lr=inner_lr, inner_steps=3)
    outcome = run_into(config, tmp_path)
    assert "FloatingPointError" in outcome.error
    assert "not finite" in outcome.error
    assert "diverged" in (tmp_path / run_name(config) / "error.txt").read_text()
    assert not list(tmp_path.rglob("results.json"))


def test_the_command_fails_with_a_diverged_run(tmp_path, in_this_process):
    small = ["--iterations", "20", "--channels", "2", "--tasks", "1", "--eval-tasks", "2"]
    line = ["run", "--schedule", "dense", *small, "--inner-lr", "1e30", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 2
    assert "not finite" in result.stderr
    assert not list(tmp_path.rglob("results.json"))


def test_final_weights_that_are_not_finite_fail_the_run(tmp_path, monkeypatch):
    """Scores need not show it: weights of a unit that is never active."""
    build = run_folder.run.__globals__["build"]

    def build_broken(config, shape):
        algorithm = build(config, shape)
        finalize = algorithm.finalize

        def finalize_broken():
            net = finalize()
            net.classifier.bias.data[0] = float("nan")
            return net

        algorithm.finalize = finalize_broken
        return algorithm

    monkeypatch.setitem(run_folder.run.__globals__, "build", build_broken)
    outcome = run_into(settings(), tmp_path)
    assert "classifier.bias of the final weights are not finite" in outcome.error
    assert not list(tmp_path.rglob("results.json"))


def test_nothing_is_touched_in_a_folder_that_another_process_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_PATIENCE", 0)
    config = settings()
    place = tmp_path / run_name(config)
    place.mkdir()
    (place / "error.txt").write_text("theirs")
    with replace_file(place / "results.json") as temporary:
        pass
    temporary.write_text("being written")
    (place / "results.json").unlink()
    with filelock.FileLock(place / ".lock"):
        before = content(tmp_path)
        assert "another l2l-prune is writing to" in run_into(config, tmp_path).error
        with locked_folder(tmp_path):
            pass
        after = content(tmp_path)
    after.pop(".lock", None)
    assert after == before
    assert run_into(config, tmp_path).error is None
    assert not temporary.exists()
    assert not (place / "error.txt").exists()


def test_a_symbolic_link_stays_and_its_file_is_written(tmp_path):
    config = settings()
    place, elsewhere = tmp_path / "out" / run_name(config), tmp_path / "elsewhere"
    place.mkdir(parents=True)
    elsewhere.mkdir()
    (place / "results.json").symlink_to(elsewhere / "kept.json")
    assert run_into(config, tmp_path / "out").error is None
    assert (place / "results.json").is_symlink()
    assert json.loads((elsewhere / "kept.json").read_text())["runs"]
    assert os.listdir(elsewhere) == ["kept.json"]


def test_checkpoints_behind_a_symbolic_link(tmp_path):
    config, link = settings(), tmp_path / "run.pt"
    (tmp_path / "elsewhere").mkdir()
    link.symlink_to(tmp_path / "elsewhere" / "kept.pt")
    for done in (1, 2):
        save_checkpoint(link, config, {"done": done})
    assert sorted(os.listdir(tmp_path / "elsewhere")) == ["kept.pt", "kept.pt.previous"]
    assert load_checkpoint(link, config) == {"done": 2}
    (tmp_path / "elsewhere" / "kept.pt").unlink()  # killed between the two renames
    assert load_checkpoint(link, config) == {"done": 1}
    assert link.is_symlink()
    remove_checkpoint(link)
    assert os.listdir(tmp_path / "elsewhere") == []


def test_results_come_back_from_their_file(tmp_path):
    config = settings()
    (*_, result) = run(config)
    assert run_into(config, tmp_path).error is None
    file = tmp_path / run_name(config) / "results.json"
    found = read_result(finished_run(file.parent, config), file)
    assert (found.name, found.train, found.test) == (result.name, result.train, result.test)
    assert found.curve == result.curve
    entry = json.loads(file.read_text())["runs"][0]
    del entry["curve"][0]["train_per_task"]
    with pytest.raises(ValueError, match=r"results\.json is damaged .*delete it and run it again"):
        read_result(entry, file)
