"""Reptile's meta-iteration: ours dense, masked and with channels cut out, and peers.

Conv4 with 64 channels, 5 tasks x 8 inner steps x batches of 10, drawing the minibatches included,
one thread. 1.00 are the pure forward and backward passes of as many minibatches in torch's default
memory format.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import higher
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from benchmarks.timing import interleaved, rows, show
from l2l_prune import PrunedReptile, Schedule, Segment
from l2l_prune.data import minibatches
from l2l_prune.experiments.models import Conv4
from l2l_prune.structured import Structured

WAYS, SHOTS, TASKS, STEPS, BATCH = 5, 15, 5, 8, 10
DENSE = Schedule((Segment(10**6),))
SPARSE = Schedule((Segment(10**6, sparse=True, sparsity=0.5),))


class Task:
    """The images of a task, and its minibatches."""

    def __init__(self, size: int) -> None:
        self.size, self.channels = size, 1 if size == 28 else 3
        self.x = torch.rand(WAYS * SHOTS, self.channels, size, size)
        self.y = torch.arange(WAYS).repeat_interleave(SHOTS)

    def network(self, memory_format: torch.memory_format = torch.contiguous_format) -> Conv4:
        pooling = "stride" if self.size == 28 else "max"
        return Conv4(WAYS, 64, self.channels, self.size, pooling).to(memory_format=memory_format)

    def batches(self):
        return minibatches(self.x, self.y, batch_size=BATCH, steps=STEPS)


def passes(net: nn.Module, task: Task) -> Callable[[], None]:
    x, y = task.x[:BATCH], task.y[:BATCH]

    def iteration() -> None:
        for _ in range(TASKS * STEPS):
            net.zero_grad()
            F.cross_entropy(net(x), y).backward()

    return iteration


def reptile(
    task: Task, schedule: Schedule, structured: Structured | None = None, autocast: bool = False
) -> Callable[[], None]:
    net = task.network(torch.channels_last)
    meta = PrunedReptile(net, schedule, meta_lr=0.1, structured=structured)

    def iteration() -> None:
        for _ in range(TASKS):
            learner = meta.clone()
            for x, y in task.batches():
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = F.cross_entropy(learner(x), y)
                learner.adapt(loss)
            meta.collect(learner)
        meta.step()

    return iteration


def example(task: Task, pruned: bool) -> Callable[[], None]:
    """The loop of learn2learn's Reptile example; with torch's masks copies go through pickle,
    because deepcopy refuses pruned models after a forward.
    """
    net = task.network()
    if pruned:
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                prune.l1_unstructured(module, "weight", 0.5)

    def iteration() -> None:
        total = [torch.zeros_like(p) for p in net.parameters()]
        for _ in range(TASKS):
            learner = pickle.loads(pickle.dumps(net)) if pruned else copy.deepcopy(net)
            optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3, betas=(0.0, 0.999))
            for x, y in task.batches():
                optimizer.zero_grad()
                F.cross_entropy(learner(x), y).backward()
                optimizer.step()
            for held, p in zip(total, learner.parameters(), strict=True):
                held.add_(p.detach(), alpha=1 / TASKS)
        with torch.no_grad():
            for p, mean in zip(net.parameters(), total, strict=True):
                p.lerp_(mean, 0.1)

    return iteration


def with_higher(task: Task) -> Callable[[], None]:
    net = task.network()

    def iteration() -> None:
        total = [torch.zeros_like(p) for p in net.parameters()]
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.0, 0.999))
        for _ in range(TASKS):
            with higher.innerloop_ctx(net, optimizer, track_higher_grads=False) as (learner, inner):
                for x, y in task.batches():
                    inner.step(F.cross_entropy(learner(x), y))
                for held, p in zip(total, learner.parameters(), strict=True):
                    held.add_(p.detach(), alpha=1 / TASKS)
        with torch.no_grad():
            for p, mean in zip(net.parameters(), total, strict=True):
                p.lerp_(mean, 0.1)

    return iteration


def main(rounds: int) -> None:
    table = []
    for size in (28, 84):
        task = Task(size)
        variants = {
            "forward + backward": passes(task.network(), task),
            "the same, channels-last": passes(task.network(torch.channels_last), task),
            "PrunedReptile, dense": reptile(task, DENSE),
            "PrunedReptile, 50% masked": reptile(task, SPARSE),
            "PrunedReptile, 50% of channels": reptile(task, SPARSE, Structured(task.x[:2])),
            "learn2learn's loop, dense": example(task, pruned=False),
            "learn2learn's loop, torch's masks": example(task, pruned=True),
            "higher, dense": with_higher(task),
        }
        if size == 28:  # without bfloat16 instructions it takes seconds at 84x84
            variants["PrunedReptile, bf16 autocast"] = reptile(task, DENSE, autocast=True)
        times = interleaved(variants, rounds)
        table += rows(times, "forward + backward", f"{size}x{size}")
    show(__doc__.split("\n")[0], ("images", "variant", "seconds", "ratio", "middle half"), table)


if __name__ == "__main__":
    main(2)
