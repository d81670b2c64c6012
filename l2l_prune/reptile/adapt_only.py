"""Which parameters of a learner adapt to a task, if not all do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import Tensor, nn

from l2l_prune._basics import checks
from l2l_prune.masking.layers import Rule, read_rules

AdaptOnly: TypeAlias = Rule | Iterable[Rule] | Mapping[str, Sequence[int] | None]


def chosen_parameters(model: nn.Module, adapt_only: AdaptOnly) -> dict[str, Tensor | None]:
    """The parameters that adapt, by name.

    Args:
        model: The learner's plain module.
        adapt_only: Names (of a parameter, of its layer, or of a module around it), ``fnmatch``
            patterns of such names, module types, or predicates ``(name, module) -> bool`` of the
            layer. Or a mapping from names of layers to the output channels that adapt, ``None``
            for all.

    Returns:
        For each parameter that adapts ``None``, or which of its entries do: boolean, broadcast from
        its first dimension.

    Raises:
        TypeError: If anything else is given.
        ValueError: If a name matches no parameter, a channel does not exist, or nothing would
            adapt.
    """
    if isinstance(adapt_only, Mapping):
        chosen = _of_channels(model, adapt_only)
    else:
        chosen = _of_rules(model, read_rules("adapt_only", adapt_only, model))
    if not any(model.get_parameter(name).requires_grad for name in chosen):
        raise ValueError("adapt_only leaves no parameter to adapt")
    return chosen


def _of_rules(model: nn.Module, rules: Sequence[Rule]) -> dict[str, Tensor | None]:
    layers = dict(model.named_modules(remove_duplicate=False))
    used: set[str] = set()
    chosen: dict[str, Tensor | None] = {}
    first = _first_names(model)
    for full_name, parameter in model.named_parameters(remove_duplicate=False):
        path = full_name.rpartition(".")[0]
        for rule in rules:
            if isinstance(rule, str):
                hit = any(fnmatchcase(name, rule) for name in _names(full_name))
                used |= {rule} if hit else set()
            elif isinstance(rule, type):
                hit = isinstance(layers[path], rule)
            else:
                hit = bool(rule(path, layers[path]))
            if hit:
                chosen[first[parameter]] = None
    for rule in rules:
        if isinstance(rule, str) and rule not in used:
            raise ValueError(_unknown(model, rule))
    return chosen


def _of_channels(
    model: nn.Module, table: Mapping[str, Sequence[int] | None]
) -> dict[str, Tensor | None]:
    layers, first = dict(model.named_modules(remove_duplicate=False)), _first_names(model)
    chosen: dict[str, Tensor | None] = {}
    for name, channels in checks.pairs("adapt_only", table).items():
        layer = layers.get(name)
        own = dict(layer.named_parameters(recurse=False)) if layer is not None else {}
        if channels is None:
            found = _of_rules(model, [name])
            chosen.update(found)
            continue
        if layer is None or not own:
            raise ValueError(_unknown(model, name))
        count = output_channels(layer)
        if count is None:
            raise ValueError(
                f"adapt_only cannot choose channels of {name}, a {type(layer).__name__}, which "
                "does not hold its output channels first; give None for the whole layer"
            )
        keep = torch.zeros(count, dtype=torch.bool, device="cpu")
        for channel in channels:
            index = checks.whole_number(f"adapt_only[{name!r}]", channel)
            if index >= count:
                raise ValueError(
                    f"adapt_only[{name!r}] names channel {index}, but there are {count}"
                )
            keep[index] = True
        if not bool(keep.any()):
            raise ValueError(f"adapt_only[{name!r}] names no channel: leave the layer out")
        for parameter in own.values():
            chosen[first[parameter]] = keep.view([-1] + [1] * (parameter.dim() - 1)).to(
                parameter.device
            )
    return chosen


def output_channels(layer: nn.Module) -> int | None:
    """The number of a layer's output channels; ``None`` if they are not the first dimension."""
    counts = {len(p) if p.dim() else 0 for p in layer.parameters(recurse=False)}
    if len(counts) != 1 or counts == {0} or getattr(layer, "transposed", False):
        return None
    return counts.pop()


def _first_names(model: nn.Module) -> dict[Tensor, str]:
    """The name under which learners know a parameter: the first of those that are tied."""
    return {parameter: name for name, parameter in model.named_parameters()}


def _names(full_name: str) -> list[str]:
    """The parameter's name, and the names of all modules that contain it."""
    parts = full_name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def _unknown(model: nn.Module, name: str) -> str:
    layers = dict.fromkeys(n.rpartition(".")[0] or n for n, _ in model.named_parameters())
    return f"adapt_only: no layer is called {name!r}; there are: {', '.join(layers)}"
