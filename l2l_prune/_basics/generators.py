"""Sources of randomness: their check, their state, where they draw; `checks` knows no torch."""

from __future__ import annotations

from typing import Any

import torch

from l2l_prune._basics import checks


def check_generator(generator: object) -> torch.Generator:
    """``generator``, if it is a generator on the CPU, so that all devices get the same draws.

    Raises:
        TypeError: If it is none, say a seed, or elsewhere.
    """
    found = checks.of_type("generator", generator, torch.Generator, "a torch.Generator")
    if found.device.type != "cpu":
        raise TypeError(f"generator must be on the CPU, not on {found.device}")
    return found


def restore(generator: torch.Generator, state: Any, owner: str) -> None:
    """Go on from the state dict ``state``, which holds ``"generator"``; ``owner`` is for messages.

    Raises:
        ValueError: If it is no such state; nothing is changed then.
    """
    try:
        generator.set_state(state["generator"].cpu())
    except (AttributeError, KeyError, RuntimeError, TypeError):
        raise ValueError(
            f"this is not {owner} state dict: give what its state_dict() returned"
        ) from None


def drawn_by(generator: torch.Generator | None) -> dict[str, Any]:
    """Keywords of torch's random functions: draw where the generator is, on the CPU without one."""
    return {"generator": generator, "device": "cpu" if generator is None else generator.device}
