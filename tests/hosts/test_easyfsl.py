"""easyfsl's methods, backbones and sampler under masks, against a dense model masked by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from l2l_prune import Pruner, dense_state_dict
from tests.hosts import examples
from tests.hosts.oracle import PHASES, Oracle, TinyNet, assert_equal, assert_pruned, tasks

pytest.importorskip("easyfsl")
from easyfsl.methods import MatchingNetworks, PrototypicalNetworks
from easyfsl.modules import resnet10, resnet12


def test_prototypical_networks_equal_the_oracle():
    backbone = TinyNet()
    model = PrototypicalNetworks(backbone)
    oracle = Oracle(backbone)
    opt = torch.optim.Adam(model.parameters(), 0.01)
    pruner = Pruner(model, PHASES, opt, release_state="keep")
    for iteration in range(PHASES.iterations):
        xs, _, xq, yq = tasks(iteration, 1)[0]
        ys = torch.arange(3).repeat(2)
        opt.zero_grad()
        model.process_support_set(xs, ys)
        F.cross_entropy(model(xq), yq).backward()
        values = oracle.parameters
        support = oracle.run(values, xs)
        centres = torch.stack([support[ys == label].mean(0) for label in range(3)])
        distances = (oracle.run(values, xq)[:, None] - centres).square().sum(-1).sqrt()
        theirs = oracle.gradients(F.cross_entropy(-distances, yq))
        assert_equal([p.grad for p in model.parameters()], theirs, 1e-9)
        opt.step()
        pruner.step()
        oracle.step(theirs, iteration)
        assert_equal(list(model.parameters()), list(oracle.parameters.values()))
        assert_pruned(backbone, oracle.masks)


@pytest.mark.parametrize("width", [8, 640], ids=["resnet10", "resnet12"])
@pytest.mark.parametrize("method", ["prototypical", "matching"])
def test_methods_and_backbones_equal_a_dense_model_with_zeros(method, width):
    backbone = resnet10(planes=[4, 4, 4, 8]) if width == 8 else resnet12()
    if method == "matching":
        model = MatchingNetworks(backbone, feature_dimension=width)
    else:
        model = PrototypicalNetworks(backbone)
    dense = copy.deepcopy(model)
    pruner = Pruner(model, PHASES)
    pruner.step()
    pruner.step()
    dense.load_state_dict(dense_state_dict(model))
    convolutions = [n for n, m in dense.named_modules() if isinstance(m, nn.Conv2d)]
    assert {f"{name}.weight" for name in convolutions} <= set(pruner.masks)
    xs, xq = torch.randn(6, 3, 16, 16), torch.randn(6, 3, 16, 16)
    ys, yq = torch.arange(3).repeat(2), torch.arange(3).repeat(2)
    found = []
    for each in (model, dense):
        each.process_support_set(xs, ys)
        scores = each(xq)
        (F.nll_loss if method == "matching" else F.cross_entropy)(scores, yq).backward()
        found.append((scores.detach(), [p.grad for p in each.parameters()]))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    masks = {f"{name}_orig": mask for name, mask in pruner.masks.items()}
    names = [name for name, _ in model.named_parameters()]
    for name, ours, theirs in zip(names, found[0][1], found[1][1], strict=True):
        if theirs is None:  # the classifier that the backbone does not use
            assert ours is None
            continue
        assert torch.allclose(ours, theirs * masks.get(name, 1), atol=1e-5)


def test_its_sampler_and_loader(monkeypatch):
    example = examples.load("easyfsl_protonet", monkeypatch)
    data = example.GlyphsDataset()
    sampler = example.Tasks(data, 5, 1, 3, n_tasks=2)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=sampler.episodic_collate_fn)
    for xs, ys, xq, yq, _ in loader:
        assert xs.shape == (5, 3, 28, 28)
        assert xq.shape == (15, 3, 28, 28)
        assert sorted(ys.tolist()) == list(range(5))
        assert yq.bincount().tolist() == [3] * 5
