"""Tensors with many zeros in few bytes: what is not 0, and where it is."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALL, BITMASK, INDICES = "all", "bitmask", "indices"
WAYS = (ALL, BITMASK, INDICES)
NO_PLACES = torch.empty(0, dtype=torch.uint8, device="cpu")
_EIGHT = torch.arange(8, dtype=torch.uint8, device="cpu")


@dataclass(frozen=True)
class Packed:
    """A tensor stored in whichever of three ways takes the fewest bytes.

    Attributes:
        how: ``"all"`` values, or those that are not 0 with their places as a ``"bitmask"`` or as
            ``"indices"``.
        values: ``[n]``, in order.
        places: uint8; the bitmask's bytes, or ``[n, width]``: each index in as many bytes as the
            largest needs, the lowest first. Empty for all.
    """

    how: str
    values: Tensor
    places: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of values and places."""
        return self.values.numel() * self.values.element_size() + self.places.numel()


def pack(tensor: Tensor) -> Packed:
    """The smallest way to store a tensor, in new memory on the CPU."""
    values = tensor.detach().cpu().contiguous().flatten().clone()
    there = values != 0
    kept = values[there]
    sizes = {
        ALL: len(values) * values.element_size(),
        BITMASK: _bitmask_size(len(values)) + len(kept) * values.element_size(),
        INDICES: len(kept) * (_index_size(len(values)) + values.element_size()),
    }
    how = min(WAYS, key=lambda way: sizes[way])
    if how == ALL:
        return Packed(ALL, values, NO_PLACES)
    if how == BITMASK:
        return Packed(BITMASK, kept, _bits_as_bytes(there))
    shifts = 8 * torch.arange(_index_size(len(values)), device="cpu")
    return Packed(INDICES, kept, (there.nonzero() >> shifts & 255).to(torch.uint8))


def places_size(how: str, count: int, numel: int) -> int:
    """Bytes that the places of ``count`` values out of ``numel`` take."""
    return {ALL: 0, BITMASK: _bitmask_size(numel), INDICES: count * _index_size(numel)}[how]


def unpack(packed: Packed, numel: int) -> Tensor:
    """All values of a tensor, ``[numel]``.

    Raises:
        ValueError: If values and places do not fit a tensor of this size.
    """
    count = len(packed.values)
    fits = packed.places.numel() == places_size(packed.how, count, numel)
    if fits and packed.how == ALL and count == numel:
        return packed.values
    if not fits or packed.how == ALL or count > numel:
        raise ValueError(f"{count} values stored as {packed.how} do not make a tensor of {numel}")
    if packed.how == BITMASK:
        places = _bytes_as_bits(packed.places.flatten()).nonzero().squeeze(1)
    else:
        width = _index_size(numel)
        shifts = 8 * torch.arange(width, device="cpu")
        places = (packed.places.view(count, width).long() << shifts).sum(1)
    rising = bool((places[1:] > places[:-1]).all())
    if len(places) != count or not rising or (count and int(places[-1]) >= numel):
        raise ValueError(f"the places of {count} values do not fit a tensor of {numel}")
    values = torch.zeros(numel, dtype=packed.values.dtype, device="cpu")
    values[places] = packed.values
    return values


def as_bytes(tensor: Tensor) -> bytes:
    """The memory of a tensor."""
    tensor = tensor.detach().cpu().contiguous()
    size = tensor.numel() * tensor.element_size()
    return ctypes.string_at(tensor.data_ptr(), size) if size else b""


def from_bytes(data: bytes, dtype: torch.dtype) -> Tensor:
    """Numbers of a type from the bytes of :func:`as_bytes`, ``[n]``."""
    if not data:
        return torch.empty(0, dtype=dtype, device="cpu")
    return torch.frombuffer(bytearray(data), dtype=dtype)


def _bitmask_size(numel: int) -> int:
    return math.ceil(numel / 8)


def _index_size(numel: int) -> int:
    """Bytes that the largest index takes."""
    return max(1, math.ceil((numel - 1).bit_length() / 8))


def _bits_as_bytes(bits: Tensor) -> Tensor:
    """Eight flags a byte, the first in its lowest bit."""
    padded = nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
    return (padded << _EIGHT).sum(1, dtype=torch.uint8)


def _bytes_as_bits(packed: Tensor) -> Tensor:
    return (packed[:, None] >> _EIGHT & 1).flatten()
