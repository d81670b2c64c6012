"""Which weights stay when a mask is due: scores of a criterion, ranked by layer or over all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from l2l_prune.allocation import global_masks
from l2l_prune.criteria import Criterion
from l2l_prune.masks import check_finite
from l2l_prune.patterns import Pattern
from l2l_prune.selection import LayerTensor


def choose_layerwise(
    tensors: Sequence[LayerTensor],
    weights: Sequence[Tensor],
    counts: Sequence[int],
    criterion: Criterion,
    pattern: Pattern,
    when: str,
) -> list[Tensor]:
    """A mask for each tensor with its own count.

    Args:
        tensors: The selected tensors, for their names.
        weights: Their weights.
        counts: How many of each stay.
        criterion: Gives the scores.
        pattern: Where pruned weights may lie.
        when: The time in words, for errors.

    Returns:
        A boolean tensor for each; True stays.

    Raises:
        TypeError: If scores are not real numbers.
        ValueError: If weights or scores are not finite, or scores do not fit; the tensor is named.
    """
    masks = []
    for (tensor, weight), keep in zip(_finite(tensors, weights, when), counts, strict=True):
        if keep == weight.numel():  # dense: nothing to choose
            masks.append(_all_true(weight))
        else:
            scores = _scores(tensor, weight, criterion, when)
            masks.append(pattern.mask(scores, keep))
    return masks


def choose_globally(
    tensors: Sequence[LayerTensor],
    weights: Sequence[Tensor],
    counts: Sequence[int],
    criterion: Criterion,
    pattern: Pattern,
    when: str,
) -> list[Tensor]:
    """The same with one ranking: ``counts`` is what all tensors keep together."""
    (keep,) = counts
    finite = list(_finite(tensors, weights, when))
    if keep == sum(weight.numel() for weight in weights):
        return [_all_true(weight) for weight in weights]
    return global_masks([_scores(t, w, criterion, when) for t, w in finite], keep)


def _finite(
    tensors: Sequence[LayerTensor], weights: Sequence[Tensor], when: str
) -> Iterator[tuple[LayerTensor, Tensor]]:
    for tensor, weight in zip(tensors, weights, strict=True):
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"cannot prune {tensor.full_name} {when}: the weights hold NaN or infinity, the "
                "training has diverged before (lower the learning rate, clip gradients)"
            )
        yield tensor, weight


def _scores(tensor: LayerTensor, weight: Tensor, criterion: Criterion, when: str) -> Tensor:
    try:
        scores = criterion(weight)
        if not isinstance(scores, Tensor) or scores.shape != weight.shape:
            raise ValueError("it must give a score for each of its weights")
        if scores.dtype == torch.bool or scores.is_complex():
            raise TypeError(f"it must give real numbers as scores, got {scores.dtype}")
        check_finite(scores)
    except (TypeError, ValueError) as error:
        place = f"cannot prune {tensor.full_name} {when}"
        raise type(error)(f"{place} by the scores of criterion: {error}") from None
    return scores


def _all_true(weight: Tensor) -> Tensor:
    return torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
