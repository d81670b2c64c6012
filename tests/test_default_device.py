"""Under ``torch.set_default_device``, as programs for GPUs use it, the numbers are the same.

Torch's "meta" stands in for another device than the model's: what is made there by mistake cannot
be mixed with what is on the CPU.
"""

from __future__ import annotations

import functools

import pytest
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
    Regrowth,
    Rewind,
    Schedule,
    Segment,
    TaskDropout,
    TaskMasks,
)
from l2l_prune.channels import Structured
from l2l_prune.fewshot import Conv4, EpisodeSampler, few_shot_accuracy
from l2l_prune.fewshot.data.sine import SineTasks
from l2l_prune.masking import criteria
from l2l_prune.masking.patterns import Block, NByM
from l2l_prune.metalearners.cavia import CAVIA, FiLM
from l2l_prune.metalearners.fields import FieldMAML, FourierFeatureMLP, ImageSignals
from l2l_prune.metalearners.sparse_maml import SparseMAML
from l2l_prune.reptile.batched import BatchedLearners
from l2l_prune.reptile.best_channels import best_channels
from tests.cuda.place import WIDE, batch, network
from tests.cuda.pruner_checks import LATER_LAYERS
from tests.cuda.reptile_checks import generator

DSD = DSDSchedule(0.5, pretrain=2, prune=3, retrain=3)
PER_TASK = Schedule((Segment(1), Segment(4, sparse=True, sparsity=0.5, masks="task")))
X, Y = batch(0, "cpu")


def loss_of(net):
    return F.cross_entropy(net(X), Y)


def with_pruner(schedule=DSD, prepare=None, criterion=None, make=torch.optim.Adam, **options):
    """Returns what runs under another default device; torch makes Adam's state before, there."""
    net = network()
    optimizer = make(net.parameters(), lr=0.01)
    loss_of(net).backward()
    optimizer.step()

    def run():
        more = {} if criterion is None else {"criterion": criterion(net, optimizer)}
        pruner = Pruner(net, schedule, optimizer, **options, **more)
        if prepare is not None:
            prepare(pruner, net)
        for _ in range(schedule.iterations):
            optimizer.zero_grad()
            with pruner.task_masks():
                loss_of(net).backward()
            optimizer.step()
            pruner.step()
        pruner.load_state_dict(pruner.state_dict())
        return pruner.finalize().state_dict()

    return run


def movement(net, optimizer):
    watched = criteria.Movement(net.parameters())
    optimizer.register_step_pre_hook(watched.observe)
    return watched


def with_reptile(schedule=DSD, step=None, **options):
    net = network()

    def run():
        more = {"task_masks": TaskMasks(generator())} if schedule is PER_TASK else {}
        reptile = PrunedReptile(net, schedule, inner_lr=0.01, **options, **more)
        for _ in range(schedule.iterations):
            for _ in range(2):
                with reptile.task_masks():
                    learner = reptile.clone()
                    for _ in range(2):
                        if step is None:
                            learner.adapt(loss_of(learner))
                        else:
                            step(learner)
                    reptile.collect(learner)
            reptile.step()
        return reptile.finalize().state_dict()

    return run


def with_channels():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    def run():
        pruner = ChannelPruner(net, DSD, optimizer, example_inputs=X)
        for number in range(DSD.iterations):
            optimizer.zero_grad()
            loss_of(net).backward()
            optimizer.step()
            pruner.step()
            if number == 4:
                pruner.load_state_dict(pruner.state_dict())
        return pruner.finalize().state_dict()

    return run


def with_mgaug(way):
    net = network()

    def run():
        reptile = PrunedReptile(net, Schedule((Segment(2),)), inner_lr=0.01)
        mgaug = MGAug(reptile.pruner, generator(), way, rate=0.5, example_inputs=X)
        for _ in range(2):
            for number, masks in enumerate(mgaug.networks()):
                with reptile.task_masks(masks):
                    learner = reptile.clone()
                learner.adapt(loss_of(learner))
                if not number:
                    pairs = zip(net.parameters(), learner.module.parameters(), strict=True)
                    mgaug.observe([old.detach() - new.detach() for old, new in pairs])
                reptile.collect(learner)
            reptile.step()
        return reptile.finalize().state_dict()

    return run


def with_task_dropout():
    net = network()
    net.insert(5, nn.Dropout(0.5))
    TaskDropout.replace_in(net)

    def run():
        TaskDropout.draw(net, generator())
        return {"scores": net(X)}

    return run


def with_drop_grad():
    gradient = torch.ones(5)

    def run():
        return {n: DropGrad(0.3, generator(), noise=n)(gradient) for n in ("gaussian", "bernoulli")}

    return run


def with_learners_at_once():
    reptile = PrunedReptile(network(), DSD)
    x, y = torch.stack([X, X.flip(0)]), torch.stack([Y, Y])

    def run():
        learners = BatchedLearners(reptile, 2)
        for _ in range(2):
            losses = learners.each(lambda learner, x, y: F.cross_entropy(learner(x), y), x, y)
            learners.adapt(losses)
        chosen = best_channels(reptile, [(X, Y)], share=0.4)
        learner = reptile.clone(adapt_only=chosen)
        learner.adapt(loss_of(learner))
        return {**learners.weights, **learner.module.state_dict()}

    return run


def with_episodes():
    images, labels = torch.rand(60, 1, 28, 28), torch.arange(6).repeat_interleave(10)
    reptile = PrunedReptile(Conv4(5, 4), DSD)

    def run():
        sampler = EpisodeSampler(images, labels, ways=5, shots=1, queries=2, label_noise=0.3)
        episodes = [sampler.sample() for _ in range(3)]
        accuracies = [
            few_shot_accuracy(reptile, episodes, steps=2, batch_size=3, tasks_at_once=tasks).mean
            for tasks in (1, 3)
        ]
        sine = SineTasks().sample()
        return {str(n): t for n, t in enumerate((*episodes[-1], *sine))} | {"at once": accuracies}

    return run


def with_metalearners():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), FiLM(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    cavia, pictures = CAVIA(nn.Sequential(*layers).to(WIDE)), torch.rand(3, 1, 6, 6)
    field = FieldMAML(FourierFeatureMLP(width=8, features=4))
    net = network()

    def run():
        learner = cavia.clone()
        learner.adapt(loss_of(learner))
        signals = ImageSignals(pictures)
        values = signals.sample(2, generator())
        sparse = SparseMAML(net, 0.1, generator=generator())
        other = sparse.clone()
        other.adapt(loss_of(other))
        found = field.fit(signals.coordinates, values, steps=2)
        return {**found, "context": learner.context, "scores": other(X)}

    return run


RUNS = {
    "Adam": with_pruner,
    "fused AdamW": functools.partial(
        with_pruner, make=functools.partial(torch.optim.AdamW, fused=True)
    ),
    "global": functools.partial(with_pruner, allocation="global"),
    "2:4": functools.partial(with_pruner, pattern=NByM(2, 4), **LATER_LAYERS),
    "blocks": functools.partial(with_pruner, pattern=Block(1, 2), **LATER_LAYERS),
    "random": functools.partial(with_pruner, criterion=lambda *_: criteria.random(generator())),
    "movement": functools.partial(with_pruner, criterion=movement),
    "grasp": functools.partial(
        with_pruner,
        criterion=lambda net, _: criteria.grasp(lambda: loss_of(net), net.parameters()),
    ),
    "masks of tasks": lambda: with_pruner(PER_TASK, task_masks=TaskMasks(generator())),
    "SET": functools.partial(with_pruner, prepare=lambda p, net: Regrowth(p, interval=1)),
    "RigL": functools.partial(
        with_pruner,
        prepare=lambda p, net: Regrowth(p, interval=1, loss=lambda: loss_of(net)),
    ),
    "rewinding": functools.partial(with_pruner, prepare=lambda p, net: Rewind(p, to=1)),
    "Reptile": with_reptile,
    "first-order MAML": functools.partial(with_reptile, foml=True),
    "Reptile, masks of tasks": functools.partial(with_reptile, PER_TASK),
    "MGAug, parameters": functools.partial(with_mgaug, "parameters"),
    "MGAug, catfish": functools.partial(with_mgaug, "catfish"),
    "dropout for tasks": with_task_dropout,
    "DropGrad": with_drop_grad,
    "learners at once": with_learners_at_once,
    "episodes": with_episodes,
    "meta-learners": with_metalearners,
}
OF_CHANNELS = {
    "channels": with_channels,
    "MGAug, width": functools.partial(with_mgaug, "width"),
    "Reptile, channels": lambda: with_reptile(structured=Structured(X)),
    "Reptile, channels of tasks": lambda: with_reptile(PER_TASK, structured=Structured(X)),
}


@pytest.mark.parametrize("name", [*RUNS, *OF_CHANNELS])
def test_numbers_do_not_depend_on_the_default_device(name):
    if name in OF_CHANNELS:
        pytest.importorskip("torch_pruning")
    make = (RUNS | OF_CHANNELS)[name]
    torch.manual_seed(0)
    expected = make()()
    torch.manual_seed(0)
    run = make()
    with torch.device("meta"):
        found = run()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        same = torch.equal(found[key], value) if torch.is_tensor(value) else found[key] == value
        assert same, key
