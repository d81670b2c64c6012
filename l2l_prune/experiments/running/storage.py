"""A folder for each run: its checkpoint while it trains, its results once it has finished."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from l2l_prune._basics.files import remove_unfinished
from l2l_prune.experiments.config import RunConfig, file_name
from l2l_prune.experiments.report import same_settings
from l2l_prune.experiments.report.finished_runs import read_runs


@contextmanager
def locked_folder(folder: Path, patience: float = 0) -> Iterator[None]:
    """Make ``folder`` and refuse a second writer to it.

    Args:
        folder: The folder; what a killed writer left unfinished in it is removed.
        patience: Seconds to wait for another writer.

    Raises:
        ValueError: If another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / ".lock", timeout=patience):
            remove_unfinished(folder)
            yield
    except filelock.Timeout:
        raise ValueError(
            f"another l2l-prune is writing to {folder}: choose another folder, or wait"
        ) from None


def in_words(error: Exception) -> str:
    """An error that a user can fix, in one line: a file's name first, and no error number."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def finished_run(folder: Path, config: RunConfig) -> dict[str, Any] | None:
    """The run's entry of ``results.json`` in its folder, or ``None`` if it has not finished.

    Raises:
        ValueError: If the results are of other settings, or damaged.
    """
    file = folder / "results.json"
    if not file.is_file():
        return None
    run = read_runs(file)[0]
    if not same_settings.made_for(run["config"], config):
        raise ValueError(f"{file} was made with other settings: choose another folder")
    return run


def run_name(config: RunConfig) -> str:
    """A folder name that tells the run's settings apart from all others and says the main ones.

    Examples:
        >>> from l2l_prune.experiments.config import make_config
        >>> run_name(make_config("reptile", "dsd"))[:-9]
        'reptile-dsd-50-64ch-1shot-seed0'
    """
    rates = [s.sparsity_label.rstrip("%") for s in config.schedule.segments if s.sparse]
    parts = [config.algorithm, file_name(config.name), *map(file_name, rates[-1:])]
    sizes = {"conv4": f"{config.channels}ch", "resnet12": "resnet12"}
    size = sizes.get(config.backbone, f"{config.backbone}{config.channels}")
    shots = [] if config.picture_tasks else [f"{config.shots}shot"]
    text = json.dumps(config.special, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return "-".join([*parts, size, *shots, f"seed{config.seed}", digest])
