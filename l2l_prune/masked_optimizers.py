"""The optimizers of a Pruner: their momentum and second moments follow its masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from l2l_prune import optimizer_state
from l2l_prune._basics import checks
from l2l_prune._basics.precision import skips_step
from l2l_prune.masking.layers import learning_rates
from l2l_prune.masking.masked_layer import held_tensors
from l2l_prune.masking.prunable import LayerTensor


class MaskedOptimizers:
    """Optimizers whose momentum and second moments follow the masks of some tensors.

    Args:
        model: Holds the tensors, and perhaps Meta-SGD's rates for them, whose state follows too.
        tensors: What is pruned, before a mask is on it.
        optimizer: One, several or none.
        match: Whether second moments of released weights are raised, so that none jumps; see
            :func:`level_second_moment`.

    Attributes:
        all: The optimizers.
        regrown: Entries that were released, by dense name, until every optimizer that holds the
            tensor has made a step on them. Steps that a gradient scaler skips do not count.

    Raises:
        TypeError: If ``optimizer`` is something else.
        ValueError: If one holds none of the tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: Sequence[LayerTensor],
        optimizer: Optimizer | Iterable[Optimizer] | None,
        *,
        match: bool,
    ) -> None:
        self.all = optimizer_state.as_optimizers(optimizer)
        weights = [tensor.module._parameters[tensor.name] for tensor in tensors]
        for given in self.all:
            optimizer_state.check_holds(given, weights)
        self.regrown: dict[str, Tensor] = {}
        self._masks: Sequence[Tensor] = []
        self._stepped: set[tuple[str, int, bool]] = set()  # name, which optimizer, whether rates
        self._tensors, self._rates = tensors, learning_rates(model, tensors)
        self._match = match
        self._handles: list[RemovableHandle] = []

    def watch(self) -> None:
        """Look at the gradients of each first step after a release from now on."""
        for optimizer in self.all:
            self._watch(optimizer)

    def add(self, optimizer: Optimizer, weights: Iterable[Tensor]) -> None:
        """Take one more, that holds some of ``weights``, the pruned ones.

        Raises:
            TypeError: If it is no optimizer.
            ValueError: If it holds none of them, or follows already.
        """
        checks.of_type("optimizer", optimizer, Optimizer, "a torch Optimizer")
        optimizer_state.check_holds(optimizer, weights)
        if any(optimizer is held for held in self.all):
            raise ValueError("optimizer follows the masks already")
        self.all.append(optimizer)
        self._watch(optimizer)

    def follow(self, old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
        """Masks have changed: momentum of pruned entries goes, released ones get second moments.

        Args:
            old: The masks before; none at the start.
            new: The masks now.
        """
        self._masks = new
        for position, (tensor, mask) in enumerate(zip(self._tensors, new, strict=True)):
            regrown = mask & ~old[position] if old else torch.zeros_like(mask)
            waiting = self.regrown.pop(tensor.full_name, None)
            if waiting is not None:  # for a step since the last change of masks
                regrown |= waiting.to(mask.device) & mask
            match = self._match and bool(regrown.any())
            for optimizer, parameter, _ in self._states(position):
                optimizer_state.clear_momentum(optimizer, parameter, mask)
                if match:
                    kept = mask & ~regrown
                    optimizer_state.level_second_moment(optimizer, parameter, kept, regrown)
            if match and self.all:
                self.regrown[tensor.full_name] = regrown
                self._stepped = {step for step in self._stepped if step[0] != tensor.full_name}

    def resume(self, masks: Sequence[Tensor], regrown: Mapping[str, Tensor]) -> None:
        """Go on with masks whose changes the optimizers' state has followed already.

        Args:
            masks: The masks now.
            regrown: What :attr:`regrown` was.
        """
        self._masks, self.regrown, self._stepped = masks, dict(regrown), set()

    def let_go(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles: torch copies an optimizer without its hooks."""
        return {**self.__dict__, "_handles": [], "_watching": bool(self._handles)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        watching = state.pop("_watching")
        self.__dict__.update(state)
        if watching:
            self.watch()

    def _watch(self, optimizer: Optimizer) -> None:
        hook = optimizer_state.gradient_hook(self._raise_to_gradients)
        self._handles.append(optimizer.register_step_pre_hook(hook))

    @torch.no_grad()
    def _raise_to_gradients(self, optimizer: Optimizer) -> None:
        if not self.regrown or skips_step(optimizer):
            return
        for position, tensor in enumerate(self._tensors):
            name = tensor.full_name
            if name not in self.regrown:
                continue
            waiting = False
            for held, parameter, step in self._states(position):
                if step in self._stepped or id(parameter) not in optimizer_state.held_ids(held):
                    continue
                if held is not optimizer or parameter.grad is None:
                    waiting = True
                    continue
                regrown, mask = (
                    m.to(parameter.device) for m in (self.regrown[name], self._masks[position])
                )
                optimizer_state.raise_to_gradient(optimizer, parameter, mask & ~regrown, regrown)
                self._stepped.add(step)
            if not waiting:
                del self.regrown[name]

    def _states(self, position: int) -> Iterator[tuple[Optimizer, Tensor, tuple[str, int, bool]]]:
        """Every optimizer with each parameter whose state follows the mask of a tensor.

        Third is what tells the pair apart, in copies too.
        """
        tensor, rates = self._tensors[position], self._rates[position]
        original, _ = held_tensors(tensor.module, tensor.name)
        for number, optimizer in enumerate(self.all):
            yield optimizer, original, (tensor.full_name, number, False)
            if rates is not None:
                yield optimizer, rates, (tensor.full_name, number, True)
