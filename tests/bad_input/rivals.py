"""MGAug, DropGrad and dropout for tasks: wrong numbers, wrong schedules, wrong moments."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from l2l_prune import (
    ChannelPruner,
    DropGrad,
    DSDSchedule,
    MGAug,
    PrunedReptile,
    Pruner,
    Schedule,
    Segment,
    TaskDropout,
)
from tests.bad_input.case import Case
from tests.conftest import SmallNet

DENSE = Schedule((Segment(3),))
X, Y = torch.ones(2, 1, 6, 6), torch.tensor([0, 1])


def dense(folder):
    return {"pruner": Pruner(SmallNet(), DENSE), "generator": torch.Generator()}


def sparse(folder):
    schedule = DSDSchedule(0.5, pretrain=1, prune=1, retrain=1)
    return {**dense(folder), "pruner": Pruner(SmallNet(), schedule)}


def per_task(folder):
    from l2l_prune import TaskMasks

    generator = torch.Generator()
    schedule = DSDSchedule(0.5, pretrain=1, prune=1, retrain=1).per_task()
    pruner = Pruner(SmallNet(), schedule, task_masks=TaskMasks(torch.Generator()))
    return {"pruner": pruner, "generator": generator}


def channels(folder):
    return {**dense(folder), "pruner": ChannelPruner(SmallNet(), DENSE, example_inputs=X)}


def dropping(folder):
    net = nn.Sequential(nn.Flatten(), TaskDropout(0.5), nn.Linear(36, 3))
    return {"net": net, "generator": torch.Generator()}


def learning(folder):
    reptile = PrunedReptile(SmallNet(), DENSE)
    learner = reptile.clone()
    drop = DropGrad(0.5, torch.Generator())
    return {"reptile": reptile, "learner": learner, "drop": drop}


def mgaug(name, words, error=ValueError, scene=dense, way="parameters", **options):
    def act(s):
        MGAug(s.pruner, options.pop("generator", s.generator), way, **options)

    return Case(f"MGAug: {name}", act, error, words, scene)


def drop_grad(name, words, error=ValueError, rate=0.1, noise="gaussian", generator=None):
    def act(s):
        DropGrad(rate, s.generator if generator is None else generator, noise)

    return Case(f"DropGrad: {name}", act, error, words, dense)


CASES = [
    mgaug("a seed", "generator .*torch.Generator, got 3", TypeError, generator=3),
    mgaug("an unknown way", "way .*width, parameters, catfish.*'wide'", way="wide"),
    mgaug("no rate", r"rate .*\(0, 1\)", rate=0.0),
    mgaug("everything", r"rate .*\[0, 1\)", rate=1.0),
    mgaug("a percentage", r"rate .*20; 20% is 0.2", rate=20),
    mgaug("a rate in words", "rate .*'0.2'", TypeError, rate="0.2"),
    mgaug("no sub-network", "networks .*>= 1", networks=0),
    mgaug("half a sub-network", "networks .*0.5", TypeError, networks=0.5),
    mgaug("widths without inputs", "width.* needs example_inputs", way="width"),
    mgaug("inputs of another size", "run on example_inputs", way="width", example_inputs=X[0]),
    mgaug("a sparse phase", "dense .*schedule without sparse segments", scene=sparse),
    mgaug("task masks", "dense .*schedule without sparse segments", scene=per_task),
    mgaug("channels", "pruner .*a Pruner, got ChannelPruner", TypeError, scene=channels),
    Case(
        "MGAug: gradients of another model",
        lambda s: MGAug(s.pruner, s.generator, "catfish").observe([torch.ones(1)]),
        ValueError,
        r"observe\(\) needs a gradient for each",
        dense,
    ),
    Case(
        "MGAug: a state that is none",
        lambda s: MGAug(s.pruner, s.generator).load_state_dict({"seed": 3}),
        ValueError,
        "checkpoint",
        dense,
    ),
    drop_grad("a seed", "generator .*torch.Generator, got 3", TypeError, generator=3),
    drop_grad("everything", r"rate .*\[0, 1\)", rate=1),
    drop_grad("below 0", r"rate .*-0.1", rate=-0.1),
    drop_grad("NaN", "rate .*nan", rate=float("nan")),
    drop_grad("a rate in words", "rate .*'0.1'", TypeError, rate="0.1"),
    drop_grad("an unknown noise", "noise .*gaussian.*bernoulli.*'binary'", noise="binary"),
    Case(
        "DropGrad: a number for a gradient",
        lambda s: DropGrad(0.1, s.generator)(0.5),
        TypeError,
        "gradient .*tensor, got 0.5",
        dense,
    ),
    Case(
        "DropGrad: a mask",
        lambda s: DropGrad(0.1, s.generator)(torch.ones(2, dtype=torch.bool)),
        TypeError,
        "gradient must be real.*bool",
        dense,
    ),
    Case(
        "DropGrad: a model",
        lambda s: s.drop.adapt(s.reptile.module, torch.ones(())),
        TypeError,
        "learner .*SmallNet",
        learning,
    ),
    Case(
        "DropGrad: a loss for each example",
        lambda s: s.drop.adapt(s.learner, torch.ones(2)),
        ValueError,
        "loss must be one number",
        learning,
    ),
    Case("dropout of everything", lambda s: TaskDropout(1.0), ValueError, r"p .*\[0, 1\)"),
    Case("dropout in words", lambda s: TaskDropout("0.1"), TypeError, "p .*'0.1'"),
    Case("channels in words", lambda s: TaskDropout(0.1, "no"), TypeError, "channels .*'no'"),
    Case(
        "dropout without a task",
        lambda s: F.cross_entropy(s.net(X), Y),
        RuntimeError,
        r"TaskDropout.draw\(learner, generator\)",
        dropping,
    ),
    Case(
        "dropout drawn from a seed",
        lambda s: TaskDropout.draw(s.net, 3),
        TypeError,
        "generator .*torch.Generator, got 3",
        dropping,
    ),
    Case(
        "dropout drawn for none",
        lambda s: TaskDropout.draw(s.pruner.model, s.generator),
        ValueError,
        "no TaskDropout.*replace_in",
        dense,
    ),
    Case(
        "dropout replaced in none",
        lambda s: TaskDropout.replace_in(s.pruner.model),
        ValueError,
        "no dropout layer",
        dense,
    ),
]
