"""What attaching costs: MAML, Reptile and ProtoNet loops at 84x84 with 64 channels.

Ratios are to the loop without the plugin, with their middle half, and the milliseconds that the
plugin adds are taken on 16x16 images, where the noise is smaller.
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable

import learn2learn as l2l
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.timing import Times, interleaved, rows, show
from benchmarks.workload import DENSE, SPARSE, device
from l2l_prune import Pruner
from l2l_prune.fewshot import Conv4
from l2l_prune.masking.topk import top_mask


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


def measured(loop: Callable[..., None], image_size: int, rounds: int) -> Times:
    """Seconds of each round of ``loop`` without the plugin and with it, dense and sparse."""
    x = torch.randn(10, 3, image_size, image_size).to(device())
    y = torch.arange(5).repeat(2).to(device())
    models = {
        name: Conv4(5, 64, 3, image_size, pooling="max").to(device())
        for name in ("without", "dense", "sparse")
    }
    ends: dict[str, Callable[[], object]] = {
        "without": lambda: None,
        "dense": Pruner(models["dense"], DENSE).step,
        "sparse": Pruner(models["sparse"], SPARSE).step,
    }
    variants = {
        name: functools.partial(loop, model, x, y, ends[name]) for name, model in models.items()
    }
    return interleaved(variants, rounds, warmup=2)


def overhead(rounds: int) -> None:
    table = []
    for loop in (maml, reptile, protonet):
        # What the plugin does depends on the weights and not on the images, so tiny images show
        # the milliseconds that it adds; at 84x84 they drown in the noise of the convolutions.
        tiny = {name: statistics.median(t) for name, t in measured(loop, 16, 10 * rounds).items()}
        times = measured(loop, 84, rounds)
        without = statistics.median(times["without"])
        for row in rows(times, "without", loop.__name__)[1:]:
            added = tiny[row[1]] - tiny["without"]
            table.append((*row, f"{1000 * added:.2f}", f"{100 * added / without:.2f}%"))
    headers = ("loop", "phase", "seconds", "ratio", "middle half", "added [ms]", "of the loop")
    show(__doc__.split("\n")[0], headers, table)


def mask_time() -> None:
    net = l2l.vision.models.ResNet12(5, hidden_size=640, avg_pool=True).to(device())
    weights = [m.weight for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    x = torch.randn(25 + 75, 3, 84, 84).to(device())  # a 5-way 5-shot task with 15 queries a class

    def masks() -> None:
        for weight in weights:
            top_mask(weight.abs(), weight.numel() // 2)

    with torch.no_grad():
        times = interleaved({"one forward": lambda: net(x), "all masks": masks}, 3)
    total = sum(w.numel() for w in weights)
    title = f"Masks of {total / 1e6:.1f} million weights (ResNet-12), a 5-way 5-shot task"
    show(title, ("work", "seconds", "ratio", "middle half"), rows(times, "one forward"))


def main(rounds: int) -> None:
    overhead(rounds)
    mask_time()
