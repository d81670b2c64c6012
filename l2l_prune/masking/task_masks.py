"""Masks that are drawn anew for each task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from l2l_prune._basics import checks
from l2l_prune._basics.generators import check_generator, drawn_by
from l2l_prune.masking.allocation import Allocation, global_masks, kept_counts
from l2l_prune.masking.attached import HeldMasks
from l2l_prune.masking.criteria import scores_of
from l2l_prune.masking.masked_layer import lend_mask, return_mask
from l2l_prune.masking.one_mask import all_true, arranged, named
from l2l_prune.masking.patterns import UNSTRUCTURED, Pattern
from l2l_prune.masking.prunable import LayerTensor
from l2l_prune.masking.task_scores import TaskScores, uniform
from l2l_prune.schedules.schedule import Schedule


class TaskMasks:
    """How masks for single tasks are drawn, if a schedule asks for them.

    A sparse segment with ``masks="task"`` leaves the model dense and gives each task's learner a
    mask of its own: what it prunes is 0 in that learner and gets no gradient from that task.

    ``with pruner.task_masks():`` is one task. The model has its masks within the block; clones,
    copies and functional copies that are made in it keep them for good, so that several may live
    at once. Stored weights stay as they are. Learners that share the model's own modules (CAVIA's,
    say), and models that are called directly (ProtoNet), are masked within the block only: let it
    span the task's losses. In other segments nothing is drawn, so one loop serves them all. Leave
    the block before the outer step, and use no block in evaluation, which then has no masks.

    Masks depend only on the generator, the meta-iteration, the rank and the task's number in the
    meta-iteration: ranks of torch.distributed may share a seed and still get different masks.

    Args:
        generator: Source of all randomness, on the CPU. The pruner's state dict holds its state.
        scores: Which weights stay: all equally likely by default, or
            :func:`~l2l_prune.masking.task_scores.magnitude`,
            :class:`~l2l_prune.masking.task_scores.Catfish`, or a function of your own
            (:data:`~l2l_prune.masking.task_scores.TaskScores`).
        pattern: Where pruned weights may lie in a tensor: anywhere, ``NByM``, ``Block``
            or ``Rows``.

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
        self.generator = check_generator(generator)
        if not callable(scores):
            raise TypeError(
                f"scores must be a function of a weight and a generator, got "
                f"{checks.describe(scores)}"
            )
        checks.of_type("pattern", pattern, Pattern, "a Pattern")  # type: ignore[type-abstract]
        self.scores, self.pattern = scores, pattern


class TaskSeeds:
    """Gives each task randomness of its own, by meta-iteration, rank and number of the task.

    Args:
        generator: Draws a seed for each meta-iteration.
        group: Ranks that share the tasks of a meta-iteration.

    Attributes:
        tasks: How many tasks of this meta-iteration have begun.
    """

    def __init__(self, generator: torch.Generator, group: dist.ProcessGroup | None) -> None:
        self._generator, self._group = generator, group
        self._seed: int | None = None  # of this meta-iteration, once a task has begun
        self.tasks = 0

    def begin(self, share: float) -> torch.Generator | None:
        """The next task's generator, or ``None`` if the task is not in the share that is masked."""
        if self._seed is None:
            self._seed = int(torch.randint(2**62, (), **drawn_by(self._generator)))
        rank = 0 if self._group is None else dist.get_rank(self._group)
        seed = self._seed + (rank << 20) + self.tasks
        self.tasks += 1
        if share < 1 and Random(seed).random() >= share:
            return None
        return torch.Generator().manual_seed(seed)

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
        """Refuse a state that does not come from :meth:`state_dict`.

        Raises:
            ValueError: If it does not.
        """
        try:
            fits = set(state) == {"generator", "seed", "tasks"} and state["tasks"] >= 0
            torch.Generator().set_state(state["generator"].cpu())
            fits &= (state["seed"] is None) == (state["tasks"] == 0)
        except (AttributeError, TypeError, KeyError, RuntimeError):
            fits = False
        if not fits:
            raise ValueError("the checkpoint's task_masks do not fit this version")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._generator.set_state(state["generator"].cpu())
        self._seed, self.tasks = state["seed"], state["tasks"]


class TaskDraws:
    """What tasks draw by a schedule: how, whether a task is running, and what a checkpoint holds.

    Args:
        how: ``None`` if no segment has masks for each task.
        schedule: When to prune, and how much.
        group: Ranks that share the tasks of a meta-iteration.

    Attributes:
        inside: Whether a task is running.

    Raises:
        TypeError: If ``how`` is something else.
        ValueError: If the schedule asks for masks that nobody said how to draw.
    """

    _begins = "run each task within a `with pruner.task_masks():` block"

    def __init__(
        self, how: TaskMasks | None, schedule: Schedule, group: dist.ProcessGroup | None
    ) -> None:
        self.inside = False
        self._begun = False  # whether a task of this meta-iteration has
        self._how, self._segments = how, schedule.segments
        if how is not None:
            checks.of_type("task_masks", how, TaskMasks, "a TaskMasks")
            self._seeds = TaskSeeds(how.generator, group)
        elif any(segment.per_task for segment in schedule.segments):
            raise ValueError(
                "the schedule draws masks for each task: say how, with "
                "task_masks=TaskMasks(generator)"
            )

    def check_outside(self) -> None:
        """Refuse, while a task is running, what would act on its masks instead of the model's.

        Raises:
            RuntimeError: Saying what to do.
        """
        if self.inside:
            raise RuntimeError("this cannot be done within task_masks(): leave that block first")

    def check_begun(self, position: int, iteration: int) -> None:
        """Refuse to end a meta-iteration that should have drawn masks but has not.

        Raises:
            RuntimeError: Saying what to do.
        """
        if self._segments[position].per_task and not self._begun:
            raise RuntimeError(
                f"iteration {iteration} prunes in each task, but no task began: {self._begins}"
            )

    def end_iteration(self) -> None:
        """The next task is the first of another meta-iteration."""
        self._begun = False
        if self._how is not None:
            self._seeds.end_iteration()

    def state_dict(self) -> dict[str, Any]:
        """An entry for the pruner's state; empty if nothing is drawn."""
        if self._how is None:
            return {}
        return {"task_masks": {**self._seeds.state_dict(), "begun": self._begun}}

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse a pruner's state whose entry does not fit.

        Raises:
            ValueError: If it does not.
        """
        if self._how is not None:
            self._seeds.check_state(_without_begun(state["task_masks"]))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a pruner's state."""
        if self._how is not None:
            self._seeds.load_state_dict(state["task_masks"])
            self._begun = bool(state["task_masks"].get("begun", self._seeds.tasks))


def _without_begun(entry: Any) -> Any:
    """The part of an entry that belongs to :class:`TaskSeeds`; older versions saved no more."""
    if not isinstance(entry, dict):
        return entry
    return {key: value for key, value in entry.items() if key != "begun"}


class TaskBlocks(TaskDraws):
    """The tasks of a Pruner, one after the other: each task's masks, and whether one is running.

    Args:
        how: Scores, pattern and generator; ``None`` if no segment has masks for each task.
        model: What is pruned.
        tensors: The selected tensors.
        schedule: When to prune, and how much.
        allocation: How pruning is shared among the tensors.
        group: Ranks that share the tasks of a meta-iteration.

    Attributes:
        lent: The masks of the task that is running, or ``None`` if it is not pruned.

    Raises:
        TypeError: If ``how`` is something else.
        ValueError: If a number or name of the schedule, or the pattern, does not fit the tensors,
            the schedule asks for masks that nobody said how to draw, or DistributedDataParallel
            would overwrite them.
    """

    def __init__(
        self,
        how: TaskMasks | None,
        model: nn.Module,
        tensors: Sequence[LayerTensor],
        schedule: Schedule,
        allocation: Allocation,
        group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__(how, schedule, group)
        self._tensors, self._global = tensors, allocation == "global"
        self.lent: list[Tensor] | None = None
        self._drawing: int | None = None  # the segment's place, in a block that has drawn
        if how is None:
            return
        check_broadcasts(model)
        if self._global and how.pattern != UNSTRUCTURED:
            raise ValueError(
                'allocation="global" cannot be combined with a pattern of task_masks, which '
                "counts layer by layer"
            )
        self._counts = [  # by segment; empty if no masks are drawn
            kept_counts(tensors, segment, allocation, how.pattern) if segment.per_task else []
            for segment in schedule.segments
        ]

    @contextmanager
    def block(
        self, position: int, held: HeldMasks, given: list[Tensor] | None
    ) -> Iterator[list[Tensor]]:
        """Run one task, in the segment at ``position``, under drawn or ``given`` masks."""
        drawing = given is None and self._segments[position].per_task
        masks = self._draw(position, held.originals()) if drawing else given
        if masks is not None and self._segments[position].held:  # what the model has pruned stays
            masks = [new & own for new, own in zip(masks, held.values, strict=True)]
        self.inside = self._begun = True
        self.lent, self._drawing = masks, position if drawing else None
        try:
            with nullcontext() if masks is None else _lent(self._tensors, masks):
                yield held.values if masks is None else masks
        finally:
            self.inside, self.lent, self._drawing = False, None, None

    def more(self, tasks: int, weights: Sequence[Tensor]) -> list[list[Tensor] | None]:
        """Masks for more tasks in a block that has drawn masks; in other blocks an empty list."""
        if self._drawing is None:
            return []
        return [self._draw(self._drawing, weights) for _ in range(tasks)]

    @torch.no_grad()
    def _draw(self, position: int, weights: Sequence[Tensor]) -> list[Tensor] | None:
        """A boolean tensor for each weight, or ``None`` for a task that stays dense."""
        assert self._how is not None
        generator = self._seeds.begin(self._segments[position].share)
        if generator is None:
            return None
        counts = self._counts[position]
        pairs = zip(self._tensors, weights, strict=True)
        if self._global:
            return global_masks([self._scores(t, w, generator) for t, w in pairs], *counts)
        return [
            self._mask(tensor, weight, keep, generator)
            for (tensor, weight), keep in zip(pairs, counts, strict=True)
        ]

    def _mask(
        self, tensor: LayerTensor, weight: Tensor, keep: int, generator: torch.Generator
    ) -> Tensor:
        if keep == weight.numel():
            return all_true(weight)
        scores = self._scores(tensor, weight, generator)
        with named(tensor, "for a task"):
            return arranged(tensor, scores, keep, self._how.pattern)  # type: ignore[union-attr]

    def _scores(self, tensor: LayerTensor, weight: Tensor, generator: torch.Generator) -> Tensor:
        how = self._how
        assert how is not None
        with named(tensor, "for a task"):
            return scores_of(weight, lambda w: how.scores(w, generator))


def check_broadcasts(model: nn.Module) -> None:
    """Refuse a DistributedDataParallel that would overwrite the masks of tasks.

    Raises:
        ValueError: Saying what to do.
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) and module.broadcast_buffers:
            raise ValueError(
                "DistributedDataParallel would give all ranks the first rank's task masks: "
                "wrap the model with broadcast_buffers=False"
            )


@contextmanager
def _lent(tensors: Sequence[LayerTensor], masks: Sequence[Tensor]) -> Iterator[None]:
    """Put other masks in place for the block; stored weights keep what those masks prune.

    Clones and functional copies that are made within the block keep these masks.
    """
    with ExitStack() as stack:
        for tensor, mask in zip(tensors, masks, strict=True):
            lend_mask(tensor.module, tensor.name, mask)
            stack.callback(return_mask, tensor.module, tensor.name)
        yield
