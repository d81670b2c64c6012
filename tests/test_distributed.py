"""DistributedDataParallel on two CPU processes: masks and weights are the same on both ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing as mp
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from l2l_prune import DSDSchedule, Pruner
from tests.conftest import SmallNet

SCHEDULE = DSDSchedule(0.5, pretrain=2, prune=3, retrain=2)


def batch(iteration, rank):
    generator = torch.Generator().manual_seed(10 * iteration + rank)
    x = torch.randn(4, 1, 6, 6, generator=generator)
    return x, torch.randint(0, 3, (4,), generator=generator)


def train(rank, ranks, folder, attach):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    net = SmallNet().eval()  # running statistics are no part of this comparison
    model = None if attach == "before" else DistributedDataParallel(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    pruner = Pruner(model or net, SCHEDULE, optimizer)
    model = model or DistributedDataParallel(net)
    for iteration in range(SCHEDULE.iterations):
        optimizer.zero_grad()
        x, y = batch(iteration, rank)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()
        masks = torch.cat([m.flatten() for m in pruner.masks.values()]).int()
        both = [torch.empty_like(masks) for _ in range(ranks)]
        dist.all_gather(both, masks)
        assert all(torch.equal(m, masks) for m in both)
    torch.save(pruner.finalize().state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("attach", ["before", "after"])
def test_two_ranks_equal_one_process(tmp_path, attach):
    mp.spawn(train, args=(2, str(tmp_path), attach), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first)
    torch.manual_seed(0)
    net = SmallNet().eval()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    pruner = Pruner(net, SCHEDULE, optimizer)
    for iteration in range(SCHEDULE.iterations):
        optimizer.zero_grad()
        for rank in (0, 1):
            x, y = batch(iteration, rank)
            (F.cross_entropy(net(x), y) / 2).backward()
        optimizer.step()
        pruner.step()
    for (name, value), other in zip(
        pruner.finalize().state_dict().items(), first.values(), strict=True
    ):
        assert torch.allclose(value, other, atol=1e-5), name


def train_maml(rank, ranks, folder):
    """cherry's and learn2learn's distributed loops: each rank its tasks, gradients averaged."""
    import learn2learn as l2l

    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    maml = l2l.algorithms.MAML(SmallNet().eval(), lr=0.1)
    optimizer = torch.optim.Adam(maml.parameters(), lr=0.01)
    pruner = Pruner(maml, SCHEDULE, optimizer)
    for iteration in range(SCHEDULE.iterations):
        optimizer.zero_grad()
        maml_loss(maml, batch(iteration, rank)).backward()
        for parameter in maml.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= ranks
        optimizer.step()
        pruner.step()
    torch.save(pruner.finalize().state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def maml_loss(maml, data):
    learner = maml.clone()
    learner.adapt(F.cross_entropy(learner(data[0]), data[1]))
    return F.cross_entropy(learner(data[0]), data[1])


def test_distributed_meta_optimizer_loop(tmp_path):
    l2l = pytest.importorskip("learn2learn")
    mp.spawn(train_maml, args=(2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first)
    torch.manual_seed(0)
    maml = l2l.algorithms.MAML(SmallNet().eval(), lr=0.1)
    optimizer = torch.optim.Adam(maml.parameters(), lr=0.01)
    pruner = Pruner(maml, SCHEDULE, optimizer)
    for iteration in range(SCHEDULE.iterations):
        optimizer.zero_grad()
        for rank in (0, 1):
            (maml_loss(maml, batch(iteration, rank)) / 2).backward()
        optimizer.step()
        pruner.step()
    alone = pruner.finalize().state_dict()
    assert all(torch.allclose(alone[k], first[k], atol=1e-5) for k in first)
