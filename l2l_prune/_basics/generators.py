"""The check of a source of randomness; `checks` knows no torch."""

from __future__ import annotations

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
