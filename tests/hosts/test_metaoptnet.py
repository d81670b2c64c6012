"""MetaOptNet on learn2learn's parts, its heads against independent solvers."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from l2l_prune import DSDSchedule, IHTSchedule, Pruner

l2l = pytest.importorskip("learn2learn")
from l2l_prune.metalearners.metaoptnet import (  # noqa: E402
    MetaOptNet,
    published_lr_factor,
    resnet12,
    ridge_scores,
    smoothed_cross_entropy,
    svm_dual,
    svm_scores,
)


def embedding(shots, dimensions, scale=1.0, ways=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(ways).repeat(shots)
    centres = torch.randn(ways, dimensions, generator=generator).double()
    noise = torch.randn(len(labels), dimensions, generator=generator).double()
    return scale * (0.3 * centres[labels] + noise).relu(), labels


def dual_by_cvxpy(support, labels, C=0.1):
    cp = pytest.importorskip("cvxpy")
    x, ways = support.double().numpy(), int(labels.max()) + 1
    a = cp.Variable((len(x), ways))
    target = np.eye(ways)[labels.numpy()]
    energy = cp.sum_squares(x.T @ a) + cp.sum_squares(a)
    problem = cp.Problem(
        cp.Minimize(0.5 * energy - cp.sum(cp.multiply(target, a))),
        [a <= C * target, cp.sum(a, axis=1) == 0],
    )
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-13, tol_gap_rel=1e-13, tol_feas=1e-13)
    return torch.from_numpy(a.value)


@pytest.mark.parametrize("shots", [1, 5, 15])
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_the_svm_dual_equals_cvxpy(shots, scale):
    support, labels = embedding(shots, 640, scale)
    expected = dual_by_cvxpy(support, labels)
    found = svm_dual(support @ support.t(), labels)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_svm_scores_and_gradients(dtype):
    """Against cvxpy's solution, and its central differences, in both types."""
    support, labels = embedding(2, 16, 0.3)
    query = embedding(1, 16, 0.3, seed=1)[0]
    weights = torch.randn(5, 5).double()

    def objective(x):
        return float((weights * (query @ x.t() @ dual_by_cvxpy(x, labels))).sum())

    x = support.to(dtype, copy=True).requires_grad_()
    scores = svm_scores(x, labels, query.to(dtype))
    assert scores.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 1e-6
    expected = query @ support.t() @ dual_by_cvxpy(support.detach(), labels)
    assert torch.allclose(scores.double(), expected, atol=tolerance)
    (weights.to(dtype) * scores).sum().backward()
    direction, step = torch.randn_like(support), 1e-5
    slope = (objective(support + step * direction) - objective(support - step * direction)) / (
        2 * step
    )
    assert float((x.grad.double() * direction).sum()) == pytest.approx(slope, rel=3e-3)


def test_svm_scores_equal_learn2learns_classifier():
    """Where its float32 solver is good enough: few shots, a narrow embedding."""
    support, labels = embedding(1, 16, 0.3)
    query = embedding(3, 16, 0.3, seed=1)[0].float()
    theirs = l2l.nn.SVClassifier(support.float(), labels)(query)
    assert torch.allclose(svm_scores(support.float(), labels, query), theirs, atol=1e-4)


def test_ridge_scores_equal_the_primal_regression():
    """(X'X + 50 I)^-1 X'Y, which needs no kernel; the published program doubles it."""
    support, labels = embedding(2, 7)
    query = embedding(1, 7, seed=1)[0]
    primal = torch.linalg.inv(support.t() @ support + 50 * torch.eye(7)) @ support.t()
    expected = 2 * query @ primal @ F.one_hot(labels).double()
    assert torch.allclose(ridge_scores(support, labels, query), expected)


def test_prototype_scores():
    model = MetaOptNet(nn.Identity(), head="prototype")
    support, labels = embedding(3, 7)
    query = embedding(1, 7, seed=1)[0]
    means = torch.stack([support[labels == c].mean(0) for c in range(5)])
    expected = -((query[:, None] - means) ** 2).mean(2)
    assert torch.allclose(model(support, labels, query), expected)


def test_label_smoothing_is_the_published_one():
    scores, labels = torch.randn(4, 6, 5), torch.randint(0, 5, (4, 6))
    target = torch.full((4, 6, 5), 0.1 / 4).scatter(2, labels[..., None], 0.9)
    expected = -(target * scores.log_softmax(2)).sum(2).mean()
    assert torch.allclose(smoothed_cross_entropy(scores, labels), expected)


def test_published_schedule_equals_their_epochs():
    for epoch in range(60):
        theirs = 1.0 if epoch < 20 else 0.06 if epoch < 40 else 0.012 if epoch < 50 else 0.0024
        assert published_lr_factor(epoch / 60) == theirs


def small_features():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.LeakyReLU(0.1), nn.Flatten()
    )


def batch(episodes=2):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(2)
    x = torch.randn(2, episodes, 6, 1, 6, 6, generator=generator)
    x = x + labels.view(1, 1, 6, 1, 1, 1)
    return x[0], labels.expand(episodes, -1), x[1], labels.expand(episodes, -1)


@pytest.mark.parametrize("head", ["svm", "ridge", "prototype"])
def test_several_episodes_at_once_equal_one_by_one(head):
    """In evaluation mode, where batch statistics do not tie them together."""
    model = MetaOptNet(small_features(), head).eval()
    model.scale.data.fill_(3.0)
    xs, ys, xq, _ = batch()
    together = model(xs, ys, xq)
    alone = torch.stack([model(*task) for task in zip(xs, ys, xq, strict=True)])
    assert together.shape == (2, 6, 3)
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("head", ["svm", "ridge", "prototype"])
@pytest.mark.parametrize(
    "schedule",
    [
        DSDSchedule(0.4, pretrain=4, prune=8, retrain=4),
        IHTSchedule(0.4, pretrain=2, prune=4, retrain=2, rounds=2),
    ],
)
def test_published_training_under_a_schedule(head, schedule):
    """Nesterov SGD with weight decay never moves a pruned weight; the head learns its scale."""
    torch.manual_seed(0)
    model = MetaOptNet(small_features(), head)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=5e-4, nesterov=True)
    pruner = Pruner(model, schedule, optimizer)
    assert list(pruner.masks) == ["features.0.weight"]
    xs, ys, xq, yq = batch()
    losses = []
    for _ in range(schedule.iterations):
        optimizer.zero_grad()
        loss = smoothed_cross_entropy(model(xs, ys, xq), yq)
        loss.backward()
        optimizer.step()
        pruner.step()
        pruned = ~pruner.masks["features.0.weight"]
        assert (model.features[0].weight[pruned] == 0).all()
        assert int(pruned.sum()) == (round(0.4 * 36) if pruner.sparse else 0)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert float(model.scale.detach()) != 1.0
    dense = MetaOptNet(small_features(), head)
    dense.load_state_dict(pruner.finalize().state_dict())
    model.eval(), dense.eval()
    assert torch.equal(model(xs, ys, xq), dense(xs, ys, xq))


@pytest.mark.parametrize(("size", "dimensions"), [(84, 16_000), (32, 2_560)])
def test_resnet12_is_learn2learns_with_the_published_settings(size, dimensions):
    images = torch.randn(2, 3, size, size)
    baseline, pruned = resnet12(size), resnet12(size, drop_block=False)
    assert isinstance(baseline, l2l.vision.models.resnet12.ResNet12Backbone)
    assert pruned(images).shape == (2, dimensions)
    assert baseline.layer4[0].drop_rate == 0.1
    assert baseline.layer4[0].block_size == (5 if size == 84 else 2)
    assert pruned.layer4[0].drop_rate == 0.0
    assert not torch.equal(baseline(images), baseline(images))  # drops in training
    pruned.eval()
    assert torch.equal(pruned(images), pruned(images))


def test_all_12_convolutions_and_their_shortcuts_are_pruned():
    model = MetaOptNet(resnet12(32, drop_block=False))
    pruner = Pruner(model, DSDSchedule(0.2, pretrain=0, prune=1, retrain=0))
    assert len(pruner.masks) == 16
    for name, mask in pruner.masks.items():
        assert int((~mask).sum()) == math.floor(0.2 * mask.numel() + 0.5), name


def test_an_episode_with_unequal_shots_is_refused():
    model = MetaOptNet(nn.Flatten(), "ridge")
    x, y = torch.randn(5, 1, 2, 2), torch.tensor([0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match=r"equally many support examples.*\[2, 3\]"):
        model(x, y, x)
    with pytest.raises(ValueError, match=r"\[0, 2, 3\]"):
        model(x, y + 1, x)


def test_other_bad_input():
    with pytest.raises(ValueError, match="head must be one of"):
        MetaOptNet(nn.Identity(), "svn")
    with pytest.raises(ValueError, match="nothing to prune"):  # the head alone
        Pruner(MetaOptNet(nn.Flatten()), DSDSchedule(0.2, pretrain=1, prune=1, retrain=1))
    model = MetaOptNet(small_features())
    wrong = torch.optim.SGD([model.scale], 0.1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="optimizer"):
        Pruner(model, DSDSchedule(0.2, pretrain=1, prune=1, retrain=1), wrong)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="pad the images"):
        resnet12(28)
    with pytest.raises(ValueError, match="not finite"):
        svm_dual(torch.full((2, 2), math.nan).double(), torch.tensor([0, 1]))


@pytest.mark.parametrize("head", ["svm", "ridge", "prototype"])
@pytest.mark.parametrize("how", ["autocast", "bfloat16", "float16"])
def test_heads_do_not_compute_in_half_precision(head, how):
    """Tight classes of a norm for which the kernel in half precision is not even positive."""
    features, labels = embedding(3, 64, scale=12.0, seed=1)
    queries, _ = embedding(4, 64, scale=12.0, seed=1)
    dtype = torch.float16 if how == "float16" else torch.bfloat16
    features, queries = (x.to(dtype).to(torch.float64) for x in (features, queries))
    net = MetaOptNet(nn.Identity(), head)
    with torch.no_grad():
        expected = MetaOptNet(nn.Identity(), head).double()(features, labels, queries)
        if how == "autocast":
            net.features = nn.Linear(64, 64, bias=False)
            net.features.weight.copy_(torch.eye(64))
            with torch.autocast("cpu", dtype):
                scores = net(features.float(), labels.int(), queries.float())
        else:
            scores = net.to(dtype)(features.to(dtype), labels, queries.to(dtype))
    assert scores.dtype == torch.float32
    assert float((scores - expected).abs().max() / expected.abs().max()) < 1e-5


def test_a_negative_label_is_refused():
    features, labels = embedding(1, 8)
    with pytest.raises(ValueError, match="negative"):
        MetaOptNet(nn.Identity(), "ridge")(features, labels - 1, features)
