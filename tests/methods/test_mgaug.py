"""MGAug against loops over plain copies in float64, with the masks by hand."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from l2l_prune import DSDSchedule, MGAug, PrunedReptile, Pruner, Schedule, Segment
from l2l_prune.fewshot.models import Conv4
from tests.hosts.oracle import TinyNet, tasks
from tests.reptile.test_reptile import adapt, task

DENSE = Schedule((Segment(4),))
WAYS = ["width", "parameters", "catfish"]
IMAGES = torch.zeros(2, 1, 6, 6, dtype=torch.float64)
RATE, NETWORKS, LR = 0.4, 3, 0.05


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rates_of(iteration, number, seed=0):
    """The draws that the class documents: a seed each meta-iteration, to which tasks are added."""
    draws = generator(seed)
    for _ in range(iteration + 1):
        start = int(torch.randint(2**62, (), generator=draws))
    others = torch.rand(NETWORKS - 1, generator=generator(start + number), dtype=torch.float64)
    return [RATE, *(RATE * others).tolist()]


def catfish_mask(weight, gradient, rate):
    """All but the round(rate n) entries with the largest |w g|."""
    order = (weight * gradient).abs().flatten().argsort(descending=True)
    mask = torch.ones(weight.numel(), dtype=torch.bool)
    mask[order[: round(rate * weight.numel())]] = False
    return mask.view(weight.shape)


def width_masks(rate):
    """SmallNet: four channels, four more, 2x2 pixels of each in the classifier."""
    left = 4 - round(4 * rate)
    masks = {"conv1.weight": torch.zeros(4, 1, 3, 3), "conv2.weight": torch.zeros(4, 4, 3, 3)}
    masks["fc.weight"] = torch.zeros(3, 16)
    masks["conv1.weight"][:left] = 1
    masks["conv2.weight"][:left, :left] = 1
    masks["fc.weight"][:, : 4 * left] = 1
    return {name: mask.bool() for name, mask in masks.items()}


@pytest.mark.parametrize("way", WAYS)
def test_reptile_moves_towards_the_mean_over_tasks_and_networks(net, way):
    net.double()
    oracle = copy.deepcopy(net)
    sgd = functools.partial(torch.optim.SGD, momentum=0.0)
    reptile = PrunedReptile(
        net, DENSE, inner_lr=LR, meta_lr=0.9, meta_lr_final=0.9, inner_optimizer=sgd
    )
    mgaug = MGAug(
        reptile.pruner, generator(), way, rate=RATE, networks=NETWORKS, example_inputs=IMAGES
    )
    for iteration in range(2):
        old = {n: p.detach().clone() for n, p in oracle.named_parameters()}
        moves = {n: torch.zeros_like(p) for n, p in old.items()}
        for number in range(2):
            batches = task(10 * iteration + number, torch.float64)
            rates, gradients = [0.0, *rates_of(iteration, number)], {}
            for place, (rate, masks) in enumerate(zip(rates, mgaug.networks(), strict=True)):
                with reptile.task_masks(masks):
                    learner = reptile.clone()
                adapt(learner, batches)
                if place == 0:
                    pairs = zip(net.parameters(), learner.module.parameters(), strict=True)
                    mgaug.observe([a - b for a, b in pairs])
                reptile.collect(learner)

                for name, mask in masks.items():
                    if place == 0:
                        assert mask.all()
                    elif way == "catfish":
                        assert torch.equal(mask, catfish_mask(old[name], gradients[name], rate))
                    elif way == "width":
                        assert torch.equal(mask, width_masks(rate)[name])
                    else:
                        assert int((~mask).sum()) == round(rate * mask.numel())
                twin = copy.deepcopy(oracle)
                weights = dict(twin.named_parameters())
                for x, y in batches:
                    with torch.no_grad():
                        for name, mask in masks.items():
                            weights[name].mul_(mask)
                    found = torch.autograd.grad(F.cross_entropy(twin(x), y), [*weights.values()])
                    with torch.no_grad():
                        for weight, gradient in zip(weights.values(), found, strict=True):
                            weight.sub_(LR * gradient)
                for name, weight in weights.items():
                    mask = masks.get(name, torch.tensor(True))
                    moves[name] += torch.where(mask, weight.detach() - old[name], 0.0)
                    if place == 0:
                        gradients[name] = old[name] - weight.detach()
        reptile.step()
        with torch.no_grad():
            for name, parameter in oracle.named_parameters():
                parameter.add_(0.9 * moves[name] / (2 * (1 + NETWORKS)))
        for ours, theirs in zip(net.parameters(), oracle.parameters(), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-11, rtol=0)


def meta_gradient(net, masks, xs, ys, xq, yq):
    """Second-order MAML on masked weights, two inner steps; by autograd alone."""
    start = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    fast = start
    for _ in range(2):
        masked = {n: w * masks[n] if n in masks else w for n, w in fast.items()}
        loss = F.cross_entropy(functional_call(net, masked, (xs,)), ys)
        found = torch.autograd.grad(loss, [*fast.values()], create_graph=True)
        fast = {n: w - LR * g for (n, w), g in zip(fast.items(), found, strict=True)}
    masked = {n: w * masks[n] if n in masks else w for n, w in fast.items()}
    loss = F.cross_entropy(functional_call(net, masked, (xq,)), yq)
    return dict(zip(start, torch.autograd.grad(loss, [*start.values()]), strict=True))


@pytest.mark.parametrize("way", ["parameters", "catfish"])
@pytest.mark.parametrize("host", ["functional", "learn2learn"])
def test_maml_adds_up_the_meta_gradients_of_all_networks(host, way):
    l2l = pytest.importorskip("learn2learn") if host == "learn2learn" else None
    net = TinyNet()
    plain = copy.deepcopy(net)
    meta = l2l.algorithms.MAML(net, lr=LR) if l2l else net
    pruner = Pruner(meta, DENSE)
    mgaug = MGAug(pruner, generator(), way, rate=RATE, networks=NETWORKS)
    prefix = "module." if l2l else ""
    expected = {n: torch.zeros_like(p) for n, p in plain.named_parameters()}
    for number, (xs, ys, xq, yq) in enumerate(tasks(0, 2)):
        rates, full = [0.0, *rates_of(0, number)], {}
        for place, (rate, masks) in enumerate(zip(rates, mgaug.networks(), strict=True)):
            with pruner.task_masks(masks):
                if l2l:
                    learner = meta.clone()
                    for _ in range(2):
                        learner.adapt(F.cross_entropy(learner(xs), ys))
                    loss = F.cross_entropy(learner(xq), yq)
                else:
                    fast = dict(net.named_parameters())
                    for _ in range(2):
                        loss = F.cross_entropy(functional_call(net, fast, (xs,)), ys)
                        found = torch.autograd.grad(loss, [*fast.values()], create_graph=True)
                        steps = zip(fast.items(), found, strict=True)
                        fast = {n: w - LR * g for (n, w), g in steps}
                    loss = F.cross_entropy(functional_call(net, fast, (xq,)), yq)
            loss.backward()
            masks = {n.removeprefix(prefix): mask for n, mask in masks.items()}
            own = meta_gradient(plain, masks, xs, ys, xq, yq)
            expected = {n: total + own[n] for n, total in expected.items()}
            full = full or own
            for name, mask in masks.items() if place else ():
                weight = plain.get_parameter(name).detach()
                if way == "catfish":
                    assert torch.equal(mask, catfish_mask(weight, full[name], rate))
                else:
                    assert int((~mask).sum()) == round(rate * mask.numel())
    for (name, total), parameter in zip(expected.items(), net.parameters(), strict=True):
        assert torch.allclose(parameter.grad, total, atol=1e-12, rtol=0), name


def narrower(net, left):
    """A Conv4 of the first channels, its weights cut out by hand."""
    small = Conv4(5, left).double()
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            whole = net.get_parameter(name)
            if name == "classifier.weight":
                parameter.copy_(whole[:, : parameter.shape[1]])
            elif name == "classifier.bias":
                parameter.copy_(whole)
            elif whole.dim() == 4 and "conv1" not in name:
                parameter.copy_(whole[:left, :left])
            else:
                parameter.copy_(whole[:left])
    return small


@pytest.mark.parametrize("layers", ["all", "authors"])
def test_a_narrower_network_is_one_of_fewer_channels(layers):
    net = Conv4(5, 8).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    plain, x = copy.deepcopy(net), torch.randn(7, 1, 28, 28, dtype=torch.float64)
    pruner = Pruner(net, DENSE, layers=layers)
    mgaug = MGAug(pruner, generator(), "width", rate=0.6, example_inputs=x)
    seen = set()
    for masks in mgaug.networks():
        left = int(masks["features.conv2.weight"].any(0).flatten(1).any(1).sum())
        seen.add(left)
        with pruner.task_masks(masks):
            assert torch.allclose(net(x), narrower(plain, left)(x), atol=1e-12, rtol=0)
    assert {8, 8 - round(0.6 * 8)} < seen


@pytest.mark.parametrize("way", ["width", "parameters"])
def test_resumes_within_a_meta_iteration(net, way):
    def drawn(mgaug, tasks):
        return [m for _ in range(tasks) for m in mgaug.networks()]

    def new():
        pruner = Pruner(copy.deepcopy(net), DENSE)
        mgaug = MGAug(pruner, generator(), way, rate=0.9, example_inputs=IMAGES.float())
        return pruner, mgaug

    pruner, mgaug = new()
    other, twin = new()
    drawn(mgaug, 2)
    pruner.step()
    drawn(mgaug, 1)
    twin.load_state_dict(copy.deepcopy(mgaug.state_dict()))
    other.load_state_dict(pruner.state_dict())
    first, again = [], []
    for one, found in ((mgaug, first), (twin, again)):
        found += drawn(one, 2)
        one._pruner.step()
        found += drawn(one, 1)
    assert len(first) == 3 * 4
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)
    assert any(
        not torch.equal(first[1 + i][n], first[5 + i][n]) for i in range(3) for n in first[0]
    )


def test_catfish_needs_the_task_s_own_meta_gradient(net):
    pruner = Pruner(net, DENSE)
    mgaug = MGAug(pruner, generator(), "catfish")
    x, y = task(0)[0]
    networks = mgaug.networks()
    next(networks)
    F.cross_entropy(net(x), y).backward()
    next(networks)
    later = mgaug.networks()  # what the task before has left in grad does not count
    next(later)
    with pytest.raises(RuntimeError, match=r"no meta-gradient .*observe"):
        next(later)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))

    def forward(self, x):
        return self.layers(x)


def test_refuses_what_masks_cannot_narrow(net):
    pruner = Pruner(net, DENSE, skip=["fc"])
    with pytest.raises(ValueError, match=r"width.* needs fc.weight"):
        MGAug(pruner, generator(), "width", example_inputs=IMAGES.float())
    pruner = Pruner(Normed(), DENSE)
    with pytest.raises(ValueError, match=r"no channels .*layers.0: .*normalised"):
        MGAug(pruner, generator(), "width", example_inputs=torch.zeros(2, 4))


def test_refuses_a_sparse_schedule_and_what_is_left_of_nothing(net):
    with pytest.raises(ValueError, match="dense"):
        MGAug(
            Pruner(copy.deepcopy(net), DSDSchedule(0.5, pretrain=1, prune=1, retrain=1)),
            generator(),
        )
    with pytest.raises(ValueError, match=r"leaves no weight of weight"):
        MGAug(Pruner(nn.Linear(2, 1), DENSE), generator(), rate=0.9)


def test_a_copy_counts_its_own_tasks_and_a_pruner_can_be_pickled(net):
    pruner = Pruner(net, DENSE)
    mgaug = MGAug(pruner, generator(), networks=2)
    copied, of_copy = copy.deepcopy((pruner, mgaug))
    for one, mine in ((pruner, mgaug), (copied, of_copy), (copied, of_copy)):
        list(mine.networks())
        assert mine.state_dict()["tasks"] == 1
        one.step()
        assert mine.state_dict()["tasks"] == 0
    again, of_again = pickle.loads(pickle.dumps((pruner, mgaug)))
    for mine, one in ((of_again, again), (mgaug, pruner)):
        assert equal_draws(list(mine.networks()), list(mgaug.networks())) == (mine is of_again)
        one.step()


def equal_draws(one, other):
    return all(torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a)


def test_an_overflow_that_a_gradient_scaler_skips_does_not_end_training(net):
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    pruner = Pruner(net, DENSE, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    mgaug, start = MGAug(pruner, generator(), "catfish", networks=2), copy.deepcopy(net)
    x, y = task(0)[0]
    for _ in range(2):
        for masks in mgaug.networks():
            with pruner.task_masks(masks):
                scaler.scale(100 * F.cross_entropy(net(x), y)).backward()
    scaler.step(optimizer)
    scaler.update()
    pruner.step()
    assert scaler.get_scale() == 2.0**126
    for a, b in zip(net.parameters(), start.parameters(), strict=True):
        assert torch.equal(a, b)
