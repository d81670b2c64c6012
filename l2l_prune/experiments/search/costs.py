"""What a network costs at the end of a run, computed before it from shapes and counts."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from l2l_prune._basics.packing import pack
from l2l_prune.channels.pruner import ChannelPruner
from l2l_prune.experiments.algorithms import build
from l2l_prune.experiments.config import RunConfig
from l2l_prune.schedules.schedule import Schedule
from l2l_prune.shipping.costs import interleaved, multiply_accumulates

_UNITS = {"": 1, "B": 1, "K": 1e3, "KB": 1e3, "M": 1e6, "MB": 1e6, "G": 1e9, "GB": 1e9}
_ROUNDS = 31


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        weights: Parameters that are not 0.
        bytes: Size of its tensors in single precision; tensors with zeros are stored as their other
            values with a bitmask or indices, whichever is smaller.
        macs: Multiply-accumulate operations of one image's forward pass. Masks save none; channels
            that are cut out do.
        milliseconds: Duration of that pass on one thread; NaN where it was not timed.
    """

    weights: int
    bytes: int
    macs: int
    milliseconds: float = math.nan


@dataclass(frozen=True)
class Budget:
    """What a network may cost; ``None`` means no limit.

    Args:
        bytes: See :class:`Cost`, as for the others; > 0.
        macs: See above.
        milliseconds: See above.
    """

    bytes: float | None = None
    macs: float | None = None
    milliseconds: float | None = None

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"a budget of {name} must be > 0, got {value}")

    @property
    def given(self) -> dict[str, float]:
        """The limits that are set."""
        return {name: v for name, v in dataclasses.asdict(self).items() if v is not None}

    def excess(self, cost: Cost) -> float:
        """The largest ratio of cost to limit; at most 1 if all are met, 0 if there are none."""
        return max((getattr(cost, name) / most for name, most in self.given.items()), default=0.0)


def quantity(text: str) -> float:
    """Read a number with K, M or G for thousands, millions or billions, and B for bytes.

    Raises:
        ValueError: If the text is not such a number.

    Examples:
        >>> quantity("100KB"), quantity("2.5M"), quantity("4096")
        (100000.0, 2500000.0, 4096.0)
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMG]?B?)\s*", text, re.IGNORECASE)
    try:
        return float(match[1]) * _UNITS[match[2].upper()]  # type: ignore[index]
    except (TypeError, ValueError):
        raise ValueError(f"{text!r} is not a quantity: write it like 100KB or 2.5M") from None


def end_network(config: RunConfig, image_shape: Sequence[int]) -> nn.Module:
    """An untrained network like the one a run ends with: the same shapes, and as many zeros.

    Args:
        config: The run.
        image_shape: ``(C, H, W)``.
    """
    last = config.schedule.last
    schedule = Schedule((dataclasses.replace(last, iterations=1),))
    # The number of remaining weights does not depend on how they are chosen.
    counted = config.rebuilt(schedule)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        algorithm = build(counted, image_shape)
    if isinstance(algorithm.pruner, ChannelPruner) and last.held:
        network = algorithm.pruner.export().module
    else:
        network = algorithm.finalize()
    for tensor in network.state_dict().values():
        if not tensor.any():  # biases start at 0, and training moves them
            tensor.fill_(1)
    return network


def cost_of(config: RunConfig, image_shape: Sequence[int]) -> Cost:
    """What the network at the end of a run costs, without its time."""
    network = end_network(config, image_shape)
    weights = sum(int(parameter.count_nonzero()) for parameter in network.parameters())
    stored = sum(pack(tensor).nbytes for tensor in network.state_dict().values())
    forward, x = _forward(network, image_shape)
    with torch.no_grad():
        macs = multiply_accumulates(lambda: forward(x))
    return Cost(weights, stored, macs)


def timed(
    networks: Mapping[Any, nn.Module], image_shape: Sequence[int], rounds: int = _ROUNDS
) -> dict[Any, float]:
    """Milliseconds of one image's forward pass on one thread: medians of interleaved rounds."""

    def seconds(network: nn.Module) -> float:
        forward, x = _forward(network, image_shape)
        started = time.perf_counter()
        forward(x)
        return time.perf_counter() - started

    with torch.no_grad():
        works = {key: functools.partial(seconds, network) for key, network in networks.items()}
        found = interleaved(works, rounds)
    return {key: 1000 * statistics.median(times) for key, times in found.items()}


def dense_width(config: RunConfig, image_shape: Sequence[int], weights: int) -> int:
    """Number of channels for which a dense network's weights are nearest to ``weights``.

    Args:
        config: A dense run of the wide network.
        image_shape: ``(C, H, W)``.
        weights: The number of weights to match.
    """

    def count(channels: int) -> int:
        return cost_of(dataclasses.replace(config, channels=channels), image_shape).weights

    low, high = 1, max(config.channels, 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= weights else (low, middle)
    return min((low, high), key=lambda channels: abs(count(channels) - weights))


def _forward(network: nn.Module, image_shape: Sequence[int]) -> tuple[Any, Tensor]:
    """The function to run and an image for it; for a field, the image's pixels."""
    from l2l_prune.metalearners.cavia import CAVIA, FiLM
    from l2l_prune.metalearners.fields import FourierFeatureMLP, Siren
    from l2l_prune.metalearners.metaoptnet import MetaOptNet

    network.eval()
    if isinstance(network, (Siren, FourierFeatureMLP)):
        return network, torch.zeros(math.prod(image_shape[1:]), 2)
    if any(isinstance(module, FiLM) for module in network.modules()):
        return CAVIA(network, 1.0).clone(), torch.zeros(1, *image_shape)
    if isinstance(network, MetaOptNet):
        return network.features, torch.zeros(1, *image_shape)
    return network, torch.zeros(1, *image_shape)
