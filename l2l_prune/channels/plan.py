"""How many channels of each group stay, which ones, and whether a network can lose the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from l2l_prune.channels.groups import (
    ChannelGroup,
    Channels,
    Importance,
    importance_group,
    modes,
    run,
    scored_slots,
    tensors_of,
    unseen,
)
from l2l_prune.channels.surgery import Surgery
from l2l_prune.masking.layers import check_names, lookup
from l2l_prune.masking.topk import kept_count
from l2l_prune.schedules.schedule import Schedule, Segment

_FIXED_HEADS = "its code fixes the number of heads"


def channel_counts(channels: Channels, segment: Segment) -> list[int] | None:
    """How many channels each group keeps in a segment; None in a dense one.

    Raises:
        ValueError: If the segment names an unknown layer, gives different values to layers that
            lose the same channels, or would leave a layer no channel.
    """
    if not segment.sparse:
        return None
    keep, rates = dict(segment.keep or ()), segment.sparsity
    table = dict(rates) if isinstance(rates, tuple) else {"*": float(rates)}  # type: ignore[arg-type]
    for name in (*keep, *table):
        if name in channels.whole:
            raise ValueError(f"{name} cannot lose channels: {channels.whole[name]}")
    check_names([maker for group in channels.groups for maker in group.makers], (*keep, *table))
    counts = []
    for group in channels.groups:
        explicit, rate = lookup(group.makers, keep), lookup(group.makers, table)
        count = kept_count(group.channels, rate or 0.0) if explicit is None else int(explicit)
        least = max(1, len(group.parts))
        if not least <= count <= group.channels:
            shared = f" that {least} layers share, of which each needs one," if least > 1 else ""
            raise ValueError(
                f"{group.name} has {group.channels} channels{shared} and would keep {count}: "
                "change the sparsity for this layer, or leave it out with skip="
            )
        counts.append(count)
    return counts


def refuse_frozen_readers(channels: Channels, groups: Sequence[ChannelGroup]) -> None:
    """Refuse to cut channels that a frozen weight reads: it restarts from 0 when they come back.

    Args:
        channels: All channels of the network.
        groups: Those of which some are cut.

    Raises:
        ValueError: Naming the weight and what to do.
    """
    for slot in channels.slots:
        weight = slot.module._parameters.get(slot.axis.tensor)  # a buffer never learns either
        if slot.axis.role != "reads" or (weight is not None and weight.requires_grad):
            continue
        if names := [name for group in groups if slot.holds(group) for name in group.names]:
            raise ValueError(
                f"{slot.axis.name} is frozen (requires_grad=False), so it could not learn again to "
                f"read channels of {', '.join(names)} that were cut out and come back: unfreeze "
                f"it, or let them keep all channels with skip={names}"
            )


def choose_channels(
    channels: Channels,
    counts: Sequence[int],
    importance: Importance,
    *,
    needs_gradients: bool = False,
    before: Tensor | None = None,
) -> Tensor:
    """Which channels stay, over all groups; boolean.

    Args:
        channels: All channels of the network.
        counts: How many of each group stay.
        importance: Gives a score per channel.
        needs_gradients: Whether scores are made from gradients; then weights must have them.
        before: The channels that the network has, if it is small; the others stay removed.

    Raises:
        ValueError: If there are no scores, or they do not fit; names the layer.
    """
    there = channels.all() if before is None else before
    chosen = torch.zeros_like(there)
    for group, keep in zip(channels.groups, counts, strict=True):
        own = torch.tensor(group.units, device="cpu")
        present = own[there[own]]
        if keep >= len(present):  # channels that come back are taken in order
            absent = own[~there[own]]
            chosen[torch.cat([present, absent[: keep - len(present)]])] = True
            continue
        if needs_gradients and any(
            slot.module.weight.grad is None for slot in scored_slots(channels, group)
        ):
            raise ValueError(
                f"Taylor importance needs gradients of {group.name} and the layers after it: "
                "call step() after a backward pass and before zero_grad()"
            )
        source = importance_group(channels, group, there)
        scores = importance(source)
        if isinstance(scores, Tensor) and scores.shape == (len(source[0].idxs),):
            scores = scores[: len(present)]  # torch-pruning leaves room for each position
        if not isinstance(scores, Tensor) or scores.shape != (len(present),):
            raise ValueError(
                f"the importance of the channels of {', '.join(group.names)} is {scores!r}: there "
                f"must be {len(present)} scores (bn_scale needs batch normalisation of all of them)"
            )
        if not bool(torch.isfinite(scores).all()):
            raise ValueError(f"the importance of the channels of {group.name} is not finite")
        order = present[scores.detach().float().cpu().argsort(descending=True, stable=True)]
        best = group.best((order - group.first).tolist(), keep)
        chosen[[group.first + channel for channel in best]] = True
    return chosen


# ---- trying it out --------------------------------------------------------------------------


def try_cuts(
    model: nn.Module, channels: Channels, example_inputs: Any, schedule: Schedule
) -> Channels:
    """Cut a copy of the network as the schedule will, and check that it still runs correctly.

    The small network must give what the full one gives when nothing reads the removed channels.
    Attention layers whose code fixes the number of heads keep them all.

    Raises:
        ValueError: Naming the layers that cannot be cut, and what to do.
    """
    counted = [g for g in channels.groups if isinstance(g.makers[0].module, nn.MultiheadAttention)]
    channels = _with_all_heads(channels, counted)
    trial = _Trial(model, example_inputs)
    tried: list[list[int] | None] = [None]
    for segment in schedule.segments:
        counts = channel_counts(channels, segment)
        if counts is None or counts in tried or not (failed := trial.failing(channels, counts)):
            tried.append(counts)
            continue
        heads = [group for group in failed if group.heads]
        if len(heads) < len(failed):
            names = [name for g in failed if not g.heads for name in g.names]
            raise ValueError(
                f"the network does not run as it should without some channels of "
                f"{', '.join(names)} ({trial.problem}): leave them out with skip={names}"
            )
        fewer = _with_all_heads(channels, heads)
        return try_cuts(model, fewer, example_inputs, schedule)
    return channels


def _with_all_heads(channels: Channels, groups: Sequence[ChannelGroup]) -> Channels:
    left = channels.without(groups, _FIXED_HEADS)
    if not left.groups:
        raise ValueError(
            f"there are no channels that can be removed ({groups[0].name}: {_FIXED_HEADS})"
        )
    return left


def try_scores(
    model: nn.Module,
    channels: Channels,
    groups: Sequence[ChannelGroup],
    importance: Importance | None,
) -> None:
    """Score the channels of a copy, so that what cannot be scored is told before training.

    Args:
        model: The network.
        channels: All its channels.
        groups: Those of which some will be cut.
        importance: One of torch-pruning's functions; other functions may know this very network
            and are not called.

    Raises:
        ValueError: Naming the layers and what to do.
    """
    twin = copy.deepcopy(model)
    _randomize(twin)
    for parameter in twin.parameters():
        parameter.grad = torch.ones_like(parameter)
    there = channels.on(twin)
    for group in groups:
        counts = [g.channels - (g is group) for g in channels.groups]
        told = f"the channels of {', '.join(group.names)} cannot be scored"
        advice = f"let them keep all channels with skip={group.names}"
        if not scored_slots(channels, group):
            raise ValueError(
                f"{told}, since no Linear, convolution or batch normalisation layer holds them: "
                f"use such layers, or {advice}"
            )
        try:
            if importance is not None:
                choose_channels(there, counts, importance)
        except Exception as error:
            raise ValueError(
                f"{told} with this importance ({error}): choose another, or {advice}"
            ) from error


class _Trial:
    """A copy of a network to cut, with random weights, since zeros would hide differences."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self._twin, self._inputs = copy.deepcopy(model), example_inputs
        _randomize(self._twin)
        self.problem = ""
        self._ways = [mode for mode in modes(model) if self._run(mode) is not None]

    def failing(self, channels: Channels, counts: Sequence[int]) -> list[ChannelGroup]:
        """The groups that cannot be cut, narrowed down as far as possible."""
        chosen = torch.Generator().manual_seed(0)
        some, others = ~channels.all(), ~channels.all()
        for group, count in zip(channels.groups, counts, strict=True):
            order = torch.randperm(group.channels, generator=chosen, device="cpu").tolist()
            for kept, preferred in ((some, order), (others, order[::-1])):
                kept[[group.first + c for c in group.best(preferred, count)]] = True
        surgery = Surgery(self._twin, channels.on(self._twin))
        groups = list(channels.groups)
        return self._culprits(surgery, some, groups) or self._culprits(surgery, others, groups)

    def _culprits(
        self, surgery: Surgery, kept: Tensor, groups: list[ChannelGroup]
    ) -> list[ChannelGroup]:
        only = torch.ones_like(kept)
        for group in groups:
            only[list(group.units)] = kept[list(group.units)]
        if self._right(surgery, only):
            return []
        if len(groups) == 1:
            return groups
        half = len(groups) // 2
        halves = (groups[:half], groups[half:])
        return [g for part in halves for g in self._culprits(surgery, kept, part)] or groups

    @torch.no_grad()
    def _right(self, surgery: Surgery, kept: Tensor) -> bool:
        """Whether the small network runs, and agrees with the full one without readers."""
        whole = surgery.shrink(kept)
        results = [self._run(mode) for mode in self._ways]
        small = self._run(nn.Module.eval)
        surgery.grow(kept, whole)
        full, again = self._run(nn.Module.eval), self._run(nn.Module.eval, seed=1)
        for name, cut in surgery.plan(kept).items():
            cut.set(whole[name])
        if any(result is None for result in results):
            return False
        if small is None or full is None or again is None or _close(small, full):
            return True
        if not _close(again, full):
            return True  # its output is random
        self.problem = "its output changes"
        return False

    def _run(self, mode: Callable[[nn.Module], Any], seed: int = 0) -> list[Tensor] | None:
        """What the copy returns, or None if it does not run; the copy is left as it was."""
        buffers = [(module, dict(module._buffers)) for module in self._twin.modules()]
        training = [(module, module.training) for module in self._twin.modules()]
        for module, held in buffers:
            module._buffers = {name: copy.deepcopy(held[name]) for name in held}
        try:
            with torch.no_grad(), unseen(self._twin):
                torch.manual_seed(seed)
                mode(self._twin)
                out = run(self._twin, copy.deepcopy(self._inputs))
        except Exception as error:
            self.problem = f"{type(error).__name__}: {error}".splitlines()[0]
            return None
        finally:
            for module, held in buffers:
                module._buffers = held
            for module, was in training:
                module.training = was
        return [tensor.detach() for tensor in tensors_of(out)]


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    chosen = torch.Generator().manual_seed(0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        statistic = name.rpartition(".")[2] in ("running_mean", "running_var")
        if not (isinstance(tensor, nn.Parameter) or statistic) or not tensor.is_floating_point():
            continue
        if tensor.dim() < 2:
            value = torch.rand(tensor.shape, generator=chosen, device="cpu") + 0.5
        else:
            value = torch.randn(tensor.shape, generator=chosen, device="cpu")
            value *= (tensor.shape[0] / max(tensor.numel(), 1)) ** 0.5
        tensor.copy_(value)


def _close(these: Sequence[Tensor], those: Sequence[Tensor]) -> bool:
    for one, other in zip(these, those, strict=True):
        if one.shape != other.shape:
            return False
        if one.is_floating_point() and one.numel():
            scale = float(other.abs().max())
            off = float((one - other).abs().max())
            if scale < float("inf") and not off <= _step_of_rounding(one) ** 0.5 * scale:
                return False
    return True


def _step_of_rounding(result: Tensor) -> float:
    """The relative rounding of what made ``result``: GPUs convolve float32 with 10 bits (TF32)."""
    in_its_dtype = torch.finfo(result.dtype).eps
    return max(in_its_dtype, 2.0**-10) if result.device.type == "cuda" else in_its_dtype


# ---- saved state ----------------------------------------------------------------------------


def read_channels_of(
    state: Any,
    schedule: Schedule,
    surgery: Surgery,
    counts: Sequence[list[int] | None],
    shapes: Mapping[str, torch.Size],
) -> Tensor | None:
    """Which channels a state keeps; None if all. Refuses one that does not fit this network.

    Args:
        state: What ``ChannelPruner.state_dict()`` gave, for this schedule.
        schedule: The ChannelPruner's.
        surgery: Of its network.
        counts: How many channels of each group stay, by segment.
        shapes: The full shapes of all tensors that hold channels, by name.

    Raises:
        ValueError: Naming what does not fit.
    """
    channels, chosen = surgery.channels, surgery.channels.all()
    kept, full, regrown = state["kept"], state["full"], state["regrown"]
    wanted = counts[schedule.index(state["iteration"])]
    dicts = (full, regrown) if kept is None else (kept, full, regrown)
    if not all(isinstance(d, dict) for d in dicts) or not isinstance(state["stepped"], bool):
        raise ValueError("this is not a ChannelPruner state dict of this version")
    names = [group.name for group in channels.groups]
    if (kept is None) != (wanted is None) or (kept is not None and list(kept) != names):
        raise ValueError("the checkpoint's channels do not fit this model and schedule")
    for group, count in zip(channels.groups, wanted or (), strict=False):
        index = kept[group.name]
        if not isinstance(index, Tensor) or index.dtype != torch.long or index.dim() != 1:
            raise ValueError(f"the checkpoint's channels of {group.name} are not numbers of them")
        if index.tolist() != sorted({int(i) % group.channels for i in index}):
            raise ValueError(f"the checkpoint has channels of {group.name} that do not exist")
        if len(index) != count:
            raise ValueError(
                f"the checkpoint keeps {len(index)} channels of {group.name}, but the "
                f"schedule keeps {count} at iteration {state['iteration']}"
            )
        chosen[list(group.units)] = False
        chosen[group.first + index.cpu()] = True
    if missing := set() if kept is None else set(shapes) - set(full):
        raise ValueError(f"the checkpoint's full tensors lack {', '.join(sorted(missing))}")
    for name, tensor in full.items():
        if not isinstance(tensor, Tensor) or kept is None or shapes.get(name) != tensor.shape:
            raise ValueError(f"the checkpoint's full tensor {name} does not fit this model")
    cuts = surgery.plan(chosen)
    for name, mask in regrown.items():
        if (
            name not in cuts
            or not isinstance(cuts[name].get(), nn.Parameter)
            or not isinstance(mask, Tensor)
            or mask.dtype != torch.bool
            or mask.shape != cuts[name].small(shapes[name])
        ):
            raise ValueError(
                f"the checkpoint's regrown {name} is not a mask of a parameter of this model"
            )
    return None if kept is None else chosen
