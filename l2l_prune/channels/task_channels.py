"""Channels that are drawn anew for each task, so that its learner is physically small."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from l2l_prune import optimizer_state
from l2l_prune.channels.groups import Channels
from l2l_prune.channels.plan import channel_counts
from l2l_prune.channels.surgery import Cut, Surgery
from l2l_prune.masking.patterns import UNSTRUCTURED
from l2l_prune.masking.task_masks import TaskDraws, TaskMasks
from l2l_prune.masking.task_scores import uniform
from l2l_prune.schedules.schedule import Schedule


class TaskChannels(TaskDraws):
    """The tasks of a ChannelPruner, one after the other: each task's channels.

    Args:
        how: Whose generator draws; ``None`` if no segment has channels for each task.
        channels: All channels of the network.
        schedule: When to prune, and how much.
        group: Ranks that share the tasks of a meta-iteration.

    Attributes:
        kept: Which channels the task that is running has; ``None`` if it has all.

    Raises:
        TypeError: If ``how`` is something else.
        ValueError: If it has scores or a pattern, a number or name of the schedule does not fit, or
            the schedule asks for channels that nobody said how to draw.
    """

    _begins = (
        "clone the learners of PrunedReptile within `with reptile.task_masks():`; other loops need "
        'masks="phase"'
    )

    def __init__(
        self,
        how: TaskMasks | None,
        channels: Channels,
        schedule: Schedule,
        group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__(how, schedule, group)
        if how is not None and (how.scores is not uniform or how.pattern != UNSTRUCTURED):
            raise ValueError(
                "channels of single tasks are drawn at random: give task_masks without scores and "
                "pattern"
            )
        self._channels = channels
        self._counts = [
            channel_counts(channels, s) if s.per_task else None for s in schedule.segments
        ]
        self._drawn = False  # whether a learner was cloned in the block
        self._position = 0
        self.kept: Tensor | None = None

    @contextmanager
    def block(self, position: int) -> Iterator[dict[str, Tensor]]:
        """Run one task, in the segment at ``position``; yields which channels it has, by layer.

        There are none before its first learner, so that a loop that clones elsewhere is noticed.
        """
        self.inside, self._drawn, self._position = True, False, position
        self._told: dict[str, Tensor] = {}
        try:
            yield self._told
        finally:
            self.inside, self.kept = False, None

    def draw(self) -> Tensor | None:
        """The channels of the task that is running, all its learners' alike; ``None`` for all."""
        counts = self._counts[self._position]
        if not self.inside or counts is None or self._drawn:
            return self.kept
        self._drawn = self._begun = True
        generator = self._seeds.begin(self._segments[self._position].share)
        if generator is not None:
            self.kept = ~self._channels.all()
            for group, count in zip(self._channels.groups, counts, strict=True):
                order = torch.randperm(group.channels, generator=generator, device="cpu")
                best = group.best(order.tolist(), count)
                self.kept[[group.first + channel for channel in best]] = True
                self._told[group.name] = self.kept[list(group.units)]
        return self.kept


class SmallCopy:
    """A copy of the network, which is small while it runs a task.

    Args:
        copy: In its full shapes.
        channels: All channels of the network.

    Attributes:
        cuts: What stays of each tensor, by name; empty while the copy has its full shapes.
    """

    def __init__(self, copy: nn.Module, channels: Channels) -> None:
        self._copy, self._surgery = copy, Surgery(copy, channels.on(copy))
        self.cuts: dict[str, Cut] = {}
        self._whole: dict[str, Tensor] = {}
        self._states: dict[str, dict[str, Any]] = {}

    def shrink(self, kept: Tensor, optimizer: Optimizer) -> None:
        """Cut the other channels, also from the state of its optimizer."""
        state = optimizer.state
        self.cuts = self._surgery.plan(kept)
        self._states = {name: dict(state.get(cut.get(), {})) for name, cut in self.cuts.items()}
        self._whole = self._surgery.shrink(kept, lambda p: [state[p]] if p in state else [])

    def grow(self, optimizer: Optimizer, others: list[Tensor]) -> list[Tensor]:
        """Give the copy its full shapes: what was cut is as it was before.

        State that is new has the largest second moment there, as after a release.

        Args:
            optimizer: Its optimizer, whose state grows along.
            others: Tensors like the parameters, in their order, or none.

        Returns:
            ``others`` in full shapes; what was cut has the values of the parameters.
        """
        grown = [
            self.cuts[name].put(other, self._whole[name]) if name in self.cuts else other
            for (name, _), other in zip(self._copy.named_parameters(), others, strict=False)
        ]
        for name, cut in self.cuts.items():
            state = optimizer.state.get(cut.get(), {})
            self._grow_state(state, cut, self._whole[name], self._states[name])
        self._surgery.put_back(self.cuts, self._whole)
        self.cuts, self._whole, self._states = {}, {}, {}
        return grown

    @staticmethod
    def _grow_state(state: dict[str, Any], cut: Cut, full: Tensor, before: dict[str, Any]) -> None:
        small = cut.get()
        own = [k for k, v in state.items() if isinstance(v, Tensor) and v.shape == small.shape]
        new = {key: state[key] for key in own if key not in before}
        for key in own:
            value = state[key]
            state[key] = (
                cut.put_into_zeros(value, full) if key in new else cut.put(value, before[key])
            )
        if new:
            there = cut.put_into_zeros(torch.ones_like(small, dtype=torch.bool), full)
            fresh = {key: state[key] for key in new}
            optimizer_state.level_state(fresh, full.shape, there, ~there)
