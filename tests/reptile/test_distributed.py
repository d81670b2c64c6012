"""DistributedDataParallel on two CPU processes: masks and weights are the same on both ranks."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from l2l_prune import DSDSchedule, PrunedReptile, Pruner, Schedule, Segment
from l2l_prune.masking import criteria
from l2l_prune.methods.regrowth import Regrowth
from tests.conftest import SmallNet
from tests.ranks import RANKS, on_two_ranks

SCHEDULE = DSDSchedule(0.5, pretrain=2, prune=3, retrain=2)


def batch(iteration, rank):
    generator = torch.Generator().manual_seed(10 * iteration + rank)
    x = torch.randn(4, 1, 6, 6, generator=generator)
    return x, torch.randint(0, 3, (4,), generator=generator)


def train(rank, folder, attach):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
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
        both = [torch.empty_like(masks) for _ in range(RANKS)]
        dist.all_gather(both, masks)
        assert all(torch.equal(m, masks) for m in both)
    torch.save(pruner.finalize().state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.process
@pytest.mark.parametrize("attach", ["before", "after"])
def test_two_ranks_equal_one_process(tmp_path, attach):
    on_two_ranks(train, str(tmp_path), attach)
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


def train_maml(rank, folder):
    """cherry's and learn2learn's distributed loops: each rank its tasks, gradients averaged."""
    import learn2learn as l2l

    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    maml = l2l.algorithms.MAML(SmallNet().eval(), lr=0.1)
    optimizer = torch.optim.Adam(maml.parameters(), lr=0.01)
    pruner = Pruner(maml, SCHEDULE, optimizer)
    for iteration in range(SCHEDULE.iterations):
        optimizer.zero_grad()
        maml_loss(maml, batch(iteration, rank)).backward()
        for parameter in maml.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= RANKS
        optimizer.step()
        pruner.step()
    torch.save(pruner.finalize().state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def maml_loss(maml, data):
    learner = maml.clone()
    learner.adapt(F.cross_entropy(learner(data[0]), data[1]))
    return F.cross_entropy(learner(data[0]), data[1])


@pytest.mark.process
def test_distributed_meta_optimizer_loop(tmp_path):
    l2l = pytest.importorskip("learn2learn")
    on_two_ranks(train_maml, str(tmp_path))
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


def reptile_on_ranks(rank, folder, carry_state):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.manual_seed(rank)  # the ranks need not agree on the start
    sparse_at_once = DSDSchedule(0.5, pretrain=0, prune=1, retrain=1)
    early = PrunedReptile(SmallNet(), sparse_at_once, group=dist.group.WORLD)
    mask = early.pruner.masks["fc.weight"].int()
    both = [torch.empty_like(mask) for _ in range(RANKS)]
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


@pytest.mark.process
@pytest.mark.parametrize("carry_state", [False, True])
def test_reptile_shares_its_tasks(tmp_path, carry_state):
    on_two_ranks(reptile_on_ranks, str(tmp_path), carry_state)
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


class TwoHeads(nn.Module):
    """A body that all ranks train, and a head of another size for each."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(36, 8)
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 5)])

    def forward(self, x, head):
        return self.heads[head](self.body(x.flatten(1)).relu())


def head_for_each_rank(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    reptile = PrunedReptile(TwoHeads(), SCHEDULE, group=dist.group.WORLD)
    for iteration in range(3):
        x, y = batch(iteration, rank)
        learner = reptile.clone()
        learner.adapt(F.cross_entropy(learner(x, rank), y))
        reptile.collect(learner)
        reptile.step()
        torch.save(reptile.state_dict(), f"{folder}/{rank}-{iteration}.pt")
    dist.destroy_process_group()


@pytest.mark.process
def test_a_state_that_only_one_rank_has_is_taken_over_by_the_others(tmp_path):
    on_two_ranks(head_for_each_rank, str(tmp_path))
    for iteration in range(3):
        first, second = (
            torch.load(tmp_path / f"{rank}-{iteration}.pt", weights_only=True) for rank in (0, 1)
        )
        states = [state.pop("_extra_state")["inner_state"] for state in (first, second)]
        assert all(torch.equal(first[name], second[name]) for name in first)
        for mine, theirs in zip(*states, strict=True):
            assert all(torch.equal(mine[key], theirs[key]) for key in ("step", "exp_avg_sq"))
        if iteration == 0:
            start = states[0]
    torch.manual_seed(0)
    net = TwoHeads()
    gradients = []
    for rank in (0, 1):
        x, y = batch(0, rank)
        loss = F.cross_entropy(net(x, rank), y)
        gradients.append(torch.autograd.grad(loss, list(net.parameters()), allow_unused=True))
    for state, *of_ranks in zip(start, *gradients, strict=True):
        squares = torch.stack([g.square() for g in of_ranks if g is not None])
        assert state["step"] == 1
        assert torch.allclose(state["exp_avg_sq"], 0.001 * squares.mean(0), rtol=1e-4)


SPARSE = Schedule((Segment(1), Segment(6, sparse=True, sparsity=0.5), Segment(1)))
ON_OWN_DATA = ("random", "grasp", "set", "rigl")  # what differs between ranks by itself


def options_of(what, net, data, seed):
    """The Pruner's criterion, and what regrows; both see a rank's own data and numbers."""

    def loss():
        return sum(F.cross_entropy(net(x), y) for x, y in data)

    generator = torch.Generator().manual_seed(seed)
    criterion = {
        "random": criteria.random(generator),
        "grasp": criteria.grasp(loss, net.parameters()),
    }.get(what, criteria.magnitude)
    regrowth = {"set": {"generator": generator}, "rigl": {"loss": loss}}.get(what)
    return criterion, regrowth


def masks_of_reptile(what, data, tasks, seed, group=None):
    """Masks after each step of Reptile on ``tasks``, with scores from ``data``."""
    torch.manual_seed(0)
    net = SmallNet().eval()
    criterion, regrowth = options_of(what, net, data, seed)
    sgd = torch.optim.SGD
    reptile = PrunedReptile(net, SPARSE, inner_optimizer=sgd, criterion=criterion, group=group)
    if regrowth is not None:
        Regrowth(reptile.pruner, interval=2, fraction=0.5, **regrowth)
    found = []
    for iteration in range(8):
        iterate(reptile, iteration, tasks)
        found.append({name: mask.clone() for name, mask in reptile.pruner.masks.items()})
    return found


def masks_under_ddp(what, rank, attach):
    torch.manual_seed(0)
    net = SmallNet().eval()
    criterion, regrowth = options_of(what, net, [batch(9, rank)], rank)
    model = DistributedDataParallel(net) if attach == "after" else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    group = dist.group.WORLD if attach == "before" else None
    pruner = Pruner(model, SPARSE, optimizer, criterion=criterion, group=group)
    if attach == "before":
        model = DistributedDataParallel(net)
    if what == "rigl" and attach == "after":
        regrowth = {"loss": lambda: F.cross_entropy(model(batch(9, rank)[0]), batch(9, rank)[1])}
    if regrowth is not None:
        Regrowth(pruner, interval=2, fraction=0.5, **regrowth)
    found = []
    for iteration in range(8):
        optimizer.zero_grad()
        x, y = batch(iteration, rank)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()
        names = (name.removeprefix("module.") for name in pruner.masks)
        masks = (mask.clone() for mask in pruner.masks.values())
        found.append(dict(zip(names, masks, strict=True)))
    return found


def ranks_on_own_data(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    found = {}
    for what in ON_OWN_DATA:
        data = [batch(9, rank)]
        found[f"{what} reptile"] = masks_of_reptile(what, data, [rank], rank, dist.group.WORLD)
        for attach in ("before", "after"):
            found[f"{what} {attach}"] = masks_under_ddp(what, rank, attach)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.process
def test_ranks_choose_together_what_differs_by_data_and_chance(tmp_path):
    on_two_ranks(ranks_on_own_data, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    differing = {
        f"{case}, step {step}, {name}": int((mask != second[case][step][name]).sum())
        for case, steps in first.items()
        for step, masks in enumerate(steps)
        for name, mask in masks.items()
    }
    assert {place: count for place, count in differing.items() if count} == {}
    # RigL's gradients are those of the loss of all ranks' data, and SET's numbers the first rank's.
    both = masks_of_reptile("rigl", [batch(9, 0), batch(9, 1)], [0, 1], 0)
    for name, masks in (("rigl", both), ("set", masks_of_reptile("set", [], [0, 1], 0))):
        for mine, alone in zip(first[f"{name} reptile"], masks, strict=True):
            assert all(torch.equal(mine[key], alone[key]) for key in alone)
        assert not torch.equal(masks[1]["fc.weight"], masks[5]["fc.weight"])


def failing_ranks(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    net = SmallNet()
    pruner = Pruner(net, SPARSE, group=dist.group.WORLD)
    before = pruner.masks
    with torch.no_grad():
        net.fc.weight_orig.fill_(float("nan") if rank else 1.0)
    error = (ValueError, "fc.weight.*NaN") if rank else (RuntimeError, "rank 1 of the group failed")
    with pytest.raises(error[0], match=error[1]):
        pruner.step()
    assert pruner.iteration == 0
    assert all(map(torch.equal, pruner.masks.values(), before.values()))
    with torch.no_grad():
        net.fc.weight_orig.copy_(torch.arange(48.0).view(3, 16))
    pruner.step()
    before = {name: mask.clone() for name, mask in pruner.masks.items()}
    shifted = before["fc.weight"].roll(rank)
    with pytest.raises(
        RuntimeError, match=r"masks of fc\.weight differ between the ranks at it.* 1"
    ):
        pruner.replace_masks({"fc.weight": shifted})
    assert all(map(torch.equal, pruner.masks.values(), before.values()))
    if rank:
        pruner.step()
    with pytest.raises(RuntimeError, match="at iterations 1 to 2: load the checkpoint on all"):
        pruner.replace_masks({})
    reptile = PrunedReptile(SmallNet(), SPARSE, group=dist.group.WORLD)
    iterate(reptile, 0, [rank])
    if rank:  # the other rank forgets to load the checkpoint
        state = reptile.state_dict()
        state["_extra_state"]["pruner"]["iteration"] = 3
        reptile.load_state_dict(state)
    weights = [p.clone() for p in reptile.parameters()]
    with pytest.raises(RuntimeError, match="at iterations 1 to 3: load the checkpoint on all"):
        iterate(reptile, 1, [rank])
    assert all(map(torch.equal, weights, reptile.parameters()))
    dist.destroy_process_group()


@pytest.mark.process
def test_ranks_that_disagree_fail_together(tmp_path):
    on_two_ranks(failing_ranks, str(tmp_path))


def without_group(rank, folder):
    """DDP writes the first rank's masks into the others' buffers, and no version tells."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    net = SmallNet()
    scores = criteria.random(torch.Generator().manual_seed(rank))
    pruner = Pruner(net, SCHEDULE, criterion=scores)
    model = DistributedDataParallel(net)
    refused = pytest.raises(RuntimeError, match="DistributedDataParallel give Pruner its group=")
    with refused if rank else contextlib.nullcontext():
        for iteration in range(5):
            model(batch(iteration, rank)[0]).sum().backward()
            pruner.step()
        assert rank == 0
    assert pruner.iteration == (4 if rank else 5)
    dist.destroy_process_group()


@pytest.mark.process
def test_masks_that_ddp_has_overwritten_are_noticed(tmp_path):
    on_two_ranks(without_group, str(tmp_path))


def test_a_pruner_of_one_process_has_no_group(net):
    assert Pruner(net, SPARSE).group is None
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed ProcessGroup"):
        Pruner(SmallNet(), SPARSE, group="world")


def torchrun(folder, checkpoint, wrapper="", restarts=0):
    """The example under torchrun; ``wrapper`` is code that runs before it in each rank."""
    example = Path(__file__).parents[2] / "examples" / "distributed" / "reptile.py"
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


@pytest.mark.process
@pytest.mark.slow
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
