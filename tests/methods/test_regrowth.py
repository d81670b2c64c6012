from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from l2l_prune import DSDSchedule, PrunedReptile, Pruner, Schedule, Segment
from l2l_prune.masking.patterns import NByM
from l2l_prune.methods.regrowth import Regrowth, dense_gradients, exchanged

SCHEDULE = Schedule((Segment(1), Segment(10, sparse=True, sparsity=0.5), Segment(1)))
X, Y = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def loss_of(net):
    return F.cross_entropy(net(X), Y)


def test_gradients_of_pruned_entries_are_those_of_the_dense_net_at_0(net):
    pruner = Pruner(net, DSDSchedule(0.5, pretrain=0, prune=2, retrain=1))
    plain = type(net)()
    pruner_state = {n: m for n, m in net.state_dict().items() if not n.endswith("_mask")}
    plain.load_state_dict({n.replace("_orig", ""): v for n, v in pruner_state.items()})
    plain.train()
    loss_of(plain).backward()
    found = dense_gradients(pruner, lambda: loss_of(net))
    expected = dict(plain.named_parameters())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name].grad)
        assert gradient[~pruner.masks[name]].abs().sum() > 0
    pruner.step()  # the masks are as they were


def by_the_algorithm(weight, mask, growth, fraction):
    """RigL's Algorithm 1 with sorted lists."""
    w, m, g = weight.flatten().tolist(), mask.flatten().tolist(), growth.flatten().tolist()
    active = [i for i in range(len(w)) if m[i]]
    k = round(fraction * len(active))
    drop = sorted(active, key=lambda i: (abs(w[i]), -i))[:k]
    rest = [i for i in active if i not in drop]
    grow = sorted((i for i in range(len(w)) if i not in rest), key=lambda i: (-g[i], i))[:k]
    return torch.tensor([i in rest or i in grow for i in range(len(w))]).view(weight.shape)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 1.0])
def test_exchanged_is_the_algorithm(fraction):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 5, generator=generator)
    mask = torch.rand(6, 5, generator=generator) < 0.4
    growth = torch.rand(6, 5, generator=generator)
    expected = by_the_algorithm(weight * mask, mask, growth, fraction)
    assert torch.equal(exchanged(weight * mask, mask, growth, fraction), expected)


def test_rigl_at_every_interval_of_the_sparse_segment(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    pruner = Pruner(net, SCHEDULE, optimizer)
    Regrowth(pruner, interval=3, fraction=0.4, loss=lambda: loss_of(net))
    for iteration in range(12):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
        before = {n: m.clone() for n, m in pruner.masks.items()}
        probe = copy.deepcopy(net)
        pruner.step()
        done = iteration  # sparse iterations that have ended
        if done in (3, 6, 9):
            fraction = 0.4 / 2 * (1 + math.cos(math.pi * done / 10))
            for name, mask in pruner.masks.items():
                module, _, _ = name.rpartition(".")
                weight = probe.get_submodule(module).weight.detach()
                dense = type(net)()
                dense.load_state_dict(
                    {
                        n.replace("_orig", ""): v
                        for n, v in probe.state_dict().items()
                        if not n.endswith("_mask")
                    }
                )
                loss_of(dense).backward()
                growth = dense.get_submodule(module).weight.grad.abs()
                expected = by_the_algorithm(weight, before[name], growth, fraction)
                assert torch.equal(mask, expected), (iteration, name)
                assert done > 3 or not torch.equal(mask, before[name]), name
                momentum = optimizer.state[pruner.weights[name]]["momentum_buffer"]
                assert (momentum[~mask] == 0).all()
        elif 0 < done < 10:
            assert all(torch.equal(m, before[n]) for n, m in pruner.masks.items())
        if pruner.sparse:
            for name, mask in pruner.masks.items():
                assert int(mask.sum()) == mask.numel() - round(0.5 * mask.numel())
                assert (pruner.weights[name][~mask] == 0).all()


def test_set_grows_anywhere_and_resumes_bit_for_bit(net):
    twin = copy.deepcopy(net)
    pruner = Pruner(net, SCHEDULE)
    regrowth = Regrowth(pruner, interval=2, fraction=0.5)
    for _ in range(6):
        pruner.step()
    resumed = Pruner(twin, SCHEDULE)
    again = Regrowth(resumed, interval=2, fraction=0.5)
    twin.load_state_dict(net.state_dict())
    resumed.load_state_dict(pruner.state_dict())
    again.load_state_dict(regrowth.state_dict())
    seen = set()
    for _ in range(4):
        pruner.step()
        resumed.step()
        assert all(map(torch.equal, pruner.masks.values(), resumed.masks.values()))
        seen.add(tuple(pruner.masks["fc.weight"].flatten().tolist()))
    assert len(seen) > 1


def test_masks_of_reptile_move_too(net):
    reptile = PrunedReptile(net, SCHEDULE)
    Regrowth(reptile.pruner, interval=1, fraction=0.5, loss=lambda: loss_of(reptile))
    masks = []
    for _ in range(4):
        learner = reptile.clone()
        for _ in range(2):
            learner.adapt(F.cross_entropy(learner(X), Y))
        for name, mask in reptile.pruner.masks.items():
            adapted = learner.module.get_submodule(name.rpartition(".")[0]).weight
            assert (adapted[~mask] == 0).all()
        reptile.collect(learner)
        reptile.step()
        masks.append(reptile.pruner.masks["conv2.weight"])
    assert not torch.equal(masks[1], masks[2])


def test_functional_calls_within_opened_masks_reach_pruned_entries(net):
    pruner = Pruner(net, DSDSchedule(0.5, pretrain=0, prune=2, retrain=1))
    with pruner.opened_masks():
        named = dict(net.named_parameters())
        gradient = torch.autograd.grad(
            F.cross_entropy(functional_call(net, named, (X,)), Y), net.fc.weight_orig
        )[0]
    assert gradient[~pruner.masks["fc.weight"]].abs().sum() > 0


class Smooth(nn.Module):
    """In float64, with second derivatives everywhere."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3, bias=False)
        self.double()

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


GENERATOR = torch.Generator().manual_seed(1)
SUPPORT, QUERY = (torch.randn(7, 5, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
TARGET, RATE = torch.arange(7) % 3, 0.7


def masked_meta_gradient(pruner, net, steps=2, first_order=False):
    """Loss and gradient by the initial weights of an inner loop whose steps are masked by hand."""
    masks = pruner.masks
    start = {
        name.replace("_orig", ""): p.detach().clone().requires_grad_()
        for name, p in net.named_parameters()
    }
    plain, weights = Smooth(), start

    def loss(weights, x):
        return F.cross_entropy(functional_call(plain, weights, (x,)), TARGET)

    for _ in range(steps):
        value = loss(weights, SUPPORT)
        steps_of = torch.autograd.grad(value, list(weights.values()), create_graph=not first_order)
        weights = {
            name: weight - RATE * (masks.get(name, 1) * step)
            for (name, weight), step in zip(weights.items(), steps_of, strict=True)
        }
        for name, mask in masks.items():
            assert (weights[name][~mask] == 0).all()
    value = loss(weights, QUERY)
    return value.detach(), dict(
        zip(start, torch.autograd.grad(value, list(start.values())), strict=True)
    )


def meta_loss_of_learn2learn(net, first_order):
    l2l = pytest.importorskip("learn2learn")
    learner = l2l.algorithms.MAML(net, lr=RATE, first_order=first_order).clone()
    for _ in range(2):
        learner.adapt(F.cross_entropy(learner(SUPPORT), TARGET))
    return F.cross_entropy(learner(QUERY), TARGET)


def meta_loss_of_higher(net, first_order):
    higher = pytest.importorskip("higher")
    optimizer = torch.optim.SGD(net.parameters(), RATE)
    with higher.innerloop_ctx(
        net, optimizer, copy_initial_weights=False, track_higher_grads=not first_order
    ) as (learner, steps):
        for _ in range(2):
            steps.step(F.cross_entropy(learner(SUPPORT), TARGET))
        return F.cross_entropy(learner(QUERY), TARGET)


def meta_loss_by_functional_calls(net, first_order):
    weights = dict(net.named_parameters())
    for _ in range(2):
        value = F.cross_entropy(functional_call(net, weights, (SUPPORT,)), TARGET)
        found = torch.autograd.grad(value, list(weights.values()), create_graph=not first_order)
        weights = {
            name: weight - RATE * step
            for (name, weight), step in zip(weights.items(), found, strict=True)
        }
    return F.cross_entropy(functional_call(net, weights, (QUERY,)), TARGET)


@pytest.mark.parametrize(
    ("meta_loss", "first_order"),
    [
        (meta_loss_of_learn2learn, False),
        (meta_loss_of_learn2learn, True),
        (meta_loss_of_higher, False),
        (meta_loss_by_functional_calls, False),
        (meta_loss_by_functional_calls, True),
    ],
)
def test_meta_gradients_are_those_of_the_masked_inner_loop(meta_loss, first_order):
    net = Smooth()
    pruner = Pruner(net, DSDSchedule(0.5, pretrain=0, prune=2, retrain=1))
    value, expected = masked_meta_gradient(pruner, net, first_order=first_order)
    seen = []

    def loss():
        seen.append(meta_loss(net, first_order))
        return seen[-1]

    found = dense_gradients(pruner, loss)
    torch.testing.assert_close(seen[0], value, rtol=1e-12, atol=0)
    torch.testing.assert_close(meta_loss(net, first_order), value, rtol=1e-12, atol=0)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-13)
        assert (gradient[~pruner.masks[name]] != 0).all()


def test_copies_made_while_masks_are_open_are_masked(net):
    pruner = Pruner(net, DSDSchedule(0.5, pretrain=0, prune=2, retrain=1))
    plain = net.state_dict()
    with pruner.opened_masks():
        with pruner.opened_masks():
            loss_of(net).backward()
        assert net.fc.weight_orig.grad[~pruner.masks["fc.weight"]].any()
        twin = copy.deepcopy(net)
    twin.zero_grad()
    for model in (twin, net):
        model.zero_grad()
        loss_of(model).backward()
        assert (model.fc.weight_orig.grad[~pruner.masks["fc.weight"]] == 0).all()
    assert list(net.state_dict()) == list(plain)
    assert set(vars(net.fc)) == set(vars(nn.Linear(1, 1)))


def test_a_loss_that_does_not_reach_a_weight_is_refused(net):
    pruner = Pruner(net, SCHEDULE)
    losses = {
        "conv1.weight, conv2.weight, fc.weight": lambda: loss_of(copy.deepcopy(net)),
        "for fc.weight": lambda: net.conv2(torch.relu(net.norm(net.conv1(X)))).square().mean(),
        "conv1.weight, conv2.weight, fc": lambda: loss_of(net).detach(),
    }
    pruner.step()
    masks = {n: m.clone() for n, m in pruner.masks.items()}
    for words, loss in losses.items():
        with pytest.raises(ValueError, match=f"gives no gradient .*{words}"):
            dense_gradients(pruner, loss)
    regrowth = Regrowth(pruner, interval=1, loss=losses["for fc.weight"])
    with pytest.raises(ValueError, match=r"gives no gradient for fc\.weight"):
        pruner.step()
    assert all(map(torch.equal, pruner.masks.values(), masks.values()))
    assert regrowth.state_dict()
    with pytest.raises(TypeError, match="loss must be a tensor"):
        dense_gradients(pruner, lambda: 0.5)
    with pytest.raises(ValueError, match="loss must be one number"):
        dense_gradients(pruner, lambda: net(X))


def test_a_loss_of_a_learner_is_refused_with_the_one_that_is_meant(net):
    reptile = PrunedReptile(net, SCHEDULE)
    Regrowth(reptile.pruner, interval=1, loss=lambda: loss_of(reptile.clone()))
    for iteration in range(2):
        learner = reptile.clone()
        learner.adapt(F.cross_entropy(learner(X), Y))
        reptile.collect(learner)
        if iteration:
            with pytest.raises(ValueError, match=r"from reptile\(x\), not from reptile.clone\(\)"):
                reptile.step()
        else:
            reptile.step()


def test_misuse(net):
    pruner = Pruner(net, SCHEDULE)
    with pytest.raises(TypeError, match="pruner must be a Pruner"):
        Regrowth(net, interval=1)
    with pytest.raises(ValueError, match="interval must be >= 1"):
        Regrowth(pruner, interval=0)
    with pytest.raises(ValueError, match="fraction"):
        Regrowth(pruner, interval=1, fraction=1.5)
    with pytest.raises(TypeError, match="loss must be a function"):
        Regrowth(pruner, interval=1, loss=torch.ones(1))
    with pytest.raises(TypeError, match="generator"):
        Regrowth(pruner, interval=1, generator=3)
    blocks = nn.Sequential(nn.Linear(8, 8))
    for options in ({"pattern": NByM(2, 4)}, {"allocation": "global"}):
        held = Pruner(copy.deepcopy(blocks), SCHEDULE, **options)
        with pytest.raises(ValueError, match="layer by layer"):
            Regrowth(held, interval=1)
    with pytest.raises(RuntimeError, match="no masks to replace in a dense segment"):
        pruner.replace_masks({})
    pruner.step()
    masks = {n: m.clone() for n, m in pruner.masks.items()}
    good = masks["fc.weight"]
    for bad, words in (
        ({"fc": good}, "'fc' is not one of the pruned tensors"),
        ({"fc.weight": good.float()}, "must be boolean"),
        ({"fc.weight": good[:1]}, "must be boolean"),
        ({"fc.weight": torch.ones_like(good)}, "fc.weight keeps 48 weights, but"),
    ):
        with pytest.raises(ValueError, match=words):
            pruner.replace_masks(bad)
        assert all(map(torch.equal, pruner.masks.values(), masks.values()))


def test_an_interval_that_no_phase_reaches_is_told():
    pruner = Pruner(nn.Linear(4, 4), SCHEDULE)
    with pytest.warns(UserWarning, match="no mask will move: interval=10, .* has 10 iterations"):
        Regrowth(pruner, interval=10)
