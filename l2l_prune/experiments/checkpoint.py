"""Checkpoints of runs: whole or not there, of one configuration, and without code in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from l2l_prune._files import replace_file
from l2l_prune.experiments.config import RunConfig

_VERSION = 1


def save_checkpoint(path: Path, config: RunConfig, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain values), replacing the file only when complete.

    Args:
        path: The file; its folder must exist.
        config: The run's settings, which :func:`load_checkpoint` compares.
        state: What to resume from.
    """
    with replace_file(path) as temporary:
        torch.save({"version": _VERSION, "config": _text(config), "state": state}, temporary)


def load_checkpoint(path: Path, config: RunConfig) -> dict[str, Any] | None:
    """The state of an earlier run with the same settings, or ``None`` if there is no file.

    Raises:
        ValueError: If the file is damaged, or belongs to other settings.
    """
    if not path.exists():
        return None
    try:
        saved = torch.load(path, weights_only=True)
        if saved["version"] != _VERSION:
            raise ValueError(f"its version is {saved['version']}, not {_VERSION}")
        made_for, state = saved["config"], saved["state"]
    except Exception as error:  # damaged files raise whatever the unpickler meets
        # torch's own words would advise to load it without weights_only: not with a strange file.
        raise ValueError(
            f"{path} is damaged, or no checkpoint of this program ({type(error).__name__}): "
            "delete it"
        ) from None
    if made_for != _text(config):
        raise ValueError(f"{path} was made with other settings: choose another folder")
    return dict(state)


def _text(config: RunConfig) -> str:
    return json.dumps(config.to_json(), sort_keys=True)
