"""Schedules from other work: one-shot, sparse from the start, cubic, cyclic, iterative."""

from __future__ import annotations

from l2l_prune._basics.checks import fraction, whole_number
from l2l_prune.schedules.schedule import Schedule, Segment


def one_shot(sparsity: float, *, pretrain: int, prune: int) -> Schedule:
    """Prune once, and stay sparse to the end.

    Args:
        sparsity: Fraction of each selected tensor to prune, in [0, 1).
        pretrain: Dense meta-iterations, >= 0.
        prune: Sparse meta-iterations, >= 0.

    Raises:
        TypeError: If a number of iterations is not an integer.
        ValueError: If a value is out of range, or there are no iterations at all.

    Examples:
        >>> [s.label for s in one_shot(0.5, pretrain=2, prune=3).segments]
        ['pretrain', 'prune']
    """
    return Schedule(
        (
            Segment(pretrain, phase="pretrain"),
            Segment(prune, sparse=True, sparsity=sparsity, phase="prune"),
        )
    )


def sparse_from_start(sparsity: float, iterations: int) -> Schedule:
    """Sparse training: no dense phase at all (SET, RigL, static random masks).

    With ``criterion=l2l_prune.masking.random(generator)`` (``--criterion random`` in the command)
    the first masks are drawn at random. A :class:`~l2l_prune.Regrowth` then moves connections to
    where gradients ask for them; without one, they stay where they are (static sparse training).

    In this project's study (Reptile on glyphs, conv4 with 64 channels, eight seeds and splits) RigL
    at 90% came within 2 points of the dense network and was 9.3 points better than a dense one of
    its size; static masks and SET were no better than that one.

    Args:
        sparsity: Fraction of each selected tensor to prune, in [0, 1).
        iterations: Meta-iterations, >= 1.

    Raises:
        TypeError: If ``iterations`` is not an integer.
        ValueError: If a value is out of range.

    Examples:
        >>> sparse_from_start(0.9, 3000).segments[-1].sparsity
        0.9
    """
    return one_shot(sparsity, pretrain=0, prune=whole_number("iterations", iterations, least=1))


def cubic(
    sparsity: float,
    *,
    pretrain: int,
    steps: int,
    interval: int,
    hold: int,
    initial_sparsity: float = 0.0,
) -> Schedule:
    """Let sparsity grow fast at first and slowly at the end.

    After ``k`` of ``steps`` intervals it is
    ``sparsity + (initial_sparsity - sparsity) * (1 - k / steps) ** 3``.

    Args:
        sparsity: Fraction that is pruned at the end, in [0, 1).
        pretrain: Dense meta-iterations before the ramp, >= 0.
        steps: Number of intervals, >= 1.
        interval: Meta-iterations of each, >= 1.
        hold: Meta-iterations at the final sparsity, >= 0.
        initial_sparsity: Sparsity of the first interval, in [0, ``sparsity``].

    Raises:
        TypeError: If a number of iterations is not an integer.
        ValueError: If a value is out of range.

    Examples:
        >>> ramp = cubic(0.8, pretrain=10, steps=4, interval=5, hold=20)
        >>> [round(segment.sparsity, 4) for segment in ramp.segments]
        [0.0, 0.0, 0.4625, 0.7, 0.7875, 0.8]

    Source:
        Zhu and Gupta, *To Prune, or Not to Prune*, ICLR 2018 workshop, Equation 1.
    """
    ramp = _ramp(sparsity, steps, interval, hold, initial_sparsity)
    return Schedule((Segment(pretrain, phase="pretrain"), *ramp))


def cyclic(
    sparsity: float,
    *,
    pretrain: int,
    cycles: int,
    steps: int,
    interval: int,
    hold: int,
    initial_sparsity: float = 0.0,
) -> Schedule:
    """Repeat the ramp of :func:`cubic`, so that weights pruned too early can come back.

    Args:
        sparsity: Fraction that is pruned at the end of each cycle, in [0, 1).
        pretrain: Dense meta-iterations before the first, >= 0.
        cycles: Number of ramps, >= 1.
        steps: Intervals of a ramp, >= 1.
        interval: Meta-iterations of each, >= 1.
        hold: Meta-iterations at the full sparsity in each cycle, >= 0.
        initial_sparsity: Sparsity at the start of each cycle, in [0, ``sparsity``].

    Raises:
        TypeError: If a number of iterations is not an integer.
        ValueError: If a value is out of range.

    Source:
        Srinivas et al., *Cyclical Pruning for Sparse Neural Networks*, CVPR 2022 workshop,
        Section 3.
    """
    segments = [Segment(pretrain, phase="pretrain")]
    for cycle in range(1, whole_number("cycles", cycles, least=1) + 1):
        segments += _ramp(sparsity, steps, interval, hold, initial_sparsity, cycle)
    return Schedule(tuple(segments))


def _ramp(
    sparsity: float, steps: int, interval: int, hold: int, initial: float, cycle: int = 0
) -> list[Segment]:
    last, first = fraction("sparsity", sparsity), fraction("initial_sparsity", initial)
    if first > last:
        raise ValueError(f"initial_sparsity={first} is more than sparsity={last}")
    whole_number("steps", steps, least=1)
    whole_number("interval", interval, least=1)
    rates = [last + (first - last) * (1 - k / steps) ** 3 for k in range(steps)]
    lengths = [*[interval] * steps, hold]
    return [
        Segment(length, sparse=rate > 0, sparsity=rate, phase="prune", round=cycle)
        for rate, length in zip([*rates, last], lengths, strict=True)
    ]


def metasparse(
    sparsity: float = 0.95,
    *,
    pretrain: int = 150_000,
    interval: int = 30_000,
    amount: float = 0.2,
) -> Schedule:
    """Prune a fraction of what is left in each round, without rewinding, as Meta-SparseINR does.

    After ``r`` rounds, a fraction ``1 - (1 - amount) ** r`` is pruned; the round in which that
    would reach ``sparsity`` is the last, and prunes exactly ``sparsity``. The authors' program
    ranks the weights of all layers together: ``Pruner(..., allocation="global")``.

    Args:
        sparsity: Fraction that is pruned at the end, in [0, 1).
        pretrain: Dense meta-iterations before the first round, >= 0.
        interval: Meta-iterations of each round, >= 1.
        amount: Fraction of the remaining weights that a round prunes, in (0, 1).

    Raises:
        TypeError: If a number has the wrong type.
        ValueError: If a value is out of range.

    Examples:
        >>> [round(s.sparsity, 3) for s in metasparse(0.7, pretrain=5, interval=2).segments]
        [0.0, 0.2, 0.36, 0.488, 0.59, 0.672, 0.7]

    Source:
        Lee et al., *Meta-Learning Sparse Implicit Neural Representations*, NeurIPS 2021; the
        numbers of iterations are those of the authors' program.
    """
    last, kept = fraction("sparsity", sparsity), 1 - fraction("amount", amount)
    if kept == 1:
        raise ValueError("amount must be in (0, 1), got 0: no round would prune anything")
    whole_number("interval", interval, least=1)
    segments, rate, number = [Segment(pretrain, phase="pretrain")], 0.0, 0
    while rate < last:
        number += 1
        # Without the tolerance, a last round might only make up for rounding errors.
        reached = 1 - kept**number
        rate = last if reached > last - 1e-9 else reached
        segments.append(Segment(interval, sparse=True, sparsity=rate, phase="prune", round=number))
    return Schedule(tuple(segments))
