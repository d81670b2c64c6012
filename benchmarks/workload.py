"""What the benchmarks time: networks, forward and backward passes, Reptile's meta-iterations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2l_prune import PrunedReptile, Schedule, Segment
from l2l_prune.fewshot import Conv4
from l2l_prune.reptile import Learner

WAYS, STEPS, BATCH = 5, 8, 10
DENSE = Schedule((Segment(10**6),))
SPARSE = Schedule((Segment(10**6, sparse=True, sparsity=0.5),))
PER_TASK = SPARSE.per_task()

_DEVICE = [torch.device("cpu")]  # of one entry, which run_on() replaces

Batches = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[[Any, Tensor, Tensor], Tensor]
Step = Callable[[Learner, Tensor, Tensor], object]


def device() -> torch.device:
    """Where the benchmarks run."""
    return _DEVICE[0]


def run_on(name: str) -> None:
    """Let the benchmarks run on a device, ``"cuda"`` for instance."""
    _DEVICE[0] = torch.device(name)


def finish() -> None:
    """Wait for what the device has been given to do."""
    if device().type == "cuda":
        torch.cuda.synchronize(device())


def colours(size: int) -> int:
    """Channels of the images: 28x28 are grey, larger ones have colours."""
    return 1 if size == 28 else 3


def conv4(
    size: int, channels: int = 64, memory_format: torch.memory_format = torch.channels_last
) -> Conv4:
    """The paper's network for images of ``size``."""
    pooling = "stride" if size == 28 else "max"
    net = Conv4(WAYS, channels, colours(size), size, pooling)
    return net.to(device(), memory_format=memory_format)


def minibatch(size: int) -> tuple[Tensor, Tensor]:
    """Random images and their labels."""
    x, y = torch.rand(BATCH, colours(size), size, size), torch.arange(BATCH) % WAYS
    return x.to(device()), y.to(device())


def passes(net: nn.Module, batches: Batches) -> None:
    """A forward and a backward pass of each minibatch, and nothing else."""
    for x, y in batches:
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()


def loss(learner: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The loss of an inner step."""
    return F.cross_entropy(learner(x), y)


def loss_in_bf16(learner: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The same with the network in bfloat16."""
    with torch.autocast(x.device.type, torch.bfloat16):
        return F.cross_entropy(learner(x), y)


def plain_step(learner: Learner, x: Tensor, y: Tensor, loss: Loss = loss) -> None:
    """An inner step in learn2learn's verbs."""
    learner.adapt(loss(learner, x, y))


def meta_iteration(meta: PrunedReptile, tasks: Iterable[Batches], step: Step = plain_step) -> None:
    """A learner for each task is adapted to its minibatches; then the meta-step."""
    for batches in tasks:
        with meta.task_masks():
            learner = meta.clone()
        for x, y in batches:
            step(learner, x, y)
        meta.collect(learner)
    meta.step()
