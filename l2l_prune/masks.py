"""How many weights of a tensor survive, and which: pure functions on tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def kept_count(numel: int, sparsity: float) -> int:
    """Number of weights ``k_l`` that survive in a tensor of ``numel`` (Equation 1).

    Args:
        numel: Number of weights in the tensor.
        sparsity: Fraction to prune, in [0, 1).

    Returns:
        ``numel - round(sparsity * numel)``.

    Example:
        >>> kept_count(10, 0.3)
        7
    """
    return numel - round(sparsity * numel)


def magnitude_mask(weight: Tensor, keep: int) -> Tensor:
    """Mask of the ``keep`` largest weights by magnitude; of equals, the lower flat index stays.

    Args:
        weight: Real tensor of any shape and memory layout.
        keep: Number of True entries wanted, in [0, ``weight.numel()``].

    Returns:
        Boolean tensor of the same shape and device with exactly ``keep`` True entries.

    Raises:
        TypeError: If ``weight`` is complex.
        ValueError: If ``keep`` is out of range, or ``weight`` holds NaN or infinity.

    Example:
        >>> magnitude_mask(torch.tensor([3.0, -1.0, 1.0, 2.0]), 3).tolist()
        [True, True, False, True]
    """
    if weight.is_complex():
        raise TypeError("complex weights have no order by magnitude that pruning could use")
    if not 0 <= keep <= weight.numel():
        raise ValueError(f"keep must be in [0, {weight.numel()}], got {keep}")
    if keep == weight.numel():
        _check_finite(weight)
        return torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    if keep == 0:
        _check_finite(weight)
        return torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    # float32 holds every half and bfloat16 value exactly, and has kthvalue on all devices.
    size = weight.detach().abs().reshape(-1)
    if size.dtype in (torch.float16, torch.bfloat16):
        size = size.float()
    _check_finite(size)
    threshold = size.kthvalue(size.numel() - keep + 1).values
    mask = size > threshold
    ties = (size == threshold).nonzero().squeeze(1)  # in flat order
    mask[ties[: keep - int(mask.sum())]] = True
    return mask.view(weight.shape)


def _check_finite(weight: Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weights hold NaN or infinity, so the largest cannot be told")
