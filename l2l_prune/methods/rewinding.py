"""Lottery-ticket rewinding: remaining weights restart from their values early in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l2l_prune._basics import checks
from l2l_prune.pruner import Pruner
from l2l_prune.reptile.reptile import PrunedReptile


class Rewind:
    """Returns all parameters to an earlier iteration at the start of every sparse segment.

    The mask is chosen from the trained weights; the values are those of iteration ``to``, under the
    mask. The optimizers' state starts afresh. Add one line after making the Pruner or
    PrunedReptile::

        rewind = Rewind(pruner, to=0)

    Buffers (running statistics) and learning rate schedulers stay where they are.

    Args:
        trainer: A :class:`~l2l_prune.Pruner` or :class:`~l2l_prune.PrunedReptile` at iteration 0.
        to: Iteration to go back to, >= 0 and not after the first sparse segment begins. Weights are
            stored before that segment's masks, so that every later mask finds all of them.

    Raises:
        TypeError: If ``trainer`` is neither, or prunes channels.
        ValueError: If ``to`` is negative or after the first pruning, the trainer has already made a
            step, or the schedule is sparse from the start, so that there are no dense weights.

    Source:
        Frankle and Carbin, *The Lottery Ticket Hypothesis*, ICLR 2019, Section 1 (``to=0``);
        Frankle et al., *Linear Mode Connectivity and the Lottery Ticket Hypothesis*, ICML 2020,
        Algorithm 2 (``to > 0``); for MAML Gao et al., *Finding Meta Winning Ticket to Train Your
        MAML*, KDD 2022.
    """

    def __init__(self, trainer: Pruner | PrunedReptile, to: int = 0) -> None:
        pruner = trainer.pruner if isinstance(trainer, PrunedReptile) else trainer
        if not isinstance(pruner, Pruner):
            raise TypeError(
                "Rewind takes a Pruner, or a PrunedReptile without structured, got "
                f"{checks.describe(trainer)}"
            )
        self._to = checks.whole_number("to", to)
        sparse = [start for start, _, segment in pruner.schedule.spans() if segment.held]
        if not sparse or to > sparse[0]:
            raise ValueError(
                f"to={to} must not be after the first sparse phase begins"
                + (f", at iteration {sparse[0]}" if sparse else ", and the schedule has none")
            )
        if sparse[0] == 0:
            raise ValueError(
                "the weights of iteration 0 are already pruned: begin the schedule with a dense "
                "segment, for instance of one iteration"
            )
        if pruner.iteration > 0:
            raise ValueError(
                "make Rewind at iteration 0; to resume, load its state with load_state_dict() later"
            )
        self._trainer, self._pruner = trainer, pruner
        self._values: list[Tensor] = []
        pruner.register_step_pre_hook(self._before_step)
        pruner.register_step_hook(self._after_step)
        if to == 0:
            self._store()

    def state_dict(self) -> dict[str, Any]:
        """The values to go back to, to save along with the Pruner's own state."""
        return {"values": [value.clone() for value in self._values]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: If it is no such state or belongs to another model; nothing is changed then.
        """
        try:
            given = [tuple(value.shape) for value in state["values"]]
        except (AttributeError, KeyError, TypeError):
            raise ValueError("this is not a Rewind state dict of this version") from None
        if given not in ([], [tuple(p.shape) for p in self._pruner.model.parameters()]):
            raise ValueError("the state holds the values of another model: its shapes differ")
        self._values = [value.clone() for value in state["values"]]

    @torch.no_grad()
    def _store(self) -> None:
        self._values = [p.detach().clone() for p in self._pruner.model.parameters()]

    def _before_step(self, pruner: Pruner) -> None:
        if pruner.iteration + 1 == self._to:  # after the step they may be masked
            self._store()

    @torch.no_grad()
    def _after_step(self, pruner: Pruner) -> None:
        before, now = map(pruner.schedule.index, (pruner.iteration - 1, pruner.iteration))
        if before == now or not pruner.sparse:
            return
        for parameter, value in zip(pruner.model.parameters(), self._values, strict=True):
            parameter.copy_(value)
        pruner.project()
        for optimizer in pruner.optimizers:
            for parameter in pruner.model.parameters():
                optimizer.state.pop(parameter, None)
        if isinstance(self._trainer, PrunedReptile):
            self._trainer.forget_inner_state()
