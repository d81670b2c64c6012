"""How the cost of a meta-iteration grows with channels, layers and tasks.

28x28, 8 inner steps of 10 examples, one thread. "ratio" is to the forward and backward passes of
as many minibatches: what the library adds or saves; it should not grow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.timing import interleaved, rows, show
from benchmarks.workload import (
    DENSE,
    SPARSE,
    STEPS,
    WAYS,
    device,
    meta_iteration,
    minibatch,
    passes,
)
from l2l_prune import PrunedReptile, Schedule


def network(channels: int, layers: int) -> nn.Module:
    blocks: list[nn.Module] = []
    for number in range(layers):
        stride = 2 if number < 2 else 1
        blocks += [
            nn.Conv2d(channels if number else 1, channels, 3, stride, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        ]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, WAYS)]
    return nn.Sequential(*blocks, *head).to(device(), memory_format=torch.channels_last)


def variants(channels: int, layers: int, tasks: int) -> dict[str, Callable[[], None]]:
    batches = [minibatch(28)] * STEPS

    def reptile(schedule: Schedule) -> Callable[[], None]:
        meta = PrunedReptile(network(channels, layers), schedule, meta_lr=0.1)
        return functools.partial(meta_iteration, meta, [batches] * tasks)

    return {
        "forward + backward": functools.partial(passes, network(channels, layers), batches * tasks),
        "PrunedReptile, dense": reptile(DENSE),
        "PrunedReptile, 50% masked": reptile(SPARSE),
    }


def main(rounds: int) -> None:
    sizes = {
        "channels": [(16, 4, 5), (32, 4, 5), (64, 4, 5), (128, 4, 5)],
        "layers": [(32, 2, 5), (32, 8, 5), (32, 16, 5)],
        "tasks": [(32, 4, 1), (32, 4, 20)],
    }
    table = []
    for what, cases in sizes.items():
        for case in cases:
            times = interleaved(variants(*case), rounds)
            table += rows(times, "forward + backward", what, *map(str, case))
    headers = ("growing", "channels", "layers", "tasks", "variant", "seconds", "ratio", "middle")
    show(__doc__.split("\n")[0], headers, table)
