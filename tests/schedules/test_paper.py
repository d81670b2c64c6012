from __future__ import annotations

import ast
import importlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2l_prune import DSDSchedule, IHTSchedule, Schedule, Segment

PURE = {
    f"l2l_prune.{name}"
    for name in (
        "schedules",
        "schedules.paper",
        "schedules.common",
        "schedules.schedule",
        "_basics.checks",
    )
}

counts = st.integers(0, 30)
rates = st.floats(0, 0.99)


@st.composite
def dsd(draw):
    a, b, c = draw(counts), draw(counts), draw(st.integers(1, 30))
    return DSDSchedule(draw(rates), pretrain=a, prune=b, retrain=c)


@st.composite
def iht(draw):
    return IHTSchedule(
        draw(rates),
        pretrain=draw(counts),
        prune=draw(st.integers(1, 20)),
        retrain=draw(counts),
        rounds=draw(st.integers(1, 5)),
    )


@given(st.one_of(dsd(), iht()), st.integers(0, 400))
def test_index_is_the_segment_found_by_walking(schedule, iteration):
    walked = [i for i, segment in enumerate(schedule.segments) for _ in range(segment.iterations)]
    assert len(walked) == schedule.iterations
    assert schedule.index(iteration) == (walked + [walked[-1]] * 400)[iteration]


@given(st.one_of(dsd(), iht()))
def test_schedules_are_values(schedule):
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert eval(repr(schedule)) == schedule
    assert hash(schedule) == hash(eval(repr(schedule)))
    with pytest.raises(AttributeError):
        schedule.sparsity = 0.5


@given(st.integers(10, 5000), st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_dsd_fractions_fill_the_run_exactly(total, a, b, c):
    whole = a + b + c
    shares = {"pretrain": a / whole, "prune": b / whole, "retrain": c / whole}
    if total * min(a, b, c) < 2 * whole:
        return  # a phase may get no iteration: see the bad inputs
    schedule = DSDSchedule.from_fractions(0.5, total, **shares)
    assert schedule.iterations == total
    for phase, share in shares.items():
        assert abs(getattr(schedule, phase) - total * share) < 1 + 1e-6


@given(st.integers(60, 5000))
def test_iht_fractions_fill_the_run_with_equal_rounds(total):
    schedule = IHTSchedule.from_fractions(0.5, total)
    assert schedule.iterations == total
    assert abs(schedule.prune - 0.15 * total) < 2
    assert abs(schedule.retrain - 0.05 * total) < 2
    assert schedule.pretrain >= 0.2 * total - 1


def test_paper_numbers():
    # Section 5.1 of the paper.
    numbers = {
        channels: (s.pretrain, s.prune, s.retrain, s.sparsity)
        for channels in (32, 64, 128, 256)
        for s in [DSDSchedule.paper("mini-imagenet", channels=channels)]
    }
    assert numbers == {
        32: (30_000, 50_000, 20_000, 0.4),
        64: (30_000, 60_000, 10_000, 0.3),
        128: (30_000, 60_000, 10_000, 0.5),
        256: (30_000, 60_000, 10_000, 0.6),
    }
    tiered = DSDSchedule.paper("tiered-imagenet", channels=256)
    assert (tiered.pretrain, tiered.prune, tiered.retrain) == (30_000, 50_000, 20_000)
    assert tiered.sparsity == 0.2
    for dataset, rate in (("mini-imagenet", 0.4), ("tiered-imagenet", 0.2)):
        s = IHTSchedule.paper(dataset, channels=64)
        assert (s.pretrain, s.prune, s.retrain, s.rounds) == (20_000, 15_000, 5_000, 4)
        assert s.sparsity == rate
        assert s.iterations == 100_000
    assert IHTSchedule.paper("mini-imagenet", sparsity=0.7).sparsity == 0.7


def test_given_rates_replace_the_papers():
    for kind in (DSDSchedule, IHTSchedule):
        assert kind.paper("mini-imagenet", sparsity=0.15).sparsity == 0.15
        assert kind.paper("mini-imagenet", sparsity={"fc": 0.2}).sparsity == (("fc", 0.2),)


def test_counts_reach_every_sparse_segment_and_survive_scaling():
    lengths = {"pretrain": 2, "prune": 6, "retrain": 2}
    for schedule in (
        DSDSchedule(0.5, **lengths, keep={"fc": 3}),
        IHTSchedule(0.5, **lengths, rounds=2, keep={"fc": 3}),
    ):
        for same in (schedule, schedule.scaled(2 * schedule.iterations)):
            assert all(s.keep == (("fc", 3),) for s in same.segments if s.sparse)
    uneven = DSDSchedule(0.5, pretrain=1, prune=2, retrain=7).scaled(100)
    assert (uneven.pretrain, uneven.prune, uneven.retrain) == (10, 20, 70)


def test_the_shortest_runs():
    one = {"pretrain": 0.0, "prune": 1.0, "retrain": 0.0}
    assert DSDSchedule.from_fractions(0.5, 1, **one).prune == 1
    assert IHTSchedule.from_fractions(0.5, 1, **one, rounds=1).prune == 1


def test_a_run_that_is_all_pretraining():
    """Its rounds are empty: fractions of 0 divide nothing."""
    for make in (DSDSchedule, IHTSchedule):
        schedule = make.from_fractions(0.5, 10, pretrain=1, prune=0, retrain=0)
        assert [(start, stop) for start, stop, _ in schedule.spans()] == [(0, 10)]
        assert not schedule.segment(0).sparse
        assert schedule.scaled(20).iterations == 20


def test_scaled_keeps_the_shape():
    short = DSDSchedule.paper("mini-imagenet").scaled(1000)
    assert (short.pretrain, short.prune, short.retrain) == (300, 600, 100)
    short = IHTSchedule.paper("mini-imagenet", initial_sparsity=0.1).scaled(500)
    assert (short.pretrain, short.prune, short.retrain, short.rounds) == (100, 75, 25, 4)
    assert short.initial_sparsity == 0.1


def test_ramp_is_linear_over_rounds_and_ends_on_target():
    schedule = IHTSchedule(0.5, pretrain=0, prune=1, retrain=1, rounds=5, initial_sparsity=0.1)
    ramp = [s.sparsity for s in schedule.segments if s.sparse]
    assert ramp == pytest.approx(np.linspace(0.1, 0.5, 5))
    assert ramp[-1] == 0.5
    single = IHTSchedule(0.5, pretrain=0, prune=1, retrain=1, rounds=1, initial_sparsity=0.1)
    assert [s.sparsity for s in single.segments if s.sparse] == [0.5]


def test_ablations_without_pretraining_or_retraining():
    schedule = DSDSchedule(0.5, pretrain=0, prune=3, retrain=0)
    assert all(schedule.segment(i).sparse for i in range(10))


def test_past_the_end_stays_in_the_last_nonempty_segment():
    schedule = DSDSchedule(0.5, pretrain=1, prune=2, retrain=0)
    assert schedule.segment(10**6).phase == "prune"


def test_describe_and_summary_numbers():
    text = IHTSchedule(0.25, pretrain=10, prune=4, retrain=2, rounds=2).describe()
    lines = [line.split() for line in text.splitlines()]
    assert ["prune", "2", "16", "19", "4", "25%"] in lines
    assert ["total", "0", "21", "22"] in lines


def test_plot_draws_sparsity_and_shades_sparse_phases():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    ax = DSDSchedule(0.3, pretrain=2, prune=3, retrain=1).plot(figure.subplots())
    values, edges, _ = ax.patches[0].get_data()
    assert list(values) == [0, 30, 0]
    assert list(edges) == [0, 2, 5, 6]
    assert len(ax.patches) == 2  # the stairs and one shaded phase


def test_plot_says_what_counts_alone_leave_open():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    schedule = DSDSchedule(keep={"fc": 3}, pretrain=2, prune=2, retrain=2)
    ax = schedule.plot(figure.subplots())
    values, _, _ = ax.patches[0].get_data()
    assert [str(value) for value in values] == ["0.0", "nan", "0.0"]
    assert [text.get_text() for text in ax.texts] == ["per layer"]
    figure.canvas.draw()


def test_a_dense_start_is_not_rounded_away():
    schedule = IHTSchedule(0.5, pretrain=1, prune=15, retrain=5, rounds=4)
    with pytest.raises(ValueError, match=r"pretrain=0\.012 of total=40 is no iteration"):
        schedule.scaled(40)
    assert schedule.scaled(162).pretrain == 2


def test_mappings_are_frozen_copies():
    rates = {"conv*": 0.5}
    schedule = DSDSchedule(rates, pretrain=1, prune=1, retrain=1, keep={"fc": 3})
    rates["conv*"] = 0.9
    assert dict(schedule.sparsity) == {"conv*": 0.5}
    assert dict(schedule.segments[1].keep) == {"fc": 3}


@pytest.mark.parametrize(
    ("make", "error", "culprit"),
    [
        (lambda: Segment(-1), ValueError, "iterations"),
        (lambda: Segment(1.5), TypeError, "iterations"),
        (lambda: Segment(True), TypeError, "iterations"),
        (lambda: Segment(1, sparsity=1.0), ValueError, "sparsity"),
        (lambda: Segment(1, sparsity=-0.1), ValueError, "sparsity"),
        (lambda: Segment(1, sparsity=float("nan")), ValueError, "sparsity"),
        (lambda: Segment(1, sparsity="half"), TypeError, "sparsity"),
        (lambda: Segment(1, sparsity={}), ValueError, "sparsity"),
        (lambda: Segment(1, sparsity={"fc": 2}), ValueError, r"sparsity\['fc'\]"),
        (lambda: Segment(1, sparsity={3: 0.2}), TypeError, "sparsity"),
        (lambda: Segment(1, sparsity=0.5), ValueError, "sparse=True"),
        (lambda: Segment(1, keep={"fc": 1}), ValueError, "sparse=True"),
        (lambda: Segment(1, keep={"fc": 0}), ValueError, r"keep\['fc'\]"),
        (lambda: Segment(1, keep={"fc": 0.5}), TypeError, r"keep\['fc'\]"),
        (lambda: Segment(1, keep=4), TypeError, "keep"),
        (lambda: Schedule([]), ValueError, "empty"),
        (lambda: Schedule([Segment(0)]), ValueError, "empty"),
        (lambda: Schedule([3]), TypeError, "Segment"),
        (lambda: DSDSchedule(0.5, pretrain=-1, prune=1, retrain=1), ValueError, "pretrain"),
        (lambda: DSDSchedule(0.5, pretrain=1, prune=1.0, retrain=1), TypeError, "prune"),
        (lambda: DSDSchedule(1.2, pretrain=1, prune=1, retrain=1), ValueError, "sparsity"),
        (lambda: IHTSchedule(0.5, pretrain=1, prune=1, retrain=1, rounds=0), ValueError, "rounds"),
        (
            lambda: IHTSchedule(
                {"a": 0.5}, pretrain=1, prune=1, retrain=1, rounds=2, initial_sparsity=0.1
            ),
            TypeError,
            "initial_sparsity",
        ),
        (
            lambda: IHTSchedule(
                0.5, pretrain=1, prune=1, retrain=1, rounds=2, initial_sparsity=1.0
            ),
            ValueError,
            "initial_sparsity",
        ),
        (lambda: DSDSchedule.paper("cifar"), ValueError, "dataset"),
        (lambda: DSDSchedule.paper("mini-imagenet", channels=48), ValueError, "channels"),
        (lambda: DSDSchedule.from_fractions(0.5, 100, pretrain=0.9), ValueError, "cover"),
        (lambda: DSDSchedule.from_fractions(0.5, 3), ValueError, "longer"),
        (
            lambda: DSDSchedule(0.5, pretrain=1, prune=1, retrain=1).index(-1),
            ValueError,
            "iteration",
        ),
    ],
)
def test_bad_input_names_the_argument(make, error, culprit):
    with pytest.raises(error, match=culprit):
        make()


def test_schedules_import_no_torch():
    for module in PURE:
        tree = ast.parse(Path(importlib.import_module(module).__file__).read_text())
        imported = {
            name.name if isinstance(node, ast.Import) else node.module
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in node.names
        }
        assert not any(
            name.split(".")[0] in {"torch", "l2l_prune"} and name not in PURE for name in imported
        )
