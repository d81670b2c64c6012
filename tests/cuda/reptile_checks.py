"""PrunedReptile, its compiled and batched learners, sparse-MAML, and whole channels."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from l2l_prune import (
    DropGrad,
    MGAug,
    PrunedReptile,
    Schedule,
    Segment,
    TaskDropout,
    TaskMasks,
)
from l2l_prune.channels.pruner import ChannelPruner, Structured
from l2l_prune.fewshot.models import Conv4
from l2l_prune.masking.criteria import snip
from l2l_prune.metalearners.sparse_maml import SparseMAML
from l2l_prune.reptile.batched import BatchedLearners
from l2l_prune.reptile.best_channels import best_channels
from l2l_prune.reptile.compiled import CompiledStep
from l2l_prune.reptile.learner import adam as inner_adam
from tests.conftest import OLD_TORCH, without_compiler
from tests.cuda.place import (
    SCHEDULE,
    Place,
    batch,
    loss_of,
    network,
    on_device,
    state_of,
)
from tests.cuda.pruner_checks import adam, sgd

TASKS, STEPS = 2, 3


def plainly(learner, number, device):
    learner.adapt(loss_of(learner, number, device))


def iterate(reptile, iteration, device, step=plainly):
    for task in range(TASKS):
        learner = reptile.clone()
        for number in range(STEPS):
            step(learner, 100 * iteration + 10 * task + number, device)
        reptile.collect(learner)
    reptile.step()


def reptile_trace(reptile, device):
    state = reptile.state_dict()
    extra = state.pop("_extra_state")
    kept = extra["pruner"].pop("kept", None)  # positions, on the CPU wherever the weights are
    trace = on_device(device, state, reptile.pruner.masks, extra["inner_state"], extra["pruner"])
    return trace | {f"kept {name}": places for name, places in (kept or {}).items()}


def reptile_on(device, **options):
    return PrunedReptile(network().to(device), SCHEDULE, inner_lr=0.01, **options)


def train(device, *, step=plainly, **options):
    reptile, trace = reptile_on(device, **options), {}
    for iteration in range(SCHEDULE.iterations):
        iterate(reptile, iteration, device, step)
        trace |= {f"{iteration}: {k}": v for k, v in reptile_trace(reptile, device).items()}
    return trace


def with_reptile(place: Place) -> None:
    momentum = functools.partial(torch.optim.SGD, momentum=0.9)
    for options in ({}, {"foml": True}, {"carry_state": False}, {"inner_optimizer": momentum}):
        place.compare(functools.partial(train, **options))
    place.compare(functools.partial(train, criterion=snip))
    if place.on_gpu:
        kind = functools.partial(torch.optim.AdamW, betas=(0.0, 0.999), weight_decay=0.0)
        capturable = functools.partial(kind, capturable=True)
        place.compare(
            functools.partial(train, inner_optimizer=capturable),
            functools.partial(train, inner_optimizer=inner_adam),
            atol=1e-5,  # its bias correction is in float32
        )


def with_compiled_steps(place: Place) -> None:
    """On a GPU through the compiler, on the CPU (for the planted faults) by Python."""
    if OLD_TORCH:
        pytest.skip("compiled steps need torch 2.6")

    def loss(learner, x, y):
        return F.cross_entropy(learner(x), y)

    def run(device):
        compiled = CompiledStep(loss)
        return train(device, step=lambda learner, n, device: compiled(learner, *batch(n, device)))

    with contextlib.nullcontext() if place.on_gpu else without_compiler():
        place.compare(run, train)


def with_batched_learners(place: Place) -> None:
    """Against learners that adapt one after the other on the CPU, in each phase."""

    def after(device, iterations):
        reptile = reptile_on(device)
        for iteration in range(iterations):
            iterate(reptile, iteration, device)
        return reptile

    def data(task, device):
        return [batch(1000 + 10 * task + number, device) for number in range(STEPS)]

    def together(device, iterations):
        learners = BatchedLearners(after(device, iterations), TASKS)
        for parts in zip(*(data(task, device) for task in range(TASKS)), strict=True):
            x, y = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
            learners.adapt(learners.each(lambda net, x, y: F.cross_entropy(net(x), y), x, y))
        return on_device(device, learners.weights, learners.buffers)

    def one_by_one(device, iterations):
        reptile, states = after(device, iterations), []
        for task in range(TASKS):
            learner = reptile.clone()
            for x, y in data(task, device):
                learner.adapt(F.cross_entropy(learner(x), y))
            states.append(learner.module)
        weights, buffers = (
            {name: torch.stack([dict(named(net))[name] for net in states]) for name in names}
            for named in (torch.nn.Module.named_parameters, torch.nn.Module.named_buffers)
            for names in [dict(named(states[0]))]
        )
        return on_device(device, weights, buffers)

    for iterations in (0, 3, 6):
        place.compare(
            functools.partial(together, iterations=iterations),
            functools.partial(one_by_one, iterations=iterations),
        )


def with_sparse_maml(place: Place) -> None:
    def run(device):
        generator = torch.Generator().manual_seed(0)
        maml = SparseMAML(network().to(device), lr=0.1, generator=generator)
        optimizer = torch.optim.SGD(maml.parameters(), lr=0.1)
        for number in range(4):
            learner = maml.clone()
            learner.adapt(loss_of(learner, number, device))
            optimizer.zero_grad()
            loss_of(learner, 10 + number, device).backward()
            optimizer.step()
        return on_device(device, maml.state_dict())

    place.compare(run)


def with_mgaug(place: Place) -> None:
    def run(device, way):
        net = network().to(device)
        reptile = PrunedReptile(net, Schedule((Segment(2),)), inner_lr=0.01)
        x, _ = batch(0, device)
        mgaug = MGAug(reptile.pruner, generator(), way, rate=0.5, example_inputs=x)
        trace = {}
        for iteration in range(2):
            for number, masks in enumerate(mgaug.networks()):
                with reptile.task_masks(masks):
                    learner = reptile.clone()
                plainly(learner, iteration, device)
                if not number:
                    pairs = zip(net.parameters(), learner.module.parameters(), strict=True)
                    mgaug.observe([old.detach() - new.detach() for old, new in pairs])
                reptile.collect(learner)
                trace |= on_device(device, {f"{iteration} {number}": masks})
            reptile.step()
        return trace | reptile_trace(reptile, device)

    for way in ("width", "parameters", "catfish"):
        place.compare(functools.partial(run, way=way))


def with_drop_grad(place: Place) -> None:
    def run(device, noise):
        drop = DropGrad(0.3, generator(), noise)

        def step(learner, number, device):
            drop.adapt(learner, loss_of(learner, number, device))

        return train(device, step=step)

    for noise in ("gaussian", "bernoulli"):
        place.compare(functools.partial(run, noise=noise))


def with_task_dropout(place: Place) -> None:
    def run(device):
        net = network()
        net.insert(5, torch.nn.Dropout(0.5))
        TaskDropout.replace_in(net)
        reptile, draws = PrunedReptile(net.to(device), SCHEDULE, inner_lr=0.01), generator()
        for iteration in range(SCHEDULE.iterations):
            learner = reptile.clone()
            TaskDropout.draw(learner, draws)
            for number in range(STEPS):
                plainly(learner, 10 * iteration + number, device)
            reptile.collect(learner)
            reptile.step()
        return reptile_trace(reptile, device)

    place.compare(run)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def channels_trace(pruner, net, optimizer, device):
    trace = on_device(device, net.state_dict(), state_of(optimizer), pruner.released)
    kept = {name: torch.tensor(places) for name, places in pruner.channels.items()}
    return trace | {f"kept {name}": places for name, places in kept.items()}


def with_channels(place: Place) -> None:
    pytest.importorskip("torch_pruning")

    def run(device, make, importance):
        net = network().to(device)
        optimizer, trace = make(net.parameters(), device), {}
        x, _ = batch(0, device)
        pruner = ChannelPruner(net, SCHEDULE, optimizer, example_inputs=x, importance=importance)
        for number in range(SCHEDULE.iterations):
            optimizer.zero_grad()
            loss_of(net, number, device).backward()
            optimizer.step()
            pruner.step()
            found = channels_trace(pruner, net, optimizer, device)
            trace |= {f"{number}: {name}": value for name, value in found.items()}
        return trace | on_device(device, pruner.finalize()(x))

    for make, importance in ((sgd, "l2"), (adam, "l1"), (adam, "taylor")):
        place.compare(functools.partial(run, make=make, importance=importance))


class Counted(nn.Module):
    """Its output changes with the number of channels, where no tensor shows it."""

    def forward(self, x):
        return x * x.shape[1]


def channels_at_usual_precision(place: Place) -> None:
    """The trial cuts at construction run in TF32 on a GPU, and must not take that for a fault."""
    pytest.importorskip("torch_pruning")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        with place.fault():
            x = torch.rand(1, 1, 28, 28, device=place.device)
            pruner = ChannelPruner(Conv4(5, 64).to(place.device), SCHEDULE, example_inputs=x)
            assert len(pruner.channels) == 4
            wrong = nn.Sequential(nn.Conv2d(1, 64, 3), Counted(), nn.Conv2d(64, 5, 3))
            with pytest.raises(ValueError, match="output changes"):
                ChannelPruner(wrong.to(place.device), SCHEDULE, example_inputs=x)
    finally:
        torch.backends.cudnn.allow_tf32 = before


def with_channels_in_reptile(place: Place) -> None:
    pytest.importorskip("torch_pruning")

    def run(device):
        return train(device, structured=Structured(batch(0, device)[0]))

    place.compare(run)


def with_task_channels(place: Place) -> None:
    pytest.importorskip("torch_pruning")
    schedule = Schedule((Segment(1), Segment(3, sparse=True, sparsity=0.5, masks="task")))

    def run(device, foml):
        net = network().to(device)
        reptile = PrunedReptile(
            net,
            schedule,
            inner_lr=0.01,
            foml=foml,
            structured=Structured(batch(0, device)[0]),
            task_masks=TaskMasks(generator()),
        )
        trace = {}
        for iteration in range(schedule.iterations):
            for task in range(TASKS):
                with reptile.task_masks():
                    learner = reptile.clone()
                for number in range(STEPS):
                    plainly(learner, 100 * iteration + 10 * task + number, device)
                reptile.collect(learner)
            reptile.step()
            inner = reptile.get_extra_state()["inner_state"]
            found = on_device(device, net.state_dict(), inner)
            trace |= {f"{iteration}: {name}": value for name, value in found.items()}
        return trace

    for foml in (False, True):
        place.compare(functools.partial(run, foml=foml))


def with_best_channels(place: Place) -> None:
    def run(device):
        reptile = reptile_on(device)
        for iteration in range(3):  # it is sparse then
            iterate(reptile, iteration, device)
        tasks = [batch(1000 + number, device) for number in range(TASKS)]
        chosen = best_channels(reptile, tasks, share=0.4)
        learner = reptile.clone(adapt_only=chosen)
        for number in range(STEPS):
            plainly(learner, 2000 + number, device)
        found = {name: torch.tensor(channels) for name, channels in chosen.items()}
        return found | on_device(device, learner.module.state_dict())

    place.compare(run)
