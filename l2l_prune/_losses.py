"""What an inner step asks of a loss."""

from __future__ import annotations

from torch import Tensor

from l2l_prune import _values


def check_loss(loss: object) -> Tensor:
    """``loss``, if it is one number as a tensor.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If it holds several numbers.
    """
    tensor = _values.instance("loss", loss, Tensor, "a tensor")
    if tensor.numel() != 1:
        raise ValueError(
            f"loss must be one number, got shape {tuple(tensor.shape)}: take its mean or sum"
        )
    return tensor
