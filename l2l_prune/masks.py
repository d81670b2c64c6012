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


def top_mask(scores: Tensor, keep: int) -> Tensor:
    """Mask of the ``keep`` largest scores; of equals, the lower flat index stays.

    Args:
        scores: Real tensor of any shape and memory layout.
        keep: Number of True entries wanted, in [0, ``scores.numel()``].

    Returns:
        Boolean tensor of the same shape and device with exactly ``keep`` True entries.

    Raises:
        TypeError: If ``scores`` is complex.
        ValueError: If ``keep`` is out of range, or ``scores`` holds NaN or infinity.

    Example:
        >>> top_mask(torch.tensor([3.0, -1.0, 1.0, 2.0]).abs(), 3).tolist()
        [True, True, False, True]
    """
    if scores.is_complex():
        raise TypeError("complex scores have no order that pruning could use")
    if not 0 <= keep <= scores.numel():
        raise ValueError(f"keep must be in [0, {scores.numel()}], got {keep}")
    check_finite(scores)
    if keep in (0, scores.numel()):
        return torch.full(scores.shape, keep > 0, dtype=torch.bool, device=scores.device)
    flat = scores.detach().reshape(-1)
    # float32 holds every half and bfloat16 value exactly, and has kthvalue on all devices.
    if flat.dtype in (torch.float16, torch.bfloat16):
        flat = flat.float()
    threshold = flat.kthvalue(flat.numel() - keep + 1).values
    mask = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)  # in flat order
    mask[ties[: keep - int(mask.sum())]] = True
    return mask.view(scores.shape)


def check_finite(scores: Tensor) -> None:
    """Refuse scores that have no order.

    Raises:
        ValueError: If ``scores`` holds NaN or infinity.
    """
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("it holds NaN or infinity, so the largest cannot be told")
