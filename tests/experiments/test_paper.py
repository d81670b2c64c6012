"""The paper's experiments: grids behind tables and figures, and the numbers it printed."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from l2l_prune import DSDSchedule
from l2l_prune.experiments.cli import app
from l2l_prune.experiments.paper import EXPERIMENTS, experiment
from l2l_prune.experiments.report.finished_runs import FinishedRun
from l2l_prune.experiments.report.paper_numbers import printed_accuracy
from l2l_prune.experiments.running.sweep import expand


def configs(name, data=None, **options):
    base, grids = experiment(name, data)
    return expand({**base, **options}, [{**grid, "shots": [1, 5], "seeds": 2} for grid in grids])


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("data", [None, "glyphs"])
def test_every_experiment_has_runs_whose_shape_survives_scaling(name, data):
    whole, small = configs(name, data), configs(name, data, scale=0.01)
    assert len(whole) == len(small)
    for one, other in zip(whole, small, strict=True):
        lengths = [s.iterations for s in other.schedule.segments]
        expected = [s.iterations / 100 for s in one.schedule.segments]
        assert lengths == pytest.approx(expected, abs=1)
        assert (one.name, one.channels, one.shots) == (other.name, other.channels, other.shots)


def test_table_1_has_the_settings_of_section_5_1():
    runs = [c for c in configs("table1") if c.seed == 0 and c.shots == 5]
    assert len(runs) == 3 * 4
    assert {c.data for c in runs} == {"mini-imagenet"}
    for c in runs:
        assert (c.train_shots, c.inner_batch, c.inner_steps, c.tasks) == (15, 10, 8, 5)
        assert (c.eval_steps, c.final_tasks, c.meta_lr, c.transductive) == (50, 10_000, 1.0, True)
        assert c.schedule.iterations == 100_000
    narrow = next(c for c in runs if c.name == "DSD" and c.channels == 32)
    assert narrow.schedule == DSDSchedule(0.4, pretrain=30_000, prune=50_000, retrain=20_000)
    wide = next(c for c in runs if c.name == "DSD" and c.channels == 256)
    assert wide.schedule == DSDSchedule(0.6, pretrain=30_000, prune=60_000, retrain=10_000)


def test_figure_4_varies_ratio_and_interval():
    runs = [c for c in configs("figure4", "mini-imagenet") if c.seed == 0 and c.shots == 1]
    shapes = {
        (c.schedule.prune, c.schedule.retrain, c.schedule.rounds)
        for c in runs
        if c.name.startswith("IHT")
    }
    assert shapes == {
        *[(15_000, 5_000, 4), (18_000, 2_000, 4), (10_000, 10_000, 4), (5_000, 15_000, 4)],
        *[(30_000, 10_000, 2), (7_500, 2_500, 8), (3_750, 1_250, 16)],
    }


def test_an_unknown_experiment_is_named():
    with pytest.raises(ValueError, match=r"one of table1, .*, got 'table9'"):
        experiment("table9")


@pytest.mark.parametrize(
    ("name", "match", "printed"),
    [
        ("table1", ("dense", 64, 1), "51.1 ± 0.4"),
        ("table1", ("IHT", 256, 5), "66.6 ± 0.4"),
        ("table2", ("DSD", 256, 1), "55.0 ± 0.5"),
        ("table3", ("IHT, no retrain", 128, 1), "42.0 ± 0.4"),
        ("table3", ("DSD, no pretrain", 64, 5), "66.3 ± 0.4"),
        ("figure1", ("DSD", 64, 1), "51.9 ± 0.5"),  # at 30%
        ("figure4", ("IHT, 8 rounds", 64, 1), None),
    ],
)
def test_the_numbers_of_the_paper_are_found(name, match, printed):
    found = set()
    for config in configs(name):
        if (config.name, config.channels, config.shots) == match:
            run = FinishedRun({"config": config.to_json()}, Path(), config.schedule.iterations)
            found.add(printed_accuracy(run))
    assert printed in found
    glyphs = configs(name, "glyphs")[0]
    run = FinishedRun({"config": glyphs.to_json()}, Path(), glyphs.schedule.iterations)
    assert printed_accuracy(run) is None


def test_other_methods_at_the_same_rate_have_no_number():
    config = expand(
        {"algorithm": "reptile", "published": True, "data": "mini-imagenet"},
        {"schedule": "dsd", "sparsity": 0.3, "criterion": "random"},
    )[0]
    run = FinishedRun({"config": config.to_json()}, Path(), config.schedule.iterations)
    assert printed_accuracy(run) is None


@pytest.mark.process
@pytest.mark.slow
def test_one_command_runs_an_experiment_and_writes_its_report(tmp_path, monkeypatch):
    data, grids = EXPERIMENTS["figure2"]
    narrow = [{**grid, "channels": 8} for grid in grids]
    monkeypatch.setitem(EXPERIMENTS, "figure2", (data, narrow))
    arguments = ["paper", "figure2", "--scale", "0.0002", "--shots", "1", "--eval-tasks", "2"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "f2")])
    assert result.exit_code == 0, result.output
    report = (tmp_path / "f2" / "report.md").read_text()
    assert "| DSD 40%, no retrain |" in report
    assert list((tmp_path / "f2").glob("variants-*.png"))
    again = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "f2")])
    assert "5 of 5 runs had finished before" in again.output


def test_a_missing_data_set_is_told_before_anything_runs(tmp_path):
    arguments = ["paper", "table1", "--data-root", str(tmp_path), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "mini-imagenet-cache-train.pkl" in result.output
    assert not (tmp_path / "out").exists()
