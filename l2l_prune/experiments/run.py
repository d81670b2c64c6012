"""One training run: a network, a schedule, tasks; progress and results as they come."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from l2l_prune.data import Episode, EpisodeSampler, Glyphs
from l2l_prune.data.minibatches import minibatches
from l2l_prune.evaluation import Mean, few_shot_accuracy
from l2l_prune.experiments.models import Conv4
from l2l_prune.reptile import PrunedReptile
from l2l_prune.schedules import Schedule


@dataclass(frozen=True)
class RunConfig:
    """Settings of one Reptile run on glyphs.

    Args:
        name: Name of the method, for tables and files.
        schedule: When to prune, and how much; its length is the run's.
        seed: Seed of weights, tasks and minibatches. Runs with one seed see the same tasks.
        ways: Classes of a task.
        shots: Support examples of a class at evaluation.
        queries: Query examples of a class at evaluation.
        train_shots: Examples of a class in a training task.
        train_classes: Number of characters to train on.
        channels: Channels of each convolution.
        tasks: Tasks in a meta-iteration.
        inner_steps: Inner steps in training.
        inner_batch: Examples in an inner step in training.
        inner_lr: Learning rate of the inner Adam.
        meta_lr: First meta step size, falling linearly to 0.
        eval_steps: Inner steps at evaluation.
        eval_batch: Examples in an inner step at evaluation.
        eval_every: Meta-iterations between points of the accuracy curves.
        curve_tasks: Tasks for each point of the curves, from each of training and test classes.
        final_tasks: Tasks for the accuracies at the end, from each of training and test classes.
    """

    name: str
    schedule: Schedule
    seed: int = 0
    ways: int = 5
    shots: int = 1
    queries: int = 5
    train_shots: int = 10
    train_classes: int = 30
    channels: int = 64
    tasks: int = 5
    inner_steps: int = 5
    inner_batch: int = 10
    inner_lr: float = 1e-3
    meta_lr: float = 1.0
    eval_steps: int = 5
    eval_batch: int = 5
    eval_every: int = 25
    curve_tasks: int = 12
    final_tasks: int = 200


@dataclass(frozen=True)
class Progress:
    """Where a run is: meta-iterations done, phase, sparsity, and the newest accuracies."""

    iteration: int
    phase: str
    sparsity: float
    train: float
    test: float


@dataclass
class Point:
    """One point of the accuracy curves."""

    iteration: int
    phase: str
    sparsity: float
    train: Mean
    test: Mean


@dataclass
class RunResult:
    """What came out of a run."""

    name: str
    train: Mean
    test: Mean
    seconds: float
    curve: list[Point] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def run(config: RunConfig) -> Iterator[Progress | RunResult]:
    """Train and evaluate; the same config gives the same result on the same machine.

    Yields:
        A :class:`Progress` after every meta-iteration, and last the :class:`RunResult`, whose
        ``seconds`` count training alone.
    """
    train_data = Glyphs("train", max_classes=config.train_classes)
    test_data = Glyphs("test")
    tasks = EpisodeSampler(
        train_data.images,
        train_data.labels,
        ways=config.ways,
        shots=config.train_shots,
        queries=0,
        seed=config.seed,
    )
    batches = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Conv4(config.ways, config.channels)
    reptile = PrunedReptile(
        model,
        config.schedule,
        inner_lr=config.inner_lr,
        meta_lr=config.meta_lr,
        layers="authors",
    )
    curve_episodes = [
        _episodes(data, config, config.curve_tasks, seed=1) for data in (train_data, test_data)
    ]
    curve: list[Point] = []
    seconds = 0.0
    for done in range(1, config.schedule.iterations + 1):
        started = time.perf_counter()
        for _ in range(config.tasks):
            _train_task(reptile, tasks.sample(), config, batches)
        reptile.step()
        seconds += time.perf_counter() - started
        phase, sparsity = reptile.pruner.segment.label, reptile.pruner.sparsity
        if done % config.eval_every == 0 or done == config.schedule.iterations:
            train, test = (_evaluate(reptile, episodes, config) for episodes in curve_episodes)
            curve.append(Point(done, phase, sparsity, train, test))
        newest = curve[-1] if curve else None
        yield Progress(
            done,
            phase,
            sparsity,
            newest.train.mean if newest else float("nan"),
            newest.test.mean if newest else float("nan"),
        )
    train, test = (
        _evaluate(reptile, _episodes(data, config, config.final_tasks, seed=2), config)
        for data in (train_data, test_data)
    )
    weights = reptile.finalize().state_dict()
    yield RunResult(config.name, train, test, seconds, curve, dict(weights))


def _train_task(
    reptile: PrunedReptile, task: Episode, config: RunConfig, generator: torch.Generator
) -> None:
    learner = reptile.clone()
    for x, y in minibatches(
        task.support_x,
        task.support_y,
        batch_size=config.inner_batch,
        steps=config.inner_steps,
        generator=generator,
    ):
        learner.adapt(F.cross_entropy(learner(x), y))
    reptile.collect(learner)


def _evaluate(reptile: PrunedReptile, episodes: list[Episode], config: RunConfig) -> Mean:
    return few_shot_accuracy(
        reptile,
        episodes,
        steps=config.eval_steps,
        batch_size=config.eval_batch,
        generator=torch.Generator().manual_seed(config.seed),
    )


def _episodes(data: Glyphs, config: RunConfig, count: int, seed: int) -> list[Episode]:
    sampler = EpisodeSampler(
        data.images,
        data.labels,
        ways=config.ways,
        shots=config.shots,
        queries=config.queries,
        seed=seed,
    )
    return [sampler.sample() for _ in range(count)]
