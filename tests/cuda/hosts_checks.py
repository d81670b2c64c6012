"""Host libraries' loops: learn2learn's clones, higher's functional copies, a Lightning trainer."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch

from l2l_prune import Pruner, Schedule, Segment, TaskMasks
from tests.cuda.place import SCHEDULE, Place, batch, loss_of, network, on_device, state_of

TASKS = 2
PER_TASK = Schedule((Segment(2), Segment(4, sparse=True, sparsity=0.5, masks="task")))


def train(device, net, host, task_loss, schedule=SCHEDULE):
    """A trace of meta-steps; ``task_loss(number)`` is that of a task's query set."""
    optimizer = torch.optim.Adam(host.parameters(), lr=0.01)
    drawn = TaskMasks(torch.Generator().manual_seed(0)) if schedule is PER_TASK else None
    pruner = Pruner(host, schedule, optimizer, task_masks=drawn)
    trace = {}
    for iteration in range(schedule.iterations):
        optimizer.zero_grad()
        for task in range(TASKS):
            number = 10 * iteration + task
            with pruner.task_masks():
                task_loss(number).backward()
        optimizer.step()
        pruner.step()
        values = net.state_dict(), pruner.masks, state_of(optimizer)
        trace |= {f"{iteration}: {k}": v for k, v in on_device(device, *values).items()}
    return trace


def after_adapting(host, device):
    """``task_loss`` of a wrapper that clones and adapts, after a step on the support set."""

    def task_loss(number):
        learner = host.clone()
        learner.adapt(loss_of(learner, number, device))
        return loss_of(learner, number + 5, device)

    return task_loss


def with_learn2learn(place: Place) -> None:
    """Second-order MAML and Meta-SGD, with the schedule's masks and with masks for each task."""
    l2l = pytest.importorskip("learn2learn")

    def run(device, algorithm, schedule):
        net = network().to(device)
        host = algorithm(net, lr=0.1).to(device)
        return train(device, net, host, after_adapting(host, device), schedule)

    for algorithm in (l2l.algorithms.MAML, l2l.algorithms.MetaSGD):
        for schedule in (SCHEDULE, PER_TASK):
            place.compare(functools.partial(run, algorithm=algorithm, schedule=schedule))


def with_higher(place: Place) -> None:
    higher = pytest.importorskip("higher")

    def run(device):
        net = network().to(device)
        inner = torch.optim.SGD(net.parameters(), lr=0.1)

        def task_loss(number):
            with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (learner, steps):
                steps.step(loss_of(learner, number, device))
                return loss_of(learner, number + 5, device)

        return train(device, net, net, task_loss)

    place.compare(run)


def with_lightning(place: Place) -> None:
    """The callback in a trainer on the device against a loop of our own on the CPU."""
    pl = pytest.importorskip("pytorch_lightning")
    from l2l_prune.integrations.lightning import PruningCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, data, index):
            x, y = data
            return torch.nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return torch.optim.Adam(self.net.parameters(), lr=0.01)

    def with_trainer(device):
        module, pruning, trace = Module(), PruningCallback(SCHEDULE), {}
        data = [batch(number, "cpu") for number in range(SCHEDULE.iterations)]

        class Watch(pl.Callback):
            def on_train_batch_end(self, trainer, module, outputs, data, index):
                held = state_of(trainer.optimizers[0])
                values = module.net.state_dict(), list(pruning.pruner.masks.values()), held
                trace.update({f"{index}: {k}": v for k, v in on_device(device, *values).items()})

        trainer = pl.Trainer(
            accelerator="gpu" if place.on_gpu and device != "cpu" else "cpu",
            devices=1,
            precision="64-true",
            max_epochs=1,
            callbacks=[pruning, Watch()],
            default_root_dir=place.folder,
            **dict.fromkeys(
                ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"),
                False,
            ),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few workers, of no logger
            trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
        return trace

    def by_hand(device):
        net = network()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        pruner, trace = Pruner(net, SCHEDULE, optimizer), {}
        for number in range(SCHEDULE.iterations):
            optimizer.zero_grad()
            loss_of(net, number, device).backward()
            optimizer.step()
            pruner.step()
            values = net.state_dict(), list(pruner.masks.values()), state_of(optimizer)
            trace |= {f"{number}: {k}": v for k, v in on_device(device, *values).items()}
        return trace

    place.compare(with_trainer, by_hand)
