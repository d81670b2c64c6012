"""Two processes: nccl on two GPUs, gloo on the CPU."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from l2l_prune import PrunedReptile, Pruner
from tests.cuda.place import SCHEDULE, Place, assert_alike, loss_of, network, on_device
from tests.cuda.pruner_checks import adam, sgd
from tests.ranks import RANKS, on_two_ranks

# Carried state is averaged over ranks, so that only without it one process does the same.
PLAIN = {"inner_optimizer": torch.optim.Adam}  # counts its steps on the CPU
KINDS = {"adam": {}, "plain adam": PLAIN, "carried": {}, "carried plain": PLAIN}


def reptile_trace(device, kind, tasks, group=None):
    options = {"carry_state": "carried" in kind, **KINDS[kind], "group": group}
    reptile = PrunedReptile(network().to(device), SCHEDULE, inner_lr=0.01, **options)
    for iteration in range(SCHEDULE.iterations):
        for task in tasks:
            learner = reptile.clone()
            learner.adapt(loss_of(learner, 10 * iteration + task, device))
            reptile.collect(learner)
        reptile.step()
    return on_device(device, dict(reptile.module.named_parameters()), reptile.pruner.masks)


def pruner_trace(device, make, ranks, model_of=lambda net: net):
    """With the gradients of the mean over the ranks' batches."""
    net = network().eval().to(device)  # running statistics are no part of this comparison
    model = model_of(net)
    optimizer, trace = make(net.parameters(), device), {}
    pruner = Pruner(model, SCHEDULE, optimizer)
    for number in range(SCHEDULE.iterations):
        optimizer.zero_grad()
        for rank in ranks:
            (loss_of(model, 10 * number + rank, device) / len(ranks)).backward()
        optimizer.step()
        pruner.step()
        masks = {name.removeprefix("module."): mask for name, mask in pruner.masks.items()}
        values = on_device(device, dict(net.named_parameters()), masks)
        trace |= {f"{number}: {name}": value for name, value in values.items()}
    return trace


def work(rank, kind, folder, fault):
    """A rank's part; its traces go into files."""
    device = f"cuda:{rank}" if kind == "cuda" else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{folder}/store", rank=rank, world_size=RANKS)
    with fault():
        wrapped = functools.partial(
            DistributedDataParallel, device_ids=[rank] if kind == "cuda" else None
        )
        for make in (sgd, adam):
            trace = pruner_trace(device, make, [rank], wrapped)
            torch.save(trace, f"{folder}/{make.__name__} {rank}.pt")
        for name in KINDS:
            trace = reptile_trace(device, name, [rank], dist.group.WORLD)
            torch.save(trace, f"{folder}/{name} reptile {rank}.pt")
    dist.destroy_process_group()


def two_ranks(place: Place) -> None:
    kind = torch.device(place.device).type
    if kind == "cuda" and torch.cuda.device_count() < RANKS:
        pytest.skip("there is one GPU only")
    on_two_ranks(work, kind, str(place.folder), place.fault)

    def saved(name):
        return [
            torch.load(place.folder / f"{name} {rank}.pt", map_location="cpu", weights_only=True)
            for rank in range(RANKS)
        ]

    for make in (sgd, adam):
        first, second = saved(make.__name__)
        assert_alike(second, first, atol=0)
        assert_alike(first, pruner_trace("cpu", make, range(RANKS)))
    for name in KINDS:
        first, second = saved(f"{name} reptile")
        assert_alike(second, first, atol=0)
        if "carried" not in name:
            assert_alike(first, reptile_trace("cpu", name, range(RANKS)))
