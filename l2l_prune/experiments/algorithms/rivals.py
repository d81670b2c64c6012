"""What a run adds to its tasks beside pruning: MGAug, DropGrad and dropout held for a task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from l2l_prune.experiments.config import RunConfig
from l2l_prune.experiments.streams import stream
from l2l_prune.methods.drop_grad import DropGrad
from l2l_prune.methods.mgaug import MGAug
from l2l_prune.methods.task_dropout import TaskDropout
from l2l_prune.pruner import Pruner
from l2l_prune.reptile.learner import Learner
from l2l_prune.scheduled import ScheduledPruner


class Rivals:
    """The rivals that a run's settings ask for, and their random numbers.

    Args:
        config: The settings.
        pruner: The run's.
        image_shape: Of an image, ``(C, H, W)``.
    """

    def __init__(
        self, config: RunConfig, pruner: ScheduledPruner, image_shape: Sequence[int]
    ) -> None:
        self._mgaug: MGAug | None = None
        self._drop_grad: DropGrad | None = None
        self._task_dropout: torch.Generator | None = None
        if config.mgaug is not None:
            assert isinstance(pruner, Pruner)
            self._mgaug = MGAug(
                pruner,
                stream(config.seed, "MGAug"),
                config.mgaug,  # type: ignore[arg-type]
                rate=config.mgaug_rate,
                networks=config.mgaug_networks,
                example_inputs=torch.zeros(2, *image_shape, device=config.device),
            )
        if config.drop_grad:
            self._drop_grad = DropGrad(
                config.drop_grad,
                stream(config.seed, "DropGrad"),
                config.drop_grad_noise,  # type: ignore[arg-type]
            )
        if config.dropout_per == "task":
            self._task_dropout = stream(config.seed, "task dropout")

    @property
    def by_task(self) -> bool:
        """Whether tasks must run one after the other."""
        return self._mgaug is not None

    def networks(self) -> Iterable[dict[str, Tensor] | None]:
        """Masks for each network that runs a task; ``None`` for those of the schedule."""
        return [None] if self._mgaug is None else self._mgaug.networks()

    def begin(self, learner: Learner) -> None:
        """Draw what a Reptile learner drops during its task."""
        if self._task_dropout is not None:
            TaskDropout.draw(learner, self._task_dropout)

    def adapt(self, learner: Learner, loss: Tensor) -> None:
        """An inner step of a Reptile learner, with DropGrad's noise."""
        assert self._drop_grad is not None
        self._drop_grad.adapt(learner, loss)

    def end(self, model: nn.Module, learner: Learner) -> None:
        """Show MGAug what a task changed in its Reptile learner."""
        if self._mgaug is not None:
            pairs = zip(model.parameters(), learner.module.parameters(), strict=True)
            self._mgaug.observe(old.detach() - new for old, new in pairs)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors; empty without rivals."""
        state: dict[str, Any] = {}
        if self._mgaug is not None:
            state["mgaug"] = self._mgaug.state_dict()
        if self._drop_grad is not None:
            state["drop_grad"] = self._drop_grad.state_dict()
        if self._task_dropout is not None:
            state["task_dropout"] = self._task_dropout.get_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        if self._mgaug is not None:
            self._mgaug.load_state_dict(state["mgaug"])
        if self._drop_grad is not None:
            self._drop_grad.load_state_dict(state["drop_grad"])
        if self._task_dropout is not None:
            self._task_dropout.set_state(state["task_dropout"])
