"""Reptile's meta-iteration: ours dense, masked, compiled and with channels cut out, and peers.

Conv4 with 64 channels, 5 tasks x 8 inner steps x batches of 10, drawing the minibatches included,
one thread. 1.00 are the pure forward and backward passes of as many minibatches in torch's default
memory format. Compilation is not counted. Rows without the library are what torch itself takes for
the passes, for the passes with a step of its fused Adam after each, and for the shortest loop by
hand; the same with 32 channels, which is what remains where half of the channels are cut out.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import higher
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from benchmarks.timing import interleaved, rows, show
from benchmarks.workload import (
    BATCH,
    DENSE,
    PER_TASK,
    SPARSE,
    STEPS,
    WAYS,
    Batches,
    Step,
    colours,
    conv4,
    device,
    loss,
    loss_in_bf16,
    meta_iteration,
    minibatch,
    passes,
    plain_step,
)
from l2l_prune import CompiledStep, PrunedReptile, Schedule, Structured, TaskMasks
from l2l_prune.fewshot import minibatches

TASKS, SHOTS = 5, 15
Draw = Callable[[], Iterator[Batches]]
Adapted = Callable[[Batches], list[Tensor]]


def draw_tasks(size: int) -> Draw:
    """Draws the minibatches of a meta-iteration's tasks anew at each call."""
    x = torch.rand(WAYS * SHOTS, colours(size), size, size).to(device())
    y = torch.arange(WAYS).repeat_interleave(SHOTS).to(device())
    return lambda: (minibatches(x, y, batch_size=BATCH, steps=STEPS) for _ in range(TASKS))


def reptile(
    size: int,
    draw: Draw,
    schedule: Schedule,
    step: Step = plain_step,
    structured: Structured | None = None,
) -> Callable[[], None]:
    meta = PrunedReptile(
        conv4(size),
        schedule,
        meta_lr=0.1,
        structured=structured,
        task_masks=TaskMasks(torch.Generator().manual_seed(0)) if schedule is PER_TASK else None,
    )
    return lambda: meta_iteration(meta, draw(), step)


def by_hand(
    net: nn.Module,
    draw: Draw,
    adapted: Adapted,
    rate: Callable[[], float] = lambda: 0.1,
) -> Callable[[], None]:
    """Reptile without the library: ``adapted`` gives the weights that a task leads to."""

    def iteration() -> None:
        total, tasks = [torch.zeros_like(p) for p in net.parameters()], 0
        for batches in draw():
            torch._foreach_add_(total, adapted(batches))
            tasks += 1
        with torch.no_grad():
            for p, summed in zip(net.parameters(), total, strict=True):
                p.lerp_(summed / tasks, rate())

    return iteration


def adam(net: nn.Module, fused: bool | None = None) -> torch.optim.Adam:
    return torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.0, 0.999), fused=fused)


def steps(
    run: Callable[[Tensor, Tensor], Tensor], optimizer: torch.optim.Optimizer, batches: Batches
) -> None:
    """An inner step on each minibatch; ``run`` gives its loss."""
    for x, y in batches:
        optimizer.zero_grad()
        run(x, y).backward()
        optimizer.step()


def by_copies(net: nn.Module, pruned: bool = False) -> Adapted:
    """The inner loop of learn2learn's Reptile example; with torch's masks copies go through pickle,
    because deepcopy refuses pruned models after a forward.
    """
    if pruned:
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                prune.l1_unstructured(module, "weight", 0.5)

    def adapted(batches: Batches) -> list[Tensor]:
        learner = pickle.loads(pickle.dumps(net)) if pruned else copy.deepcopy(net)
        steps(functools.partial(loss, learner), adam(learner), batches)
        return [p.detach() for p in learner.parameters()]

    return adapted


def by_one_copy(net: nn.Module) -> Adapted:
    """One copy and one fused Adam for all tasks: as short as a loop by hand can be."""
    learner = copy.deepcopy(net)
    optimizer, own = adam(learner, fused=True), list(learner.parameters())

    def adapted(batches: Batches) -> list[Tensor]:
        with torch.no_grad():
            torch._foreach_copy_(own, list(net.parameters()))
        steps(functools.partial(loss, learner), optimizer, batches)
        return [p.detach() for p in own]

    return adapted


def by_higher(net: nn.Module) -> Adapted:
    """higher's inner loop, without a graph through its steps."""
    optimizer = adam(net)  # never steps itself: higher takes its settings

    def adapted(batches: Batches) -> list[Tensor]:
        with higher.innerloop_ctx(net, optimizer, track_higher_grads=False) as (learner, inner):
            for x, y in batches:
                inner.step(F.cross_entropy(learner(x), y))
            return [p.detach() for p in learner.parameters()]

    return adapted


def peer(size: int, draw: Draw, inner_loop: Callable[[nn.Module], Adapted]) -> Callable[[], None]:
    """A peer's loop around a network in torch's default memory format."""
    net = conv4(size, memory_format=torch.contiguous_format)
    return by_hand(net, draw, inner_loop(net))


def by_torch(
    net: nn.Module, batch: tuple[Tensor, Tensor], *, compiled: bool = False
) -> Callable[[], None]:
    """The passes and steps of fused Adam alone: no tasks, copies or masks."""

    def run(x: Tensor, y: Tensor) -> Tensor:
        return loss(net, x, y)

    if compiled:
        run = torch.compile(run, dynamic=False)
    return functools.partial(steps, run, adam(net, fused=True), [batch] * (TASKS * STEPS))


def processor() -> str:
    """What the processor says that it can do, where the system tells."""
    told = Path("/proc/cpuinfo")
    return told.read_text() if told.exists() else ""


def main(rounds: int) -> None:
    table = []
    compiled, in_bf16 = CompiledStep(loss), functools.partial(plain_step, loss=loss_in_bf16)
    for size in (28, 84):
        draw, batch = draw_tasks(size), minibatch(size)
        plain = conv4(size, memory_format=torch.contiguous_format)
        variants = {
            "forward + backward": functools.partial(passes, plain, [batch] * (TASKS * STEPS)),
            "channels-last": functools.partial(passes, conv4(size), [batch] * (TASKS * STEPS)),
            "channels-last, 32 channels": functools.partial(
                passes, conv4(size, 32), [batch] * (TASKS * STEPS)
            ),
            "passes and Adam": by_torch(conv4(size), batch),
            "compiled passes and Adam": by_torch(conv4(size), batch, compiled=True),
            "compiled passes and Adam, 32 channels": by_torch(
                conv4(size, 32), batch, compiled=True
            ),
            "by hand, one copy and Adam": by_hand(net := conv4(size), draw, by_one_copy(net)),
            "PrunedReptile, dense": reptile(size, draw, DENSE),
            "PrunedReptile, 50% masked": reptile(size, draw, SPARSE),
            "PrunedReptile, 50% of channels": reptile(
                size, draw, SPARSE, structured=Structured(batch[0])
            ),
            "task masks, 50%": reptile(size, draw, PER_TASK),
            "50% of channels in each task": reptile(
                size, draw, PER_TASK, structured=Structured(batch[0])
            ),
            "compiled, dense": reptile(size, draw, DENSE, compiled),
            "compiled, 50% masked": reptile(size, draw, SPARSE, compiled),
            "compiled, 50% of channels": reptile(
                size, draw, SPARSE, compiled, Structured(batch[0])
            ),
            "learn2learn's loop, dense": peer(size, draw, by_copies),
            "learn2learn's loop, torch's masks": peer(
                size, draw, functools.partial(by_copies, pruned=True)
            ),
            "higher, dense": peer(size, draw, by_higher),
        }
        # A CPU without these instructions takes seconds at 84x84.
        if device().type != "cpu" or "avx512_bf16" in processor():
            variants |= {
                "bf16 autocast, dense": reptile(size, draw, DENSE, in_bf16),
                "bf16 autocast, 50% masked": reptile(size, draw, SPARSE, in_bf16),
                "bf16 compiled, dense": reptile(size, draw, DENSE, CompiledStep(loss_in_bf16)),
            }
        times = interleaved(variants, rounds)
        table += rows(times, "forward + backward", f"{size}x{size}")
    show(__doc__.split("\n")[0], ("images", "variant", "seconds", "ratio", "middle half"), table)
