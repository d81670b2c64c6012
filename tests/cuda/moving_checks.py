"""Runs that change their device: by a checkpoint in the middle, or by ``.to()``."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch

from l2l_prune import PrunedReptile, Pruner
from l2l_prune.channels.pruner import ChannelPruner, Structured
from l2l_prune.masking.criteria import Movement
from tests.cuda.place import SCHEDULE, Place, batch, loss_of, network, on_device, state_of
from tests.cuda.pruner_checks import adam
from tests.cuda.reptile_checks import iterate, reptile_trace

# In a dense phase, a sparse one, and between a release and the first step after it.
STOPS = (1, 3, 5)


class Run:
    """A run with a Pruner, or one that cuts channels, that can be saved and go on elsewhere."""

    def __init__(self, device, channels=False):
        self.net = network().to(device)
        self.optimizer = adam(self.net.parameters(), device)
        if channels:
            x, _ = batch(0, device)
            self.pruner = ChannelPruner(self.net, SCHEDULE, self.optimizer, example_inputs=x)
            self.movement = None
        else:
            self.movement = Movement(self.net.parameters())
            self.optimizer.register_step_pre_hook(self.movement.observe)
            self.pruner = Pruner(self.net, SCHEDULE, self.optimizer, criterion=self.movement)

    def go(self, iterations):
        device = next(self.net.parameters()).device
        for _ in range(iterations):
            self.optimizer.zero_grad()
            loss_of(self.net, self.pruner.iteration, device).backward()
            self.optimizer.step()
            self.pruner.step()

    def saved(self):
        # Channels first: they set the shapes that the others need.
        parts = {"pruner": self.pruner, "movement": self.movement, "net": self.net}
        parts["optimizer"] = self.optimizer
        return {name: part.state_dict() for name, part in parts.items() if part}

    def load(self, state):
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)

    def trace(self, device):
        sums = self.movement.state_dict()["sums"] if self.movement else []
        values = self.net.state_dict(), state_of(self.optimizer), self.pruner.masks, sums
        return on_device(device, *values)


class ReptileRun:
    """The same of a PrunedReptile, which is saved with a task collected already."""

    def __init__(self, device, channels=False):
        structured = Structured(batch(0, device)[0]) if channels else None
        self.reptile = PrunedReptile(
            network().to(device), SCHEDULE, inner_lr=0.01, structured=structured
        )

    def go(self, iterations):
        device = next(self.reptile.parameters()).device
        for _ in range(iterations):
            iterate(self.reptile, self.reptile.iteration, device)
        learner = self.reptile.clone()
        learner.adapt(loss_of(learner, 10_000 + self.reptile.iteration, device))
        self.reptile.collect(learner)

    def saved(self):
        return self.reptile.state_dict()

    def load(self, state):
        if self.reptile.structured:  # sets the shapes that the weights have
            self.reptile.pruner.load_state_dict(state["_extra_state"]["pruner"])
        self.reptile.load_state_dict(state)

    def trace(self, device):
        return reptile_trace(self.reptile, device)


def straight(device, make, stop):
    run = make(device)
    run.go(stop)
    run.go(SCHEDULE.iterations - stop)
    return run.trace(device)


def resumed(device, make, stop, folder, first, kept_where_saved):
    """Trained on ``first`` until ``stop``, then on ``device``."""
    run = make(first)
    run.go(stop)
    torch.save(run.saved(), folder / "checkpoint.pt")
    where = None if kept_where_saved else device
    state = torch.load(folder / "checkpoint.pt", map_location=where, weights_only=True)
    run = make(device)
    run.load(state)
    run.go(SCHEDULE.iterations - stop)
    return run.trace(device)


def check_moving(place, make):
    """To the device, from it, and (the file read as it is) without ``map_location``."""
    for stop in STOPS:
        expected = functools.partial(straight, make=make, stop=stop)
        run = functools.partial(resumed, make=make, stop=stop, folder=place.folder)
        for kept in (False, True):
            place.compare(functools.partial(run, first="cpu", kept_where_saved=kept), expected)
            place.compare(  # all of it in the end on the CPU
                lambda _, run=run, kept=kept: run("cpu", first=place.device, kept_where_saved=kept),
                expected,
            )


def checkpoints_of_a_pruner(place: Place) -> None:
    check_moving(place, Run)


def checkpoints_of_reptile(place: Place) -> None:
    check_moving(place, ReptileRun)


def checkpoints_of_channels(place: Place) -> None:
    pytest.importorskip("torch_pruning")
    check_moving(place, functools.partial(Run, channels=True))


def checkpoints_of_channels_in_reptile(place: Place) -> None:
    pytest.importorskip("torch_pruning")
    check_moving(place, functools.partial(ReptileRun, channels=True))


def moved_in_the_middle(place: Place) -> None:
    """``.to()`` there and back, without a file."""

    def run(device):
        run = ReptileRun("cpu")
        for stop in range(1, SCHEDULE.iterations):
            run.go(1)
            run.reptile.to(device if stop % 2 else "cpu")
        run.reptile.to(device)
        return run.trace(device)

    place.compare(run)


def loading_puts_state_where_the_weights_are(place: Place) -> None:
    """Of all parts that are loaded; torch's "meta" stands in for the other device."""
    for stop in STOPS:
        source = ReptileRun(place.device)
        source.go(stop)
        state = source.saved()
        with place.fault(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: the weights themselves are not loaded there
            target = ReptileRun(place.device)
            target.reptile.to("meta")
            target.load(state)
            extra = target.reptile.get_extra_state()
            on_device("meta", target.saved(), extra["inner_state"], extra["collected"])
        source = Run(place.device)
        source.go(stop)
        state = source.saved()
        with place.fault():
            target = Run(place.device)
            target.net.to("meta")
            target.pruner.load_state_dict(state["pruner"])
            on_device("meta", target.pruner.state_dict())
