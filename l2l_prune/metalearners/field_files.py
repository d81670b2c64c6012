"""A field as few bytes: half precision, and of pruned tensors only what is left."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from l2l_prune._basics import checks
from l2l_prune.masking.masked_layer import dense_state_dict

_MAGIC = b"l2F1"
_HEAD = struct.Struct("<4sII")  # magic, checksum of what follows, checksum of names and shapes
_TENSOR = struct.Struct("<BI")  # how the positions are told, how many values there are
_ALL, _BITMASK, _INDICES = range(3)


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
    values = tensor.detach().cpu().half().flatten()
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} holds numbers that are not finite in half precision")
    places = values.nonzero().squeeze(1)
    kept = _bytes(values[places])
    choices = (
        (_ALL, _bytes(values)),
        (_BITMASK, _bytes(_packed(values != 0)) + kept),
        (_INDICES, _index_bytes(places, len(values)) + kept),
    )
    how, content = min(choices, key=lambda choice: len(choice[1]))
    return _TENSOR.pack(how, len(values) if how == _ALL else len(places)) + content


def _read(body: bytes, place: int, numel: int) -> tuple[Tensor, int]:
    """A tensor's values, and where the next one begins."""
    how, count = _TENSOR.unpack_from(body, place)
    place += _TENSOR.size
    if how == _BITMASK:
        size = math.ceil(numel / 8)
        places = _unpacked(_tensor(body[place : place + size])).nonzero().squeeze(1)
    elif how == _INDICES:
        width = _index_size(numel)
        size = count * width
        raw = _tensor(body[place : place + size]).view(count, width).long()
        places = (raw << 8 * torch.arange(width)).sum(1)
    else:
        size, places = 0, torch.arange(numel)
    place += size
    end = place + 2 * count
    values = torch.zeros(numel, dtype=torch.float16)
    values[places] = _tensor(body[place:end]).view(torch.float16)
    return values.float(), end


def _index_size(numel: int) -> int:
    """Bytes that the largest index takes."""
    return max(1, math.ceil((numel - 1).bit_length() / 8))


def _index_bytes(places: Tensor, numel: int) -> bytes:
    shifts = 8 * torch.arange(_index_size(numel))
    return _bytes((places[:, None] >> shifts & 255).to(torch.uint8))


def _packed(bits: Tensor) -> Tensor:
    """Eight flags a byte, the first in its lowest bit."""
    padded = nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpacked(packed: Tensor) -> Tensor:
    return (packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()


def _fingerprint(state: Mapping[str, Tensor]) -> int:
    shapes = [(name, tuple(tensor.shape)) for name, tensor in state.items()]
    return zlib.crc32(repr(shapes).encode())
