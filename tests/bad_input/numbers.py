"""Schedules, patterns, criteria and bounds: numbers that cannot be."""

from __future__ import annotations

import torch
from torch import nn

from l2l_prune import DSDSchedule, IHTSchedule, Schedule, Segment
from l2l_prune.fewshot.evaluation import Mean
from l2l_prune.fewshot.theory import (
    Assumptions,
    dense_gap_bound,
    estimate_smoothness,
    margin_risk_bound,
    parameter_counts,
    sparse_gap_bound,
)
from l2l_prune.masking.criteria import random
from l2l_prune.masking.patterns import Block, NByM
from tests.bad_input.case import Case


def dsd(sparsity=0.5, pretrain=1, prune=1, retrain=1, **more):
    return DSDSchedule(sparsity, pretrain=pretrain, prune=prune, retrain=retrain, **more)


def iht(**changes):
    return IHTSchedule(0.5, **{"pretrain": 1, "prune": 1, "retrain": 1, "rounds": 2, **changes})


def setting(**changes):
    usual = {"tasks": 10, "loss_bound": 1.0, "lipschitz": 1.0, "smoothness": 1.0}
    return Assumptions(**{**usual, "radius": 1.0, "inner_lr": 0.1, **changes})


def layer(folder):
    net = nn.Linear(3, 2)
    return {"net": net, "parameters": list(net.parameters())}


SCHEDULES = [
    Case("a percentage", lambda s: dsd(80), ValueError, r"sparsity .*80.* 0\.8"),
    Case("everything pruned", lambda s: dsd(1), ValueError, r"sparsity must be in \[0, 1\)"),
    Case("sparsity below 0", lambda s: dsd(-0.1), ValueError, r"sparsity .*-0\.1"),
    Case("sparsity NaN", lambda s: dsd(float("nan")), ValueError, "sparsity .*nan"),
    Case("sparsity in words", lambda s: dsd("50%"), TypeError, "sparsity .*'50%'"),
    Case("sparsity None", lambda s: dsd(None), TypeError, "sparsity .*None"),
    Case("sparsity True", lambda s: dsd(True), TypeError, "sparsity .*True"),
    Case("sparsity a tensor", lambda s: dsd(torch.tensor(0.5)), TypeError, r"sparsity .*tensor"),
    Case("sparsity complex", lambda s: dsd(0.5 + 0j), TypeError, "sparsity .*0j"),
    Case("two bare rates", lambda s: dsd((0.3, 0.5)), TypeError, r"sparsity .*\(0\.3, 0\.5\)"),
    Case("no rates", lambda s: dsd({}), ValueError, "sparsity names no layer"),
    Case("keep in words", lambda s: dsd(keep={"fc": "4"}), TypeError, r"keep\['fc'\] .*'4'"),
    Case("keep nothing", lambda s: dsd(keep={"fc": 0}), ValueError, r"keep\['fc'\] .*0"),
    Case("iterations in words", lambda s: dsd(prune="60k"), TypeError, "prune .*'60k'"),
    Case("half an iteration", lambda s: dsd(retrain=0.5), TypeError, "retrain .*0.5"),
    Case("no iteration at all", lambda s: dsd(0.5, 0, 0, 0), ValueError, "schedule is empty"),
    Case("no rounds", lambda s: iht(rounds=0), ValueError, "rounds .*0"),
    Case("rounds in words", lambda s: iht(rounds="4"), TypeError, "rounds .*'4'"),
    Case("a ramp from 1", lambda s: iht(initial_sparsity=1), ValueError, "initial_sparsity .*1"),
    Case("a falling ramp", lambda s: iht(initial_sparsity=0.9), ValueError, "0.9 is more than"),
    Case("sparse in words", lambda s: Segment(3, sparse="no"), TypeError, "sparse .*'no'"),
    Case("a phase that is no name", lambda s: Segment(3, phase=2), TypeError, "phase .*2"),
    Case("a round before 1", lambda s: Segment(3, round=-1), ValueError, "round .*-1"),
    Case("one bare segment", lambda s: Schedule(Segment(3)), TypeError, "segments .*Segment"),
    Case("iterations for segments", lambda s: Schedule([10, 20]), TypeError, "Segment .*10"),
    Case("an iteration before 0", lambda s: dsd().index(-1), ValueError, "iteration .*-1"),
    Case("an iteration in words", lambda s: dsd().segment("2"), TypeError, "iteration .*'2'"),
    Case("another data set", lambda s: DSDSchedule.paper("cub"), ValueError, "dataset .*'cub'"),
    Case(
        "another width",
        lambda s: IHTSchedule.paper("mini-imagenet", channels="64"),
        ValueError,
        "channels .*'64'",
    ),
    Case(
        "fractions in percent",
        lambda s: DSDSchedule.from_fractions(0.5, 100, pretrain=30, prune=60, retrain=10),
        ValueError,
        "pretrain .*30",
    ),
    Case(
        "a fraction in words",
        lambda s: DSDSchedule.from_fractions(0.5, 100, pretrain="0.3"),
        TypeError,
        "pretrain .*'0.3'",
    ),
    Case(
        "a fraction of a round in words",
        lambda s: IHTSchedule.from_fractions(0.5, 100, prune="0.15"),
        TypeError,
        "prune .*'0.15'",
    ),
    Case(
        "fractions of no round",
        lambda s: IHTSchedule.from_fractions(0.5, 100, rounds=0),
        ValueError,
        "rounds .*0",
    ),
    Case("scaled to nothing", lambda s: dsd().scaled(0), ValueError, "total .*0"),
    Case("scaled by a factor", lambda s: dsd().scaled(0.1), TypeError, "total .*0.1"),
]

OTHERS = [
    Case("2:4 the wrong way round", lambda s: NByM(4, 2), ValueError, "n must be below m = 2.*4"),
    Case("2:4 in words", lambda s: NByM("2", 4), TypeError, "n must be an integer.*'2'"),
    Case("blocks without rows", lambda s: Block(0, 2), ValueError, "rows .*0"),
    Case("random by a seed", lambda s: random(0), TypeError, "generator .*torch.Generator.*0"),
    Case("a mean of nothing", lambda s: Mean(()), ValueError, "no value"),
    Case("tasks in words", lambda s: setting(tasks="10"), TypeError, "tasks .*'10'"),
    Case("tasks NaN", lambda s: setting(tasks=float("nan")), TypeError, "tasks .*nan"),
    Case("radius in words", lambda s: setting(radius="1"), TypeError, "radius .*'1'"),
    Case("delta of 5", lambda s: setting(delta=5), ValueError, "delta .*5"),
    Case(
        "half a parameter",
        lambda s: sparse_gap_bound(2.5, 10, setting()),
        TypeError,
        "kept .*2.5",
    ),
    Case(
        "more kept than there are",
        lambda s: sparse_gap_bound(11, 10, setting()),
        ValueError,
        "kept .*10, got 11",
    ),
    Case(
        "a constant below 0",
        lambda s: dense_gap_bound(10, setting(), constant=-1),
        ValueError,
        "constant .*-1",
    ),
    Case(
        "a risk that is NaN",
        lambda s: margin_risk_bound(float("nan"), 5, 10, setting()),
        ValueError,
        "training_risk .*nan",
    ),
    Case(
        "counts at a rate, not in a schedule",
        lambda s: parameter_counts(s.net, 0.5),
        TypeError,
        "schedule must be a Schedule, got 0.5",
        layer,
    ),
    Case(
        "smoothness of another loss",
        lambda s: estimate_smoothness(
            lambda: torch.ones(1, requires_grad=True).sum(),
            s.parameters,
            radius=1.0,
            generator=torch.Generator(),
        ),
        ValueError,
        "loss does not depend on all of the given parameters",
        layer,
    ),
    Case(
        "smoothness of a number",
        lambda s: estimate_smoothness(
            lambda: 1.0, s.parameters, radius=1.0, generator=torch.Generator()
        ),
        TypeError,
        "loss.* must be a tensor, got 1.0",
        layer,
    ),
    Case(
        "smoothness without a radius",
        lambda s: estimate_smoothness(lambda: 0, s.parameters, radius=float("nan")),
        ValueError,
        "radius .*nan",
        layer,
    ),
]

CASES = SCHEDULES + OTHERS
