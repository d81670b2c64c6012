"""Pruner: models, optimizers and selections that are refused, and calls at the wrong time."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from l2l_prune import DSDSchedule, IHTSchedule, Pruner, Schedule, Segment, dense_state_dict
from l2l_prune.masking.criteria import Movement, random
from l2l_prune.masking.patterns import NByM
from tests.bad_input.case import Case
from tests.conftest import SmallNet

SCHEDULE = DSDSchedule(0.5, pretrain=1, prune=2, retrain=1)
NOW = DSDSchedule(0.5, pretrain=0, prune=2, retrain=1)


def small(folder):
    """A net that has been trained for a step."""
    net = SmallNet()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(2, 1, 6, 6)).sum().backward()
    optimizer.step()
    other = torch.optim.SGD(SmallNet().parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(other, 1)
    return {"net": net, "optimizer": optimizer, "other": other, "scheduler": scheduler}


def attached(folder, steps=0, schedule=NOW):
    scene = small(folder)
    scene["pruner"] = Pruner(scene["net"], schedule, scene["optimizer"])
    for _ in range(steps):
        scene["pruner"].step()
    return scene


def finalized(folder):
    scene = attached(folder)
    with pytest.warns(UserWarning, match="finalize.* before the schedule retrains"):
        scene["pruner"].finalize()
    return scene


def removed(folder):
    scene = attached(folder)
    prune.remove(scene["net"].conv2, "weight")
    return scene


def replaced(folder):
    scene = attached(folder)
    scene["net"].fc.weight_mask = torch.ones(3, 16)
    return scene


def diverged(folder):
    scene = attached(folder, schedule=SCHEDULE)
    with torch.no_grad():
        scene["net"].conv2.weight_orig[0, 0, 0, 0] = float("nan")
    return scene


def alone(make):
    def scene(folder):
        return {"net": make()}

    return scene


def tied():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    return net


def pruned_by_torch():
    return prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)


def with_weight(make):
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].weight = nn.Parameter(make(net[0].weight.detach()))
    return net


def frozen():
    net = nn.Linear(3, 3)
    net.weight.requires_grad_(False)
    return net


def inference():
    with torch.inference_mode():
        return nn.Linear(3, 3)


def quantized():
    net = nn.Sequential(nn.Linear(4, 4))
    return torch.ao.quantization.quantize_dynamic(net, dtype=torch.qint8)


def scripted():
    return torch.jit.script(nn.Linear(3, 3))


def refused(name, words, make, error=ValueError, **options):
    return Case(name, lambda s: Pruner(s.net, NOW, **options), error, words, alone(make))


def with_a_mask_of_its_own():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight_mask = None
    return net


def sparse_embedding():
    return nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 3))


def renormalised_embedding():
    return nn.Sequential(nn.Embedding(4, 3, max_norm=1.0), nn.Linear(3, 3))


def lazy_norm():
    return nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())


MODELS = [
    Case("a schedule first", lambda s: Pruner(NOW, s.net), TypeError, "model .*DSDSchedule", small),
    Case("the class of a model", lambda s: Pruner(SmallNet, NOW), TypeError, "model .*SmallNet"),
    Case(
        "the weights for the model",
        lambda s: Pruner(s.net.state_dict(), NOW),
        TypeError,
        "model .*OrderedDict",
        small,
    ),
    Case(
        "the class of a schedule",
        lambda s: Pruner(s.net, IHTSchedule),
        TypeError,
        "schedule must be a Schedule, got the class IHTSchedule",
        small,
    ),
    Case(
        "a rate for the schedule", lambda s: Pruner(s.net, 0.5), TypeError, "schedule .*0.5", small
    ),
    refused("nothing to prune", "nothing to prune.*BatchNorm1d", lambda: nn.BatchNorm1d(3)),
    refused("tied weights", r"0\.weight is tied.*skip=", tied),
    refused("pruned by torch", "weight is already pruned.*prune.remove", pruned_by_torch),
    refused(
        "weight norm",
        "weight is parametrized",
        lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
    ),
    refused("frozen", "weight is frozen", frozen),
    refused("no data yet", "weight has no data", lambda: nn.Linear(3, 3, device="meta")),
    refused("lazy", "weight is not initialized yet", lambda: nn.LazyLinear(3)),
    refused("scripted", "scripted", scripted),
    refused("quantized", "nothing to prune.*Linear", quantized),
    refused("complex", "weight is torch.complex64", lambda: nn.Linear(3, 3, dtype=torch.complex64)),
    refused("empty", "weight has no entries", lambda: nn.Linear(0, 3)),
    refused(
        "sparse layout", r"0\.weight .*sparse_coo", lambda: with_weight(torch.Tensor.to_sparse)
    ),
    refused(
        "8-bit floats",
        r"0\.weight is torch.float8_e4m3fn",
        lambda: with_weight(lambda weight: weight.to(torch.float8_e4m3fn)),
    ),
    refused(
        "one number for all weights",
        r"0\.weight .*share memory",
        lambda: with_weight(lambda weight: weight[:1, :1].expand(4, 4)),
    ),
    refused("sparse gradients", "gets sparse gradients.*sparse=False", sparse_embedding, only="*"),
    refused("a name that masks need", "weight_mask of its own: rename", with_a_mask_of_its_own),
    refused(
        "renormalised in place",
        "0.weight is renormalised.*max_norm",
        renormalised_embedding,
        only="*",
    ),
    refused("lazy, only everything", "0.weight is not initialized", lazy_norm, only="*"),
    refused("made in inference mode", "weight .*inference_mode", inference),
    Case(
        "two Pruners",
        lambda s: Pruner(s.net, NOW),
        ValueError,
        "conv1.weight is already pruned: finalize.* the Pruner",
        attached,
    ),
    Case(
        "a copy of a pruned model",
        lambda s: Pruner(copy.deepcopy(s.net), NOW),
        ValueError,
        "conv1.weight is already pruned",
        attached,
    ),
    Case("dense keys of no model", lambda s: dense_state_dict(3), TypeError, "model .*got 3"),
]


def option(name, words, error=ValueError, **options):
    return Case(name, lambda s: Pruner(s.net, NOW, **options), error, words, small)


def flat(weight):
    return weight.flatten()


def replacing(name, words, masks, error=ValueError):
    return Case(name, lambda s: s.pruner.replace_masks(masks), error, words, attached)


ARGUMENTS = [
    replacing("masks in a list", "masks must be a dict .*list", [torch.ones(3, 16)], TypeError),
    replacing("a mask in words", "the mask of fc.weight .*'all'", {"fc.weight": "all"}, TypeError),
    replacing("a mask of an unknown layer", "'head' is not one of", {"head": torch.ones(1)}),
    replacing("a mask of numbers", "fc.weight must be boolean", {"fc.weight": torch.ones(3, 16)}),
    Case(
        "masks of a task in words",
        lambda s: s.pruner.task_masks("fc").__enter__(),
        TypeError,
        "masks must be a dict .*'fc'",
        attached,
    ),
    option("layers by number", 'layers must be "all" or "authors", got 3', layers=3),
    option(
        "only by a wrong name", r"no prunable layer is called 'conv9'.*conv1.weight", only="conv9"
    ),
    option("skip by a wrong name", r"no prunable layer is called 'head'", skip=["conv1", "head"]),
    option("only by a number", "only takes names.*got 3", TypeError, only=3),
    option("skip by a mixture", "skip takes names.*got 3", TypeError, skip=["fc", 3]),
    option("skip by a class that is no module", "skip takes names.*class int", TypeError, skip=int),
    option(
        "only by a norm", "nothing to prune for only=the class BatchNorm2d", only=nn.BatchNorm2d
    ),
    option("only nothing", "nothing to prune.*only=", only=[]),
    option("skip everything", "nothing to prune.*skip=.*conv1.weight", skip="*"),
    Case(
        "only by the layer itself",
        lambda s: Pruner(s.net, NOW, only=s.net.fc),
        TypeError,
        "only takes names.*Linear.*'fc'",
        small,
    ),
    option("a criterion by name", "criterion .*'magnitude'", TypeError, criterion="magnitude"),
    option("the class of a criterion", "criterion .*class Movement", TypeError, criterion=Movement),
    option("a criterion of another shape", "conv1.weight .*criterion", criterion=flat),
    option(
        "a criterion of yes and no",
        "conv1.weight .*criterion.*torch.bool",
        TypeError,
        criterion=lambda weight: weight > 0,
    ),
    option(
        "a complex criterion",
        "conv1.weight .*criterion.*complex",
        TypeError,
        criterion=lambda weight: weight * 1j,
    ),
    option(
        "a criterion of NaN", "conv1.weight .*criterion.*NaN", criterion=lambda w: w * float("nan")
    ),
    option(
        "random not made yet", "generator .*torch.Generator.*Parameter", TypeError, criterion=random
    ),
    option("a pattern in words", "pattern .*'2:4'", TypeError, pattern="2:4"),
    option("the class of a pattern", "pattern .*the class NByM", TypeError, pattern=NByM),
    option("a pattern that does not fit", r"conv1.weight .*NByM.*skip=", pattern=NByM(2, 4)),
    option("an unknown regrow state", "release_state .*'zero'", release_state="zero"),
    option("dense keys in words", "dense_keys .*'no'", TypeError, dense_keys="no"),
    Case(
        "a rate for a layer that is not there",
        lambda s: Pruner(s.net, Schedule([Segment(1, sparse=True, sparsity={"head": 0.5})])),
        ValueError,
        "'head'; there are: conv1.weight",
        small,
    ),
    Case(
        "more kept than a layer has",
        lambda s: Pruner(s.net, Schedule([Segment(1, sparse=True, keep={"fc": 999})])),
        ValueError,
        "keep=999 .*48 weights of fc.weight",
        small,
    ),
    Case(
        "a layer pruned away",
        lambda s: Pruner(s.net, Schedule([Segment(1, sparse=True, sparsity=0.999)])),
        ValueError,
        "0.999 would prune all 36 weights of conv1.weight",
        small,
    ),
]


def optimizer(name, words, choose, error=TypeError):
    return Case(name, lambda s: Pruner(s.net, NOW, choose(s)), error, words, small)


OPTIMIZERS = [
    optimizer(
        "the parameters for the optimizer", "optimizer .*Parameter", lambda s: s.net.parameters()
    ),
    optimizer(
        "the class of an optimizer", "optimizer .*the class Adam", lambda s: torch.optim.Adam
    ),
    optimizer(
        "a scheduler for the optimizer",
        "optimizer .*StepLR",
        lambda s: s.scheduler,
    ),
    optimizer("a rate for the optimizer", "optimizer .*0.1", lambda s: 0.1),
    optimizer("another model's optimizer", "optimizer holds none", lambda s: s.other, ValueError),
    optimizer(
        "one of two is another's",
        "optimizer holds none",
        lambda s: [s.optimizer, s.other],
        ValueError,
    ),
    Case(
        "no optimizer added",
        lambda s: s.pruner.add_optimizer(None),
        TypeError,
        "optimizer must be a torch Optimizer, got None",
        attached,
    ),
    Case(
        "a list of optimizers added",
        lambda s: s.pruner.add_optimizer([s.optimizer]),
        TypeError,
        "optimizer .*list",
        attached,
    ),
    Case(
        "an optimizer added twice",
        lambda s: s.pruner.add_optimizer(s.optimizer),
        ValueError,
        "optimizer .*already",
        attached,
    ),
    Case(
        "another model's optimizer added",
        lambda s: s.pruner.add_optimizer(s.other),
        ValueError,
        "optimizer holds none",
        attached,
    ),
]

MOMENTS = [
    Case(
        "a step after the end",
        lambda s: s.pruner.step(),
        RuntimeError,
        "finalized: make",
        finalized,
    ),
    Case("finalized twice", lambda s: s.pruner.finalize(), RuntimeError, "finalized", finalized),
    Case(
        "an optimizer after the end",
        lambda s: s.pruner.add_optimizer(s.optimizer),
        RuntimeError,
        "finalized",
        finalized,
    ),
    Case(
        "a mask taken off",
        lambda s: s.pruner.step(),
        RuntimeError,
        "conv2.weight was removed",
        removed,
    ),
    Case(
        "a mask replaced",
        lambda s: s.pruner.step(),
        RuntimeError,
        "mask of fc.weight is not the one of this Pruner",
        replaced,
    ),
    Case(
        "a diverged net",
        lambda s: s.pruner.step(),
        ValueError,
        "conv2.weight at iteration 0.*NaN",
        diverged,
    ),
    Case(
        "a masked weight assigned",
        lambda s: setattr(s.net.fc, "weight", nn.Parameter(torch.ones(3, 16))),
        RuntimeError,
        r"Linear\.weight is under .* mask.*weight_orig",
        attached,
    ),
    Case(
        "a masked weight deleted",
        lambda s: delattr(s.net.fc, "weight"),
        RuntimeError,
        r"Linear\.weight is under .* mask",
        partial(attached, steps=1),
    ),
]

CASES = MODELS + ARGUMENTS + OPTIMIZERS + MOMENTS
