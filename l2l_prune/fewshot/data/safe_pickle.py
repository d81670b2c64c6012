"""Read untrusted pickles: only arrays and plain values, and nothing is called."""

from __future__ import annotations

import importlib
import math
import os
import pickle
import re
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, ClassVar

import numpy as np
import numpy.typing as npt

_PICKLED_LOADERS = ("fc100", "mini_imagenet", "tiered_imagenet")
_LARGEST_IMAGE = 1 << 20  # pixels; the benchmarks' own have 105 x 105 at most


_SMALL = 1 << 16  # bytes that are read without checking how many the file has
_MOST_ENTRIES = 1 << 48  # of an array, counting lengths of 0 as 1: no product overflows
_KINDS = "biufcSU"  # what an array may hold; objects would be memory addresses
_DTYPE = re.compile(rf"[{_KINDS}][1-9][0-9]{{0,8}}")


# The standard library's class in Python: the one in C would allocate room for any memo index.
class SafeUnpickler(pickle._Unpickler):
    """Reads plain values and numpy arrays, the names of Python 2 and old numpy included.

    Arrays may hold numbers, booleans, text or bytes, but no objects and no fields. Keys of dicts
    may be numbers, text, bytes or ``None``. Only arrays and dtypes may have a state, which is
    checked before numpy sees it.

    Args:
        file: A seekable binary file.
        options: Those of ``pickle.Unpickler``.

    Raises:
        pickle.UnpicklingError: If the file holds anything else.

    Examples:
        >>> import io
        >>> SafeUnpickler(io.BytesIO(pickle.dumps({"labels": [1, 2]}))).load()
        {'labels': [1, 2]}
        >>> SafeUnpickler(io.BytesIO(pickle.dumps(print))).load()
        Traceback (most recent call last):
        ...
        _pickle.UnpicklingError: the file asks for builtins.print, which is no data
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: IO[bytes], **options: Any) -> None:
        super().__init__(file, **options)
        here = file.tell()
        end = file.seek(0, os.SEEK_END)
        file.seek(here)

        def read(count: int) -> bytes:
            if count > _SMALL and count > end - file.tell():  # before memory is allocated for it
                raise pickle.UnpicklingError("the file ends too early")
            return file.read(count)

        self._file_read = read

    def find_class(self, module: str, name: str) -> Any:
        """The replacement for a name that is known to be harmless."""
        plain = module.replace("numpy._core", "numpy.core")
        try:
            return _KNOWN[plain, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"the file asks for {module}.{name}, which is no data"
            ) from None


def _on(*opcodes: bytes) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Let a function execute these opcodes."""

    def put(function: Callable[[Any], None]) -> Callable[[Any], None]:
        SafeUnpickler.dispatch.update((opcode[0], function) for opcode in opcodes)
        return function

    return put


@_on(pickle.BUILD)
def _build(reader: Any) -> None:
    state = reader.stack.pop()
    target = reader.stack[-1]
    if type(target) is np.ndarray:
        _fill_array(target, state)
    elif isinstance(target, np.dtype):
        _order_bytes(target, state)
    elif type(target) is not OrderedDict or state != {}:
        raise pickle.UnpicklingError(f"the file gives a state to a {type(target).__name__}")


@_on(pickle.APPEND)
def _append(reader: Any) -> None:
    item = reader.stack.pop()
    _target(reader, list).append(item)


@_on(pickle.APPENDS)
def _extend(reader: Any) -> None:
    items = reader.pop_mark()
    _target(reader, list).extend(items)


@_on(pickle.SETITEM)
def _set_item(reader: Any) -> None:
    value, key = reader.stack.pop(), reader.stack.pop()
    _target(reader, dict)[_key(key)] = value


@_on(pickle.SETITEMS)
def _set_items(reader: Any) -> None:
    items = reader.pop_mark()
    _target(reader, dict).update(zip(map(_key, items[::2]), items[1::2], strict=True))


@_on(pickle.DICT)
def _make_dict(reader: Any) -> None:
    items = reader.pop_mark()
    reader.append(dict(zip(map(_key, items[::2]), items[1::2], strict=True)))


@_on(pickle.BYTEARRAY8)
def _make_bytearray(reader: Any) -> None:
    (length,) = struct.unpack("<Q", reader.read(8))
    reader.append(bytearray(reader.read(length)))


@_on(pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.EXT1, pickle.EXT2, pickle.EXT4)
def _refuse(reader: Any) -> None:
    raise pickle.UnpicklingError("the file holds a set or an extension, which no benchmark has")


def _target(reader: Any, kind: type[Any]) -> Any:
    target = reader.stack[-1]
    if not isinstance(target, kind):
        raise pickle.UnpicklingError(f"the file puts items into a {type(target).__name__}")
    return target


def _key(key: Any) -> Any:
    """A key that is fast to hash: nested tuples could take forever, or the whole stack."""
    if key is not None and not isinstance(key, (str, bytes, int, float, np.generic)):
        raise pickle.UnpicklingError(f"the file has a {type(key).__name__} as a key")
    return key


def _fill_array(array: npt.NDArray[Any], state: Any) -> None:
    if not isinstance(state, tuple) or len(state) != 5 or array.size or array.base is not None:
        raise pickle.UnpicklingError("the file has an array with an invalid state")
    _, shape, dtype, fortran, content = state
    content = _checked_content(shape, dtype, content)
    array.__setstate__((1, shape, _own(dtype), bool(fortran), content))


def _own(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """A copy, so that what the file later does to its dtype cannot affect an array."""
    return np.dtype(dtype, copy=True)


def _checked_content(shape: Any, dtype: Any, content: Any) -> bytes:
    """The bytes of an array, if there are as many as its shape and dtype need."""
    if isinstance(content, str):  # of Python 2
        content = content.encode("latin1")
    lengths = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
    if not lengths or not isinstance(dtype, np.dtype):
        raise pickle.UnpicklingError("the file has an array without shape or dtype")
    if math.prod(max(n, 1) for n in shape) > _MOST_ENTRIES:
        raise pickle.UnpicklingError("the file has an array of an impossible shape")
    if not isinstance(content, (bytes, bytearray)) or (
        len(content) != math.prod(shape) * dtype.itemsize
    ):
        raise pickle.UnpicklingError("the file has an array whose content does not fit its shape")
    if dtype.kind == "U":  # numpy makes text of it without a check
        letters = np.frombuffer(content, f"{dtype.byteorder}u4")
        if letters.size and letters.max() > sys.maxunicode:
            raise pickle.UnpicklingError("the file has an array of text that is not Unicode")
    return bytes(content)  # the same object, if it is bytes


def _order_bytes(dtype: np.dtype[Any], state: Any) -> None:
    """Take only the byte order from a dtype's state; the rest must be what it has already."""
    if not isinstance(state, tuple) or len(state) != 8:
        raise pickle.UnpicklingError("the file has a dtype with an invalid state")
    _, order, *inner, size, alignment, _ = state
    orders = ("|",) if dtype.byteorder == "|" else ("<", ">", "=")
    if any(part is not None for part in inner):
        raise pickle.UnpicklingError("the file has a dtype with fields, which no benchmark has")
    own = (dtype.itemsize, dtype.alignment) if dtype.kind in "SU" else (-1, -1)
    if not isinstance(order, str) or order not in orders or (size, alignment) != own:
        raise pickle.UnpicklingError("the file has a dtype that contradicts itself")
    dtype.__setstate__((3, order, None, None, None, *own, dtype.flags))  # type: ignore[attr-defined]


def _empty_array(kind: Any, shape: Any, letter: Any) -> Any:
    """Pickled arrays begin like this; their state brings shape and content, which are checked."""
    if kind is not _ARRAY or shape != (0,):
        raise pickle.UnpicklingError("the file asks for an array without its content")
    return np.empty(0, np.int8)


def _as_latin1(text: str, encoding: str = "utf-8") -> bytes:
    """Bytes as protocols before 3 write them."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("the file asks for an encoding that no pickle needs")
    return text.encode(encoding)


def _scalar(dtype: Any, content: Any) -> Any:
    return np.frombuffer(_checked_content((), dtype, content), _own(dtype))[0]


def _no_bytes() -> bytes:
    return b""


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> Any:
    """Arrays as protocols from 5 on write them."""
    if not isinstance(order, str) or order not in ("C", "F"):
        raise pickle.UnpicklingError("the file asks for an array in an unknown order")
    if isinstance(content, bytearray):  # stays writable
        _checked_content(shape, dtype, content)
    else:
        content = _checked_content(shape, dtype, content)
    return np.frombuffer(content, _own(dtype)).reshape(shape, order=order)  # type: ignore[call-overload]


def _dtype(name: Any, *options: Any) -> Any:
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise pickle.UnpicklingError("the file asks for a dtype that no benchmark has")
    return np.dtype(name, align=False, copy=True)  # a copy, since its state will change it


def _ordered(items: Any = ()) -> Any:
    return OrderedDict((_key(key), value) for key, value in items)


_ARRAY = "numpy.ndarray"  # a name, not the class, which would make arrays of any size
_KNOWN = {
    ("numpy", "ndarray"): _ARRAY,
    ("numpy", "dtype"): _dtype,
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("collections", "OrderedDict"): _ordered,
    ("_codecs", "encode"): _as_latin1,
    ("__builtin__", "bytes"): _no_bytes,
}


class _Safe:
    """The parts of the module pickle that learn2learn's loaders use."""

    UnpicklingError = pickle.UnpicklingError
    _Unpickler = SafeUnpickler

    @staticmethod
    def load(file: IO[bytes]) -> Any:
        return SafeUnpickler(file).load()


@contextmanager
def safe_loaders() -> Iterator[None]:
    """Inside, learn2learn's loaders unpickle safely, and Pillow refuses giant images."""
    from PIL import Image

    names = [f"learn2learn.vision.datasets.{name}" for name in _PICKLED_LOADERS]
    modules = [importlib.import_module(name) for name in names]
    largest = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = _LARGEST_IMAGE // 2  # Pillow refuses at twice as many
        for module in modules:
            vars(module)["pickle"] = _Safe
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = largest
        for module in modules:
            vars(module)["pickle"] = pickle
