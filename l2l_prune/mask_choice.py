"""Which weights stay when a mask is due: scores of a criterion, ranked by layer or over all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from l2l_prune.allocation import global_masks
from l2l_prune.criteria import Criterion
from l2l_prune.masks import check_finite
from l2l_prune.patterns import Pattern
from l2l_prune.prunable import LayerTensor


def choose_masks(
    tensors: Sequence[LayerTensor],
    weights: Sequence[Tensor],
    counts: Sequence[int],
    criterion: Criterion,
    pattern: Pattern | None,
    when: str,
) -> list[Tensor]:
    """A mask for each tensor.

    Args:
        tensors: The selected tensors, for their names.
        weights: Their weights.
        counts: How many of each stay; without ``pattern`` the one number that all keep together.
        criterion: Gives the scores.
        pattern: Where pruned weights may lie in each tensor, or ``None``: one ranking of all.
        when: The time in words, for errors.

    Returns:
        A boolean tensor for each; True stays.

    Raises:
        TypeError: If scores are not real numbers.
        ValueError: If weights or scores are not finite, or scores do not fit; the tensor is named.
    """
    for tensor, weight in zip(tensors, weights, strict=True):
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"cannot prune {tensor.full_name} {when}: the weights hold NaN or infinity, the "
                "training has diverged before (lower the learning rate, clip gradients)"
            )
    if sum(counts) == sum(weight.numel() for weight in weights):  # dense: nothing to choose
        return [_all_true(weight) for weight in weights]
    if pattern is None:
        scores = []
        for tensor, weight in zip(tensors, weights, strict=True):
            with _named(tensor, when):
                scores.append(_scores(criterion, weight))
                check_finite(scores[-1])
        return global_masks(scores, *counts)
    masks = []
    for tensor, weight, keep in zip(tensors, weights, counts, strict=True):
        with _named(tensor, when):
            dense = keep == weight.numel()
            masks.append(
                _all_true(weight) if dense else pattern.mask(_scores(criterion, weight), keep)
            )
    return masks


@contextmanager
def _named(tensor: LayerTensor, when: str) -> Iterator[None]:
    """Errors within tell whose scores they are about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        place = f"cannot prune {tensor.full_name} {when}"
        raise type(error)(f"{place} by the scores of criterion: {error}") from None


def _scores(criterion: Criterion, weight: Tensor) -> Tensor:
    scores = criterion(weight)
    if not isinstance(scores, Tensor) or scores.shape != weight.shape:
        raise ValueError("it must give a score for each of its weights")
    if scores.dtype == torch.bool or scores.is_complex():
        raise TypeError(f"it must give real numbers as scores, got {scores.dtype}")
    return scores


def _all_true(weight: Tensor) -> Tensor:
    return torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
