"""The report of a folder of runs with known numbers."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from l2l_prune.evaluation import Mean
from l2l_prune.experiments import studies
from l2l_prune.experiments.config import make_config
from l2l_prune.experiments.finished import collect
from l2l_prune.experiments.report import write_report
from l2l_prune.experiments.results import write_results
from l2l_prune.experiments.run import Point, RunResult
from l2l_prune.experiments.storage import run_name
from l2l_prune.experiments.sweep import expand, sweep

TEST = {("dense", 0): 0.70, ("dense", 1): 0.74, ("dense", 2): 0.72}
TEST |= {("dsd", 0): 0.75, ("dsd", 1): 0.78, ("dsd", 2): 0.77}
TEST |= {("iht", 0): 0.69, ("iht", 1): 0.76, ("iht", 5): 0.99}  # seed 5 has no dense partner


def finish(folder: Path, schedule: str, train: float, test: float, **options) -> None:
    """A folder as a run with these accuracies leaves it."""
    config = make_config("reptile", schedule, **{"iterations": 40, **options})
    steps = [config.schedule.iterations // 2, config.schedule.iterations]
    curve = [
        Point(i, "x", 0.0, Mean((train, train)), Mean((test * i / steps[1],) * 2)) for i in steps
    ]
    result = RunResult(config.name, Mean((train, train)), Mean((test, test)), 3.0, curve)
    (folder / run_name(config)).mkdir(parents=True)
    write_results(folder / run_name(config), [config], [result])


def tables(text: str) -> list[list[list[str]]]:
    """Cells of each Markdown table, without the line under its header."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.M)
    rows = [[line.split("|")[1:-1] for line in block.splitlines()] for block in blocks]
    return [[[c.strip() for c in row] for i, row in enumerate(t) if i != 1] for t in rows]


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
        *("method", "backbone", "1-shot train", "1-shot test", "1-shot gap", "seeds"),
        *("5-shot train", "5-shot test", "5-shot gap"),
    ]
    assert [row[0] for row in body] == ["dense", "DSD 50%", "IHT 50%"]
    assert {row[1] for row in body} == {"64-64-64-64"}
    width = stats.t.ppf(0.975, 2) * 0.02 / 3**0.5
    assert body[0][3] == f"72.0 ± {100 * width:.1f}"
    assert body[0][4] == f"24.0 ± {100 * width:.1f}"
    assert body[0][7] == f"82.0 ± {100 * width:.1f}"
    assert body[1][5] == "3"


def test_runs_in_bfloat16_are_compared_with_their_like(tmp_path):
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
    assert page.count('src="data:image/png;base64,') == 2
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
    assert any(name.startswith("tradeoff-") for name in written)
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
    runs = collect(tmp_path)
    drawn = {}
    for label, family, value, alike in studies._STUDIES:
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


def test_bounds_stand_beside_the_measured_gap_of_real_runs(tmp_path):
    base = {"algorithm": "reptile", "iterations": 20, "channels": 4, "tasks": 1}
    base |= {"final_tasks": 2, "curve_tasks": 2}
    grid = {"schedule": ["dense", "dsd"], "sparsity": [0.3, 0.6]}
    sweep(expand(base, grid), tmp_path, Console(file=io.StringIO()), jobs=1)
    assert any(path.name.startswith("bounds-") for path in write_report(tmp_path))
    dense = next(run for run in collect(tmp_path) if run.family == "dense")
    rates = np.array([0.0, 0.5, 0.9])
    theorem, explicit, full = studies._bounds(dense, dense.folder / "dense.pt", rates)
    total = sum(p.numel() for p in _net(dense).parameters())
    assert full[0] == pytest.approx([(total / 20) ** 0.5] * 3)  # M = 20 iterations x 1 task
    for values in (theorem[0], explicit[0]):
        assert values[0] > values[1] > values[2] > 0


def _net(run):
    from l2l_prune.experiments.models import Conv4

    return Conv4(run.config["ways"], run.config["channels"])


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        write_report(tmp_path)
    (tmp_path / "x").mkdir()
    for text in ("{", '{"runs": [{}]}', '{"runs": [{"config": {"algorithm": "maml"}}]}'):
        (tmp_path / "x" / "results.json").write_text(text)
        with pytest.raises(ValueError, match="is damaged"):
            write_report(tmp_path)
