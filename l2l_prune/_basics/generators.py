"""Sources of randomness: their check, and where they draw; `checks` knows no torch."""

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


def drawn_by(generator: torch.Generator | None) -> dict[str, Any]:
    """Keywords of torch's random functions: draw where the generator is, on the CPU without one."""
    return {"generator": generator, "device": "cpu" if generator is None else generator.device}
