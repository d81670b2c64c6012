"""Numbers that half precision would lose, and gradients that a gradient scaler has scaled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def widened(tensor: Tensor) -> Tensor:
    """``tensor`` in float32 if it has half precision, so that products and sums keep their order.

    float32 holds every half and bfloat16 number exactly.
    """
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def step_gradient(optimizer: Any, gradient: Tensor) -> Tensor:
    """The gradient that the coming step will use, in float32 at least.

    ``torch.amp.GradScaler`` hands its factor, and whether a gradient overflowed, to optimizers
    with ``fused=True``, whose step takes both into account; before it, ``grad`` is still scaled.

    Args:
        optimizer: The optimizer that is about to step.
        gradient: A parameter's ``grad``.

    Returns:
        The unscaled gradient; zeros if the step will change nothing. Never waits for the device.
    """
    gradient = widened(gradient.detach())
    scale, found = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if scale is not None:
        gradient = gradient / scale.to(gradient.device)
    if found is not None:
        gradient = gradient.masked_fill(found.to(gradient.device) > 0, 0)
    return gradient


def skips_step(optimizer: Any) -> bool:
    """Whether the step that is coming, or was just made, changes nothing.

    True within the hooks of a fused optimizer's step for which ``torch.amp.GradScaler`` found an
    overflow. (Other optimizers then make no step at all.) Waits for the device.
    """
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found > 0)


def forget_casts() -> None:
    """Call after weights were written in place: autocast keeps casts of them until its block ends.

    A block around a whole inner loop would compute with the first step's weights for ever.
    """
    torch.clear_autocast_cache()
