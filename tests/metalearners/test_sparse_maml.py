from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from l2l_prune import DSDSchedule, Pruner, TaskMasks
from l2l_prune.metalearners.sparse_maml import SparseMAML

X, Y = (
    torch.randn(6, 1, 6, 6, generator=torch.Generator().manual_seed(0)).double(),
    torch.arange(6) % 3,
)


def scores_of(maml, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for score in maml.scores:
            score.copy_(torch.randn(score.shape, generator=generator))


def test_inner_and_outer_step_are_the_papers(net):
    """phi_k+1 = phi_k - a 1[m >= 0] g_k, and dL/dm = -a dL(phi_K) sum_k g_k, by hand."""
    net = net.double()
    maml = SparseMAML(net, lr=0.1)
    scores_of(maml)
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    learner = maml.clone()
    phi = {n: p.clone() for n, p in start.items()}
    total = {n: torch.zeros_like(p) for n, p in start.items()}
    for k in range(3):
        x = X + k
        learner.adapt(F.cross_entropy(learner(x), Y))
        leaves = {n: p.detach().requires_grad_() for n, p in phi.items()}
        loss = F.cross_entropy(torch.func.functional_call(net, leaves, (x,)), Y)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        for (name, value), g, m in zip(phi.items(), gradients, maml.scores, strict=True):
            phi[name] = torch.where(m >= 0, value - 0.1 * g, value).detach()
            total[name] += g
    F.cross_entropy(learner(X), Y).backward()
    leaves = {n: p.detach().requires_grad_() for n, p in phi.items()}
    outer = torch.autograd.grad(
        F.cross_entropy(torch.func.functional_call(net, leaves, (X,)), Y), list(leaves.values())
    )
    for (name, weight), g, m in zip(net.named_parameters(), outer, maml.scores, strict=True):
        torch.testing.assert_close(learner._adapted[name].detach(), phi[name])
        torch.testing.assert_close(weight.grad, g)  # first order
        torch.testing.assert_close(m.grad, -0.1 * g * total[name])
        assert torch.equal(weight.detach(), start[name])


def test_with_all_scores_open_it_is_maml(net):
    l2l = pytest.importorskip("learn2learn")
    net = net.double()
    ours = SparseMAML(net, lr=0.1, first_order=False, initial_sparsity=0.0)
    assert ours.frozen == 0
    grads = []
    for maml in (ours, l2l.algorithms.MAML(net, lr=0.1)):
        net.zero_grad()
        learner = maml.clone()
        learner.adapt(F.cross_entropy(learner(X), Y))
        F.cross_entropy(learner(X + 1), Y).backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_half_is_frozen_at_first_and_frozen_weights_do_not_move():
    maml = SparseMAML(nn.Linear(100, 50), 0.1, generator=torch.Generator().manual_seed(0))
    assert maml.frozen == pytest.approx(0.5, abs=0.05)
    learner = maml.clone()
    learner.adapt(learner(torch.ones(2, 100)).square().mean())
    moved = learner._adapted["weight"] != maml.module.weight
    assert torch.equal(moved, maml.scores[0] >= 0)


def test_pruned_weights_stay_0_in_the_inner_loop(net):
    maml = SparseMAML(net.double(), lr=0.1, initial_sparsity=0.2)
    pruner = Pruner(maml.module, DSDSchedule(0.5, pretrain=0, prune=2, retrain=1), skip="fc")
    learner = maml.clone()
    learner.adapt(F.cross_entropy(learner(X), Y))
    for name, mask in pruner.masks.items():
        assert (learner._adapted[f"{name}_orig"][~mask] == 0).all()
        assert (learner._adapted[f"{name}_orig"][mask] != 0).any()


def test_clones_of_clones_and_resuming(net):
    maml = SparseMAML(net.double(), lr=0.1)
    learner = maml.clone()
    learner.adapt(F.cross_entropy(learner(X), Y))
    twin = learner.clone()
    twin.adapt(F.cross_entropy(twin(X), Y))
    assert not torch.equal(twin(X), learner(X))
    fresh = SparseMAML(type(net)().double(), lr=0.1)
    fresh.load_state_dict(maml.state_dict())
    assert all(map(torch.equal, fresh.parameters(), maml.parameters()))


def test_misuse():
    with pytest.raises(TypeError, match="model"):
        SparseMAML(3, 0.1)
    with pytest.raises(ValueError, match="lr"):
        SparseMAML(nn.Linear(2, 2), 0.0)
    with pytest.raises(ValueError, match="initial_sparsity"):
        SparseMAML(nn.Linear(2, 2), 0.1, initial_sparsity=1.0)
    with pytest.raises(ValueError, match="no parameters"):
        SparseMAML(nn.ReLU(), 0.1)
    learner = SparseMAML(nn.Linear(2, 2), 0.1).clone()
    with pytest.raises(RuntimeError, match="does not depend on this learner"):
        learner.adapt(torch.ones((), requires_grad=True) * 2)
    with pytest.raises(RuntimeError, match="does not depend on this learner"):
        learner.adapt(torch.ones(()))
    with pytest.raises(ValueError, match="loss"):
        learner.adapt(learner(torch.ones(3, 2)))


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_scores_rest_with_pruned_weights_and_do_not_jump_at_release(beta1):
    """A linear task family; steps in learning rates against those of the kept entries' scores."""
    generator = torch.Generator().manual_seed(0)
    lr, released_at = 0.01, 310
    maml = SparseMAML(nn.Linear(20, 1, bias=False).double(), 0.05, generator=generator)
    optimizer = torch.optim.Adam(maml.parameters(), lr=lr, betas=(beta1, 0.999))
    schedule = DSDSchedule(0.5, pretrain=10, prune=released_at - 10, retrain=5)
    pruner = Pruner(maml, schedule, optimizer)
    target = torch.randn(20, 1, generator=generator).double()
    for _ in range(released_at + 1):
        optimizer.zero_grad()
        for _ in range(2):
            x = torch.randn(2, 16, 20, generator=generator).double()
            y = x @ (target + 0.3 * torch.randn(20, 1, generator=generator).double())
            learner = maml.clone()
            learner.adapt((learner(x[0]) - y[0]).square().mean())
            (learner(x[1]) - y[1]).square().mean().backward()
        before = maml.scores[0].detach().clone()
        optimizer.step()
        moved = (maml.scores[0].detach() - before).abs() / lr
        if pruner.sparse:
            mask = pruner.masks["module.weight"]
            assert (moved[~mask] == 0).all()
        pruner.step()
    assert 0 < moved[~mask].max() <= moved[mask].max()


def test_frozen_weights_stay_and_the_others_step_as_without_them(net):
    net = net.double()
    net.conv1.weight.requires_grad_(False)
    maml = SparseMAML(net, lr=0.1)
    scores_of(maml)
    learner = maml.clone()
    learner.adapt(F.cross_entropy(learner(X), Y))
    trained = {n: p for n, p in net.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(F.cross_entropy(net(X), Y), list(trained.values()))
    wanted = dict(net.named_parameters())
    scores = dict(zip(wanted, maml.scores, strict=True))
    for (name, p), g in zip(trained.items(), gradients, strict=True):
        wanted[name] = torch.where(scores[name] >= 0, p - 0.1 * g, p)
    expected = torch.func.functional_call(net, wanted, (X,))
    assert torch.allclose(learner(X), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_learner_cloned_in_a_tasks_block_keeps_its_masks(net, steps):
    """As learn2learn's do: what the task prunes gets no gradient, and is 0 in its outputs."""
    maml = SparseMAML(net.double(), lr=0.1)
    schedule = DSDSchedule(0.5, pretrain=0, prune=3, retrain=2).per_task()
    masks = TaskMasks(torch.Generator().manual_seed(0))
    pruner = Pruner(maml, schedule, task_masks=masks)
    with pruner.task_masks() as held:
        learner = maml.clone()
    for _ in range(steps):
        learner.adapt(F.cross_entropy(learner(X), Y))
    out = learner.clone()(X)
    F.cross_entropy(out, Y).backward()
    for name, mask in held.items():
        gradient = pruner.weights[name].grad
        assert not gradient[~mask].any()
        assert gradient[mask].any()
    masked = {f"module.{n}": w for n, w in learner._weights().items()}
    dense = {n.removesuffix("_orig"): w for n, w in masked.items()}
    values = {n.removeprefix("module."): w * held.get(n, 1) for n, w in dense.items()}
    pruner.finalize()
    torch.testing.assert_close(out, torch.func.functional_call(net, values, (X,)))
