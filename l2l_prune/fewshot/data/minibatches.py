"""Inner-loop minibatches of a few-shot task."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from l2l_prune._basics import checks
from l2l_prune._basics.generators import drawn_by


def minibatches(
    x: Tensor, y: Tensor, *, batch_size: int, steps: int, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw ``steps`` minibatches from one task, as Reptile's authors do.

    The examples are shuffled and dealt out in batches, then shuffled again for the next pass; a
    batch may span two passes, and no example is used twice within a pass.

    Args:
        x: Examples ``[n, ...]``.
        y: Labels ``[n]``.
        batch_size: Examples in a minibatch, >= 1; may exceed ``n``.
        steps: Number of minibatches, >= 0.
        generator: Source of the shuffles; torch's global one by default.

    Yields:
        ``(x, y)`` of ``batch_size`` examples.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If there are no examples, lengths differ, or a number is out of range.

    Examples:
        >>> x, y = torch.arange(3.0), torch.arange(3)
        >>> [len(batch) for batch, _ in minibatches(x, y, batch_size=2, steps=3)]
        [2, 2, 2]
    """
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(
            f"x and y must hold equally many examples, at least one, got {len(x)} and {len(y)}"
        )
    checks.whole_number("batch_size", batch_size, least=1)
    checks.whole_number("steps", steps)
    passes = -(-batch_size * steps // len(x))
    order = [torch.randperm(len(x), **drawn_by(generator)) for _ in range(passes)]
    if order:
        dealt = torch.cat(order)[: batch_size * steps].to(x.device)
        for batch in dealt.view(steps, batch_size):
            yield x[batch], y[batch]
