"""Checkpoints of runs: the newest two, complete, for one configuration, and free of code."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from l2l_prune._basics.files import linked_file
from l2l_prune._basics.tensor_files import DamagedFile, load_tensors, save_tensors
from l2l_prune.experiments.config import RunConfig
from l2l_prune.experiments.report import same_settings

_VERSION = 2


def save_checkpoint(path: Path, config: RunConfig, state: dict[str, Any]) -> None:
    """Write ``state``, replacing the file only when complete; the previous one is kept next to it.

    Args:
        path: The file; its folder must exist.
        config: The run's settings, which :func:`load_checkpoint` compares.
        state: What to resume from: tensors and plain values.

    Raises:
        OSError: If it cannot be written; existing checkpoints stay as they are.
    """
    made_for = json.dumps(config.to_json(), sort_keys=True)
    document = {"version": _VERSION, "config": made_for, "state": state}
    save_tensors(document, path, backup=_previous(path))


def load_checkpoint(path: Path, config: RunConfig) -> dict[str, Any] | None:
    """The state of an earlier run with the same settings, or ``None`` if there is no file.

    If the newest file is damaged, the previous one is used, with a warning.

    Raises:
        ValueError: If all files are damaged, or one belongs to other settings.
        OSError: If a file cannot be read.
    """
    damaged = []
    for file in (path, _previous(path)):
        if not file.exists():
            continue
        try:
            made_for, state = _parts(file, load_tensors(file))
        except DamagedFile as error:
            damaged.append(str(error))
            continue
        if not same_settings.made_for(made_for, config):
            raise ValueError(f"{file} was made with other settings: choose another folder")
        if damaged:
            warnings.warn(f"{damaged[0]}: resuming from the previous checkpoint", stacklevel=2)
        if file != path:
            os.replace(file, linked_file(path))  # else the next save would overwrite it
        return state
    if damaged:
        raise ValueError(f"{'; '.join(damaged)}: delete it to start the run again")
    return None


def remove_checkpoint(path: Path) -> None:
    """Delete the checkpoints of a run that has ended; a symbolic link stays."""
    for file in (_previous(path), linked_file(path)):
        file.unlink(missing_ok=True)


def _parts(file: Path, saved: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that a checkpoint was made for, and its state."""
    try:
        version, state = saved["version"], dict(saved["state"])
        made_for = dict(json.loads(saved["config"]))
    except (LookupError, TypeError, ValueError) as error:
        raise DamagedFile(file, type(error).__name__) from None
    if version != _VERSION:
        raise DamagedFile(file, f"its version is {version}, not {_VERSION}")
    return made_for, state


def _previous(path: Path) -> Path:
    real = linked_file(path)
    return real.with_name(f"{real.name}.previous")
