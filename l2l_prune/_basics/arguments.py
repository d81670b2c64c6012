"""Networks that remember their constructor arguments, so that a file can record them."""

from __future__ import annotations

import functools
import inspect
import math
from numbers import Integral, Real
from typing import Any, TypeVar

from torch import nn

Network = TypeVar("Network", bound=type[nn.Module])


def keeps_arguments(cls: Network) -> Network:
    """Class decorator: instances keep their constructor arguments as ``made_with``.

    Only arguments that a file can hold are kept: not generators, for instance. numpy's numbers
    become Python's.
    """
    make: Any = cls.__init__
    signature = inspect.signature(make)

    @functools.wraps(make)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = list(bound.arguments.items())[1:]
        found = {name: _python_numbers(value) for name, value in given}
        self.made_with = {name: value for name, value in found.items() if is_plain(value)}

    cls.__init__ = init  # type: ignore[method-assign]
    return cls


def _python_numbers(value: object) -> object:
    if isinstance(value, (tuple, list)):
        found = map(_python_numbers, value)
        return tuple(found) if isinstance(value, tuple) else list(found)
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def is_plain(value: object) -> bool:
    """Whether JSON can hold it: finite numbers, strings, None, and tuples or lists of these."""
    if isinstance(value, (tuple, list)):
        return all(map(is_plain, value))
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return value is None or type(value) in (bool, int, float, str)
