"""Masks by the dense names of their tensors: shown as a table, replaced, read from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from l2l_prune._basics import checks
from l2l_prune.masking.prunable import LayerTensor


def mask_table(tensors: Sequence[LayerTensor], masks: Sequence[Tensor], model: nn.Module) -> str:
    """Shape, kept / total and sparsity of each masked tensor, of all of them and of the model.

    Beside them how many outputs (channels or neurons) have lost all of their weights.
    """
    from tabulate import tabulate

    rows: list[tuple[str, str, str, str, str]] = []
    pruned = 0
    for tensor, mask in zip(tensors, masks, strict=True):
        kept, total = int(mask.sum()), mask.numel()
        pruned += total - kept
        outputs = tensor.swapped(mask).flatten(1).any(dim=1) if mask.dim() > 1 else mask
        lost = f"{int((~outputs).sum())}/{len(outputs)}"
        counts = (f"{kept}/{total}", _share(kept, total), lost)
        rows.append((tensor.full_name, str(tuple(mask.shape)), *counts))
    selected = sum(mask.numel() for mask in masks)
    whole = sum(p.numel() for p in model.parameters())
    for name, total in (("selected layers", selected), ("whole model", whole)):
        rows.append((name, "", f"{total - pruned}/{total}", _share(total - pruned, total), ""))
    return tabulate(rows, headers=("tensor", "shape", "kept/total", "pruned", "outputs lost"))


def updated(masks: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``masks``, with those in ``changed`` in place of the old ones.

    Raises:
        TypeError: If ``changed`` does not give tensors by name.
        ValueError: If a name is unknown, or a mask is not boolean or does not fit; names it.
    """
    new = dict(masks)
    checks.of_type("masks", changed, Mapping, "a dict of boolean tensors by name")  # type: ignore[type-abstract]
    for name, mask in changed.items():
        checks.of_type(f"the mask of {name}", mask, Tensor, "a boolean tensor")
        if name not in new:
            raise ValueError(f"{name!r} is not one of the pruned tensors: {', '.join(new)}")
        if mask.dtype != torch.bool or mask.shape != new[name].shape:
            raise ValueError(
                f"the mask of {name} must be boolean and of shape {tuple(new[name].shape)}"
            )
        new[name] = mask.to(new[name].device, copy=True)  # the caller may go on writing to it
    return new


def check_saved(state: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> None:
    """Refuse a checkpoint whose ``"masks"``, ``"regrown"`` or ``"stepped"`` do not fit.

    Args:
        state: A Pruner's state, in which released entries are called ``"regrown"``.
        shapes: The shapes of all pruned tensors, by name.

    Raises:
        ValueError: Naming the tensor or entry that does not fit.
    """
    for entry in ("masks", "regrown"):
        if not isinstance(state[entry], dict):
            raise ValueError(f"the checkpoint's {entry!r} must be a dict of masks by name")
    stepped = state.get("stepped", [])
    if not isinstance(stepped, list) or not all(
        isinstance(step, list) and [type(value) for value in step] == [str, int, bool]
        for step in stepped
    ):
        raise ValueError("the checkpoint's 'stepped' must be a list of [name, number, flag]")
    if unknown := sorted(set(state["regrown"]) - set(shapes)):
        raise ValueError(f"the checkpoint's regrown weights belong to other tensors: {unknown}")
    if differing := sorted(set(state["masks"]) ^ set(shapes)):
        raise ValueError(f"the checkpoint prunes other tensors; they differ in {differing}")
    for entry, called in (("masks", "mask"), ("regrown", "regrown mask")):
        for name, mask in state[entry].items():
            shape = shapes[name]
            if not isinstance(mask, Tensor) or mask.shape != shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"the checkpoint's {called} of {name} does not fit its shape {tuple(shape)}"
                )


def restored(saved: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of saved masks in the order of ``weights``, each on the device of its weight."""
    return {
        name: saved[name].to(weight.device, copy=True)
        for name, weight in weights.items()
        if name in saved
    }


def _share(kept: int, total: int) -> str:
    return f"{100 * (total - kept) / total:.1f}%"
