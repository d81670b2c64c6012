"""Checks of arguments; messages name the argument."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, SupportsIndex, TypeAlias, TypeVar

Sparsity: TypeAlias = float | Mapping[str, float] | tuple[tuple[str, float], ...]
Counts: TypeAlias = Mapping[str, int] | tuple[tuple[str, int], ...]
Wanted = TypeVar("Wanted")


def describe(value: object) -> str:
    """A value as an error message shows it: short, and without a memory address."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, (str, bytes, int, float, complex, tuple, list)):
        text = repr(value)
        return text if len(text) <= 60 and " at 0x" not in text else type(value).__name__
    return type(value).__name__


def of_type(name: str, value: object, kind: type[Wanted], called: str) -> Wanted:
    """``value``, if it is a ``kind``; ``called`` is what the message calls that kind."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {called}, got {describe(value)}")
    return value


def one_of(name: str, value: object, choices: Iterable[object]) -> None:
    """Refuse a value that is not one of ``choices``, which may be of any kind."""
    known = list(choices)
    if value not in known:
        raise ValueError(
            f"{name} must be one of {', '.join(map(str, known))}, got {describe(value)}"
        )


def true_or_false(name: str, value: object) -> bool:
    """``value``, if it is True or False; a string like ``"no"`` would count as true."""
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        value = bool(value)
    return of_type(name, value, bool, "True or False")


def whole_number(name: str, value: SupportsIndex, least: int = 0) -> int:
    """``value`` as an int >= ``least``."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be >= {least}, got {number}")
    return number


def fraction(name: str, value: object) -> float:
    """``value`` as a float in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number in [0, 1), got {value!r}")
    number = float(value)
    if not 0 <= number < 1:  # also refuses NaN
        percent = f"; {value}% is {number / 100:g}" if 1 < number < 100 else ""
        raise ValueError(f"{name} must be in [0, 1), got {value}{percent}")
    return number


def number(name: str, value: object, *, above: float | None = None) -> float:
    """``value`` as a finite float ``> above``, by default ``>= 0``."""
    least = "a number >= 0" if above is None else f"a number > {above:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {least}, got {describe(value)}")
    result = float(value)
    if not math.isfinite(result) or (result < 0 if above is None else result <= above):
        raise ValueError(f"{name} must be {least}, got {value}")
    return result


def pairs(name: str, value: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping from layer names or patterns, or its pairs, as a dict of at least one entry."""
    try:
        mapping = dict(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must map layer names to values, got {describe(value)}") from None
    if not mapping:
        raise ValueError(f"{name} names no layer: give a number or at least one entry")
    for pattern in mapping:
        if not isinstance(pattern, str):
            raise TypeError(f"{name} must map layer names to values, got the key {pattern!r}")
    return mapping


def frozen_sparsity(name: str, value: Sparsity) -> Sparsity:
    """A float, or a mapping as hashable pairs."""
    if isinstance(value, (Mapping, tuple)):
        entries = pairs(name, value).items()
        return tuple((pattern, fraction(f"{name}[{pattern!r}]", v)) for pattern, v in entries)
    return fraction(name, value)


def frozen_counts(name: str, value: Counts | None) -> Counts | None:
    """A mapping of counts >= 1 as hashable pairs, or None."""
    if value is None:
        return None
    if not isinstance(value, (Mapping, tuple)):
        raise TypeError(f"{name} must map layer names to counts, got {value!r}")
    entries = pairs(name, value).items()
    return tuple(
        (pattern, whole_number(f"{name}[{pattern!r}]", v, least=1)) for pattern, v in entries
    )


def as_lists(value: Any) -> Any:
    """Tuples of pairs as lists, for files."""
    return [list(pair) for pair in value] if isinstance(value, tuple) else value


def set_field(value: object, name: str, content: object) -> None:
    """Set a field of a frozen dataclass while it is being made."""
    object.__setattr__(value, name, content)


def check_fractions(fractions: dict[str, float]) -> None:
    """Refuse values that are not fractions in [0, 1]."""
    for name, value in fractions.items():
        if not isinstance(value, Real):
            raise TypeError(f"{name} must be a fraction in [0, 1], got {describe(value)}")
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be a fraction in [0, 1], got {value}")


def check_whole(fractions: dict[str, float], whole: float) -> None:
    """Refuse fractions that do not add up to the whole run."""
    if not math.isclose(whole, 1, abs_tol=1e-6):
        raise ValueError(f"the fractions {fractions} cover {whole:g} of the run, not 1")


def apportion(total: int, shares: dict[str, float]) -> dict[str, int]:
    """Split ``total`` by ``shares`` (largest remainder), so that the parts sum to it exactly."""
    parts = {name: int(total * share + 1e-9) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: parts[name] - total * shares[name])
    for name in by_remainder[: total - sum(parts.values())]:
        parts[name] += 1
    for name, share in shares.items():
        if share > 0 and parts[name] == 0:
            raise ValueError(
                f"{name}, {100 * share:.3g}% of {total} iterations, would get none: make the "
                "run longer"
            )
    return parts
