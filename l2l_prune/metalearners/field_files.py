"""A field as few bytes: half precision, and of pruned tensors only what is left."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from l2l_prune._basics import checks
from l2l_prune._basics.packing import WAYS, Packed, as_bytes, from_bytes, pack, places_size, unpack
from l2l_prune.masking.masked_layer import dense_state_dict

_MAGIC = b"l2F1"
_HEAD = struct.Struct("<4sII")  # magic, checksum of what follows, checksum of names and shapes
_TENSOR = struct.Struct("<BI")  # how the positions are told, how many values there are


def export_field(field: nn.Module) -> bytes:
    """The weights of a field in half precision.

    Of each tensor either all values are written, or those that are not 0 with their positions: as
    a bitmask or as indices, whichever is the smallest. The bytes are read back by
    :func:`read_field` into a network of the same shapes; what these are is not written.

    Args:
        field: The network, with masks or without (as :meth:`FieldMAML.field` or
            :meth:`Pruner.finalize` give it).

    Raises:
        TypeError: If ``field`` is no module.
        ValueError: If a tensor holds no real numbers, or one that is not finite in half precision.

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
    """Load what :func:`export_field` gave.

    Args:
        data: The bytes.
        field: A network of the same architecture, without masks; its weights are replaced.

    Returns:
        ``field``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the bytes are damaged, or of a network of other shapes; nothing is changed.
    """
    checks.of_type("data", data, bytes, "bytes")
    checks.of_type("field", field, nn.Module, "a torch.nn.Module")
    state = dense_state_dict(field)
    if len(data) < _HEAD.size or data[: len(_MAGIC)] != _MAGIC:
        raise ValueError("the bytes are no field: they must be what export_field gave")
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
        raise ValueError(f"{name} is of {tensor.dtype}: only real numbers can be exported")
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
