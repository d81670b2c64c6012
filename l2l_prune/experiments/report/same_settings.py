"""Which settings must agree for two runs to differ only in the seed.

Every field counts, also one that this version does not know. The few that sometimes do not are
listed here, with the reason.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Hashable, Iterable
from typing import Any

from l2l_prune.experiments.config import RunConfig

MASKS = (
    *("layers", "prune_head", "criterion", "pattern", "allocation", "rewind", "regrow"),
    "structured",
)
"""How masks are chosen: these settings belong to the method and do not affect a dense run."""

REGULARISERS = {"dropout": "dropout", "weight_decay": "decay"}
"""Rivals of pruning, and what names of methods call them: a dense run with one is a row beside the
dense run without."""

RIVALS = (
    "dropout_per", "drop_grad", "drop_grad_noise", "mgaug", "mgaug_rate", "mgaug_networks"
)  # fmt: skip
"""Rivals of pruning that are methods of their own."""

_WATCHING = ("eval_every", "curve_tasks")
"""How closely the curves follow the run: without effect on what is scored at its end, unless
weights are chosen by them."""

_IF_CHOSEN = ("curve_tasks", "points")
"""What :func:`shared_settings` holds only where weights are chosen; else ``select`` says enough."""


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a results file, with defaults where an older version had no such field."""
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(RunConfig)
        if field.default is not dataclasses.MISSING
    }
    return defaults | config


def made_for(saved: dict[str, Any], config: RunConfig) -> bool:
    """Whether the settings in a file, perhaps of an older version, are those of ``config``."""
    own: dict[str, Any] = json.loads(json.dumps(config.to_json()))
    return complete(saved) == own


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """All by which a run differs from others of its seed; runs that share it are pooled.

    What has no effect is left out: how masks would come about in a dense run, empty segments, and
    a width in ResNet-12, which has none.
    """
    values = complete(config)
    del values["seed"]
    if values["split"] is not None:  # goes with the seed: replicates differ in both
        values["split"] = "random"
    segments = [s for s in values.pop("schedule")["segments"] if s["iterations"]]
    if any(segment["sparse"] for segment in segments):
        values["schedule"] = segments
    else:
        values["schedule"] = sum(segment["iterations"] for segment in segments)
        # Whole channels take another path through the network: the same to rounding only.
        kept = {"structured"} | ({"layers", "prune_head"} if values["mgaug"] else set())
        values = {k: v for k, v in values.items() if k not in MASKS or k in kept}
    if values["backbone"] == "resnet12":
        del values["channels"]
    return values


def shared_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What runs must share to be compared: all but the method and its rivals, and the seed."""
    values = identity(config)
    schedule = values.pop("schedule")
    length = schedule if isinstance(schedule, int) else sum(s["iterations"] for s in schedule)
    if values["select"] == "last":
        values = {key: value for key, value in values.items() if key not in _WATCHING}
    else:  # as many weights to choose from, whatever the length
        values["points"] = -(-length // values.pop("eval_every"))
    return {k: v for k, v in values.items() if k not in ("name", *MASKS, *REGULARISERS, *RIVALS)}


def has_rival(values: dict[str, Any]) -> bool:
    """Whether one of :data:`RIVALS` acts, so that the run is no baseline for others."""
    return bool(values["drop_grad"] or values["mgaug"]) or values["dropout_per"] == "task"


def varying(settings: Iterable[dict[str, Any]]) -> list[str]:
    """The names whose values are not the same in all of ``settings``, in their order there.

    A name that some do not have counts, as a setting that only a newer version knows.
    """
    settings = list(settings)
    names = dict.fromkeys(name for values in settings for name in values)

    def found(name: str) -> set[Hashable]:
        holders = [v for v in settings if name in v] if name in _IF_CHOSEN else settings
        return {frozen(values.get(name, ...)) for values in holders}

    return [name for name in names if len(found(name)) > 1]


def train_shots_aside(settings: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """``settings`` without ``train_shots``, where it follows ``shots`` in all of them."""
    settings = list(settings)
    if any(values["train_shots"] != values["shots"] for values in settings):
        return settings
    return [{k: v for k, v in values.items() if k != "train_shots"} for values in settings]


def frozen(value: Any) -> Hashable:
    """Plain values as they can be compared and be a key."""
    if isinstance(value, dict):
        return tuple(sorted((key, frozen(held)) for key, held in value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(frozen(held) for held in value)
    return value  # type: ignore[no-any-return]


def in_words(name: str, value: Any) -> str:
    """A setting for tables: ``"inner_lr 0.01"``, ``"decay 1"``, ``"compile no"``."""
    if name == "schedule":
        return _schedule_in_words(value)
    if isinstance(value, bool):
        value = "yes" if value else "no"
    elif isinstance(value, float):
        value = f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return f"{REGULARISERS.get(name, name)} {'unset' if value is None else value}"


def _schedule_in_words(segments: int | list[dict[str, Any]]) -> str:
    """Lengths, phases and sparsities: ``"12 pretrain + 24 prune (50%) + 4 retrain"``."""
    if isinstance(segments, int):
        return f"{segments} iterations"
    parts = []
    for segment in segments:
        part = f"{segment['iterations']} {segment['phase']}"
        if segment["round"]:
            part += f" {segment['round']}"
        if segment["sparse"]:
            part += f" ({_kept_in_words(segment)})"
        parts.append(part)
    return " + ".join(parts)


def _kept_in_words(segment: dict[str, Any]) -> str:
    if kept := segment.get("keep"):
        return ", ".join(f"{name} keeps {count}" for name, count in kept)
    if isinstance(segment["sparsity"], list):
        return ", ".join(f"{name} {100 * rate:.10g}%" for name, rate in segment["sparsity"])
    return f"{100 * segment['sparsity']:.10g}%"
