"""What the ranks of a torch.distributed group exchange; without a group, nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks over which DistributedDataParallel trains a model, if it does."""
    wrapped = (m for m in model.modules() if isinstance(m, DistributedDataParallel))
    found = next(wrapped, None)
    return None if found is None else found.process_group


@torch.no_grad()
def take_first(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Give every rank the first rank's values."""
    if group is None:
        return
    source = dist.get_global_rank(group, 0)
    for tensor in tensors:
        dist.broadcast(tensor, source, group=group)


@torch.no_grad()
def total(scores: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of scores or gradients over the ranks, with the same bits on each rank.

    In float64, so that scores that are equal on all ranks keep their order in the sum.
    """
    if group is None:
        return scores
    wide = torch.promote_types(scores.dtype, torch.float64)
    summed = scores.detach().to(wide, copy=True, memory_format=torch.contiguous_format)
    dist.all_reduce(summed, group=group)
    return summed


@contextmanager
def failing_together(group: dist.ProcessGroup | None, device: torch.device) -> Iterator[None]:
    """Make an error on one rank an error on all; otherwise the others would wait for ever.

    Args:
        group: The ranks.
        device: A device whose tensors the group can exchange.

    Raises:
        RuntimeError: On the ranks without an error of their own.
    """
    if group is None:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    failed = torch.tensor([dist.get_rank() + 1 if own else 0], device=device)
    dist.all_reduce(failed, dist.ReduceOp.MAX, group=group)
    if own is not None:
        raise own
    if int(failed):
        raise RuntimeError(f"rank {int(failed) - 1} of the group failed: see its error")


def check_same_iteration(
    iteration: int, group: dist.ProcessGroup | None, device: torch.device
) -> None:
    """Refuse to go on if the ranks are at different iterations.

    Raises:
        RuntimeError: On all ranks.
    """
    if group is None:
        return
    ends = torch.tensor([iteration, -iteration], device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
    last, first = ends.tolist()
    if last != -first:
        raise RuntimeError(
            f"the ranks are at iterations {-first} to {last}: load the checkpoint on all of them, "
            "and call step() equally often on each"
        )


@torch.no_grad()
def check_same(
    values: Mapping[str, Tensor],
    iteration: int,
    group: dist.ProcessGroup | None,
    *,
    what: str = "masks",
    advice: str = "the weights, and any masks that are given, must be the same on all of them",
) -> None:
    """Refuse masks (or weights, or which channels stay) that are not the same on all ranks.

    Args:
        values: Tensors by name, with the same names and shapes on all ranks; NaN equals NaN.
        iteration: The iteration at which they are due.
        group: The ranks.
        what: What they are, for the error.
        advice: What to do, for the error.

    Raises:
        RuntimeError: On all ranks, with the names of those that differ.
    """
    if group is None:
        return
    device = next(iter(values.values())).device
    check_same_iteration(iteration, group, device)
    differs = torch.zeros(len(values), dtype=torch.int32, device=device)
    for number, value in enumerate(values.values()):
        first = value.clone(memory_format=torch.contiguous_format)
        take_first([first], group)
        differs[number] = ((first != value) & ((first == first) | (value == value))).any()
    dist.all_reduce(differs, dist.ReduceOp.MAX, group=group)
    if names := [n for n, d in zip(values, differs.tolist(), strict=True) if d]:
        raise RuntimeError(
            f"the {what} of {', '.join(names)} differ between the ranks at iteration {iteration}: "
            f"{advice}"
        )


@torch.no_grad()
def sum_over_ranks(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Replace tensors by their sums over the ranks, in one message for each type.

    Args:
        tensors: Tensors with the same shapes on all ranks.
        group: The ranks.
    """
    # Step counts may be on the CPU while weights are on a GPU, the only device nccl knows.
    device = next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)
    kinds = list(dict.fromkeys(tensor.dtype for tensor in tensors))
    for kind in kinds:
        mine = [tensor for tensor in tensors if tensor.dtype == kind]
        flat = torch.cat([tensor.flatten().to(device) for tensor in mine])
        dist.all_reduce(flat, group=group)
        parts = torch.split(flat, [tensor.numel() for tensor in mine])
        for tensor, part in zip(mine, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))


@torch.no_grad()
def average_states(
    states: Sequence[dict[str, Any]], weight: int, group: dist.ProcessGroup, device: torch.device
) -> None:
    """Replace optimizer states by their mean over the ranks, weighted by ``weight``.

    A parameter that only some ranks have trained has a state only there: the mean is over these
    ranks, and the others take it over.

    Args:
        states: A dict for each parameter; empty where this rank has not trained it.
        weight: How many tasks this rank's states have seen last.
        group: The ranks.
        device: A device whose tensors the group can exchange.
    """
    held = torch.tensor([*(weight if state else 0 for state in states), weight], device=device)
    dist.all_reduce(held, group=group)
    *weights, everyone = held.tolist()
    if any(0 < some < everyone for some in weights):
        _take_over_missing(states, group, device)
    summed = [
        (value, total)
        for state, total in zip(states, weights, strict=True)
        for value in state.values()
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
    if not summed:
        return
    for tensor, _ in summed:
        tensor.mul_(weight)
    sum_over_ranks([tensor for tensor, _ in summed], group)
    for tensor, total in summed:
        tensor.div_(total)


def _take_over_missing(
    states: Sequence[dict[str, Any]], group: dist.ProcessGroup, device: torch.device
) -> None:
    """Fill states that only other ranks have with zeros, which add nothing to a sum."""
    mine = [
        {
            k: torch.empty_like(v, device="meta") if isinstance(v, Tensor) else v
            for k, v in s.items()
        }
        for s in states
    ]
    of_all: list[list[dict[str, Any]]] = [mine] * dist.get_world_size(group)
    dist.all_gather_object(of_all, mine, group=group)
    for state, *theirs in zip(states, *of_all, strict=True):
        if state:
            continue
        for key, value in next((s for s in theirs if s), {}).items():
            state[key] = value
            if isinstance(value, Tensor):
                where = device if value.dim() else "cpu"  # optimizers count on the CPU
                state[key] = torch.zeros_like(value, device=where)
