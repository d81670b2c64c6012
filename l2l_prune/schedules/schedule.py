"""A schedule: dense and sparse stretches of meta-iterations, as a frozen value.

It knows nothing about models or tensors, so it can be printed, compared, pickled, scaled and
plotted anywhere; this module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal

from l2l_prune._basics.checks import (
    Counts,
    Sparsity,
    as_lists,
    describe,
    frozen_counts,
    frozen_sparsity,
    number,
    of_type,
    set_field,
    true_or_false,
    whole_number,
)


@dataclass(frozen=True)
class Segment:
    """A stretch of meta-iterations that is wholly dense or wholly sparse.

    Args:
        iterations: Length in meta-iterations, >= 0. An empty segment is skipped.
        sparse: Whether masks are held during the segment.
        masks: ``"phase"``: one mask, in the model itself, for the whole segment. ``"task"``: the
            model stays dense, and each task's learner gets a mask of its own; see
            :class:`~l2l_prune.TaskMasks`. Ignored when dense.
        share: With ``masks="task"``, the share of the tasks that are masked, in (0, 1]; which tasks
            is drawn at random.
        sparsity: Fraction of each selected tensor to prune, in [0, 1), or a mapping from layer
            name or ``fnmatch`` pattern to such a fraction (layers that are not named stay
            dense).
        keep: Explicit counts ``k_l``: layer name or pattern -> number of weights that stay
            (>= 1). Takes precedence over ``sparsity``.
        phase: What the segment is called in reports; ``"dense"`` or ``"sparse"`` by default.
        round: The pruning round (from 1) that the segment belongs to, or 0.

    Raises:
        TypeError: If a value has the wrong type, say a sparsity that is not a number.
        ValueError: If a value is out of range.
    """

    iterations: int
    _: KW_ONLY
    sparse: bool = False
    sparsity: Sparsity = 0.0
    keep: Counts | None = None
    masks: Literal["phase", "task"] = "phase"
    share: float = 1.0
    phase: str = ""
    round: int = 0

    def __post_init__(self) -> None:
        set_field(self, "iterations", whole_number("iterations", self.iterations))
        set_field(self, "sparsity", frozen_sparsity("sparsity", self.sparsity))
        set_field(self, "keep", frozen_counts("keep", self.keep))
        set_field(self, "sparse", true_or_false("sparse", self.sparse))
        set_field(self, "round", whole_number("round", self.round))
        if self.masks not in ("phase", "task"):
            raise ValueError(f'masks must be "phase" or "task", got {self.masks!r}')
        set_field(self, "share", number("share", self.share, above=0))
        if self.share > 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}")
        if self.share < 1 and self.masks == "phase":
            raise ValueError('share needs masks="task"')
        if not self.sparse and (self.sparsity or self.keep):
            raise ValueError("sparsity and keep need sparse=True: a dense segment prunes nothing")
        of_type("phase", self.phase, str, "a string")
        set_field(self, "phase", self.phase or ("sparse" if self.sparse else "dense"))

    @property
    def held(self) -> bool:
        """Whether the model itself is under a mask."""
        return self.sparse and self.masks == "phase"

    @property
    def per_task(self) -> bool:
        """Whether each task's learner is under a mask of its own."""
        return self.sparse and self.masks == "task"

    @property
    def label(self) -> str:
        """The phase with its round, for people: ``"prune 2"``."""
        return f"{self.phase} {self.round}" if self.round else self.phase

    @property
    def sparsity_label(self) -> str:
        """The sparsity for people: ``"30%"``, or ``"per layer"`` for a mapping."""
        if not self.sparse:
            return "-"
        if self.keep is not None or isinstance(self.sparsity, tuple):
            return "per layer"
        return f"{100 * float(self.sparsity):g}%"  # type: ignore[arg-type]


@dataclass(frozen=True)
class Schedule:
    """Any sequence of dense and sparse segments.

    Args:
        segments: The segments in order; at least one must be longer than zero iterations.

    Raises:
        TypeError: If ``segments`` holds something that is not a :class:`Segment`.
        ValueError: If the segments sum to zero iterations.

    Examples:
        >>> schedule = Schedule([Segment(10), Segment(5, sparse=True, sparsity=0.5)])
        >>> schedule.iterations
        15
        >>> schedule.segment(12).sparse
        True
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.segments, Iterable):
            raise TypeError(
                f"segments must be a list of Segment values, got {describe(self.segments)}"
            )
        set_field(self, "segments", tuple(self.segments))
        for segment in self.segments:
            if not isinstance(segment, Segment):
                raise TypeError(f"segments must hold Segment values, got {segment!r}")
        if self.iterations < 1:
            raise ValueError("the schedule is empty: give at least one segment some iterations")

    @property
    def iterations(self) -> int:
        """Total number of meta-iterations."""
        return sum(segment.iterations for segment in self.segments)

    def index(self, iteration: int) -> int:
        """Position in ``segments`` of the segment that holds ``iteration``.

        Args:
            iteration: Meta-iteration, counted from 0. Past the end the last segment goes on.

        Returns:
            An index into :attr:`segments`; empty segments are never returned.

        Raises:
            ValueError: If ``iteration`` is negative.
        """
        iteration = whole_number("iteration", iteration)
        last = 0
        for position, segment in enumerate(self.segments):
            if segment.iterations == 0:
                continue
            last = position
            if iteration < segment.iterations:
                break
            iteration -= segment.iterations
        return last

    def segment(self, iteration: int) -> Segment:
        """The segment that holds ``iteration`` (see :meth:`index`)."""
        return self.segments[self.index(iteration)]

    @property
    def last(self) -> Segment:
        """The segment in which the run ends: the last that is not empty."""
        return self.segment(self.iterations)

    def per_task(self, share: float = 1.0) -> Schedule:
        """The same phases, with masks drawn for each task instead of once per sparse phase.

        Args:
            share: Share of the tasks that are masked, in (0, 1].

        Raises:
            TypeError: If ``share`` is not a number.
            ValueError: If it is out of range.

        Examples:
            >>> dsd = Schedule([Segment(10), Segment(5, sparse=True, sparsity=0.5), Segment(5)])
            >>> [segment.masks for segment in dsd.per_task(0.5).segments if segment.sparse]
            ['task']
        """
        return Schedule(
            tuple(
                replace(segment, masks="task", share=share) if segment.sparse else segment
                for segment in self.segments
            )
        )

    def spans(self) -> list[tuple[int, int, Segment]]:
        """``(start, stop, segment)`` of each non-empty segment, ``stop`` exclusive."""
        start, spans = 0, []
        for segment in self.segments:
            if segment.iterations:
                spans.append((start, start + segment.iterations, segment))
            start += segment.iterations
        return spans

    def describe(self) -> str:
        """A table of the phases, for printing."""
        from tabulate import tabulate

        rows = [
            (segment.label, start, stop - 1, stop - start, _described(segment))
            for start, stop, segment in self.spans()
        ]
        rows.append(("total", 0, self.iterations - 1, self.iterations, ""))
        headers = ("phase", "first", "last", "iterations", "sparsity")
        return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=[4])

    def shade(self, ax: Any) -> Any:
        """Shade the sparse phases of a matplotlib plot over meta-iterations."""
        named = False
        for start, stop, segment in self.spans():
            if segment.sparse:
                label = None if named else "sparse phase"
                ax.axvspan(start, stop, color="0.5", alpha=0.18, lw=0, label=label)
                named = True
        return ax

    def plot(self, ax: Any = None) -> Any:
        """Draw sparsity over meta-iterations.

        Args:
            ax: matplotlib axis to draw on; a new figure by default.

        Returns:
            The axis.

        Raises:
            ImportError: If matplotlib is missing.
        """
        if ax is None:
            try:
                import matplotlib.pyplot as plt
            except ImportError as error:
                raise ImportError(
                    f'{error}; plots need: pip install "l2l-prune[experiments]"'
                ) from None
            _, ax = plt.subplots(figsize=(6, 2.2), layout="constrained")
        edges, values = [0], []
        for start, stop, segment in self.spans():
            edges.append(stop)
            values.append(100 * _plotted(segment))
            if math.isnan(values[-1]):
                where = {"ha": "center", "va": "center"}
                ax.text((start + stop) / 2, 50, segment.sparsity_label, where)
        ax.stairs(values, edges, lw=2)
        self.shade(ax)
        ax.set(xlabel="meta-iteration", ylabel="pruned weights [%]", xlim=(0, self.iterations))
        ax.set_ylim(-3, 100)
        return ax

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, so that a checkpoint can tell schedules apart."""
        return {
            "type": type(self).__name__,
            "segments": [
                {
                    "iterations": segment.iterations,
                    "sparse": segment.sparse,
                    "sparsity": as_lists(segment.sparsity),
                    "keep": as_lists(segment.keep),
                    "phase": segment.phase,
                    "round": segment.round,
                    # Only if it is not the default, so that older checkpoints still fit.
                    **({"masks": "task", "share": segment.share} if segment.per_task else {}),
                }
                for segment in self.segments
            ],
        }


def _described(segment: Segment) -> str:
    if not segment.per_task:
        return segment.sparsity_label
    tasks = "each task" if segment.share == 1 else f"{100 * segment.share:g}% of the tasks"
    return f"{segment.sparsity_label} in {tasks}"


def _plotted(segment: Segment) -> float:
    """One height for the plot: if sparsity is a mapping, the mean over its layers.

    NaN if there are only counts, whose share depends on the network.
    """
    if not segment.sparse:
        return 0.0
    if segment.keep and not segment.sparsity:
        return math.nan
    if isinstance(segment.sparsity, tuple):
        return math.fsum(rate for _, rate in segment.sparsity) / len(segment.sparsity)
    return float(segment.sparsity)  # type: ignore[arg-type]
