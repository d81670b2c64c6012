"""A MAML loop with the two added lines; every algorithm has its own file in a later release."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from l2l_prune import DSDSchedule, Pruner, Schedule, Segment

l2l = pytest.importorskip("learn2learn")

LAYERS = ("conv1.weight", "conv2.weight", "fc.weight")
PHASES = Schedule(
    (
        Segment(2),
        Segment(2, sparse=True, sparsity=0.5),
        Segment(2),
        Segment(2, sparse=True, sparsity=0.3),
    )
)


def tasks(iteration):
    generator = torch.Generator().manual_seed(iteration)
    return [
        (
            torch.randn(6, 1, 6, 6, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (6,), generator=generator),
        )
        for _ in range(4)
    ]


def functional_maml(parameters, buffers, net, masks, iteration, lr, first_order):
    """Masks a dense model through functional_call; higher-order by autograd alone."""
    total = 0.0
    data = tasks(iteration)

    def loss(values, x, y):
        masked = {n: v * masks[n] if n in masks else v for n, v in values.items()}
        return F.cross_entropy(functional_call(net, (masked, buffers), (x,)), y)

    for (xs, ys), (xq, yq) in (data[:2], data[2:]):
        fast = dict(parameters)
        for _ in range(2):
            gradients = torch.autograd.grad(
                loss(fast, xs, ys), list(fast.values()), create_graph=not first_order
            )
            fast = {n: v - lr * g for (n, v), g in zip(fast.items(), gradients, strict=True)}
        total = total + loss(fast, xq, yq)
    return total


@pytest.mark.parametrize("first_order", [False, True], ids=["second-order", "first-order"])
@pytest.mark.parametrize("attach", ["before", "after"])
def test_maml_equals_a_functional_oracle(net, first_order, attach):
    net.double()
    net.norm.track_running_stats = False
    dense = copy.deepcopy(net)
    if attach == "before":
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        pruner = Pruner(net, PHASES, optimizer, regrow_state="keep")
        maml = l2l.algorithms.MAML(net, lr=0.1, first_order=first_order)
    else:
        maml = l2l.algorithms.MAML(net, lr=0.1, first_order=first_order)
        optimizer = torch.optim.Adam(maml.parameters(), lr=0.01)
        pruner = Pruner(maml, PHASES, optimizer, regrow_state="keep")
    parameters = dict(dense.named_parameters())
    reference = torch.optim.Adam(parameters.values(), lr=0.01)
    masks = {}
    for iteration in range(PHASES.iterations):
        optimizer.zero_grad()
        data = tasks(iteration)
        for (xs, ys), (xq, yq) in (data[:2], data[2:]):
            learner = maml.clone()
            for _ in range(2):
                learner.adapt(F.cross_entropy(learner(xs), ys))
                for name, mask in masks.items():
                    weight = learner.module.get_submodule(name[:-7]).weight
                    assert (weight[mask == 0] == 0).all()
            F.cross_entropy(learner(xq), yq).backward()
        reference.zero_grad()
        functional_maml(
            parameters, dict(dense.named_buffers()), dense, masks, iteration, 0.1, first_order
        ).backward()
        for a, b in zip(net.parameters(), parameters.values(), strict=True):
            assert torch.allclose(a.grad, b.grad, atol=1e-8, rtol=0)
        optimizer.step()
        pruner.step()
        reference.step()
        segment = PHASES.segment(iteration + 1)
        if segment is not PHASES.segment(iteration):
            masks = {}
            for name in LAYERS if segment.sparse else ():
                weight = parameters[name].detach()
                keep = weight.numel() - round(segment.sparsity * weight.numel())
                order = weight.abs().flatten().sort(descending=True, stable=True).indices
                masks[name] = torch.zeros(weight.numel(), dtype=torch.float64)
                masks[name][order[:keep]] = 1
                masks[name] = masks[name].view(weight.shape)
        with torch.no_grad():
            for name, mask in masks.items():
                parameters[name].mul_(mask)
                reference.state[parameters[name]]["exp_avg"].mul_(mask)
        for a, b in zip(net.parameters(), parameters.values(), strict=True):
            assert torch.allclose(a, b, atol=1e-8, rtol=0)


@pytest.mark.parametrize("attach", ["before", "after"])
def test_metasgd_pairs_each_weight_with_its_own_rate(attach):
    """Square layers: with torch's own pruning, pairs shift and broadcast silently."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3))
    dense = copy.deepcopy(net)
    schedule = DSDSchedule(0.5, pretrain=0, prune=1, retrain=1)
    if attach == "before":
        pruner = Pruner(net, schedule)
        meta = l2l.algorithms.MetaSGD(net, lr=0.1)
    else:
        meta = l2l.algorithms.MetaSGD(net, lr=0.1)
        pruner = Pruner(meta, schedule)
    with torch.no_grad():
        rates = [torch.rand_like(lr) for lr in meta.lrs]
        for lr, rate in zip(meta.lrs, rates, strict=True):
            lr.copy_(rate)
    masks = list(pruner.masks.values())
    x = torch.randn(5, 3)
    learner = meta.clone()
    learner.adapt(learner(x).square().sum())
    with torch.no_grad():
        for layer, mask in zip((dense[0], dense[2]), masks, strict=True):
            layer.weight.mul_(mask)
    gradients = torch.autograd.grad(dense(x).square().sum(), list(dense.parameters()))
    by_position = [masks[0], 1, masks[1], 1]
    for p, g, rate, mask, adapted in zip(
        dense.parameters(), gradients, rates, by_position, learner.module.parameters(), strict=True
    ):
        assert torch.allclose(adapted, p - rate * g * mask, atol=1e-6)


def test_deepcopy_reptile_of_learn2learn_example(net, batch):
    """Their loop: deepcopy the model, adapt with Adam (0, 0.999), put differences into grad."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    pruner = Pruner(net, DSDSchedule(0.5, pretrain=1, prune=2, retrain=1), optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        learner = copy.deepcopy(net)
        inner = torch.optim.Adam(learner.parameters(), lr=0.01, betas=(0.0, 0.999))
        for _ in range(3):
            inner.zero_grad()
            F.cross_entropy(learner(batch[0]), batch[1]).backward()
            inner.step()
            for name, mask in pruner.masks.items():
                assert (learner.get_submodule(name[:-7]).weight[~mask] == 0).all()
        for p, q in zip(net.parameters(), learner.parameters(), strict=True):
            p.grad = p.detach() - q.detach()
        optimizer.step()
        pruner.step()
        if pruner.sparse:
            assert (net.fc.weight == 0).sum() == 24
