"""How many channels of each group stay in a segment, and which when that is due."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from l2l_prune.channels import ChannelGroup, Importance, check_names
from l2l_prune.masks import kept_count, top_mask
from l2l_prune.segments import Segment


def channel_counts(groups: Sequence[ChannelGroup], segment: Segment) -> list[int] | None:
    """How many channels each group keeps in a segment; None in a dense one.

    Raises:
        ValueError: If the segment names no layer that there is, or would leave one no channel.
    """
    if not segment.sparse:
        return None
    keep, rates = dict(segment.keep or ()), segment.sparsity
    table = dict(rates) if isinstance(rates, tuple) else {"*": float(rates)}  # type: ignore[arg-type]
    check_names([group.name for group in groups], (*keep, *table))
    counts = []
    for group in groups:
        explicit = next((n for p, n in keep.items() if fnmatchcase(group.name, p)), None)
        rate = next((r for p, r in table.items() if fnmatchcase(group.name, p)), 0.0)
        count = kept_count(group.channels, rate) if explicit is None else int(explicit)
        if not 0 < count <= group.channels:
            raise ValueError(
                f"{group.name} has {group.channels} channels and would keep {count}: change the "
                "sparsity for this layer, or leave it out with skip="
            )
        counts.append(count)
    return counts


def choose_channels(
    groups: Sequence[ChannelGroup],
    counts: Sequence[int],
    importance: Importance,
    *,
    needs_gradients: bool = False,
    before: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The channels of each group that stay, as sorted positions.

    Args:
        groups: All groups of the network, which has its full shapes.
        counts: How many of each stay.
        importance: Gives a score a channel.
        needs_gradients: Refuse weights without gradients, from which the scores are made.
        before: What stayed in the segment before, if that was sparse: gone stays gone.

    Raises:
        ValueError: If the scores cannot be told or do not fit; the layer is named.
    """
    chosen = []
    for number, (group, keep) in enumerate(zip(groups, counts, strict=True)):
        if needs_gradients and any(
            slot.tensor == "weight" and slot.module.weight.grad is None for slot in group.slots
        ):
            raise ValueError(
                f"Taylor importance needs gradients of {group.name} and the layers behind it: "
                "call step() after a backward pass and before zero_grad()"
            )
        scores = importance(group.source)
        if not isinstance(scores, Tensor) or scores.shape != (group.channels,):
            raise ValueError(
                f"the importance of the channels of {group.name} is {scores!r}: there must be "
                f"{group.channels} scores (bn_scale needs batch normalisation behind a layer)"
            )
        if not bool(torch.isfinite(scores).all()):
            raise ValueError(f"the importance of the channels of {group.name} is not finite")
        scores = scores.detach().float()
        if before is not None:
            absent = torch.ones_like(scores, dtype=torch.bool)
            absent[before[number]] = False
            scores = scores.masked_fill(absent, torch.finfo(scores.dtype).min)
        chosen.append(top_mask(scores, keep).nonzero().squeeze(1))
    return chosen
