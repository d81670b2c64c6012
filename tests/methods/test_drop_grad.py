"""DropGrad against steps by hand with the same noise, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from l2l_prune import DropGrad, DSDSchedule, PrunedReptile
from tests.hosts.oracle import TinyNet, tasks
from tests.reptile.test_reptile import task

NOISES = ["gaussian", "bernoulli"]
RATE, LR = 0.3, 0.05


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def noise_by_hand(kind, shape, draws):
    """Equation by equation: mean 1, variance p / (1 - p)."""
    if kind == "gaussian":
        noise = 1 + (RATE / (1 - RATE)) ** 0.5 * torch.randn(shape, generator=draws)
    else:
        noise = (torch.rand(shape, generator=draws) >= RATE).float() / (1 - RATE)
    return noise.double()


@pytest.mark.parametrize("kind", NOISES)
def test_the_noise_has_mean_1_and_the_published_variance(kind):
    noise = DropGrad(RATE, generator(), kind)(torch.ones(1_000_000, dtype=torch.float64))
    assert noise.mean() == pytest.approx(1, abs=0.005)
    assert noise.var() == pytest.approx(RATE / (1 - RATE), rel=0.01)
    if kind == "bernoulli":
        assert (noise == 0).double().mean() == pytest.approx(RATE, abs=0.005)


@pytest.mark.parametrize("kind", NOISES)
def test_reptile_steps_on_noisy_gradients(net, kind):
    """In a run with a sparse phase, where pruned weights stay 0 all the same."""
    net.double()
    oracle, draws, drop = copy.deepcopy(net), generator(), DropGrad(RATE, generator(), kind)
    schedule = DSDSchedule(0.5, pretrain=1, prune=2, retrain=1)
    reptile = PrunedReptile(
        net, schedule, inner_lr=LR, meta_lr_final=1.0, inner_optimizer=torch.optim.SGD
    )
    for iteration in range(schedule.iterations):
        masks = reptile.pruner.masks
        learner = reptile.clone()
        for x, y in task(iteration, torch.float64):
            drop.adapt(learner, F.cross_entropy(learner(x), y))
            found = torch.autograd.grad(F.cross_entropy(oracle(x), y), [*oracle.parameters()])
            with torch.no_grad():
                for (name, weight), g in zip(oracle.named_parameters(), found, strict=True):
                    weight.sub_(LR * g * noise_by_hand(kind, g.shape, draws))
                    weight.mul_(masks.get(name, 1))
        reptile.collect(learner)
        reptile.step()
        with torch.no_grad():
            for name, weight in oracle.named_parameters():
                weight.mul_(reptile.pruner.masks.get(name, 1))  # what is pruned from now on
    for ours, theirs in zip(net.parameters(), oracle.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12, rtol=0)


def test_a_plain_adapt_is_free_of_noise(net):
    reptile = PrunedReptile(net, DSDSchedule(0.5, pretrain=1, prune=1, retrain=1))
    drop, (x, y) = DropGrad(0.9, generator()), task(0)[0]
    learners = [reptile.clone() for _ in range(3)]
    learners[0].adapt(F.cross_entropy(learners[0](x), y))
    drop.adapt(learners[1], F.cross_entropy(learners[1](x), y))
    learners[2].adapt(F.cross_entropy(learners[2](x), y))
    first, noisy, again = (
        torch.cat([p.flatten() for p in one.module.parameters()]) for one in learners
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, noisy)


def query_loss(net, start, drop, xs, ys, xq, yq):
    names = [name for name, _ in net.named_parameters()]
    fast = dict(zip(names, start, strict=True))
    for _ in range(2):
        loss = F.cross_entropy(functional_call(net, fast, (xs,)), ys)
        found = torch.autograd.grad(loss, [*fast.values()], create_graph=True)
        fast = {n: w - LR * drop(g) for (n, w), g in zip(fast.items(), found, strict=True)}
    return F.cross_entropy(functional_call(net, fast, (xq,)), yq)


@pytest.mark.parametrize("kind", NOISES)
def test_meta_gradients_pass_through_the_noise(kind):
    """Against differences of the query loss, with the same noise at both points."""
    net, [task] = TinyNet(), tasks(0, 1)
    start = [p.detach().clone().requires_grad_() for p in net.parameters()]

    def loss(start):
        return query_loss(net, start, DropGrad(RATE, generator(), kind), *task)

    found = torch.autograd.grad(loss(start), start)
    draws = generator(9)
    for _ in range(3):
        way = [torch.randn(p.shape, generator=draws, dtype=p.dtype) for p in start]
        ends = [
            loss(
                [(p + step * w).detach().requires_grad_() for p, w in zip(start, way, strict=True)]
            )
            for step in (1e-5, -1e-5)
        ]
        slope = sum(float((g * w).sum()) for g, w in zip(found, way, strict=True))
        assert slope == pytest.approx((ends[0] - ends[1]).item() / 2e-5, rel=1e-6)


@pytest.mark.parametrize("host", ["learn2learn", "higher"])
def test_hosts_take_it_in_a_line(host):
    library = pytest.importorskip(host)
    net, [task] = TinyNet(), tasks(0, 1)
    xs, ys, xq, yq = task
    start = [p.detach().clone().requires_grad_() for p in net.parameters()]
    expected = torch.autograd.grad(
        query_loss(net, start, DropGrad(RATE, generator()), *task), start
    )
    drop = DropGrad(RATE, generator())
    if host == "higher":
        opt = torch.optim.SGD(net.parameters(), LR)
        with library.innerloop_ctx(net, opt, copy_initial_weights=False) as (fmodel, diffopt):
            for _ in range(2):
                loss = F.cross_entropy(fmodel(xs), ys)
                diffopt.step(loss, grad_callback=lambda grads: [drop(g) for g in grads])
            F.cross_entropy(fmodel(xq), yq).backward()
    else:
        from learn2learn.algorithms.maml import maml_update

        learner = library.algorithms.MAML(net, lr=LR).clone()
        for _ in range(2):
            loss = F.cross_entropy(learner(xs), ys)
            grads = torch.autograd.grad(loss, [*learner.parameters()], create_graph=True)
            learner.module = maml_update(learner.module, LR, [drop(g) for g in grads])
        F.cross_entropy(learner(xq), yq).backward()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-12, rtol=0)


def test_a_frozen_parameter_has_no_gradient_to_disturb():
    assert DropGrad(0.1, torch.Generator())(None) is None


def test_resumes_exactly():
    drop, twin = DropGrad(RATE, generator(1)), DropGrad(RATE, generator(2))
    drop(torch.ones(5))
    twin.load_state_dict(drop.state_dict())
    assert torch.equal(drop(torch.ones(5)), twin(torch.ones(5)))
