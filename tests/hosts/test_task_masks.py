"""Masks of single tasks under every host, against functional_call with the masks by hand; float64.

Meta-gradients are those of the sum over the tasks of each task's loss under its own masks.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from l2l_prune import Pruner, Schedule, Segment, TaskMasks
from l2l_prune.metalearners.cavia import CAVIA

from ..metalearners.test_cavia import LR, BothForms, functional_forward
from .oracle import TinyNet, assert_equal, sgd_inner, tasks

PER_TASK = Schedule((Segment(9, sparse=True, sparsity=0.5, masks="task"),))


def attached(net, seed=0, **options):
    return Pruner(
        net, PER_TASK, task_masks=TaskMasks(torch.Generator().manual_seed(seed)), **options
    )


def plain(net):
    return copy.deepcopy(net), [p.detach().clone().requires_grad_() for p in net.parameters()]


def named(net, values):
    return dict(zip((n for n, _ in net.named_parameters()), values, strict=True))


def masked(values, masks):
    return {n: v * masks[n] if n in masks else v for n, v in values.items()}


class MaskedForward(nn.Module):
    """The dense parameters; the forward multiplies them by ``masks``."""

    def __init__(self, net):
        super().__init__()
        self.net, self.masks = net, {}

    def forward(self, x):
        return functional_call(
            self.net, masked(dict(self.net.named_parameters()), self.masks), (x,)
        )


def the_same_meta_gradients(make, steps=2, seed=0):
    """An algorithm on the pruned network against itself on a network that masks in its forward."""
    net = TinyNet()
    theirs_net = MaskedForward(copy.deepcopy(net))
    pruner = attached(net, seed)
    torch.manual_seed(1)
    ours = make(net).double()
    torch.manual_seed(1)
    theirs = make(theirs_net).double()
    learners, total, expected, seen = [], 0.0, 0.0, []
    for task in tasks(0, 3):  # all learners live at once, and are used outside their blocks
        with pruner.task_masks() as masks:
            learners.append((ours.clone(), task))
        seen.append(masks)
    for learner, (xs, ys, xq, yq) in learners:
        for _ in range(steps):
            learner.adapt(F.cross_entropy(learner(xs), ys))
        total = total + F.cross_entropy(learner(xq), yq)
    for masks, (xs, ys, xq, yq) in zip(seen, tasks(0, 3), strict=True):
        theirs_net.masks = masks
        learner = theirs.clone()
        learner.module.masks = masks
        for _ in range(steps):
            learner.adapt(F.cross_entropy(learner(xs), ys))
        expected = expected + F.cross_entropy(learner(xq), yq)
    total.backward()
    expected.backward()
    assert_equal([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])
    everywhere = torch.stack([m["square.weight"] for m in seen]).any(0)
    assert not everywhere.all()
    assert (net.square.weight_orig.grad[~everywhere] == 0).all()
    assert (net.square.weight_orig.grad[everywhere] != 0).any()
    pruner.step()


LEARN2LEARN = (
    "maml",
    "fomaml",
    "metasgd",
    "metasgd first order",
    "gbml scale",
    "gbml linear",
    "gbml kronecker",
    "gbml kronecker adapted",
    "gbml metacurvature",
    "gbml first order",
)


@pytest.mark.parametrize("name", LEARN2LEARN)
def test_learn2learn(name):
    pytest.importorskip("learn2learn")
    from .test_learn2learn import ALGORITHMS

    assert set(LEARN2LEARN) == set(ALGORITHMS)
    the_same_meta_gradients(ALGORITHMS[name])


def test_anil_prunes_the_shared_features_within_the_block():
    l2l = pytest.importorskip("learn2learn")
    net = TinyNet()
    oracle, values = plain(net)
    pruner = attached(net, skip=["head"])
    head = l2l.algorithms.MAML(net.head, lr=0.1)
    total = expected = 0.0
    for xs, ys, xq, yq in tasks(0, 3):
        with pruner.task_masks() as masks:
            learner = head.clone()
            learner.adapt(F.cross_entropy(learner(net.features(xs)), ys))
            total = total + F.cross_entropy(learner(net.features(xq)), yq)
        held = masked(named(oracle, values), masks)

        def run(x, w, b, held=held):
            h = torch.tanh(F.conv2d(x, held["conv.weight"], held["conv.bias"])).flatten(1)
            return F.linear(
                torch.tanh(F.linear(h, held["square.weight"], held["square.bias"])), w, b
            )

        w, b = held["head.weight"], held["head.bias"]
        gw, gb = torch.autograd.grad(F.cross_entropy(run(xs, w, b), ys), (w, b), create_graph=True)
        expected = expected + F.cross_entropy(run(xq, w - 0.1 * gw, b - 0.1 * gb), yq)
    total.backward()
    theirs = torch.autograd.grad(expected, values)
    assert_equal([p.grad for p in net.parameters()], list(theirs))


@pytest.mark.parametrize("track", [True, False])
def test_higher(track):
    higher = pytest.importorskip("higher")
    net = TinyNet()
    oracle, values = plain(net)
    pruner = attached(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    copies, total, expected = [], 0.0, 0.0
    for task in tasks(0, 3):
        with pruner.task_masks() as masks:
            functional = higher.monkeypatch(
                net, copy_initial_weights=False, track_higher_grads=track
            )
        copies.append(
            (
                functional,
                higher.get_diff_optim(
                    optimizer, net.parameters(), functional, track_higher_grads=track
                ),
                masks,
                task,
            )
        )
    for functional, step, masks, (xs, ys, xq, yq) in copies:
        for _ in range(2):
            step.step(F.cross_entropy(functional(xs), ys))
        loss = F.cross_entropy(functional(xq), yq)

        def by_hand(v, x, y, masks=masks):
            return F.cross_entropy(functional_call(oracle, masked(v, masks), (x,)), y)

        fast = named(oracle, values)
        for _ in range(2):
            fast = sgd_inner(lambda v, x=xs, y=ys: by_hand(v, x, y), fast, 0.1, 2)
        reference = by_hand(fast, xq, yq)
        assert torch.allclose(loss, reference, atol=1e-12)
        total, expected = total + loss, expected + reference
    if track:
        total.backward()
        theirs = torch.autograd.grad(expected, values)
        assert_equal([p.grad for p in net.parameters()], list(theirs))


@pytest.mark.parametrize("first_order", [True, False])
def test_cavia_within_the_block_and_again(first_order):
    net = BothForms()
    oracle, values = plain(net)
    pruner = attached(net)
    cavia = CAVIA(net, lr=LR, first_order=first_order)
    learners, total, expected = [], 0.0, 0.0
    for xs, ys, xq, yq in tasks(0, 3):
        with pruner.task_masks() as masks:
            learner = cavia.clone()
            learner.adapt(F.cross_entropy(learner(xs), ys))
        learners.append((learner, masks, xq, yq))
        held = masked(named(oracle, values), masks)
        context = torch.zeros(len(learner.context), dtype=torch.float64, requires_grad=True)
        loss = F.cross_entropy(functional_forward(held, xs, context), ys)
        (gradient,) = torch.autograd.grad(loss, context, create_graph=True)
        context = context - LR * (gradient.detach() if first_order else gradient)
        expected = expected + F.cross_entropy(functional_forward(held, xq, context), yq)
    for learner, masks, xq, yq in learners:  # a shared network: each goes on under its own masks
        with pruner.task_masks(masks):
            total = total + F.cross_entropy(learner(xq), yq)
    total.backward()
    theirs = torch.autograd.grad(expected, values)
    assert_equal([p.grad for p in net.parameters()], list(theirs))


@pytest.mark.parametrize("head", ["prototype", "ridge", "svm"])
def test_prototypes_and_metaoptnet_have_a_mask_an_episode(head):
    pytest.importorskip("learn2learn")
    from l2l_prune.metalearners.metaoptnet import HEADS, MetaOptNet

    net = TinyNet()
    net.head = nn.Identity()
    oracle, values = plain(net)
    model = MetaOptNet(net, head).double()
    pruner = attached(model)
    y, total, expected = torch.arange(3).repeat(2), 0.0, 0.0
    for xs, _, xq, yq in tasks(0, 3):
        with pruner.task_masks() as masks:
            total = total + F.cross_entropy(model(xs, y, xq), yq)
        own = {name.removeprefix("features."): mask for name, mask in masks.items()}
        held = masked(named(oracle, values), own)
        support, query = (functional_call(oracle, held, (x,)) for x in (xs, xq))
        expected = expected + F.cross_entropy(HEADS[head](support, y, query), yq)
    total.backward()
    theirs = torch.autograd.grad(expected, values)
    assert_equal([p.grad for p in net.parameters()], list(theirs), 1e-7)


def test_evaluation_and_outer_steps_see_no_masks():
    l2l = pytest.importorskip("learn2learn")
    net = TinyNet()
    maml = l2l.algorithms.MAML(net, lr=0.1)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    pruner = attached(net)
    for iteration in range(3):
        optimizer.zero_grad()
        for xs, ys, xq, yq in tasks(iteration):
            with pruner.task_masks():
                learner = maml.clone()
            learner.adapt(F.cross_entropy(learner(xs), ys))
            F.cross_entropy(learner(xq), yq).backward()
        optimizer.step()
        pruner.step()
    learner = maml.clone()
    assert all(bool((m == 1).all()) for n, m in learner.named_buffers() if n.endswith("_mask"))
    assert bool((learner.module.square.weight != 0).all())
