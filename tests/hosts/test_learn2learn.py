"""Every learn2learn algorithm on a pruned model, against the same algorithm on a dense model whose
forward masks its weights through functional_call, in float64, across all phase borders."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from l2l_prune import DSDSchedule, Pruner, Schedule, Segment

from .oracle import LAYERS, PHASES, TinyNet, assert_equal, assert_pruned, largest, tasks

l2l = pytest.importorskip("learn2learn")


class MaskedDense(nn.Module):
    """Dense parameters in the order of ``net``; the forward multiplies them by ``masks``."""

    def __init__(self, net):
        super().__init__()
        self.net = copy.deepcopy(net)
        self.masks = {}

    def forward(self, *inputs, method=None):
        values = {
            n: p * self.masks[n] if n in self.masks else p for n, p in self.net.named_parameters()
        }
        return functional_call(self.net, {**values, **dict(self.net.named_buffers())}, inputs)


def meta_transform(transform, **options):
    return functools.partial(l2l.algorithms.GBML, transform=transform, lr=0.1, **options)


MAML, MetaSGD = l2l.algorithms.MAML, l2l.algorithms.MetaSGD
ALGORITHMS = {
    "maml": functools.partial(MAML, lr=0.1),
    "fomaml": functools.partial(MAML, lr=0.1, first_order=True),
    "metasgd": functools.partial(MetaSGD, lr=0.1),
    "metasgd first order": functools.partial(MetaSGD, lr=0.1, first_order=True),
    "gbml scale": meta_transform(l2l.optim.ModuleTransform(lambda i, o: l2l.nn.Scale((1, o)))),
    "gbml linear": meta_transform(l2l.optim.ModuleTransform(nn.Linear)),
    "gbml kronecker": meta_transform(l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)),
    "gbml kronecker adapted": meta_transform(
        l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear), adapt_transform=True
    ),
    "gbml metacurvature": meta_transform(l2l.optim.MetaCurvatureTransform),
    "gbml first order": meta_transform(
        l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear), first_order=True
    ),
}


def outer_step(optimizer, masks, parameters, iteration, rates):
    """Adam, then what Pruner(..., release_state="keep") promises, by hand; returns the masks."""
    optimizer.step()
    segment = PHASES.segment(iteration + 1)
    if segment is not PHASES.segment(iteration):
        masks.clear()
        for name in LAYERS if segment.sparse else ():
            masks[name] = largest(parameters[name].detach(), segment.sparsity)
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].mul_(mask)
            for followed in (parameters[name], rates.get(name)):
                if "exp_avg" in optimizer.state.get(followed, {}):
                    optimizer.state[followed]["exp_avg"].mul_(mask)


def objective(meta, iteration, masks):
    total = 0.0
    for xs, ys, xq, yq in tasks(iteration):
        learner = meta.clone()
        for _ in range(2):
            learner.adapt(F.cross_entropy(learner(xs), ys))
            if masks is not None:
                assert_pruned(learner.module, masks)
        total = total + F.cross_entropy(learner(xq), yq)
    return total


def same_start(make, model, seed=0):
    torch.manual_seed(seed)
    return make(model).double()


@pytest.mark.parametrize("attach", ["before", "after"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithm_equals_the_oracle(name, attach):
    net = TinyNet()
    dense = MaskedDense(net)
    make = ALGORITHMS[name]
    theirs = same_start(make, dense)
    reference = torch.optim.Adam(theirs.parameters(), lr=0.01)
    if attach == "before":
        pruner = Pruner(net, PHASES, release_state="keep")
        ours = same_start(make, net)
        optimizer = torch.optim.Adam(ours.parameters(), lr=0.01)
        pruner.add_optimizer(optimizer)
    else:
        ours = same_start(make, net)
        optimizer = torch.optim.Adam(ours.parameters(), lr=0.01)
        pruner = Pruner(ours, PHASES, optimizer, release_state="keep")
    assert [n.removeprefix("module.") for n in pruner.masks] == list(LAYERS)
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    parameters = dict(dense.net.named_parameters())
    known = attach == "after" and "metasgd" in name  # the Pruner sees Meta-SGD's rates
    rates = dict(zip(parameters, theirs.lrs, strict=True)) if known else {}
    for iteration in range(PHASES.iterations):
        optimizer.zero_grad(), reference.zero_grad()
        objective(ours, iteration, dict(dense.masks)).backward()
        objective(theirs, iteration, None).backward()
        assert_equal([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])
        optimizer.step()
        pruner.step()
        outer_step(reference, dense.masks, parameters, iteration, rates)
        assert_equal(list(ours.parameters()), list(theirs.parameters()))
        assert_pruned(net, dense.masks)
    assert dense.masks


@pytest.mark.parametrize("name", ALGORITHMS)
def test_without_pruning_nothing_changes_by_a_bit(name):
    twins = []
    for attach in (False, True):
        torch.manual_seed(1)
        net = TinyNet()
        if attach:
            pruner = Pruner(net, Schedule((Segment(2), Segment(9, sparse=True, sparsity=0.0))))
        meta = same_start(ALGORITHMS[name], net)
        optimizer = torch.optim.Adam(meta.parameters(), lr=0.01)
        for iteration in range(4):
            optimizer.zero_grad()
            objective(meta, iteration, None).backward()
            optimizer.step()
            if attach:
                pruner.step()
        twins.append(list(meta.parameters()))
    for a, b in zip(*twins, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_metasgd_rates_of_pruned_entries_stay_put(optimizer):
    """Also with momentum from a dense phase, and without a jump when they are released."""
    net = TinyNet()
    meta = MetaSGD(net, lr=0.1)
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    opt = optimizer(meta.parameters(), lr=0.01, **options)
    schedule = Schedule((Segment(3), Segment(60, sparse=True, sparsity=0.5), Segment(3)))
    pruner = Pruner(meta, schedule, opt)
    names = [f"module.{name}" for name, _ in TinyNet().named_parameters()]
    held = masks = None
    for iteration in range(schedule.iterations):
        rates = [rate.detach().clone() for rate in meta.lrs]
        opt.zero_grad()
        objective(meta, iteration, None).backward()
        opt.step()
        for name, rate, before in zip(names, meta.lrs, rates, strict=True):
            if pruner.sparse and name in pruner.masks:
                mask = pruner.masks[name]
                assert torch.equal(rate[~mask], held[name][~mask])
                assert (rate[mask] != before[mask]).any()
            elif masks is not None and name in masks and optimizer is torch.optim.Adam:
                moved = (rate.detach() - before).abs()
                assert moved[~masks[name]].max() <= max(0.01, float(moved[masks[name]].max()))
        if pruner.sparse:
            masks = pruner.masks
        pruner.step()
        if held is None and pruner.sparse:
            held = {n: r.detach().clone() for n, r in zip(names, meta.lrs, strict=True)}


def test_an_optimizer_of_the_rates_alone_follows_the_masks():
    meta = MetaSGD(TinyNet(), lr=0.1)
    of_weights = torch.optim.Adam(meta.module.parameters(), lr=0.01)
    of_rates = torch.optim.Adam(meta.lrs.parameters(), lr=0.01)
    schedule = Schedule((Segment(3), Segment(20, sparse=True, sparsity=0.5)))
    pruner = Pruner(meta, schedule, of_weights)
    pruner.add_optimizer(of_rates)
    names = [f"module.{name}" for name, _ in TinyNet().named_parameters()]
    for iteration in range(9):
        before = {n: rate.detach().clone() for n, rate in zip(names, meta.lrs, strict=True)}
        of_weights.zero_grad()
        of_rates.zero_grad()
        objective(meta, iteration, None).backward()
        of_weights.step()
        of_rates.step()
        if pruner.sparse:
            rates = dict(zip(names, meta.lrs, strict=True))
            for name, mask in pruner.masks.items():
                assert torch.equal(rates[name][~mask], before[name][~mask])
                assert (rates[name][mask] != before[name][mask]).any()
        pruner.step()
    with pytest.raises(ValueError, match="holds none of the weights"):
        pruner.add_optimizer(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1))


class WithUnused(TinyNet):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(2, 2).double()
        self.head.bias.requires_grad_(False)


def test_allow_unused_and_allow_nograd():
    net = WithUnused()
    dense = MaskedDense(net)
    options = {"lr": 0.1, "allow_unused": True, "allow_nograd": True}
    pruner = Pruner(net, Schedule((Segment(3, sparse=True, sparsity=0.5),)))
    dense.masks = {n: m.double() for n, m in pruner.masks.items()}
    with torch.no_grad():
        for n, p in dense.net.named_parameters():
            p.mul_(dense.masks.get(n, torch.ones(())))
    ours, theirs = MAML(net, **options), MAML(dense, **options)
    for meta in (ours, theirs):
        objective(meta, 0, None).backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.allclose(a.grad, b.grad, atol=1e-8, rtol=0)
    assert pruner.masks["unused.weight"].sum() == 2


class Features(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return torch.tanh(self.net.square(torch.tanh(self.net.conv(x)).flatten(1)))


@pytest.mark.parametrize("prune_head", [False, True])
def test_anil(prune_head):
    """Features trained by the outer loop alone, the head adapted; either may be pruned."""
    net = TinyNet()
    layers = LAYERS if prune_head else LAYERS[:2]
    values = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    pruner = Pruner(
        net,
        Schedule((Segment(9, sparse=True, sparsity=0.5),)),
        skip=[] if prune_head else ["head"],
    )
    assert set(pruner.masks) == set(layers)
    features, head = Features(net), MAML(net.head, lr=0.1)
    total = expected = 0.0
    masked = {n: v * largest(v.detach(), 0.5) if n in layers else v for n, v in values.items()}
    for xs, ys, xq, yq in tasks(0):
        learner = head.clone()
        learner.adapt(F.cross_entropy(learner(features(xs)), ys))
        total = total + F.cross_entropy(learner(features(xq)), yq)

        def run(x):
            h = torch.tanh(F.conv2d(x, masked["conv.weight"], masked["conv.bias"])).flatten(1)
            return torch.tanh(h @ masked["square.weight"].T + masked["square.bias"])

        mask = largest(values["head.weight"].detach(), 0.5) if prune_head else 1
        w, b = values["head.weight"] * mask, values["head.bias"]
        gw, gb = torch.autograd.grad(
            F.cross_entropy(run(xs) @ w.T + b, ys), (w, b), create_graph=True
        )
        expected = expected + F.cross_entropy(run(xq) @ (w - 0.1 * gw * mask).T + b - 0.1 * gb, yq)
    total.backward()
    theirs = torch.autograd.grad(expected, list(values.values()))
    assert_equal([p.grad for p in net.parameters()], list(theirs))


def test_prototypical_network():
    net = TinyNet()
    dense = MaskedDense(net)
    schedule = Schedule((Segment(1), Segment(3, sparse=True, sparsity=0.5)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    reference = torch.optim.SGD(dense.parameters(), lr=0.1)
    pruner = Pruner(net, schedule, optimizer)
    head = l2l.nn.PrototypicalClassifier
    y = torch.arange(3).repeat(2)
    for iteration in range(4):
        for model, opt in ((net, optimizer), (dense, reference)):
            opt.zero_grad()
            for xs, _, xq, _ in tasks(iteration):
                F.cross_entropy(head(model(xs), y)(model(xq)), y).backward()
            opt.step()
        pruner.step()
        if iteration == 0:
            dense.masks = {
                n: largest(dict(dense.net.named_parameters())[n].detach(), 0.5) for n in LAYERS
            }
        with torch.no_grad():
            for n, p in dense.net.named_parameters():
                p.mul_(dense.masks.get(n, torch.ones(())))
        assert_equal(list(net.parameters()), list(dense.parameters()))


def test_learnable_optimizer():
    """The model is updated by a meta-learned optimizer, which is itself trained through it."""
    torch.manual_seed(0)
    start = TinyNet()
    results = []
    for pruned in (True, False):
        torch.manual_seed(2)
        model = copy.deepcopy(start) if pruned else MaskedDense(start)
        schedule = Schedule((Segment(9, sparse=True, sparsity=0.5),))
        if pruned:
            pruner = Pruner(model, schedule)
        else:
            model.masks = {n: m.double() for n, m in pruner.masks.items()}
            with torch.no_grad():
                for n, p in model.net.named_parameters():
                    p.mul_(model.masks.get(n, torch.ones(())))
        meta = l2l.optim.LearnableOptimizer(
            model, l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear), lr=0.1
        ).double()
        optimizer = torch.optim.SGD(meta.parameters(), lr=0.05)
        for iteration in range(4):
            xs, ys, _, _ = tasks(iteration)[0]
            meta.zero_grad()
            optimizer.zero_grad()
            F.cross_entropy(model(xs), ys).backward()
            optimizer.step()
            meta.step()
            if pruned:
                pruner.project()
                assert_pruned(model, {n: m.double() for n, m in pruner.masks.items()})
        masks = pruner.masks
        results.append(
            [
                p.detach() * masks.get(n, 1)
                for (n, _), p in zip(start.named_parameters(), model.parameters(), strict=True)
            ]
            + [p.detach() for p in meta.parameters()]
        )
    assert_equal(*results)


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


def test_clone_detach_and_update_module():
    net = TinyNet()
    pruner = Pruner(net, Schedule((Segment(3, sparse=True, sparsity=0.5),)))
    masks = {n: m.double() for n, m in pruner.masks.items()}
    xs, ys, _, _ = tasks(0)[0]
    clone = l2l.clone_module(net)
    updates = [-0.1 * torch.ones_like(p) for p in clone.parameters()]
    clone = l2l.update_module(clone, updates=updates)
    assert_pruned(clone, masks)
    out = clone(xs).detach()
    values = {
        n: (p.detach() - 0.1)
        for n, p in zip(dict(TinyNet().named_parameters()), net.parameters(), strict=True)
    }
    dense = MaskedDense(TinyNet())
    dense.masks = masks
    with torch.no_grad():
        for n, p in dense.net.named_parameters():
            p.copy_(values[n])
    assert torch.allclose(out, dense(xs), atol=1e-12)
    F.cross_entropy(clone(xs), ys).backward()
    for n, m in masks.items():
        assert (net.get_parameter(n + "_orig").grad[m == 0] == 0).all()
    l2l.detach_module(clone)
    assert not any(p.requires_grad for p in clone.parameters())


MODELS = {
    "OmniglotCNN": (lambda: l2l.vision.models.OmniglotCNN(3, hidden_size=4), (1, 28, 28)),
    "MiniImagenetCNN": (lambda: l2l.vision.models.MiniImagenetCNN(3, hidden_size=4), (3, 84, 84)),
    "CNN4": (lambda: l2l.vision.models.CNN4(3, hidden_size=4, embedding_size=100), (3, 84, 84)),
    "ResNet12": (
        lambda: l2l.vision.models.ResNet12(
            3, hidden_size=640, avg_pool=True, dropblock_dropout=0.0
        ),
        (3, 84, 84),
    ),
    "WRN28": (lambda: l2l.vision.models.WRN28(3, hidden_size=640, dropout=0.0), (3, 84, 84)),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "WRN28" else n for n in MODELS]
)
def test_its_models(name):
    """Gradients of a meta-objective; the two big nets without an inner step, to save time."""
    make, shape = MODELS[name]
    big = name in ("ResNet12", "WRN28")
    torch.manual_seed(0)
    net = make().double()
    dense = MaskedDense(net)
    pruner = Pruner(net, Schedule((Segment(3, sparse=True, sparsity=0.3),)))
    weights = [m for m in dense.net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(pruner.masks) == len(weights)
    dense.masks = {n: m.double() for n, m in pruner.masks.items()}
    with torch.no_grad():
        for n, p in dense.net.named_parameters():
            p.mul_(dense.masks.get(n, torch.ones(())))
    count = 1 if name == "WRN28" else 3
    x, y = torch.randn(count, *shape, dtype=torch.float64), torch.arange(count)
    gradients = []
    for model in (net, dense):
        learner = (meta := MAML(model, lr=0.01)).clone()
        if not big:
            learner.adapt(F.cross_entropy(learner(x), y))
        F.cross_entropy(learner(x), y).backward()
        gradients.append([p.grad for p in meta.parameters()])
    assert_equal(*gradients)
    for n, m in pruner.masks.items():
        assert (net.get_parameter(n + "_orig").grad[~m] == 0).all()
