from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from l2l_prune import DSDSchedule, PrunedReptile, Pruner
from l2l_prune.masking.criteria import Movement, grasp, magnitude, random, snip, taylor

SCHEDULE = DSDSchedule(0.5, pretrain=1, prune=2, retrain=1)


def test_magnitude_is_the_default_and_refuses_complex():
    weight = torch.nn.Parameter(torch.randn(3, 4))
    assert torch.equal(magnitude(weight), weight.detach().abs())
    assert not magnitude(weight).requires_grad
    with pytest.raises(TypeError, match="complex"):
        magnitude(torch.ones(3, dtype=torch.complex64))


def test_random_masks_have_the_count_and_ignore_the_weights(net):
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.arange(p.numel()).view(p.shape))  # by magnitude the last half would stay
    pruner = Pruner(net, SCHEDULE, criterion=random(torch.Generator().manual_seed(0)))
    pruner.step()
    for mask in pruner.masks.values():
        n = mask.numel()
        assert int(mask.sum()) == n - round(0.5 * n)
    first = mask.flatten()[: n // 2].sum() / mask.sum()
    assert 0.2 < first < 0.8
    weights = dict(net.named_modules())
    for name, mask in pruner.masks.items():
        assert (weights[name.rpartition(".")[0]].weight[~mask] == 0).all()


def test_a_criterion_sees_the_gradient_of_the_last_backward(net):
    def taylor(weight):
        return (weight * weight.grad).abs()

    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = Pruner(net, SCHEDULE, optimizer, criterion=taylor)
    F.cross_entropy(net(torch.randn(4, 1, 6, 6)), torch.arange(4) % 3).backward()
    optimizer.step()
    weights = {n: p.detach().clone() for n, p in net.named_parameters()}
    grads = {n: p.grad.clone() for n, p in net.named_parameters()}
    pruner.step()
    for name, mask in pruner.masks.items():
        key = f"{name}_orig"
        scores = (weights[key] * grads[key]).abs().flatten()
        kept = scores.argsort(descending=True, stable=True)[: int(mask.sum())]
        assert set(kept.tolist()) == set(mask.flatten().nonzero().flatten().tolist())


@pytest.mark.parametrize(
    ("criterion", "words"),
    [
        (lambda w: w[0], "a score for each of its weights"),
        (lambda w: 1.0, "a score for each of its weights"),
        (lambda w: w.detach().abs() * float("nan"), "by the criterion: the scores hold NaN"),
    ],
)
def test_bad_scores_name_the_tensor_and_change_nothing(net, criterion, words):
    pruner = Pruner(net, SCHEDULE, criterion=criterion)
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=rf"cannot prune conv1.weight at iteration 0.*{words}"):
        pruner.step()
    assert (pruner.iteration, pruner.sparse) == (0, False)
    assert all(map(torch.equal, before, net.parameters()))


def test_reptile_hands_its_criterion_on(net):
    reptile = PrunedReptile(net, SCHEDULE, criterion=lambda w: -w.detach().abs())
    learner = reptile.clone()
    learner.adapt(learner(torch.randn(4, 1, 6, 6)).square().mean())
    reptile.collect(learner)
    reptile.step()
    for name, mask in reptile.pruner.masks.items():
        weight = dict(net.named_parameters())[f"{name}_orig"]
        assert (weight[~mask] == 0).all()
        assert mask.any()
        assert (~mask).any()


def adapted_outer_step(net):
    """A backward pass whose gradients are there when the mask is due."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    F.cross_entropy(net(torch.randn(4, 1, 6, 6)), torch.arange(4) % 3).backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("criterion", "formula"),
    [(snip, lambda w, g: abs(w * g)), (taylor, lambda w, g: (w * g) ** 2)],
)
def test_gradient_criteria_entry_by_entry(net, criterion, formula):
    adapted_outer_step(net)
    for weight in (net.conv1.weight, net.fc.weight):
        pairs = zip(weight.flatten().tolist(), weight.grad.flatten().tolist(), strict=True)
        expected = torch.tensor([formula(w, g) for w, g in pairs]).view(weight.shape)
        torch.testing.assert_close(criterion(weight).detach(), expected)


def test_grasp_is_weight_times_hessian_times_gradient():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    x, y = torch.randn(5, 3).double(), torch.randn(5, 1).double()
    parameters = list(net.parameters())
    shapes = [p.shape for p in parameters]

    def of_vector(vector):
        parts = vector.split([s.numel() for s in shapes])
        named = {
            n: p.view(s) for (n, _), p, s in zip(net.named_parameters(), parts, shapes, strict=True)
        }
        return F.mse_loss(torch.func.functional_call(net, named, (x,)), y)

    vector = torch.cat([p.detach().flatten() for p in parameters])
    hessian = torch.autograd.functional.hessian(of_vector, vector)  # the whole matrix
    gradient = torch.autograd.functional.jacobian(of_vector, vector)
    expected = vector * (hessian @ gradient)
    score = grasp(lambda: F.mse_loss(net(x), y), parameters)
    start = 0
    for parameter in parameters:
        part = expected[start : start + parameter.numel()].view(parameter.shape)
        with torch.no_grad():
            torch.testing.assert_close(score(parameter), part)
        start += parameter.numel()


def test_movement_sums_minus_weight_times_gradient_over_outer_steps(net):
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    movement = Movement(net.parameters())
    optimizer.register_step_pre_hook(movement.observe)
    schedule = DSDSchedule(0.5, pretrain=3, prune=2, retrain=1)
    pruner = Pruner(net, schedule, optimizer, criterion=movement)
    expected = [torch.zeros_like(p) for p in net.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(torch.randn(4, 1, 6, 6)), torch.arange(4) % 3).backward()
        for total, p in zip(expected, net.parameters(), strict=True):
            total -= (p * p.grad).detach()
        optimizer.step()
        pruner.step()
    by_name = dict(zip((n for n, _ in net.named_parameters()), expected, strict=True))
    for name, mask in pruner.masks.items():
        scores = by_name[f"{name}_orig"].flatten()
        kept = scores.argsort(descending=True)[: int(mask.sum())]
        assert set(kept.tolist()) == set(mask.flatten().nonzero().flatten().tolist())
    resumed = Movement(net.parameters())
    resumed.load_state_dict(movement.state_dict())
    assert torch.equal(resumed(net.conv2.weight_orig), movement(net.conv2.weight_orig))


def test_criteria_of_reptile_see_its_meta_gradient(net):
    """Old minus mean adapted weights, before the step that moves the weights."""
    movement = Movement(net.parameters())
    reptile = PrunedReptile(net, SCHEDULE, criterion=movement, inner_optimizer=torch.optim.SGD)
    reptile.register_step_pre_hook(movement.observe)
    old = [p.detach().clone() for p in net.parameters()]
    learners = []
    for _ in range(2):
        learner = reptile.clone()
        learner.adapt(F.cross_entropy(learner(torch.randn(4, 1, 6, 6)), torch.arange(4) % 3))
        learners.append([p.detach().clone() for p in learner.module.parameters()])
        reptile.collect(learner)
    reptile.step()
    for before, one, two, p in zip(old, *learners, net.parameters(), strict=True):
        expected = -before * (before - (one + two) / 2)
        torch.testing.assert_close(movement(p), expected, atol=1e-7, rtol=1e-3)
        assert p.grad is None


@pytest.mark.parametrize("criterion", [snip, taylor])
def test_without_gradients_the_words_say_what_to_do(net, criterion):
    with pytest.raises(ValueError, match=r"conv1.weight at iteration 0.*begin with a dense phase"):
        Pruner(net, DSDSchedule(0.5, pretrain=0, prune=2, retrain=1), criterion=criterion)
    assert not prune.is_pruned(net)


def test_movement_and_grasp_refuse_what_they_do_not_know(net):
    movement = Movement(net.fc.parameters())
    with pytest.raises(ValueError, match="movement was made for other parameters"):
        movement(net.conv1.weight)
    with pytest.raises(ValueError, match="observed no step"):
        movement(net.fc.weight)
    with pytest.raises(ValueError, match="closure"):
        movement.observe(None, (None, lambda: 0))
    with pytest.raises(ValueError, match="of other parameters"):
        movement.load_state_dict(Movement(net.parameters()).state_dict())
    with pytest.raises(ValueError, match="grasp was made for other parameters"):
        grasp(lambda: net.fc.weight.sum(), net.fc.parameters())(net.conv1.weight)


def test_grasp_refuses_a_loss_that_does_not_reach_a_weight(net, batch):
    scores = grasp(lambda: net.conv1(batch[0]).square().mean(), net.parameters())
    assert scores(net.conv1.weight).any()
    with pytest.raises(ValueError, match="gives no gradient"):
        scores(net.fc.weight)
    with pytest.raises(ValueError, match="gives no gradient"):
        grasp(lambda: net(batch[0]).sum().detach(), net.parameters())(net.fc.weight)


HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("criterion", "formula"),
    [(snip, lambda w, g: (w * g).abs()), (taylor, lambda w, g: (w * g).square())],
)
def test_gradient_criteria_do_not_underflow_in_half_precision(criterion, formula, dtype):
    """The order is that of float64 on the same numbers."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter((torch.randn(1000, generator=generator) * 0.01).to(dtype))
    weight.grad = (torch.randn(1000, generator=generator) * 0.001).to(dtype)
    exact = formula(weight.detach().double(), weight.grad.double())
    scores = criterion(weight).detach()
    torch.testing.assert_close(scores.double(), exact, rtol=1e-6, atol=0)
    assert torch.equal(scores.argsort(stable=True), exact.argsort(stable=True))


@pytest.mark.parametrize("dtype", HALVES)
def test_movement_sums_do_not_stall_in_half_precision(dtype):
    weight = nn.Parameter(torch.full((3,), 0.125, dtype=dtype))
    movement = Movement([weight])
    weight.grad = torch.full((3,), -0.125, dtype=dtype)
    for _ in range(1280):
        movement.observe()
    assert movement(weight).tolist() == [20.0] * 3  # a sum in bfloat16 stops at 4
    resumed = Movement([weight])
    resumed.load_state_dict(movement.state_dict())
    assert torch.equal(resumed(weight), movement(weight))


def test_grasp_does_not_underflow_in_half_precision():
    weight = nn.Parameter(torch.tensor([1e-3, 2e-3, 3e-3], dtype=torch.float16))
    factors = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float16)

    def loss():
        return (factors * weight.square()).sum()

    w, f = weight.detach().double(), factors.double()
    expected = w * (2 * f) * (2 * f * w)  # w * H g of a diagonal quadratic
    found = grasp(loss, [weight])(weight).double()
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)


def test_movement_counts_only_the_steps_that_move_a_weight():
    first, second = nn.Linear(4, 3), nn.Linear(3, 2)
    net = nn.Sequential(first, second)
    often = torch.optim.SGD(first.parameters(), 0.1)
    seldom = torch.optim.SGD(second.parameters(), 0.1)  # gathers gradients of two iterations
    movement, sums = Movement(net.parameters()), [torch.zeros_like(p) for p in net.parameters()]
    for optimizer in (often, seldom):
        optimizer.register_step_pre_hook(movement.observe)
    for iteration in range(4):
        often.zero_grad()
        net(torch.randn(8, 4)).square().sum().backward()
        for total, p in zip(sums, net.parameters(), strict=True):
            if p.shape[0] == 3 or iteration % 2:
                total -= (p * p.grad).detach()
        often.step()
        if iteration % 2:
            seldom.step()
            seldom.zero_grad()
    for total, p in zip(sums, net.parameters(), strict=True):
        assert torch.allclose(movement(p), total)


def test_copies_of_a_random_criterion_have_a_generator_of_their_own(net):
    generator = torch.Generator().manual_seed(0)
    pruner = Pruner(net, SCHEDULE, criterion=random(generator))
    before = generator.get_state()
    for copied in (copy.deepcopy(pruner), pickle.loads(pickle.dumps(pruner))):
        copied.step()
        assert torch.equal(generator.get_state(), before)
        again = copy.deepcopy(pruner)
        again.step()
        assert all(torch.equal(m, again.masks[n]) for n, m in copied.masks.items())
    pruner.step()
    assert not torch.equal(generator.get_state(), before)
