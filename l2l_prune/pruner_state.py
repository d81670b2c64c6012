"""What a Pruner's state dict must be before anything is changed by it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l2l_prune.masking.prunable import LayerTensor
from l2l_prune.schedules.schedule import Schedule

STATE_VERSION = 2


def check_state(
    state: dict[str, Any], schedule: Schedule, pattern: str, tensors: dict[str, LayerTensor]
) -> None:
    """Refuse a state of another model or schedule: all but its counts, which the Pruner knows.

    Args:
        state: What ``Pruner.state_dict()`` gave.
        schedule: The Pruner's.
        pattern: The Pruner's, in words.
        tensors: The selected tensors by their dense names.

    Raises:
        ValueError: Naming what does not fit.
    """
    keys = {"version", "schedule", "pattern", "iteration", "masks", "regrown"}
    if not isinstance(state, dict) or set(state) != keys or state["version"] != STATE_VERSION:
        raise ValueError("this is not a Pruner state dict of this version")
    if type(state["iteration"]) is not int or state["iteration"] < 0:
        raise ValueError(f"the checkpoint's iteration is {state['iteration']!r}")
    if state["schedule"] != schedule.to_dict():
        raise ValueError(
            f"the checkpoint belongs to another schedule: {state['schedule']}, "
            f"but this Pruner has {schedule.to_dict()}"
        )
    if state["pattern"] != pattern:
        raise ValueError(f"the checkpoint has masks of {state['pattern']}, this Pruner {pattern}")
    for entry in ("masks", "regrown"):
        if not isinstance(state[entry], dict):
            raise ValueError(f"the checkpoint's {entry} must be masks by name")
    if unknown := sorted(set(state["regrown"]) - set(tensors)):
        raise ValueError(f"the checkpoint's regrown weights are of other tensors: {unknown}")
    if set(state["masks"]) != set(tensors):
        differing = sorted(set(state["masks"]) ^ set(tensors))
        raise ValueError(f"the checkpoint prunes other tensors; they differ in {differing}")
    for entry, called in (("masks", "mask"), ("regrown", "regrown mask")):
        for name, mask in state[entry].items():
            shape = tensors[name].shape
            if not isinstance(mask, Tensor) or mask.shape != shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"the checkpoint's {called} of {name} does not fit its shape {tuple(shape)}"
                )
