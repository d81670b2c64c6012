"""The example's MAML and ANIL over all tasks at once, against the oracle's loop over tasks."""

from __future__ import annotations

import pytest
import torch
from torch.func import jacrev, vmap

from l2l_prune import Pruner
from tests.conftest import OLD_TORCH
from tests.hosts import examples
from tests.hosts.oracle import (
    PHASES,
    Oracle,
    TinyNet,
    assert_equal,
    assert_pruned,
    sgd_inner,
    tasks,
)


@pytest.fixture
def example(monkeypatch):
    module = examples.load("torch_func_maml", monkeypatch)
    monkeypatch.setattr(module, "INNER_STEPS", 2)
    return module


def looped(oracle, iteration, adapted):
    """The mean query loss of second-order MAML, one task after the other."""
    losses = []
    for xs, ys, xq, yq in tasks(iteration, 3):
        values = dict(oracle.parameters)
        for _ in range(2):
            mine = {name: v for name, v in values.items() if name.startswith(adapted)}
            fast = sgd_inner(lambda mine: oracle.loss(values | mine, xs, ys), mine, 0.5, 2)  # noqa: B023
            values |= fast
        losses.append(oracle.loss(values, xq, yq))
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "compiled"]
)
@pytest.mark.parametrize("adapted", ["", "head."], ids=["maml", "anil"])
def test_all_tasks_at_once_equal_a_loop_over_tasks(example, adapted, compiled):
    """Through dense, sparse, dense and sparse phases; compiled once, in one graph, for all."""
    net = TinyNet()
    oracle = Oracle(net)
    opt = torch.optim.Adam(net.parameters(), 0.01)
    pruner = Pruner(net, PHASES, opt, release_state="keep")
    step = example.meta_gradient
    if compiled:
        if OLD_TORCH:
            pytest.skip("set_stance came with torch 2.6")
        torch._dynamo.reset()
        step = torch.compile(step, backend="aot_eager", fullgraph=True)
    params = dict(net.named_parameters())
    for iteration in range(PHASES.iterations):
        batch = [torch.stack(parts) for parts in zip(*tasks(iteration, 3), strict=True)]
        with torch.compiler.set_stance(
            "fail_on_recompile" if compiled and iteration else "default"
        ):
            gradients, _ = step(net, params, adapted, batch)
        theirs = oracle.gradients(looped(oracle, iteration, adapted))
        assert_equal(list(gradients.values()), theirs, 1e-12)
        for name, mask in pruner.masks.items():
            assert (gradients[f"{name}_orig"][~mask] == 0).all()
        for name, value in params.items():
            value.grad = gradients[name]
        opt.step()
        pruner.step()
        oracle.step(theirs, iteration)
        assert_equal(list(net.parameters()), list(oracle.parameters.values()), 1e-10)
        assert_pruned(net, oracle.masks)
        assert set(oracle.masks) == (set(pruner.masks) if pruner.sparse else set())


@pytest.mark.parametrize("adapted", ["", "head."], ids=["maml", "anil"])
def test_a_tasks_own_weights_are_pruned(example, adapted):
    net = TinyNet()
    pruner = Pruner(net, PHASES)
    pruner.step()
    pruner.step()
    assert pruner.sparse
    params = dict(net.named_parameters())
    xs, ys, *_ = (torch.stack(parts) for parts in zip(*tasks(0, 3), strict=True))
    own = vmap(lambda x, y: example.adapt(net, params, adapted, x, y))(xs, ys)
    for name, mask in pruner.masks.items():
        weights = own[f"{name}_orig"]
        assert weights.shape == (3, *mask.shape)
        assert (weights[:, ~mask] == 0).all()
        moved = (weights[0] != weights[1]).any()
        assert bool(moved) == name.startswith(adapted)


def test_other_transforms_see_the_mask():
    net = TinyNet()
    pruner = Pruner(net, PHASES)
    pruner.step()
    pruner.step()
    x = tasks(0)[0][0]
    params = dict(net.named_parameters())

    def scores(params):
        return torch.func.functional_call(net, params, (x,))

    slopes = jacrev(scores)(params)
    tangents = {name: torch.ones_like(value) for name, value in params.items()}
    _, along = torch.func.jvp(scores, (params,), (tangents,))
    total = sum(slope.flatten(2).sum(2) for slope in slopes.values())
    assert torch.allclose(along, total, atol=1e-10)
    for name, mask in pruner.masks.items():
        assert (slopes[f"{name}_orig"][..., ~mask] == 0).all()
