"""Every verdict that the study publishes follows from the table of runs published beside it."""

from __future__ import annotations

import importlib.util
import random
import re
from pathlib import Path

import pytest

from l2l_prune.experiments.report.comparisons import (
    Comparison,
    judge,
    judge_differences,
    read_comparisons,
)
from l2l_prune.experiments.report.finished_runs import FinishedRun
from l2l_prune.experiments.report.seed_statistics import signed
from l2l_prune.experiments.running.storage import run_name
from l2l_prune.experiments.running.sweep import expand
from l2l_prune.experiments.toml_files import read_toml

RESULTS = Path(__file__).parents[1] / "docs" / "results"
STUDY = RESULTS / "study"

pytest.importorskip("statsmodels")


def program(name):
    spec = importlib.util.spec_from_file_location(name, RESULTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


verdicts = program("verdicts")

TABLES = {
    "first": ["first"],
    "equal-size": ["equal-size"],
    "rivals": ["rivals"],
    "task-masks": ["task-masks"],
    "equal-time": ["equal-time"],
    "more-steps": ["more-steps"],
    "distil": ["distil"],
    "meta-learners": ["meta-learners"],
}
"""The tables on which each plan is judged."""

# Its plan went with the setting that it was about.
DISTIL = [
    Comparison("G", {"name": f"{name}, distilled"}, {"name": control})
    for name, control in [
        ("one-shot", "one-shot"),
        ("one-shot, channels", "one-shot, channels"),
        ("DSD", "DSD"),
        ("DSD", "dense"),
    ]
]


def judged(plan):
    comparisons = DISTIL
    if plan != "distil":
        comparisons = read_comparisons(read_toml(STUDY / f"{plan}.toml")["comparison"])
    rows = verdicts.read_tables([STUDY / f"{table}.csv" for table in TABLES[plan]])
    rows = [row for row in rows if row.get("steps", "50") == "50"]
    differences = [verdicts.difference(comparison, rows) for comparison in comparisons]
    found = judge_differences(comparisons, differences)
    # The other plan has the whole of family B.
    return [one for one in found if (plan, one.comparison.family) != ("first", "B")]


def published():
    """Difference, corrected p-value and verdict of every row of the study's tables that has one."""
    found, header = [], []
    for line in (RESULTS / "study.md").read_text().splitlines():
        if not line.startswith("|"):
            header = []
            continue
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        if not header:
            header = cells
        if "verdict" not in header or not re.search(r"\d ± \d", line):
            continue
        by_name = dict(zip(header, cells, strict=True))
        difference = by_name.get("difference") or by_name["test minus dense"]
        if difference:
            found.append((difference, float(by_name["p (Holm)"]), by_name["verdict"]))
    return found


def is_said(one, rows):
    """Tables hold four digits of each score, so p-values may differ in the second of theirs."""
    return any(
        (signed(one.difference), one.verdict) == (difference, verdict)
        and one.corrected == pytest.approx(p, rel=0.05)
        for difference, p, verdict in rows
    )


@pytest.mark.parametrize("plan", TABLES)
def test_verdicts_follow_from_the_published_runs(plan):
    rows = published()
    found = judged(plan)
    if plan == "distil":
        assert found[-1].verdict == "better"  # said in words, not in a row
        found = found[:-1]
    for one in found:
        assert is_said(one, rows), f"{one.comparison.title}: {signed(one.difference)}"


def test_nothing_else_is_published():
    found = [one for plan in TABLES for one in judged(plan)]
    assert len(published()) >= 37
    for row in published():
        assert any(is_said(one, [row]) for one in found), row


@pytest.mark.parametrize("plan", [plan for plan in TABLES if plan != "more-steps"])
def test_means_follow_from_the_published_runs(plan):
    lines = (RESULTS / "study.md").read_text().replace("*", "").splitlines()
    rows = verdicts.read_tables([STUDY / f"{table}.csv" for table in TABLES[plan]])
    for mean in verdicts.means(rows):
        scores = [mean["train"], mean["test"]]
        if "distilled" in mean["method"]:
            scores = scores[1:]
        assert any(all(score in line for score in scores) for line in lines), mean


def test_a_table_takes_the_runs_of_several_machines(tmp_path):
    """Each has half of the replicates; the second adds its own twice."""
    document = read_toml(STUDY / "meta-learners.toml")
    comparisons = read_comparisons(document["comparison"])
    draws, runs = random.Random(0), []
    for config in expand(document["base"], document["grid"]):
        scores = {"mean": draws.randrange(7500) / 7500}
        entry = {"config": config.to_json(), "train": scores, "test": scores, "seconds": 1.0}
        runs.append(FinishedRun(entry, Path(run_name(config)), config.schedule.iterations))
    table = tmp_path / "table.csv"
    for replicates in (range(104), range(104, 200), range(104, 200)):
        verdicts.add_runs(table, comparisons, [run for run in runs if run.seed in replicates])
    rows = verdicts.read_tables([table])
    assert len(rows) == len(runs) == 48
    found = [verdicts.difference(comparison, rows) for comparison in comparisons]
    for one, expected in zip(found, judge(comparisons, runs), strict=True):
        assert one.values == pytest.approx(expected.difference.values, abs=1e-4)
