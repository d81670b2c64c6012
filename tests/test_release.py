"""First steps of released weights: gradient scalers, exchanges of masks, copies of the trainer."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn, optim

from l2l_prune import DSDSchedule, Pruner, Schedule, Segment
from l2l_prune.masking.criteria import Movement

RELEASE = 150
LR = 0.02
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
KINDS = {
    "adam": functools.partial(optim.Adam, lr=LR),
    "adamw": functools.partial(optim.AdamW, lr=LR, weight_decay=0.1),
    "amsgrad": functools.partial(optim.Adam, lr=LR, amsgrad=True),
    "sgd": functools.partial(optim.SGD, lr=LR, momentum=0.9),
}
VARIANTS = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
}


def trained(make, *, dtype=torch.float32, device="cpu", scaled="", overflow=False, steps=3):
    """Weights before the first good step after a release, and after each of some steps from there.

    Args:
        scaled: How a gradient scaler is used: not at all, plainly, or with ``unscale_`` first.
        overflow: An overflow at the first step after the release; without a scaler, that
            iteration is left out altogether.
    """
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(20, 1, generator=generator, dtype=torch.float64)
    layer = nn.Linear(20, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(1, 20, generator=generator, dtype=torch.float64))
    layer.to(device, dtype)
    x = torch.randn(64, 20, generator=generator, dtype=torch.float64)  # always the same: converges
    optimizer = make(layer.parameters())
    schedule = DSDSchedule(0.5, pretrain=5, prune=RELEASE - 5, retrain=10)
    pruner = Pruner(layer, schedule, optimizer)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**16, enabled=bool(scaled))
    seen = []
    for iteration in range(RELEASE + overflow + steps):
        loss = (layer(x.to(layer.weight)) - (x @ target).to(layer.weight)).square().mean()
        if iteration >= RELEASE + overflow:
            seen.append(layer.weight_orig.detach().double().cpu().clone())
        overflows = overflow and iteration == RELEASE
        if overflows and not scaled:
            continue
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if overflows:
            layer.weight_orig.grad.fill_(float("inf"))
        if scaled == "unscale_":
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        pruner.step()
    return [*seen, layer.weight_orig.detach().double().cpu()]


@functools.cache
def oracle(kind, overflow):
    """In float64 without a scaler, and without the iteration that overflows."""
    return trained(KINDS[kind], dtype=torch.float64, overflow=overflow)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overflow", [False, True], ids=["good", "overflow"])
@pytest.mark.parametrize("scaled", ["", "plain", "unscale_"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_release_under_a_gradient_scaler(kind, variant, scaled, overflow, device):
    if variant == "capturable" and (device == "cpu" or kind == "sgd"):
        pytest.skip("capturable steps exist for Adam on a GPU only")
    make = functools.partial(KINDS[kind], **VARIANTS[variant])
    expected = oracle(kind, overflow)
    found = trained(make, device=device, scaled=scaled, overflow=overflow)
    assert expected[0].count_nonzero() == 10
    assert expected[1].count_nonzero() == 20
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_movement_under_a_gradient_scaler(fused):
    """Sums are of gradients as they are, and leave out steps that overflow."""

    def sums(scaled):
        torch.manual_seed(0)
        layer = nn.Linear(6, 2)
        optimizer = optim.SGD(layer.parameters(), lr=0.1, fused=fused)
        movement = Movement(layer.parameters())
        optimizer.register_step_pre_hook(movement.observe)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=scaled)
        for iteration in range(4):
            optimizer.zero_grad()
            scaler.scale(layer(torch.randn(5, 6)).square().mean()).backward()
            if iteration == 2:
                if not scaled:
                    continue
                layer.weight.grad[0, 0] = float("nan")
            scaler.step(optimizer)
            scaler.update()
        return movement(layer.weight)

    torch.testing.assert_close(sums(True), sums(False))


def exchanged_once(make, kept=0.1):
    """A tensor of 200 weights, 90% pruned, of which 10 are exchanged; its optimizer about to step.

    Returns:
        Layer, optimizer, and which entries stayed, were grown, and are pruned.
    """
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(200, 1, bias=False)
    target = torch.randn(200, 1, generator=generator)
    optimizer = make(layer.parameters())
    pruner = Pruner(layer, Schedule((Segment(9999, sparse=True, sparsity=1 - kept),)), optimizer)

    def backward():
        x = torch.randn(64, 200, generator=generator)
        optimizer.zero_grad()
        (layer(x) - x @ target).square().mean().backward()

    for _ in range(50):
        backward()
        optimizer.step()
        pruner.step()
    old = pruner.masks["weight"]
    new = old.clone()
    new.view(-1)[old.view(-1).nonzero().view(-1)[:10]] = False
    new.view(-1)[(~old).view(-1).nonzero().view(-1)[:10]] = True
    pruner.replace_masks({"weight": new})
    backward()
    return layer, optimizer, old & new, new & ~old, ~new


def test_grown_weights_move_as_the_kept_ones_do_in_an_exchange():
    """By Adam's arithmetic: pruned entries, which do not move, must not count as kept."""
    beta1, beta2 = 0.9, 0.999
    layer, optimizer, kept, grown, pruned = exchanged_once(
        lambda p: optim.Adam(p, lr=LR, betas=(beta1, beta2))
    )
    state = optimizer.state[layer.weight_orig]
    correction = 1 - beta2 ** (float(state["step"]) + 1)
    sizes = (state["exp_avg"] / (state["exp_avg_sq"] / correction).sqrt()).abs()
    mean = float(sizes[kept].mean())
    assert 0.1 < mean < 1
    gradient, before = layer.weight_orig.grad.clone(), layer.weight_orig.detach().clone()
    floor = (gradient / mean).square() * correction
    squared = torch.maximum(state["exp_avg_sq"][kept].max(), floor)
    squared = beta2 * torch.maximum(squared, state["exp_avg_sq"]) + (1 - beta2) * gradient**2
    first = (1 - beta1) * gradient / (1 - beta1 ** (float(state["step"]) + 1))
    expected = LR * (first / (squared / correction).sqrt()).abs()
    optimizer.step()
    moved = (layer.weight_orig.detach() - before).abs()
    torch.testing.assert_close(moved[grown], expected[grown], rtol=1e-3, atol=1e-8)
    assert (moved[pruned] == 0).all()


def test_second_moments_are_levelled_to_the_kept_ones_in_an_exchange():
    """A pruned entry's old second moment is none that a kept entry has."""
    layer = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    optimizer = optim.RMSprop(layer.parameters(), lr=LR)
    layer.weight.grad = torch.ones(1, 4)
    optimizer.step()
    pruner = Pruner(layer, Schedule((Segment(9, sparse=True, sparsity=0.5),)), optimizer)
    assert pruner.masks["weight"].tolist() == [[True, True, False, False]]
    optimizer.state[layer.weight_orig]["square_avg"].copy_(torch.tensor([[0.2, 0.5, 9.0, 0.1]]))
    pruner.replace_masks({"weight": torch.tensor([[True, False, False, True]])})
    found = optimizer.state[layer.weight_orig]["square_avg"]
    torch.testing.assert_close(found, torch.tensor([[0.2, 0.5, 9.0, 0.2]]))


def test_rprop_releases_weights_with_the_step_sizes_of_the_kept():
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(20, 1, bias=False)
    x, target = torch.randn(64, 20, generator=generator), torch.randn(20, 1, generator=generator)
    optimizer = optim.Rprop(layer.parameters(), lr=0.05)
    pruner = Pruner(layer, DSDSchedule(0.5, pretrain=2, prune=60, retrain=5), optimizer)

    def backward():
        optimizer.zero_grad()
        (layer(x) - x @ target).square().mean().backward()

    for _ in range(62):
        backward()
        mask = pruner.masks["weight"]
        optimizer.step()
        pruner.step()
    mean = float(optimizer.state[layer.weight_orig]["step_size"][mask].mean())
    assert mean < 0.01  # converged under the mask
    backward()
    before = layer.weight_orig.detach().clone()
    optimizer.step()
    moved = (layer.weight_orig.detach() - before).abs()[~mask]
    torch.testing.assert_close(moved, torch.full_like(moved, mean))


def released():
    """A model, optimizer and Pruner just after a release."""
    torch.manual_seed(0)
    layer = nn.Linear(20, 1, bias=False)
    optimizer = optim.Adam(layer.parameters(), lr=LR, betas=(0.0, 0.999))
    pruner = Pruner(layer, DSDSchedule(0.5, pretrain=2, prune=30, retrain=9), optimizer)
    for _ in range(32):
        step(layer, optimizer)
        pruner.step()
    assert pruner.phase == "retrain"
    return layer, optimizer, pruner


def step(layer, optimizer):
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(64, 20, generator=generator), torch.randn(64, 1, generator=generator)
    optimizer.zero_grad()
    (layer(x) - y).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))],
    ids=["deepcopy", "pickle"],
)
def test_a_copied_trainer_goes_on_as_the_first_would(copied):
    layer, optimizer, pruner = released()
    twin, twins_optimizer, twins_pruner = copied((layer, optimizer, pruner))
    for model, optim_, pruner_ in (
        (layer, optimizer, pruner),
        (twin, twins_optimizer, twins_pruner),
    ):
        step(model, optim_)
        pruner_.step()
    assert torch.equal(twin.weight, layer.weight)
    twins_pruner.finalize()
    assert not twins_optimizer._optimizer_step_pre_hooks
    assert optimizer._optimizer_step_pre_hooks  # the first is not touched


def test_a_finalized_trainer_is_copied_without_hooks():
    layer, optimizer, pruner = released()
    pruner.finalize()
    _, twins_optimizer, _ = copy.deepcopy((layer, optimizer, pruner))
    assert not twins_optimizer._optimizer_step_pre_hooks


def test_a_release_waits_for_the_first_step_that_is_made():
    """Without a scaler too: an iteration whose optimizer is not stepped changes nothing."""
    results = []
    for idle in (0, 3):
        layer, optimizer, pruner = released()
        for _ in range(idle):
            pruner.step()
        step(layer, optimizer)
        results.append(layer.weight.detach())
        pruner.step()
        assert not pruner.state_dict()["regrown"]
    assert torch.equal(*results)


def test_weights_that_are_pruned_again_wait_no_more():
    layer = nn.Linear(4, 1, bias=False)
    optimizer = optim.Adam(layer.parameters(), lr=LR)
    schedule = Schedule(
        (Segment(1, sparse=True, sparsity=0.5), Segment(1), Segment(1, sparse=True, sparsity=0.5))
    )
    pruner = Pruner(layer, schedule, optimizer)
    pruner.step()
    assert int(pruner.state_dict()["regrown"]["weight"].sum()) == 2
    pruner.step()
    assert not pruner.state_dict()["regrown"]
