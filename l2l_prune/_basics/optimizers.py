"""What an optimizer holds."""

from __future__ import annotations

from torch.optim import Optimizer


def held_ids(optimizer: Optimizer) -> set[int]:
    """The ``id()`` of each parameter that an optimizer steps on."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
