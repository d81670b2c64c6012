"""Masks that are drawn anew for each task: by chance, magnitude or any score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from l2l_prune._basics import checks
from l2l_prune.masking.allocation import global_count, global_masks
from l2l_prune.masking.layers import segment_counts
from l2l_prune.masking.patterns import UNSTRUCTURED, Pattern
from l2l_prune.masking.plan import all_true, arranged, checked_scores, named
from l2l_prune.masking.prunable import LayerTensor
from l2l_prune.schedules.schedule import Segment

TaskScores: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]
"""Gets one weight, as the parameter that it is, and a generator on the CPU of this task alone;
gives a real tensor of the weight's shape. The entries with the largest scores stay in the task's
learner. Called without gradients being recorded."""


def uniform(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Any mask is as likely as any other."""
    return torch.rand(weight.shape, generator=generator)


class TaskMasks:
    """How masks of single tasks are drawn, where a schedule asks for them.

    A sparse segment with ``masks="task"`` leaves the model dense and gives each task's learner a
    mask of its own: what it prunes is 0 in that learner and gets no gradient from that task.

    Masks depend on the generator, the meta-iteration, the rank and the task's number in the
    meta-iteration only: ranks of torch.distributed may share a seed, and have different masks.

    Args:
        generator: Source of all chance, on the CPU. Its state is in the pruner's state dict.
        scores: Which weights stay, a :data:`TaskScores`; any as likely as another by default.
        pattern: Where pruned weights may lie in a tensor: anywhere, ``NByM`` or ``Block``.

    Raises:
        TypeError: If an argument has the wrong type, say a seed instead of a generator.

    Examples:
        >>> from l2l_prune import DSDSchedule, Pruner
        >>> net = torch.nn.Linear(4, 2)
        >>> schedule = DSDSchedule(0.5, pretrain=0, prune=1, retrain=1).per_task()
        >>> masks = TaskMasks(torch.Generator().manual_seed(0))
        >>> pruner = Pruner(net, schedule, task_masks=masks)
        >>> with pruner.task_masks():
        ...     print(int((net.weight == 0).sum()))
        4
        >>> int((net.weight == 0).sum())
        0
    """

    def __init__(
        self,
        generator: torch.Generator,
        scores: TaskScores = uniform,
        *,
        pattern: Pattern = UNSTRUCTURED,
    ) -> None:
        self.generator = checks.of_type(
            "generator", generator, torch.Generator, "a torch.Generator"
        )
        if generator.device.type != "cpu":
            raise TypeError(f"generator must be on the CPU, is on {generator.device}")
        if not callable(scores):
            raise TypeError(
                f"scores must be a function of a weight and a generator, got "
                f"{checks.describe(scores)}"
            )
        checks.of_type("pattern", pattern, Pattern, "a Pattern")  # type: ignore[type-abstract]
        self.scores, self.pattern = scores, pattern


class TaskSeeds:
    """Gives each task chance of its own: by meta-iteration, rank and number of the task.

    Args:
        generator: Draws a seed for each meta-iteration.
        group: Ranks that share the tasks of a meta-iteration.

    Attributes:
        tasks: Tasks of this meta-iteration that have begun.
    """

    def __init__(self, generator: torch.Generator, group: dist.ProcessGroup | None) -> None:
        self._generator, self._group = generator, group
        self._seed: int | None = None  # of this meta-iteration, once a task has begun
        self.tasks = 0

    def begin(self, share: float) -> torch.Generator | None:
        """The generator of the next task, or ``None`` if it is not of the share."""
        if self._seed is None:
            self._seed = int(torch.randint(2**62, (), generator=self._generator))
        rank = 0 if self._group is None else dist.get_rank(self._group)
        seed = self._seed + (rank << 20) + self.tasks
        self.tasks += 1
        if share < 1 and Random(seed).random() >= share:
            return None
        return torch.Generator().manual_seed(seed)

    def check_begun(self, iteration: int) -> None:
        """Refuse to end a meta-iteration in which nothing was drawn.

        Raises:
            RuntimeError: Saying what to do.
        """
        if not self.tasks:
            raise RuntimeError(
                f"iteration {iteration} prunes in each task, but no task began: put each task's "
                "learner into a `with pruner.task_masks():` block"
            )

    def end_iteration(self) -> None:
        """The next task is the first of another meta-iteration."""
        self._seed, self.tasks = None, 0

    def state_dict(self) -> dict[str, Any]:
        """Plain values, and the generator's state."""
        return {
            "generator": self._generator.get_state(),
            "seed": self._seed,
            "tasks": self.tasks,
        }

    def check_state(self, state: Any) -> None:
        """Refuse what no :meth:`state_dict` gave.

        Raises:
            ValueError: Saying so.
        """
        try:
            fits = set(state) == {"generator", "seed", "tasks"} and state["tasks"] >= 0
            torch.Generator().set_state(state["generator"].cpu())
            fits &= (state["seed"] is None) == (state["tasks"] == 0)
        except (AttributeError, TypeError, KeyError, RuntimeError):
            fits = False
        if not fits:
            raise ValueError("the checkpoint's task_masks are none of this version")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._generator.set_state(state["generator"].cpu())
        self._seed, self.tasks = state["seed"], state["tasks"]


class TaskDraws:
    """Draws what :class:`TaskMasks` says for the tensors of a Pruner, task after task.

    Args:
        how: Scores, pattern and generator.
        tensors: The selected tensors.
        segments: Of the schedule.
        whole: Rank the scores of all tensors together.
        group: Ranks that share the tasks of a meta-iteration.

    Raises:
        ValueError: If a number or name of the schedule, or the pattern, does not fit the tensors.
    """

    def __init__(
        self,
        how: TaskMasks,
        tensors: Sequence[LayerTensor],
        segments: Sequence[Segment],
        *,
        whole: bool,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._how, self._tensors = how, tensors
        self._whole = whole
        self._counts: list[list[int]] = []  # by segment, empty where no masks are drawn
        for segment in segments:
            if not segment.per_task:
                self._counts.append([])
            elif whole:
                self._counts.append([global_count(tensors, segment)])
            else:
                self._counts.append(segment_counts(tensors, segment, how.pattern))
        self._segments = segments
        self.seeds = TaskSeeds(how.generator, group)

    @torch.no_grad()
    def draw(self, position: int, weights: Sequence[Tensor]) -> list[Tensor] | None:
        """The masks of the next task; True stays.

        Args:
            position: Of the segment, one with masks for each task.
            weights: The weights of the tensors.

        Returns:
            A boolean tensor for each, or ``None`` for a task that stays dense.

        Raises:
            TypeError: If scores are not real numbers.
            ValueError: If scores are not finite or do not fit; the tensor is named.
        """
        generator = self.seeds.begin(self._segments[position].share)
        if generator is None:
            return None
        counts = self._counts[position]
        if self._whole:
            pairs = zip(self._tensors, weights, strict=True)
            scores = [self._scores(tensor, weight, generator) for tensor, weight in pairs]
            masks = global_masks(scores, *counts)
        else:
            masks = [
                self._mask(tensor, weight, keep, generator)
                for tensor, weight, keep in zip(self._tensors, weights, counts, strict=True)
            ]
        return [mask.to(weight.device) for mask, weight in zip(masks, weights, strict=True)]

    def _mask(
        self, tensor: LayerTensor, weight: Tensor, keep: int, generator: torch.Generator
    ) -> Tensor:
        if keep == weight.numel():
            return all_true(weight)
        scores = self._scores(tensor, weight, generator)
        with named(tensor, "for a task"):
            return arranged(tensor, scores, keep, self._how.pattern)

    def _scores(self, tensor: LayerTensor, weight: Tensor, generator: torch.Generator) -> Tensor:
        with named(tensor, "for a task"):
            return checked_scores(self._how.scores(weight, generator), weight)
