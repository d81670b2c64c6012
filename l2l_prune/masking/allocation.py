"""How pruning is shared among layers: equally, by size (ERK), or in one ranking of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from math import prod
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from l2l_prune._basics import checks
from l2l_prune.masking.layers import Layers, Rule, segment_counts, select
from l2l_prune.masking.patterns import Pattern
from l2l_prune.masking.prunable import LayerTensor
from l2l_prune.masking.topk import kept_count, top_mask
from l2l_prune.schedules.schedule import Segment

Allocation: TypeAlias = Literal["layerwise", "erk", "global"]
"""``"layerwise"``: each tensor is pruned at the schedule's sparsity, as in the paper. ``"erk"``:
large tensors are pruned more than small ones (:func:`erk`), with that sparsity over all.
``"global"``: the scores of all tensors are ranked together."""
ALLOCATIONS = get_args(Allocation)


def erk(
    model: nn.Module,
    sparsity: float,
    *,
    layers: Layers = "all",
    only: Rule | Iterable[Rule] | None = None,
    skip: Rule | Iterable[Rule] | None = None,
) -> dict[str, float]:
    """Erdős-Rényi-kernel sparsities: large layers are pruned more than small ones.

    The fraction that a layer keeps is proportional to the sum of its dimensions over their product.
    Layers that would keep more than all their weights stay dense; the others make up for it.

    Args:
        model: The module that will be pruned, before a Pruner is attached.
        sparsity: Fraction of all selected weights to prune, in [0, 1).
        layers: As in :class:`~l2l_prune.Pruner`.
        only: As in :class:`~l2l_prune.Pruner`.
        skip: As in :class:`~l2l_prune.Pruner`.

    Returns:
        Sparsity by tensor name, for the ``sparsity=`` of a schedule. A Pruner with
        ``allocation="erk"`` computes the same for each of its segments.

    Raises:
        TypeError: If ``model`` is not a module, or ``sparsity`` not a number.
        ValueError: If ``sparsity`` is out of range, or nothing can be pruned.

    Examples:
        >>> net = nn.Sequential(nn.Linear(100, 50), nn.Linear(50, 5))
        >>> {name: round(rate, 3) for name, rate in erk(net, 0.5).items()}
        {'0.weight': 0.525, '1.weight': 0.0}

    Source:
        Evci et al., *Rigging the Lottery: Making All Tickets Winners*, ICML 2020, Section 3;
        for linear layers Mocanu et al., *Scalable training of artificial neural networks with
        adaptive sparse connectivity*, Nature Communications 2018, Equation 1.
    """
    checks.of_type("model", model, nn.Module, "a torch.nn.Module")
    checks.fraction("sparsity", sparsity)
    return _erk_rates(select(model, layers=layers, only=only, skip=skip), sparsity)


def kept_counts(
    tensors: Sequence[LayerTensor], segment: Segment, allocation: Allocation, pattern: Pattern
) -> list[int]:
    """How many weights each tensor keeps in ``segment``; with ``"global"``, all together.

    Args:
        tensors: The selected tensors.
        segment: A segment of a schedule; dense ones keep everything.
        allocation: How pruning is shared among the tensors.
        pattern: Where pruned weights may lie.

    Returns:
        One count per tensor, or a single one with ``"global"``.

    Raises:
        ValueError: If the segment does not fit the tensors or the allocation.
    """
    by_layer = segment.keep is not None or isinstance(segment.sparsity, tuple)
    if allocation != "layerwise" and segment.sparse and by_layer:
        raise ValueError(
            f'allocation="{allocation}" shares one sparsity among the layers: the schedule must '
            "not give sparsities or counts by layer"
        )
    if allocation == "global":
        return [_global_count(tensors, segment)]
    if allocation == "erk" and segment.sparse:
        rates = _erk_rates(tensors, float(segment.sparsity))  # type: ignore[arg-type]
        segment = dataclasses.replace(segment, sparsity=rates)
    return segment_counts(tensors, segment, pattern)


def _erk_rates(tensors: Sequence[LayerTensor], sparsity: float) -> dict[str, float]:
    shapes = {t.full_name: t.shape for t in tensors}
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    shares = {name: sum(shape) / prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        others = [name for name in shapes if name not in dense]
        budget = (1 - sparsity) * sum(sizes.values()) - sum(sizes[name] for name in dense)
        scale = budget / sum(shares[name] * sizes[name] for name in others) if others else 0.0
        full = {name for name in others if scale * shares[name] >= 1}
        if not full:
            break
        dense |= full
    return {name: 0.0 if name in dense else 1 - scale * shares[name] for name in shapes}


def _global_count(tensors: Sequence[LayerTensor], segment: Segment) -> int:
    total = sum(tensor.shape.numel() for tensor in tensors)
    keep = kept_count(total, float(segment.sparsity)) if segment.sparse else total  # type: ignore[arg-type]
    if keep < len(tensors):
        raise ValueError(
            f"sparsity {segment.sparsity} leaves {keep} weights for {len(tensors)} layers: lower it"
        )
    return keep


def global_masks(scores: Sequence[Tensor], keep: int) -> list[Tensor]:
    """Masks that keep the ``keep`` largest scores of all tensors together.

    The best weight of each tensor always stays, so that no layer is pruned away.

    Args:
        scores: One real tensor per layer, of any shape.
        keep: Number of True entries wanted in all, >= ``len(scores)``.

    Returns:
        A boolean tensor for each of ``scores``.

    Raises:
        ValueError: If scores hold NaN or infinity.

    Examples:
        >>> masks = global_masks([torch.tensor([5.0, 4.0]), torch.tensor([1.0, 0.0])], 3)
        >>> [mask.tolist() for mask in masks]
        [[True, True], [True, False]]
    """
    device = scores[0].device
    wide = torch.float64 if any(s.dtype == torch.float64 for s in scores) else torch.float32
    flat = torch.cat([s.detach().reshape(-1).to(device, wide) for s in scores])
    kept = torch.cat([top_mask(part, 1).reshape(-1).to(device) for part in scores])
    kept[~kept] = top_mask(flat[~kept], keep - len(scores))
    pieces = torch.split(kept, [part.numel() for part in scores])
    return [p.view(s.shape).to(s.device) for p, s in zip(pieces, scores, strict=True)]
