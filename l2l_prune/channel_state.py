"""What a ChannelPruner's state dict must be before anything is changed by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from l2l_prune.channels import ChannelGroup
from l2l_prune.segments import Schedule

CHANNEL_STATE_VERSION = 1


def check_channel_state(
    state: Any,
    schedule: Schedule,
    groups: Sequence[ChannelGroup],
    counts: Sequence[list[int] | None],
    shapes: Mapping[str, torch.Size],
) -> None:
    """Refuse a state of another model or schedule.

    Args:
        state: What ``ChannelPruner.state_dict()`` gave.
        schedule: The ChannelPruner's.
        groups: All groups of its network.
        counts: How many channels of each stay, by segment.
        shapes: The full shapes of all tensors that hold channels, by name.

    Raises:
        ValueError: Naming what does not fit.
    """
    keys = {"version", "schedule", "iteration", "kept", "full", "regrown"}
    if (
        not isinstance(state, dict)
        or set(state) != keys
        or state["version"] != CHANNEL_STATE_VERSION
    ):
        raise ValueError("this is not a ChannelPruner state dict of this version")
    if state["schedule"] != schedule.to_dict():
        raise ValueError(f"the checkpoint belongs to another schedule: {state['schedule']}")
    kept, wanted = state["kept"], counts[schedule.index(state["iteration"])]
    if not isinstance(kept, (list, type(None))) or not isinstance(state["full"], dict):
        raise ValueError("this is not a ChannelPruner state dict of this version")
    if (kept is None) != (wanted is None) or len(kept or ()) != len(wanted or ()):
        raise ValueError("the checkpoint's channels do not fit this model and schedule")
    for group, index, count in zip(groups, kept or (), wanted or (), strict=False):
        if index.tolist() != sorted({int(i) % group.channels for i in index}):
            raise ValueError(f"the checkpoint's channels of {group.name} are not its channels")
        if len(index) != count:
            raise ValueError(
                f"the checkpoint keeps {len(index)} channels of {group.name}, the schedule "
                f"{count} at iteration {state['iteration']}"
            )
    for entry in ("full", "regrown"):
        for name, tensor in state[entry].items():
            if shapes.get(name) != tensor.shape:
                raise ValueError(f"the checkpoint's {entry} tensor {name} does not fit")
