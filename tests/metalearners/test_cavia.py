"""CAVIA against a plain functional CAVIA in float64, pruned and dense."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from l2l_prune import IHTSchedule, Pruner
from l2l_prune.fewshot.data import SineTasks
from l2l_prune.fewshot.models import CaviaConv4, CaviaMLP
from l2l_prune.metalearners.cavia import CAVIA, ConcatContext, FiLM
from tests.hosts.oracle import PHASES, assert_equal, largest, tasks

CONTEXT, LR = 4, 0.5
PRUNED = ("conv.weight", "film.linear.weight", "film.hidden.weight", "head.weight")


class BothForms(nn.Module):
    """FiLM with a hidden layer after a convolution, and the context beside the features."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.film = FiLM(CONTEXT, 3, hidden_layers=1)
        self.concat = ConcatContext(CONTEXT)
        self.head = nn.Linear(12 + CONTEXT, 3)
        self.double()

    def forward(self, x):
        return self.head(self.concat(torch.tanh(self.film(self.conv(x))).flatten(1)))


def functional_forward(values, x, context):
    """The same network written out, with the context as an argument."""
    h = F.conv2d(x, values["conv.weight"], values["conv.bias"])
    film = F.linear(context, values["film.linear.weight"], values["film.linear.bias"])
    film = F.linear(F.relu(film), values["film.hidden.weight"], values["film.hidden.bias"])
    h = torch.tanh(film[:3, None, None] * h + film[3:, None, None]).flatten(1)
    h = torch.cat([h, context.repeat(len(h), 1)], dim=1)
    return F.linear(h, values["head.weight"], values["head.bias"])


def functional_loss(values, task, steps, first_order):
    xs, ys, xq, yq = task
    context = torch.zeros(CONTEXT, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        loss = F.cross_entropy(functional_forward(values, xs, context), ys)
        (gradient,) = torch.autograd.grad(loss, context, create_graph=True)
        context = context - LR * (gradient.detach() if first_order else gradient)
    return F.cross_entropy(functional_forward(values, xq, context), yq)


@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.parametrize("first_order", [True, False])
def test_meta_gradients_and_weights_equal_a_functional_cavia(first_order, pruned):
    net = BothForms()
    values = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    masks = {}
    cavia = CAVIA(net, lr=LR, first_order=first_order)
    ours = torch.optim.Adam(cavia.parameters(), 0.01)
    theirs = torch.optim.Adam(values.values(), 0.01)
    pruner = Pruner(cavia, PHASES, ours, release_state="keep") if pruned else None
    for iteration in range(PHASES.iterations):
        ours.zero_grad()
        theirs.zero_grad()
        for task in tasks(iteration):
            learner = cavia.clone()
            for _ in range(2):
                learner.adapt(F.cross_entropy(learner(task[0]), task[1]))
            F.cross_entropy(learner(task[2]), task[3]).backward()
            masked = {n: v * masks[n] if n in masks else v for n, v in values.items()}
            functional_loss(masked, task, 2, first_order).backward()
        assert_equal([p.grad for p in cavia.parameters()], [v.grad for v in values.values()])
        ours.step()
        theirs.step()
        segment = PHASES.segment(iteration + 1)
        if pruner is not None:
            pruner.step()
            if segment is not PHASES.segment(iteration):
                masks = {
                    n: largest(values[n].detach(), segment.sparsity)
                    for n in (PRUNED if segment.sparse else ())
                }
        with torch.no_grad():
            for name, mask in masks.items():
                values[name].mul_(mask)
                theirs.state[values[name]]["exp_avg"].mul_(mask)
        assert_equal(list(cavia.parameters()), list(values.values()))
    if pruner is not None:
        assert set(pruner.masks) == {f"module.{name}" for name in PRUNED}


def test_the_context_is_neither_a_parameter_nor_pruned():
    cavia = CAVIA(BothForms())
    assert CONTEXT not in [p.numel() for p in cavia.parameters()]
    pruner = Pruner(cavia, PHASES)
    while not pruner.sparse:
        pruner.step()
    x, y = torch.randn(6, 1, 4, 4).double(), torch.arange(6) % 3
    learner = cavia.clone()
    for _ in range(3):
        learner.adapt(F.cross_entropy(learner(x), y))
        pruner.project()
    assert (learner.context != 0).all()
    assert (cavia.context == 0).all()


def test_learners_do_not_disturb_each_other_or_the_model():
    cavia = CAVIA(BothForms())
    before = copy.deepcopy(cavia.state_dict())
    x, y = torch.randn(6, 1, 4, 4).double(), torch.arange(6) % 3
    a, b = cavia.clone(), cavia.clone()
    at_zero = cavia(x)
    a.adapt(F.cross_entropy(a(x), y))
    assert torch.equal(b(x), at_zero)
    assert not torch.equal(a(x), at_zero)
    further = a.clone()  # goes on from where a is
    assert torch.equal(further(x), a(x))
    further.adapt(F.cross_entropy(further(x), y))
    assert not torch.equal(further(x), a(x))
    assert torch.equal(cavia(x), at_zero)
    after = cavia.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(copy.deepcopy(cavia)(x), at_zero)


def test_a_move_or_cast_takes_the_context_along():
    cavia = CAVIA(BothForms())
    assert cavia.context.dtype == torch.float64
    cavia.float()
    assert cavia(torch.randn(2, 1, 4, 4)).dtype == torch.float32


def test_a_move_keeps_what_a_learner_has_adapted():
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    learner = CAVIA(BothForms(), lr=0.1).clone()
    fresh = learner(x).detach()
    learner.adapt(learner(x).square().mean())
    adapted = learner(x).detach()
    assert not torch.equal(adapted, fresh)
    learner.to("cpu")
    assert torch.equal(learner(x), adapted)
    learner.float()
    assert torch.allclose(learner(x.float()).double(), adapted, atol=1e-5)


@pytest.mark.parametrize("size", [28, 84])
def test_classification_network(size):
    """Named and ordered as the published one; the map before the classifier is 5x5 for 84x84."""
    net = CaviaConv4(5, channels=6, in_channels=3, image_size=size)
    side = {84: 5, 28: 1}[size]
    assert net.classifier.weight.shape == (5, 6 * side * side)
    assert all(not list(m.buffers()) for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    images = torch.randn(4, 3, size, size)
    cavia = CAVIA(net)
    h = images
    for block in (1, 2, 3, 4):
        h = getattr(net.features, f"conv{block}")(h)
        h = F.batch_norm(h, None, None, training=True)
        h = F.max_pool2d(h, 2)
        if block == 3:
            film = net.features.film3.linear.bias  # the context is 0
            h = film[:6].view(1, -1, 1, 1) * h + film[6:].view(1, -1, 1, 1)
        h = F.relu(h)
    assert torch.allclose(cavia(images), net.classifier(h.flatten(1)), atol=1e-5)


def test_sine_regression_learns_under_pruning():
    schedule = IHTSchedule(0.3, pretrain=60, prune=40, retrain=20, rounds=2)
    torch.manual_seed(0)
    cavia = CAVIA(CaviaMLP(), lr=1.0)
    optimizer = torch.optim.Adam(cavia.parameters(), 3e-3)
    pruner = Pruner(cavia, schedule, optimizer)
    sine = SineTasks(shots=10, queries=10)
    losses = []
    for _ in range(schedule.iterations):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(10):
            xs, ys, xq, yq = sine.sample()
            learner = cavia.clone()
            learner.adapt(F.mse_loss(learner(xs), ys))
            loss = F.mse_loss(learner(xq), yq) / 10
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        pruner.step()
        losses.append(total)
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    assert all(p.grad is not None for p in cavia.parameters())


def test_sine_tasks():
    task = SineTasks(shots=2000, queries=0, seed=3).sample()
    assert task.support_x.min() >= -5
    assert task.support_x.max() <= 5
    # a sin(x - b) = c sin x + d cos x: two unknowns explain all points
    basis = torch.cat([task.support_x.sin(), task.support_x.cos()], dim=1)
    solution = torch.linalg.lstsq(basis, task.support_y).solution
    assert torch.allclose(basis @ solution, task.support_y, atol=1e-4)
    assert 0.1 <= float(solution.norm()) <= 5.0
    assert SineTasks(seed=3).sample().support_x.equal(SineTasks(seed=3).sample().support_x)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: CAVIA(nn.Linear(2, 2)), ValueError, "no context layers"),
        (lambda: CAVIA(BothForms(), lr=0), ValueError, "lr must be"),
        (
            lambda: CAVIA(nn.Sequential(ConcatContext(2), ConcatContext(3))),
            ValueError,
            "share one context_size",
        ),
        (lambda: FiLM(4, 3, hidden_layers=2), ValueError, "hidden_layers"),
        (lambda: FiLM(0, 3), ValueError, "context_size"),
        (lambda: FiLM(4, 0), ValueError, "channels"),
        (lambda: BothForms()(torch.ones(1, 1, 4, 4).double()), RuntimeError, "through CAVIA"),
        (lambda: CaviaConv4(5, film_at=()), ValueError, "film_at"),
        (lambda: CaviaConv4(5, film_at=(5,)), ValueError, "film_at"),
        (lambda: CaviaConv4(5, image_size=8), ValueError, "image_size"),
        (lambda: SineTasks(shots=0), ValueError, "shots"),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_loss_of_something_else_is_refused():
    cavia = CAVIA(BothForms())
    learner, other = cavia.clone(), cavia.clone()
    x, y = torch.randn(6, 1, 4, 4).double(), torch.arange(6) % 3
    with pytest.raises(RuntimeError, match="does not depend on this learner's context"):
        learner.adapt(F.cross_entropy(other(x), y))
    with torch.no_grad():
        loss = F.cross_entropy(learner(x), y)
    with pytest.raises(RuntimeError, match="does not depend on this learner's context"):
        learner.adapt(loss)
