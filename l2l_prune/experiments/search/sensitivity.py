"""How much pruning each layer tolerates: the score after adaptation with only that layer pruned."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from l2l_prune._basics.files import replace_file
from l2l_prune.experiments.algorithms import build
from l2l_prune.experiments.config import RunConfig
from l2l_prune.experiments.defaults import LEARN_MORE
from l2l_prune.experiments.running.run import evaluation_tasks, load_split
from l2l_prune.schedules.schedule import Schedule, Segment

MOST_RATE = 0.99
"""Rates by layer stay below this."""

_STEPS = 60


@dataclass(frozen=True)
class Sensitivity:
    """Scores on validation tasks after adaptation.

    Attributes:
        dense: Score of the network as it was trained.
        rates: The fractions pruned.
        sizes: Number of weights of each layer, by name.
        scores: By layer, the score at each rate with only that layer pruned, by magnitude and
            without retraining; the mask holds while the network adapts.
    """

    dense: float
    rates: tuple[float, ...]
    sizes: dict[str, int]
    scores: dict[str, tuple[float, ...]]

    def layer_rates(self, rate: float) -> dict[str, float]:
        """Rates by layer that prune ``rate`` of all weights and cost the same score in each layer.

        Between measured rates, the loss of score is interpolated linearly, and never decreases.

        Raises:
            ValueError: If ``rate`` is not in (0, 0.99).
        """
        if not 0 < rate < MOST_RATE:
            raise ValueError(f"rate must be in (0, {MOST_RATE}), got {rate}")
        total = sum(self.sizes.values())
        curves = {name: self._losses(name) for name in self.sizes}

        def at(loss: float) -> dict[str, float]:
            return {name: _rate_at(self._rates, curve, loss) for name, curve in curves.items()}

        low, high = 0.0, max(curve[-1] for curve in curves.values())
        for _ in range(_STEPS):
            middle = (low + high) / 2
            pruned = sum(self.sizes[name] * found for name, found in at(middle).items())
            low, high = (middle, high) if pruned < rate * total else (low, middle)
        found = at(high)
        # Where many rates share a loss, the sum jumps: scale all down to what was asked for.
        pruned = sum(self.sizes[name] * r for name, r in found.items())
        return {name: round(r * min(1.0, rate * total / pruned), 4) for name, r in found.items()}

    @property
    def _rates(self) -> tuple[float, ...]:
        return (0.0, *(rate for rate in self.rates if rate < MOST_RATE), MOST_RATE)

    def _losses(self, layer: str) -> list[float]:
        """Losses at all rates: never decreasing, and at the last rate larger by the whole score."""
        measured = zip(self.rates, self.scores[layer], strict=True)
        lost = [max(0.0, self.dense - score) for rate, score in measured if rate < MOST_RATE]
        risen = list(itertools.accumulate([0.0, *lost], max))
        return [*risen, risen[-1] + abs(self.dense)]

    def save(self, file: Path) -> None:
        """Write it as JSON."""
        with replace_file(file) as path:
            path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, file: Path) -> Sensitivity:
        """What :meth:`save` wrote.

        Raises:
            ValueError: If the file is damaged.
        """
        try:
            found = json.loads(file.read_text())
            scores = {name: tuple(row) for name, row in found["scores"].items()}
            return cls(found["dense"], tuple(found["rates"]), found["sizes"], scores)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{file} is damaged ({type(error).__name__}): delete it to measure again"
            ) from None


def measure(
    config: RunConfig, weights: dict[str, Tensor], rates: Sequence[float], tasks: int
) -> Sensitivity:
    """Prune each layer of a trained network on its own.

    Args:
        config: The dense run.
        weights: Its weights at the end.
        rates: Fractions to prune, in (0, 1), rising.
        tasks: Validation tasks behind each score, the same for all.

    Raises:
        ValueError: If the algorithm learns more than these weights.
    """
    if config.algorithm in LEARN_MORE:
        raise ValueError(
            f"{config.algorithm} learns more than its network's weights: its layers cannot be "
            "pruned alone"
        )
    shape = load_split(config, "train").images.shape[1:]
    held = load_split(config, "validation")
    wanted = dataclasses.replace(config, final_tasks=max(2, tasks))
    episodes = list(evaluation_tasks(held, wanted, "final tasks", "validation"))

    def score(sparsity: dict[str, float]) -> tuple[float, dict[str, int]]:
        schedule = Schedule((Segment(1), Segment(1, sparse=True, sparsity=sparsity)))
        alone = wanted.rebuilt(schedule, device=config.device)
        with torch.random.fork_rng(devices=[]):
            algorithm = build(alone, shape)
        algorithm.network.load_state_dict(weights)
        algorithm.pruner.step()
        sizes = {name: mask.numel() for name, mask in algorithm.pruner.masks.items()}
        return algorithm.evaluate(episodes).mean, sizes

    dense, sizes = score({"*": 0.0})
    scores = {name: tuple(score({name: rate})[0] for rate in rates) for name in sizes}
    return Sensitivity(dense, tuple(rates), sizes, scores)


def _rate_at(rates: Sequence[float], losses: Sequence[float], most: float) -> float:
    """The largest rate whose loss is at most ``most``."""
    last = max(i for i, loss in enumerate(losses) if loss <= most)
    if last == len(rates) - 1:
        return rates[-1]
    step = losses[last + 1] - losses[last]
    return rates[last] + (rates[last + 1] - rates[last]) * (most - losses[last]) / step
