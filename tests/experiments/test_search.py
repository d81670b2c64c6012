"""Searches: races, costs and sensitivity against plain counting; studies that are killed go on."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from l2l_prune.experiments.algorithms import build
from l2l_prune.experiments.cli import app
from l2l_prune.experiments.config import make_config
from l2l_prune.experiments.defaults import LEARN_MORE
from l2l_prune.experiments.methods import read_layer_rates
from l2l_prune.experiments.report.comparisons import (
    Comparison,
    Judged,
    judge,
    read_comparisons,
)
from l2l_prune.experiments.report.finished_runs import read_folder
from l2l_prune.experiments.report.pareto import front_places
from l2l_prune.experiments.report.seed_statistics import OverSeeds
from l2l_prune.experiments.run_result import RunResult
from l2l_prune.experiments.running import run as run_module
from l2l_prune.experiments.running.processes import run_all
from l2l_prune.experiments.running.run import evaluation_tasks, load_split, run
from l2l_prune.experiments.running.run_folder import Outcome
from l2l_prune.experiments.running.storage import run_name
from l2l_prune.experiments.running.sweep import expand
from l2l_prune.experiments.search import study, tune
from l2l_prune.experiments.search.choice import Space, _search, _taking_part
from l2l_prune.experiments.search.costs import Budget, cost_of, dense_width, end_network, quantity
from l2l_prune.experiments.search.halving import (
    Candidate,
    Runs,
    Standing,
    check_search,
    race,
    record_search,
    rungs,
    toml_lines,
)
from l2l_prune.experiments.search.sensitivity import Sensitivity, measure
from l2l_prune.experiments.search.verdict import _answer, _length, _plan, _verdict
from l2l_prune.experiments.toml_files import read_toml
from l2l_prune.fewshot.models import Conv4
from tests.fewshot.data.picture_files import write_classes

BASE = {
    "algorithm": "reptile",
    "iterations": 20,
    "channels": 4,
    "tasks": 1,
    "inner_steps": 1,
    "eval_steps": 1,
    "final_tasks": 4,
    "curve_tasks": 2,
}
SHAPE = (1, 28, 28)
QUIET = Console(file=io.StringIO())


# ---- settings that searches stand on ------------------------------------------------------------


def test_a_run_held_out_on_validation_never_opens_the_test_classes(monkeypatch):
    opened = []
    load = run_module.load_images

    def watched(data, split, **options):
        opened.append(split)
        return load(data, split, **options)

    monkeypatch.setattr(run_module, "load_images", watched)
    config = make_config(method="dense", held_out="validation", **BASE)
    *_, on_validation = run(config)
    assert isinstance(on_validation, RunResult)
    assert sorted(opened) == ["train", "validation"]
    *_, on_test = run(dataclasses.replace(config, held_out="test"))
    # The same weights, bit for bit: what is scored is no part of training.
    for name, value in on_test.weights.items():
        assert torch.equal(value, on_validation.weights[name])
    assert run_name(config) != run_name(dataclasses.replace(config, held_out="test"))


def test_rates_by_layer_are_those_of_the_schedule():
    rates = "features.conv4.weight=0.75,classifier.*=0.25"
    config = make_config(method="dsd", layer_rates=rates, sparsity=0.5, **BASE)
    [sparse] = [segment for segment in config.schedule.segments if segment.sparse]
    assert dict(sparse.sparsity) == {"features.conv4.weight": 0.75, "classifier.*": 0.25}
    assert config.name == "DSD, rates by layer"
    assert " " not in run_name(config)
    network = end_network(make_config(method="rigl", layer_rates=rates, **BASE), SHAPE)
    zeros = {name: int((p == 0).sum()) for name, p in network.named_parameters() if (p == 0).any()}
    assert zeros == {"features.conv4.weight": 108, "classifier.weight": 20}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "cubic", "layer_rates": "a=0.5"}, "one sparsity for all layers"),
        ({"method": "dsd", "layer_rates": "a=0.5", "allocation": "erk"}, "allocation layerwise"),
        ({"method": "dsd", "layer_rates": "a=0.5", "structured": True}, "not with structured"),
        ({"method": "dsd", "layer_rates": "a=2"}, "NAME=RATE"),
        ({"method": "dsd", "layer_rates": "a"}, "NAME=RATE"),
        ({"method": "dense", "held_out": "train"}, "held_out"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ValueError, match=words):
        make_config(**BASE, **settings)


# ---- races --------------------------------------------------------------------------------------


class Told:
    """Runs whose scores are known; the hours end before the runs in ``missing``."""

    def __init__(self, scores, missing=(), failed=()):
        self.scores, self.missing, self.asked = scores, missing, []
        self.failed = {}
        self._fails = failed

    def finish(self, configs, share=1.0):
        self.asked.append(len(configs))
        entries = []
        for config in configs:
            key = (config.channels, config.schedule.iterations)
            if key in self._fails:
                self.failed[run_name(config)] = "it failed"
            lost = key in self._fails or key in self.missing
            score = self.scores(*key)
            entry = {"test": {"per_task": [score, score]}, "seconds": 10.0}
            entries.append(None if lost else entry)
        return entries


def candidates(widths):
    return [Candidate({**BASE, "method": "dense", "channels": width}) for width in widths]


def best_first(standings):
    return [(one.candidate.settings["channels"], one.iterations) for one in standings]


def test_a_race_keeps_the_best_third_of_each_rung():
    runs = Told(lambda channels, iterations: (channels * 7 % 10 + iterations / 1000) / 20)
    found = race(candidates(range(1, 10)), [20, 60, 180], runs)
    assert runs.asked == [9, 3, 1]
    by_score = sorted(range(1, 10), key=lambda width: -(width * 7 % 10))
    assert best_first(found) == [
        (by_score[0], 180),
        *((width, 60) for width in by_score[1:3]),
        *((width, 20) for width in by_score[3:]),
    ]


def test_a_rung_that_the_hours_cut_off_does_not_count():
    runs = Told(lambda channels, iterations: channels / 10, missing=[(8, 60)])
    found = race(candidates(range(1, 10)), [20, 60, 180], runs)
    assert best_first(found) == [(width, 20) for width in range(9, 0, -1)]
    # Of the first, candidates would be left out that were never tried.
    assert race(candidates(range(1, 10)), [20, 60], Told(lambda *_: 0.5, missing=[(3, 20)])) == []


def test_a_candidate_that_fails_is_out_and_the_others_go_on():
    runs = Told(lambda channels, iterations: channels / 10, failed=[(9, 60)])
    found = race(candidates(range(1, 10)), [20, 60, 180], runs)
    assert runs.asked == [9, 3, 1]
    assert best_first(found)[0] == (8, 180)
    assert (9, 20) in best_first(found)


def test_rungs_are_thirds_that_all_candidates_fit_into():
    dense = candidates([4])
    assert rungs(dense, 540) == [60, 180, 540]
    assert rungs(dense, 100) == [33, 100]
    assert rungs(dense, 40) == [40]
    long = Candidate({**BASE, "method": "metasparse", "sparsity": 0.95})  # of many rounds
    assert rungs([*dense, long], 100) == [33, 100]
    with pytest.raises(ValueError, match="make the run longer"):
        rungs([*dense, long], 10)


def test_a_candidate_that_had_failed_before_a_restart_is_out_once_the_hours_are_used_up(tmp_path):
    three = candidates([1, 2, 3])
    for one in three[:2]:
        finished(tmp_path / "runs", one.config(20), 0.5 + one.settings["channels"] / 100)
    failed = tmp_path / "runs" / run_name(three[2].config(20))
    failed.mkdir()
    (failed / "error.txt").write_text("FloatingPointError: training diverged")
    (tmp_path / "clock.json").write_text('{"seconds": 3600}')
    runs = Runs(tmp_path / "runs", QUIET, jobs=1, hours=1, clock=tmp_path / "clock.json")
    assert best_first(race(three, [20, 60], runs)) == [(2, 20), (1, 20)]


def test_a_search_repeated_when_its_hours_are_used_up_keeps_its_answer(tmp_path):
    pytest.importorskip("optuna")
    options = {"methods": ("rigl",), "rates": (0.5,), "races": 1, "sensitivity_tasks": 2}
    first = tune(BASE, tmp_path, QUIET, **options)
    chosen = (tmp_path / "chosen.toml").read_text()
    (tmp_path / "clock.json").write_text('{"seconds": 3500}')
    again = tune(BASE, tmp_path, QUIET, hours=1, **options)
    assert first.title != "dense"
    assert again.title == first.title
    assert again.front == first.front
    assert (tmp_path / "chosen.toml").read_text() == chosen


def test_a_study_notices_another_split_of_its_races(tmp_path, monkeypatch):
    pytest.importorskip("statsmodels")

    class Stop(Exception):
        pass

    def stop(*_, **__):
        raise Stop

    monkeypatch.setattr("l2l_prune.experiments.search.verdict.Runs", stop)
    with pytest.raises(Stop):
        study(BASE | {"split": 3}, tmp_path, QUIET, fixed_split=True)
    with pytest.raises(ValueError, match="other settings of split of the races"):
        study(BASE | {"split": 4}, tmp_path, QUIET, fixed_split=True)


def test_a_folder_belongs_to_one_search(tmp_path):
    file = tmp_path / "study.json"
    check_search(file, {"rates": (0.5,), "seed": 0})
    assert not file.exists()
    record_search(file, {"rates": (0.5,), "seed": 0})
    check_search(file, {"rates": [0.5], "seed": 0})
    with pytest.raises(ValueError, match="other settings of rates: choose another"):
        check_search(file, {"rates": [0.5, 0.8], "seed": 0})


def test_hours_count_over_restarts(tmp_path):
    clock, config = tmp_path / "clock.json", make_config(method="dense", **BASE)
    clock.write_text('{"seconds": 3000}')
    options = {"jobs": 1, "clock": clock}
    runs = Runs(tmp_path / "runs", QUIET, hours=1, **options)
    assert not runs.over()
    assert runs.over(0.5)
    assert runs.finish([config], 0.5) == [None]
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ValueError, match="hours"):
        Runs(tmp_path / "runs", QUIET, hours=0, **options)


@pytest.mark.parametrize("text", ["{", "3", "{}", '{"seconds": "long"}', '{"seconds": -1}', ""])
def test_a_damaged_clock_is_named(tmp_path, text):
    clock = tmp_path / "clock.json"
    clock.write_text(text)
    with pytest.raises(ValueError, match=r"clock\.json is damaged .*delete it"):
        Runs(tmp_path / "runs", QUIET, jobs=1, hours=1, clock=clock)


@pytest.mark.parametrize("text", ["{broken\n", "null\n", '{"a": 1}\n'])
def test_a_damaged_journal_is_named(tmp_path, text):
    pytest.importorskip("optuna")
    (tmp_path / "optuna.journal").write_text(text)
    with pytest.raises(ValueError, match=r"optuna\.journal is damaged .*delete it"):
        _search(None, None, tmp_path, length=1, races=1, seed=0)


def never_ends(config, folder, logger, tell):
    from l2l_prune.experiments.run_result import Progress

    for iteration in itertools.count(1):
        tell(Progress(iteration, "dense", 0.0, 0.0, 0.0))
        time.sleep(0.01)
    return Outcome(run_name(config), None)


@pytest.mark.process
def test_runs_stop_at_their_deadline(tmp_path):
    configs = [make_config(method="dense", **BASE)]
    outcomes = run_all(configs, tmp_path, QUIET, work=never_ends, deadline=time.monotonic())
    assert list(outcomes) == []


# ---- costs --------------------------------------------------------------------------------------


def test_costs_are_those_that_one_counts_by_hand():
    dense = cost_of(make_config(method="dense", **BASE), SHAPE)
    # Four convolutions with bias and batch normalisation, strides from 28 to 2, and the classifier.
    convolutions = (9 * 1 * 4 + 4) + 3 * (9 * 4 * 4 + 4)
    assert dense.weights == convolutions + 4 * 2 * 4 + (16 * 5 + 5)
    places = (14**2, 7**2, 4**2, 2**2)
    macs = 9 * 4 * (1 * places[0] + 4 * sum(places[1:])) + 16 * 5
    assert dense.macs == macs
    assert dense.bytes == 4 * (dense.weights + 4 * 2 * 4) + 4 * 8

    sparse = cost_of(make_config(method="rigl", sparsity=0.75, **BASE), SHAPE)
    pruned = 3 * 108 + 60
    assert (sparse.weights, sparse.macs) == (dense.weights - pruned, dense.macs)
    bitmasks = 3 * 144 // 8 + 80 // 8
    indices = 3 * 36 + 20  # a byte each, where that is less
    assert sparse.bytes == dense.bytes - 4 * pruned + min(bitmasks, indices)
    again = cost_of(make_config(method="dsd", sparsity=0.75, **BASE), SHAPE)
    assert again == dense  # it ends dense


def test_costs_are_those_of_the_trained_network():
    config = make_config(method="rigl", sparsity=0.75, allocation="erk", **BASE)
    *_, result = run(config)
    trained = sum(
        int(value.count_nonzero())
        for name, value in result.weights.items()
        if "running" not in name and "tracked" not in name
    )
    assert cost_of(config, SHAPE).weights == result.size == trained


def test_a_run_that_ends_with_channels_cut_has_the_size_of_the_small_network():
    pytest.importorskip("torch_pruning")
    config = make_config(method="one-shot", sparsity=0.5, structured=True, **BASE)
    *_, result = run(config)
    small = Conv4(5, BASE["channels"] // 2)
    assert result.size == sum(p.numel() for p in small.parameters())
    assert cost_of(config, SHAPE).weights == result.size


@pytest.mark.hosts
@pytest.mark.parametrize(
    ("algorithm", "more"),
    [
        *((name, {}) for name in ("maml", "anil", "protonet", "cavia", "metasgd", "sparsemaml")),
        ("metaoptnet", {"backbone": "conv4"}),
    ],
)
def test_every_meta_learner_has_its_costs_and_its_sensitivity(algorithm, more):
    pytest.importorskip("learn2learn")
    settings = {**BASE, **more, "algorithm": algorithm}
    config = make_config(method="dense", **settings)
    dense, sparse = (
        cost_of(make_config(method=method, sparsity=0.75, **settings), SHAPE)
        for method in ("dense", "rigl")
    )
    assert sparse.macs == dense.macs > 0
    assert sparse.weights < 0.5 * dense.weights
    *_, result = run(config)
    if algorithm in LEARN_MORE:
        with pytest.raises(ValueError, match="learns more than its network's weights"):
            measure(config, result.weights, (0.5,), tasks=2)
        return
    found = measure(config, result.weights, (0.5,), tasks=2)
    listed = ",".join(f"{name}={own}" for name, own in found.layer_rates(0.5).items())
    by_layer = make_config(method="rigl", layer_rates=listed, **settings)
    alike = make_config(method="rigl", sparsity=0.5, **settings)
    # As many weights, by layer or alike, up to the rounding of each layer.
    assert abs(cost_of(by_layer, SHAPE).weights - cost_of(alike, SHAPE).weights) <= 5


def test_cut_channels_save_operations():
    pytest.importorskip("torch_pruning")
    settings = BASE | {"channels": 8}
    dense = cost_of(make_config(method="dense", **settings), SHAPE)
    cut = cost_of(make_config(method="one-shot", structured=True, **settings), SHAPE)
    assert cut.macs < 0.6 * dense.macs
    assert cut.bytes < 0.6 * dense.bytes


def test_the_dense_network_of_a_size_is_the_nearest_of_all():
    config = make_config(method="dense", **BASE | {"channels": 12})
    sizes = {
        width: cost_of(dataclasses.replace(config, channels=width), SHAPE).weights
        for width in range(1, 13)
    }
    for wanted in (1, 300, 1000, 2500, 10**6):
        found = dense_width(config, SHAPE, wanted)
        assert abs(sizes[found] - wanted) == min(abs(size - wanted) for size in sizes.values())


def test_quantities_and_budgets():
    assert quantity("100KB") == 100_000
    assert quantity("1.5m") == 1_500_000
    for wrong in ("", "KB", "1..2", "-3", "3 parsecs"):
        with pytest.raises(ValueError, match="not a quantity"):
            quantity(wrong)
    with pytest.raises(ValueError, match="must be > 0"):
        Budget(bytes=0)


# ---- sensitivity --------------------------------------------------------------------------------


def test_sensitivity_is_the_score_with_the_smallest_weights_of_a_layer_at_zero():
    config = make_config(method="dense", **BASE | {"eval_steps": 0, "held_out": "validation"})
    *_, result = run(config)
    found = measure(config, result.weights, (0.5, 0.9), tasks=4)
    assert set(found.sizes) == {f"features.conv{i}.weight" for i in (2, 3, 4)} | {
        "classifier.weight"
    }
    episodes = list(
        evaluation_tasks(load_split(config, "validation"), config, "final tasks", "validation")
    )

    def score(weights):
        algorithm = build(config, SHAPE)
        algorithm.network.load_state_dict(weights)
        return algorithm.evaluate(episodes).mean

    assert found.dense == score(result.weights)
    for name in found.sizes:
        for rate, value in zip((0.5, 0.9), found.scores[name], strict=True):
            weight = result.weights[name].clone(memory_format=torch.contiguous_format)
            order = weight.abs().flatten().argsort()
            weight.view(-1)[order[: round(rate * weight.numel())]] = 0
            assert value == score({**result.weights, name: weight})


def test_rates_by_layer_stay_below_the_largest_whatever_was_measured():
    scores = {"a": (0.2, 0.1), "b": (0.5, 0.5)}
    found = Sensitivity(0.5, (0.5, 0.995), {"a": 100, "b": 900}, scores)
    assert max(found.layer_rates(0.95).values()) <= 0.99


def test_the_reason_is_that_of_the_run_itself(tmp_path):
    """Another candidate failed; this run was stopped by the hours."""
    (tmp_path / "clock.json").write_text('{"seconds": 3600}')
    runs = Runs(tmp_path / "runs", QUIET, jobs=1, hours=1, clock=tmp_path / "clock.json")
    runs.failed["another"] = "FloatingPointError: training diverged"
    [one] = candidates([1])
    with pytest.raises(ValueError, match="the run did not finish: the hours were used up"):
        runs.finish_one(one.config(20), "the run")


def test_any_text_is_toml(tmp_path):
    settings = {"data_root": 'b\u00fcro \U0001f600 "x" \x7f', "sparsity": 0.5, "structured": True}
    (tmp_path / "some.toml").write_text("\n".join(toml_lines(settings)), encoding="utf-8")
    assert read_toml(tmp_path / "some.toml") == settings


def test_a_candidate_whose_run_failed_is_not_drawn_again(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    space = Space({**BASE, "seed": 0}, ("rigl",), (0.5, 0.8), SHAPE, Budget(), tmp_path / "ms.json")
    raced = []

    def race(group, *_):
        raced.extend(run_name(one.whole) for one in group)
        return []

    monkeypatch.setattr("l2l_prune.experiments.search.choice.race", race)
    runs = Runs(tmp_path / "runs", QUIET, jobs=1, hours=None, clock=tmp_path / "clock.json")
    assert _search(space, runs, tmp_path, 20, races=4, seed=0) == []
    assert len(raced) == len(set(raced)) > 1


def test_no_jobs_are_refused(tmp_path):
    [one] = candidates([1])
    runs = Runs(tmp_path / "runs", QUIET, jobs=0, hours=None, clock=tmp_path / "clock.json")
    with pytest.raises(ValueError, match="jobs must be >= 1, got 0"):
        runs.finish([one.config(20)])


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8, 0.95])
def test_rates_by_layer_prune_what_was_asked_for_and_lose_alike(rate):
    found = Sensitivity(
        dense=0.8,
        rates=(0.3, 0.6, 0.9),
        sizes={"tough": 300, "soft": 100, "noisy": 200},
        scores={"tough": (0.8, 0.79, 0.7), "soft": (0.7, 0.5, 0.3), "noisy": (0.81, 0.7, 0.75)},
    )
    rates = found.layer_rates(rate)
    pruned = sum(found.sizes[name] * own for name, own in rates.items())
    assert pruned == pytest.approx(rate * 600, rel=1e-3)
    assert rates["tough"] >= rates["soft"]
    assert all(0 <= own <= 0.99 for own in rates.values())
    assert read_layer_rates(",".join(f"{n}={r}" for n, r in rates.items())) == rates


# ---- what is chosen -----------------------------------------------------------------------------


def test_the_front_holds_what_nothing_smaller_or_equal_beats():
    draw = torch.Generator().manual_seed(3)
    for _ in range(20):
        points = [tuple(map(float, p)) for p in torch.randint(0, 9, (12, 2), generator=draw)]
        kept = {points[i] for i in front_places(points)}
        beaten = {
            p for p in points if any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)
        }
        assert kept == set(points) - beaten


def test_races_have_new_candidates_and_a_broken_off_one_keeps_its_own(tmp_path):
    optuna = pytest.importorskip("optuna")
    shared = {**BASE, "seed": 0}
    space = Space(shared, ("dsd", "rigl"), (0.5, 0.8), SHAPE, Budget(), tmp_path / "ms.json")
    journal = optuna.create_study(direction="maximize")
    seen = {}
    for number in range(2):
        drawn = _taking_part(journal, space, number, seen, seed=number, new=True)
        assert len(drawn) == 9
        assert not drawn.keys() & seen.keys()
        assert all(name == run_name(c.whole) for name, (_, c) in drawn.items())
        again = _taking_part(journal, space, number, seen, seed=number, new=True)  # as after a kill
        assert {n: c for n, (_, c) in again.items()} == {n: c for n, (_, c) in drawn.items()}
        for place, (trial, _) in enumerate(drawn.values()):
            journal.tell(trial, place / 10)
        seen |= drawn
    # The space has 2 x 2 combinations of rigl (alike, erk) and 2 x 3 x 3 or more of dsd.
    for number in range(2, 9):
        drawn = _taking_part(journal, space, number, seen, seed=number, new=True)
        for trial, _ in drawn.values():
            journal.tell(trial, 0.0)
        seen |= drawn
    assert not drawn


def standing(method, score, seconds=10.0, **settings):
    candidate = Candidate({**BASE, "method": method, "seed": 0, **settings})
    return Standing(candidate, 20, {"test": {"per_task": [score, score]}, "seconds": seconds})


def test_a_plan_states_arms_replicates_and_controls_before_the_runs(tmp_path):
    raced = [
        standing("dense", 0.6),
        standing("dsd", 0.7, 15.0, sparsity=0.5),
        standing("iht", 0.5, sparsity=0.5),
        standing("rigl", 0.6, sparsity=0.75),
        standing("rigl", 0.4, sparsity=0.5),
    ]
    (tmp_path / "plan.toml").write_text(_plan([raced], replicates=3, vary_split=True))
    document = read_toml(tmp_path / "plan.toml")
    configs = expand({}, document["grid"])  # as sweep takes it
    assert {(c.seed, c.split) for c in configs} == {(100, 100), (101, 101), (102, 102)}
    assert {c.held_out for c in configs} == {"test"}
    arms = {(c.name, c.channels, c.schedule.iterations) for c in configs}
    [narrow] = {width for _, width, _ in arms} - {4}
    assert arms == {
        ("dense", 4, 20),
        ("DSD", 4, 20),
        ("dense", 4, 30),  # as many seconds
        ("RigL", 4, 20),
        ("dense", narrow, 20),  # as many weights
    }
    assert len(configs) == 15
    stated = read_comparisons(document["comparison"])
    assert [c.margin for c in stated] == [0, 0, -0.01, 0]
    assert {c.treatment["name"] for c in stated} == {"DSD", "RigL"}
    assert all(c.control["name"] == "dense" for c in stated)


def test_a_plan_of_a_fixed_split_keeps_the_split_that_was_chosen(tmp_path):
    raced = [standing("dense", 0.6, split=5), standing("dsd", 0.7, sparsity=0.5, split=5)]
    (tmp_path / "plan.toml").write_text(_plan([raced], replicates=3, vary_split=False))
    configs = expand({}, read_toml(tmp_path / "plan.toml")["grid"])
    assert len(configs) == 6
    assert {(c.seed, c.split) for c in configs} == {(100, 5), (101, 5), (102, 5)}


@pytest.mark.parametrize(
    ("own", "split", "varies"), [(True, None, 0), (True, 3, 1), (False, None, 1)]
)
def test_a_folders_own_splits_are_kept(own, split, varies, tmp_path, monkeypatch):
    pytest.importorskip("statsmodels")
    for number, part in enumerate(("train", "val", "test") if own else ("a",)):
        names = [f"{part}{i}" for i in range(6 if own else 18)]
        write_classes(tmp_path / "data" / (part if own else ""), names, first=6 * number)
    asked = []
    monkeypatch.setattr(
        "l2l_prune.experiments.search.verdict.record_search",
        lambda path, about: asked.append(about["split"]) or sys.exit(),
    )
    base = {"algorithm": "reptile", "data": "folder", "data_root": str(tmp_path / "data")}
    base |= {"shots": 1, "queries": 1, "train_shots": 2, "inner_batch": 2, "iterations": 100}
    base |= {} if split is None else {"split": split}
    with pytest.raises(SystemExit):
        study(base | {"ways": 2}, tmp_path / "out", QUIET)
    assert asked == ["varies" if varies else "fixed"]


def finished(folder, config, score, seconds=10.0, weights=None):
    """A run folder as a report reads it."""
    place = folder / run_name(config)
    place.mkdir(parents=True)
    scores = {"mean": score, "ci95": 0.01, "per_task": [score, score]}
    entry = {"config": config.to_json(), "train": scores, "test": scores, "seconds": seconds}
    entry |= {"curve": [], "weights": weights}
    (place / "results.json").write_text(json.dumps({"runs": [entry]}))


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (1.07, "7% longer than"),
        (1.004, "as long as"),
        (0.5, "50% less time than"),
        (2.5, "2.5 times as long as"),
    ],
)
def test_a_length_of_training_in_words(ratio, words):
    assert _length(ratio) == words


def test_a_verdict_says_what_was_shown_and_what_was_not(tmp_path, monkeypatch):
    pytest.importorskip("statsmodels")
    raced = [standing("dense", 0.6), standing("rigl", 0.6, sparsity=0.75)]
    (tmp_path / "plan.toml").write_text(_plan([raced], replicates=4, vary_split=True))
    document = read_toml(tmp_path / "plan.toml")
    configs = expand({}, document["grid"])
    stated = read_comparisons(document["comparison"])
    runs = Runs(tmp_path / "runs", QUIET, jobs=1, hours=None, clock=tmp_path / "clock.json")
    assert "No verdict yet" in _verdict(stated, runs, 4)
    for config in configs:
        noise = (config.seed % 2 - 0.5) / 250
        if config.name == "RigL":
            finished(tmp_path / "runs", config, 0.6 + noise, seconds=5.0, weights=25)
        elif config.channels == 4:
            finished(tmp_path / "runs", config, 0.6, weights=100)
        elif config.seed == 100:  # of the narrow one, all others failed
            finished(tmp_path / "runs", config, 0.4)
    monkeypatch.setattr("l2l_prune.experiments.search.verdict.write_report", lambda *_: [])
    text = _verdict(stated, runs, 4)
    assert "**For size, not for accuracy. RigL, sparsity 0.75 minus dense" in text
    assert "**not worse by more than 1 point**" in text
    assert "**not shown**" in text
    assert "could have been seen" in text
    words = "Training took 50% less time than dense, and the network has 25% as many weights."
    assert words in text
    assert "corrected by Holm for the 3 comparisons" in text
    [within] = judge([stated[1]], read_folder(tmp_path / "runs").runs)
    assert f"{within.verdict}** (p = {3 * within.p:.2g})" in text  # the third has not been judged
    assert "Not judged: " in text
    assert "minus dense, channels" in text.split("Not judged: ")[1]
    assert "failed" not in text


def test_equal_differences_show_nothing_about_what_could_have_been_seen(tmp_path, monkeypatch):
    pytest.importorskip("statsmodels")
    raced = [standing("dense", 0.6), standing("rigl", 0.5, sparsity=0.75)]
    (tmp_path / "plan.toml").write_text(_plan([raced], replicates=4, vary_split=True))
    document = read_toml(tmp_path / "plan.toml")
    for config in expand({}, document["grid"]):
        finished(tmp_path / "runs", config, 0.5 if config.name == "RigL" else 0.6)
    runs = Runs(tmp_path / "runs", QUIET, jobs=1, hours=None, clock=tmp_path / "clock.json")
    monkeypatch.setattr("l2l_prune.experiments.search.verdict.write_report", lambda *_: [])
    text = _verdict(read_comparisons(document["comparison"]), runs, 4)
    assert "**not shown** (p = 1)" in text
    assert "nan" not in text


@pytest.mark.parametrize(
    ("plain", "timely", "words"),
    [
        (-0.021, 0.03, "In the same time, not at the same length. RigL"),
        (0.02, 0.03, "Yes: RigL minus dense (channels 64, iterations 1000) is +2.0"),
        (0.02, -0.01, "At the same length, not in the same time. RigL minus dense (channels 64, "),
    ],
)
def test_the_same_time_is_not_the_same_length(plain, timely, words):
    sides = [
        {"name": n, "channels": 64, "iterations": i} for n, i in (("RigL", 1000), ("dense", 0))
    ]
    judged = []
    for difference, iterations in ((plain, 1000), (timely, 600)):
        control = sides[1] | {"iterations": iterations}
        values = OverSeeds((difference - 0.001, difference + 0.001))
        judged.append(Judged(Comparison("A", sides[0], control), values, 0.001, 0.002, 0.01))
    assert _answer(judged).startswith(words)


def test_a_budget_that_nothing_meets_names_the_nearest_before_any_run(tmp_path):
    pytest.importorskip("optuna")
    with pytest.raises(ValueError, match=r"the nearest is RigL.* 95% with [\d,]+ bytes"):
        tune(BASE, tmp_path, QUIET, methods=("dsd", "rigl"), budget=Budget(bytes=100))
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "tune.json").exists()  # the folder is free for a larger budget


def test_a_folder_that_another_process_writes_to_is_refused(tmp_path):
    pytest.importorskip("optuna")
    pytest.importorskip("statsmodels")
    with filelock.FileLock(tmp_path / ".lock"):
        with pytest.raises(ValueError, match="another l2l-prune is writing"):
            tune(BASE, tmp_path, QUIET)
        with pytest.raises(ValueError, match="another l2l-prune is writing"):
            study(BASE, tmp_path, QUIET)


@pytest.mark.parametrize(
    ("command", "chosen"),
    [
        ("study", ["--sparsity", "--layer-rates", "--held-out"]),
        ("tune", ["--sparsity", "--layer-rates", "--held-out", "--pretrain", "--rounds"]),
    ],
)
def test_help_leaves_out_what_a_search_refuses(command, chosen):
    runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
    text = runner.invoke(app, [command, "--help"]).stdout
    assert "--iterations" in text
    assert not [option for option in chosen if f"{option} " in text]
    assert "--sparsity " in runner.invoke(app, ["run", "--help"]).stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tune", "--held-out", "test"], "the search chooses it"),
        (["tune", "--sparsity", "0.5"], "the search chooses it"),
        (["tune", "--max-size", "small"], "not a quantity"),
        (["tune", "--method", "dense"], "methods must be from"),
        (["study", "--method", "dense"], "leave it out"),
        (["study", "--rate", "1.5"], "sparsity"),
        (["tune", "--rate", "0.5", "--rate", "50"], "rate must be in"),
        (["study", "--hours", "0"], "hours"),
        (["study", "--split", "100"], "replicates use the rest"),
        (["tune", "--ways", "31"], "the train split is too small: ways=31"),
        (["study", "--ways", "31"], "the train split is too small: ways=31"),
        (
            ["tune", "--ways", "100", "--train-classes", "100"],
            "the validation split is too small: ways=100",
        ),
        (
            ["study", "--ways", "100", "--train-classes", "100"],
            "the validation split is too small: ways=100",
        ),
        (["tune", "--shots", "10", "--queries", "11"], "split is too small: shots + queries = 21"),
    ],
)
def test_what_cannot_be_searched_is_told_in_a_line(tmp_path, arguments, words):
    pytest.importorskip("optuna")
    pytest.importorskip("statsmodels")
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert words in result.stderr
    assert not list(tmp_path.glob("out/*/*"))


# ---- whole commands, killed ---------------------------------------------------------------------

SMALL = (
    *("--iterations", "60", "--channels", "4", "--tasks", "1", "--inner-steps", "1"),
    *("--eval-tasks", "8", "--curve-tasks", "2", "--method", "dsd", "--method", "rigl"),
    *("--rate", "0.5"),
)


def killed_then_repeated(command: list[str], out: Path, runs: int) -> str:
    """Kill a command when ``runs`` have ended, start it again, and see that these stay."""
    arguments = [sys.executable, "-m", "l2l_prune", *command, "--out", str(out)]
    working = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 500
        while len(list(out.glob("*/*/results.json"))) < runs:
            assert time.monotonic() < deadline
            assert working.poll() is None
            time.sleep(0.1)
    finally:
        working.kill()
        working.wait()
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/*/results.json")}
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    assert json.loads((out / "clock.json").read_text())["seconds"] > 0
    return done.stdout


@pytest.mark.slow
@pytest.mark.process
def test_a_killed_study_goes_on_to_its_verdict(tmp_path):
    pytest.importorskip("statsmodels")
    printed = killed_then_repeated(["study", *SMALL, "--replicates", "2"], tmp_path, runs=2)
    verdict = (tmp_path / "verdict.md").read_text()
    assert verdict.strip() in printed
    assert "over 2 replicates" in verdict
    assert (tmp_path / "confirmation" / "report.html").exists()
    for file in tmp_path.glob("races/*/results.json"):
        config = json.loads(file.read_text())["runs"][0]["config"]
        assert config["held_out"] == "validation"
    plan = expand({}, read_toml(tmp_path / "plan.toml")["grid"])
    assert {run_name(config) for config in plan} == {
        file.parent.name for file in tmp_path.glob("confirmation/*/results.json")
    }


@pytest.mark.slow
@pytest.mark.process
def test_a_killed_tune_goes_on_to_its_choice(tmp_path):
    optuna = pytest.importorskip("optuna")
    from optuna.storages.journal import JournalFileBackend

    printed = killed_then_repeated(["tune", *SMALL, "--races", "1"], tmp_path, runs=3)
    assert "chosen.toml" in printed
    for name in ("sensitivity.png", "front.png", "tune.md"):
        assert (tmp_path / name).stat().st_size > 0
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "optuna.journal")))
    trials = optuna.load_study(storage=storage, study_name="tune").trials
    taking_part = [t for t in trials if "race" in t.user_attrs and "copy" not in t.user_attrs]
    assert len(taking_part) <= 9
    assert {t.state.name for t in taking_part} <= {"PRUNED", "COMPLETE"}
    chosen = read_toml(tmp_path / "chosen.toml")
    config = make_config(**chosen)
    [tested] = [
        json.loads(file.read_text())["runs"][0]["config"]
        for file in tmp_path.glob("chosen/*/results.json")
        if file.parent.name == run_name(config)
    ]
    assert tested["held_out"] == "test"  # and what run --config trains is what was scored
    for file in tmp_path.glob("runs/*/results.json"):
        assert json.loads(file.read_text())["runs"][0]["config"]["held_out"] == "validation"
