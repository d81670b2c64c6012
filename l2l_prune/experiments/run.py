"""One training run: a network, a schedule, tasks; progress and results as they come."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from l2l_prune.data import Episode, EpisodeSampler, Images, load_images
from l2l_prune.evaluation import Mean
from l2l_prune.experiments.algorithms import build
from l2l_prune.experiments.config import RunConfig


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
    train_data = load_images(
        config.data, "train", root=config.data_root, max_classes=config.train_classes
    )
    test_data = load_images(config.data, "test", root=config.data_root)
    tasks = _sampler(train_data, config, config.train_shots, config.train_queries, config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        algorithm = build(config, train_data.images.shape[1:])
    curve_episodes = [
        _episodes(data, config, config.curve_tasks, seed=1) for data in (train_data, test_data)
    ]
    curve: list[Point] = []
    seconds = 0.0
    for done in range(1, config.schedule.iterations + 1):
        started = time.perf_counter()
        algorithm.train([tasks.sample() for _ in range(config.tasks)])
        seconds += time.perf_counter() - started
        phase, sparsity = algorithm.pruner.segment.label, algorithm.pruner.sparsity
        if done % config.eval_every == 0 or done == config.schedule.iterations:
            train, test = (algorithm.evaluate(episodes) for episodes in curve_episodes)
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
        algorithm.evaluate(_episodes(data, config, config.final_tasks, seed=2))
        for data in (train_data, test_data)
    )
    weights = algorithm.finalize().state_dict()
    yield RunResult(config.name, train, test, seconds, curve, dict(weights))


def _episodes(data: Images, config: RunConfig, count: int, seed: int) -> list[Episode]:
    sampler = _sampler(data, config, config.shots, config.queries, seed)
    return [sampler.sample() for _ in range(count)]


def _sampler(
    data: Images, config: RunConfig, shots: int, queries: int, seed: int
) -> EpisodeSampler:
    return EpisodeSampler(
        data.images, data.labels, ways=config.ways, shots=shots, queries=queries, seed=seed
    )
