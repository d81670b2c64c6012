"""Where a pruner is in its schedule."""

from __future__ import annotations

from l2l_prune._basics import checks
from l2l_prune.schedules.schedule import Schedule, Segment


class OnSchedule:
    """What every pruner says of its schedule and its place in it.

    Args:
        schedule: The schedule to follow, from its first iteration on.

    Raises:
        TypeError: If ``schedule`` is no :class:`~l2l_prune.Schedule`.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = checks.instance("schedule", schedule, Schedule, "a Schedule")
        self._iteration = 0
        self._position = schedule.index(0)
        self._finalized = False

    @property
    def iteration(self) -> int:
        """Number of :meth:`step` calls so far."""
        return self._iteration

    @property
    def segment(self) -> Segment:
        """The segment of the schedule that is in force."""
        return self.schedule.segments[self._position]

    @property
    def phase(self) -> str:
        """Its name: ``"pretrain"``, ``"prune"`` or ``"retrain"`` in DSD and IHT."""
        return self.segment.phase

    @property
    def mask_due(self) -> bool:
        """Whether the next :meth:`step` enters another segment."""
        return self.schedule.index(self._iteration + 1) != self._position

    @property
    def finalized(self) -> bool:
        """Whether ``finalize()`` has ended the pruning."""
        return self._finalized

    def _place(self) -> str:
        """The place in words, as the head of a summary."""
        done = f"iteration {self._iteration} of {self.schedule.iterations}"
        return f"{done}, phase {self.segment.label}"
