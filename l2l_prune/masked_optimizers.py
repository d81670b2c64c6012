"""The optimizers of a Pruner: their momentum and second moments follow its masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from l2l_prune import optimizer_state
from l2l_prune._basics.optimizers import held_ids
from l2l_prune._basics.precision import skips_step
from l2l_prune.masking.layers import learning_rates
from l2l_prune.masking.masked_layer import stored_tensor
from l2l_prune.masking.prunable import LayerTensor


class MaskedOptimizers:
    """Optimizers whose momentum and second moments follow the masks of some tensors.

    Made before the tensors are masked. If ``model`` holds Meta-SGD's rates for them, the state of
    those rates follows too. With ``match``, second moments of released weights are raised, so that
    none of them jumps (:mod:`l2l_prune.optimizer_state`).

    Attributes:
        all: The optimizers.
        released: Released entries, by dense name, until every optimizer that holds the tensor has
            made a step on them. Steps that a gradient scaler skips do not count.
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
        self._tensors, self._rates = tensors, learning_rates(model, tensors)
        for given in self.all:
            optimizer_state.check_holds(given, self.followed)
        self.released: dict[str, Tensor] = {}
        self._masks: Sequence[Tensor] = []
        self._stepped: set[tuple[str, int, bool]] = set()  # name, which optimizer, whether rates
        self._match = match
        self._handles: list[RemovableHandle] = []

    @property
    def followed(self) -> list[Tensor]:
        """The parameters whose state follows the masks: the weights, and rates learned for them."""
        weights = [stored_tensor(tensor.module, tensor.name) for tensor in self._tensors]
        return [*weights, *(rates for rates in self._rates if rates is not None)]

    @property
    def may_divide_by_zero(self) -> bool:
        """Whether a step may make pruned weights, whose gradients are 0, NaN."""
        return any(_eps_vanishes(group) for held in self.all for group in held.param_groups)

    def watch(self) -> None:
        """From now on, look at the gradients before the first step after each release."""
        for optimizer in self.all:
            self._watch(optimizer)

    def add(self, optimizer: Optimizer) -> None:
        """Add an optimizer, which must hold some of what is followed."""
        optimizer = optimizer_state.plain_optimizer(optimizer)
        optimizer_state.check_holds(optimizer, self.followed)
        if any(optimizer is held for held in self.all):
            raise ValueError("this optimizer already follows the masks")
        self.all.append(optimizer)
        self._watch(optimizer)

    def follow(self, old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
        """After a change of masks: clear momentum of pruned entries, level released ones.

        ``old`` is empty at the start.
        """
        self._masks = new
        for position, (tensor, mask) in enumerate(zip(self._tensors, new, strict=True)):
            released = mask & ~old[position] if old else torch.zeros_like(mask)
            waiting = self.released.pop(tensor.full_name, None)
            if waiting is not None:  # it still waits for its first step
                released |= waiting.to(mask.device) & mask
            match = self._match and bool(released.any())
            for optimizer, parameter, _ in self._states(position):
                optimizer_state.clear_momentum(optimizer, parameter, mask)
                if match:
                    kept = mask & ~released
                    optimizer_state.level_second_moment(optimizer, parameter, kept, released)
            if match and self.all:
                self.released[tensor.full_name] = released
                self._forget_steps(tensor.full_name)

    @property
    def stepped(self) -> list[list[Any]]:
        """Plain values for a checkpoint: which optimizers have stepped on what was released."""
        return [list(step) for step in sorted(self._stepped)]

    def resume(
        self,
        masks: Sequence[Tensor],
        released: Mapping[str, Tensor],
        stepped: Iterable[Sequence[Any]],
    ) -> None:
        """Go on with masks that the state already follows; the others come from a checkpoint."""
        self._masks, self.released = masks, dict(released)
        self._stepped = {(name, number, rates) for name, number, rates in stepped}

    def forget(self) -> None:
        """Follow none of the optimizers from now on; others may be added."""
        self.let_go()
        self.all, self._stepped = [], set()

    def release(self) -> None:
        """All weights may move from now on, and nothing is watched: level what is released."""
        if self._masks:
            self.follow(self._masks, [torch.ones_like(mask) for mask in self._masks])
        self.released = {}
        self.let_go()

    def let_go(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: torch copies an optimizer without its hooks."""
        return {**self.__dict__, "_handles": [], "_watching": bool(self._handles)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        watching = state.pop("_watching")
        self.__dict__.update(state)
        if watching:
            self.watch()

    def _watch(self, optimizer: Optimizer) -> None:
        # Its branches depend on data: torch.compile(optimizer.step) leaves it out.
        raised = torch.compiler.disable(self._raise_to_gradients)  # type: ignore[no-untyped-call]

        def act(stepping: Optimizer) -> None:
            if self.released:
                raised(stepping)

        hook = optimizer_state.gradient_hook(act)
        self._handles.append(optimizer.register_step_pre_hook(hook))

    @torch.no_grad()
    def _raise_to_gradients(self, optimizer: Optimizer) -> None:
        if skips_step(optimizer):
            return
        for position, tensor in enumerate(self._tensors):
            name = tensor.full_name
            if name not in self.released:
                continue
            waiting = False
            for held, parameter, step in self._states(position):
                if step in self._stepped or id(parameter) not in held_ids(held):
                    continue
                if held is not optimizer or parameter.grad is None:
                    waiting = True
                    continue
                released, mask = (
                    m.to(parameter.device) for m in (self.released[name], self._masks[position])
                )
                optimizer_state.raise_to_gradient(optimizer, parameter, mask & ~released, released)
                self._stepped.add(step)
            if not waiting:
                del self.released[name]
                self._forget_steps(name)

    def _forget_steps(self, name: str) -> None:
        self._stepped = {step for step in self._stepped if step[0] != name}

    def _states(self, position: int) -> Iterator[tuple[Optimizer, Tensor, tuple[str, int, bool]]]:
        """Every optimizer with each parameter whose state follows the mask of a tensor.

        The third entry is a key for the pair, which is the same in copies.
        """
        tensor, rates = self._tensors[position], self._rates[position]
        original = stored_tensor(tensor.module, tensor.name)
        for number, optimizer in enumerate(self.all):
            yield optimizer, original, (tensor.full_name, number, False)
            if rates is not None:
                yield optimizer, rates, (tensor.full_name, number, True)


def _eps_vanishes(group: dict[str, Any]) -> bool:
    """Whether the term that keeps divisors above 0 is 0, as written or in half precision."""
    eps = group.get("eps")
    if not isinstance(eps, float) and eps != 0:
        return False
    halves = (parameter.dtype == torch.float16 for parameter in group["params"])
    return eps == 0 or (eps < 2**-25 and any(halves))
