"""The report of a folder of runs with known numbers."""

from __future__ import annotations

import re

import pytest
from scipy import stats

from l2l_prune.evaluation import Mean
from l2l_prune.experiments.config import make_config
from l2l_prune.experiments.report import write_report
from l2l_prune.experiments.results import write_results
from l2l_prune.experiments.run import Point, RunResult
from l2l_prune.experiments.storage import run_name

TEST = {("dense", 0): 0.70, ("dense", 1): 0.74, ("dense", 2): 0.72}
TEST |= {("dsd", 0): 0.75, ("dsd", 1): 0.78, ("dsd", 2): 0.77}
TEST |= {("iht", 0): 0.69, ("iht", 1): 0.76, ("iht", 5): 0.99}  # seed 5 has no dense partner


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    for shots in (1, 5):
        for (schedule, seed), test in TEST.items():
            config = make_config("reptile", schedule, iterations=20, seed=seed, shots=shots)
            accuracy = test + (0.1 if shots == 5 else 0)
            curve = [
                Point(i, "x", 0.0, Mean((0.9, 0.9)), Mean((accuracy * i / 20,) * 2))
                for i in (10, 20)
            ]
            result = RunResult(
                config.name, Mean((0.95, 0.97)), Mean((accuracy, accuracy)), 3.0, curve
            )
            (folder / run_name(config)).mkdir()
            write_results(folder / run_name(config), [config], [result])
    write_report(folder)
    return folder


def test_the_table_has_a_row_a_method_and_columns_for_shots(folder):
    lines = (folder / "report.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    header, _, *body = rows
    assert [row[0] for row in body] == ["dense", "DSD 50%", "IHT 50%"]
    assert {row[1] for row in body} == {"64-64-64-64"}
    assert header[2:] == [
        *("1-shot train", "1-shot test", "1-shot gap", "seeds"),
        *("5-shot train", "5-shot test", "5-shot gap"),
    ]
    width = stats.t.ppf(0.975, 2) * 0.02 / 3**0.5
    assert body[0][3] == f"72.0 ± {100 * width:.1f}"
    assert body[0][7] == f"82.0 ± {100 * width:.1f}"
    assert body[1][5] == "3"


def test_differences_are_paired_by_seed(folder):
    text = (folder / "report.md").read_text()
    values = (0.05, 0.04, 0.05)
    width = stats.t.ppf(0.975, 2) * stats.sem(values)
    expected = f"test {100 * sum(values) / 3:+.1f} ± {100 * width:.1f} (better)"
    dsd = re.search(r"- DSD 50%, 64-64-64-64, 1-shot, minus dense, paired over 3 seeds: .*", text)
    assert expected in dsd.group()
    assert "train +0.0 ± 0.0 (not significant)" in dsd.group()
    iht = re.search(r"- IHT 50%.*1-shot.*", text).group()
    assert "paired over 2 seeds" in iht
    assert "test +0.5" in iht
    assert iht.count("not significant") == 2


def test_the_page_is_self_contained(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 2
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "not significant" in page
    assert len(list(folder.glob("curves-*.png"))) == 2


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        write_report(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "results.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        write_report(tmp_path)
