"""Which tensors of a model are pruned, and how many of their weights stay."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from l2l_prune._basics.checks import describe
from l2l_prune.masking.patterns import UNSTRUCTURED, Pattern
from l2l_prune.masking.prunable import LayerTensor, check_all_prunable
from l2l_prune.masking.topk import kept_count
from l2l_prune.schedules.schedule import Segment

_CONV = nn.modules.conv._ConvNd

Rule: TypeAlias = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Layers: TypeAlias = Literal["all", "authors"]


def select(
    model: nn.Module,
    *,
    layers: Layers = "all",
    only: Rule | Iterable[Rule] | None = None,
    skip: Rule | Iterable[Rule] | None = None,
) -> list[LayerTensor]:
    """Choose the tensors to prune, in the order of the model's modules.

    Args:
        model: Any module, wrapped by learn2learn or not.
        layers: ``"all"``: the weight of every convolution and linear layer of the network, and the
            projections that ``nn.MultiheadAttention`` holds itself (``in_proj_weight``); not what
            a learn2learn algorithm holds beside the network (transforms). ``"authors"``: the
            same without the first convolution, as in the paper's program.
        only: Names, ``fnmatch`` patterns, module types or predicates ``(name, module) -> bool``;
            a tensor must match one. It can also choose other modules: then every parameter of
            theirs with two or more dimensions, or the one whose full name is given.
        skip: As ``only``, but tensors that match are left out.

    Returns:
        At least one tensor; each can be pruned.

    Raises:
        TypeError: If a rule is of another kind.
        ValueError: If a name matches nothing, a name or type in ``only`` chooses nothing, nothing
            is left to prune, or a chosen tensor cannot be pruned correctly (already pruned, tied,
            parametrized, frozen, ...).
    """
    if layers not in ("all", "authors"):
        raise ValueError(f'layers must be "all" or "authors", got {layers!r}')
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ValueError(
            "the model is scripted (torch.jit): prune it, and finalize the Pruner, before you "
            "script it"
        )
    candidates = _candidates(model, everything=only is not None)
    if layers == "authors":
        first = next((c for c in candidates if isinstance(c.module, _CONV)), None)
        if first is None:
            raise ValueError('layers="authors" leaves out the first convolution, but there is none')
        candidates.remove(first)
    only_rules, skip_rules = read_rules("only", only, model), read_rules("skip", skip, model)
    check_names(candidates, [r for r in (*only_rules, *skip_rules) if isinstance(r, str)])
    for rule in only_rules:
        if isinstance(rule, (str, type)) and not any(matches(c, [rule]) for c in candidates):
            raise ValueError(
                f"there is nothing to prune for only={describe(rule)}: what it matches has no "
                "parameter of two or more dimensions; name the tensor itself to prune it all the "
                "same"
            )
    chosen = [
        c
        for c in candidates
        if (only is None or matches(c, only_rules)) and not matches(c, skip_rules)
    ]
    if candidates and not chosen:
        names = ", ".join(c.full_name for c in candidates)
        raise ValueError(f"there is nothing to prune: only= and skip= leave out all of {names}")
    if not chosen:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        raise ValueError(
            "there is nothing to prune: the model has no convolution or linear layer "
            f"(it is made of {', '.join(kinds)}); choose other layers with only="
        )
    check_all_prunable(model, chosen)
    return chosen


def made_later(
    model: nn.Module,
    known: Collection[nn.Module],
    *,
    only: Rule | Iterable[Rule] | None = None,
    skip: Rule | Iterable[Rule] | None = None,
) -> list[LayerTensor]:
    """Trained tensors that :func:`select` would choose too, in modules that it has not seen.

    Args:
        model: As for :func:`select`, like ``only`` and ``skip``.
        known: The modules that the model had when tensors were chosen.
        only: See ``model``.
        skip: See ``model``.
    """
    only_rules, skip_rules = read_rules("only", only, model), read_rules("skip", skip, model)
    return [
        tensor
        for tensor in _candidates(model, everything=only is not None)
        if tensor.module not in known
        and getattr(tensor.module._parameters.get(tensor.name), "requires_grad", False)
        and (only is None or matches(tensor, only_rules))
        and not matches(tensor, skip_rules)
    ]


def _candidates(model: nn.Module, *, everything: bool) -> list[LayerTensor]:
    aside = set() if everything else _beside_the_network(model)
    return [
        LayerTensor(path, module, name)
        for path, module in model.named_modules()
        if module not in aside
        for name in _prunable_names(module, everything=everything)
    ]


def segment_counts(
    tensors: Sequence[LayerTensor], segment: Segment, pattern: Pattern = UNSTRUCTURED
) -> list[int]:
    """How many weights each tensor keeps in ``segment``.

    Args:
        tensors: The selected tensors.
        segment: A segment of a schedule; dense ones keep everything.
        pattern: Where pruned weights may lie.

    Returns:
        One count ``k_l`` per tensor, in [1, numel].

    Raises:
        ValueError: If the segment names a layer that is not selected, keeps more weights than
            a layer has, would prune a layer away, or the pattern does not fit a layer.
    """
    counts = [tensor.shape.numel() for tensor in tensors]
    if not segment.sparse:
        return counts
    keep, rates = dict(segment.keep or ()), segment.sparsity
    check_names(tensors, keep)
    if isinstance(rates, tuple):
        check_names(tensors, dict(rates))
    for position, tensor in enumerate(tensors):
        numel = counts[position]
        explicit = lookup([tensor], keep)
        if explicit is not None:
            if explicit > numel:
                raise ValueError(
                    f"keep={explicit} is more than the {numel} weights of {tensor.full_name}"
                )
            counts[position] = _in_pattern(tensor, int(explicit), pattern)
            if counts[position] == 0:
                raise ValueError(
                    f"keep={explicit} is less than a piece of the pattern and would prune all "
                    f"{numel} weights of {tensor.full_name}: raise it, or leave the layer out with "
                    "skip="
                )
            continue
        rate = lookup([tensor], dict(rates)) if isinstance(rates, tuple) else float(rates)  # type: ignore[arg-type]
        counts[position] = _in_pattern(tensor, kept_count(numel, rate or 0.0), pattern)
        if counts[position] == 0:
            raise ValueError(
                f"sparsity {rate} would prune all {numel} weights of {tensor.full_name} and cut "
                "the network: lower it for this layer, or leave the layer out with skip="
            )
    return counts


def learning_rates(model: nn.Module, tensors: Iterable[LayerTensor]) -> list[nn.Parameter | None]:
    """What is learned, entry by entry, about each tensor's inner steps, as in Meta-SGD.

    Meta-SGD keeps one rate tensor for each parameter of its network, in the same order, as
    ``lrs``; SparseMAML its ``scores``. They get no gradients where weights are pruned, so
    their optimizer state must follow the masks, as that of the weights does.

    Args:
        model: The model that was given to the Pruner.
        tensors: The selected tensors, before anything is attached.

    Returns:
        For each tensor, its rates or scores, of the same shape, or None.
    """
    rates = _learning_rates(model)
    weights = [t.module._parameters.get(t.name) for t in tensors]
    return [rates.get(id(weight)) for weight in weights]


def refuse_learning_rates(model: nn.Module) -> None:
    """Refuse a model that learns something about its weights' shapes, as Meta-SGD and GBML do.

    Raises:
        ValueError: Naming its class.
    """
    updates = any(hasattr(module, "compute_update") for module in model.modules())  # GBML
    if updates or _learning_rates(model):
        raise ValueError(
            f"{type(model).__name__} holds learning rates, updates or scores of the shapes of its "
            "weights, which would no longer fit without channels: use a Pruner"
        )


def _learning_rates(model: nn.Module) -> dict[int, nn.Parameter]:
    """By the ``id()`` of the weight."""
    rates: dict[int, nn.Parameter] = {}
    for wrapper in model.modules():
        network, held = wrapper._modules.get("module"), wrapper._modules
        lrs = held.get("lrs", held.get("scores"))
        if network is not None and isinstance(lrs, nn.ParameterList):
            pairs = list(zip(network.parameters(), lrs.parameters(), strict=False))
            if all(parameter.shape == rate.shape for parameter, rate in pairs):
                rates.update({id(parameter): rate for parameter, rate in pairs})
    return rates


def _beside_the_network(model: nn.Module) -> set[nn.Module]:
    """Modules that a meta-learning wrapper holds beside its network.

    learn2learn's algorithms and those of this library keep the network under ``module``; whatever
    else they hold, such as GBML's gradient transforms, is not a layer of the network.
    """
    aside: set[nn.Module] = set()
    for wrapper in model.modules():
        if any(map(_is_meta_learner, type(wrapper).__mro__)):
            network = wrapper._modules.get("module")
            for child in wrapper.children() if network is not None else ():
                if child is not network:
                    aside.update(child.modules())
            aside -= set(network.modules()) if network is not None else set()
    return aside


def _is_meta_learner(cls: type) -> bool:
    """Of a class, not of those made from it: others' may hold a head beside their ``module``."""
    return (
        cls.__module__.partition(".")[0] in ("learn2learn", "l2l_prune")
        and cls.__name__ != "BaseLearner"
        and all(callable(getattr(cls, verb, None)) for verb in ("clone", "adapt"))
    )


def _prunable_names(module: nn.Module, *, everything: bool) -> list[str]:
    own = [name for name, weight in module._parameters.items() if weight is not None]
    weights = _weights(module)  # a reparametrized weight is not a parameter, but is meant
    return list(dict.fromkeys([*weights, *own])) if everything else weights


def _weights(module: nn.Module) -> list[str]:
    """Names of the weights that a layer of a known kind multiplies its input by."""
    if isinstance(module, (_CONV, nn.Linear)):
        return ["weight"]
    if isinstance(module, nn.MultiheadAttention):  # its out_proj is a linear layer of its own
        if module._qkv_same_embed_dim:
            return ["in_proj_weight"]
        return ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    return []


def read_rules(argument: str, rules: Rule | Iterable[Rule] | None, model: nn.Module) -> list[Rule]:
    """Names, patterns, types and predicates as a list, whether one or several are given.

    Raises:
        TypeError: If anything else is among them; the error names ``argument``.
    """
    if rules is None:
        return []
    several = isinstance(rules, Iterable) and not isinstance(rules, (str, type, nn.Module))
    listed: list[Rule] = list(rules) if several else [rules]  # type: ignore[list-item, arg-type]
    for rule in listed:
        if isinstance(rule, nn.Module):  # callable, but not a predicate
            paths = (path for path, module in model.named_modules() if module is rule)
            name = next(paths, "")
            raise TypeError(
                f"{argument} takes names, module types or predicates, got a {describe(rule)} "
                f"itself: give its name {name!r}"
            )
        known = isinstance(rule, str) or callable(rule)
        if isinstance(rule, type) and not issubclass(rule, nn.Module):  # int, or a mixin
            known = any(isinstance(module, rule) for module in model.modules())
        if not known:
            raise TypeError(
                f"{argument} takes names, module types or predicates, got {describe(rule)}"
            )
    return listed


def matches(tensor: LayerTensor, rules: Iterable[Rule]) -> bool:
    """Whether one of the rules means this tensor."""
    return any(_matches_one(tensor, rule) for rule in rules)


def _matches_one(tensor: LayerTensor, rule: Rule) -> bool:
    if isinstance(rule, str):
        return rule == tensor.full_name or (tensor.named_by(rule) and _is_weight(tensor))
    hit = (
        isinstance(tensor.module, rule)
        if isinstance(rule, type)
        else rule(tensor.path, tensor.module)
    )
    return bool(hit) and _is_weight(tensor)


def _is_weight(tensor: LayerTensor) -> bool:
    """Naming a whole module means its matrices and kernels, not its biases and scales."""
    weights = _weights(tensor.module)
    if weights:
        return tensor.name in weights
    weight = tensor.module._parameters[tensor.name]
    if isinstance(weight, UninitializedParameter):  # has no dimensions yet
        return not isinstance(tensor.module, nn.modules.batchnorm._NormBase)
    return weight is not None and weight.dim() > 1


def check_names(tensors: Sequence[LayerTensor], patterns: Iterable[str]) -> None:
    """Refuse a name or ``fnmatch`` pattern that matches none of the tensors.

    Raises:
        ValueError: Naming it and the tensors.
    """
    for pattern in patterns:
        if not any(tensor.named_by(pattern) for tensor in tensors):
            known = ", ".join(tensor.full_name for tensor in tensors)
            raise ValueError(f"no prunable layer is called {pattern!r}; there are: {known}")


def lookup(tensors: Sequence[LayerTensor], table: Mapping[str, float]) -> float | None:
    """The entry for a tensor, or for several that need the same one; names precede patterns.

    Args:
        tensors: One tensor, or several that lose the same channels.
        table: Values by layer name, tensor name or ``fnmatch`` pattern.

    Returns:
        The value of an exact name if there is one, else that of the first pattern that matches.

    Raises:
        ValueError: If two of the tensors are given different values.
    """
    exact = {
        tensor.path: table[name]
        for tensor in tensors
        for name in (tensor.path, tensor.full_name)  # the longer name wins
        if name in table
    }
    if len(set(exact.values())) > 1:
        told = ", ".join(f"{name}: {value}" for name, value in exact.items())
        raise ValueError(f"layers that lose the same channels need one value, got {told}")
    if exact:
        return next(iter(exact.values()))
    return next(
        (v for pattern, v in table.items() if any(t.named_by(pattern) for t in tensors)), None
    )


def _in_pattern(tensor: LayerTensor, keep: int, pattern: Pattern) -> int:
    shape = tensor.shape
    if keep in (0, shape.numel()):  # nothing to arrange
        return keep
    try:
        as_outputs = tensor.swapped(torch.empty(shape, device="meta")).shape
        return pattern.count(as_outputs, keep)
    except ValueError as error:
        raise ValueError(
            f"{tensor.full_name} of shape {tuple(shape)} does not fit the pattern {pattern}: "
            f"{error}; leave it out, with skip= or (a first convolution) layers='authors'"
        ) from None
