"""Which weights stay when a mask is due, and how many: ranked by layer, or over all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from l2l_prune._basics import ranks
from l2l_prune.masking.allocation import global_count, global_masks
from l2l_prune.masking.criteria import Criterion
from l2l_prune.masking.layers import segment_counts
from l2l_prune.masking.patterns import UNSTRUCTURED, Pattern
from l2l_prune.masking.prunable import LayerTensor
from l2l_prune.masking.topk import check_finite
from l2l_prune.schedules.schedule import Segment


class MaskChoice:
    """How many weights stay in each of some segments, and which of them.

    Args:
        tensors: The selected tensors.
        segments: How much is pruned, by segment.
        criterion: Gives the scores.
        pattern: Where pruned weights may lie in each tensor, or ``None``: one ranking of all.
        group: Ranks whose scores are added up, so that all choose the same.

    Raises:
        ValueError: If a number or name of a segment does not fit the tensors.
    """

    def __init__(
        self,
        tensors: Sequence[LayerTensor],
        segments: Sequence[Segment],
        criterion: Criterion,
        pattern: Pattern | None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._group = group
        self._tensors, self._criterion, self._pattern = tensors, criterion, pattern
        self._counts = [  # by segment: what each tensor keeps, or what all keep together
            [global_count(tensors, segment)]
            if pattern is None
            else segment_counts(tensors, segment, pattern)
            for segment in segments
        ]

    def kept(self, position: int) -> int:
        """How many weights all tensors together keep in the segment at ``position``."""
        return sum(self._counts[position])

    def check(self, masks: Mapping[str, Tensor], position: int, whose: str) -> None:
        """Refuse masks that keep more or less than the schedule says.

        Args:
            masks: By dense name, in the order of the tensors.
            position: Of the segment.
            whose: For the error.

        Raises:
            ValueError: Naming the first that does not fit.
        """
        kept = {name: int(mask.sum()) for name, mask in masks.items()}
        if self._pattern is None:
            kept = {"all tensors": sum(kept.values())}
        for (name, found), keep in zip(kept.items(), self._counts[position], strict=True):
            if found != keep:
                raise ValueError(
                    f"{whose} mask of {name} keeps {found} weights, but the schedule keeps {keep}"
                )

    def masks(self, position: int, weights: Sequence[Tensor], when: str) -> list[Tensor]:
        """A boolean mask for each tensor; True stays.

        Args:
            position: Of the segment that begins.
            weights: The weights of the tensors.
            when: The time in words, for errors.

        Raises:
            TypeError: If scores are not real numbers.
            ValueError: If weights or scores are not finite, or scores do not fit; the tensor is
                named.
        """
        with ranks.failing_together(self._group, weights[0].device):
            for tensor, weight in zip(self._tensors, weights, strict=True):
                if not bool(torch.isfinite(weight).all()):
                    raise ValueError(
                        f"cannot prune {tensor.full_name} {when}: the weights hold NaN or "
                        "infinity, the training has diverged before (lower the learning rate, "
                        "clip gradients)"
                    )
        if self.kept(position) == sum(weight.numel() for weight in weights):  # nothing to choose
            return [all_true(weight) for weight in weights]
        counts, pattern = self._counts[position], self._pattern
        if pattern is None:
            pairs = zip(self._tensors, weights, strict=True)
            return global_masks([self._scores(t, weight, when) for t, weight in pairs], *counts)
        masks = []
        for tensor, weight, keep in zip(self._tensors, weights, counts, strict=True):
            if keep == weight.numel():
                masks.append(all_true(weight))
                continue
            scores = self._scores(tensor, weight, when)
            with named(tensor, when):
                masks.append(arranged(tensor, scores, keep, pattern))
        return masks

    def _scores(self, tensor: LayerTensor, weight: Tensor, when: str) -> Tensor:
        """Finite scores of a tensor, of all ranks together."""
        with ranks.failing_together(self._group, weight.device), named(tensor, when):
            scores = checked_scores(self._criterion(weight), weight).to(weight.device)
            check_finite(scores)
        return ranks.total(scores, self._group)


def arranged(tensor: LayerTensor, scores: Tensor, keep: int, pattern: Pattern) -> Tensor:
    """The mask of a tensor that keeps ``keep`` of its weights where the pattern lets them be.

    Raises:
        ValueError: If ``scores`` hold NaN or infinity.
    """
    if pattern == UNSTRUCTURED:  # has no directions; ties go by the weight's own order
        return pattern.mask(scores, keep)
    return tensor.swapped(pattern.mask(tensor.swapped(scores), keep))


@contextmanager
def named(tensor: LayerTensor, when: str) -> Iterator[None]:
    """Errors within tell whose scores they are about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        place = f"cannot prune {tensor.full_name} {when}"
        raise type(error)(f"{place} by the scores of criterion: {error}") from None


def checked_scores(scores: object, weight: Tensor) -> Tensor:
    """The scores that a criterion gave, if they are such.

    Raises:
        TypeError: If they are not real numbers.
        ValueError: If there is not one for each entry of ``weight``.
    """
    if not isinstance(scores, Tensor) or scores.shape != weight.shape:
        raise ValueError("it must give a score for each of its weights")
    if scores.dtype == torch.bool or scores.is_complex():
        raise TypeError(f"it must give real numbers as scores, got {scores.dtype}")
    return scores


def all_true(weight: Tensor) -> Tensor:
    """A mask that prunes nothing."""
    return torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
