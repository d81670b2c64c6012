"""Fields and their learner against plain loops over functional_call, in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from l2l_prune import DSDSchedule, Pruner
from l2l_prune.metalearners.fields import (
    FieldMAML,
    FourierFeatureMLP,
    ImageSignals,
    Siren,
    coordinates,
    psnr,
)
from l2l_prune.schedules.common import metasparse


@pytest.fixture
def signals():
    return coordinates(5, 6).double(), torch.rand(3, 30, 2, dtype=torch.float64)


@pytest.fixture
def siren():
    return Siren(out_features=2, width=8, depth=2, omega_0=5.0).double()


def sparse(model, sparsity=0.5, **options):
    schedule = DSDSchedule(sparsity, pretrain=0, prune=9, retrain=0)
    return Pruner(model, schedule, **options)


# ---- networks ---------------------------------------------------------------------------------


def test_siren_starts_as_published():
    net = Siren(3, 2, width=256, depth=3, omega_0=20.0)
    bounds = [1 / 3, *[math.sqrt(6 / 256) / 20] * 3]
    for layer, bound in zip(net.layers, bounds, strict=True):
        weight = layer.weight.detach()
        assert weight.abs().max() <= bound
        assert weight.abs().max() > 0.97 * bound
        assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.06)  # of a uniform law
        assert weight.mean().abs() < 5 * bound / math.sqrt(3 * weight.numel())


def test_a_sirens_activations_have_the_published_spread():
    """Arcsine law after each sine layer (variance 1/2), before it variance 1 and the biases'."""
    x = 2 * torch.rand(2000, 2) - 1
    net = Siren(width=512, depth=4).requires_grad_(False)
    for number, layer in enumerate(net.layers[:-1]):
        before = net.omega_0 * layer(x)
        x = torch.sin(before)
        assert x.var() == pytest.approx(0.5, abs=0.1)
        if number:
            assert before.var() == pytest.approx(1 + net.omega_0**2 / (3 * 512), rel=0.15)


def test_siren_is_its_formula(siren):
    x = torch.rand(7, 2, dtype=torch.float64)
    (a, b), (c, d), (e, f) = ((layer.weight, layer.bias) for layer in siren.layers)
    expected = torch.sin(5 * (torch.sin(5 * (x @ a.T + b)) @ c.T + d)) @ e.T + f
    torch.testing.assert_close(siren(x), expected)


def test_fourier_features_are_their_formula():
    net = FourierFeatureMLP(2, 3, width=6, depth=1, features=4, scale=2.0)
    x = torch.rand(7, 2)
    angles = torch.stack([2 * math.pi * (row * net.frequencies.T).sum(1) for row in x])
    hidden = torch.cat([torch.sin(angles), torch.cos(angles)], 1) @ net.layers[0].weight.T
    expected = (hidden + net.layers[0].bias).clamp(min=0) @ net.layers[1].weight.T
    torch.testing.assert_close(net(x), expected + net.layers[1].bias)
    many = FourierFeatureMLP(features=20_000, scale=2.0).frequencies
    assert many.std() == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("kind", [Siren, FourierFeatureMLP])
def test_a_generator_decides_the_weights(kind):
    one, two, other = (kind(generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))
    assert not torch.equal(one.layers[1].weight, other.layers[1].weight)


# ---- signals ----------------------------------------------------------------------------------


def test_signals_are_the_pixels_of_the_pictures():
    images = torch.randint(0, 256, (4, 3, 5, 7), dtype=torch.uint8)
    signals = ImageSignals(images)
    assert signals.coordinates.shape == (35, 2)
    for row in range(5):
        for column in range(7):
            point = signals.coordinates[row * 7 + column]
            torch.testing.assert_close(point, torch.tensor([row / 2 - 1, column / 3 - 1]))
            pixel = images[:, :, row, column].float() / 255
            assert torch.equal(signals.values[:, row * 7 + column], pixel)
    assert torch.equal(signals.pictures(signals.values), images.float() / 255)
    assert torch.equal(signals.pictures(3 * signals.values[0] - 1)[0].amax(), torch.tensor(1.0))


def test_a_sample_has_different_signals():
    signals = ImageSignals(torch.arange(8).view(8, 1, 1, 1) / 8)
    drawn = signals.sample(8, torch.Generator().manual_seed(0)).flatten()
    assert sorted(drawn.tolist()) == (torch.arange(8) / 8).tolist()


def test_psnr_is_that_of_each_signal():
    target = torch.zeros(2, 4, 3)
    noisy = torch.stack([torch.full((4, 3), 0.1), torch.full((4, 3), 0.01)])
    torch.testing.assert_close(psnr(noisy, target), torch.tensor([20.0, 40.0]))


# ---- the learner ------------------------------------------------------------------------------


def by_hand(net, x, y, lr, steps, first_order=False):
    """Inner steps on one signal with functional_call and autograd."""
    weights = dict(net.named_parameters())
    for _ in range(steps):
        loss = F.mse_loss(functional_call(net, weights, (x,)), y)
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=not first_order)
        weights = {
            name: weight - lr * gradient
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }
    return weights


@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "pruned"])
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_inner_loop_and_the_meta_gradient(siren, signals, steps, first_order, pruned):
    x, y = signals
    maml = FieldMAML(siren, lr=0.05, steps=steps, first_order=first_order)
    if pruned:
        sparse(maml)
    oracle = copy.deepcopy(siren)
    total = 0.0
    for number, own in enumerate(y):
        expected = by_hand(oracle, x, own, 0.05, steps, first_order)
        for name, weight in maml.adapt(x, y).items():
            torch.testing.assert_close(weight[number], expected[name], rtol=1e-10, atol=1e-12)
        total = total + F.mse_loss(functional_call(oracle, expected, (x,)), own) / len(y)
    loss = maml.loss(x, y)
    torch.testing.assert_close(loss, total)
    loss.backward()
    total.backward()
    for ours, theirs in zip(siren.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_signals_together_are_signals_one_by_one(siren, signals):
    x, y = signals
    maml = FieldMAML(siren, lr=0.05)
    together, fitted = maml.adapt(x, y), maml.fit(x, y, steps=5, lr=1e-2)
    for number in range(len(y)):
        one = maml.adapt(x, y[number : number + 1])
        own = maml.fit(x, y[number : number + 1], steps=5, lr=1e-2)
        for name in together:
            torch.testing.assert_close(together[name][number], one[name][0])
            torch.testing.assert_close(fitted[name][number], own[name][0])


def test_a_fit_is_adam_on_the_field_and_leaves_it_alone(siren, signals):
    x, y = signals
    sparse(siren)
    maml, twin = FieldMAML(siren), copy.deepcopy(siren)
    before = copy.deepcopy(siren.state_dict())
    with torch.no_grad():  # the learner takes its gradients itself
        fitted = maml.fit(x, y, steps=6, lr=1e-2)
    optimizer = torch.optim.Adam(twin.parameters(), 1e-2)
    for _ in range(6):
        optimizer.zero_grad()
        F.mse_loss(twin(x), y[1]).backward()
        optimizer.step()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(fitted[name][1], parameter.detach())
    assert all(map(torch.equal, siren.state_dict().values(), before.values()))
    torch.testing.assert_close(maml(x, fitted)[1], twin(x).detach())
    torch.testing.assert_close(maml.field(fitted, 1)(x), twin(x))


def test_masks_hold_in_the_inner_loop(siren, signals):
    x, y = signals
    maml = FieldMAML(siren, lr=0.5)
    pruner = sparse(maml, 0.7)
    for weights in (maml.adapt(x, y, steps=3), maml.fit(x, y, steps=5, lr=0.1)):
        for number in range(len(y)):
            field = maml.field(weights, number)
            for name, mask in pruner.masks.items():
                weight = field.get_submodule(name.removeprefix("module.").removesuffix(".weight"))
                assert not weight.weight[~mask].any()
                assert weight.weight[mask].all()
    moved = maml.field(maml.adapt(x, y), 0).layers[2].bias - siren.layers[2].bias
    assert moved.abs().min() > 0  # biases stay dense and learn


def test_pruned_before_is_pruned_after_wrapping(siren, signals):
    x, y = signals
    twin = copy.deepcopy(siren)
    sparse(siren)
    wrapped = FieldMAML(twin)
    sparse(wrapped)
    torch.testing.assert_close(FieldMAML(siren).loss(x, y), wrapped.loss(x, y))


def test_frozen_parameters_do_not_adapt(siren, signals):
    siren.layers[0].requires_grad_(False)
    adapted = FieldMAML(siren).adapt(*signals)
    assert list(adapted) == [f"layers.{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")]


def test_learn2learns_maml_gives_the_same_meta_gradient(siren, signals):
    l2l = pytest.importorskip("learn2learn")
    x, y = signals
    sparse(siren)
    twin = copy.deepcopy(siren)
    FieldMAML(siren, lr=0.05).loss(x, y).backward()
    maml = l2l.algorithms.MAML(twin, lr=0.05)
    for own in y:
        learner = maml.clone()
        for _ in range(2):
            learner.adapt(F.mse_loss(learner(x), own))
        (F.mse_loss(learner(x), own) / len(y)).backward()
    for ours, theirs in zip(siren.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_meta_learning_helps():
    """Sparse at the end: two inner steps gain more than at the start, and masks are exact."""
    torch.manual_seed(1)
    bumps = torch.stack(
        [
            torch.exp(-8 * (coordinates(8, 8) - centre).square().sum(1, keepdim=True))
            for centre in torch.rand(12, 2) - 0.5
        ]
    )
    x, unseen = coordinates(8, 8), bumps[8:]
    maml = FieldMAML(Siren(width=16, omega_0=10.0), lr=0.02)
    optimizer = torch.optim.Adam(maml.parameters(), 3e-3)
    pruner = Pruner(maml, metasparse(0.8, pretrain=30, interval=10), optimizer)

    def quality():
        with torch.no_grad():
            return psnr(maml(x, maml.adapt(x, unseen)), unseen).mean()

    before = quality()
    for _ in range(pruner.schedule.iterations):
        optimizer.zero_grad()
        maml.loss(x, bumps[:8]).backward()
        optimizer.step()
        pruner.step()
    assert quality() > before + 1
    kept = {name: int(mask.sum()) for name, mask in pruner.masks.items()}
    assert all(kept[n] == m.numel() - round(0.8 * m.numel()) for n, m in pruner.masks.items())


def test_neurons_can_be_cut():
    pytest.importorskip("torch_pruning")
    from l2l_prune.channels.pruner import ChannelPruner

    x, y = coordinates(6, 6), torch.rand(3, 36, 1)
    maml = FieldMAML(Siren(width=16))
    optimizer = torch.optim.Adam(maml.parameters(), 1e-3)
    schedule = DSDSchedule(0.5, pretrain=1, prune=2, retrain=1)
    pruner = ChannelPruner(maml, schedule, optimizer, example_inputs=x)
    shapes = []
    for _ in range(3):
        optimizer.zero_grad()
        maml.loss(x, y).backward()
        optimizer.step()
        pruner.step()
        shapes.append([tuple(layer.weight.shape) for layer in maml.module.layers])
    small = [(8, 2), (8, 8), (8, 8), (1, 8)]
    full = [(16, 2), (16, 16), (16, 16), (1, 16)]
    assert shapes == [small, small, full]


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda: Siren(width=0), ValueError, "width must be >= 1"),
        (lambda: Siren(omega_0=0), ValueError, "omega_0 must be a number > 0"),
        (lambda: FourierFeatureMLP(features=0), ValueError, "features must be >= 1"),
        (lambda: coordinates(0, 3), ValueError, "height must be >= 1"),
        (lambda: ImageSignals(torch.rand(3, 4, 4)), ValueError, r"\[n, C, H, W\].*\(3, 4, 4\)"),
        (lambda: ImageSignals(2 * torch.ones(1, 1, 2, 2)), ValueError, r"in \[0, 1\]"),
        (lambda: ImageSignals(torch.full((1, 1, 2, 2), math.nan)), ValueError, r"in \[0, 1\]"),
        (lambda: ImageSignals(torch.rand(2, 1, 2, 2)).sample(3), ValueError, r"\[1, 2\], got 3"),
        (lambda: FieldMAML(torch.nn.ReLU()), ValueError, "no parameters to adapt"),
        (lambda: FieldMAML(Siren(), lr=0), ValueError, "lr must be a number > 0"),
        (lambda: FieldMAML(Siren(), steps=0), ValueError, "steps must be >= 1"),
        (
            lambda: FieldMAML(Siren()).adapt(coordinates(2, 2), torch.rand(4, 1)),
            ValueError,
            r"values must be \[signals, points, C\].*\(4, 1\) .*\(4, 2\)",
        ),
        (
            lambda: FieldMAML(Siren()).fit(coordinates(2, 2), torch.rand(1, 5, 1)),
            ValueError,
            r"values must be .*\(1, 5, 1\)",
        ),
    ],
)
def test_bad_input(act, error, words):
    with pytest.raises(error, match=words):
        act()
