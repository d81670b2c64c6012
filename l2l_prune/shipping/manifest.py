"""The JSON file next to exported tensors: it describes them, their network and checksums."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch

import l2l_prune
from l2l_prune._basics.tensor_files import DamagedFile

NAME = "export.json"
_FORMAT, _VERSION = "l2l_prune export", 1
_KEYS = {"versions", "network", "tensors", "rates", "data", "accuracy", "about", "files"}


def manifest_text(content: dict[str, Any]) -> str:
    """The file's text: plain values, the versions, and a checksum of everything."""
    versions = {
        "l2l_prune": l2l_prune.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    head = {"format": _FORMAT, "format_version": _VERSION, "versions": versions}
    whole = {**head, **content}
    whole["sha256"] = _checksum(whole)
    return json.dumps(whole, indent=1, allow_nan=False) + "\n"


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """What an export says about itself: network, shapes, rates, data, accuracy, versions.

    Args:
        folder: Written by :func:`~l2l_prune.shipping.export`.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is damaged, or an export of another version of the format.
    """
    path = Path(folder) / NAME
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedFile(path, type(error).__name__) from None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise DamagedFile(path, "it does not say that it is an export")
    if (version := found.get("format_version")) != _VERSION:
        raise ValueError(
            f"{path} is an export of format {version!r}, but this l2l_prune reads {_VERSION}: load "
            "it with the l2l_prune that wrote it"
        )
    checksum = found.pop("sha256", None)
    if checksum != _checksum(found) or not found.keys() >= _KEYS:
        raise DamagedFile(path, "its checksum is wrong")
    return {**found, "sha256": checksum}


def _checksum(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
