"""Which weights stay when a mask is due, and how many: ranked by layer or all together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import Tensor

from l2l_prune._basics import ranks
from l2l_prune._basics.checks import describe, of_type, one_of
from l2l_prune.masking.allocation import ALLOCATIONS, Allocation, global_masks, kept_counts
from l2l_prune.masking.criteria import Criterion, scores_of
from l2l_prune.masking.one_mask import all_true, arranged, check_weight, named
from l2l_prune.masking.patterns import UNSTRUCTURED, Pattern
from l2l_prune.masking.prunable import LayerTensor
from l2l_prune.masking.topk import check_finite
from l2l_prune.schedules.schedule import Schedule, Segment


class MaskChoice:
    """How many weights stay in each segment of a schedule, and which of them.

    Args:
        tensors: The selected tensors.
        schedule: When to prune, and how much; segments without a mask of their own are dense here.
        criterion: Gives the scores.
        pattern: Where pruned weights may lie in each tensor.
        allocation: How pruning is shared among the tensors.
        group: Ranks whose scores are added up, so that all choose the same.

    Raises:
        TypeError: If ``criterion`` or ``pattern`` is something else.
        ValueError: If a number or name of the schedule does not fit the tensors, or
            ``allocation`` is unknown or cannot be combined with the pattern.
    """

    def __init__(
        self,
        tensors: Sequence[LayerTensor],
        schedule: Schedule,
        criterion: Criterion,
        pattern: Pattern,
        allocation: Allocation,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if not callable(criterion) or isinstance(criterion, type):
            raise TypeError(
                "criterion must be a function of a weight (l2l_prune.masking.magnitude, or a "
                f"Movement(...) that was made), got {describe(criterion)}"
            )
        of_type("pattern", pattern, Pattern, "a Pattern")  # type: ignore[type-abstract]
        one_of("allocation", allocation, ALLOCATIONS)
        self._global = allocation == "global"
        if self._global and pattern != UNSTRUCTURED:
            raise ValueError(
                'allocation="global" cannot be combined with pattern, which counts layer by layer'
            )
        self._group = group
        self._tensors, self._criterion, self._pattern = tensors, criterion, pattern
        self._counts = [  # by segment: what each tensor keeps, or what all keep together
            kept_counts(tensors, s if s.held else Segment(s.iterations), allocation, pattern)
            for s in schedule.segments
        ]

    @property
    def by_tensor(self) -> bool:
        """Whether any mask with the right count per tensor is allowed: no pattern, not global."""
        return not self._global and self._pattern == UNSTRUCTURED

    def kept(self, position: int) -> int:
        """How many weights all tensors together keep in the segment at ``position``."""
        return sum(self._counts[position])

    def check(self, masks: Mapping[str, Tensor], position: int, whose: str) -> None:
        """Refuse masks, by dense name in the tensors' order, that keep a wrong number of weights.

        Raises:
            ValueError: Naming the first that does not fit; ``whose`` says whose masks they are.
        """
        kept = {name: int(mask.sum()) for name, mask in masks.items()}
        if self._global:
            kept = {"all tensors": sum(kept.values())}
        for (name, found), keep in zip(kept.items(), self._counts[position], strict=True):
            if found != keep:
                raise ValueError(
                    f"{whose} mask of {name} keeps {found} weights, but the schedule keeps {keep}"
                )

    def masks(self, position: int, weights: Sequence[Tensor], when: str) -> list[Tensor]:
        """A boolean mask for each tensor in the segment at ``position``; True stays.

        Raises:
            TypeError: If scores are not real numbers.
            ValueError: If weights or scores are not finite, or scores do not fit. The message
                names the tensor and says ``when``.
        """
        with ranks.failing_together(self._group, weights[0].device):
            for tensor, weight in zip(self._tensors, weights, strict=True):
                check_weight(tensor, weight, when)
        if self.kept(position) == sum(weight.numel() for weight in weights):  # nothing to choose
            return [all_true(weight) for weight in weights]
        counts, pattern = self._counts[position], self._pattern
        if self._global:
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
            scores = scores_of(weight, self._criterion)
            check_finite(scores)
        return ranks.total(scores, self._group)
