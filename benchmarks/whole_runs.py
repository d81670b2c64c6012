"""Whole runs: seconds to a test accuracy, and the accuracy after given seconds.

Reptile on glyphs with 5 tasks x 5 inner steps x batches of 10, and the same tasks, minibatches,
first weights and meta steps for all variants, side by side in one process of one thread. Seconds
are CPU seconds of training; compiling is not counted, scoring neither. The peers' loops make a
fresh Adam for each task, as their examples do. It takes hours; ``rounds`` are seeds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.meta_iteration import by_copies, by_hand, by_higher
from benchmarks.timing import show
from benchmarks.workload import Batches, Step, loss, meta_iteration, plain_step
from l2l_prune import (
    CompiledStep,
    DSDSchedule,
    PrunedReptile,
    Schedule,
    Segment,
    Structured,
    TaskMasks,
)
from l2l_prune.fewshot import Conv4, EpisodeSampler, few_shot_accuracy, minibatches
from l2l_prune.fewshot.data import Episode, load_images


class Case(NamedTuple):
    """A run that is scored on ``scored`` tasks after each of ``points`` equal parts."""

    size: int
    channels: int
    iterations: int
    points: int
    scored: int


CASES = (
    Case(28, 64, 400, 20, 100),
    Case(28, 128, 400, 10, 100),
    Case(84, 64, 100, 5, 60),
    Case(84, 128, 50, 5, 40),
)

TARGETS = (0.5, 0.6, 0.7)
SHARES = (0.25, 0.5, 1.0)
"""Of the seconds of the dense run of the same seed."""

WAYS, SHOTS, TASKS, STEPS, BATCH = 5, 10, 5, 5, 10
Curve = list[tuple[float, float]]  # seconds of training, test accuracy


def network(size: int, channels: int, seed: int, memory_format: torch.memory_format) -> Conv4:
    torch.manual_seed(seed)
    net = Conv4(WAYS, channels, 1, size, "stride" if size == 28 else "max")
    return net.to(memory_format=memory_format)


class Variant:
    """A way to train, with its network as it is now and its curve."""

    def __init__(self, iterate: Callable[[], None], learner: PrunedReptile) -> None:
        self.iterate, self.learner = iterate, learner
        self.seconds, self.curve = 0.0, Curve()

    def train(self, iterations: int) -> None:
        started = time.process_time()
        for _ in range(iterations):
            self.iterate()
        self.seconds += time.process_time() - started

    def score(self, episodes: Sequence[Episode]) -> None:
        found = few_shot_accuracy(
            self.learner,
            episodes,
            steps=STEPS,
            batch_size=5,
            generator=torch.Generator().manual_seed(0),
        )
        self.curve.append((self.seconds, found.mean))


def variants(size: int, channels: int, iterations: int, seed: int) -> dict[str, Variant]:
    data = load_images("glyphs", "train", max_classes=30, image_size=size)

    def draws() -> Callable[[], Iterator[Batches]]:
        """The same tasks and minibatches whenever it is called; each variant has its own."""
        sampler = EpisodeSampler(
            data.images, data.labels, ways=WAYS, shots=SHOTS, queries=0, seed=seed
        )
        generator = torch.Generator().manual_seed(seed)

        def draw() -> Iterator[Batches]:
            for _ in range(TASKS):
                task = sampler.sample()
                yield minibatches(
                    task.support_x,
                    task.support_y,
                    batch_size=BATCH,
                    steps=STEPS,
                    generator=generator,
                )

        return draw

    dense = Schedule((Segment(iterations),))
    dsd = DSDSchedule.from_fractions(0.5, iterations)

    def ours(schedule: Schedule, step: Step = plain_step, cut: bool = False) -> Variant:
        draw, net = draws(), network(size, channels, seed, torch.channels_last)
        structured = Structured(torch.zeros(2, 1, size, size)) if cut else None
        masks = TaskMasks(torch.Generator().manual_seed(seed))
        meta = PrunedReptile(net, schedule, meta_lr=1.0, structured=structured, task_masks=masks)
        if isinstance(step, CompiledStep):  # before the clock runs
            for batches in draws()():
                learner = meta.clone()
                for x, y in batches:
                    step(learner, x, y)
                meta.discard(learner)
        return Variant(lambda: meta_iteration(meta, draw(), step), meta)

    def peer(inner_loop: Callable[[nn.Module], Callable[[Batches], list[torch.Tensor]]]) -> Variant:
        net = network(size, channels, seed, torch.contiguous_format)
        # To score it: the same evaluation as of ours, dense, with inner state of no task.
        scored = PrunedReptile(net, dense, carry_state=False)
        done = [0]

        def rate() -> float:
            return 1 - done[0] / iterations

        iteration = by_hand(net, draws(), inner_loop(net), rate)

        def iterate() -> None:
            iteration()
            done[0] += 1

        return Variant(iterate, scored)

    return {
        "dense": ours(dense),
        "dense, compiled": ours(dense, CompiledStep(loss)),
        "DSD 50%": ours(dsd),
        "DSD 50% of channels": ours(dsd, cut=True),
        "DSD 50% of channels, per task": ours(dsd.per_task(), cut=True),
        "learn2learn's loop": peer(by_copies),
        "higher": peer(by_higher),
    }


def seconds_to(curve: Curve, accuracy: float) -> float | None:
    """When the curve first reaches an accuracy, linear between its points."""
    before = (0.0, 0.0)
    for seconds, score in curve:
        if score >= accuracy:
            share = (accuracy - before[1]) / (score - before[1])
            return before[0] + share * (seconds - before[0])
        before = (seconds, score)
    return None


def accuracy_at(curve: Curve, seconds: float) -> float:
    """The newest score at a time, that of the start or the end beyond them."""
    return next((score for when, score in reversed(curve) if when <= seconds), curve[0][1])


def run(case: Case, seed: int) -> dict[str, Curve]:
    """The curves of one seed; variants take turns, and each turn starts with another one."""
    unseen = load_images("glyphs", "test", image_size=case.size)
    sampler = EpisodeSampler(unseen.images, unseen.labels, ways=WAYS, shots=1, queries=5, seed=seed)
    episodes = [sampler.sample() for _ in range(case.scored)]
    held = variants(case.size, case.channels, case.iterations, seed)
    names = list(held)
    for one in held.values():
        one.score(episodes)
    for point in range(case.points):
        shift = point % len(names)
        for name in names[shift:] + names[:shift]:
            held[name].train(case.iterations // case.points)
            held[name].score(episodes)
    return {name: one.curve for name, one in held.items()}


def middle(values: list[float], digits: int) -> str:
    """Median and middle half."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "-"
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def table(curves: list[dict[str, Curve]], *labels: str) -> list[tuple[str, ...]]:
    """A row for each variant, over the seeds."""
    rows = []
    for name in curves[0]:
        row = [*labels, name]
        for target in TARGETS:
            pairs = [
                (mine, dense)
                for seed in curves
                if (mine := seconds_to(seed[name], target)) is not None
                and (dense := seconds_to(seed["dense"], target))
            ]
            reached = "" if len(pairs) == len(curves) else f", {len(pairs)} of {len(curves)}"
            row.append(middle([mine / dense for mine, dense in pairs], 2) + reached)
        for share in SHARES:
            scores = [
                100 * accuracy_at(seed[name], share * seed["dense"][-1][0]) for seed in curves
            ]
            row.append(middle(scores, 1))
        row.append(middle([seed[name][-1][0] for seed in curves], 1))
        row.append(middle([100 * seed[name][-1][1] for seed in curves], 1))
        rows.append(tuple(row))
    return rows


def main(rounds: int, cases: Sequence[Case] = CASES) -> None:
    found = []
    for case in cases:
        curves = [run(case, seed) for seed in range(rounds)]
        found += table(curves, f"{case.size}x{case.size}", str(case.channels))
    headers = [
        *("images", "channels", "variant"),
        *(f"time to {100 * target:.0f}% (dense: 1)" for target in TARGETS),
        *(f"accuracy at {share:g} of dense's time" for share in SHARES),
        *("seconds in all", "accuracy at the end"),
    ]
    show(__doc__.split("\n")[0], headers, found)
