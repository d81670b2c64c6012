"""Pickles of strangers: arrays and plain values are read from them, nothing is called."""

from __future__ import annotations

import importlib
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np

_PICKLED_LOADERS = ("fc100", "mini_imagenet", "tiered_imagenet")
_LARGEST_IMAGE = 1 << 20  # pixels; the benchmarks' own have 105 x 105 at most


# A class of the standard library, in Python: the one in C would make room for any memo index.
class SafeUnpickler(pickle._Unpickler):
    """Reads plain values and numpy arrays, the names of Python 2 and old numpy included.

    Raises:
        pickle.UnpicklingError: At any other class or function.

    Examples:
        >>> import io
        >>> SafeUnpickler(io.BytesIO(pickle.dumps({"labels": [1, 2]}))).load()
        {'labels': [1, 2]}
        >>> SafeUnpickler(io.BytesIO(pickle.dumps(print))).load()
        Traceback (most recent call last):
        ...
        _pickle.UnpicklingError: the file asks for builtins.print, which is no data
    """

    def find_class(self, module: str, name: str) -> Any:
        """What stands for the name, if it is known to be harmless."""
        plain = module.replace("numpy._core", "numpy.core")
        try:
            return _KNOWN[plain, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"the file asks for {module}.{name}, which is no data"
            ) from None


def _empty_array(kind: Any, shape: Any, letter: Any) -> Any:
    """As pickled arrays begin: their state brings shape and content, which numpy compares."""
    if kind is not _ARRAY or shape != (0,):
        raise pickle.UnpicklingError(f"the file asks for an array of {shape} without its content")
    return np.empty(0, np.int8)


def _as_latin1(text: str, encoding: str = "utf-8") -> bytes:
    """How protocols before 3 write bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the file asks for the encoding {encoding}")
    return text.encode(encoding)


def _scalar(dtype: Any, content: Any) -> Any:
    if not isinstance(dtype, np.dtype) or dtype.hasobject or not isinstance(content, bytes):
        raise pickle.UnpicklingError("the file asks for a number that is none")
    return np.frombuffer(content, dtype)[0]


def _no_bytes() -> bytes:
    return b""


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> Any:
    """Arrays since protocol 5."""
    if not isinstance(content, (bytes, bytearray)) or not isinstance(dtype, np.dtype):
        raise pickle.UnpicklingError("the file asks for an array without its content")
    return np.frombuffer(content, dtype).reshape(shape, order=order)


def _dtype(name: Any, *options: Any) -> Any:
    if not isinstance(name, str):
        raise pickle.UnpicklingError(f"the file asks for the dtype {name!r}")
    return np.dtype(name, *options)


_ARRAY = "numpy.ndarray"  # a name, not the class, which would make arrays of any size
_KNOWN = {
    ("numpy", "ndarray"): _ARRAY,
    ("numpy", "dtype"): _dtype,
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _as_latin1,
    ("__builtin__", "bytes"): _no_bytes,
}


class _Safe:
    """What learn2learn's loaders use of the module pickle."""

    UnpicklingError = pickle.UnpicklingError
    _Unpickler = SafeUnpickler

    @staticmethod
    def load(file: IO[bytes]) -> Any:
        return SafeUnpickler(file).load()


@contextmanager
def safe_loaders() -> Iterator[None]:
    """Within it, learn2learn's loaders unpickle safely, and Pillow refuses giant images."""
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
