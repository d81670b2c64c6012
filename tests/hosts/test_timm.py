"""timm's backbones, a transformer among them, under ProtoNet's and MetaOptNet's heads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call

from l2l_prune import Pruner, Schedule, Segment
from l2l_prune.metalearners.metaoptnet import MetaOptNet, smoothed_cross_entropy

timm = pytest.importorskip("timm")
pytest.importorskip("qpth")

SCHEDULE = Schedule((Segment(1), Segment(2, sparse=True, sparsity=0.5), Segment(1)))
SMALL = {"num_classes": 0, "in_chans": 1}
BACKBONES = {
    "vit_tiny_patch16_224": {"img_size": 28, "patch_size": 7, "depth": 2},
    "resnet10t": {},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
}


@pytest.mark.parametrize("head", ["prototype", "ridge", "svm"])
@pytest.mark.parametrize("name", BACKBONES)
def test_gradients_equal_a_dense_model_with_zeros(name, head):
    features = timm.create_model(name, **SMALL, **BACKBONES[name]).double().eval()
    model = MetaOptNet(features, head=head).double()
    dense = copy.deepcopy(model)
    opt = torch.optim.Adam(model.parameters(), 1e-3)
    pruner = Pruner(model, SCHEDULE, opt)
    if "vit" in name:
        kinds = {"patch_embed.proj": 1, "attn.qkv": 2, "attn.proj": 2, "mlp.fc1": 2, "mlp.fc2": 2}
        for kind, count in kinds.items():
            assert sum(kind in tensor for tensor in pruner.masks) == count
    size = 28 if "vit" in name else 32
    x = torch.randn(2, 3, 1, size, size, dtype=torch.float64)
    y = torch.arange(3).expand(2, -1)
    for _ in range(SCHEDULE.iterations):
        values = {
            old: value.detach().clone().requires_grad_()
            for (old, _), value in zip(dense.named_parameters(), model.parameters(), strict=True)
        }
        masks = pruner.masks if pruner.sparse else {}
        masked = {n: v * masks[n] if n in masks else v for n, v in values.items()}
        scores = functional_call(dense, masked, (x, y, x + 0.1))
        theirs = torch.autograd.grad(smoothed_cross_entropy(scores, y), list(values.values()))
        opt.zero_grad()
        smoothed_cross_entropy(model(x, y, x + 0.1), y).backward()
        for ours, other in zip(model.parameters(), theirs, strict=True):
            assert torch.allclose(ours.grad, other, atol=1e-7)
        opt.step()
        pruner.step()
        for tensor, mask in pruner.masks.items() if pruner.sparse else ():
            path, _, weight = tensor.rpartition(".")
            assert (getattr(model.get_submodule(path), weight)[~mask] == 0).all()
