"""Few-shot accuracy, its confidence interval, and differences over shared tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2l_prune.data.episodes import Episode
from l2l_prune.data.minibatches import minibatches
from l2l_prune.reptile import PrunedReptile


class Algorithm(Protocol):
    """Anything with learn2learn's verb ``clone()``, whose clones ``adapt(loss)``."""

    def clone(self) -> Any:
        """A learner for one task."""


@dataclass(frozen=True)
class Mean:
    """A mean over tasks with its 95% confidence interval (the paper's 1.96 std / sqrt(n)).

    Args:
        values: One value per task, in fractions (0.5 is 50%).

    Example:
        >>> str(Mean((0.4, 0.6)))
        '50.0 ± 19.6'
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over tasks."""
        return math.fsum(self.values) / len(self.values)

    @property
    def ci95(self) -> float:
        """Half width of the 95% confidence interval; NaN for a single task."""
        n, mean = len(self.values), self.mean
        if n < 2:
            return math.nan
        variance = math.fsum((value - mean) ** 2 for value in self.values) / (n - 1)
        return 1.96 * math.sqrt(variance / n)

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0 (for differences)."""
        return abs(self.mean) > self.ci95

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.ci95:.1f}"


MeanT = TypeVar("MeanT", bound=Mean)


def paired_difference(a: MeanT, b: MeanT) -> MeanT:
    """``a - b`` pair by pair, for two methods evaluated on the same tasks (or seeds).

    Raises:
        ValueError: If they have different numbers of tasks.
    """
    if len(a.values) != len(b.values):
        raise ValueError(f"not the same tasks: {len(a.values)} and {len(b.values)}")
    return type(a)(tuple(x - y for x, y in zip(a.values, b.values, strict=True)))


def unpaired_difference(a: Mean, b: Mean) -> tuple[float, float]:
    """Mean and 95% half width of ``a - b`` over different tasks (the train-test gap)."""
    return a.mean - b.mean, math.hypot(a.ci95, b.ci95)


def accuracy(scores: Callable[[Episode], Tensor], episodes: Iterable[Episode]) -> Mean:
    """Accuracy on the queries of each episode, for any way to score them.

    Args:
        scores: Learns from an episode's support set; class scores ``[queries, ways]``.
        episodes: The tasks.

    Returns:
        Accuracy per task, in [0, 1].

    Raises:
        ValueError: If there are no episodes, or one has no queries.
    """
    accuracies = []
    for episode in episodes:
        if len(episode.query_y) == 0:
            raise ValueError("an episode without queries cannot be scored")
        predicted = scores(episode).argmax(1)
        accuracies.append((predicted == episode.query_y).float().mean())
    if not accuracies:
        raise ValueError("there are no episodes to evaluate on")
    return Mean(tuple(torch.stack(accuracies).double().tolist()))


@torch.no_grad()
def query_scores(learner: nn.Module, episode: Episode, transductive: bool = True) -> Tensor:
    """Class scores ``[queries, ways]`` of an adapted learner.

    Args:
        learner: The learner, images to scores.
        episode: The task.
        transductive: Score all queries in one batch, so that batch statistics see them together
            (the paper's setting). Otherwise each query is scored alone among the support set.
    """
    if transductive:
        scores: Tensor = learner(episode.query_x)
        return scores
    alone = [learner(torch.cat([episode.support_x, query[None]]))[-1] for query in episode.query_x]
    return torch.stack(alone)


def few_shot_accuracy(
    algorithm: Algorithm,
    episodes: Iterable[Episode],
    *,
    steps: int,
    batch_size: int,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    transductive: bool = True,
    generator: torch.Generator | None = None,
) -> Mean:
    """Adapt to each episode's support set and score its query set.

    The algorithm is left exactly as it was: learners are clones that are dropped.

    Args:
        algorithm: A :class:`~l2l_prune.PrunedReptile`, or learn2learn's MAML and its like.
        episodes: The tasks, for instance a list so that several methods share them.
        steps: Inner steps of adaptation (50 in the paper), >= 0.
        batch_size: Support examples in each inner step (5 in the paper).
        loss: ``loss(scores, labels)``, a scalar.
        transductive: See :func:`query_scores`.
        generator: Source of the inner minibatches.

    Returns:
        Accuracy per task, in [0, 1].

    Raises:
        ValueError: If there are no episodes, or one has no queries.
    """

    def scores(episode: Episode) -> Tensor:
        learner = algorithm.clone()
        for x, y in minibatches(
            episode.support_x,
            episode.support_y,
            batch_size=batch_size,
            steps=steps,
            generator=generator,
        ):
            learner.adapt(loss(learner(x), y))
        found = query_scores(learner, episode, transductive)
        if isinstance(algorithm, PrunedReptile):
            algorithm.discard(learner)
        return found

    return accuracy(scores, episodes)
