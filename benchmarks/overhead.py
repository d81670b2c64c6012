"""What attaching costs: MAML, Reptile and ProtoNet loops at 84x84 with 64 channels.

Run as ``python benchmarks/overhead.py [rounds]`` on an idle machine. Variants are interleaved in
one run; printed are medians as ratios to the loop without the plugin with their middle half, and
the milliseconds that the plugin adds, taken on 16x16 images where the noise is smaller.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable

import learn2learn as l2l
import torch
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F

from l2l_prune import Pruner, Schedule, Segment
from l2l_prune.experiments.models import Conv4
from l2l_prune.masks import top_mask

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 40
DENSE = Schedule((Segment(10**6),))
SPARSE = Schedule((Segment(10**6, sparse=True, sparsity=0.5),))


def maml(model: nn.Module, x: torch.Tensor, y: torch.Tensor, end: Callable[[], None]) -> None:
    meta = l2l.algorithms.MAML(model, lr=0.01)
    optimizer = torch.optim.SGD(meta.parameters(), lr=1e-4)
    learner = meta.clone()
    learner.adapt(F.cross_entropy(learner(x), y))
    F.cross_entropy(learner(x), y).backward()
    optimizer.step()
    end()


def reptile(model: nn.Module, x: torch.Tensor, y: torch.Tensor, end: Callable[[], None]) -> None:
    learner = copy.deepcopy(model)
    inner = torch.optim.Adam(learner.parameters(), lr=1e-4, betas=(0.0, 0.999))
    for _ in range(3):
        inner.zero_grad()
        F.cross_entropy(learner(x), y).backward()
        inner.step()
    with torch.no_grad():
        for p, q in zip(model.parameters(), learner.parameters(), strict=True):
            p.lerp_(q, 0.1)
    end()


def protonet(model: nn.Module, x: torch.Tensor, y: torch.Tensor, end: Callable[[], None]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    classifier = l2l.nn.PrototypicalClassifier(model(x), y)
    F.cross_entropy(classifier(model(x)), y).backward()
    optimizer.step()
    end()


def interleaved(loop: Callable[..., None], image_size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round of ``loop`` without the plugin and with it, dense and sparse."""
    x, y = torch.randn(10, 3, image_size, image_size), torch.arange(5).repeat(2)
    order = ["without", "dense", "sparse"]
    models = {name: Conv4(5, 64, 3, image_size, pooling="max") for name in order}
    ends: dict[str, Callable[[], object]] = {
        "without": lambda: None,
        "dense": Pruner(models["dense"], DENSE).step,
        "sparse": Pruner(models["sparse"], SPARSE).step,
    }
    times: dict[str, list[float]] = {name: [] for name in order}
    for number in range(rounds + 2):
        for name in order[number % 3 :] + order[: number % 3]:  # no variant is always first
            started = time.perf_counter()
            loop(models[name], x, y, ends[name])
            if number >= 2:
                times[name].append(time.perf_counter() - started)
    return times


def overhead() -> None:
    rows = []
    for loop in (maml, reptile, protonet):
        # What the plugin does depends on the weights and not on the images, so tiny images show
        # the milliseconds that it adds; at 84x84 they drown in the noise of the convolutions.
        tiny = {
            name: statistics.median(t) for name, t in interleaved(loop, 16, 10 * ROUNDS).items()
        }
        times = interleaved(loop, 84, ROUNDS)
        without = statistics.median(times["without"])
        for name in ("dense", "sparse"):
            ratios = [a / b for a, b in zip(times[name], times["without"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            added = tiny[name] - tiny["without"]
            row = (loop.__name__, name, f"{middle:.3f}", f"{low:.3f} - {high:.3f}")
            cost = (f"{1000 * added:.2f}", f"{100 * added / without:.2f}%")
            rows.append((*row, f"{without:.3f}", *cost))
    headers = ("loop", "phase", "ratio", "middle half", "without [s]", "added [ms]", "of the loop")
    print(tabulate(rows, headers=headers, disable_numparse=True))


def mask_time() -> None:
    net = l2l.vision.models.ResNet12(5, hidden_size=640, avg_pool=True)
    weights = [m.weight for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    x = torch.randn(25 + 75, 3, 84, 84)  # a 5-way 5-shot task with 15 queries a class
    forward, mask = [], []
    with torch.no_grad():
        for _ in range(3):
            started = time.perf_counter()
            net(x)
            forward.append(time.perf_counter() - started)
            started = time.perf_counter()
            for weight in weights:
                top_mask(weight.abs(), weight.numel() // 2)
            mask.append(time.perf_counter() - started)
    total = sum(w.numel() for w in weights)
    print(
        f"\nmasks of {total / 1e6:.1f} million weights (ResNet-12): {min(mask):.3f} s; "
        f"one forward of a 5-way 5-shot task: {min(forward):.3f} s"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    overhead()
    mask_time()
