"""DistributedDataParallel on two CPU processes: masks and weights are the same on both ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing as mp
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from l2l_prune import DSDSchedule, PrunedReptile, Pruner
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


def reptile_of(group, carry_state):
    torch.manual_seed(0)
    net = SmallNet()
    return PrunedReptile(net, SCHEDULE, carry_state=carry_state, group=group)


def iterate(reptile, iteration, tasks):
    for task in tasks:
        learner = reptile.clone()
        x, y = batch(iteration, task)
        for _ in range(2):
            learner.adapt(F.cross_entropy(learner(x), y))
        reptile.collect(learner)
    reptile.step()


def reptile_on_ranks(rank, ranks, folder, carry_state):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.manual_seed(rank)  # the ranks need not agree on the start
    sparse_at_once = DSDSchedule(0.5, pretrain=0, prune=1, retrain=1)
    early = PrunedReptile(SmallNet(), sparse_at_once, group=dist.group.WORLD)
    mask = early.pruner.masks["fc.weight"].int()
    both = [torch.empty_like(mask) for _ in range(ranks)]
    dist.all_gather(both, mask)
    assert torch.equal(*both)
    reptile = PrunedReptile(
        SmallNet() if rank else reptile_of(None, True).finalize(),
        SCHEDULE,
        carry_state=carry_state,
        group=dist.group.WORLD,
    )
    shares = ((0, 1, 2), (3,))  # need not be equal
    for iteration in range(SCHEDULE.iterations):
        iterate(reptile, iteration, shares[rank])
        masks = {name: mask.clone() for name, mask in reptile.pruner.masks.items()}
        torch.save((masks, reptile.state_dict()), f"{folder}/{rank}-{iteration}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("carry_state", [False, True])
def test_reptile_shares_its_tasks(tmp_path, carry_state):
    mp.spawn(reptile_on_ranks, args=(2, str(tmp_path), carry_state), nprocs=2)
    alone = reptile_of(None, carry_state)
    for iteration in range(SCHEDULE.iterations):
        iterate(alone, iteration, range(4))
        (first_masks, first), (second_masks, second) = (
            torch.load(tmp_path / f"{rank}-{iteration}.pt", weights_only=True) for rank in (0, 1)
        )
        for name, mask in first_masks.items():
            assert torch.equal(mask, second_masks[name])
        for name, value in first.items():
            if name == "_extra_state":
                continue
            assert torch.equal(value, second[name]), name
            # A bias before batch normalisation has no gradient but rounding, which Adam blows up.
            if not carry_state and name != "module.conv1.bias":
                assert torch.allclose(value, alone.state_dict()[name], atol=1e-6), name
        states = [state["_extra_state"]["inner_state"] for state in (first, second)]
        for mine, theirs in zip(*states, strict=True):
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)
            assert bool(mine) == carry_state


def torchrun(folder, checkpoint, wrapper="", restarts=0):
    """The example under torchrun; ``wrapper`` is code that runs before it in each rank."""
    example = Path(__file__).parents[1] / "examples" / "distributed" / "reptile.py"
    script = folder / "script.py"
    run = f"runpy.run_path({str(example)!r}, run_name='__main__')"
    script.write_text(f"import runpy\n{wrapper}\n{run}\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, f"--max-restarts={restarts}", str(script), str(checkpoint), "20"],
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
    )


KILL_ONE_RANK = """
import os, signal
from l2l_prune import PrunedReptile
step = PrunedReptile.step
def dying_step(self):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and self.iteration == 12 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    step(self)
PrunedReptile.step = dying_step
"""


def test_a_run_with_a_killed_rank_goes_on_from_its_checkpoint(tmp_path):
    whole, killed = tmp_path / "whole.pt", tmp_path / "killed.pt"
    done = torchrun(tmp_path, whole)
    assert done.returncode == 0, done.stderr
    done = torchrun(tmp_path, killed, KILL_ONE_RANK, restarts=1)
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr  # it was killed
    assert done.stdout.split() == ["5", "pretrain", "10", "prune", "15", "prune", "20", "retrain"]
    expected, found = (torch.load(path, weights_only=True) for path in (whole, killed))
    assert all(
        torch.equal(value, found[name])
        for name, value in expected.items()
        if isinstance(value, torch.Tensor)
    )
