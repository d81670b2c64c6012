"""A field in few bytes: half precision, and only the remaining weights of pruned tensors."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from l2l_prune._basics import checks
from l2l_prune._basics.packing import WAYS, Packed, as_bytes, from_bytes, pack, places_size, unpack
from l2l_prune.masking.masked_layer import check_unmasked, dense_state_dict

_MAGIC = b"l2F1"
_HEAD = struct.Struct("<4sII")  # magic, checksum of what follows, checksum of names and shapes
_TENSOR = struct.Struct("<BI")  # how positions are stored, number of values


def export_field(field: nn.Module) -> bytes:
    """The weights of a field in half precision.

    Each tensor is written in the smallest of three forms: all values, or only the values that are
    not 0, with a bitmask or with indices. :func:`read_field` reads the bytes back into a network
    with the same shapes; the shapes themselves are not written.

    Args:
        field: The network, with or without masks (as :meth:`FieldMAML.field` or
            :meth:`Pruner.finalize` return it).

    Raises:
        TypeError: If ``field`` is not a module.
        ValueError: If a tensor does not hold real numbers, or holds one that is not finite in half
            precision.

    Examples:
        >>> from l2l_prune.metalearners.fields import Siren
        >>> field = Siren(width=16)
        >>> len(export_field(field)), sum(2 * p.numel() for p in field.parameters())
        (1270, 1218)
    """
    checks.of_type("field", field, nn.Module, "a torch.nn.Module")
    state = dense_state_dict(field)
    body = b"".join(_write(name, tensor) for name, tensor in state.items())
    return _HEAD.pack(_MAGIC, zlib.crc32(body), _fingerprint(state)) + body


def read_field(data: bytes, field: nn.Module) -> nn.Module:
    """Load what :func:`export_field` returned.

    Args:
        data: The bytes.
        field: A network of the same architecture, without masks; its weights are replaced.

    Returns:
        ``field``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the bytes are damaged, or of a network with other shapes; ``field`` is then
            unchanged.
    """
    checks.of_type("data", data, bytes, "bytes")
    checks.of_type("field", field, nn.Module, "a torch.nn.Module")
    check_unmasked("field", field)
    state = dense_state_dict(field)
    if len(data) < _HEAD.size or data[: len(_MAGIC)] != _MAGIC:
        raise ValueError("the bytes are not a field: they must come from export_field")
    _, checksum, fingerprint = _HEAD.unpack_from(data)
    body = data[_HEAD.size :]
    if zlib.crc32(body) != checksum:
        raise ValueError("the bytes of the field are damaged: their checksum is wrong")
    if fingerprint != _fingerprint(state):
        raise ValueError("the bytes are of another network: names or shapes of its tensors differ")
    new, place = {}, 0
    for name, tensor in state.items():
        values, place = _read(body, place, tensor.numel())
        new[name] = values.view(tensor.shape)
    field.load_state_dict(new)
    return field


def _write(name: str, tensor: Tensor) -> bytes:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has the type {tensor.dtype}: only real numbers can be exported")
    values = tensor.detach().cpu().half()
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} holds numbers that are not finite in half precision")
    packed = pack(values)
    head = _TENSOR.pack(WAYS.index(packed.how), len(packed.values))
    return head + as_bytes(packed.places) + as_bytes(packed.values)


def _read(body: bytes, place: int, numel: int) -> tuple[Tensor, int]:
    """A tensor's values, and where the next one begins."""
    number, count = _TENSOR.unpack_from(body, place)
    start = place + _TENSOR.size
    middle = start + places_size(WAYS[number], count, numel)
    end = middle + 2 * count
    places = from_bytes(body[start:middle], torch.uint8)
    values = from_bytes(body[middle:end], torch.float16)
    return unpack(Packed(WAYS[number], values, places), numel).float(), end


def _fingerprint(state: Mapping[str, Tensor]) -> int:
    shapes = [(name, tuple(tensor.shape)) for name, tensor in state.items()]
    return zlib.crc32(repr(shapes).encode())
