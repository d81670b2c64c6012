"""Neural fields: a task is one picture, the measure its PSNR after the inner steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from l2l_prune.experiments.algorithms.outer_optimizer import WithOuterOptimizer
from l2l_prune.experiments.config import RunConfig
from l2l_prune.fewshot.data import Episode
from l2l_prune.fewshot.evaluation import Mean
from l2l_prune.metalearners.fields import (
    FieldMAML,
    FourierFeatureMLP,
    ImageSignals,
    Siren,
    psnr,
)

_MOST_AT_ONCE = 32
_NUMBERS_AT_ONCE = 2**24  # of a layer's outputs for all pictures: 64 MB


class Field(WithOuterOptimizer):
    """Second-order :class:`~l2l_prune.metalearners.fields.FieldMAML` under Adam."""

    def __init__(self, config: RunConfig, image_shape: Sequence[int]) -> None:
        self._config = config
        channels, height, width = image_shape
        self.network = _network(config, channels).to(config.device)
        self._maml = FieldMAML(self.network, config.inner_lr, config.inner_steps)
        self.trained = self._maml
        self.optimizer = torch.optim.Adam(self._maml.parameters(), config.meta_lr)
        numbers = height * width * config.channels
        self._at_once = max(1, min(_MOST_AT_ONCE, _NUMBERS_AT_ONCE // numbers))
        self._prune(self._maml, config)

    def losses(self, tasks: Sequence[Episode]) -> Iterator[Tensor]:
        signals = _signals(tasks)
        yield len(tasks) * self._maml.loss(signals.coordinates, signals.values)

    @torch.no_grad()
    def evaluate(self, episodes: Iterable[Episode]) -> Mean:
        values: list[float] = []
        left = iter(episodes)
        while tasks := list(islice(left, self._at_once)):
            signals = _signals(tasks)
            x, y = signals.coordinates, signals.values
            if steps := self._config.eval_steps:
                found = self._maml(x, self._maml.adapt(x, y, steps=steps))
            else:
                found = self._maml(x)
            values += psnr(found, y).double().tolist()
        measured = torch.tensor(values)
        if wrong := int((~measured.isfinite()).sum()):
            raise FloatingPointError(
                f"the PSNR of {wrong} of {len(values)} pictures is not finite: training or "
                "adaptation diverged; try a lower learning rate"
            )
        return Mean(tuple(values), self._config.measure)


def _network(config: RunConfig, channels: int) -> nn.Module:
    width, depth = config.channels, config.depth
    if config.backbone == "fourier":
        return FourierFeatureMLP(2, channels, width=width, depth=depth)
    return Siren(2, channels, width=width, depth=depth, omega_0=config.omega)


def _signals(tasks: Sequence[Episode]) -> ImageSignals:
    return ImageSignals(torch.cat([task.support_x for task in tasks]))
