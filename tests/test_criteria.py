from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from l2l_prune import DSDSchedule, PrunedReptile, Pruner
from l2l_prune.criteria import magnitude, random

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
        (lambda w: w.detach().abs() * float("nan"), "scores of criterion: it holds NaN"),
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
