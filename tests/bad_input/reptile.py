"""PrunedReptile: rates, inner optimizers, learners at the wrong moment."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from l2l_prune import DSDSchedule, PrunedReptile, Pruner
from l2l_prune.channels.pruner import Structured
from l2l_prune.reptile.batched import BatchedLearners
from tests.bad_input.attaching import NOW, small
from tests.bad_input.case import Case
from tests.conftest import SmallNet

X, Y = torch.ones(2, 1, 6, 6), torch.tensor([0, 1])


def running(folder):
    """In a sparse phase, with a learner that has learnt."""
    reptile = PrunedReptile(SmallNet(), NOW)
    learner = reptile.clone()
    learner.adapt(F.cross_entropy(learner(X), Y))
    # As functions: what a case does with the scores (gradients of theirs) is its own doing.
    scores = learner(X)
    return {"reptile": reptile, "learner": learner, "scores": lambda: scores}


def two(folder):
    """A refused adapt may clear the gradients of the last one, so learners are not watched here."""
    scene = running(folder)
    learner = scene.pop("learner")
    other = PrunedReptile(SmallNet(), NOW)
    stranger = other.clone()
    scores = stranger(X)
    own = {"mine": lambda: learner, "stranger": lambda: stranger, "far": lambda: scores}
    return {**scene, "other": other, **own}


def stepped(folder):
    scene = running(folder)
    scene["reptile"].collect(scene["learner"])
    scene["learner"] = scene["reptile"].clone()
    scene["reptile"].step()
    return scene


def collected(folder):
    scene = running(folder)
    scene["reptile"].collect(scene["learner"])
    scene["used"] = scene.pop("learner").__dict__  # it has no module any more
    return scene


def finalized(folder):
    scene = running(folder)
    with pytest.warns(UserWarning, match="finalize.* before the schedule retrains"):
        scene["reptile"].finalize()
    return scene


def with_inner(inner):
    def scene(folder):
        net = SmallNet()
        return {"net": net, "reptile": PrunedReptile(net, NOW, inner_optimizer=inner(net))}

    return scene


def option(name, words, error=ValueError, **options):
    return Case(name, lambda s: PrunedReptile(s.net, NOW, **options), error, words, small)


def at(name, words, act, scene=running, error=RuntimeError):
    return Case(name, act, error, words, scene)


OPTIONS = [
    option("inner rate in words", "inner_lr .*'1e-3'", TypeError, inner_lr="1e-3"),
    option("inner rate 0", "inner_lr must be a number > 0, got 0", inner_lr=0),
    option("inner rate None", "inner_lr .*None", TypeError, inner_lr=None),
    option("meta rate below 0", "meta_lr .*-1", meta_lr=-1),
    option("meta rate None", "meta_lr .*None", TypeError, meta_lr=None),
    option("last meta rate NaN", "meta_lr_final .*nan", meta_lr_final=float("nan")),
    option(
        "inner optimizer by name", "inner_optimizer .*'adam'", TypeError, inner_optimizer="adam"
    ),
    Case(
        "inner optimizer made already",
        lambda s: PrunedReptile(s.net, NOW, inner_optimizer=s.optimizer),
        TypeError,
        "inner_optimizer .*Adam",
        small,
    ),
    option("carry in words", "carry_state .*'no'", TypeError, carry_state="no"),
    option(
        "structured without inputs", "structured .*Structured.*True", TypeError, structured=True
    ),
    option("a group by name", "group .*'world'", TypeError, group="world"),
    option(
        "structured with a pattern of layers",
        "structured cannot be combined with only",
        structured=Structured(X),
        layers="authors",
    ),
    Case(
        "the class of a model for Reptile",
        lambda s: PrunedReptile(SmallNet, NOW),
        TypeError,
        "model must be a torch.nn.Module, got the class SmallNet",
    ),
    Case(
        "a model that a Pruner holds",
        lambda s: PrunedReptile(s.pruner.model, NOW),
        ValueError,
        "conv1.weight is already pruned",
        lambda folder: {"pruner": Pruner(SmallNet(), NOW)},
    ),
    Case(
        "a copy of Reptile's model",
        lambda s: PrunedReptile(copy.deepcopy(s.reptile.module), NOW),
        ValueError,
        "conv1.weight is already pruned",
        running,
    ),
    Case(
        "Reptile's model under a Pruner",
        lambda s: Pruner(s.reptile, DSDSchedule(0.3, pretrain=1, prune=1, retrain=1)),
        ValueError,
        "conv1.weight is already pruned",
        running,
    ),
]


def sgd_of_the_model(net):
    return lambda parameters, lr: torch.optim.SGD(net.parameters(), lr)


INNER = [
    at(
        "L-BFGS inside",
        "inner_optimizer .*L-BFGS",
        lambda s: s.reptile.clone(),
        with_inner(lambda net: torch.optim.LBFGS),
        ValueError,
    ),
    at(
        "an inner optimizer of nothing",
        "inner_optimizer.* Optimizer, got None",
        lambda s: s.reptile.clone(),
        with_inner(lambda net: lambda parameters, lr: None),
        TypeError,
    ),
    at(
        "an inner optimizer of the meta-model",
        "inner_optimizer .*given",
        lambda s: s.reptile.clone(),
        with_inner(sgd_of_the_model),
        ValueError,
    ),
]

LEARNERS = [
    at("a step without a task", r"step\(\) without a task", lambda s: s.reptile.step()),
    at(
        "another's learner", "another PrunedReptile", lambda s: s.reptile.collect(s.stranger()), two
    ),
    at(
        "another's learner dropped",
        "another PrunedReptile",
        lambda s: s.reptile.discard(s.stranger()),
        two,
    ),
    at(
        "the model collected",
        "made by clone.*SmallNet",
        lambda s: s.reptile.collect(s.reptile.module),
        error=TypeError,
    ),
    at(
        "nothing collected",
        "made by clone.*None",
        lambda s: s.reptile.collect(None),
        error=TypeError,
    ),
    at(
        "a stale learner",
        r"before the last step\(\)",
        lambda s: s.reptile.collect(s.learner),
        stepped,
    ),
    at("a clone after the end", "finalized", lambda s: s.reptile.clone(), finalized),
    at("a step of Reptile after the end", "finalized", lambda s: s.reptile.step(), finalized),
    at("Reptile finalized twice", "finalized", lambda s: s.reptile.finalize(), finalized),
    at("a collect after the end", "finalized", lambda s: s.reptile.collect(s.learner), finalized),
    at(
        "a loss that is a number",
        "loss .*tensor, got 0.5",
        lambda s: s.learner.adapt(0.5),
        error=TypeError,
    ),
    at(
        "a loss for each example",
        r"loss must be one number.*\(2,\)",
        lambda s: s.learner.adapt(F.cross_entropy(s.scores(), Y, reduction="none")),
        error=ValueError,
    ),
    at(
        "another learner's loss",
        "loss does not depend on this learner",
        lambda s: s.mine().adapt(F.cross_entropy(s.far(), Y)),
        two,
    ),
    at(
        "a loss without gradients",
        "loss does not depend on this learner",
        lambda s: s.learner.adapt(F.cross_entropy(s.scores().detach(), Y)),
    ),
]


def batched(name, words, act, error=ValueError):
    return Case(f"learners at once, {name}", act, error, words, small_reptile)


def small_reptile(folder):
    return {"reptile": PrunedReptile(SmallNet(), NOW)}


BATCHED = [
    batched("of no Reptile", "reptile must be a", lambda s: BatchedLearners(3, 2), TypeError),
    batched("none of them", "tasks must be >= 1, got 0", lambda s: BatchedLearners(s.reptile, 0)),
    batched(
        "one loss for two",
        r"one number for each of the 2 tasks, got the shape \(\)",
        lambda s: BatchedLearners(s.reptile, 2).adapt(torch.ones((), requires_grad=True)),
    ),
    batched(
        "losses of nothing",
        "do not depend on the learners",
        lambda s: BatchedLearners(s.reptile, 2).adapt(torch.ones(2)),
        RuntimeError,
    ),
]
CASES = OPTIONS + INNER + LEARNERS + BATCHED
