"""What makes a weight worth keeping: a criterion is one function from a weight to scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from l2l_prune import _values

Criterion: TypeAlias = Callable[[Tensor], Tensor]
"""Gets one weight, as the parameter that it is (with its ``grad``, if any), and returns a real
tensor of the same shape; in each tensor the entries with the largest scores are kept. Called
without gradients being recorded, each time a mask is due."""


def magnitude(weight: Tensor) -> Tensor:
    """The paper's criterion: the absolute value (Section 4.1).

    Raises:
        TypeError: If ``weight`` is complex.
    """
    if weight.is_complex():
        raise TypeError("complex weights have no order by magnitude that pruning could use")
    return weight.detach().abs()


def random(generator: torch.Generator) -> Criterion:
    """Scores without meaning: the control that any other criterion should beat.

    Args:
        generator: Source of the scores, on the CPU; save its state to resume exactly.

    Raises:
        TypeError: If ``generator`` is none, a seed for instance.

    Example:
        >>> scores = random(torch.Generator().manual_seed(0))
        >>> scores(torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """
    _values.instance("generator", generator, torch.Generator, "a torch.Generator")

    def scores(weight: Tensor) -> Tensor:
        return torch.rand(weight.shape, generator=generator).to(weight.device)

    return scores
