"""The bounds against their formulas, their meaning, and quadratics with known constants."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from l2l_prune import DSDSchedule, IHTSchedule, Pruner, Schedule, Segment
from l2l_prune.fewshot.theory import (
    Assumptions,
    covering_gap_bound,
    dense_gap_bound,
    estimate_smoothness,
    margin_risk_bound,
    parameter_counts,
    sparse_gap_bound,
)

SETTING = Assumptions(
    tasks=10_000, loss_bound=2.0, lipschitz=5.0, smoothness=3.0, radius=10.0, inner_lr=0.1
)


def test_theorem_1_by_hand():
    inside = 100 * math.log(1000 * 100 * 5 * 10 * 1.3 / (2 * 100)) + math.log(20)
    assert sparse_gap_bound(100, 1000, SETTING) == pytest.approx(2 * math.sqrt(inside / 10_000))
    doubled = sparse_gap_bound(100, 1000, SETTING, constant=2.0)
    assert doubled == 2 * sparse_gap_bound(100, 1000, SETTING)
    assert margin_risk_bound(0.3, 100, 1000, SETTING) == pytest.approx(
        0.3 + sparse_gap_bound(100, 1000, SETTING)
    )
    assert dense_gap_bound(1000, SETTING) == pytest.approx(2 * math.sqrt(0.1))


def test_bounds_shrink_with_sparsity_and_tasks():
    for bound in (sparse_gap_bound, covering_gap_bound):
        values = [bound(kept, 100_000, SETTING) for kept in (10, 100, 1000, 10_000)]
        assert values == sorted(values)
        more = dataclasses.replace(SETTING, tasks=40_000)
        assert bound(1000, 100_000, more) < bound(1000, 100_000, SETTING)


def test_the_sparse_bound_beats_the_dense_one_only_when_k_is_far_below_p():
    """The paper's point, and its limit: at the paper's rates (k close to p) it does not."""
    p = 100_000
    assert sparse_gap_bound(p // 1000, p, SETTING) < dense_gap_bound(p, SETTING)
    assert sparse_gap_bound(9 * p // 10, p, SETTING) > dense_gap_bound(p, SETTING)


def test_the_covering_bound_holds_on_a_sampled_problem():
    """Loss (theta . x)^2 capped at 1 on the unit ball, one inner step of 0: the largest gap over
    a grid of 1-sparse parameters stays below the bound in every one of 100 draws."""
    generator = torch.Generator().manual_seed(0)
    p, tasks = 20, 400
    assumptions = Assumptions(tasks, 1.0, lipschitz=2.0, smoothness=2.0, radius=1.0, inner_lr=0.0)
    bound = covering_gap_bound(1, p, assumptions)
    sides = torch.linspace(-1, 1, 41)
    worst = 0.0
    for _ in range(100):
        x = torch.rand(tasks, p, generator=generator) * 2 - 1
        losses = sides.view(-1, 1, 1) ** 2 * x**2  # [grid, tasks, entry]
        gap = (losses.mean(1) - sides.view(-1, 1) ** 2 / 3).abs().max()
        worst = max(worst, float(gap))
    assert 0 < worst < bound


def test_counts_are_the_pruners():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
    schedule = IHTSchedule(0.6, pretrain=1, prune=2, retrain=1, rounds=2, initial_sparsity=0.2)
    kept, total = parameter_counts(model, schedule)
    pruner = Pruner(model, schedule)
    fewest = total
    for _ in range(schedule.iterations):
        pruned = sum(int((~mask).sum()) for mask in pruner.masks.values())
        fewest = min(fewest, total - pruned)
        pruner.step()
    assert (kept, total) == (fewest, sum(p.numel() for p in model.parameters()))
    assert parameter_counts(nn.Linear(3, 2), Schedule((Segment(5),))) == (8, 8)
    never = DSDSchedule(0.5, pretrain=2, prune=0, retrain=2)
    assert parameter_counts(nn.Linear(3, 2), never) == (8, 8)
    per_layer = DSDSchedule({"0": 0.5, "*": 0.0}, pretrain=1, prune=1, retrain=1)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert parameter_counts(plain, per_layer) == (32, 40)


def test_smoothness_of_a_quadratic():
    """0.5 theta' A theta: H is A's largest eigenvalue, G at most that times the largest norm."""
    torch.manual_seed(0)
    a = torch.diag(torch.tensor([4.0, 1.0, 0.5])).double()
    theta = nn.Parameter(torch.zeros(3).double())
    lipschitz, smoothness = estimate_smoothness(
        lambda: 0.5 * theta @ a @ theta,
        [theta],
        radius=2.0,
        samples=400,
        generator=torch.Generator().manual_seed(0),
    )
    assert 3.8 < smoothness <= 4.0 + 1e-9
    assert 4.0 < lipschitz <= 4.0 * 2.0
    assert (theta == 0).all()
    assert theta.grad is None


@pytest.mark.parametrize("radius", [1.0, 1e-2, 1e-4, 1e-6])
def test_smoothness_in_float32_is_that_of_float64_at_every_radius(radius):
    """Differences of gradients at close points are rounding errors; H is A's largest eigenvalue."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 10, generator=generator, dtype=torch.float64)
    y = 5 + x @ torch.randn(10, generator=generator, dtype=torch.float64)
    largest = float(torch.linalg.eigvalsh(2 * x.T @ x / len(x)).max())

    def estimated(dtype):
        theta = nn.Parameter(torch.linspace(-3, 3, 10, dtype=dtype))
        inputs, targets = x.to(dtype), y.to(dtype)

        def loss():
            return (inputs @ theta - targets).square().mean()

        own = torch.Generator().manual_seed(1)
        return estimate_smoothness(loss, [theta], radius=radius, samples=100, generator=own)[1]

    assert 0.8 * largest < estimated(torch.float32) <= (1 + 1e-3) * largest
    assert 0.8 * largest < estimated(torch.float64) <= (1 + 1e-9) * largest


def test_a_linear_loss_is_perfectly_smooth():
    theta = nn.Parameter(torch.ones(3))
    lipschitz, smoothness = estimate_smoothness(lambda: 2 * theta.sum(), [theta], radius=1e-3)
    assert lipschitz == pytest.approx(2 * math.sqrt(3))
    assert smoothness == 0


def test_kinks_count_between_points_that_lie_apart():
    """The gradient of |theta| jumps by 2 at 0, though its curvature is 0 everywhere else."""
    theta = nn.Parameter(torch.tensor([0.1]))
    _, smoothness = estimate_smoothness(lambda: theta.abs().sum(), [theta], radius=1.0)
    assert smoothness == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: dataclasses.replace(SETTING, tasks=0), "tasks"),
        (lambda: dataclasses.replace(SETTING, loss_bound=0.0), "loss_bound"),
        (lambda: dataclasses.replace(SETTING, lipschitz=math.inf), "lipschitz"),
        (lambda: dataclasses.replace(SETTING, smoothness=-1.0), "smoothness"),
        (lambda: dataclasses.replace(SETTING, radius=math.nan), "radius"),
        (lambda: dataclasses.replace(SETTING, inner_lr=-0.1), "inner_lr"),
        (lambda: dataclasses.replace(SETTING, delta=1.0), "delta"),
        (lambda: sparse_gap_bound(0, 10, SETTING), "kept"),
        (lambda: covering_gap_bound(11, 10, SETTING), "kept"),
        (lambda: dense_gap_bound(0, SETTING), "kept"),
        (lambda: estimate_smoothness(lambda: torch.zeros(()), [], radius=1), "nothing to vary"),
        (lambda: estimate_smoothness(nn.Identity(), [torch.ones(1)], radius=0), "radius"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_loss_that_diverges_is_told_and_the_parameters_stay():
    theta = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="smaller radius"):
        estimate_smoothness(lambda: (theta.sum() * 1e30).exp(), [theta], radius=1.0)
    assert (theta == 1).all()


def test_the_old_name_of_assumptions_works_with_a_warning():
    from l2l_prune.fewshot import theory

    with pytest.warns(
        DeprecationWarning, match=r"theory\.Setting is now called theory\.Assumptions"
    ):
        assert theory.Setting is theory.Assumptions
    with pytest.raises(AttributeError, match="Nobody"):
        _ = theory.Nobody
