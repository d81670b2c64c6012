"""Meta-learners with an outer optimizer: gradients of the tasks' losses, a step, pruning."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from l2l_prune.experiments.algorithms.base import Algorithm
from l2l_prune.experiments.algorithms.pruning import Masks
from l2l_prune.experiments.algorithms.rivals import Rivals
from l2l_prune.experiments.config import RunConfig
from l2l_prune.fewshot.data import Episode
from l2l_prune.fewshot.evaluation import Mean, accuracy
from l2l_prune.pruner import Pruner


class WithOuterOptimizer(Algorithm):
    """Gradients of the mean loss over the tasks, an optimizer, and the pruner."""

    network: nn.Module
    pruner: Pruner
    trained: nn.Module  # holds every trained parameter: the network, or a wrapper around it
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    clamp: float | None = None
    _tasks: Sequence[Episode] = ()

    def train(self, tasks: Sequence[Episode]) -> None:
        self._tasks = tasks
        self.optimizer.zero_grad()
        together = not self.pruner.segment.per_task and not self._rivals.by_task
        for part in [tasks] if together else [[task] for task in tasks]:
            for masks in self._rivals.networks():
                with self.pruner.task_masks(masks):
                    for loss in self.losses(part):
                        (loss / len(tasks)).backward()  # type: ignore[no-untyped-call]
        if self.clamp is not None:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_value_(parameters, self.clamp)
        self.optimizer.step()
        self.pruner.step()
        if self.scheduler is not None:
            self.scheduler.step()

    def _prune(self, model: nn.Module, config: RunConfig, image_shape: Sequence[int] = ()) -> None:
        self._masks = Masks(config, model, self._mean_loss)
        self.pruner = Pruner(model, config.schedule, self.optimizer, **self._masks.options)
        self._masks.follow(self.pruner, self.optimizer)
        self._rivals = Rivals(config, self.pruner, image_shape)

    def _mean_loss(self) -> Tensor:
        """The meta-loss on the tasks of the current meta-iteration."""
        return sum(self.losses(self._tasks), torch.zeros(())) / len(self._tasks)

    @abstractmethod
    def losses(self, tasks: Sequence[Episode]) -> Iterator[Tensor]:
        """Losses after adapting, whose sum is the sum over all tasks."""

    def state_dict(self) -> dict[str, Any]:
        scheduler = self.scheduler.state_dict() if self.scheduler is not None else None
        return {
            "model": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pruner": self.pruner.state_dict(),
            "masks": self._masks.state_dict(),
            "scheduler": scheduler,
            **self._rivals.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trained.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.pruner.load_state_dict(state["pruner"])
        self._masks.load_state_dict(state["masks"])
        self._rivals.load_state_dict(state)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])

    def finalize(self) -> nn.Module:
        self.pruner.finalize()
        return self.network


class Classifier(WithOuterOptimizer):
    """A learner of classes, measured by its accuracy on the queries."""

    @abstractmethod
    def scores(self, episode: Episode) -> Tensor:
        """Class scores of the queries after learning from the support set."""

    def evaluate(self, episodes: Iterable[Episode]) -> Mean:
        with _kept_buffers(self.network):
            return accuracy(self.scores, episodes)


@contextmanager
def _kept_buffers(module: nn.Module) -> Iterator[None]:
    """Put back the running statistics that an evaluation in training mode changes."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
