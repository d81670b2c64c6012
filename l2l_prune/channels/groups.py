"""Which channels of a network belong together, and how important they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils._pytree import tree_map

from l2l_prune._basics import checks
from l2l_prune.channels.tracing import Axis, Labels, Trace
from l2l_prune.masking.layers import Rule, check_names, matches, read_rules
from l2l_prune.masking.prunable import LayerTensor, tied

Importance = Callable[[Any], Tensor]

_CONV = nn.modules.conv._ConvNd
_BATCH_NORM = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Slot:
    """A dimension of a tensor along which channels lie.

    Attributes:
        module: The layer.
        axis: Its name, its tensor and the dimension.
        units: The channel's number at each position, over all groups; -1 if it always stays.
    """

    module: nn.Module
    axis: Axis
    units: Tensor

    def holds(self, group: ChannelGroup) -> bool:
        """Whether some of its positions are channels of the group."""
        return bool(((self.units >= group.first) & (self.units < group.units.stop)).any())


@dataclass(frozen=True)
class ChannelGroup:
    """Layers that lose the same channels.

    A channel is whatever can only be removed as a whole: with a grouped convolution or group
    normalisation a whole group, in attention a head.

    Attributes:
        makers: The layers that make the channels, in the model's order.
        channels: How many channels there are.
        first: Number of the first channel over all groups.
        heads: Whether the channels are attention heads.
        parts: Channels, from 0, of layers that have no others: each layer must keep one. Only where
            a concatenation is added to something do layers have a part of a group.
    """

    makers: tuple[LayerTensor, ...]
    channels: int
    first: int
    heads: bool
    parts: frozenset[frozenset[int]]

    @property
    def name(self) -> str:
        """The layer that makes the channels; the first if there are several (a residual sum)."""
        return self.makers[0].path

    @property
    def names(self) -> list[str]:
        """What ``skip`` takes to leave all of its channels in place."""
        return [maker.path or maker.full_name for maker in self.makers]

    @property
    def units(self) -> range:
        """Numbers of its channels over all groups."""
        return range(self.first, self.first + self.channels)

    def best(self, order: list[int], keep: int) -> list[int]:
        """The first of an order of preference, but one of each part; all counted from 0."""
        leading = {next((c for c in order if c in part), None) for part in self.parts}
        return sorted(order, key=lambda channel: channel not in leading)[:keep]


@dataclass(frozen=True)
class Channels:
    """All channels of a network that can be removed, and where they lie.

    Attributes:
        groups: In the model's order.
        slots: Every dimension of every tensor that holds channels.
        whole: Layers whose channels all stay, and why.
    """

    groups: tuple[ChannelGroup, ...]
    slots: tuple[Slot, ...]
    whole: dict[str, str]

    @property
    def count(self) -> int:
        """How many channels there are in all groups."""
        return sum(group.channels for group in self.groups)

    def all(self) -> Tensor:
        """All channels, as which of them stay: boolean, on the CPU as everything about channels."""
        return torch.ones(self.count, dtype=torch.bool, device="cpu")

    def on(self, copy: nn.Module) -> Channels:
        """The same of a copy of the network."""
        slots = [Slot(copy.get_submodule(s.axis.path), s.axis, s.units) for s in self.slots]
        return Channels(self.groups, tuple(slots), self.whole)

    def without(self, groups: Sequence[ChannelGroup], why: str) -> Channels:
        """The same, except that these groups stay whole."""
        stay = torch.zeros(self.count + 1, dtype=torch.bool, device="cpu")  # the last is for -1
        for group in groups:
            stay[list(group.units)] = True
        number = (~stay).cumsum(0) - 1
        number[stay] = -1
        number[-1] = -1
        slots = [Slot(s.module, s.axis, number[s.units]) for s in self.slots]
        left = [replace(g, first=int(number[g.first])) for g in self.groups if g not in groups]
        names = {maker.path: why for group in groups for maker in group.makers}
        held = tuple(slot for slot in slots if bool((slot.units >= 0).any()))
        return Channels(tuple(left), held, self.whole | names)


def find_channels(model: nn.Module, example_inputs: Any, skip: Sequence[Rule] = ()) -> Channels:
    """Every channel that can be removed without changing the shape of the model's output.

    Args:
        model: The network; a copy of it is run, in training and in evaluation.
        example_inputs: Inputs of a forward pass: a tensor, a tuple or list, or a dict.
        skip: Names, patterns, types or predicates of layers whose output channels stay.

    Raises:
        ValueError: If the model does not run on the inputs, a layer cannot be shrunk, a name
            matches nothing, or no channel is left.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"{name} is not initialized yet: run one forward pass before pruning")
    labels, fixed = _traced(model, example_inputs)
    modules = dict(model.named_modules())
    makers = {
        axis: LayerTensor(axis.path, modules[axis.path], axis.tensor)
        for path in modules
        for axis in labels.axes
        if axis.path == path and axis.role == "makes"
    }
    rules = read_rules("skip", skip, model)
    computed = [
        LayerTensor(path, module, "weight")
        for path, module in modules.items()
        if isinstance(module, (_CONV, nn.Linear)) and module._parameters.get("weight") is None
    ]
    known = [*makers.values(), *computed]
    check_names(known, [rule for rule in rules if isinstance(rule, str)])
    for layer in computed:
        if not matches(layer, rules):
            raise ValueError(
                f"{layer.full_name} is already pruned or reparametrized: take that off first, or "
                f"leave it out with skip={layer.path!r}"
            )
    roots = {axis: labels.roots(ids) for axis, ids in labels.axes.items()}
    for axis, maker in makers.items():
        if matches(maker, rules):
            skipped = (("skipped", "skip= leaves it out"),)
            fixed.update(zip(roots[axis].tolist(), skipped * len(roots[axis]), strict=True))
    fixed.setdefault(0, ("whole", "it is joined with a tensor of fixed size"))
    _refuse_tied(model, roots, fixed)
    _refuse(makers, roots, fixed)
    channels = _grouped(labels, makers, roots, fixed, modules)
    if not channels.groups:
        told = "; ".join(f"{name}: {why}" for name, why in channels.whole.items())
        raise ValueError(f"there are no channels that can be removed ({told or 'no such layer'})")
    return channels


def _grouped(
    labels: Labels,
    makers: dict[Axis, LayerTensor],
    roots: dict[Axis, Tensor],
    fixed: dict[int, tuple[str, str]],
    modules: dict[str, nn.Module],
) -> Channels:
    own: dict[int, int] = {}  # the group of each label
    members: dict[int, dict[int, None]] = {}  # and the other way round, in the model's order
    for axis in makers:
        free = dict.fromkeys(root for root in roots[axis].tolist() if root not in fixed)
        others = sorted({own[root] for root in free if root in own})
        number = others[0] if others else len(own)
        for other in others[1:]:
            members[number].update(members.pop(other))
        members.setdefault(number, {}).update(free)
        own.update(dict.fromkeys(members[number], number))
    attended = {r for ids in labels.attended for r in labels.roots(ids).reshape(-1).tolist()}
    held = [set(ids.tolist()) for ids in roots.values()]
    groups: list[ChannelGroup] = []
    unit: dict[int, int] = {}
    whole: dict[str, str] = {}
    for units in members.values():
        its = [maker for axis, maker in makers.items() if units.keys() & set(roots[axis].tolist())]
        if len(units) < 2:
            why = "its channels can only be removed together"
            whole.update({maker.path: why for maker in its})
            continue
        heads = bool(attended & units.keys())
        place = {root: number for number, root in enumerate(units)}
        parts = frozenset(frozenset(place[r] for r in ids) for ids in held if ids < place.keys())
        groups.append(ChannelGroup(tuple(its), len(units), len(unit), heads, parts))
        unit.update({root: len(unit) + n for n, root in enumerate(units)})
    shrunk = {maker.path for group in groups for maker in group.makers}
    for axis, maker in makers.items():
        why = next((fixed[root][1] for root in roots[axis].tolist() if root in fixed), "")
        if why and maker.path not in shrunk:
            whole[maker.path] = why
    slots = []
    for axis, ids in roots.items():
        numbers = torch.tensor([unit.get(root, -1) for root in ids.tolist()], device="cpu")
        slots.append(Slot(modules[axis.path], axis, numbers))
    slots = [slot for slot in slots if bool((slot.units >= 0).any())]
    return Channels(tuple(groups), tuple(slots), whole)


def _refuse(
    makers: dict[Axis, LayerTensor],
    roots: dict[Axis, Tensor],
    fixed: dict[int, tuple[str, str]],
) -> None:
    """Refuse layers that cannot be shrunk and that ``skip`` does not leave out."""
    refused: dict[str, str] = {}
    for axis, maker in makers.items():
        for root in roots[axis].tolist():
            kind, why = fixed.get(root, ("", ""))
            if kind == "refused":
                refused.setdefault(maker.path, why)
    if refused:
        told = "; ".join(f"{name}: {why}" for name, why in refused.items())
        raise ValueError(
            f"these layers cannot be shrunk: {told}. Leave them out with skip={list(refused)}"
        )


def _refuse_tied(
    model: nn.Module, roots: dict[Axis, Tensor], fixed: dict[int, tuple[str, str]]
) -> None:
    shared = tied(model)
    for axis, ids in roots.items():
        free = [root for root in ids.tolist() if root not in fixed]
        if free and shared(model.get_submodule(axis.path)._parameters.get(axis.tensor)):
            why = f"{axis.name} is tied: the model uses the same weight in another place"
            fixed.update(dict.fromkeys(free, ("refused", why)))


# ---- running the network --------------------------------------------------------------------


def run(model: nn.Module, example_inputs: Any) -> Any:
    """Run the model on the example inputs: a dict by name, a tuple or list in order."""
    if isinstance(example_inputs, dict):
        return model(**example_inputs)
    if isinstance(example_inputs, (list, tuple)):
        return model(*example_inputs)
    return model(example_inputs)


@contextmanager
def unseen(model: nn.Module) -> Iterator[None]:
    """Seed the random generators alike for the block, and restore them afterwards."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a layer as one operation shows nothing
    try:
        with torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(0)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def modes(model: nn.Module) -> list[Callable[[nn.Module], Any]]:
    """Ways to run a network: as it is, in evaluation, in training."""
    training = {module.training for module in model.modules()}
    ways: list[Callable[[nn.Module], Any]] = [lambda twin: twin]
    if training != {False}:
        ways.append(lambda twin: twin.eval())
    if training != {True}:
        ways.append(lambda twin: twin.train())
    return ways


def _traced(model: nn.Module, example_inputs: Any) -> tuple[Labels, dict[int, tuple[str, str]]]:
    """The labels of all runs, and which of them must stay, with the reason."""
    labels, errors, used, held = Labels(), [], set(), set()
    for number, mode in enumerate(modes(model)):
        with torch.inference_mode(), unseen(model):
            twin = mode(copy.deepcopy(model))
            inputs = tree_map(_cloned, example_inputs)  # these are inference tensors
            trace = Trace(twin, labels)
            try:
                with trace:
                    out = run(twin, inputs)
            except Exception as error:
                if number == 0:
                    raise ValueError(
                        f"the model does not run on example_inputs: {type(error).__name__}: {error}"
                    ) from error
                errors.append(error)
                continue
            for tensor in tensors_of(out):
                made = trace.of(tensor)
                if made is not None:
                    labels.fix(made, "output", "it makes the network's output")
            names = dict(twin.named_parameters())
            held |= set(names)
            used |= {name for name, parameter in names.items() if id(parameter) in trace.used}
    if errors and held - used:
        raise ValueError(
            f"the model runs on example_inputs in one mode only ({errors[0]}), which leaves "
            f"{sorted(held - used)[0]} unused: give a batch of two or more"
        ) from errors[0]
    with torch.inference_mode():
        return labels, labels.settle()


def _cloned(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def tensors_of(out: Any) -> Iterator[Tensor]:
    """All tensors in what a network returns."""
    if isinstance(out, Tensor):
        yield out
        return
    if isinstance(out, dict):
        parts: Any = out.values()
    elif isinstance(out, (list, tuple, set)):
        parts = out
    else:
        parts = vars(out).values() if hasattr(out, "__dict__") else ()
    for part in parts:
        yield from tensors_of(part)


# ---- importance -----------------------------------------------------------------------------


def importance_function(importance: str | Importance) -> Importance:
    """torch-pruning's importance by name, or the function that is given.

    Args:
        importance: ``"l1"``, ``"l2"``, ``"taylor"``, ``"bn_scale"``, or any function from
            torch-pruning's group to a score per channel.

    Raises:
        TypeError: If it is neither.
        ValueError: If there is no such name.
    """
    if callable(importance):
        return importance
    if not isinstance(importance, str):
        raise TypeError(
            f"importance must be a name or a function, got {checks.describe(importance)}"
        )
    scores = torch_pruning().importance
    made = {
        "l1": lambda: scores.GroupMagnitudeImportance(p=1),
        "l2": lambda: scores.GroupMagnitudeImportance(p=2),
        "taylor": scores.GroupTaylorImportance,
        "bn_scale": scores.BNScaleImportance,
    }
    checks.one_of("importance", importance, made)
    function: Importance = made[importance]()
    return function


def scored_slots(channels: Channels, group: ChannelGroup) -> list[Slot]:
    """The weights of a group that importance depends on; those that make its channels first.

    torch-pruning adds all up in the shape of the first, so those that hold only a part of the
    channels (of a concatenation that is added to something) come last.
    """
    found = [
        slot for slot in channels.slots if _pruning_function(slot) is not None and slot.holds(group)
    ]
    order = {maker.path: number for number, maker in enumerate(group.makers)}
    end = len(order)

    def place(slot: Slot) -> tuple[bool, int]:
        partly = bool(group.parts) and not {*group.units} <= {*slot.units.tolist()}
        return partly, order.get(slot.axis.path, end) if slot.axis.role == "makes" else end

    return sorted(found, key=place)


def importance_group(channels: Channels, group: ChannelGroup, kept: Tensor) -> Any:
    """The present channels as a group of torch-pruning, for its importance functions.

    Args:
        channels: All channels of the network.
        group: One group of them.
        kept: Which channels the network has now, over all groups; boolean.
    """
    library = torch_pruning()
    from torch_pruning._helpers import GroupItem
    from torch_pruning.dependency import Dependency, Group, Node

    number = torch.full((len(kept) + 1,), -1, device="cpu")
    here = torch.zeros_like(kept)
    here[list(group.units)] = kept[list(group.units)]
    number[:-1][here] = torch.arange(int(here.sum()), device="cpu")
    source = Group()
    for slot in scored_slots(channels, group):
        there = slot.units[(slot.units < 0) | kept[slot.units]]
        roots = number[there]
        positions = (roots >= 0).nonzero().squeeze(1)
        function = getattr(library, _pruning_function(slot) or "")
        node = Node(slot.module, None, slot.axis.path)
        item = GroupItem(Dependency(function, function, node, node), positions.tolist())
        item.root_idxs = roots[positions].tolist()
        source._group.append(item)
    return source


def _pruning_function(slot: Slot) -> str | None:
    module, axis = slot.module, slot.axis
    side = "in" if axis.role == "reads" else "out"
    if axis.tensor != "weight":
        return None
    if isinstance(module, _BATCH_NORM):
        return "prune_batchnorm_out_channels"
    if isinstance(module, _CONV):
        if module.transposed and module.groups > 1:  # [in, out / groups]: both lie along the first
            side = "in"
        return f"prune_conv_{side}_channels"
    return f"prune_linear_{side}_channels" if isinstance(module, nn.Linear) else None


def count_operations(model: nn.Module, example_inputs: Any) -> tuple[int, int]:
    """Parameters and multiply-accumulates of a forward pass, counted by torch-pruning."""
    twin = copy.deepcopy(model).eval()
    with unseen(model):
        macs, parameters = torch_pruning().utils.count_ops_and_params(twin, example_inputs)
    return int(parameters), int(macs)


def torch_pruning() -> Any:
    """The library, or an error that says what to install."""
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(
            f'{error}; pruning channels needs: pip install "l2l-prune[structured]"'
        ) from None
    return torch_pruning
