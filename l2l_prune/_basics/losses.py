"""What an inner step requires of a loss, and the gradients that it takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from l2l_prune._basics import checks


def check_loss(loss: object) -> Tensor:
    """``loss``, if it is a tensor of one number.

    Raises:
        TypeError: If it is not a tensor.
        ValueError: If it holds several numbers.
    """
    tensor = checks.of_type("loss", loss, Tensor, "a tensor")
    if tensor.numel() != 1:
        raise ValueError(
            f"loss must be one number, got shape {tuple(tensor.shape)}: take its mean or sum"
        )
    return tensor


def inner_gradients(
    loss: Tensor, inputs: Sequence[Tensor], *, create_graph: bool, of: str
) -> tuple[Tensor | None, ...]:
    """Gradients of an inner step; ``None`` for inputs that the loss does not reach.

    Args:
        loss: Scalar computed from a learner.
        inputs: What the learner adapts.
        create_graph: Whether the outer gradient goes through these gradients.
        of: What the inputs are, for the error message.

    Raises:
        RuntimeError: If the loss reaches none of the inputs.
        TypeError: If it is not a tensor.
        ValueError: If it holds several numbers.
    """
    check_loss(loss)
    gradients: tuple[Tensor | None, ...] = ()
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, inputs, create_graph=create_graph, allow_unused=True)
    if all(gradient is None for gradient in gradients):
        raise RuntimeError(f"loss does not depend on {of}: compute it from learner(x)")
    return gradients
