"""How pruned weights are shared among layers: alike, by size (ERK), or in one ranking of all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from l2l_prune._basics import checks
from l2l_prune.masking.layers import Layers, Rule, select
from l2l_prune.masking.prunable import LayerTensor
from l2l_prune.masking.topk import kept_count, top_mask
from l2l_prune.schedules.schedule import Segment

Allocation: TypeAlias = Literal["layerwise", "global"]
"""``"layerwise"``: each tensor keeps its own number of weights, as in the paper. ``"global"``: the
scores of all selected tensors are ranked together."""


def erk(
    model: nn.Module,
    sparsity: float,
    *,
    layers: Layers = "all",
    only: Rule | Iterable[Rule] | None = None,
    skip: Rule | Iterable[Rule] | None = None,
) -> dict[str, float]:
    """Erdős-Rényi-kernel sparsities: large layers are pruned more than small ones.

    A layer keeps a fraction in proportion to the sum of its dimensions over their product; layers
    that would keep more than all stay dense, and the others make up for it.

    Args:
        model: The module that will be pruned, before a Pruner is attached.
        sparsity: Fraction of all selected weights to prune, in [0, 1).
        layers: As in :class:`~l2l_prune.Pruner`, likewise ``only`` and ``skip``.
        only: See ``layers``.
        skip: See ``layers``.

    Returns:
        Sparsity by tensor name: the ``sparsity=`` of a schedule.

    Raises:
        TypeError: If ``model`` is no module, or ``sparsity`` no number.
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
    density = 1 - checks.fraction("sparsity", sparsity)
    tensors = select(model, layers=layers, only=only, skip=skip)
    shapes = {t.full_name: t.shape for t in tensors}
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    shares = {name: sum(shape) / prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        others = [name for name in shapes if name not in dense]
        budget = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        scale = budget / sum(shares[name] * sizes[name] for name in others) if others else 0.0
        full = {name for name in others if scale * shares[name] >= 1}
        if not full:
            break
        dense |= full
    return {name: 0.0 if name in dense else 1 - scale * shares[name] for name in shapes}


def global_count(tensors: Sequence[LayerTensor], segment: Segment) -> int:
    """How many weights all tensors together keep in ``segment``.

    Raises:
        ValueError: If the segment gives sparsities or counts by layer, or keeps less than a weight
            for each.
    """
    total = sum(tensor.shape.numel() for tensor in tensors)
    if not segment.sparse:
        return total
    if segment.keep is not None or isinstance(segment.sparsity, tuple):
        raise ValueError('allocation="global" takes one sparsity for all layers, none by layer')
    keep = kept_count(total, float(segment.sparsity))  # type: ignore[arg-type]
    if keep < len(tensors):
        raise ValueError(
            f"sparsity {segment.sparsity} leaves {keep} weights for {len(tensors)} layers: lower it"
        )
    return keep


def global_masks(scores: Sequence[Tensor], keep: int) -> list[Tensor]:
    """Masks of the ``keep`` largest scores of all tensors together.

    The best weight of each tensor stays whatever the others have, so that no layer is cut through.

    Args:
        scores: One real tensor a layer, of any shapes.
        keep: Number of True entries wanted over all, >= ``len(scores)``.

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
