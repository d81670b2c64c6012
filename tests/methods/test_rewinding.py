from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from l2l_prune import DSDSchedule, PrunedReptile, Pruner, Schedule, Segment
from l2l_prune.channels.pruner import Structured
from l2l_prune.masking import criteria
from l2l_prune.methods.rewinding import Rewind
from l2l_prune.schedules.common import one_shot

SCHEDULE = Schedule(
    (
        Segment(3),
        Segment(2, sparse=True, sparsity=0.3),
        Segment(2, sparse=True, sparsity=0.6),
    )
)


def train(net, optimizer, seed):
    x, y = (
        torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(seed)),
        torch.arange(8) % 3,
    )
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("to", [0, 2, 3])
def test_tickets_are_early_values_under_the_late_mask(net, to):
    """A plain loop that cuts, goes back and restarts its optimizer by hand gives the same."""
    plain = copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    pruner = Pruner(net, SCHEDULE, optimizer)
    Rewind(pruner, to=to)
    for iteration in range(7):
        train(net, optimizer, iteration)
        pruner.step()

    theirs, masks = torch.optim.Adam(plain.parameters(), lr=0.01), {}
    weights = {n: p for n, p in plain.named_parameters() if n in pruner.masks}
    for iteration in range(7):
        if iteration == to:
            early = {n: p.detach().clone() for n, p in plain.named_parameters()}
        if iteration in (3, 5):
            rate = {3: 0.3, 5: 0.6}[iteration]
            for name, weight in weights.items():
                order = weight.detach().abs().flatten().argsort(descending=True, stable=True)
                masks[name] = torch.zeros(weight.numel())
                masks[name][order[: weight.numel() - round(rate * weight.numel())]] = 1
                masks[name] = masks[name].view(weight.shape)
            with torch.no_grad():
                for name, p in plain.named_parameters():
                    p.copy_(early[name] * masks.get(name, 1))
            theirs = torch.optim.Adam(plain.parameters(), lr=0.01)
        x = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(iteration))
        theirs.zero_grad()
        F.cross_entropy(plain(x), torch.arange(8) % 3).backward()
        for name, weight in weights.items():
            weight.grad.mul_(masks.get(name, 1))
        theirs.step()
    pruner.finalize()
    for (name, mine), other in zip(net.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("inside", [False, True])
def test_weights_of_the_iteration_that_prunes_first_are_kept_dense(net, inside):
    """A weight that the first round prunes and the second keeps goes back to its early value."""
    rounds = Schedule((Segment(3), Segment(2, sparse=True, sparsity=0.5)) * 2)
    scores = torch.Generator().manual_seed(0)  # two masks that are not nested
    if inside:
        trainer = PrunedReptile(net, rounds, criterion=criteria.random(scores))
    else:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        trainer = Pruner(net, rounds, optimizer, criterion=criteria.random(scores))
    pruner = trainer.pruner if inside else trainer
    Rewind(trainer, to=3)
    early = {}

    def watch(*_):
        if pruner.iteration == 2:  # the masks come at the end of this step
            early.update({n: w.detach().clone() for n, w in pruner.weights.items()})

    pruner.register_step_pre_hook(watch)
    masks = []
    for iteration in range(8):
        if inside:
            learner = trainer.clone()
            learner.adapt(learner(torch.randn(4, 1, 6, 6)).square().mean())
            trainer.collect(learner)
        else:
            train(net, optimizer, iteration)
        trainer.step()
        if iteration in (2, 7):
            masks.append({name: mask.clone() for name, mask in pruner.masks.items()})
    for name, weight in pruner.weights.items():
        assert (masks[1][name] & ~masks[0][name]).any()
        assert torch.equal(weight.detach(), early[name] * masks[1][name]), name


def test_reptile_goes_back_and_forgets_its_inner_state(net):
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    reptile = PrunedReptile(net, one_shot(0.5, pretrain=2, prune=2))
    Rewind(reptile)
    for _ in range(2):
        learner = reptile.clone()
        learner.adapt(learner(torch.randn(4, 1, 6, 6)).square().mean())
        reptile.collect(learner)
        reptile.step()
    for name, value in start.items():
        mask = reptile.pruner.masks.get(name, torch.ones_like(value).bool())
        stored = dict(net.named_parameters()).get(
            f"{name}_orig", dict(net.named_parameters()).get(name)
        )
        assert torch.equal(stored, value * mask)
    assert reptile.get_extra_state()["inner_state"] == []


def test_a_resumed_run_goes_back_to_the_same_values(net):
    twin = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = Pruner(net, SCHEDULE, optimizer)
    rewind = Rewind(pruner, to=1)
    for iteration in range(2):
        train(net, optimizer, iteration)
        pruner.step()
    other = torch.optim.SGD(twin.parameters(), lr=0.1)
    resumed = Pruner(twin, SCHEDULE, other)
    again = Rewind(resumed, to=1)
    twin.load_state_dict(net.state_dict())
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(pruner.state_dict())
    again.load_state_dict(rewind.state_dict())
    for iteration in range(2, 7):
        for model, stepped, held in ((net, optimizer, pruner), (twin, other, resumed)):
            train(model, stepped, iteration)
            held.step()
    assert all(map(torch.equal, net.state_dict().values(), twin.state_dict().values()))


def test_misuse(net):
    structured = PrunedReptile(
        copy.deepcopy(net), SCHEDULE, structured=Structured(torch.zeros(2, 1, 6, 6))
    )
    with pytest.raises(TypeError, match="Rewind takes a Pruner"):
        Rewind(structured)
    with pytest.raises(TypeError, match="Rewind takes a Pruner"):
        Rewind(net)
    pruner = Pruner(net, SCHEDULE)
    with pytest.raises(ValueError, match="at iteration 3"):
        Rewind(pruner, to=4)
    with pytest.raises(ValueError, match="the schedule has none"):
        Rewind(Pruner(nn.Linear(3, 2), Schedule((Segment(3),))))
    at_once = Pruner(nn.Linear(3, 2), DSDSchedule(0.5, pretrain=0, prune=1, retrain=1))
    with pytest.raises(ValueError, match="begin the schedule with a dense segment"):
        Rewind(at_once)
    pruner.step()
    with pytest.raises(ValueError, match="make Rewind at iteration 0"):
        Rewind(pruner)
    fresh = Rewind(Pruner(nn.Linear(3, 2), DSDSchedule(0.5, pretrain=1, prune=1, retrain=1)))
    with pytest.raises(ValueError, match="of another model"):
        fresh.load_state_dict({"values": [torch.zeros(1)]})
