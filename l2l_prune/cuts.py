"""Cutting channels out of the tensors of layers, and putting them back where they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from l2l_prune.cavia import FiLM
from l2l_prune.channels import ChannelGroup


class Cut:
    """A tensor of a layer, and which positions of its dimensions stay.

    Args:
        module: The layer.
        tensor: Name of its parameter or buffer.

    Attributes:
        keep: Positions that stay, by dimension; all of those that are not named.
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
        """In place for parameters: their identity is what optimizers hold."""
        parameter = self.module._parameters.get(self.tensor)
        if parameter is None:
            self.module._buffers[self.tensor] = value
        else:
            # Autograd remembers the shape for as long as an old graph is alive (a loss that is
            # still held); only a change of type makes it forget.
            other = torch.float16 if value.dtype != torch.float16 else torch.float32
            parameter.data = torch.empty(0, dtype=other, device=value.device)
            parameter.data = value
            parameter.grad = None

    def take(self, full: Tensor) -> Tensor:
        """The part that stays, in the memory format of the whole."""
        part = full
        for dim, index in self.keep.items():
            part = part.index_select(dim, index)
        return _like(part, full)

    def put(self, part: Tensor, full: Tensor, zero_incoming: bool = False) -> Tensor:
        """The whole with the part in its place."""
        whole = full.clone()
        if zero_incoming:
            for dim in self.incoming:
                gone = torch.ones(full.shape[dim], dtype=torch.bool, device=full.device)
                gone[self.keep[dim]] = False
                whole.index_fill_(dim, gone.nonzero().squeeze(1), 0)
        if whole.dim() == 1:
            whole[self.keep[0]] = part
            return whole
        rows, columns = (
            self.keep.get(dim, torch.arange(full.shape[dim], device=full.device)) for dim in (0, 1)
        )
        whole[rows[:, None], columns[None, :]] = part
        return _like(whole, full)

    def put_into_zeros(self, part: Tensor, full: Tensor) -> Tensor:
        """The same in zeros of the whole's shape."""
        return self.put(part, torch.zeros_like(full, dtype=part.dtype))


def plan_cuts(groups: Sequence[ChannelGroup], kept: Sequence[Tensor]) -> dict[str, Cut]:
    """What to keep of every tensor that holds channels, by the tensor's name.

    Args:
        groups: All groups of the network.
        kept: The channels of each that stay.
    """
    plan: dict[str, Cut] = {}
    for group, index in zip(groups, kept, strict=True):
        for slot in group.slots:
            cut = plan.setdefault(slot.name, Cut(slot.module, slot.tensor))
            device = cut.get().device
            positions = slot.index.to(device)[index.to(device)]
            cut.keep[slot.dim] = positions.flatten().sort().values
            if slot.incoming:
                cut.incoming.add(slot.dim)
    return plan


def change_state(
    state: dict[str, Any], shape: torch.Size, change: Callable[[Tensor], Tensor]
) -> None:
    """Cut or regrow the optimizer's state of one parameter: its tensors of the given shape."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == shape:
            state[key] = change(value)


def tell_sizes(model: nn.Module, groups: Iterable[ChannelGroup]) -> None:
    """Attributes that name the sizes of a layer follow its tensors."""
    for group in groups:
        for slot in group.slots:
            _tell_size(slot.module)
    for module in model.modules():
        if isinstance(module, FiLM):
            module.channels = (module.hidden or module.linear).out_features // 2


def _tell_size(module: nn.Module) -> None:
    weight = module._parameters.get("weight")
    if isinstance(module, nn.modules.conv._ConvNd) and weight is not None:
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1]
    elif isinstance(module, nn.Linear) and weight is not None:
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        held = module.running_mean if weight is None else weight
        if isinstance(held, Tensor):
            module.num_features = len(held)


def _like(part: Tensor, full: Tensor) -> Tensor:
    if full.dim() == 4 and full.is_contiguous(memory_format=torch.channels_last):
        return part.contiguous(memory_format=torch.channels_last)
    return part.contiguous()
