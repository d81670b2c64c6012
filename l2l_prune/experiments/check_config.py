"""What each setting of a run may be; messages name the setting."""

from __future__ import annotations

from typing import Any

from l2l_prune import _values
from l2l_prune.data import DATA_SETS
from l2l_prune.segments import Schedule

_LEAST = {
    "seed": 0,
    "ways": 2,
    "shots": 1,
    "queries": 1,
    "train_shots": 1,
    "train_queries": 0,
    "channels": 1,
    "tasks": 1,
    "inner_steps": 1,
    "inner_batch": 1,
    "eval_steps": 0,
    "eval_batch": 1,
    "eval_every": 1,
    "curve_tasks": 1,
    "final_tasks": 2,
}
_ONE_OF = {
    "data": DATA_SETS,
    "backbone": ("conv4", "resnet12"),
    "layers": ("all", "authors"),
    "criterion": ("magnitude", "random", "snip", "taylor", "grasp", "movement"),
    "allocation": ("layerwise", "erk", "global"),
    "regrow": (None, "random", "gradient"),
    "select": ("last", "best"),
}


def check_types(settings: dict[str, Any]) -> None:
    """Refuse what no run could use, setting by setting.

    Args:
        settings: The fields of :class:`~l2l_prune.experiments.config.RunConfig`.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is out of range, or a name unknown.
    """
    _values.instance("schedule", settings["schedule"], Schedule, "a Schedule")
    if not _values.instance("name", settings["name"], str, "a string"):
        raise ValueError("name must not be empty: tables and files are called by it")
    for name, least in _LEAST.items():
        _values.count(name, settings[name], least)
    for name, least in (("train_classes", 1), ("rewind", 0)):
        if settings[name] is not None:
            _values.count(name, settings[name], least)
    for name, names in _ONE_OF.items():
        if settings[name] not in names:
            known = ", ".join(str(each) for each in names if each is not None)
            raise ValueError(f"{name} must be one of {known}, got {settings[name]!r}")
    if settings["data_root"] is not None:
        _values.instance("data_root", settings["data_root"], str, "a string")
    _values.number("inner_lr", settings["inner_lr"], above=0)
    _values.number("meta_lr", settings["meta_lr"])
    _values.number("weight_decay", settings["weight_decay"])
    _values.fraction("dropout", settings["dropout"])
    for name in ("structured", "compile", "bf16", "transductive"):
        _values.flag(name, settings[name])
    if settings["drop_block"] is not None:
        _values.flag("drop_block", settings["drop_block"])
