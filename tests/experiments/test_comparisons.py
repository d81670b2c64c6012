from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from l2l_prune.experiments.config import make_config
from l2l_prune.experiments.report.comparisons import (
    Comparison,
    _detectable,
    comparison_table,
    judge,
    judge_differences,
    read_comparisons,
)
from l2l_prune.experiments.report.finished_runs import FinishedRun
from l2l_prune.experiments.report.seed_statistics import OverSeeds, signed


def finished(method, seed, test, **settings):
    config = make_config("reptile", method, iterations=40, seed=seed, split=seed, **settings)
    mean = {"mean": test, "ci95": 0.01, "per_task": [test]}
    entry = {"config": config.to_json(), "train": mean, "test": mean, "seconds": 1.0, "curve": []}
    return FinishedRun(entry, Path(f"{method}-{seed}-{settings}"), 40)


def study(seeds=8):
    generator = np.random.default_rng(0)
    scores = {name: 0.7 + 0.02 * generator.standard_normal(seeds) for name in ("dense", "dsd")}
    scores["dsd"] += 0.05
    scores["iht"] = scores["dense"] + 0.01 * generator.standard_normal(seeds)
    runs = [finished(name, s, v[s]) for name, v in scores.items() for s in range(seeds)]
    return scores, runs


DSD = Comparison("A", {"name": "DSD"}, {"name": "dense"})
IHT = Comparison("A", {"name": "IHT"}, {"name": "dense"})


def test_differences_are_paired_by_replicate_and_tested_as_scipy_does():
    scores, runs = study()
    for one, name in zip(judge([DSD, IHT], runs[::-1]), ("dsd", "iht"), strict=True):
        expected = stats.ttest_rel(scores[name], scores["dense"])
        assert one.p == pytest.approx(float(expected.pvalue))
        low, high = expected.confidence_interval()
        assert one.difference.mean == pytest.approx((low + high) / 2)
        assert one.difference.ci95 == pytest.approx((high - low) / 2)


def test_holm_is_the_textbook_step_down_within_each_family():
    _, runs = study()
    other = Comparison("B", {"name": "IHT"}, {"name": "dense"})
    twice = Comparison("A", {"name": "DSD"}, {"name": "IHT"})
    judged = judge([DSD, IHT, twice, other], runs)
    p = [one.p for one in judged]
    order, largest, expected = sorted(range(3), key=lambda i: p[i]), 0.0, {}
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (3 - rank) * p[i]))
        expected[i] = largest
    assert [one.corrected for one in judged[:3]] == pytest.approx([expected[i] for i in range(3)])
    assert judged[3].corrected == judged[3].p  # alone in its family


def test_the_correction_counts_stated_comparisons_that_have_not_run():
    _, runs = study()
    eight = [dataclasses.replace(one, family_size=8) for one in (DSD, IHT)]
    first, second = judge(eight, runs)
    assert first.corrected == pytest.approx(min(1.0, 8 * first.p))
    assert second.p > first.p
    assert second.corrected == pytest.approx(min(1.0, max(8 * first.p, 7 * second.p)))
    [alone, _] = judge([DSD, IHT], runs)
    assert first.detectable > alone.detectable


def test_what_could_be_seen_is_found_in_four_of_five_simulated_studies():
    _, runs = study()
    [one] = judge([DSD], runs)
    spread = np.std(one.difference.values, ddof=1)
    generator = np.random.default_rng(1)
    simulated = one.detectable + spread * generator.standard_normal((4000, 8))
    found = stats.ttest_1samp(simulated, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.025)


@pytest.mark.parametrize(("replicates", "family"), [(2, 2), (3, 40), (4, 10), (8, 8), (20, 3)])
def test_what_could_be_seen_has_the_power_of_the_noncentral_t(replicates, family):
    values = np.random.default_rng(replicates).normal(0, 0.01, replicates)
    effect = _detectable(OverSeeds(tuple(values)), family) / values.std(ddof=1)
    threshold = stats.t.ppf(1 - 0.05 / family / 2, replicates - 1)
    shift = effect * replicates**0.5
    power = [stats.nct.sf(threshold, replicates - 1, side) for side in (shift, -shift)]
    assert sum(power) == pytest.approx(0.8, abs=1e-4)


def test_verdicts():
    _, runs = study()
    better, unclear = judge([DSD, IHT], runs)
    assert (better.verdict, unclear.verdict) == ("better", "not shown")
    [within] = judge([Comparison("C", {"name": "IHT"}, {"name": "dense"}, margin=-0.05)], runs)
    assert within.verdict == "not worse by more than 5 points"
    [worse] = judge([Comparison("C", {"name": "dense"}, {"name": "DSD"})], runs)
    assert worse.verdict == "worse"
    assert "| A        | DSD minus dense" in comparison_table([better])


def test_replicates_without_a_partner_are_left_out_and_bad_plans_refused():
    _, runs = study()
    [one] = judge([DSD], runs[1:])
    assert len(one.difference.values) == 7
    with pytest.raises(ValueError, match="no run is RigL"):
        judge([Comparison("A", {"name": "RigL"}, {"name": "dense"})], runs)
    wide = [finished("dense", s, 0.5, channels=128) for s in range(8)]
    with pytest.raises(ValueError, match=r"dense means both .* name more settings"):
        judge([DSD], runs + wide)
    by_width = Comparison("A", {"name": "dense", "channels": 128}, {"name": "DSD", "channels": 64})
    assert judge([by_width], runs + wide)[0].difference.mean < 0
    with pytest.raises(ValueError, match="two replicates or more, got 1"):
        judge([DSD], [run for run in runs if run.seed == 0])


def test_a_difference_that_rounds_to_zero_has_no_minus():
    assert str(OverSeeds((-0.0001,))) == "0.0"
    assert signed(OverSeeds((-0.0201, 0.02))) == "+0.0 ± 25.5"
    assert signed(OverSeeds((-0.022, 0.02))) == "-0.1 ± 26.7"


@pytest.mark.parametrize(("loss", "verdict"), [(0.25, "not shown"), (0.0, "not worse by more")])
def test_a_margin_has_a_side_even_without_any_spread(loss, verdict):
    scores = {"dense": 0.75, "dsd": 0.75 - loss}
    runs = [finished(name, seed, scores[name]) for name in scores for seed in range(5)]
    stated = Comparison("A", {"name": "DSD"}, {"name": "dense"}, margin=-0.02)
    [one] = judge([stated], runs)
    assert one.verdict.startswith(verdict)
    assert "margin -0.02" in comparison_table([one])
    assert math.isnan(one.detectable)
    [few] = judge([stated], [run for run in runs if run.seed < 4])  # of four signs, one in 16
    assert few.verdict == "not shown"


def test_equal_differences_are_as_sure_as_their_signs():
    one = Comparison("A", {"name": "DSD"}, {"name": "dense"})
    for replicates, verdict in ((2, "not shown"), (5, "not shown"), (6, "better")):
        [judged] = judge_differences([one], [OverSeeds((0.02,) * replicates)])
        assert judged.p == 2 * 0.5**replicates
        assert judged.verdict == verdict


@pytest.mark.parametrize("margin", [-0.01, -0.03])
def test_with_a_margin_too_four_of_five_simulated_studies_see_it(margin):
    generator = np.random.default_rng(2)
    values = generator.normal(0, 0.02, 8)
    least = _detectable(OverSeeds(tuple(values)), 1, margin)
    simulated = least + values.std(ddof=1) * generator.standard_normal((4000, 8))
    found = stats.ttest_1samp(simulated, margin, axis=1, alternative="greater").pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.025)


def test_what_a_comparison_means_is_told_without_a_name_too():
    _, runs = study()
    table = {"family": "A", "treatment": {"rate": 0.5, "iterations": 40}, "control": {}}
    by_method = read_comparisons([table])  # in an older version's words
    with pytest.raises(ValueError, match=r"sparsity 0\.5, iterations 40 means both"):
        judge(by_method, runs)
    with pytest.raises(ValueError, match="no run is chanels 4: runs have no setting chanels"):
        judge([Comparison("A", {"chanels": 4}, {"name": "dense"})], runs)


@pytest.mark.parametrize("tables", [3, "DSD", {"family": "A"}, ["DSD"]])
def test_comparisons_are_a_list_of_tables(tables):
    with pytest.raises(TypeError, match="tables that begin with"):
        read_comparisons(tables)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"family": None}, "family must be a name"),
        ({"treatment": "DSD"}, "treatment must be a table"),
        ({"margin": 0.1}, "margin must be a number <= 0"),
        ({"margin": float("nan")}, "margin must be a number <= 0"),
        ({"arm": 1}, "has no arm"),
        ({"family_size": -1}, "family_size"),
    ],
)
def test_bad_comparisons(change, words):
    table = {"family": "A", "treatment": {"name": "DSD"}, "control": {"name": "dense"}}
    assert read_comparisons([table]) == [DSD]
    with pytest.raises((TypeError, ValueError), match=words):
        read_comparisons([table | change])
    with pytest.raises(ValueError, match="needs control"):
        read_comparisons([{k: v for k, v in table.items() if k != "control"}])
