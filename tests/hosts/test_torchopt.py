"""TorchOpt's differentiable and functional optimizers under masks, against the oracle."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from l2l_prune import Pruner
from tests.hosts import examples
from tests.hosts.oracle import PHASES, Oracle, TinyNet, assert_equal, assert_pruned, tasks

torchopt = pytest.importorskip("torchopt")

INNER = {
    "sgd": lambda net: torchopt.MetaSGD(net, lr=0.5),
    "momentum": lambda net: torchopt.MetaSGD(net, lr=0.3, momentum=0.9),
    "adam": lambda net: torchopt.MetaAdam(net, lr=0.05, eps_root=1e-8),
    "functional adam": None,
}


@pytest.fixture
def example(monkeypatch):
    module = examples.load("torchopt_maml", monkeypatch)
    monkeypatch.setattr(module, "INNER_STEPS", 2)
    return module


def updates(kind, gradients, state):
    """One step of the published rules on each tensor; ``state`` is a dict."""
    if kind == "sgd":
        return [0.5 * g for g in gradients]
    if kind == "momentum":
        before = state.get("m")
        state["m"] = (
            gradients
            if before is None
            else [g + 0.9 * m for g, m in zip(gradients, before, strict=True)]
        )
        return [0.3 * m for m in state["m"]]
    zeros = [torch.zeros_like(g) for g in gradients]
    t = state["t"] = state.get("t", torch.tensor(0)) + 1  # 0.999**t is in float32, as TorchOpt's
    m, v = state.get("m", zeros), state.get("v", zeros)
    state["m"] = m = [0.9 * a + 0.1 * g for a, g in zip(m, gradients, strict=True)]
    state["v"] = v = [0.999 * a + 0.001 * g * g for a, g in zip(v, gradients, strict=True)]
    return [
        0.05 * (a / (1 - 0.9**t)) / ((b / (1 - 0.999**t) + 1e-8).sqrt() + 1e-8)
        for a, b in zip(m, v, strict=True)
    ]


def expected(oracle, kind, episodes):
    losses = []
    for xs, ys, xq, yq in episodes:
        values, state = dict(oracle.parameters), {}
        for _ in range(2):
            found = torch.autograd.grad(
                oracle.loss(values, xs, ys), list(values.values()), create_graph=True
            )
            steps = updates(kind.split()[-1], found, state)
            values = {n: v - s for (n, v), s in zip(values.items(), steps, strict=True)}
        losses.append(oracle.loss(values, xq, yq))
    return oracle.gradients(torch.stack(losses).mean())


def functional(net, episodes):
    """The same by torchopt.FuncOptimizer and functional_call."""
    for xs, ys, xq, yq in episodes:
        optimizer = torchopt.FuncOptimizer(torchopt.adam(lr=0.05, eps_root=1e-8))
        params = dict(net.named_parameters())
        for _ in range(2):
            params = optimizer.step(
                F.cross_entropy(functional_call(net, params, (xs,)), ys), params
            )
        loss = F.cross_entropy(functional_call(net, params, (xq,)), yq)
        (loss / len(episodes)).backward()


@pytest.mark.parametrize("kind", INNER)
def test_maml_equals_the_oracle(example, kind):
    net = TinyNet()
    oracle = Oracle(net)
    opt = torch.optim.Adam(net.parameters(), 0.01)
    pruner = Pruner(net, PHASES, opt, release_state="keep")
    inner = INNER[kind] and INNER[kind](net)
    for iteration in range(PHASES.iterations):
        opt.zero_grad()
        if inner:
            example.meta_backward(net, inner, tasks(iteration))
        else:
            functional(net, tasks(iteration))
        theirs = expected(oracle, kind, tasks(iteration))
        assert_equal([p.grad for p in net.parameters()], theirs, 1e-9)
        for name, mask in pruner.masks.items():
            assert (dict(net.named_parameters())[f"{name}_orig"].grad[~mask] == 0).all()
        opt.step()
        pruner.step()
        oracle.step(theirs, iteration)
        assert_equal(list(net.parameters()), list(oracle.parameters.values()))
        assert_pruned(net, oracle.masks)


def test_adapted_weights_are_pruned_and_the_model_comes_back():
    net = TinyNet()
    pruner = Pruner(net, PHASES)
    pruner.step()
    pruner.step()
    own = list(net.parameters())
    weights = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
    xs, ys, *_ = tasks(0)[0]
    torchopt.MetaAdam(net, lr=0.05).step(F.cross_entropy(net(xs), ys))
    assert not net.head.weight_orig.is_leaf
    assert_pruned(net, {name: mask.double() for name, mask in pruner.masks.items()})
    torchopt.recover_state_dict(net, weights)
    assert all(a is b for a, b in zip(net.parameters(), own, strict=True))
    pruner.step()


def test_a_step_within_an_open_inner_loop_is_refused():
    net = TinyNet()
    pruner = Pruner(net, PHASES)
    pruner.step()
    weights = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
    xs, ys, *_ = tasks(0)[0]
    torchopt.MetaSGD(net, lr=0.5).step(F.cross_entropy(net(xs), ys))
    with pytest.raises(RuntimeError, match=r"conv.weight is a task's adapted weight.*recover"):
        pruner.step()
    assert pruner.iteration == 1
    torchopt.recover_state_dict(net, weights)
    pruner.step()
    assert pruner.sparse
