"""Learners adapted together give what learners adapted one after the other give."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from l2l_prune import DSDSchedule, PrunedReptile
from l2l_prune.channels.pruner import Structured
from l2l_prune.experiments.algorithms.reptile import tasks_at_once
from l2l_prune.fewshot.data import Episode
from l2l_prune.fewshot.evaluation import few_shot_accuracy
from l2l_prune.fewshot.models import CaviaMLP, Conv4
from l2l_prune.metalearners.cavia import CAVIA
from l2l_prune.reptile import learner as inner_loop
from l2l_prune.reptile.batched import ELEMENTWISE, BatchedLearners

SCHEDULE = DSDSchedule(0.5, pretrain=1, prune=2, retrain=2)


def batches(tasks, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tasks, steps, 6, 1, 6, 6, generator=generator).double()
    return x, torch.randint(0, 3, (tasks, steps, 6), generator=generator)


def train(reptile, iterations):
    for iteration in range(iterations):
        x, y = batches(2, 3, iteration)
        for task in range(2):
            learner = reptile.clone()
            for step in range(3):
                learner.adapt(F.cross_entropy(learner(x[task, step]), y[task, step]))
            reptile.collect(learner)
        reptile.step()


@pytest.mark.parametrize("iterations", [0, 2, 4], ids=["start", "sparse", "regrown"])
@pytest.mark.parametrize("factory", ELEMENTWISE, ids=lambda c: c.__name__)
def test_weights_and_buffers_of_every_task(net, factory, iterations):
    options = {"momentum": 0.9} if factory in (torch.optim.SGD, torch.optim.RMSprop) else {}
    net.double().conv1.bias.requires_grad_(False)
    factory = functools.partial(factory, **options)
    reptile = PrunedReptile(net, SCHEDULE, inner_lr=0.01, inner_optimizer=factory)
    train(reptile, iterations)
    x, y = batches(3, 4, 100)
    together = BatchedLearners(reptile, 3)
    for step in range(4):
        together.adapt(
            together.each(lambda f, x, y: F.cross_entropy(f(x), y), x[:, step], y[:, step])
        )
    scores = together.each(lambda f, x: f(x), x[:, 0])
    for task in range(3):
        learner = reptile.clone()
        for step in range(4):
            learner.adapt(F.cross_entropy(learner(x[task, step]), y[task, step]))
        with torch.no_grad():
            torch.testing.assert_close(scores[task], learner(x[task, 0]), rtol=1e-9, atol=1e-11)
        for name, tensor in learner.module.state_dict().items():
            held = {**together.weights, **together.buffers}[name][task]
            torch.testing.assert_close(held, tensor, rtol=1e-9, atol=1e-11, msg=name)
        for name, mask in reptile.pruner.masks.items():
            assert (together.weights[name][task][~mask] == 0).all()
        reptile.discard(learner)


def test_the_reptile_is_left_as_it_was(net):
    reptile = PrunedReptile(net, SCHEDULE)
    before = str(reptile.state_dict())
    x, y = batches(2, 1, 0)
    learners = BatchedLearners(reptile, 2)
    learners.adapt(
        learners.each(lambda f, x, y: F.cross_entropy(f(x), y), x[:, 0].float(), y[:, 0])
    )
    assert str(reptile.state_dict()) == before


def test_the_working_copy_is_used_again(net, monkeypatch):
    copies = []
    plain_copy = inner_loop.plain_copy
    monkeypatch.setattr(
        inner_loop, "plain_copy", lambda model: copies.append(1) or plain_copy(model)
    )
    reptile = PrunedReptile(net.double(), SCHEDULE)
    train(reptile, 1)
    found = [
        few_shot_accuracy(reptile, episodes(), steps=2, batch_size=3, tasks_at_once=2).values
        for _ in range(2)
    ]
    assert found[0] == found[1]
    assert len(copies) == 1


def episodes():
    """Queries of two sizes, so that not all tasks can go together."""
    generator = torch.Generator().manual_seed(5)
    return [
        Episode(
            torch.randn(6, 1, 6, 6, generator=generator).double(),
            torch.arange(3).repeat(2),
            torch.randn(n, 1, 6, 6, generator=generator).double(),
            torch.randint(0, 3, (n,), generator=generator),
        )
        for n in (9, 9, 9, 6, 9, 9)
    ]


@pytest.mark.parametrize("transductive", [True, False])
@pytest.mark.parametrize("iterations", [0, 2])
def test_accuracy_is_the_same_together(net, transductive, iterations):
    reptile = PrunedReptile(net.double(), SCHEDULE, inner_lr=0.02)
    train(reptile, iterations)
    values = {
        together: few_shot_accuracy(
            reptile,
            episodes(),
            steps=5,
            batch_size=4,
            transductive=transductive,
            generator=torch.Generator().manual_seed(1),
            tasks_at_once=together,
        ).values
        for together in (1, 2, 100)
    }
    assert values[1] == values[2] == values[100]
    assert len(set(values[1])) > 1  # they do differ from task to task


@pytest.mark.parametrize("iterations", [0, 2], ids=["dense", "sparse"])
def test_accuracy_is_the_same_together_for_the_network_of_runs(iterations):
    """In channels-last, as runs train it; together its weights lie in torch's default format."""
    torch.manual_seed(0)
    net = Conv4(3, 8, 1, 6, "stride").double().to(memory_format=torch.channels_last)
    reptile = PrunedReptile(net, SCHEDULE, inner_lr=0.02)
    train(reptile, iterations)
    alone, together = (
        few_shot_accuracy(
            reptile,
            episodes(),
            steps=5,
            batch_size=4,
            generator=torch.Generator().manual_seed(1),
            tasks_at_once=number,
        ).values
        for number in (1, tasks_at_once(64, 28))
    )
    assert alone == together
    assert len(set(alone)) > 1


def test_dropout_is_drawn_anew_for_each_task():
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 3))
    reptile = PrunedReptile(net, SCHEDULE)
    same = torch.ones(2, 4, 1, 6, 6)
    first, second = BatchedLearners(reptile, 2).each(lambda f, x: f(x), same)
    assert not torch.equal(first, second)


def test_what_cannot_go_together_is_refused(net):
    x = torch.zeros(2, 1, 6, 6)
    options = {"steps": 1, "batch_size": 2, "tasks_at_once": 2}
    small = PrunedReptile(net, SCHEDULE, structured=Structured(x))
    with pytest.raises(ValueError, match="structured learners adapt one at a time"):
        few_shot_accuracy(small, episodes(), **options)
    small.finalize()
    joint = PrunedReptile(net, SCHEDULE, inner_optimizer=torch.optim.ASGD)
    with pytest.raises(ValueError, match="ASGD may step on several weights together"):
        few_shot_accuracy(joint, episodes(), **options)
    cavia = CAVIA(CaviaMLP(), lr=0.1)
    with pytest.raises(ValueError, match="needs a PrunedReptile, got CAVIA"):
        few_shot_accuracy(cavia, episodes(), **options)
    with pytest.raises(ValueError, match="tasks_at_once must be >= 1"):
        few_shot_accuracy(joint, episodes(), **{**options, "tasks_at_once": 0})
