"""Ranks that train the same network: they notice when its weights are no longer the same."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from l2l_prune import DSDSchedule
from l2l_prune.channels.pruner import ChannelPruner
from tests.ranks import RANKS, on_two_ranks

pytest.importorskip("torch_pruning")

SCHEDULE = DSDSchedule(0.5, pretrain=2, prune=2, retrain=2)


def batch(iteration):
    given = torch.Generator().manual_seed(iteration)
    return torch.randn(4, 4, dtype=torch.float64, generator=given)


def start(group=None):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    made = ChannelPruner(net, SCHEDULE, optimizer, example_inputs=batch(0), group=group)
    return net, optimizer, made


def train(model, optimizer, made, parts, average=lambda: None):
    for iteration in range(SCHEDULE.iterations):
        optimizer.zero_grad()
        for part in parts:
            ((model(batch(iteration)[part]) - 1).square().mean() / RANKS).backward()
        average()
        optimizer.step()
        made.step()


def train_rank(rank, folder, how):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    net, optimizer, made = start(dist.group.WORLD)
    mine = [slice(2 * rank, 2 * rank + 2)]

    def average():
        for parameter in net.parameters():
            dist.all_reduce(parameter.grad)

    try:
        if how == "by hand":
            train(net, optimizer, made, mine, average)
        else:
            around = DistributedDataParallel(net, find_unused_parameters=True)
            train(around, optimizer, made, mine)
    except RuntimeError as error:
        torch.save((made.iteration, made.sparse, str(error)), f"{folder}/{rank}.pt")
    else:
        torch.save(net.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.process
def test_ranks_that_average_by_hand_equal_one_process(tmp_path):
    on_two_ranks(train_rank, str(tmp_path), "by hand")
    net, optimizer, made = start()
    train(net, optimizer, made, [slice(0, 2), slice(2, 4)])
    for rank in range(RANKS):
        theirs = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.allclose(net.state_dict()[n], t, atol=1e-12) for n, t in theirs.items())


@pytest.mark.process
def test_ranks_notice_that_distributed_data_parallel_has_lost_track(tmp_path):
    """It was put around the network later, and stops averaging at the cut, after iteration 2."""
    on_two_ranks(train_rank, str(tmp_path), "wrapped")
    for rank in range(RANKS):
        iteration, sparse, error = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert (iteration, sparse) == (3, True)  # at the next change, and before it
        assert error.startswith("the weights of 0.weight, 0.bias, 2.weight differ between")
        assert "average the gradients by hand" in error


def test_a_distributed_part_put_in_later_is_refused_at_the_change():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        net, _, made = start()
        net[0] = DistributedDataParallel(net[0])
        made.step()
        with pytest.raises(RuntimeError, match="would stop averaging gradients"):
            made.step()
        assert net[0].module.weight.shape == (8, 4)
    finally:
        dist.destroy_process_group()


def lack_gradients(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    schedule = DSDSchedule(0.5, pretrain=1, prune=2, retrain=2)
    x, group = torch.ones(2, 4), dist.group.WORLD
    made = ChannelPruner(net, schedule, example_inputs=x, importance="taylor", group=group)
    if rank == 0:
        net(x).sum().backward()
    words = "rank 1 of the group failed" if rank == 0 else "gradient"
    with pytest.raises((RuntimeError, ValueError), match=words):
        made.step()
    assert not made.sparse
    dist.destroy_process_group()


@pytest.mark.process
def test_a_rank_without_gradients_keeps_no_other_waiting(tmp_path):
    on_two_ranks(lack_gradients, str(tmp_path))
