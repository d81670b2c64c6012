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
    "task-masks-maml": ["task-masks-maml"],
    "with-decay": ["with-decay"],
    "regime": ["regime"],
    "tasks": ["tasks"],
    "support-sets": ["support-sets"],
}
"""The tables on which each plan is judged."""

# Its plan went with the setting that it was about. The last one is said in words.
DISTIL = [
    Comparison("G", {"name": f"{name}, distilled"}, {"name": control})
    for name, control in [
        ("DSD", "DSD"),
        ("one-shot", "one-shot"),
        ("one-shot, channels", "one-shot, channels"),
        ("DSD", "dense"),
    ]
]


def rows_of(plan):
    return verdicts.read_tables([STUDY / f"{table}.csv" for table in TABLES[plan]])


def judged(plan):
    comparisons = DISTIL
    if plan != "distil":
        comparisons = read_comparisons(read_toml(STUDY / f"{plan}.toml")["comparison"])
    rows = rows_of(plan)
    differences = [verdicts.difference(comparison, rows) for comparison in comparisons]
    found = judge_differences(comparisons, differences)
    if plan == "distil":
        assert found.pop().verdict == "better"
    # The other plan has the whole of family B.
    return [one for one in found if (plan, one.comparison.family) != ("first", "B")]


def page():
    """The rows of study.md's tables: the family of their section, and cells by column."""
    found, header, family = [], [], ""
    for line in (RESULTS / "study.md").read_text().splitlines():
        if heading := re.match(r"## (?:Family (\w))?", line):
            family = heading[1] or ""
        if not line.startswith("|"):
            header = []
            continue
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        if not header:
            header = cells
        elif not line.startswith("|---"):
            row = dict(zip(header, cells, strict=True))
            found.append((row.get("family", family), row))
    return found


def published(family):
    """The rows of a family that give a verdict, in the page's order."""
    return [row for own, row in page() if own == family and row.get("verdict")]


def difference_in(row):
    return row.get("difference") or row["test minus dense"]


def assert_said(one, row):
    """Tables hold four digits of each score, so p-values may differ in the second of theirs."""
    assert difference_in(row) == signed(one.difference)
    assert row["verdict"] == one.verdict
    assert float(row["p (Holm)"]) == pytest.approx(one.corrected, rel=0.05)
    if "p" in row:
        assert float(row["p"]) == pytest.approx(one.p, rel=0.05)
    if "could be seen" in row:
        least = 100 * one.detectable
        seen = f"from {least:+.1f} on" if one.comparison.margin else f"{least:.1f}"
        assert row["could be seen"] == seen
    for label in (text for name, text in row.items() if name.startswith("comparison")):
        treatment, control = label.split(" minus ")
        for words, side in (
            (treatment, one.comparison.treatment),
            (control, one.comparison.control),
        ):
            if "sparsity" in side:
                assert f"{100 * side['sparsity']:g}%" in words
        if "channels" in one.comparison.control and one.comparison.family != "A":
            if one.comparison.control["name"] == "dense":
                assert f"{one.comparison.control['channels']} channels" in control


@pytest.mark.parametrize("plan", TABLES)
def test_verdicts_follow_from_the_published_runs(plan):
    found = judged(plan)
    [family] = {one.comparison.family for one in found}
    for one, row in zip(found, published(family), strict=True):
        assert_said(one, row)


def test_every_published_verdict_is_of_a_plan():
    families = {one.comparison.family for plan in TABLES for one in judged(plan)}
    with_verdicts = {family for family, row in page() if row.get("verdict")}
    assert with_verdicts == families


@pytest.mark.parametrize("plan", [p for p in TABLES if p not in ("more-steps", "support-sets")])
def test_means_follow_from_the_published_runs(plan):
    """Every arm has a row, all of whose cells follow."""
    columns = ("train", "test", "gap", "weights", "seconds")
    for mean in verdicts.means(rows_of(plan)):
        if "distilled" in mean["method"]:
            assert any(row.get("test, distilled") == mean["test"] for _, row in page())
            continue
        alike = [row for _, row in page() if row.get("train") == mean["train"]]
        alike = [row for row in alike if row.get("test") == mean["test"]]
        assert alike, mean
        for row in alike:
            given = {name: row[name] for name in columns if name in row}
            weights = f"{mean['weights']:,}"
            expected = {**mean, "weights": weights, "seconds": str(mean["seconds"])}
            assert given == {name: expected[name] for name in given}, row


def test_means_after_more_steps_follow_from_the_published_scores():
    rows = [row for family, row in page() if family == "N" and "50 steps, fresh" in row]
    scores = [(row["5 steps, fresh"], row["50 steps, fresh"]) for row in rows]
    means = {
        (m["method"], m["channels"], m["steps"]): m["test"]
        for m in verdicts.means(rows_of("more-steps"))
    }
    arms = {arm[:2] for arm in means}
    expected = [(means[(*arm, "5")], means[(*arm, "50")]) for arm in arms]
    assert sorted(scores) == sorted(expected)


def test_means_on_support_sets_follow_from_the_published_scores():
    """Own scores are those of family J."""
    own = {m["method"] + m["shots"]: m["test"] for m in verdicts.means(rows_of("tasks"))}
    means = verdicts.means(rows_of("support-sets"))
    scores = {m["method"] + m["shots"] + m["batch"]: m["test"] for m in means}
    rows = [row for family, row in page() if family == "T" and "whole support set, fresh" in row]
    cells = [tuple(row.values())[1:] for row in rows]
    expected = [
        (own[arm], scores[arm + "own"], scores[arm + "whole"])
        for arm in ("dense5", "DSD, random5", "dense1", "DSD, random1")
    ]
    assert cells == expected


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
