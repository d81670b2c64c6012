"""How the cost of a meta-iteration grows with channels, layers, tasks, inner steps and classes.

28x28, minibatches of 10, one thread; what does not grow is 32 channels, 4 layers, 5 tasks, 8 steps
and 5 classes. "ratio" is to the forward and backward passes of as many minibatches: what the
library adds or saves; it should not grow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.timing import interleaved, rows, show
from benchmarks.workload import DENSE, SPARSE, device, meta_iteration, minibatch, passes
from l2l_prune import PrunedReptile, Schedule


class Size(NamedTuple):
    """Of a network and of its meta-iteration."""

    channels: int = 32
    layers: int = 4
    tasks: int = 5
    steps: int = 8
    classes: int = 5


SIZES = {
    "channels": (16, 32, 64, 128),
    "layers": (2, 4, 8, 16),
    "tasks": (1, 5, 20),
    "steps": (1, 8, 64),
    "classes": (5, 50, 500),
}


def network(size: Size) -> nn.Module:
    channels = size.channels
    blocks: list[nn.Module] = []
    for number in range(size.layers):
        stride = 2 if number < 2 else 1
        blocks += [
            nn.Conv2d(channels if number else 1, channels, 3, stride, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        ]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, size.classes)]
    return nn.Sequential(*blocks, *head).to(device(), memory_format=torch.channels_last)


def variants(size: Size) -> dict[str, Callable[[], None]]:
    batches = [minibatch(28)] * size.steps

    def reptile(schedule: Schedule) -> Callable[[], None]:
        meta = PrunedReptile(network(size), schedule, meta_lr=0.1)
        return functools.partial(meta_iteration, meta, [batches] * size.tasks)

    return {
        "forward + backward": functools.partial(passes, network(size), batches * size.tasks),
        "PrunedReptile, dense": reptile(DENSE),
        "PrunedReptile, 50% masked": reptile(SPARSE),
    }


def main(rounds: int) -> None:
    table = []
    for what, values in SIZES.items():
        for value in values:
            times = interleaved(variants(Size()._replace(**{what: value})), rounds)
            table += rows(times, "forward + backward", what, str(value))
    headers = ("growing", "to", "variant", "seconds", "ratio", "middle")
    show(__doc__.split("\n")[0], headers, table)
