"""Files of tensors and plain values, in torch's format: whole, checked, and free of code."""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2l_prune._basics.files import replace_file

_NAMES = ("collections OrderedDict", "torch._utils _rebuild_tensor_v2")
_GROWTH = 16


class DamagedFile(ValueError):
    """A file is not what this program once wrote.

    Args:
        path: The file.
        reason: How that shows.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged or was not written by this program ({reason})")


def save_tensors(value: Any, path: Path, backup: Path | None = None) -> None:
    """Write tensors and plain values as ``torch.save`` does, replacing the file when complete.

    Args:
        value: Tensors, numbers, strings and ``None``, in dicts, lists and tuples.
        path: The file; its folder must exist.
        backup: Keep the present file under this name, in the same folder.

    Raises:
        OSError: If the file cannot be written. The error names ``path``, which is unchanged then.
    """
    # Through memory: on a full disk, errors from torch's own writer would be unpredictable.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with replace_file(path, backup) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_tensors(path: Path) -> Any:
    """Read what :func:`save_tensors` wrote, using memory in proportion to the file's size.

    torch itself does not check the checksums in its files (CRC-32 of each record), and would
    allocate as much memory as a file asks for.

    Raises:
        DamagedFile: If the file is damaged or holds anything but tensors and plain values.
        OSError: If the file cannot be read.
    """
    if path.is_dir():
        raise DamagedFile(path, "a directory")
    data = path.read_bytes()  # once, so that what is checked is what is loaded
    try:
        _check_records(data)
        value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        _check_size(value, _GROWTH * len(data))
    except _Refused as error:
        raise DamagedFile(path, str(error)) from None
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise whatever the unpickler meets
        # torch's message would advise loading without weights_only: unsafe with a strange file.
        raise DamagedFile(path, type(error).__name__) from None
    return value


class _Refused(Exception):
    pass


def _check_records(data: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = archive.infolist()
        stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
        if not stored or sum(record.file_size for record in records) > len(data):
            raise _Refused("its records are larger than the file")
        if wrong := archive.testzip():
            raise _Refused(f"the checksum of its record {wrong} is wrong")
        for record in records:
            if record.filename.endswith("data.pkl"):
                _check_names(archive.read(record))


def _check_names(code: bytes) -> None:
    for operation, argument, _ in pickletools.genops(code):
        if operation.name == "GLOBAL" and argument not in _NAMES:
            module, _, name = str(argument).partition(" ")
            if module != "torch" or not name.endswith("Storage"):
                raise _Refused(f"it asks for {module}.{name}")


def _check_size(value: Any, limit: int) -> None:
    """Refuse small files that hold large values: repeated tensors, nested containers."""
    size, left = 0, [value]
    while left:
        found = left.pop()
        size += found.numel() * found.element_size() if isinstance(found, Tensor) else 1
        if size > limit:
            raise _Refused("its values are much larger than the file")
        if isinstance(found, dict):
            left.extend(found.keys())
            left.extend(found.values())
        elif isinstance(found, (list, tuple)):
            left.extend(found)
