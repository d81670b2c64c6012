"""Reptile."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from l2l_prune.channels.pruner import Structured
from l2l_prune.experiments.algorithms.base import (
    Algorithm,
    OwnRandomness,
    conv4,
    eval_mode,
)
from l2l_prune.experiments.algorithms.pruning import Masks
from l2l_prune.experiments.algorithms.rivals import Rivals
from l2l_prune.experiments.config import RunConfig
from l2l_prune.experiments.streams import stream
from l2l_prune.fewshot.data import Episode
from l2l_prune.fewshot.data.minibatches import minibatches
from l2l_prune.fewshot.evaluation import Mean, few_shot_accuracy
from l2l_prune.methods.task_dropout import TaskDropout
from l2l_prune.reptile.compiled import CompiledStep
from l2l_prune.reptile.learner import Learner, adam
from l2l_prune.reptile.reptile import PrunedReptile


def tasks_at_once(channels: int, size: int, device: str = "cpu") -> int:
    """How many evaluation tasks to adapt together, where vmap was faster in the benchmarks.

    This is a rule, not a measurement at run time: measurements vary, and the same run would then
    end in different bits. Wider networks and larger images are fastest one by one on a CPU; a GPU
    has time for all of them.
    """
    if device != "cpu":
        return 20
    if size > 28 or channels > 64:
        return 1
    return 20 if channels <= 32 else 12


class Reptile(Algorithm):
    """The paper's :class:`~l2l_prune.PrunedReptile`, on minibatches of each task's support set."""

    def __init__(self, config: RunConfig, image_shape: Sequence[int]) -> None:
        self._config = config
        self._batches = stream(config.seed, "training minibatches")
        self._dropout = OwnRandomness(stream(config.seed, "dropout"), config.device)
        self.network = net = conv4(config, image_shape)
        if config.dropout_per == "task":
            TaskDropout.replace_in(net)
        self._tasks: Sequence[Episode] = ()
        self._masks = Masks(config, net, self._mean_loss)
        options = self._masks.options
        if config.structured:
            structured = Structured(torch.zeros(2, *image_shape, device=config.device))
            options = {"structured": structured, "task_masks": options["task_masks"]}
        self._rank = dist.get_rank() if config.ranks > 1 else 0
        self._reptile = PrunedReptile(
            net,
            config.schedule,
            inner_lr=config.inner_lr,
            meta_lr=config.meta_lr,
            annealing=config.annealing,  # type: ignore[arg-type]
            inner_optimizer=functools.partial(adam, weight_decay=config.weight_decay),
            group=dist.group.WORLD if config.ranks > 1 else None,
            **options,
        )
        self._masks.follow(self._reptile, self._reptile)
        self.pruner = self._reptile.pruner
        self._rivals = Rivals(config, self.pruner, image_shape)
        self._step = CompiledStep(self._loss) if config.compile else self._plain_step
        alone = config.structured or config.compile or config.bf16
        together = tasks_at_once(config.channels, image_shape[-1], config.device)
        self._tasks_at_once = 1 if alone else together

    def _loss(self, learner: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self._config.bf16):
            return F.cross_entropy(learner(x), y)

    def _plain_step(self, learner: Learner, x: Tensor, y: Tensor) -> None:
        learner.adapt(self._loss(learner, x, y))

    def _train_step(self, learner: Learner, x: Tensor, y: Tensor) -> None:
        if self._config.drop_grad:  # in training only
            self._rivals.adapt(learner, self._loss(learner, x, y))
        else:
            self._step(learner, x, y)

    def _mean_loss(self) -> Tensor:
        """The meta-model's loss on the support sets of the current meta-iteration."""
        net, total = self._reptile.module, torch.zeros(())
        held = [module for module in net.modules() if isinstance(module, TaskDropout)]
        with eval_mode(*held):  # the model itself has no task
            for task in self._tasks:
                # The model's own statistics stay as they are.
                buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
                total = total + F.cross_entropy(
                    functional_call(net, buffers, (task.support_x,)), task.support_y
                )
        return total / len(self._tasks)

    def train(self, tasks: Sequence[Episode]) -> None:
        with self._dropout.drawn():
            self._train(tasks)

    def _train(self, tasks: Sequence[Episode]) -> None:
        ranks = self._config.ranks
        self._tasks = tasks[self._rank :: ranks]
        for number, task in enumerate(tasks):
            # Drawn whether they are used or not: every rank has the run's stream.
            batches = list(
                minibatches(
                    task.support_x,
                    task.support_y,
                    batch_size=self._config.inner_batch,
                    steps=self._config.inner_steps,
                    generator=self._batches,
                )
            )
            if number % ranks != self._rank:
                continue
            for masks in self._rivals.networks():
                with self._reptile.task_masks(masks):
                    learner = self._reptile.clone()
                self._rivals.begin(learner)
                for x, y in batches:
                    self._train_step(learner, x, y)
                self._rivals.end(self._reptile.module, learner)
                self._reptile.collect(learner)
        self._reptile.step()

    def evaluate(self, episodes: Iterable[Episode]) -> Mean:
        dropouts = [m for m in self._reptile.module.modules() if isinstance(m, nn.Dropout)]
        with eval_mode(*dropouts):
            return few_shot_accuracy(
                self._reptile,
                episodes,
                steps=self._config.eval_steps,
                batch_size=self._config.eval_batch,
                transductive=self._config.transductive,
                generator=stream(self._config.seed, "evaluation minibatches"),
                step=self._step if self._tasks_at_once == 1 else None,
                tasks_at_once=self._tasks_at_once,
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "reptile": self._reptile.state_dict(),
            "batches": self._batches.get_state(),
            "dropout": self._dropout.state,
            "masks": self._masks.state_dict(),
            **self._rivals.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reptile.load_state_dict(state["reptile"])
        self._batches.set_state(state["batches"])
        self._dropout.state = state["dropout"]
        self._masks.load_state_dict(state["masks"])
        self._rivals.load_state_dict(state)

    def finalize(self) -> nn.Module:
        return self._reptile.finalize()
