"""Settings in TOML files: how they are read, and what they were called before."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OLD_NAMES = {"schedule": "method", "eval_tasks": "final_tasks"}
"""Names of settings in version 0.1, and their names today; files may use either."""

_LARGEST_TOML = 1_000_000


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("a directory or a device, not a file")
        if path.stat().st_size > _LARGEST_TOML:
            raise ValueError(f"more than {_LARGEST_TOML} bytes, too large for a settings file")
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return values
    except (OSError, ValueError) as error:  # the latter also for text that Python refuses
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"{path}: {why}") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None


def with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` with today's name in place of each old one.

    Raises:
        ValueError: If a setting is there under both names.
    """
    for old, new in OLD_NAMES.items():
        if old in values and new in values:
            raise ValueError(f"give {new} or {old} (its old name), not both")
    return {OLD_NAMES.get(name, name): value for name, value in values.items()}
