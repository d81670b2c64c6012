"""Distillation: the dense meta-model teaches the tasks of sparse phases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2l_prune.masking.masked_layer import plain_copy
from l2l_prune.reptile.reptile import PrunedReptile
from l2l_prune.scheduled import ScheduledPruner
from l2l_prune.schedules.schedule import Schedule, Segment


class Teacher:
    """The meta-model as it was at the end of the last dense phase.

    In sparse phases it adapts to each task by the same minibatches as the learner, with the state
    that the inner optimizer had then. Its scores on these minibatches are the learner's soft
    labels. A task takes at least twice as long.

    Args:
        reptile: Whose learners are taught; its schedule begins with a dense phase.

    Source:
        Hinton, Vinyals and Dean, *Distilling the Knowledge in a Neural Network*, 2015.
    """

    def __init__(self, reptile: PrunedReptile) -> None:
        self._reptile = reptile
        self._teacher = PrunedReptile(
            plain_copy(reptile.module),
            Schedule((Segment(1),)),
            inner_lr=reptile.inner_lr,
            inner_optimizer=reptile.inner_optimizer,
            carry_state=reptile.carry_state,
        )
        for module in self._teacher.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        reptile.pruner.register_step_pre_hook(self._before_step)

    def label(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Sequence[tuple[Tensor, ...]]:
        """The minibatches of a task, in sparse phases with the scores of the adapted teacher."""
        if not self._reptile.pruner.segment.sparse:
            return batches
        learner = self._teacher.clone()
        for x, y in batches:
            learner.adapt(F.cross_entropy(learner(x), y))
        with torch.no_grad():
            labelled = [(x, y, learner(x)) for x, y in batches]
        self._teacher.discard(learner)
        return labelled

    def state_dict(self) -> dict[str, Any]:
        """The teacher's weights, and the state of its inner optimizer."""
        return self._teacher.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._teacher.load_state_dict(state)

    @torch.no_grad()
    def _before_step(self, pruner: ScheduledPruner) -> None:
        """Copy the model after the last dense iteration's update, before anything is pruned."""
        following = pruner.schedule.segment(pruner.iteration + 1)
        if pruner.segment.sparse or not following.sparse:
            return
        mine, theirs = self._teacher.module.parameters(), pruner.model.parameters()
        for parameter, value in zip(mine, theirs, strict=True):
            parameter.copy_(value)
        inner_state = self._reptile.get_extra_state()["inner_state"]
        own = self._teacher.get_extra_state()
        self._teacher.set_extra_state({**own, "inner_state": inner_state})


def distilled(loss: Tensor, scores: Tensor, soft: Tensor, weight: float, t: float) -> Tensor:
    """``(1 - weight) * loss + weight * t^2 * KL(teacher || learner)`` at temperature ``t``.

    Args:
        loss: The loss on the labels, a scalar.
        scores: The learner's scores ``[examples, classes]``.
        soft: The teacher's scores, likewise.
        weight: Weight of the soft labels, in [0, 1).
        t: Temperature, > 0. Its square keeps the gradient's size: Hinton et al., Section 2.
    """
    divergence = F.kl_div(
        F.log_softmax(scores / t, 1),
        F.log_softmax(soft / t, 1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - weight) * loss + weight * t**2 * divergence
