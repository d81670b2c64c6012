"""What the state dict of a PrunedReptile must be, beside the model's and the Pruner's."""

from __future__ import annotations

from typing import Any

from torch import nn


def check_reptile_state(state: Any, parameters: dict[str, nn.Parameter], shapes: bool) -> None:
    """Refuse a state that is not one of these parameters.

    Args:
        state: What ``get_extra_state()`` may have given.
        parameters: The meta-model's, by name.
        shapes: Whether the collected tensors must have the parameters' shapes now.

    Raises:
        ValueError: Naming what does not fit.
    """
    keys = {"pruner", "inner_state", "collected", "tasks"}
    if not isinstance(state, dict) or set(state) != keys:
        raise ValueError("this is not a PrunedReptile state dict of this version")
    tasks, collected, inner = (state[key] for key in ("tasks", "collected", "inner_state"))
    if not isinstance(collected, list) or not isinstance(inner, list):
        raise ValueError("this is not a PrunedReptile state dict of this version")
    if type(tasks) is not int or tasks < 0:
        raise ValueError(f"the checkpoint's tasks must be a number >= 0, got {tasks!r}")
    if len(collected) != (len(parameters) if tasks else 0):
        raise ValueError(f"the checkpoint has {len(collected)} collected tensors of {tasks} tasks")
    if len(inner) not in (0, len(parameters)):
        raise ValueError(f"the checkpoint's inner_state is of {len(inner)} parameters")
    if not shapes:
        return
    for (name, parameter), total in zip(parameters.items(), collected, strict=False):
        if total.shape != parameter.shape:
            raise ValueError(f"the checkpoint's collected weights do not fit {name}")
