"""Dropout held for a task, against a network that is multiplied by its masks by hand; float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from l2l_prune import DSDSchedule, PrunedReptile, TaskDropout
from l2l_prune.reptile.batched import BatchedLearners
from tests.reptile.test_reptile import adapt, task

P = 0.4
SCHEDULE = DSDSchedule(0.5, pretrain=1, prune=2, retrain=1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Net(nn.Module):
    """Units of a map are dropped, then whole channels, then units of a vector."""

    def __init__(self, first=None, second=None, third=None) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 3)
        self.fc = nn.Linear(20, 3)
        self.first = first or nn.Dropout(P)
        self.second = second or nn.Dropout2d(P)
        self.third = third or nn.Dropout(P)

    def forward(self, x):
        x = self.first(torch.tanh(self.conv1(x)))
        x = self.second(torch.tanh(self.conv2(x)))
        return self.fc(self.third(x.flatten(1)))


class Times(nn.Module):
    """The same factors for every example."""

    factor = torch.tensor(1.0)

    def forward(self, x):
        return x * self.factor


SHAPES = ((4, 4, 4), (5, 1, 1), (20,))


def masks_by_hand(draws):
    """For each layer in turn a seed; from it the units that stay, which are scaled."""
    for shape in SHAPES:
        seed = int(torch.randint(2**62, (), generator=draws))
        stays = torch.rand(shape, generator=generator(seed)) >= P
        yield (stays / (1 - P)).double()


def test_each_task_keeps_one_mask_for_all_examples_and_steps():
    net = Net()
    TaskDropout.replace_in(net)
    net.double()
    oracle = Net(Times(), Times(), Times()).double()
    oracle.load_state_dict(net.state_dict())  # masks are no part of it
    reptile = PrunedReptile(
        net, SCHEDULE, inner_lr=0.05, meta_lr_final=1.0, inner_optimizer=torch.optim.SGD
    )
    draws, again = generator(), generator()
    for iteration in range(SCHEDULE.iterations):
        masks, batches = (
            reptile.pruner.masks,
            [task(10 * iteration + n, torch.float64) for n in (0, 1)],
        )
        learners = [reptile.clone() for _ in range(2)]
        for learner in learners:
            TaskDropout.draw(learner, draws)
        for steps in zip(*batches, strict=True):  # the tasks take turns
            for learner, (x, y) in zip(learners, steps, strict=True):
                learner.adapt(F.cross_entropy(learner(x), y))
        for learner in learners:
            reptile.collect(learner)
        reptile.step()

        ends = []
        for own in batches:
            twin = copy.deepcopy(oracle)
            for layer, factor in zip(
                (twin.first, twin.second, twin.third), masks_by_hand(again), strict=True
            ):
                layer.factor = factor
            for x, y in own:
                found = torch.autograd.grad(F.cross_entropy(twin(x), y), [*twin.parameters()])
                with torch.no_grad():
                    for (name, weight), g in zip(twin.named_parameters(), found, strict=True):
                        weight.sub_(0.05 * g).mul_(masks.get(name, 1))
            ends.append([p.detach() for p in twin.parameters()])
        with torch.no_grad():
            for (name, weight), *moved in zip(oracle.named_parameters(), *ends, strict=True):
                weight.copy_(sum(moved) / 2).mul_(reptile.pruner.masks.get(name, 1))
        for ours, theirs in zip(net.parameters(), oracle.parameters(), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-12, rtol=0)


def test_a_learner_has_no_mask_of_the_task_before():
    net = Net()
    TaskDropout.replace_in(net)
    reptile, (x, _) = PrunedReptile(net, SCHEDULE), task(0)[0]
    learner = reptile.clone()
    TaskDropout.draw(learner, generator())
    learner(x)
    reptile.discard(learner)
    learner = reptile.clone()  # the same working copy
    with pytest.raises(RuntimeError, match=r"TaskDropout.draw\(learner, generator\)"):
        learner(x)
    net.eval()
    evaluated = reptile.clone()
    assert torch.equal(evaluated(x), net(x))


def test_learners_adapted_together_are_refused():
    net = Net()
    TaskDropout.replace_in(net)
    reptile = PrunedReptile(net, SCHEDULE)
    TaskDropout.draw(net, generator())
    learners = BatchedLearners(reptile, 2)
    x = torch.stack([task(n)[0][0] for n in range(2)])
    with pytest.raises(RuntimeError, match="vmap"):
        learners.each(lambda learner, x: learner(x), x)


def test_clones_of_learn2learn_carry_the_mask():
    l2l = pytest.importorskip("learn2learn")
    net = Net()
    TaskDropout.replace_in(net)
    maml, (x, y) = l2l.algorithms.MAML(net, lr=0.1), task(0)[0]
    one, other = maml.clone(), maml.clone()
    TaskDropout.draw(one, generator(0))
    TaskDropout.draw(other, generator(1))
    before = one(x)
    assert torch.equal(one(x), before)
    assert not torch.equal(other(x), before)
    one.adapt(F.cross_entropy(one(x), y))
    F.cross_entropy(one(x), y).backward()
    assert all(p.grad is not None for p in net.parameters())
    with pytest.raises(RuntimeError, match="draw"):
        maml.clone()(x)


def test_the_rate_and_the_scale():
    dropout = TaskDropout(0.3)
    TaskDropout.draw(dropout, generator())
    out = dropout(torch.ones(2, 1_000_000))
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (out == 0).double().mean() == pytest.approx(0.3, abs=0.003)
    assert torch.equal(out[0], out[1])


def test_a_layer_in_two_places_is_replaced_in_both():
    drop = nn.Dropout(0.5)
    net = nn.Sequential(nn.Linear(4, 4), drop, nn.Linear(4, 4), drop)
    TaskDropout.replace_in(net)
    assert type(net[1]) is type(net[3]) is TaskDropout


def test_what_has_no_dropout_is_refused(net):
    with pytest.raises(ValueError, match="no dropout layer"):
        TaskDropout.replace_in(net)
    with pytest.raises(ValueError, match="replace_in"):
        TaskDropout.draw(net, generator())


def test_adapt_is_reproducible_by_seed():
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        net = Net()
        TaskDropout.replace_in(net)
        reptile, draws = PrunedReptile(net, SCHEDULE), generator(5)
        torch.manual_seed(len(found))  # the global generator has no part in it
        learner = reptile.clone()
        TaskDropout.draw(learner, draws)
        adapt(learner, task(0))
        found.append(torch.cat([p.flatten() for p in learner.module.parameters()]))
    assert torch.equal(*found)
