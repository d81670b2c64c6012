"""Channels, CAVIA, Lightning and MetaOptNet."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from l2l_prune import DSDSchedule, Pruner
from l2l_prune.channels.pruner import ChannelPruner
from l2l_prune.metalearners.cavia import CAVIA, ConcatContext, FiLM
from tests.bad_input.attaching import NOW, SCHEDULE, small
from tests.bad_input.case import Case
from tests.bad_input.saved import of_another_model
from tests.conftest import SmallNet

X = torch.ones(2, 1, 6, 6)


def channels(folder, schedule=NOW):
    scene = small(folder)
    scene["pruner"] = ChannelPruner(
        scene["net"], schedule, scene["optimizer"], example_inputs=X, skip="conv2"
    )
    return scene


def cut(name, words, error=ValueError, choose=lambda s: None, **options):
    return Case(
        name,
        lambda s: ChannelPruner(s.net, NOW, choose(s), **{"example_inputs": X, **options}),
        error,
        words,
        small,
    )


def spoilt(name, words, spoil, error=ValueError):
    return Case(
        name,
        lambda s: s.pruner.load_state_dict(spoil(s.pruner.state_dict())),
        error,
        words,
        channels,
    )


def finished(folder):
    scene = channels(folder)
    with pytest.warns(UserWarning, match="finalize.* before the schedule retrains"):
        scene["pruner"].finalize()
    return scene


def positions(*kept):
    return {"conv1": torch.tensor(kept)}


def lbfgs(scene):
    return torch.optim.LBFGS(scene.net.parameters())


def replaced(folder):
    scene = channels(folder)
    scene["net"].conv1 = nn.Conv2d(1, 4, 3)
    return scene


CHANNELS = [
    Case(
        "channels of no model",
        lambda s: ChannelPruner(3, NOW, example_inputs=X),
        TypeError,
        "model .*3",
    ),
    Case(
        "channels at a rate",
        lambda s: ChannelPruner(s.net, 0.5, example_inputs=X),
        TypeError,
        "schedule .*0.5",
        small,
    ),
    cut("inputs of another shape", "example_inputs", example_inputs=torch.ones(2, 3, 6, 6)),
    cut("no inputs", "example_inputs", example_inputs=None),
    cut("an unknown importance", "importance .*'l3'", importance="l3"),
    cut("importance by number", "importance .*2", TypeError, importance=2),
    cut("channels of an unknown layer", "'conv9'.*conv1", skip="conv9"),
    cut("skip a number", "skip takes names, .* got 3", TypeError, skip=3),
    cut("every type skipped", "no channels", skip=[nn.Conv2d, nn.Linear]),
    cut("every channel skipped", "no channels", skip="*"),
    cut("channels and another's optimizer", "optimizer holds none", choose=lambda s: s.other),
    cut("a group by name", "group .*'world'", TypeError, group="world"),
    cut("channels and L-BFGS", "state of LBFGS is not held entry by entry", choose=lbfgs),
    cut("importance of too few", "conv1 .*4 scores", importance=lambda group: torch.ones(2)),
    Case(
        "taylor before a backward",
        lambda s: ChannelPruner(s.net, NOW, s.optimizer, example_inputs=X, importance="taylor"),
        ValueError,
        "Taylor importance needs gradients of conv1",
        lambda folder: {
            "net": (net := SmallNet()),
            "optimizer": torch.optim.Adam(net.parameters()),
        },
    ),
    Case(
        "no channel left",
        lambda s: ChannelPruner(
            s.net, DSDSchedule(0.9, pretrain=0, prune=1, retrain=0), example_inputs=X
        ),
        ValueError,
        "conv1 has 4 channels and would keep 0",
        small,
    ),
    Case(
        "channels under masks",
        lambda s: ChannelPruner(s.pruner.model, NOW, example_inputs=X),
        ValueError,
        r"weight is already pruned",
        lambda folder: {"pruner": Pruner(SmallNet(), NOW)},
    ),
    spoilt("no state of channels", "not a ChannelPruner state", lambda s: None),
    spoilt(
        "a Pruner's state for channels",
        "not a ChannelPruner state",
        lambda s: of_another_model(),
    ),
    spoilt("a state without channels", "not a ChannelPruner state", lambda s: {**s, "kept": 3}),
    spoilt(
        "another schedule's channels",
        "another schedule",
        lambda s: {**s, "schedule": SCHEDULE.to_dict()},
    ),
    spoilt("too few channels", "conv1", lambda s: {**s, "kept": positions(0)}),
    spoilt(
        "channels that are not there",
        "conv1",
        lambda s: {**s, "kept": positions(0, 9)},
    ),
    spoilt("the same channel twice", "conv1", lambda s: {**s, "kept": positions(1, 1)}),
    spoilt(
        "cut weights of another shape",
        "full.*conv1.weight",
        lambda s: {**s, "full": {**s["full"], "conv1.weight": torch.ones(2)}},
    ),
    Case("a layer replaced", lambda s: s.pruner.step(), RuntimeError, "conv1 was repl", replaced),
    Case("channels after the end", lambda s: s.pruner.step(), RuntimeError, "finalized", finished),
]


def cavia(folder):
    net = nn.Sequential(ConcatContext(2), nn.Linear(3, 1))
    wrapper = CAVIA(net)
    return {"net": net, "wrapper": wrapper, "learner": wrapper.clone()}


def film(folder):
    return {"film": FiLM(2, 4)}


CONTEXT = [
    Case("no model for CAVIA", lambda s: CAVIA(3), TypeError, "model .*3"),
    Case("no context layer", lambda s: CAVIA(s.net), ValueError, "no context layers.*FiLM", small),
    Case(
        "contexts of two sizes",
        lambda s: CAVIA(s.net),
        ValueError,
        "context_size, got .*2.*3",
        lambda folder: {"net": nn.Sequential(FiLM(2, 3), FiLM(3, 3))},
    ),
    Case("CAVIA's rate in words", lambda s: CAVIA(s.net, lr="1"), TypeError, "lr .*'1'", cavia),
    Case("CAVIA's rate 0", lambda s: CAVIA(s.net, lr=0), ValueError, "lr .*0", cavia),
    Case("a context of no length", lambda s: FiLM(0, 3), ValueError, "context_size .*0"),
    Case(
        "hidden layers by width",
        lambda s: FiLM(2, 3, hidden_layers=64),
        ValueError,
        "hidden_layers .*64",
    ),
    Case(
        "no context yet", lambda s: s.net(torch.ones(1, 1)), RuntimeError, r"CAVIA\(model\)", cavia
    ),
    Case(
        "a CAVIA loss that is a number",
        lambda s: s.learner.adapt(1.0),
        TypeError,
        "loss .*tensor, got 1.0",
        cavia,
    ),
    Case(
        "a CAVIA loss for each example",
        lambda s: s.learner.adapt(s.learner(torch.ones(3, 1))),
        ValueError,
        r"loss must be one number.*\(3, 1\)",
        cavia,
    ),
    Case(
        "FiLM on one channel",
        lambda s: CAVIA(s.film).forward(torch.ones(2, 1, 5, 5)),
        ValueError,
        r"4 channels.*\(2, 1, 5, 5\)",
        film,
    ),
    Case(
        "a context beside images",
        lambda s: s.wrapper(torch.ones(2, 1, 5, 5)),
        ValueError,
        r"\[batch, features\].*\(2, 1, 5, 5\)",
        cavia,
    ),
]


class Lightning:
    """Imports Lightning only where a case needs it."""

    @staticmethod
    def callback(*args, **options):
        pytest.importorskip("pytorch_lightning")
        from l2l_prune.integrations.lightning import PruningCallback

        return PruningCallback(*args, **options)


class Trainer:
    """What the callback asks a trainer for."""

    is_global_zero, world_size, callbacks = True, 1, ()

    def __init__(self, *optimizers):
        self.optimizers = list(optimizers)

    def __repr__(self):
        return "Trainer"


def plugged(folder):
    scene = small(folder)
    scene["callback"] = Lightning.callback(SCHEDULE)
    scene["callback"].setup(Trainer(), scene["net"], "fit")
    return {**scene, "pruner": scene["callback"].pruner}


LIGHTNING = [
    Case(
        "the class for the callback",
        lambda s: Lightning.callback(DSDSchedule),
        TypeError,
        "schedule .*the class DSDSchedule",
    ),
    Case(
        "a callback that nobody called",
        lambda s: Lightning.callback(NOW).on_fit_start(Trainer(), s.net),
        RuntimeError,
        "not set up: give it to Trainer",
        small,
    ),
    Case(
        "a trainer of another model",
        lambda s: s.callback.on_fit_start(Trainer(s.other), s.net),
        ValueError,
        "none of the trainer's optimizers",
        plugged,
    ),
    Case(
        "a callback's state of nothing",
        lambda s: s.callback.load_state_dict({"a": 1}),
        ValueError,
        "not a Pruner state dict",
        plugged,
    ),
    Case(
        "weights to a folder that is not there",
        lambda s: Lightning.callback(NOW, dense_weights="runs/net.pt").setup(
            Trainer(), s.net, "fit"
        ),
        FileNotFoundError,
        "dense_weights.*runs",
        small,
    ),
    Case(
        "weights to a number",
        lambda s: Lightning.callback(NOW, dense_weights=3),
        TypeError,
        "dense_weights .*3",
    ),
]


def metaoptnet():
    pytest.importorskip("learn2learn")
    from l2l_prune.metalearners import metaoptnet

    return metaoptnet


def head(folder):
    return {"net": metaoptnet().MetaOptNet(nn.Flatten(), head="ridge")}


METAOPTNET = [
    Case("no features", lambda s: metaoptnet().MetaOptNet(3), TypeError, "features .*3"),
    Case(
        "an unknown head",
        lambda s: metaoptnet().MetaOptNet(nn.Flatten(), head="lda"),
        ValueError,
        "head .*'lda'",
    ),
    Case(
        "images too small", lambda s: metaoptnet().resnet12(28), ValueError, "image_size .*28: pad"
    ),
    Case(
        "unequal shots",
        lambda s: s.net(torch.ones(3, 1, 2, 2), torch.tensor([0, 0, 1]), torch.ones(1, 1, 2, 2)),
        ValueError,
        r"equally many.*\[2, 1\]",
        head,
    ),
    Case(
        "labels as floats",
        lambda s: s.net(torch.ones(2, 1, 2, 2), torch.tensor([0.0, 1.0]), torch.ones(1, 1, 2, 2)),
        TypeError,
        "support_y .*float32",
        head,
    ),
    Case(
        "smoothing of 1",
        lambda s: metaoptnet().smoothed_cross_entropy(torch.ones(2, 3), torch.tensor([0, 1]), 1),
        ValueError,
        "smoothing .*1",
    ),
]

CASES = CHANNELS + CONTEXT + LIGHTNING + METAOPTNET
