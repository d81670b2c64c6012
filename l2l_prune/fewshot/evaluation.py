"""Few-shot accuracy, its confidence interval, and differences over shared tasks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from l2l_prune._basics import checks
from l2l_prune.fewshot.data.episodes import Episode, EpisodeSampler
from l2l_prune.fewshot.data.minibatches import minibatches
from l2l_prune.reptile.adapt_only import AdaptOnly
from l2l_prune.reptile.batched import BatchedLearners
from l2l_prune.reptile.reptile import PrunedReptile


class ClonesLearners(Protocol):
    """Anything with learn2learn's verb ``clone()``, whose clones ``adapt(loss)``."""

    def clone(self) -> Any:
        """A learner for one task."""


@dataclass(frozen=True)
class Measure:
    """What is measured on a task, and how it is displayed.

    Args:
        name: Its name in tables and on axes.
        unit: Its unit in tables and on axes.
        factor: Factor that converts a value to that unit.

    Examples:
        >>> str(ACCURACY), str(PSNR)
        ('accuracy [%]', 'PSNR [dB]')
    """

    name: str
    unit: str
    factor: float = 1.0

    def __str__(self) -> str:
        return f"{self.name} [{self.unit}]"

    def read(self, value: float) -> float:
        """A value in the unit."""
        return self.factor * value

    @property
    def ending(self) -> str:
        """The unit after a number, with a space; per cent goes without saying."""
        return "" if self.unit == "%" else f" {self.unit}"

    def difference(self, number: str) -> str:
        """A difference in the unit, followed by it; of percentages, in points.

        Examples:
            >>> ACCURACY.difference("1"), ACCURACY.difference("+1.2 ± 0.5"), PSNR.difference("2")
            ('1 point', '+1.2 ± 0.5 points', '2 dB')
        """
        points = " point" if number.lstrip("+-") == "1" else " points"
        return number + (points if self.unit == "%" else self.ending)


ACCURACY = Measure("accuracy", "%", 100.0)
"""The fraction of queries that are classified correctly, displayed in per cent."""

PSNR = Measure("PSNR", "dB")
"""Peak signal-to-noise ratio, see :func:`~l2l_prune.metalearners.fields.psnr`."""


@dataclass(frozen=True)
class Mean:
    """A mean over tasks with its 95% confidence interval (the paper's 1.96 std / sqrt(n)).

    Args:
        values: One value per task; accuracies are fractions (0.5 is 50%).
        measure: What they measure.

    Raises:
        ValueError: If there are no values.

    Examples:
        >>> str(Mean((0.4, 0.6)))
        '50.0 ± 19.6'
        >>> str(Mean((20.0, 22.0), PSNR))
        '21.0 ± 2.0'
        >>> str(Mean((0.4,)))
        '40.0 (one task, no interval)'
    """

    values: tuple[float, ...]
    measure: Measure = ACCURACY

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("there is no value to take a mean of")

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
        """Whether the interval excludes 0 (for differences)."""
        return abs(self.mean) > self.ci95

    def __str__(self) -> str:
        mean, width = map(self.measure.read, (self.mean, self.ci95))
        if len(self.values) < 2:
            return f"{tenths(mean)} (one task, no interval)"
        return f"{tenths(mean)} ± {tenths(width)}"


def tenths(value: float, sign: str = "") -> str:
    """A number with one decimal, and never as a negative zero.

    Examples:
        >>> tenths(-1.25), tenths(-0.01), tenths(-0.01, "+")
        ('-1.2', '0.0', '+0.0')
    """
    return f"{round(value, 1) + 0.0:{sign}.1f}"


MeanT = TypeVar("MeanT", bound=Mean)


def paired_difference(a: MeanT, b: MeanT) -> MeanT:
    """``a - b`` pair by pair, for two methods evaluated on the same tasks (or seeds).

    Raises:
        ValueError: If they have different measures or numbers of tasks.
    """
    if a.measure != b.measure:
        raise ValueError(f"a and b must have the same measure, got {a.measure} and {b.measure}")
    if len(a.values) != len(b.values):
        raise ValueError(
            f"a and b must have the same tasks, got {len(a.values)} and {len(b.values)} values"
        )
    return type(a)(tuple(x - y for x, y in zip(a.values, b.values, strict=True)), a.measure)


def unpaired_difference(a: Mean, b: Mean) -> tuple[float, float]:
    """Mean and 95% half width of ``a - b`` over different tasks (the train-test gap)."""
    return a.mean - b.mean, math.hypot(a.ci95, b.ci95)


def accuracy(scores: Callable[[Episode], Tensor], episodes: Iterable[Episode]) -> Mean:
    """Accuracy on the queries of each episode, for any way to score them.

    Args:
        scores: Learns from an episode's support set, and returns class scores ``[queries, ways]``.
        episodes: The tasks.

    Returns:
        Accuracy per task, in [0, 1].

    Raises:
        TypeError: If ``episodes`` is endless, or holds anything but episodes.
        ValueError: If there are no episodes, one has no queries, or scores do not fit the queries.
        FloatingPointError: If scores are not finite: they would count as chance.
    """
    return _accuracy((e.query_y, scores(e)) for e in _with_queries(episodes))


def _with_queries(episodes: Iterable[Episode]) -> Iterator[Episode]:
    if isinstance(episodes, EpisodeSampler):
        raise TypeError(
            "an EpisodeSampler is endless: give [sampler.sample() for _ in range(tasks)]"
        )
    for episode in episodes:
        checks.of_type("each of episodes", episode, Episode, "an Episode")
        if len(episode.query_y) == 0:
            raise ValueError("an episode has no queries to score: draw it with queries >= 1")
        yield episode


def _accuracy(scored: Iterable[tuple[Tensor, Tensor]]) -> Mean:
    """Accuracy from each episode's labels and scores, which stay on their device until the end."""
    correct, queries, beyond, finite = [], [], [], []
    for labels, scores in scored:
        if scores.dim() != 2 or len(scores) != len(labels):  # the comparison would not fail
            raise ValueError(
                f"scores must have the shape [{len(labels)}, classes], got {tuple(scores.shape)}"
            )
        correct.append((scores.argmax(1) == labels).sum())
        queries.append(len(labels))
        beyond.append(labels.max() - scores.shape[1])
        finite.append(scores.amax(1).isfinite().all())  # -inf rules a class out
    if not correct:
        raise ValueError("there are no episodes to evaluate on")
    if (most := int(torch.stack(beyond).max())) >= 0:
        raise ValueError(
            f"a query has a label {most + 1} above the largest class that has scores: score every "
            "class"
        )
    if wrong := len(finite) - int(torch.stack(finite).sum()):
        raise FloatingPointError(
            f"the scores of {wrong} of {len(finite)} tasks are not finite: training or adaptation "
            "diverged; try a lower learning rate"
        )
    counts = torch.stack(correct).tolist()
    return Mean(tuple(count / total for count, total in zip(counts, queries, strict=True)))


@torch.no_grad()
def query_scores(
    learner: Callable[[Tensor], Tensor], episode: Episode, transductive: bool = True
) -> Tensor:
    """Class scores ``[queries, ways]`` of an adapted learner.

    Args:
        learner: The learner, images to scores.
        episode: The task.
        transductive: Score all queries in one batch, so that batch statistics see them together
            (the paper's setting). Otherwise each query is scored alone with the support set.
    """
    if transductive:
        return learner(episode.query_x)
    alone = [learner(torch.cat([episode.support_x, query[None]]))[-1] for query in episode.query_x]
    return torch.stack(alone)


def few_shot_accuracy(
    algorithm: ClonesLearners,
    episodes: Iterable[Episode],
    *,
    steps: int,
    batch_size: int,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    step: Callable[[Any, Tensor, Tensor], object] | None = None,
    transductive: bool = True,
    generator: torch.Generator | None = None,
    tasks_at_once: int = 1,
    adapt_only: AdaptOnly | None = None,
) -> Mean:
    """Adapt to each episode's support set and score its query set.

    The algorithm is left exactly as it was: learners are clones, which are discarded.

    Args:
        algorithm: A :class:`~l2l_prune.PrunedReptile`, or learn2learn's MAML and similar.
        episodes: The tasks; give a list if several methods should share them.
        steps: Inner steps of adaptation (50 in the paper), >= 0.
        batch_size: Support examples in each inner step (5 in the paper), >= 1.
        loss: ``loss(scores, labels)``, a scalar.
        step: Makes an inner step, ``step(learner, x, y)``, instead of ``adapt`` on ``loss``; for
            instance a :class:`~l2l_prune.reptile.compiled.CompiledStep`.
        transductive: See :func:`query_scores`.
        generator: Source of the inner minibatches, by default torch's own.
        tasks_at_once: Tasks of equal shape to adapt together, >= 1; more than one only for
            PrunedReptile. The numbers are the same up to rounding; see
            :class:`~l2l_prune.reptile.batched.BatchedLearners` for when it is faster.
        adapt_only: What inner steps change, by default everything; only for PrunedReptile. See
            :meth:`~l2l_prune.PrunedReptile.clone`.

    Returns:
        Accuracy per task, in [0, 1].

    Raises:
        TypeError: If ``algorithm`` has no ``clone()``, ``episodes`` is endless, or a number is not
            an integer.
        ValueError: If there are no episodes, one has no queries, scores do not fit the queries, or
            ``tasks_at_once`` or ``adapt_only`` cannot be used with the algorithm or ``step``.
        FloatingPointError: If scores are not finite: they would count as chance.
    """
    if not callable(getattr(algorithm, "clone", None)):
        raise TypeError(
            "algorithm must have clone() (PrunedReptile, MAML, ...), got "
            f"{checks.describe(algorithm)}"
        )

    clone = algorithm.clone
    if adapt_only is not None:
        if not isinstance(algorithm, PrunedReptile):
            raise ValueError(f"adapt_only needs a PrunedReptile, got {checks.describe(algorithm)}")
        clone = functools.partial(algorithm.clone, adapt_only)

    def drawn(episode: Episode) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = episode.support_x, episode.support_y
        return minibatches(x, y, batch_size=batch_size, steps=steps, generator=generator)

    def adapt(learner: Any, x: Tensor, y: Tensor) -> None:
        learner.adapt(loss(learner(x), y))

    def scores(episode: Episode) -> Tensor:
        learner = clone()
        for x, y in drawn(episode):
            (step or adapt)(learner, x, y)
        found = query_scores(learner, episode, transductive)
        if isinstance(algorithm, PrunedReptile):
            algorithm.discard(learner)
        return found

    def scores_together(reptile: PrunedReptile, episodes: Sequence[Episode]) -> Tensor:
        learners = BatchedLearners(reptile, len(episodes), adapt_only)
        for batches in zip(*map(drawn, episodes), strict=True):
            x, y = (torch.stack(parts) for parts in zip(*batches, strict=True))
            learners.adapt(learners.each(lambda net, x, y: loss(net(x), y), x, y))
        stacked = (torch.stack(parts) for parts in zip(*episodes, strict=True))
        found = learners.each(
            lambda net, *parts: query_scores(net, Episode(*parts), transductive), *stacked
        )
        learners.discard()
        return found

    if checks.whole_number("tasks_at_once", tasks_at_once, least=1) == 1:
        return accuracy(scores, episodes)
    if step is not None:
        raise ValueError("step adapts one learner at a time: set tasks_at_once=1")
    if not isinstance(algorithm, PrunedReptile):
        raise ValueError(f"tasks_at_once > 1 needs a PrunedReptile, got {type(algorithm).__name__}")
    return _accuracy(
        (episode.query_y, found)
        for group in _equal_shapes(_with_queries(episodes), tasks_at_once)
        for episode, found in zip(group, scores_together(algorithm, group), strict=True)
    )


def _equal_shapes(episodes: Iterable[Episode], most: int) -> Iterator[list[Episode]]:
    """Groups of up to ``most`` successive episodes of equal shapes."""
    for _, equal in groupby(episodes, key=lambda episode: [part.shape for part in episode]):
        while group := list(islice(equal, most)):
            yield group
