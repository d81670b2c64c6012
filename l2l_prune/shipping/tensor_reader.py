"""A reader of the safetensors format, so that a device needs only torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2l_prune._basics.packing import from_bytes
from l2l_prune._basics.tensor_files import DamagedFile

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_HEAD = 8  # bytes that hold the length of the JSON header


def read_safetensors(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Args:
        data: The file's bytes.
        path: The file's path, for messages.

    Raises:
        DamagedFile: If they are not such a file.
    """
    start = _HEAD + int.from_bytes(data[:_HEAD], "little")
    if len(data) < _HEAD or start > len(data):
        raise DamagedFile(path, "its header is longer than the file")
    try:
        header = json.loads(data[_HEAD:start])
        header.pop("__metadata__", None)
        return {name: _tensor(entry, data, start) for name, entry in header.items()}
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedFile(path, type(error).__name__) from None


def _tensor(entry: dict[str, Any], data: bytes, start: int) -> Tensor:
    dtype, shape = _DTYPES[entry["dtype"]], [int(size) for size in entry["shape"]]
    first, last = (int(offset) for offset in entry["data_offsets"])
    size = math.prod(shape) * dtype.itemsize
    if not 0 <= first <= last <= len(data) - start or last - first != size:
        raise ValueError
    return from_bytes(data[start + first : start + last], dtype).view(shape)
