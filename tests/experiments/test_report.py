"""The report of a folder of runs with known numbers."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats
from typer.testing import CliRunner

from l2l_prune.experiments.cli import app
from l2l_prune.experiments.config import RunConfig, make_config
from l2l_prune.experiments.report import figures, finished_runs, plots, results
from l2l_prune.experiments.report.comparisons import Comparison
from l2l_prune.experiments.report.finished_runs import read_folder, schedule_rate
from l2l_prune.experiments.report.report import write_report
from l2l_prune.experiments.report.results import write_results
from l2l_prune.experiments.run_result import Point, RunResult
from l2l_prune.experiments.running.compare_seeds import compare_seeds
from l2l_prune.experiments.running.processes import RunFailed
from l2l_prune.experiments.running.storage import finished_run, run_name
from l2l_prune.experiments.running.sweep import expand, sweep
from l2l_prune.fewshot.evaluation import Mean
from l2l_prune.schedules.paper import Schedule, Segment

TEST = {("dense", 0): 0.70, ("dense", 1): 0.74, ("dense", 2): 0.72}
TEST |= {("dsd", 0): 0.75, ("dsd", 1): 0.78, ("dsd", 2): 0.77}
TEST |= {("iht", 0): 0.69, ("iht", 1): 0.76, ("iht", 5): 0.99}  # seed 5 has no dense partner


def finish(folder: Path, schedule: str, train: float, test: float, **options) -> Path:
    """A folder as a run with these accuracies leaves it."""
    algorithm = options.pop("algorithm", "reptile")
    config = make_config(algorithm, schedule, **{"iterations": 40, **options})
    return write(folder / run_name(config), config, train, test)


def write(place: Path, config: RunConfig, train: float, test: float) -> Path:
    """What the library writes of a run with these accuracies."""
    steps = [config.schedule.iterations // 2, config.schedule.iterations]
    curve = [
        Point(i, "x", 0.0, Mean((train, train)), Mean((test * i / steps[1],) * 2)) for i in steps
    ]
    result = RunResult(config.name, Mean((train, train)), Mean((test, test)), 3.0, curve)
    place.mkdir(parents=True)
    write_results(place, [config], [result])
    return place


def tables(text: str) -> list[list[list[str]]]:
    """Cells of each Markdown table, without the line under its header."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.M)
    rows = [[line.split("|")[1:-1] for line in block.splitlines()] for block in blocks]
    return [[[c.strip() for c in row] for i, row in enumerate(t) if i != 1] for t in rows]


def reported(folder: Path) -> list[dict[str, dict[str, str]]]:
    """Rows of each table of the folder's report by their first cell, and in them by header."""
    write_report(folder)
    shown = tables((folder / "report.md").read_text())
    return [{row[0]: dict(zip(t[0], row, strict=True)) for row in t[1:]} for t in shown]


@pytest.fixture
def no_curves(monkeypatch):
    """Pictures take most of the time, and say nothing here."""
    monkeypatch.setattr(results, "run_curves", lambda *arguments: None)
    monkeypatch.setattr("l2l_prune.experiments.report.report._figures", lambda *arguments: [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    for shots in (1, 5):
        for (schedule, seed), test in TEST.items():
            more = 0.1 if shots == 5 else 0.0
            finish(folder, schedule, 0.96, test + more, seed=seed, shots=shots)
    write_report(folder)
    return folder


def test_the_table_has_a_row_a_method_and_columns_for_shots(folder):
    header, *body = tables((folder / "report.md").read_text())[0]
    assert header == [
        *("method", "backbone", "1-shot train", "1-shot test", "1-shot gap"),
        *("5-shot train", "5-shot test", "5-shot gap", "seeds", "seconds"),
    ]
    assert [row[0] for row in body] == ["dense", "DSD 50%", "IHT 50%"]
    assert {row[1] for row in body} == {"64-64-64-64"}
    width = stats.t.ppf(0.975, 2) * 0.02 / 3**0.5
    assert body[0][3] == f"72.0 ± {100 * width:.1f}"
    assert body[0][4] == f"24.0 ± {100 * width:.1f}"
    assert body[0][6] == f"82.0 ± {100 * width:.1f}"
    assert body[1][8] == "3"


def test_runs_in_bfloat16_are_compared_with_their_like(tmp_path, no_curves):
    for bf16, test in ((False, 0.7), (True, 0.6)):
        for seed in (0, 1):
            finish(tmp_path, "dense", 0.9, test, seed=seed, bf16=bf16)
            finish(tmp_path, "dsd", 0.9, test + 0.05, seed=seed, bf16=bf16)
    write_report(tmp_path)
    shown = tables((tmp_path / "report.md").read_text())
    sizes = {row[1]: row[3] for row in shown[0] if row[0] == "dense"}
    assert sizes["64-64-64-64"].startswith("70.0")
    assert sizes["64-64-64-64, bf16"].startswith("60.0")
    differences = [row for table in shown for row in table if row[0] == "DSD 50%"]
    assert sum("+5.0" in cell for row in differences for cell in row) == 2


def test_differences_are_paired_by_seed(folder):
    header, *body = tables((folder / "report.md").read_text())[1]
    rows = {(row[0], row[2]): dict(zip(header, row, strict=True)) for row in body}
    values = (0.05, 0.04, 0.05)
    width = 100 * stats.t.ppf(0.975, 2) * stats.sem(values)
    mean = 100 * sum(values) / 3
    assert rows["DSD 50%", "1"]["test"] == f"{mean:+.1f} ± {width:.1f} (better)"
    assert rows["DSD 50%", "1"]["gap"] == f"{-mean:+.1f} ± {width:.1f} (smaller)"
    assert rows["DSD 50%", "1"]["train"] == "+0.0 ± 0.0 (not significant)"
    assert rows["IHT 50%", "5"]["seeds"] == "2"
    assert rows["IHT 50%", "5"]["test"].startswith("+0.5")
    assert "(not significant)" in rows["IHT 50%", "5"]["test"]
    assert "test at equal training accuracy" not in header


def test_the_page_is_self_contained(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 3  # the opening's, and curves of two shots
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert page.count("<table>") == 2
    assert "not significant" in page
    assert len(list(folder.glob("curves-*.png"))) == 2


def test_equal_training_accuracy_is_read_off_dense_runs_of_the_same_seed(tmp_path):
    for seed, shift in ((0, 0.0), (1, 0.02)):
        finish(tmp_path, "dense", 0.80, 0.60 + shift, seed=seed, iterations=20)
        finish(tmp_path, "dense", 0.90, 0.70 + shift, seed=seed, iterations=30)
        finish(tmp_path, "dense", 0.98, 0.71 + shift, seed=seed)
        # 0.84 lies at 0.64 on the dense line, 0.94 at 0.705
        finish(tmp_path, "dsd", 0.84, 0.66 + 2 * shift, seed=seed)
        finish(tmp_path, "iht", 0.94, 0.675 + shift, seed=seed)
        finish(tmp_path, "dsd", 0.70, 0.6, seed=seed, criterion="random")  # below all dense ones
        finish(tmp_path, "dsd", 0.9, 0.72 + shift, seed=seed, iterations=30)
    finish(tmp_path, "iht", 0.99, 0.9, seed=2)  # no dense run of this seed
    written = [path.name for path in write_report(tmp_path)]
    assert any(name.startswith("overview-") for name in written)
    assert any(name.startswith("variants-") for name in written)
    header, *body = tables((tmp_path / "report.md").read_text())[1]
    cells = {row[0]: dict(zip(header, row, strict=True)) for row in body}
    equal = {name: row["test at equal training accuracy"] for name, row in cells.items()}
    width = 100 * stats.t.ppf(0.975, 1) * stats.sem([0.02, 0.04])
    assert equal["DSD 50%"] == f"+3.0 ± {width:.1f} (not significant)"
    assert equal["IHT 50%"] == "-3.0 ± 0.0 (worse), 2 of 3 seeds"
    assert equal["DSD 50%, random"] == "-"
    assert cells["dense, 20 iterations"]["test"] == "-11.0 ± 0.0 (worse)"
    assert cells["DSD 50%, 30 iterations"]["test"] == "+2.0 ± 0.0 (better)"  # than dense of 30


def test_ablations_and_the_lengths_of_phases(tmp_path):
    for seed in (0, 1):
        finish(tmp_path, "dense", 0.9, 0.7, seed=seed)
        finish(tmp_path, "dsd", 0.9, 0.7 + seed / 10, seed=seed)
        for pretrain in (0.0, 0.5):
            finish(tmp_path, "dsd", 0.9, 0.6, seed=seed, pretrain=pretrain)
        finish(tmp_path, "iht", 0.9, 0.7, seed=seed)
        for retrain in (0.5, 0.75):
            finish(tmp_path, "iht", 0.9, 0.6, seed=seed, retrain=retrain)
    assert any(path.name.startswith("phases-") for path in write_report(tmp_path))
    header, *body = tables((tmp_path / "report.md").read_text())[0]
    assert header[2] == "pretrain"
    assert "retrain" not in header
    assert [(row[0], row[2]) for row in body if row[2] == "no"] == [("DSD 50%, no pretrain", "no")]
    runs = read_folder(tmp_path).runs
    drawn = {}
    for label, family, value, alike in figures._STUDIES:
        mine = [run for run in runs if run.family == family]
        drawn[label] = {(alike(run), value(run)) for run in mine}
    assert {x for _, x in drawn["pre-training iterations"]} == {0, 12, 20}
    assert {x for _, x in drawn["pruning share of an interval [%]"]} == {75.0, 50.0, 25.0}
    assert {x for _, x in drawn["iterations of an interval"]} == {8.0}


def test_one_seed_has_no_interval(tmp_path):
    finish(tmp_path, "dense", 0.9, 0.7)
    finish(tmp_path, "dsd", 0.9, 0.8)
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "nan" not in text
    assert "+10.0 (one seed)" in text


@pytest.mark.process
@pytest.mark.slow
def test_bounds_stand_beside_the_measured_gap_of_real_runs(tmp_path):
    base = {"algorithm": "reptile", "iterations": 20, "channels": 4, "tasks": 1}
    base |= {"final_tasks": 2, "curve_tasks": 2}
    grid = {"schedule": ["dense", "dsd"], "sparsity": [0.3, 0.6]}
    sweep(expand(base, grid), tmp_path, Console(file=io.StringIO()), jobs=1)
    assert any(path.name.startswith("bounds-") for path in write_report(tmp_path))
    dense = next(run for run in read_folder(tmp_path).runs if run.family == "dense")
    rates = np.array([0.0, 0.5, 0.9])
    theorem, explicit, full = figures._bounds(dense, dense.folder / "dense.pt", rates)
    total = sum(p.numel() for p in _net(dense).parameters())
    assert full[0] == pytest.approx([(total / 20) ** 0.5] * 3)  # M = 20 iterations x 1 task
    for values in (theorem[0], explicit[0]):
        assert values[0] > values[1] > values[2] > 0


def _net(run):
    from l2l_prune.fewshot.models import Conv4

    return Conv4(run.config["ways"], run.config["channels"])


def test_a_report_needs_no_images(tmp_path, monkeypatch):
    """They may be on another machine: only the bounds are left out."""

    def gone(*arguments, **options):
        raise FileNotFoundError("there is no folder")

    monkeypatch.setattr(figures, "load_images", gone)
    for schedule, sparsity in (("dense", None), ("dsd", 0.3), ("dsd", 0.6)):
        place = finish(tmp_path, schedule, 0.9, 0.7, sparsity=sparsity)
        with_weights(place, 10)
    with_weights(place.parent / run_name(make_config("reptile", "dense", iterations=40)), 10)
    written = write_report(tmp_path)
    assert (tmp_path / "report.md").exists()
    assert not [path for path in written if path.name.startswith("bounds")]


def test_splits_of_one_seed_are_replicates(tmp_path, no_curves):
    for split, shift in ((0, 0.0), (1, 0.1)):
        finish(tmp_path, "dense", 0.9, 0.6 + shift, seed=3, split=split)
        finish(tmp_path, "dsd", 0.9, 0.65 + shift * 1.2, seed=3, split=split)
    scores, differences, *_ = reported(tmp_path)
    assert scores["dense"]["1-shot test"].startswith("65.0")
    assert differences["DSD 50%"]["test"].startswith("+6.0")
    assert "2 replicates with splits of their own" in (tmp_path / "report.md").read_text()


def test_names_and_errors_leave_the_columns_as_they_are(tmp_path, no_curves):
    config = make_config("reptile", "dsd", iterations=40, name="a | *b*")
    write(tmp_path / "one", config, 0.9, 0.7)
    write_report(tmp_path)
    lines = (tmp_path / "report.md").read_text().splitlines()
    line = next(line for line in lines if "64-64-64-64" in line and line.startswith("|"))
    cells = re.split(r"(?<!\\)\|", line)[1:-1]
    assert cells[0].strip().startswith(r"a \| \*b\*")
    assert cells[2].strip().startswith("90.0")


def test_a_long_title_makes_a_file_name_that_fits():
    from l2l_prune.experiments.report.report import _stem

    title = "reptile on glyphs, " + "a setting of this run, " * 30
    assert len(_stem(title)) < 130
    assert _stem(title) != _stem(title + "x")
    assert _stem("Reptile, 5-way") == "reptile-5-way"


def test_validation_scores_are_called_so(tmp_path):
    configs = [
        make_config("reptile", method, iterations=40, held_out="validation", seed=seed)
        for method in ("dense", "dsd")
        for seed in (0, 1)
    ]
    compared(tmp_path, configs, (0.6, 0.62, 0.7, 0.71))
    table = (tmp_path / "table.md").read_text()
    assert "validation" in table
    assert "test" not in table
    write_report(tmp_path)
    assert "scored on validation classes" in (tmp_path / "report.md").read_text()
    found = [Mean((0.6, 0.61)), Mean((0.7, 0.71))]
    runs = [RunResult(n, m, m, 1.0) for n, m in zip(("dense", "DSD"), found, strict=True)]
    assert "on validation tasks" in results.conclusions(runs, held_out="validation")[0]
    headers = [str(c.header) for c in results.results_table(configs[:1], runs[:1], [None]).columns]
    assert "validation" in headers
    assert "test" not in headers


def test_lines_of_one_rate_are_told_apart(tmp_path, monkeypatch):
    labels = []
    drawn = figures._line

    def line(ax, x, means, style, label):
        labels.append(label)
        drawn(ax, x, means, style, label)

    monkeypatch.setattr(figures, "_line", line)
    for pretrain in (0.1, 0.2, 0.3):
        for retrain in (0.1, 0.2, 0.3):
            finish(tmp_path, "dsd", 0.9, 0.7, pretrain=pretrain, retrain=retrain)
    assert figures.hyperparameter_figure(read_folder(tmp_path).runs, tmp_path / "phases.png")
    assert len(labels) == len(set(labels)) == 6
    assert "DSD 50%, retrain 8" in labels


def test_many_panels_stand_in_rows():
    figure, axes = plots.new_figure((10, 8), 7, rows=3)
    assert len(axes) == len(figure.axes) == 7
    assert {ax.get_subplotspec().rowspan.start for ax in axes} == {0, 1, 2}


def test_phases_are_shaded_where_all_curves_of_a_panel_have_them(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    for method, options in (
        ("dense", {}),
        ("dsd", {}),
        ("dsd", {"criterion": "random"}),
        ("dsd", {"pretrain": 0.1}),
    ):
        finish(tmp_path, method, 0.9, 0.7, **options)
    runs = {run.config["name"]: [run] for run in read_folder(tmp_path).runs}
    other = next(name for name in runs if "pretrain" in name)
    alike = {name: run for name, run in runs.items() if name != other}
    plots.curves_by_method({"alike": alike, "not": runs}, tmp_path / "x.png", "")
    alike_panel, mixed_panel = drawn[-1].axes
    segments = alike["DSD"][0].segments
    start = segments[0]["iterations"]
    (span,) = alike_panel.patches
    assert (span.get_x(), span.get_width()) == (start, segments[1]["iterations"])
    assert "shaded" in alike_panel.get_xlabel()
    assert not mixed_panel.patches
    assert "shaded" not in mixed_panel.get_xlabel()


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        write_report(tmp_path)
    (tmp_path / "x").mkdir()
    for text in ("{", '{"runs": [{}]}', '{"runs": [{"config": {"algorithm": "maml"}}]}'):
        (tmp_path / "x" / "results.json").write_text(text)
        with pytest.raises(ValueError, match="is damaged"):
            write_report(tmp_path)


def test_a_plan_that_does_not_fit_its_runs_is_named(folder, tmp_path):
    plan = tmp_path / "plan.toml"
    sides = 'treatment = {name = "DSD, randm"}\ncontrol = {name = "dense"}'
    plan.write_text(f'[[comparison]]\nfamily = "A"\n{sides}')
    result = CliRunner().invoke(app, ["report", str(folder), "--plan", str(plan)])
    assert result.exit_code == 2
    assert result.stderr == (
        f"l2l-prune: {plan}: comparison DSD, randm minus dense: no run is DSD, randm; the "
        "runs are: dense; DSD; IHT\n"
    )


def test_the_folder_above_folders_of_runs_names_these(tmp_path):
    """As that of a study does."""
    finish(tmp_path / "study" / "confirmation", "dense", 0.9, 0.7)
    finish(tmp_path / "study" / "races", "dense", 0.9, 0.7)
    for command in (["report"], ["export", "--out", str(tmp_path / "out")]):
        result = CliRunner().invoke(app, [*command, str(tmp_path / "study")])
        assert result.exit_code == 2
        named = " or ".join(str(tmp_path / "study" / name) for name in ("confirmation", "races"))
        assert f"there is no finished run in {tmp_path / 'study'}: give {named}" in result.stderr


OTHER = {  # of settings that are names, or nothing by default
    "held_out": "validation",
    "split": 3,
    "image_size": 28,
    "annealing": "phase",
    "data": "omniglot",
    "data_root": "elsewhere",
    "layers": "all",
    "criterion": "random",
    "allocation": "erk",
    "regrow": "random",
    "select": "best",
    "device": "cuda",
    "pattern": "rows",
    "dropout_per": "task",
    "drop_grad_noise": "bernoulli",
    "mgaug": "catfish",
}
NEEDS = {  # what else must be set
    "data_root": {"data": "folder"},
    "dropout_per": {"dropout": 0.25},
    "drop_grad_noise": {"drop_grad": 0.25},
    "mgaug_rate": {"mgaug": "catfish"},
    "mgaug_networks": {"mgaug": "catfish"},
    "skip_damaged": {"data": "folder"},
    "structured": {"rewind": None},
}


def other(field, value):
    """Another possible value of a setting."""
    if field.name in OTHER:
        return OTHER[field.name]
    if isinstance(value, bool) or value is None:
        return not value
    return value + 1 if isinstance(value, int) else value + 0.25


@pytest.mark.parametrize("schedule", ["dense", "dsd"])
def test_runs_that_differ_in_any_setting_are_rows_of_their_own(tmp_path, no_curves, schedule):
    base = make_config("reptile", schedule, iterations=40, structured=False, train_classes=30)
    base = dataclasses.replace(base, drop_block=False, rewind=0)
    configs = [dataclasses.replace(base, seed=1)]
    for field in dataclasses.fields(RunConfig):
        if field.name in ("name", "schedule", "seed", "algorithm", "backbone", "depth", "omega"):
            continue  # what cannot differ alone
        if schedule != "dense" and field.name.startswith("mgaug"):
            continue
        changes = {field.name: other(field, getattr(base, field.name))}
        changes |= NEEDS.get(field.name, {})
        if field.name == "ranks":
            changes["ranks"] = base.tasks
        configs.append(dataclasses.replace(base, **changes))
    longer = Schedule(
        (
            *base.schedule.segments[:-1],
            dataclasses.replace(
                base.schedule.segments[-1], iterations=base.schedule.segments[-1].iterations + 1
            ),
        )
    )
    configs.append(dataclasses.replace(base, schedule=longer))
    configs.append(dataclasses.replace(base, name=f"{base.name}, by hand"))
    configs.append(dataclasses.replace(base, algorithm="maml"))
    configs.append(dataclasses.replace(base, data="folder"))
    for number, config in enumerate((base, *configs)):
        write(tmp_path / str(number), config, 0.9, 0.7)
    rows: dict[tuple, list] = {}
    for run in read_folder(tmp_path).runs:
        rows.setdefault((run.problem, run.size, run.shots, run.method), []).append(run)
    pooled = [same for same in rows.values() if len(same) > 1]
    idle = {"criterion", "pattern", "allocation", "regrow", "rewind", "layers", "prune_head"}
    assert len(rows) == len(configs) - (len(idle) if schedule == "dense" else 0)
    assert [len(same) for same in pooled] == [2]
    assert {run.seed for run in pooled[0]} == {0, 1}


def test_a_grid_of_settings_is_not_pooled_as_seeds(tmp_path, no_curves):
    """The accuracies say the rate, so that each mean tells what went into it."""
    for seed in (0, 1):
        for rate, level in ((1e-3, 0.6), (1e-2, 0.3)):
            finish(tmp_path, "dense", 0.9, level + seed / 100, seed=seed, inner_lr=rate)
            finish(tmp_path, "dsd", 0.9, level + 0.05 + seed / 100, seed=seed, inner_lr=rate)
            finish(tmp_path, "dense", 0.8, level - 0.1, seed=seed, inner_lr=rate, iterations=20)
    accuracies, differences = reported(tmp_path)
    assert accuracies["dense, inner_lr 0.001"]["1-shot test"].startswith("60.5 ")
    assert accuracies["dense, inner_lr 0.01"]["1-shot test"].startswith("30.5 ")
    assert {row["seeds"] for row in accuracies.values()} == {"2"}
    for rate in ("0.001", "0.01"):
        row = differences[f"DSD 50%, inner_lr {rate}"]
        assert row["test"] == "+5.0 ± 0.0 (better)"
        assert row["test at equal training accuracy"].startswith("+5.0 ")
        assert differences[f"dense, 20 iterations, inner_lr {rate}"]["test"].startswith("-10.5 ")
    assert len(differences) == 4


def test_a_setting_that_separates_methods_is_named_and_takes_the_baseline(tmp_path, no_curves):
    finish(tmp_path, "dense", 0.9, 0.6)
    finish(tmp_path, "dsd", 0.9, 0.7, inner_lr=1e-2)
    accuracies, differences = reported(tmp_path)
    assert list(accuracies) == ["dense, inner_lr 0.001", "DSD 50%, inner_lr 0.01"]
    row = differences["DSD 50%, inner_lr 0.01"]
    assert row["test"] == "no dense run of the same settings, seeds and length"


@pytest.mark.parametrize("rival", [{"weight_decay": 0.5}, {"dropout": 1 / 3}])
def test_a_regulariser_of_all_runs_keeps_the_baseline(tmp_path, rival):
    for seed in (0, 1):
        finish(tmp_path, "dense", 0.9, 0.6, seed=seed, **rival)
        finish(tmp_path, "dsd", 0.9, 0.7, seed=seed, **rival)
    accuracies, differences = reported(tmp_path)
    assert list(accuracies) == ["dense", "DSD 50%"]
    assert differences["DSD 50%"]["test"] == "+10.0 ± 0.0 (better)"
    assert list(tmp_path.glob("curves-*.png"))


def test_a_regulariser_of_some_runs_is_a_rival_of_pruning(tmp_path, no_curves):
    for seed in (0, 1):
        finish(tmp_path, "dense", 0.9, 0.6, seed=seed)
        finish(tmp_path, "dense", 0.9, 0.64, seed=seed, weight_decay=0.5)
        finish(tmp_path, "dsd", 0.9, 0.65, seed=seed)
        finish(tmp_path, "dsd", 0.9, 0.66, seed=seed, weight_decay=0.5)
    accuracies, differences = reported(tmp_path)
    assert list(accuracies) == ["dense", "dense, decay 0.5", "DSD 50%", "DSD 50%, decay 0.5"]
    assert {name: row["test"].split()[0] for name, row in differences.items()} == {
        "dense, decay 0.5": "+4.0",
        "DSD 50%": "+5.0",
        "DSD 50%, decay 0.5": "+2.0",
    }


def test_what_follows_shots_or_length_is_not_named(tmp_path, no_curves):
    for shots in (1, 5):
        for seed in (0, 1):
            options = {"algorithm": "maml", "shots": shots, "seed": seed}
            finish(tmp_path, "dense", 0.9, 0.6, **options)  # train_shots as shots
            finish(tmp_path, "dense", 0.8, 0.5, iterations=20, **options)  # eval_every follows
            finish(tmp_path, "dsd", 0.85, 0.6, **options)
            finish(tmp_path, "dsd", 0.85, 0.6, select="best", **options)
            finish(tmp_path, "dense", 0.9, 0.6, select="best", **options)
            finish(tmp_path, "dense", 0.8, 0.5, select="best", iterations=20, **options)
    accuracies, differences = reported(tmp_path)
    for choice in ("last", "best"):
        assert accuracies[f"DSD 50%, select {choice}"]["5-shot test"] == "60.0 ± 0.0"
        row = differences[f"DSD 50%, select {choice}"]
        assert row["test at equal training accuracy"] == "+5.0 ± 0.0 (better)"
    assert len(accuracies) == 6


def test_schedules_of_one_name_are_told_apart(tmp_path, no_curves):
    base = make_config("reptile", "dsd", iterations=40)
    _, two, three = base.schedule.segments
    shifted = Schedule((Segment(13), dataclasses.replace(two, iterations=23), three))
    write(tmp_path / "a", base, 0.9, 0.6)
    write(tmp_path / "b", dataclasses.replace(base, schedule=shifted, seed=1), 0.9, 0.8)
    assert list(reported(tmp_path)[0]) == [
        "DSD 50%, 12 pretrain + 24 prune (50%) + 4 retrain",
        "DSD 50%, 13 dense + 23 prune (50%) + 4 retrain",
    ]


def test_numbers_of_seeds_stand_by_their_shots(tmp_path, no_curves):
    for seed, shots in ((0, 1), (1, 1), (0, 5)):
        finish(tmp_path, "dense", 0.9, 0.6, seed=seed, shots=shots)
    assert reported(tmp_path)[0]["dense"]["seeds"] == "2 (1-shot), 1 (5-shot)"


def test_the_lengths_of_phases_are_not_mixed_over_other_settings(tmp_path, monkeypatch):
    drawn, line = {}, figures._line

    def noted(ax, xs, means, style, label):
        drawn[label] = xs, means
        line(ax, xs, means, style, label)

    monkeypatch.setattr(figures, "_line", noted)
    for pretrain in (None, 0.0, 0.5):
        finish(tmp_path, "dsd", 0.9, 0.6, pretrain=pretrain)
        finish(tmp_path, "dsd", 0.9, 0.4, pretrain=pretrain, allocation="erk")
    write_report(tmp_path)
    for allocation, test in (("layerwise", 0.6), ("erk", 0.4)):
        places, means = drawn[f"DSD 50%, allocation {allocation}"]
        assert places == [0, 12, 20]
        assert [mean.values for mean in means] == [(test,)] * 3


def but_seconds(shown):
    return [
        {n: {k: v for k, v in r.items() if k != "seconds"} for n, r in t.items()} for t in shown
    ]


def test_a_copied_folder_is_no_other_seed(tmp_path, no_curves):
    for seed in (0, 1):
        finish(tmp_path, "dense", 0.9, 0.7, seed=seed)
        place = finish(tmp_path, "dsd", 0.9, 0.8 - seed / 20, seed=seed)
    whole = but_seconds(reported(tmp_path))
    for number in range(3):
        shutil.copytree(place, tmp_path / f"copy-{number}")
    again = tmp_path / "copy-0" / "results.json"  # the same run once more: another time of day
    document = json.loads(again.read_text())
    document["runs"][0]["seconds"] += 1
    again.write_text(json.dumps(document))
    assert but_seconds(reported(tmp_path)) == whole
    text = (tmp_path / "report.md").read_text()
    assert "Copies" in text
    assert all(f"{place.name} (of copy-0)" in text or f"copy-{n} (of" in text for n in range(3))


def test_two_results_of_one_run_are_refused(tmp_path, no_curves):
    place = finish(tmp_path, "dsd", 0.9, 0.8)
    shutil.copytree(place, tmp_path / "other")
    file = tmp_path / "other" / "results.json"
    file.write_text(file.read_text().replace('"mean": 0.8', '"mean": 0.81'))
    words = rf"(?=.*{place.name})(?=.*other).*different results of DSD 50%, seed 0"
    with pytest.raises(ValueError, match=words):
        write_report(tmp_path)
    assert not (tmp_path / "report.md").exists()


def test_a_run_that_failed_has_a_row_that_says_so(tmp_path, no_curves):
    finish(tmp_path, "dense", 0.9, 0.7)
    failed = tmp_path / "reptile-dsd-50-seed3"
    failed.mkdir()
    (failed / "error.txt").write_text("Traceback\n  ...\nFloatingPointError: weights: not finite\n")
    for number, weight in enumerate((float("nan"), float("inf"), 1.0)):
        place = finish(tmp_path, "iht", 0.2, 0.2, seed=number)
        torch.save({"a": torch.zeros(2), "b": torch.tensor([1.0, weight])}, place / "iht.pt")
    shown, accuracies, differences = reported(tmp_path)
    assert len(shown) == 3
    assert shown[failed.name]["score"] == "none, it failed: FloatingPointError: weights: not finite"
    for number in (0, 1):
        row = next(row for name, row in shown.items() if f"IHT 50%, seed {number}" in name)
        assert row["score"] == "none, it failed: its weights are not finite (b of iht.pt)"
    assert accuracies["IHT 50%"]["seeds"] == "1"
    assert list(differences) == ["IHT 50%"]


def test_scores_that_are_no_numbers_are_no_scores(tmp_path, no_curves):
    place = finish(tmp_path, "dsd", 0.9, 0.8)
    file = place / "results.json"
    file.write_text(file.read_text().replace('"mean": 0.8', '"mean": NaN'))
    (shown,) = reported(tmp_path)
    assert "its scores are not finite" in next(iter(shown.values()))["score"]
    with pytest.raises(ValueError, match=r"results\.json holds a run that diverged"):
        finished_run(place, make_config("reptile", "dsd", iterations=40))


def test_the_folder_of_one_seed_has_a_report(tmp_path):
    configs = [make_config("reptile", kind, iterations=40) for kind in ("dense", "dsd")]
    curve = [Point(40, "x", 0.0, Mean((0.9, 0.9)), Mean((0.7, 0.7)))]
    found = [
        RunResult(c.name, Mean((0.9, 0.9)), Mean((test, test)), 3.0, curve)
        for c, test in zip(configs, (0.7, 0.8), strict=True)
    ]
    write_results(tmp_path, configs, found)
    accuracies, differences = reported(tmp_path)
    assert accuracies["dense"]["1-shot test"] == "70.0"
    assert differences["DSD 50%"]["test"] == "+10.0 (one seed)"


def opening(folder: Path) -> str:
    """What stands above the first picture."""
    write_report(folder)
    return (folder / "report.md").read_text().partition("![")[0]


def with_weights(place: Path, number: int, seconds: float = 3.0) -> None:
    """A file of weights, ``number`` of them not 0, beside batch statistics that do not count."""
    weight = torch.zeros(20)
    weight[:number] = 1.0
    (file,) = place.glob("*.pt")
    torch.save({"1.weight": weight, "2.running_mean": torch.ones(7)}, file)
    results = place / "results.json"
    document = json.loads(results.read_text())
    document["runs"][0]["seconds"] = seconds
    results.write_text(json.dumps(document))


def test_names_with_commas_are_told_apart_in_the_title(tmp_path, no_curves):
    finish(tmp_path, "dense", 0.9, 0.7)
    finish(tmp_path, "dsd", 0.9, 0.7, criterion="random")
    assert opening(tmp_path).startswith("# reptile on glyphs, 5-way: dense; DSD 50%, random\n")


def test_the_report_opens_with_what_paid(tmp_path, no_curves):
    for seed, shift in enumerate((0.0, 0.01, -0.01)):
        for channels, weights, test in ((64, 20, 0.7), (20, 5, 0.6)):
            options = {"channels": channels, "seed": seed}
            with_weights(finish(tmp_path, "dense", 0.9, test + shift, **options), weights)
        with_weights(finish(tmp_path, "dsd", 0.9, 0.72 + 2 * shift, seed=seed), 20)
        with_weights(finish(tmp_path, "iht", 0.9, 0.695 + shift, seed=seed), 4, seconds=1.5)
    text = opening(tmp_path)
    width = 100 * stats.t.ppf(0.975, 2) * 0.01 / 3**0.5
    assert text.startswith("# reptile on glyphs, 5-way: dense, DSD 50%, IHT 50%\n")
    best = f"+2.0 ± {width:.1f} points over dense (not significant)"
    assert f"of 2 methods compared with dense, **DSD 50%** does best: {best}." in text
    least = "that loses no more than 1 point is **IHT 50%**"
    assert f"- The smallest {least}: 20% of dense's weights, -0.5 ± 0.0 points (worse)." in text
    assert f"- The fastest {least}: 50% of dense's seconds, -0.5 ± 0.0 points (worse)." in text
    assert "**IHT 50%** (4) minus dense with 20 channels (5): +9.5 ± 0.0 points (better)" in text
    assert "DSD 50%** (20) minus" not in text  # dense at its end, as large as the dense net
    assert "(2): take this as exploration" in text
    assert "40 meta-iterations" in text
    assert "3 seeds" in text


def test_stated_comparisons_are_the_answer(tmp_path, no_curves):
    for seed, shift in enumerate((0.0, 0.01, -0.01)):
        finish(tmp_path, "dense", 0.9, 0.7, seed=seed)
        finish(tmp_path, "dsd", 0.9, 0.78 + shift, seed=seed)
        finish(tmp_path, "iht", 0.9, 0.7 + shift, seed=seed)
    stated = [
        Comparison("A", {"name": name, "channels": 64}, {"name": "dense", "channels": 64})
        for name in ("DSD", "IHT")
    ]
    write_report(tmp_path, stated)
    text = (tmp_path / "report.md").read_text()
    assert "**1 of 2 stated gains over dense networks are confirmed.**" in text
    assert "- DSD, channels 64 minus dense, channels 64: +8.0" in text
    assert "exploration" not in text
    within = Comparison("B", {"name": "IHT"}, {"name": "dense"}, margin=-0.05)
    write_report(tmp_path, [*stated, within])
    text = (tmp_path / "report.md").read_text()
    assert "**1 of 2 stated gains" in text  # a margin asks for no gain


def compared(folder, configs, tests):
    for config, test in zip(configs, tests, strict=True):
        write(folder / run_name(config), config, 0.9, test)
    return compare_seeds(configs, folder, Console(file=io.StringIO()))


def test_the_table_over_seeds_gives_the_largest_rate(tmp_path, no_curves):
    ramp = [Segment(10, sparse=True, sparsity=rate) for rate in (0.02, 0.0999, 0.1, 0.05)]
    config = RunConfig("ramp", Schedule(ramp), eval_every=20)
    text = compared(tmp_path, [config, dataclasses.replace(config, seed=1)], (0.6, 0.7))
    assert tables(text)[0][1][1] == "10%"
    kept = Segment(1, sparse=True, keep={"*": 3})
    assert schedule_rate(Schedule((*ramp, kept))) == "per layer"
    assert schedule_rate(Schedule((Segment(3),))) == "-"


def test_the_table_over_seeds_pairs_them_in_any_order(tmp_path, no_curves):
    dense, dsd = (make_config("reptile", kind, iterations=40) for kind in ("dense", "dsd"))
    configs = [
        *(dataclasses.replace(dense, seed=seed) for seed in (0, 1)),
        *(dataclasses.replace(dsd, seed=seed) for seed in (1, 0)),
    ]
    assert "test: +5.0 ± 0.0 (better)" in compared(tmp_path, configs, (0.5, 0.7, 0.75, 0.55))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([{}, {"seed": 1, "inner_lr": 0.5}], "not in inner_lr: use a sweep"),
        ([{}, {"seed": 1, "criterion": "random"}], "runs of DSD .* not in criterion"),
        ([{}, {"seed": 1}, {"name": "other"}], r"other must have each of the seeds \[0, 1\]"),
    ],
)
def test_a_table_over_seeds_of_other_settings_is_refused(tmp_path, changes, words):
    base = make_config("reptile", "dsd", iterations=40)
    configs = [dataclasses.replace(base, **change) for change in changes]
    with pytest.raises(ValueError, match=words):
        compare_seeds(configs, tmp_path / "out", Console(file=io.StringIO()))
    assert not (tmp_path / "out").exists()


def test_a_failed_run_of_several_seeds_leaves_its_reason(tmp_path, no_curves, in_this_process):
    good = make_config("reptile", "dense", iterations=40)
    bad = dataclasses.replace(good, seed=1, shots=30)  # glyphs have 20 examples
    good = dataclasses.replace(bad, seed=0)
    write(tmp_path / run_name(good), good, 0.9, 0.7)
    with pytest.raises(RunFailed, match="has only 20 examples"):
        compare_seeds([good, bad], tmp_path, Console(file=io.StringIO()))
    shown, accuracies = reported(tmp_path)
    assert "has only 20 examples" in shown[run_name(bad)]["score"]
    assert accuracies["dense"]["seeds"] == "1"


def counted_reads(monkeypatch) -> list[Path]:
    """The files of weights that are read from now on."""
    read: list[Path] = []
    load = finished_runs.load_tensors
    monkeypatch.setattr(finished_runs, "load_tensors", lambda p: read.append(p) or load(p))
    return read


def test_a_file_of_weights_is_read_once_and_only_where_results_do_not_count_them(
    tmp_path, no_curves, monkeypatch
):
    older = [finish(tmp_path, "dense", 0.9, 0.7, seed=seed) for seed in (0, 1)]
    for place in older:
        with_weights(place, 10)
    config = make_config("reptile", "dsd", iterations=40)
    newer = tmp_path / run_name(config)
    newer.mkdir()
    state = {"1.weight": torch.tensor([0.0, 1.0, 2.0]), "2.running_mean": torch.ones(4)}
    result = RunResult("DSD", Mean((0.9, 0.9)), Mean((0.8, 0.8)), 3.0, [], state, size=2)
    write_results(newer, [config], [result])
    read = counted_reads(monkeypatch)
    (rows, *_) = reported(tmp_path)
    assert sorted(read) == sorted(place / "dense.pt" for place in older)
    assert rows["dense"]["weights"] == "10"
    assert rows["DSD 50%"]["weights"] == "2"
    assert json.loads((newer / "results.json").read_text())["runs"][0]["weights"] == 2


def test_a_run_with_damaged_weights_is_not_taken_as_finished(tmp_path, no_curves):
    config = make_config("reptile", "dsd", iterations=40)
    state = {"1.weight": torch.ones(30)}
    result = RunResult("DSD", Mean((0.9, 0.9)), Mean((0.8, 0.8)), 3.0, [], state)
    write_results(tmp_path, [config], [result])
    assert finished_run(tmp_path, config) is not None
    (tmp_path / "dsd.pt").write_bytes((tmp_path / "dsd.pt").read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"dsd\.pt is damaged"):
        finished_run(tmp_path, config)


def test_dropout_held_for_a_task_is_set_against_plain_dense_runs(tmp_path):
    for seed in range(2):
        for test, more in ((0.7, {}), (0.72, {"dropout": 0.3})):
            finish(tmp_path, "dense", 0.9, test + seed / 100, seed=seed, **more)
        held = {"dropout": 0.3, "dropout_per": "task"}
        finish(tmp_path, "dense", 0.9, 0.75 + seed / 100, seed=seed, **held)
    _, differences = reported(tmp_path)[:2]
    assert differences["dense, dropout 0.3"]["test"] == "+2.0 ± 0.0 (better)"
    assert differences["dense, dropout 0.3 per task"]["test"] == "+5.0 ± 0.0 (better)"
