"""What a run tells: its progress, the points of its curves, and its result."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from l2l_prune.fewshot.evaluation import Mean


@dataclass(frozen=True)
class Progress:
    """Where a run is: meta-iterations done, phase, sparsity, and the newest scores.

    Here and below, ``test`` means the classes that ``config.held_out`` names.
    """

    iteration: int
    phase: str
    sparsity: float
    train: float
    test: float


@dataclass
class Point:
    """One point of the curves."""

    iteration: int
    phase: str
    sparsity: float
    train: Mean
    test: Mean


@dataclass
class RunResult:
    """The result of a run."""

    name: str
    train: Mean
    test: Mean
    seconds: float
    curve: list[Point] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    """The finalized network's state dict: channels that were cut out at the end are in it again."""
    size: int | None = None
    """Parameters that are not 0 in the network that was scored, without channels that were cut."""
