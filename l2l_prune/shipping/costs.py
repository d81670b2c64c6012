"""What adapting to a task costs: operations, time, memory, bytes to store."""

from __future__ import annotations

import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from l2l_prune._basics import checks
from l2l_prune.fewshot.data.episodes import Episode
from l2l_prune.fewshot.data.minibatches import minibatches
from l2l_prune.fewshot.evaluation import Mean, query_scores
from l2l_prune.reptile.adapt_only import AdaptOnly
from l2l_prune.reptile.learner import Learner
from l2l_prune.reptile.reptile import PrunedReptile
from l2l_prune.shipping.folder import export

PARTS = ("forward", "step", "episode")
Key = TypeVar("Key")


@dataclass(frozen=True)
class Adapting:
    """A meta-learner, and which of its layers adapt.

    Args:
        reptile: The meta-learner, in the phase to measure: dense, masked, or with channels cut.
        adapt_only: As in :meth:`~l2l_prune.PrunedReptile.clone`.
    """

    reptile: PrunedReptile
    adapt_only: AdaptOnly | None = None


@dataclass(frozen=True)
class AdaptationCost:
    """What :func:`adaptation_costs` measures for one way to adapt.

    The parts are ``"forward"`` (of a minibatch), ``"step"`` (forward, backward and the optimizer)
    and ``"episode"`` (all steps, and the scores of the queries).

    Attributes:
        macs: Number of multiply-accumulates executed, by part. A masked network executes as many
            as a dense one.
        milliseconds: Medians, by part.
        ratios: Medians of the ratios to the first way in the same round, by part.
        memory: Peak number of bytes in an episode: the learner's weights, activations, gradients
            and the optimizer's state.
        stored: Bytes on disk, as :func:`~l2l_prune.shipping.export` writes them.
    """

    macs: dict[str, int]
    milliseconds: dict[str, float]
    ratios: dict[str, float]
    memory: int
    stored: int


def adaptation_costs(
    ways: Mapping[str, Adapting],
    episode: Episode,
    *,
    steps: int,
    batch_size: int,
    rounds: int = 9,
    half: bool = False,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> dict[str, AdaptationCost]:
    """Measure what adapting costs, several ways side by side.

    All ways run on one thread; each round times every way once, so that a busy machine slows them
    all alike. Masks alone save bytes on disk, not time: fewer channels, or fewer layers that adapt,
    are faster.

    Args:
        ways: The ways to adapt, by name; ratios are relative to the first.
        episode: The task to adapt to, on the learners' device (CPU or CUDA).
        steps: Inner steps, >= 1.
        batch_size: Support examples in each step.
        rounds: Number of timed rounds, >= 1; they follow one that is not counted.
        half: Store in half precision.
        loss: ``loss(scores, labels)``, a scalar.

    Returns:
        The costs, by the names of ``ways``. The meta-learners are left as they were.

    Raises:
        ImportError: If the extra ``ship`` is missing.
        TypeError: If an argument has the wrong type.
        ValueError: If there is no way, or a number is out of range.

    Source:
        Operations by ``torch.utils.flop_counter``, memory by ``torch.profiler``.
    """
    if not ways:
        raise ValueError("ways must name at least one way to adapt")
    for name, way in ways.items():
        checks.of_type(f"ways[{name!r}]", way, Adapting, "an Adapting")
        if (device := next(way.reptile.parameters()).device).type not in ("cpu", "cuda"):
            raise ValueError(
                f"costs are measured on the CPU or on CUDA, but {name} is on {device}: move it"
            )
    checks.of_type("episode", episode, Episode, "an Episode")
    checks.whole_number("steps", steps, least=1)
    checks.whole_number("rounds", rounds, least=1)
    generator = torch.Generator().manual_seed(0)
    x, y = episode.support_x, episode.support_y
    batches = list(minibatches(x, y, batch_size=batch_size, steps=steps, generator=generator))
    measured = {name: _Way(way, episode, batches, loss) for name, way in ways.items()}
    pairs = itertools.product(measured, PARTS)
    times = interleaved({(n, p): functools.partial(measured[n].run, p) for n, p in pairs}, rounds)
    first = next(iter(measured))
    return {
        name: AdaptationCost(
            {part: way.macs(part) for part in PARTS},
            {part: 1000 * statistics.median(times[name, part]) for part in PARTS},
            {
                part: statistics.median(
                    a / b for a, b in zip(times[name, part], times[first, part], strict=True)
                )
                for part in PARTS
            },
            way.memory(),
            stored_bytes(way.way.reptile, half=half),
        )
        for name, way in measured.items()
    }


def interleaved(works: Mapping[Key, Callable[[], float]], rounds: int) -> dict[Key, list[float]]:
    """What functions return (their seconds) in each round, on one thread, after a first round.

    Each round begins with a different one, so that a busy machine slows them all alike.
    """
    found: dict[Key, list[float]] = {key: [] for key in works}
    order, threads = list(works), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number in range(rounds + 1):
            shift = number % len(order)
            for key in order[shift:] + order[:shift]:
                seconds = works[key]()
                if number:
                    found[key].append(seconds)
    finally:
        torch.set_num_threads(threads)
    return found


def multiply_accumulates(work: Callable[[], object]) -> int:
    """How many multiply-accumulates are executed in a call of ``work``, backward passes too."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops()) // 2


def stored_bytes(learner: Any, *, half: bool = False) -> int:
    """Bytes on disk of a learner that :func:`~l2l_prune.shipping.export` writes.

    Args:
        learner: As for ``export``.
        half: As for ``export``.
    """
    with tempfile.TemporaryDirectory() as folder:
        export(learner, Path(folder), half=half)
        return sum(file.stat().st_size for file in Path(folder).iterdir())


def costs_table(
    costs: Mapping[str, AdaptationCost], accuracies: Mapping[str, Mean] | None = None
) -> list[dict[str, Any]]:
    """Rows for a table or a CSV file: numbers by column, one row for each way.

    Args:
        costs: From :func:`adaptation_costs`.
        accuracies: Accuracies by the same names; a way may have none.
    """
    rows: list[dict[str, Any]] = []
    for name, cost in costs.items():
        row: dict[str, Any] = {"way": name}
        if accuracies and name in accuracies:
            row |= {
                "accuracy [%]": 100 * accuracies[name].mean,
                "ci95": 100 * accuracies[name].ci95,
            }
        for part in PARTS:
            row |= {
                f"{part} MMACs": cost.macs[part] / 1e6,
                f"{part} ms": cost.milliseconds[part],
                f"{part} ratio": cost.ratios[part],
            }
        rows.append(row | {"memory kB": cost.memory / 1e3, "stored kB": cost.stored / 1e3})
    return rows


class _Way:
    """One way to adapt, and its parts as functions."""

    def __init__(
        self,
        way: Adapting,
        episode: Episode,
        batches: list[tuple[Tensor, Tensor]],
        loss: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self.way, self._episode, self._batches, self._loss = way, episode, batches, loss
        self._device = next(way.reptile.parameters()).device

    def run(self, part: str) -> float:
        """Seconds that a part takes, without the time to make the learner."""
        learner = self.way.reptile.clone(self.way.adapt_only)
        work = {"forward": self._forward, "step": self._step, "episode": self._adapt}[part]
        self._wait()
        started = time.perf_counter()
        work(learner)
        self._wait()
        taken = time.perf_counter() - started
        self.way.reptile.discard(learner)
        return taken

    def macs(self, part: str) -> int:
        return multiply_accumulates(lambda: self.run(part))

    def memory(self) -> int:
        """After a run, so that the working copy and the kernels' own memory exist already."""
        learner = self.way.reptile.clone(self.way.adapt_only)
        module = learner.module
        held = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
        if self._device.type == "cuda":
            before = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._adapt(learner)
            peak = torch.cuda.max_memory_allocated(self._device) - before
        else:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
                self._adapt(learner)
            peak = _peak(told)
        self.way.reptile.discard(learner)
        return held + peak

    def _forward(self, learner: Learner) -> None:
        with torch.no_grad():
            learner(self._batches[0][0])

    def _step(self, learner: Learner) -> None:
        x, y = self._batches[0]
        learner.adapt(self._loss(learner(x), y))

    def _adapt(self, learner: Learner) -> None:
        for x, y in self._batches:
            learner.adapt(self._loss(learner(x), y))
        query_scores(learner, self._episode)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _peak(told: Any) -> int:
    """The largest number of bytes allocated at once since the profile began."""
    events: Iterable[Any] = told.profiler.kineto_results.events()
    changes = [e for e in events if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
