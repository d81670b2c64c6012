"""The paper's generalization bounds as numbers (Section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from l2l_prune._basics import checks
from l2l_prune._basics.generators import drawn_by
from l2l_prune._basics.moved import renamed
from l2l_prune.masking.layers import Layers, Rule, segment_counts, select
from l2l_prune.schedules.schedule import Schedule, Segment


@dataclass(frozen=True)
class Assumptions:
    """What the bounds assume of the meta-learning problem.

    Args:
        tasks: Number ``M`` of independent training tasks, >= 1.
        loss_bound: ``B``: the loss of an example lies in [0, B], B > 0.
        lipschitz: ``G``: Lipschitz constant of the loss in the parameters, > 0.
        smoothness: ``H``: Lipschitz constant of its gradient, >= 0.
        radius: ``R``: bound on the norm of the parameters, > 0.
        inner_lr: ``eta``: learning rate of the one inner step, >= 0.
        delta: The bounds hold with probability at least ``1 - delta``, in (0, 1).

    Raises:
        TypeError: If a value is not a number.
        ValueError: If a number is out of range.
    """

    tasks: int
    loss_bound: float
    lipschitz: float
    smoothness: float
    radius: float
    inner_lr: float
    delta: float = 0.05

    def __post_init__(self) -> None:
        checks.whole_number("tasks", self.tasks, least=1)
        for name in ("loss_bound", "lipschitz", "radius"):
            checks.number(name, getattr(self, name), above=0)
        for name in ("smoothness", "inner_lr"):
            checks.number(name, getattr(self, name))
        if not 0 < checks.number("delta", self.delta, above=0) < 1:
            raise ValueError(f"delta must be in (0, 1), got {self.delta}")

    @property
    def meta_lipschitz(self) -> float:
        """``G (1 + eta H)``: Lipschitz constant of the query loss after one inner step."""
        return self.lipschitz * (1 + self.inner_lr * self.smoothness)


def __getattr__(name: str) -> Any:
    if name == "Setting":
        return renamed("theory.Setting", Assumptions, "theory.Assumptions", None)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def sparse_gap_bound(
    kept: int, total: int, assumptions: Assumptions, constant: float = 1.0
) -> float:
    """Theorem 1: bound on the gap between training and population risk of sparse networks.

    ``constant * B sqrt((k log(p sqrt(M) G R (1 + eta H) / (B k)) + log(1 / delta)) / M)``, for all
    parameters with at most ``k`` non-zero entries. The paper states only the order; the constant is
    yours to choose.

    Args:
        kept: ``k``, in 1 .. ``total``.
        total: ``p``, the number of parameters.
        assumptions: What is assumed of the problem.
        constant: Factor in front, > 0.

    Returns:
        The bound, in units of the loss. A negative logarithm, for which the theorem says nothing,
        counts as 0.

    Raises:
        TypeError: If a value is not a number.
        ValueError: If a number is out of range.
    """
    _check_counts(kept, total)
    checks.number("constant", constant, above=0)
    s = assumptions
    ratio = total * math.sqrt(s.tasks) * s.radius * s.meta_lipschitz / (s.loss_bound * kept)
    entropy = kept * max(0.0, math.log(ratio))
    return constant * s.loss_bound * math.sqrt((entropy - math.log(s.delta)) / s.tasks)


def margin_risk_bound(
    training_risk: float, kept: int, total: int, assumptions: Assumptions, constant: float = 1.0
) -> float:
    """Corollary 1: bound on the population error from the training risk of a margin loss.

    Args:
        training_risk: Mean margin loss over the training tasks, >= 0.
        kept: As in :func:`sparse_gap_bound`, like the others.
        total: See ``kept``.
        assumptions: See ``kept``.
        constant: See ``kept``.
    """
    checks.number("training_risk", training_risk)
    return training_risk + sparse_gap_bound(kept, total, assumptions, constant)


def dense_gap_bound(total: int, assumptions: Assumptions, constant: float = 1.0) -> float:
    """Lemma 1: the bound ``constant * B sqrt(p / M)`` for dense networks, for comparison.

    Args:
        total: ``p``, the number of parameters, >= 1.
        assumptions: What is assumed of the problem.
        constant: Factor in front, > 0.
    """
    _check_counts(total, total)
    checks.number("constant", constant, above=0)
    return constant * assumptions.loss_bound * math.sqrt(total / assumptions.tasks)


def covering_gap_bound(kept: int, total: int, assumptions: Assumptions) -> float:
    """Theorem 1 with every constant, by a covering argument; valid without further constants.

    Each choice of ``k`` entries spans a ball of radius ``R`` that ``(3R / e)^k`` points cover
    within ``e <= R``, and there are at most ``(exp(1) p / k)^k`` choices. Hoeffding's inequality at
    every point of the net, and the Lipschitz constant ``L = G (1 + eta H)`` between points, give

    ``B sqrt((k log(3 exp(1) p R / (e k)) + log(2 / delta)) / (2 M)) + 2 L e``,

    taken at ``e = min(R, B sqrt(k / M) / (2 L))``.

    Args:
        kept: ``k``, in 1 .. ``total``.
        total: ``p``, the number of parameters.
        assumptions: What is assumed of the problem.
    """
    _check_counts(kept, total)
    s = assumptions
    mesh = min(s.radius, s.loss_bound * math.sqrt(kept / s.tasks) / (2 * s.meta_lipschitz))
    entropy = kept * math.log(3 * math.e * total * s.radius / (mesh * kept))
    spread = math.sqrt((entropy + math.log(2 / s.delta)) / (2 * s.tasks))
    return s.loss_bound * spread + 2 * s.meta_lipschitz * mesh


def parameter_counts(
    model: nn.Module,
    schedule: Schedule,
    *,
    layers: Layers = "all",
    only: Rule | Iterable[Rule] | None = None,
    skip: Rule | Iterable[Rule] | None = None,
) -> tuple[int, int]:
    """``(k, p)`` of a model in the sparsest segment of a schedule.

    Parameters that are not pruned (biases, normalisation, layers left out) count as kept.

    Args:
        model: A network without masks.
        schedule: The schedule; one without sparse segments gives ``(p, p)``.
        layers: As in :class:`~l2l_prune.Pruner`, like ``only`` and ``skip``.
        only: See ``layers``.
        skip: See ``layers``.

    Examples:
        >>> from l2l_prune import DSDSchedule
        >>> parameter_counts(nn.Linear(10, 2), DSDSchedule(0.5, pretrain=1, prune=1, retrain=1))
        (12, 22)
    """
    checks.of_type("model", model, nn.Module, "a torch.nn.Module")
    checks.of_type("schedule", schedule, Schedule, "a Schedule")
    total = sum(p.numel() for p in model.parameters())
    tensors = select(model, layers=layers, only=only, skip=skip)
    full = sum(segment_counts(tensors, Segment(1)))
    segments = [segment for segment in schedule.segments if segment.iterations]
    kept = min(sum(segment_counts(tensors, segment)) for segment in segments)
    return total - full + kept, total


def estimate_smoothness(
    loss: Callable[[], Tensor],
    parameters: Iterable[Tensor],
    *,
    radius: float,
    samples: int = 20,
    generator: torch.Generator | None = None,
) -> tuple[float, float]:
    """Estimates G and H around the current parameters, by sampling.

    Gradients are taken at random points within ``radius``; G is their largest norm. H is the
    largest of two quantities, each from half of the samples: the curvature ``|∇²loss v|`` at such a
    point in a random direction ``v`` of norm 1, and the ratio of the gradient's change to the
    parameters' change between two distant points, so that kinks count. Where the gradient's change
    could be due to rounding, the curvature is taken instead. Both results are lower bounds of the
    true constants. The parameters are restored.

    The loss must be twice differentiable by autograd.

    Args:
        loss: Computes the loss from the parameters, which are changed in place.
        parameters: The tensors to vary; they must require gradients.
        radius: Largest distance from the current parameters, > 0.
        samples: Number of curvatures and pairs of points, >= 1.
        generator: Source of the points.

    Returns:
        ``(G, H)``.

    Raises:
        TypeError: If ``loss`` does not return a tensor, or a value is not a number.
        ValueError: If a number is out of range, or the loss is not finite somewhere or does not
            depend on the parameters.
    """
    tensors = list(parameters)
    if not tensors:
        raise ValueError("parameters is empty: there is nothing to vary")
    checks.number("radius", radius, above=0)
    checks.whole_number("samples", samples, least=1)
    sizes = [tensor.numel() for tensor in tensors]
    start = torch.cat([tensor.detach().flatten() for tensor in tensors])

    @torch.no_grad()
    def move(point: Tensor) -> None:
        for tensor, part in zip(tensors, torch.split(point, sizes), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def gradient(point: Tensor, create_graph: bool = False) -> Tensor:
        move(point)
        value = checks.of_type("loss's result", loss(), Tensor, "a tensor")
        if not bool(value.isfinite()):
            raise ValueError(f"the loss is not finite within radius {radius}: use a smaller radius")
        parts: tuple[Tensor | None, ...] = (None,)
        if value.requires_grad:
            parts = torch.autograd.grad(
                value, tensors, create_graph=create_graph, allow_unused=True
            )
        if any(part is None for part in parts):
            raise ValueError("the loss does not depend on all of the given parameters")
        return torch.cat([part.flatten() for part in parts if part is not None])

    def curvature(point: Tensor, direction: Tensor) -> float:
        slope = gradient(point, create_graph=True) @ direction
        if not slope.requires_grad:  # a linear loss
            return 0.0
        parts = torch.autograd.grad(slope, tensors, allow_unused=True)
        return math.hypot(*(float(part.norm()) for part in parts if part is not None))

    drawn: Any = {} if generator is None else drawn_by(generator)

    def step(length: float) -> Tensor:
        direction = torch.randn(start.shape, **drawn, dtype=start.dtype)
        moved: Tensor = length * direction / direction.norm()
        return moved.to(start.device)

    resolved = math.sqrt(torch.finfo(start.dtype).eps)
    lipschitz = smoothness = 0.0
    try:
        for number in range(samples):
            a = start + step(float(torch.rand(1, **drawn)) * radius / 2)
            direction = step(1.0)
            b = a + radius / 2 * direction
            ga, gb = gradient(a), gradient(b)
            lipschitz = max(lipschitz, float(ga.norm()), float(gb.norm()))
            moved, change = float((a - b).norm()), float((ga - gb).norm())
            told_apart = moved > resolved * float(a.norm())
            if number % 2 and told_apart and change > resolved * float(ga.norm() + gb.norm()):
                smoothness = max(smoothness, change / moved)
            else:
                smoothness = max(smoothness, curvature(a, direction))
    finally:
        move(start)
    return lipschitz, smoothness


def _check_counts(kept: int, total: int) -> None:
    checks.whole_number("total", total)
    checks.whole_number("kept", kept)
    if not 1 <= kept <= total:
        raise ValueError(f"kept must be in 1 .. total = {total}, got {kept}")
