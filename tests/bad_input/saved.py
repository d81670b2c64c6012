"""State dicts and checkpoints of other models, other settings, or of nothing at all."""

from __future__ import annotations

import torch

from l2l_prune import DSDSchedule, PrunedReptile, Pruner
from l2l_prune.experiments.config import make_config
from l2l_prune.experiments.running.checkpoint import load_checkpoint, save_checkpoint
from l2l_prune.masking.criteria import Movement
from l2l_prune.methods.drop_grad import DropGrad
from l2l_prune.methods.regrowth import Regrowth
from l2l_prune.methods.rewinding import Rewind
from tests.bad_input.attaching import NOW, attached, finalized
from tests.bad_input.case import Case
from tests.conftest import SmallNet


def spoilt(name, words, spoil, error=ValueError, scene=attached):
    """A Pruner's own state dict, spoilt."""

    def act(s):
        state = s.pruner.state_dict()
        s.pruner.load_state_dict(spoil(state))

    return Case(name, act, error, words, scene)


def with_mask(state, mask):
    return {**state, "masks": {**state["masks"], "fc.weight": mask}}


@torch.random.fork_rng()
def of_another_model():
    return Pruner(torch.nn.Linear(3, 3), NOW).state_dict()


@torch.random.fork_rng()
def of_another_schedule():
    return Pruner(SmallNet(), DSDSchedule(0.4, pretrain=0, prune=2, retrain=1)).state_dict()


@torch.random.fork_rng()
def of_a_model():
    return SmallNet().state_dict()


NONE = torch.zeros(3, 16, dtype=torch.bool)
PRUNER = [
    spoilt("no state", "not a Pruner state dict", lambda s: None),
    spoilt("an empty state", "not a Pruner state dict", lambda s: {}),
    spoilt("a path for a state", "not a Pruner state dict", lambda s: "pruner.pt"),
    spoilt("the model's state", "not a Pruner state dict", lambda s: of_a_model()),
    spoilt(
        "an entry missing",
        "not a Pruner state dict",
        lambda s: {k: v for k, v in s.items() if k != "masks"},
    ),
    spoilt("another version", "not a Pruner state dict", lambda s: {**s, "version": 1}),
    spoilt(
        "another schedule's state",
        r"another schedule .* Pruner: sparsity of segment 2 \(prune\) is 0\.4 there and 0\.5 here$",
        lambda s: of_another_schedule(),
    ),
    spoilt("a schedule that is none", "it holds None", lambda s: {**s, "schedule": None}),
    spoilt(
        "a schedule of no segments",
        "number of segments is 0 there and 3 here",
        lambda s: {**s, "schedule": {"type": "DSDSchedule", "segments": []}},
    ),
    spoilt("another model's state", "other tensors.*conv1.weight", lambda s: of_another_model()),
    spoilt("an iteration that is none", "iteration .*True", lambda s: {**s, "iteration": True}),
    spoilt("no masks", "masks", lambda s: {**s, "masks": None}),
    spoilt("masks without names", "masks", lambda s: {**s, "masks": list(s["masks"].values())}),
    spoilt("a mask as a list", "mask of fc.weight", lambda s: with_mask(s, NONE.tolist())),
    spoilt("a mask of floats", "mask of fc.weight", lambda s: with_mask(s, NONE.float())),
    spoilt("a mask of another shape", "mask of fc.weight", lambda s: with_mask(s, NONE[:2])),
    spoilt(
        "a mask that prunes all", "mask of fc.weight keeps 0 .*24", lambda s: with_mask(s, NONE)
    ),
    spoilt("regrown weights as a list", "regrown", lambda s: {**s, "regrown": [1]}),
    spoilt(
        "regrown weights of another tensor",
        "regrown.*'head.weight'",
        lambda s: {**s, "regrown": {"head.weight": NONE}},
    ),
    spoilt(
        "regrown weights of another shape",
        "regrown.*fc.weight",
        lambda s: {**s, "regrown": {"fc.weight": NONE[:2]}},
    ),
    spoilt("steps that are none", "'stepped'", lambda s: {**s, "stepped": [1]}),
    spoilt("steps without names", "'stepped'", lambda s: {**s, "stepped": [[1, 0, False]]}),
    spoilt("a state after the end", "finalized", lambda s: s, RuntimeError, finalized),
    Case(
        "dense weights into a pruned model",
        lambda s: s.net.fc.load_state_dict({"weight": torch.ones(3, 16)}, strict=False),
        RuntimeError,
        "weight is a dense weight, but the model is pruned",
        attached,
        ours=False,
    ),
]


def trained(folder):
    """PrunedReptile in the middle of a meta-iteration, with a carried inner state."""
    reptile = PrunedReptile(SmallNet(), NOW)
    learner = reptile.clone()
    learner.adapt(learner(torch.ones(2, 1, 6, 6)).sum())
    reptile.collect(learner)
    return {"reptile": reptile}


def half_resumed(name, words, spoil, error=ValueError):
    def act(s):
        s.reptile.set_extra_state(spoil(s.reptile.get_extra_state()))

    return Case(name, act, error, words, trained)


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


REPTILE = [
    half_resumed("no state of Reptile", "not a PrunedReptile state", lambda s: None),
    half_resumed(
        "Reptile's state without tasks", "not a PrunedReptile state", lambda s: without(s, "tasks")
    ),
    half_resumed("tasks that are no number", "tasks .*'2'", lambda s: {**s, "tasks": "2"}),
    half_resumed("tasks without their weights", "collected", lambda s: {**s, "collected": []}),
    half_resumed(
        "collected weights of another model",
        "collected.*conv1",
        lambda s: {**s, "collected": [torch.ones(2, 2), *s["collected"][1:]]},
    ),
    half_resumed(
        "an inner state of another model", "inner_state", lambda s: {**s, "inner_state": [{}]}
    ),
    half_resumed(
        "another schedule's Reptile",
        "another schedule",
        lambda s: {**s, "pruner": of_another_schedule()},
    ),
]


def part(make):
    def scene(folder):
        pruner = Pruner(SmallNet(), DSDSchedule(0.5, pretrain=1, prune=9, retrain=1))
        return {"part": make(pruner), "pruner": pruner}

    return scene


PARTS = [
    Case(
        f"{words} state of a {name}",
        lambda s, state=state: s.part.load_state_dict(state),
        ValueError,
        f"not a {name} state dict",
        part(make),
    )
    for name, make in {
        "Regrowth": lambda pruner: Regrowth(pruner, interval=2),
        "DropGrad": lambda pruner: DropGrad(0.1, torch.Generator()),
        "Rewind": Rewind,
        "Movement": lambda pruner: Movement(pruner.model.parameters()),
    }.items()
    for words, state in {
        "no": None,
        "an empty": {},
        "a model's": {"values": 3, "sums": [1]},
    }.items()
]
CONFIG = make_config("reptile", "dsd")


def checkpoint(write):
    def scene(folder):
        path = folder / "run.pt"
        save_checkpoint(path, CONFIG, {"weights": torch.ones(1000)})
        write(path)
        return {"path": path}

    return scene


def folder_instead(path):
    path.unlink()
    path.mkdir()


def read(name, words, write, config=CONFIG):
    return Case(
        name, lambda s: load_checkpoint(s.path, config), ValueError, words, checkpoint(write)
    )


FILES = [
    read("an empty checkpoint", r"run\.pt", lambda path: path.write_bytes(b"")),
    read("half a checkpoint", r"run\.pt", lambda path: path.write_bytes(path.read_bytes()[:2000])),
    read("any file for a checkpoint", r"run\.pt", lambda path: path.write_text("step,loss\n1,2\n")),
    read("a folder for a checkpoint", r"run\.pt", folder_instead),
    read(
        "other settings' checkpoint",
        r"run\.pt .*other settings",
        lambda path: None,
        make_config("reptile", "iht"),
    ),
]

CASES = PRUNER + REPTILE + PARTS + FILES
