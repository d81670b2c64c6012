"""The mask of one tensor from its scores, and errors that name the tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from l2l_prune.masking.patterns import UNSTRUCTURED, Pattern
from l2l_prune.masking.prunable import LayerTensor


def arranged(tensor: LayerTensor, scores: Tensor, keep: int, pattern: Pattern) -> Tensor:
    """A tensor's mask that keeps ``keep`` of its weights, where the pattern lets them lie.

    Raises:
        ValueError: If ``scores`` hold NaN or infinity.
    """
    if pattern == UNSTRUCTURED:  # it has no directions; ties follow the weight's own order
        return pattern.mask(scores, keep)
    return tensor.swapped(pattern.mask(tensor.swapped(scores), keep))


def check_weight(tensor: LayerTensor, weight: Tensor, when: str) -> None:
    """Refuse to prune a weight that holds NaN or infinity.

    Raises:
        ValueError: Naming the tensor; ``when`` says at which moment.
    """
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(
            f"cannot prune {tensor.full_name} {when}: the weights hold NaN or infinity, so "
            "training has diverged (lower the learning rate or clip gradients)"
        )


@contextmanager
def named(tensor: LayerTensor, when: str) -> Iterator[None]:
    """Make errors within the block name the tensor whose scores they are about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        place = f"cannot prune {tensor.full_name} {when}"
        raise type(error)(f"{place} by the criterion: {error}") from None


def all_true(weight: Tensor) -> Tensor:
    """A mask that prunes nothing."""
    return torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
