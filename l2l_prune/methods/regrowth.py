"""Masks that change within a sparse phase: the smallest weights go, others grow (SET, RigL)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from l2l_prune._basics import checks, ranks
from l2l_prune._basics.generators import check_generator, drawn_by, restore
from l2l_prune._basics.losses import check_loss
from l2l_prune.masking.topk import top_mask
from l2l_prune.pruner import Pruner


class Regrowth:
    """Exchanges some weights every ``interval`` iterations of a sparse segment.

    In each tensor the smallest of the kept weights are dropped, and as many of the others grow from
    0: those with the largest gradient (RigL) if ``loss`` is given, else random ones (SET). The
    fraction falls to 0 over the segment, along half a cosine. Add one line after making the
    Pruner::

        regrowth = Regrowth(pruner, interval=100, loss=lambda: loss_of(model))

    Args:
        pruner: A :class:`~l2l_prune.Pruner`: ``reptile.pruner`` for Reptile.
        interval: Meta-iterations between exchanges, >= 1.
        fraction: Fraction of the kept weights that is exchanged at the segment's start, in [0, 1).
        loss: Computes the (meta-)loss, a scalar, from the pruned model; its gradient is taken with
            respect to all weights, including the pruned ones at 0 (:func:`dense_gradients`). With
            Reptile, use the loss of ``reptile(x)`` on the tasks' data, since no gradient comes back
            from ``reptile.clone()``. In a ``group`` of ranks, each rank computes the loss of its
            own data, and the gradients are summed.
        generator: Source of SET's random numbers, on the CPU; a new one with seed 0 by default.
            With several ranks, those of the first rank are used.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of range, or the pruner holds masks by pattern or globally.

    Source:
        SET: Mocanu et al., Nature Communications 2018, Algorithm 2 (here with RigL's schedule).
        RigL: Evci et al., *Rigging the Lottery*, ICML 2020, Algorithm 1.
    """

    def __init__(
        self,
        pruner: Pruner,
        *,
        interval: int,
        fraction: float = 0.3,
        loss: Callable[[], Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self._pruner = checks.of_type("pruner", pruner, Pruner, "a Pruner")
        if not pruner.layerwise:
            raise ValueError(
                "Regrowth counts layer by layer: make the Pruner without pattern and global masks"
            )
        self._interval = checks.whole_number("interval", interval, least=1)
        self._fraction = checks.fraction("fraction", fraction)
        if loss is not None and not callable(loss):
            raise TypeError(
                f"loss must be a function without arguments, got {checks.describe(loss)}"
            )
        if generator is not None:
            check_generator(generator)
        phases = [s.iterations for s in pruner.schedule.segments if s.held and s.iterations]
        if phases and max(phases) <= self._interval:
            warnings.warn(
                f"no mask will move: interval={self._interval}, but the longest sparse phase has "
                f"{max(phases)} iterations",
                stacklevel=2,
            )
        self._loss = loss
        self._generator = generator or torch.Generator().manual_seed(0)
        pruner.register_step_hook(self._after_step)

    def state_dict(self) -> dict[str, Any]:
        """The state of the random numbers, to save along with the Pruner's own."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: If it is not such a state; nothing is changed then.
        """
        restore(self._generator, state, "a Regrowth")

    @torch.no_grad()
    def _after_step(self, pruner: Pruner) -> None:
        start, stop = self._span()
        done = pruner.iteration - start
        if not pruner.sparse or done <= 0 or done % self._interval or pruner.iteration >= stop:
            return
        fraction = self._fraction / 2 * (1 + math.cos(math.pi * done / (stop - start)))
        scores, masks = self._growth_scores(), pruner.masks
        pruner.replace_masks(
            {
                name: exchanged(weight, masks[name], scores[name], fraction)
                for name, weight in pruner.weights.items()
            }
        )

    def _span(self) -> tuple[int, int]:
        """First iteration of the current segment, and the one after its last."""
        for start, stop, _ in self._pruner.schedule.spans():
            if start <= self._pruner.iteration < stop:
                return start, stop
        return self._pruner.iteration, self._pruner.iteration

    def _growth_scores(self) -> dict[str, Tensor]:
        group, weights = self._pruner.group, self._pruner.weights
        if self._loss is None:
            random = {
                name: torch.rand(weight.shape, **drawn_by(self._generator)).to(weight.device)
                for name, weight in weights.items()
            }
            ranks.take_first(list(random.values()), group)
            return random
        device = next(iter(weights.values())).device
        with ranks.failing_together(group, device):
            gradients = dense_gradients(self._pruner, self._loss)
            for name, gradient in gradients.items():
                if not bool(gradient.isfinite().all()):
                    raise ValueError(
                        f"Regrowth's loss has a gradient for {name} that is not finite: the "
                        "training diverged, or the loss overflows in half precision"
                    )
        return {n: ranks.total(g, group).abs() for n, g in gradients.items()}


def exchanged(weight: Tensor, mask: Tensor, growth: Tensor, fraction: float) -> Tensor:
    """The mask after one exchange, with as many True entries as before.

    Args:
        weight: The weights; those outside the mask are 0.
        mask: Boolean tensor of the same shape; True is kept.
        growth: Scores of the same shape, >= 0. Of the entries that do not stay, those with the
            largest scores grow; a dropped weight may thus return at once, with its value.
        fraction: Fraction of the kept weights to exchange, in [0, 1].

    Examples:
        >>> weight, mask = torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor([1, 1, 0, 0]).bool()
        >>> exchanged(weight, mask, torch.tensor([9.0, 0.0, 1.0, 2.0]), 0.5).tolist()
        [True, False, False, True]
    """
    kept = int(mask.sum())
    number = round(fraction * kept)
    magnitude = weight.detach().abs().masked_fill(~mask, -1)
    stays = top_mask(magnitude, kept - number)
    grows = top_mask(growth.detach().masked_fill(stays, -1), number)
    return stays | grows


def dense_gradients(pruner: Pruner, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Gradients of ``loss`` for all entries of the pruned weights, including the pruned ones.

    The masks are opened for one forward and backward pass (:meth:`Pruner.opened_masks`), which does
    not change the loss. For a meta-loss, this is the derivative with respect to the initial weights
    of an inner loop that changes only the kept entries.

    Args:
        pruner: In a sparse segment.
        loss: Computes a scalar from the pruned model.

    Returns:
        A gradient for each tensor, by its dense name.

    Raises:
        TypeError: If the loss is not a tensor.
        ValueError: If it holds several numbers, or does not depend on a tensor, which is named.
    """
    weights = pruner.weights
    with ExitStack() as local, pruner.opened_masks(), torch.enable_grad():
        for module in pruner.model.modules():
            if isinstance(module, DistributedDataParallel):  # it would wait for a backward()
                local.enter_context(module.no_sync())
        value = check_loss(loss())
        gradients: tuple[Tensor | None, ...] = (None,) * len(weights)
        if value.requires_grad:
            gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
    found = {n: g for n, g in zip(weights, gradients, strict=True) if g is not None}
    if missing := [name for name in weights if name not in found]:
        raise ValueError(
            f"loss gives no gradient for {', '.join(missing)}: compute it from the pruned model "
            "(for PrunedReptile from reptile(x), not from reptile.clone(), which is a copy), and "
            "leave out tensors that it does not use with skip="
        )
    return found
