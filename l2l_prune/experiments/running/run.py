"""One training run: a network, a schedule, tasks; it yields its progress and its result."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from l2l_prune._basics import checks
from l2l_prune.experiments.algorithms import Algorithm, build
from l2l_prune.experiments.config import RunConfig
from l2l_prune.experiments.run_result import Point, Progress, RunResult
from l2l_prune.experiments.running.checkpoint import load_checkpoint, save_checkpoint
from l2l_prune.experiments.running.loggers import EventLog
from l2l_prune.experiments.running.rank_processes import shared_tasks
from l2l_prune.experiments.streams import stream
from l2l_prune.fewshot.data import Episode, EpisodeSampler, Images, load_images
from l2l_prune.fewshot.data.splits import SPLITS
from l2l_prune.fewshot.evaluation import Mean, Measure


def run(
    config: RunConfig,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    events: Path | None = None,
    logger: str | None = None,
) -> Iterator[Progress | RunResult]:
    """Train and evaluate; the same config gives the same result on the same machine.

    With ``config.ranks`` above 1, it starts the other ranks' processes.

    Args:
        config: The settings.
        checkpoint: If given, the run's state is saved to this file every ``checkpoint_every``
            meta-iterations, and the run resumes from it, bit for bit. The caller deletes it once
            the result is safe.
        checkpoint_every: Meta-iterations between checkpoints, >= 1.
        events: If given, a folder for the files of ``logger``.
        logger: A key of :data:`~l2l_prune.experiments.running.loggers.LOGGERS`; TensorBoard by
            default.

    Yields:
        A :class:`Progress` after every meta-iteration, and last the :class:`RunResult`, whose
        ``seconds`` count training alone.

    Raises:
        ValueError: If settings are not possible, or the checkpoint is damaged or of other settings.
        FileNotFoundError: If a file of the data set is missing.
        FloatingPointError: If scores or the weights at the end are not finite: the run diverged.
    """
    checks.whole_number("checkpoint_every", checkpoint_every, least=1)
    data = {split: load_split(config, split) for split in _splits(config)}
    _check_memory(config, data["train"].images.shape[1:])
    saved = load_checkpoint(checkpoint, config) if checkpoint else None
    with shared_tasks(config, checkpoint if saved else None):
        yield from _trained(config, data, saved, checkpoint, checkpoint_every, events, logger)


def follow(config: RunConfig, checkpoint: Path | None) -> None:
    """Train on a rank other than the first; only the first evaluates and keeps the result."""
    data = load_split(config, "train")
    tasks, algorithm = _training_tasks(data, config), _fresh(config, data)
    saved = load_checkpoint(checkpoint, config) if checkpoint else None
    state = _State()
    if saved:
        state.restore(saved, algorithm, tasks, config.measure)
    for _ in range(state.done, config.schedule.iterations):
        algorithm.train([tasks.sample() for _ in range(config.tasks)])


def _fresh(config: RunConfig, train: Images) -> Algorithm:
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(stream(config.seed, "weights").get_state())
        return build(config, train.images.shape[1:])


def _trained(
    config: RunConfig,
    data: dict[str, Images],
    saved: dict[str, Any] | None,
    checkpoint: Path | None,
    checkpoint_every: int,
    events: Path | None,
    logger: str | None,
) -> Iterator[Progress | RunResult]:
    """What :func:`run` yields, from the data and the checkpoint's state, if there is one."""
    splits = tuple(data)
    tasks, algorithm = _training_tasks(data["train"], config), _fresh(config, data["train"])
    curve_episodes = {s: list(evaluation_tasks(data[s], config, "curve tasks", s)) for s in splits}
    state, last = _State(), config.schedule.last
    if saved:
        state.restore(saved, algorithm, tasks, config.measure)
    log = EventLog(
        config.measure.name, events, state.done, logger or "tensorboard", config.to_json()
    )
    with log:
        for done in range(state.done + 1, config.schedule.iterations + 1):
            started = time.perf_counter()
            algorithm.train([tasks.sample() for _ in range(config.tasks)])
            # Else only the launching of a GPU's kernels would be timed.
            torch.get_device_module(config.device).synchronize(config.device)
            state.seconds += time.perf_counter() - started
            state.done = done
            phase, sparsity = algorithm.pruner.segment.label, algorithm.pruner.sparsity
            if done % config.eval_every == 0 or done == config.schedule.iterations:
                found = {s: algorithm.evaluate(curve_episodes[s]) for s in splits}
                train, test = found["train"], found[config.held_out]
                state.curve.append(Point(done, phase, sparsity, train, test))
                log.add(done, train=train.mean, test=test.mean, sparsity=sparsity)
                # A run that ends sparse is called by that sparsity: only such weights will do.
                fits = not last.held or algorithm.pruner.segment == last
                if config.select == "best" and fits and found["validation"].mean > state.best_score:
                    state.best_score = found["validation"].mean
                    state.best = copy.deepcopy(algorithm.state_dict())
            if checkpoint and done % checkpoint_every == 0:
                save_checkpoint(checkpoint, config, state.to_save(algorithm, tasks))
            newest = state.curve[-1] if state.curve else None
            yield Progress(
                done,
                phase,
                sparsity,
                newest.train.mean if newest else float("nan"),
                newest.test.mean if newest else float("nan"),
            )
    if state.best is not None:
        algorithm.load_state_dict(state.best)
    train, test = (
        algorithm.evaluate(evaluation_tasks(data[split], config, "final tasks", split))
        for split in ("train", config.held_out)
    )
    size = sum(int(parameter.count_nonzero()) for parameter in algorithm.network.parameters())
    with warnings.catch_warnings():  # the best point may lie in a sparse phase
        warnings.filterwarnings("ignore", "finalize")
        net = algorithm.finalize()
    weights = {name: tensor.cpu() for name, tensor in net.state_dict().items()}
    if wrong := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise FloatingPointError(
            f"training diverged: {', '.join(wrong)} of the final weights are not finite; try a "
            "lower learning rate"
        )
    yield RunResult(config.name, train, test, state.seconds, state.curve, weights, size)


@dataclass
class _State:
    """The state of a run besides its algorithm and its stream of tasks."""

    done: int = 0
    seconds: float = 0.0
    curve: list[Point] = field(default_factory=list)
    best_score: float = -math.inf
    best: dict[str, Any] | None = None

    def to_save(self, algorithm: Algorithm, tasks: EpisodeSampler) -> dict[str, Any]:
        points = [
            (p.iteration, p.phase, p.sparsity, p.train.values, p.test.values) for p in self.curve
        ]
        return {
            "done": self.done,
            "seconds": self.seconds,
            "curve": points,
            "best_accuracy": self.best_score,
            "best": self.best,
            "algorithm": algorithm.state_dict(),
            "tasks": tasks.state_dict(),
        }

    def restore(
        self, saved: dict[str, Any], algorithm: Algorithm, tasks: EpisodeSampler, measure: Measure
    ) -> None:
        self.done, self.seconds = saved["done"], saved["seconds"]
        self.curve = [
            Point(iteration, phase, rate, *(Mean(tuple(own), measure) for own in (train, test)))
            for iteration, phase, rate, train, test in saved["curve"]
        ]
        self.best_score, self.best = saved["best_accuracy"], saved["best"]
        algorithm.load_state_dict(saved["algorithm"])
        tasks.load_state_dict(saved["tasks"])


def load_split(config: RunConfig, split: str) -> Images:
    """The images of ``"train"``, ``"validation"`` or ``"test"`` that a run uses, on its device.

    Raises:
        ValueError: If there is no such device here.
    """
    limit = config.train_classes if split == "train" else None
    needed = config.shots + config.queries
    if split == "train":
        needed = max(needed, config.train_shots + config.train_queries)
    images = load_images(
        config.data, split, max_classes=limit, least_images=needed, **config.data_options
    )
    try:
        return Images(*(tensor.to(config.device) for tensor in images))
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {config.device} cannot be used here: {reason}") from None


def check_splits(configs: Iterable[RunConfig], *more: str) -> None:
    """Refuse splits that are too small for the tasks of runs, before any of them begins.

    Args:
        configs: The runs.
        *more: Splits that will be used besides those of the runs themselves.

    Raises:
        ValueError: If a split has too few classes, or too few images of a class.
    """
    seen = set()
    for config in configs:
        on_cpu = dataclasses.replace(config, device="cpu")  # a GPU may be elsewhere
        for split in dict.fromkeys([*_splits(config), *more]):
            asked = (split, *(getattr(config, name) for name in _SHAPES), config.split is None)
            if asked in seen:  # random splits are all of one size
                continue
            seen.add(asked)
            images = load_split(on_cpu, split)
            try:
                if split == "train":
                    _training_tasks(images, on_cpu)
                evaluation_tasks(images, on_cpu, "final tasks", split)
            except ValueError as error:
                raise ValueError(f"the {split} split is too small: {error}") from None


_SHAPES = (
    *("data", "data_root", "image_size", "skip_damaged", "train_classes", "ways"),
    *("shots", "queries", "train_shots", "train_queries"),
)
"""Settings by which data may be too small for tasks."""


def _splits(config: RunConfig) -> list[str]:
    """The splits that a run uses."""
    chosen = ["validation"] if config.select == "best" else []
    return list(dict.fromkeys(["train", config.held_out, *chosen]))


def _training_tasks(data: Images, config: RunConfig) -> EpisodeSampler:
    return EpisodeSampler(
        data.images,
        data.labels,
        ways=config.ways,
        shots=config.train_shots,
        queries=config.train_queries,
        label_noise=config.label_noise,
        generator=stream(config.seed, "training tasks"),
    )


def evaluation_tasks(
    data: Images, config: RunConfig, purpose: str, split: str
) -> Iterator[Episode]:
    """Tasks that are the same for all methods of a seed, to compare them task by task.

    They are drawn one by one: the paper's 10,000 evaluation tasks would take 25 GB.
    """
    sampler = EpisodeSampler(
        data.images,
        data.labels,
        ways=config.ways,
        shots=config.shots,
        queries=config.queries,
        generator=stream(config.seed, purpose, SPLITS.index(split)),
    )
    counts = {"curve tasks": config.curve_tasks, "final tasks": config.final_tasks}
    return itertools.islice(sampler, counts[purpose])


def _check_memory(config: RunConfig, image: torch.Size) -> None:
    """Refuse tasks that do not fit, before they fill the memory one by one."""
    if not hasattr(os, "sysconf"):  # Windows
        return
    examples = config.ways * max(
        config.tasks * (config.train_shots + config.train_queries),
        config.curve_tasks * (config.shots + config.queries),
    )
    size = 4 * math.prod(image) * examples
    if size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise ValueError(
            f"{config.tasks} tasks, or {config.curve_tasks} for a point of the curves, of "
            f"{config.ways} ways take {size / 1e9:.0f} GB, more than the machine has: ask for fewer"
        )
