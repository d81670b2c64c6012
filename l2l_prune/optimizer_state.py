"""What happens to optimizer state when weights are pruned and when they are released.

While a weight is pruned, its gradient is 0, so Adam's second moment decays towards 0 there; the
first gradient after release would then be divided by almost nothing and the weight would jump by
many learning rates. The rules here keep a released weight's first steps no larger than those of
the weights that were kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from l2l_prune._basics import checks
from l2l_prune._basics.optimizers import held_ids
from l2l_prune._basics.precision import step_gradient, widened

# State of torch.optim that divides the step: squared gradients, or their size in Adamax.
_SQUARED = frozenset({"exp_avg_sq", "square_avg"})
_DIVIDING = _SQUARED | {"max_exp_avg_sq", "sum", "exp_inf"}
# Rprop's step sizes and Adadelta's past steps are not gradients; 0 would stop the weights.
_STEP_SIZE = "step_size"
_UNTOUCHED = frozenset({_STEP_SIZE, "acc_delta"})


def as_optimizers(optimizer: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    """One optimizer, several or none, as a list of torch's own.

    Raises:
        TypeError: If anything else is among them.
    """
    if optimizer is None:
        return []
    several = isinstance(optimizer, Iterable) and not isinstance(optimizer, type)
    optimizers = list(optimizer) if several else [optimizer]  # type: ignore[arg-type]
    return [plain_optimizer(entry) for entry in optimizers]


def plain_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer itself, out of the wrapper of Lightning, Fabric or Accelerate.

    Torch calls hooks with it, and scalers mark it.

    Raises:
        TypeError: If it is none.
    """
    found = checks.of_type("optimizer", optimizer, Optimizer, "a torch Optimizer")
    inner = getattr(found, "optimizer", None)
    return inner if isinstance(inner, Optimizer) else found


def holds(optimizer: Optimizer, weights: Iterable[Tensor | None]) -> bool:
    """Whether an optimizer steps on any of ``weights``."""
    held = held_ids(optimizer)
    return any(id(weight) in held for weight in weights)


def check_holds(optimizer: Optimizer, weights: Iterable[Tensor | None]) -> None:
    """Refuse an optimizer that holds only other weights.

    Raises:
        ValueError: If it holds none of ``weights``.
    """
    if not holds(optimizer, weights):
        raise ValueError(
            "optimizer holds none of the weights that are pruned: was it made for another "
            "model, or before the model was copied?"
        )


def check_by_entry(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose state does not hold a number for each entry of a weight.

    Raises:
        ValueError: Naming its class.
    """
    if isinstance(optimizer, LBFGS) or type(optimizer).__name__ == "Adafactor":
        raise ValueError(
            f"the state of {type(optimizer).__name__} is not held entry by entry, so channels "
            "cannot be cut out of it: use another optimizer, SGD or AdamW for instance"
        )


def clear_momentum(optimizer: Optimizer, parameter: Tensor, mask: Tensor) -> None:
    """Zero momentum (every first-moment-like state) of the pruned entries.

    Args:
        optimizer: Any torch optimizer; L-BFGS, whose history mixes all entries, starts afresh.
        parameter: A parameter that the optimizer may hold.
        mask: Boolean tensor of the parameter's shape; False is pruned.
    """
    if isinstance(optimizer, LBFGS):
        optimizer.state.clear()
        return
    for key, value in _entries(optimizer, parameter):
        if not _divides(key) and key not in _UNTOUCHED:
            value.mul_(mask.to(value.dtype))


def level_second_moment(
    optimizer: Optimizer, parameter: Tensor, kept: Tensor, released: Tensor
) -> None:
    """Give released entries the largest second moment that a kept entry of the tensor has.

    Rprop, which divides by nothing, gets the mean of the kept entries' step sizes there.

    Args:
        optimizer: Any torch optimizer.
        parameter: A parameter that the optimizer may hold.
        kept: Boolean tensor of the parameter's shape: entries that have been trained all along.
            Entries that are pruned now are neither kept nor released.
        released: Boolean tensor of the same shape: entries that are released now.
    """
    level_state(optimizer.state.get(parameter, {}), parameter.shape, kept, released)


def level_state(state: dict[str, Any], shape: torch.Size, kept: Tensor, released: Tensor) -> None:
    """As :func:`level_second_moment`, for the state of one parameter, wherever it is held.

    Args:
        state: What an optimizer holds for a parameter.
        shape: The parameter's shape.
        kept: As in :func:`level_second_moment`.
        released: As in :func:`level_second_moment`.
    """
    for key, value in _per_entry(state, shape):
        if _divides(key):
            level = torch.where(kept, value, 0.0).max()
            value.copy_(torch.where(released, torch.maximum(value, level), value))
        elif key == _STEP_SIZE:
            mean = _mean(widened(value), kept).to(value.dtype)
            value.copy_(torch.where(released & kept.any(), mean, value))


def raise_to_gradient(
    optimizer: Optimizer, parameter: Tensor, kept: Tensor, released: Tensor
) -> None:
    """Raise a second moment to fit the gradient, before the first step after a release.

    A fresh Adam divides the first gradient by its own size, which gives a step of one learning
    rate. This raises the second moment of released entries further, so that a gradient of this
    size moves them by as much as the kept entries of the tensor moved on average in their last
    step (between a tenth of a learning rate and one), even where those have converged and their
    second moments are tiny. The surplus decays like all of Adam's memory, except with AMSGrad,
    which never forgets a maximum. A step that a gradient scaler skips changes nothing here either.

    Args:
        optimizer: Any torch optimizer, about to step with ``parameter.grad``.
        parameter: A parameter that the optimizer may hold.
        kept: As in :func:`level_second_moment`.
        released: As in :func:`level_second_moment`.
    """
    if parameter.grad is None:
        return
    gradient = step_gradient(optimizer, parameter.grad)
    state = optimizer.state.get(parameter, {})
    correction = _bias_correction(optimizer, parameter)
    for key, value in _entries(optimizer, parameter):
        if key in _SQUARED:
            step = _mean_step(state.get("exp_avg"), value, correction, kept)
            floor = (gradient / step).square() * correction
            floor = floor.clamp_max(torch.finfo(value.dtype).max)  # infinity would never decay
            value.copy_(torch.where(released, torch.maximum(value, floor.to(value.dtype)), value))


def gradient_hook(act: Callable[[Optimizer], None]) -> Callable[[Optimizer, Any, Any], Any]:
    """An optimizer's step pre-hook that runs ``act`` as soon as the step's gradients exist.

    With a closure, they exist only after it has run.
    """

    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            act(optimizer)
            return None

        def closure_and_act() -> Any:
            loss = closure()
            act(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], closure_and_act, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure_and_act}

    return hook


def _mean_step(
    momentum: Tensor | None, squared: Tensor, correction: Tensor | float, kept: Tensor
) -> Tensor | float:
    """Mean size of the kept entries' last step, in learning rates, clamped to [0.1, 1]."""
    if momentum is None:
        return 0.5
    sizes = widened(momentum).abs() / (widened(squared) / correction).sqrt().clamp_min(1e-30)
    return _mean(sizes, kept).clamp(0.1, 1.0)


def _mean(values: Tensor, kept: Tensor) -> Tensor:
    """The mean over the kept entries; 0 if there are none."""
    return torch.where(kept, values, 0.0).sum() / kept.sum().clamp_min(1)


def _entries(optimizer: Optimizer, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Per-entry state: floating tensors of the parameter's own shape."""
    return _per_entry(optimizer.state.get(parameter, {}), parameter.shape)


def _per_entry(state: dict[str, Any], shape: torch.Size) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == shape:
            if value.is_floating_point():
                yield key, value


def _divides(key: str) -> bool:
    return key in _DIVIDING or "_sq" in key or "var" in key


def _bias_correction(optimizer: Optimizer, parameter: Tensor) -> Tensor | float:
    step = optimizer.state.get(parameter, {}).get("step")
    for group in optimizer.param_groups:
        if step is not None and "betas" in group and any(p is parameter for p in group["params"]):
            # A tensor where the count is one: a copy to another device would wait for it.
            correction: Tensor | float = 1 - group["betas"][1] ** (step + 1)
            return correction
    return 1.0
