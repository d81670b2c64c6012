"""Cutting channels out of the tensors of layers, and putting them back where they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from l2l_prune import optimizer_state
from l2l_prune.channels.groups import ChannelGroup, Channels
from l2l_prune.metalearners.cavia import FiLM

States = Callable[[Tensor], Iterable[dict[str, Any]]]

_HEADS = ("num_heads", "n_heads", "heads", "num_attention_heads")
_WIDTHS = ("attn_dim", "all_head_size", "inner_dim")


class Cut:
    """A tensor of a layer, and the positions along its dimensions that stay.

    Args:
        module: The layer.
        tensor: Name of its parameter or buffer.

    Attributes:
        keep: Positions that stay, by dimension; dimensions that are not in it stay whole.
        incoming: Dimensions along which the layer reads channels.
    """

    def __init__(self, module: nn.Module, tensor: str) -> None:
        self.module, self.tensor = module, tensor
        self.keep: dict[int, Tensor] = {}
        self.incoming: set[int] = set()

    def get(self) -> Tensor:
        """The tensor as it is now."""
        value = self.module._parameters.get(self.tensor)
        held = self.module._buffers[self.tensor] if value is None else value
        assert held is not None
        return held

    def set(self, value: Tensor) -> None:
        """Set the tensor; parameters in place, since optimizers hold the objects themselves."""
        parameter = self.module._parameters.get(self.tensor)
        if parameter is None:
            self.module._buffers[self.tensor] = value
        else:
            # Autograd remembers the shape as long as an old graph is alive (a loss that is still
            # held); only a change of dtype makes it forget.
            other = torch.float16 if value.dtype != torch.float16 else torch.float32
            parameter.data = torch.empty(0, dtype=other, device=value.device)
            parameter.data = value
            parameter.grad = None

    def small(self, full: torch.Size) -> torch.Size:
        """The shape of the part that stays."""
        return torch.Size(len(self.keep.get(dim, range(size))) for dim, size in enumerate(full))

    def take(self, full: Tensor) -> Tensor:
        """The part that stays, in the memory format of the whole."""
        part = full
        for dim, index in self.keep.items():
            part = part.index_select(dim, index.to(full.device))
        return _like(part, full)

    def put(self, part: Tensor, full: Tensor, zero_incoming: bool = False) -> Tensor:
        """The whole tensor with the part in its place, on its device and in its dtype."""
        whole = full.to(part.device, part.dtype, copy=True)
        keep = {dim: index.to(part.device) for dim, index in self.keep.items()}
        if zero_incoming:
            for dim in self.incoming & keep.keys():
                gone = torch.ones(full.shape[dim], dtype=torch.bool, device=part.device)
                gone[keep[dim]] = False
                whole.index_fill_(dim, gone.nonzero().squeeze(1), 0)
        everywhere: list[Any] = []
        for dim, size in enumerate(full.shape):
            index = keep.get(dim, torch.arange(size, device=part.device))
            everywhere.append(index.view([-1] + [1] * (full.dim() - dim - 1)))
        whole[tuple(everywhere)] = part
        return _like(whole, full)

    def put_into_zeros(self, part: Tensor, full: Tensor) -> Tensor:
        """The same, with zeros elsewhere."""
        return self.put(part, torch.zeros_like(full, dtype=part.dtype))


class Surgery:
    """Shrinks a network to some of its channels, and grows it back.

    Args:
        model: The network in its full shapes.
        channels: Its channels.
    """

    def __init__(self, model: nn.Module, channels: Channels) -> None:
        self._model, self.channels = model, channels
        self._blocks: dict[nn.Module, int] = {}
        for module in {slot.module: None for slot in channels.slots}:
            if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
                held = module.in_channels if module.transposed else module.out_channels
                self._blocks[module] = held // module.groups
            elif isinstance(module, nn.GroupNorm):
                self._blocks[module] = module.num_channels // module.num_groups
        self._attributes = [
            found for group in channels.groups if group.heads for found in self._of_heads(group)
        ]

    def plan(self, kept: Tensor) -> dict[str, Cut]:
        """What to keep of every tensor that holds channels, by the tensor's name.

        Args:
            kept: Which channels stay, over all groups; boolean.
        """
        plan: dict[str, Cut] = {}
        for slot in self.channels.slots:
            axis = slot.axis
            cut = plan.setdefault(axis.name, Cut(slot.module, axis.tensor))
            cut.keep[axis.dim] = ((slot.units < 0) | kept[slot.units]).nonzero().squeeze(1)
            if axis.role == "reads":
                cut.incoming.add(axis.dim)
        return plan

    def shrink(self, kept: Tensor, states: States = lambda parameter: ()) -> dict[str, Tensor]:
        """Cut all channels that are not kept, also from the optimizers' state.

        Args:
            kept: As in :meth:`plan`.
            states: The optimizers' states of a parameter.

        Returns:
            The full tensors by name, to grow back from.
        """
        whole = {}
        for name, cut in self.plan(kept).items():
            full = whole[name] = cut.get().detach().clone()
            cut.set(cut.take(full))
            for state in states(cut.get()):
                _change_state(state, full.shape, cut.take)
        self._tell_sizes(kept)
        return whole

    def grow(
        self, kept: Tensor, whole: dict[str, Tensor], states: States = lambda parameter: ()
    ) -> dict[str, Tensor]:
        """Put back what :meth:`shrink` took; weights that read restored channels are 0.

        Returns:
            Where each parameter has grown, by name; boolean.
        """
        released = {}
        for name, cut in self.plan(kept).items():
            small = cut.get().detach().clone()
            full = whole[name]
            cut.set(cut.put(small, full, zero_incoming=True))
            there = cut.put_into_zeros(torch.ones_like(small, dtype=torch.bool), full)
            for state in states(cut.get()):
                _change_state(state, small.shape, partial(cut.put_into_zeros, full=full))
                optimizer_state.level_state(state, full.shape, there, ~there)
            if isinstance(cut.get(), nn.Parameter):
                released[name] = ~there
        self._tell_sizes(torch.ones_like(kept))
        return released

    def put_back(self, cuts: dict[str, Cut], whole: dict[str, Tensor]) -> None:
        """Give all tensors their full shapes, with the values of ``whole`` where they were cut.

        Args:
            cuts: The :meth:`plan` by which they were cut.
            whole: What :meth:`shrink` returned.
        """
        for name, cut in cuts.items():
            cut.set(cut.put(cut.get().detach(), whole[name]))
        self._tell_sizes(self.channels.all())

    def _of_heads(self, group: ChannelGroup) -> list[tuple[nn.Module, str, int, ChannelGroup]]:
        """Attributes of attention layers that hold the number or the width of their heads."""
        found = []
        for maker in group.makers:
            for path in (maker.path, maker.path.rpartition(".")[0]):
                module = self._model.get_submodule(path)
                heads = [n for n in _HEADS if getattr(module, n, None) == group.channels]
                rows = maker.shape[0] // group.channels
                wide = [n for n in _WIDTHS if getattr(module, n, None) in (rows, maker.shape[0])]
                thirds = [n for n in _WIDTHS if getattr(module, n, None) == maker.shape[0] // 3]
                if heads:
                    names = dict.fromkeys([*heads, *wide, *thirds])
                    found += [(module, n, int(getattr(module, n)), group) for n in names]
        return found

    def _tell_sizes(self, kept: Tensor) -> None:
        """Make attributes that hold the sizes of a layer follow its tensors."""
        for slot in self.channels.slots:
            tell_size(slot.module, self._blocks.get(slot.module))
        for module in self._model.modules():
            if isinstance(module, FiLM):
                module.channels = (module.hidden or module.linear).out_features // 2
        for module, name, full, group in self._attributes:
            count = int(kept[list(group.units)].sum())
            setattr(module, name, full // group.channels * count)


def _change_state(
    state: dict[str, Any], shape: torch.Size, change: Callable[[Tensor], Tensor]
) -> None:
    """Cut or restore the optimizer's state of one parameter: its tensors of the given shape."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == shape:
            state[key] = change(value)


def tell_size(module: nn.Module, block: int | None) -> None:
    """Set a layer's attributes (``out_channels``, ``num_features``, ...) to its tensors' sizes.

    Args:
        module: Any layer; those without such attributes stay as they are.
        block: Channels per group, if the layer has groups.
    """
    weight = module._parameters.get("weight")
    if isinstance(module, nn.modules.conv._ConvNd) and weight is not None:
        module.groups = weight.shape[0] // block if block else 1
        first, second = weight.shape[0], weight.shape[1] * module.groups
        sizes = (first, second) if not module.transposed else (second, first)
        module.out_channels, module.in_channels = sizes
    elif isinstance(module, nn.Linear) and weight is not None:
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.GroupNorm) and weight is not None and block:
        module.num_channels, module.num_groups = len(weight), len(weight) // block
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        held = module.running_mean if weight is None else weight
        if isinstance(held, Tensor):
            module.num_features = len(held)


def _like(part: Tensor, full: Tensor) -> Tensor:
    if full.dim() == 4 and full.is_contiguous(memory_format=torch.channels_last):
        return part.contiguous(memory_format=torch.channels_last)
    return part.contiguous()
