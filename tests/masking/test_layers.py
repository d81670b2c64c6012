from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from l2l_prune import DSDSchedule, Pruner
from l2l_prune.masking.layers import segment_counts, select
from l2l_prune.schedules.paper import Segment


def names(tensors):
    return [tensor.full_name for tensor in tensors]


def test_all_conv_and_linear_weights_in_model_order(net):
    assert names(select(net)) == ["conv1.weight", "conv2.weight", "fc.weight"]


def test_authors_leave_out_the_first_convolution(net):
    assert names(select(net, layers="authors")) == ["conv2.weight", "fc.weight"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"only": "conv*"}, ["conv1.weight", "conv2.weight"]),
        ({"only": "fc.weight"}, ["fc.weight"]),
        ({"only": nn.Linear}, ["fc.weight"]),
        ({"only": ["conv2", nn.Linear]}, ["conv2.weight", "fc.weight"]),
        ({"skip": "conv1"}, ["conv2.weight", "fc.weight"]),
        ({"skip": lambda name, module: name == "fc"}, ["conv1.weight", "conv2.weight"]),
        ({"only": nn.Conv2d, "skip": "conv2"}, ["conv1.weight"]),
        ({"only": "norm.weight"}, ["norm.weight"]),
        ({"only": "fc.bias"}, ["fc.bias"]),
    ],
)
def test_only_and_skip(net, options, expected):
    assert names(select(net, **options)) == expected


def test_other_modules_can_be_chosen_by_type():
    model = nn.ModuleDict({"emb": nn.Embedding(5, 3), "rnn": nn.LSTM(3, 4, bias=True)})
    assert names(select(model, only=nn.Embedding)) == ["emb.weight"]
    assert names(select(model, only="rnn")) == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["self.in_proj_weight", "self.out_proj.weight"]),
        ({"kdim": 5}, [f"self.{p}_proj_weight" for p in "qkv"] + ["self.out_proj.weight"]),
        ({"add_bias_kv": True}, ["self.in_proj_weight", "self.out_proj.weight"]),
    ],
)
def test_projections_of_attention(options, expected):
    model = nn.ModuleDict({"self": nn.MultiheadAttention(8, 2, **options)})
    assert names(select(model)) == expected
    assert names(select(model, only=nn.MultiheadAttention)) == expected[:-1]  # no bias_k, bias_v
    assert names(select(model, skip="self")) == expected[-1:]


def test_an_attention_whose_projection_torch_prunes_is_refused():
    attention = nn.MultiheadAttention(8, 2)
    prune.l1_unstructured(attention, "in_proj_weight", 0.5)
    with pytest.raises(ValueError, match="in_proj_weight is already pruned"):
        select(attention)


def test_counts_by_rate_pattern_and_explicit_k(net):
    tensors = select(net)  # 36, 144 and 48 weights
    assert segment_counts(tensors, Segment(1)) == [36, 144, 48]
    assert segment_counts(tensors, Segment(1, sparse=True, sparsity=0.3)) == [25, 101, 34]
    mapped = Segment(1, sparse=True, sparsity={"conv*": 0.5, "conv1": 0.25})
    assert segment_counts(tensors, mapped) == [27, 72, 48]
    explicit = Segment(1, sparse=True, sparsity=0.5, keep={"fc.weight": 7})
    assert segment_counts(tensors, explicit) == [18, 72, 7]


def tied():
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight = a.weight
    return nn.Sequential(a, b)


def tied_by_storage():
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight = nn.Parameter(a.weight.data)
    return nn.Sequential(a, b)


def tied_to_unselected():
    embedding, head = nn.Embedding(4, 3), nn.Linear(3, 4)
    head.weight = embedding.weight
    return nn.Sequential(embedding, head)


def frozen():
    layer = nn.Linear(3, 3)
    layer.weight.requires_grad_(False)
    return layer


def parametrized():
    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    return layer


def clone_of():
    pytest.importorskip("learn2learn")
    from learn2learn import clone_module

    return clone_module(nn.Linear(3, 3))


class Raw(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, 3))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: nn.Linear(3, 3), {"only": "conv9"}, "no prunable layer is called 'conv9'.*weight"),
        (lambda: nn.Linear(3, 3), {"skip": "conv9"}, "no prunable layer is called 'conv9'"),
        (lambda: nn.Linear(3, 3), {"skip": nn.Linear}, "nothing to prune"),
        (Raw, {}, "nothing to prune.*Raw"),
        (lambda: nn.BatchNorm2d(3), {}, "nothing to prune"),
        (lambda: nn.BatchNorm2d(3, affine=False), {"only": nn.BatchNorm2d}, "nothing to prune"),
        (tied, {}, "0.weight is tied"),
        (tied_by_storage, {}, "0.weight is tied"),
        (tied_to_unselected, {}, "1.weight is tied"),
        (frozen, {}, "frozen"),
        (parametrized, {}, "weight is parametrized"),
        (lambda: parametrizations.weight_norm(nn.Linear(3, 3)), {}, "weight is parametrized"),
        (lambda: parametrizations.spectral_norm(nn.Linear(3, 3)), {}, "weight is parametrized"),
        (lambda: nn.utils.weight_norm(nn.Linear(3, 3)), {}, "weight_norm or spectral_norm"),
        (lambda: nn.utils.spectral_norm(nn.Linear(3, 3)), {}, "weight_norm or spectral_norm"),
        (lambda: prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.5), {}, "already pruned"),
        (
            lambda: prune.l1_unstructured(nn.Linear(3, 3), "bias", 1),
            {"only": "bias"},
            "no prunable",
        ),
        (
            lambda: prune.l1_unstructured(nn.Embedding(3, 3), "weight", 1),
            {"only": nn.Embedding},
            "already",
        ),
        (lambda: nn.LazyLinear(3), {}, "not initialized"),
        (lambda: nn.Linear(3, 3, device="meta"), {}, "no data"),
        (lambda: nn.Linear(3, 3, dtype=torch.complex64), {}, "complex64"),
        (lambda: torch.jit.script(nn.Linear(3, 3)), {"only": lambda n, m: True}, "script"),
        (clone_of, {}, "not a Parameter"),
        (lambda: nn.Linear(3, 3), {"layers": "authors"}, "first convolution"),
        (lambda: nn.Linear(3, 3), {"layers": "some"}, "layers must be"),
    ],
)
@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)
def test_what_cannot_be_pruned_is_refused_by_name(make, options, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        select(model, **options)


def test_a_pruned_model_is_not_pruned_again(net):
    schedule = DSDSchedule(0.5, pretrain=1, prune=1, retrain=1)
    Pruner(net, schedule)
    with pytest.raises(ValueError, match=r"conv1.weight is already pruned"):
        Pruner(net, schedule)


def test_rules_of_the_wrong_type(net):
    with pytest.raises(TypeError, match="only takes names"):
        select(net, only=[3])


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (Segment(1, sparse=True, sparsity={"conv7": 0.5}), "no prunable layer is called 'conv7'"),
        (Segment(1, sparse=True, keep={"conv7": 5}), "no prunable layer is called 'conv7'"),
        (Segment(1, sparse=True, keep={"fc": 49}), r"keep=49.*48 weights of fc.weight"),
        (Segment(1, sparse=True, sparsity={"fc": 0.99}), "all 48 weights of fc.weight"),
    ],
)
def test_schedules_that_do_not_fit_the_model(net, segment, message):
    with pytest.raises(ValueError, match=message):
        segment_counts(select(net), segment)


def test_a_shared_module_is_one_layer():
    layer = nn.Linear(3, 3)
    assert names(select(nn.Sequential(layer, nn.ReLU(), layer))) == ["0.weight"]
