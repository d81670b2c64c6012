"""Reptile over several processes: what the ranks of a torch.distributed group say to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def same_start(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Every rank starts from the first one's values (parameters and buffers)."""
    source = dist.get_global_rank(group, 0)
    for tensor in tensors:
        dist.broadcast(tensor, source, group=group)


@torch.no_grad()
def sum_over_ranks(tensors: Sequence[Tensor], count: int, group: dist.ProcessGroup) -> int:
    """Replace tensors by their sums over the ranks, in one message for each type.

    Args:
        tensors: Of the same shapes on all ranks.
        count: A number, summed likewise.
        group: The ranks.

    Returns:
        The sum of ``count``.
    """
    # Counts of steps may be on the CPU beside weights on a GPU, the only place nccl knows.
    device = next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)
    kinds = list(dict.fromkeys(tensor.dtype for tensor in tensors))
    for kind in kinds:
        mine = [tensor for tensor in tensors if tensor.dtype == kind]
        flat = torch.cat([tensor.flatten().to(device) for tensor in mine])
        dist.all_reduce(flat, group=group)
        parts = torch.split(flat, [tensor.numel() for tensor in mine])
        for tensor, part in zip(mine, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))
    total = torch.tensor([count], device=device)
    dist.all_reduce(total, group=group)
    return int(total)


@torch.no_grad()
def average_states(states: Sequence[dict[str, Any]], weight: int, group: dist.ProcessGroup) -> None:
    """Optimizer states become their mean over the ranks, weighted by ``weight`` (0: no say).

    Args:
        states: A dict a parameter, with the same tensors on all ranks that have a weight.
        weight: How many tasks this rank's states have seen last, or 0.
        group: The ranks.
    """
    held = [
        v for s in states for v in s.values() if isinstance(v, Tensor) and v.is_floating_point()
    ]
    if not held:
        return
    for tensor in held:
        tensor.mul_(weight)
    total = sum_over_ranks(held, weight, group)
    for tensor in held:
        tensor.div_(total)
