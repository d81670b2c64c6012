"""How many weights of a tensor survive, and which: pure functions on tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from l2l_prune._basics.precision import widened

_LARGE = 2**22  # from this size on, memory matters more than passes over the data
_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def kept_count(numel: int, sparsity: float) -> int:
    """Number of weights ``k_l`` that survive in a tensor of ``numel`` (Equation 1).

    Args:
        numel: Number of weights in the tensor.
        sparsity: Fraction to prune, in [0, 1).

    Returns:
        ``numel - round(sparsity * numel)``.

    Examples:
        >>> kept_count(10, 0.3)
        7
    """
    return numel - round(sparsity * numel)


def top_mask(scores: Tensor, keep: int) -> Tensor:
    """Mask of the ``keep`` largest scores; among equal ones, the lower flat index stays.

    Args:
        scores: Real tensor of any shape and memory layout.
        keep: Number of True entries wanted, in [0, ``scores.numel()``].

    Returns:
        Boolean tensor of the same shape and device with exactly ``keep`` True entries.

    Raises:
        TypeError: If ``scores`` is complex.
        ValueError: If ``keep`` is out of range, or ``scores`` holds NaN or infinity.

    Examples:
        >>> top_mask(torch.tensor([3.0, -1.0, 1.0, 2.0]).abs(), 3).tolist()
        [True, True, False, True]
    """
    if scores.is_complex():
        raise TypeError("scores must be real numbers, got complex ones")
    if not 0 <= keep <= scores.numel():
        raise ValueError(f"keep must be in [0, {scores.numel()}], got {keep}")
    check_finite(scores)
    if keep in (0, scores.numel()):
        return torch.full(scores.shape, keep > 0, dtype=torch.bool, device=scores.device)
    flat = scores.detach().reshape(-1)
    threshold = _threshold(flat, keep)
    mask = flat > threshold
    left = keep - int(mask.count_nonzero())
    for part, chosen in zip(torch.split(flat, _LARGE), torch.split(mask, _LARGE), strict=True):
        ties = (part == threshold).nonzero().squeeze(1)[:left]  # in flat order
        chosen[ties] = True
        left -= len(ties)
        if not left:
            break
    return mask.view(scores.shape)


def _threshold(flat: Tensor, keep: int) -> Tensor | float:
    """The ``keep``-th largest score."""
    if flat.is_cuda and flat.numel() <= _LARGE:  # deterministic mode refuses kthvalue on GPUs
        return flat.sort().values[flat.numel() - keep]
    if flat.numel() > _LARGE and flat.dtype in _BITS:
        return _bisected_threshold(flat, keep)
    flat = widened(flat)  # float32 has kthvalue on all devices
    return flat.kthvalue(flat.numel() - keep + 1).values


def _bisected_threshold(flat: Tensor, keep: int) -> float:
    """The same by bisection: at most a pass per bit, a byte per entry (kthvalue takes 12)."""
    bits = _BITS[flat.dtype]

    def place(value: float) -> int:  # a number's rank among all numbers of the dtype
        number = int(torch.tensor(abs(value), dtype=flat.dtype, device="cpu").view(bits))
        return -number if value < 0 else number

    def value(place: int) -> float:
        number = float(torch.tensor(abs(place), dtype=bits, device="cpu").view(flat.dtype))
        return -number if place < 0 else number

    low, high = (place(float(end)) for end in flat.aminmax())
    while low < high:
        middle = (low + high) // 2
        if int((flat > value(middle)).count_nonzero()) < keep:
            high = middle
        else:
            low = middle + 1
    return value(low)


def check_finite(scores: Tensor) -> None:
    """Refuse scores that cannot be ranked.

    Raises:
        ValueError: If ``scores`` holds NaN or infinity.
    """
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("the scores hold NaN or infinity, so they cannot be ranked")
