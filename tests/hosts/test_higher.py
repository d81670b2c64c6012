"""Plain higher on a pruned model: the masked property goes along into its functional copy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from l2l_prune import Pruner, Schedule, Segment, dense_state_dict

from .oracle import PHASES, Oracle, TinyNet, assert_equal, assert_pruned, sgd_inner, tasks

higher = pytest.importorskip("higher")

SPARSE = Schedule((Segment(3, sparse=True, sparsity=0.5),))


def test_maml_with_higher_equals_the_oracle():
    net = TinyNet()
    oracle = Oracle(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    pruner = Pruner(net, PHASES, optimizer, release_state="keep")
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    for iteration in range(PHASES.iterations):
        optimizer.zero_grad()
        objective = 0.0
        for xs, ys, xq, yq in tasks(iteration):
            with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, diffopt):
                for _ in range(2):
                    diffopt.step(F.cross_entropy(fnet(xs), ys))
                    fnet(xq)
                    assert_pruned(fnet, oracle.masks)
                F.cross_entropy(fnet(xq), yq).backward()
            fast = oracle.parameters
            for _ in range(2):
                fast = sgd_inner(lambda v, x=xs, y=ys: oracle.loss(v, x, y), fast, 0.1, 2)
            objective = objective + oracle.loss(fast, xq, yq)
        gradients = oracle.gradients(objective)
        assert_equal([p.grad for p in net.parameters()], gradients)
        optimizer.step()
        pruner.step()
        oracle.step(gradients, iteration)
        assert_equal(list(net.parameters()), list(oracle.parameters.values()))
        assert_pruned(net, oracle.masks)


INNER = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-3),
}


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("copy_initial", [True, False])
@pytest.mark.parametrize("name", INNER)
def test_every_combination(name, copy_initial, track):
    net = TinyNet()
    pruner = Pruner(net, SPARSE)
    twin_net = TinyNet()
    twin_net.load_state_dict(dense_state_dict(net))
    results = []
    for model, masks in ((net, None), (twin_net, pruner.masks)):
        optimizer = INNER[name](model.parameters())
        with higher.innerloop_ctx(
            model, optimizer, copy_initial_weights=copy_initial, track_higher_grads=track
        ) as (fnet, diffopt):

            def loss(x, y, fnet=fnet, masks=masks, model=model):
                if masks is None:
                    return F.cross_entropy(fnet(x), y)
                names = [n for n, _ in model.named_parameters()]
                fast = dict(zip(names, fnet.parameters(), strict=True))
                values = {n: v * masks[n] if n in masks else v for n, v in fast.items()}
                return F.cross_entropy(functional_call(model, values, (x,)), y)

            episodes = tasks(0)
            for xs, ys, _, _ in episodes:
                diffopt.step(loss(xs, ys))
            final = loss(*episodes[0][2:])
            if track:
                final.backward() if not copy_initial else None
                initial = list(fnet.parameters(time=0))
                if copy_initial:
                    gradients = torch.autograd.grad(final, initial)
                else:
                    gradients = [p.grad for p in model.parameters()]
            else:
                gradients = []
            results.append((final.detach(), list(fnet.parameters()), gradients))
            if track and copy_initial:
                assert all(p.grad is None for p in model.parameters())
    (a, wa, ga), (b, wb, gb) = results
    assert torch.allclose(a, b, atol=1e-10)
    assert_equal(wa, wb)
    assert_equal(list(ga), list(gb))
    if masks := pruner.masks:
        assert_pruned(net, {n: m.double() for n, m in masks.items()})


def test_override_learns_the_rate():
    """A learning rate with gradient, passed as higher's override."""
    net = TinyNet()
    pruner = Pruner(net, SPARSE)
    xs, ys, xq, yq = tasks(0)[0]
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    with higher.innerloop_ctx(net, optimizer, override={"lr": [rate]}) as (fnet, diffopt):
        diffopt.step(F.cross_entropy(fnet(xs), ys))
        (ours,) = torch.autograd.grad(F.cross_entropy(fnet(xq), yq), rate)

    def final(lr):
        dense = TinyNet()
        dense.load_state_dict(dense_state_dict(net))
        masks = pruner.masks
        values = dict(dense.named_parameters())

        def loss(v, x, y):
            masked = {n: p * masks[n] if n in masks else p for n, p in v.items()}
            return F.cross_entropy(functional_call(dense, masked, (x,)), y)

        gradients = torch.autograd.grad(loss(values, xs, ys), list(values.values()))
        fast = {n: v - lr * g for (n, v), g in zip(values.items(), gradients, strict=True)}
        return float(loss(fast, xq, yq).detach())

    numeric = (final(0.1 + 1e-5) - final(0.1 - 1e-5)) / 2e-5
    assert float(ours) == pytest.approx(numeric, rel=1e-6)


def test_monkeypatch_with_own_fast_weights():
    net = TinyNet()
    pruner = Pruner(net, SPARSE)
    masks = pruner.masks
    fnet = higher.monkeypatch(net, copy_initial_weights=True)
    x = tasks(0)[0][0]
    weights = [torch.randn_like(p, requires_grad=True) for p in net.parameters()]
    out = fnet(x, params=weights)
    dense = TinyNet()
    names = [n for n, _ in dense.named_parameters()]
    values = {n: w * masks[n] if n in masks else w for n, w in zip(names, weights, strict=True)}
    assert torch.allclose(out, functional_call(dense, values, (x,)), atol=1e-12)
    gradients = torch.autograd.grad(out.square().sum(), weights)
    for name, gradient in zip(names, gradients, strict=True):
        if name in masks:
            assert (gradient[~masks[name]] == 0).all()


def test_old_masks_stay_in_an_open_inner_loop():
    """A mask change while a functional copy is alive: the copy keeps what it began with."""
    net = TinyNet()
    pruner = Pruner(net, Schedule((Segment(1, sparse=True, sparsity=0.5), Segment(1))))
    old = {n: m.double() for n, m in pruner.masks.items()}
    xs, ys, xq, _ = tasks(0)[0]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with higher.innerloop_ctx(net, optimizer) as (fnet, diffopt):
        diffopt.step(F.cross_entropy(fnet(xs), ys))
        pruner.step()
        fnet(xq)
        assert_pruned(fnet, old)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 5)
        self.head = nn.Linear(5, 3)
        self.double()

    def forward(self, x):
        return self.head(self.rnn(x)[0][-1])


def test_pruned_lstm():
    """higher rebuilds an LSTM's weight list by name (KeyError with torch's own pruning)."""
    net = Recurrent()
    pruner = Pruner(net, SPARSE, only=[nn.LSTM, nn.Linear])
    x, y = torch.randn(6, 8, 4, dtype=torch.float64), torch.randint(0, 3, (8,))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (fnet, diffopt):
        for _ in range(2):
            diffopt.step(F.cross_entropy(fnet(x), y))
        F.cross_entropy(fnet(x), y).backward()
    dense = Recurrent()
    dense.load_state_dict(dense_state_dict(net))
    values = dict(dense.named_parameters())
    start = list(values.values())

    def loss(v):
        masked = {n: p * pruner.masks[n] if n in pruner.masks else p for n, p in v.items()}
        return F.cross_entropy(functional_call(dense, masked, (x,)), y)

    for _ in range(2):
        values = sgd_inner(loss, values, 0.1, 2)
    expected = torch.autograd.grad(loss(values), start)
    assert_equal([p.grad for p in net.parameters()], list(expected))


def test_copy_of_a_pruned_model_is_patched_alike():
    net = TinyNet()
    Pruner(net, SPARSE)
    twin = copy.deepcopy(net)
    x = tasks(0)[0][0]
    assert torch.equal(higher.monkeypatch(net)(x), higher.monkeypatch(twin)(x))
