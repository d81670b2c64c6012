"""How fast sparse phases are: Reptile's meta-iteration dense, masked, and with channels cut out.

Run as ``python benchmarks/channels.py [rounds]`` on an idle machine: conv4 with 64 channels, 5
tasks x 8 inner steps x batches of 10, one thread. Variants are interleaved in one run; printed are
medians as ratios to the pure forward and backward passes of the same minibatches in torch's default
memory format, with their middle half.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch.nn import functional as F

from l2l_prune import PrunedReptile, Schedule, Segment
from l2l_prune.experiments.models import Conv4
from l2l_prune.structured import Structured

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 15
TASKS, STEPS, BATCH = 5, 8, 10
DENSE = Schedule((Segment(10**6),))
SPARSE = Schedule((Segment(10**6, sparse=True, sparsity=0.5),))


def variants(size: int) -> dict[str, Callable[[], None]]:
    channels = 1 if size == 28 else 3
    pooling = "stride" if size == 28 else "max"
    x, y = torch.rand(BATCH, channels, size, size), torch.arange(BATCH) % 5

    def network(memory_format: torch.memory_format = torch.contiguous_format) -> Conv4:
        return Conv4(5, 64, channels, size, pooling).to(memory_format=memory_format)

    def passes() -> None:
        for _ in range(TASKS * STEPS):
            plain.zero_grad()
            F.cross_entropy(plain(x), y).backward()

    def reptile(schedule: Schedule, structured: Structured | None = None) -> Callable[[], None]:
        net = network(torch.channels_last)
        meta = PrunedReptile(net, schedule, meta_lr=0.1, structured=structured)

        def iteration() -> None:
            for _ in range(TASKS):
                learner = meta.clone()
                for _ in range(STEPS):
                    learner.adapt(F.cross_entropy(learner(x), y))
                meta.collect(learner)
            meta.step()

        return iteration

    plain = network()
    return {
        "forward + backward": passes,
        "Reptile, dense": reptile(DENSE),
        "Reptile, 50% masked": reptile(SPARSE),
        "Reptile, 50% of channels": reptile(SPARSE, Structured(x)),
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for size in (28, 84):
        steps = variants(size)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(ROUNDS + 1):
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                if number:
                    times[name].append(time.perf_counter() - started)
        floor = times["forward + backward"]
        for name, taken in times.items():
            ratios = [a / b for a, b in zip(taken, floor, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            seconds = f"{statistics.median(taken):.3f}"
            rows.append(
                (f"{size}x{size}", name, seconds, f"{middle:.2f}", f"{low:.2f} - {high:.2f}")
            )
    headers = ("images", "meta-iteration", "seconds", "ratio", "middle half")
    print(tabulate(rows, headers=headers, disable_numparse=True))


if __name__ == "__main__":
    main()
