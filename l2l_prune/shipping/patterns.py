"""Weights in the pattern of sparse tensor cores: a check, and torch's format for them."""

from __future__ import annotations

import torch
from torch import nn

from l2l_prune._basics import checks
from l2l_prune.channels.pruner import Exported
from l2l_prune.masking.masked_layer import plain_copy
from l2l_prune.masking.patterns import NByM
from l2l_prune.masking.prunable import LayerTensor
from l2l_prune.shipping.folder import network_of

_ROWS, _COLUMNS = 32, 64  # torch's format takes multiples of these in half precision


def n_by_m_faults(
    learner: nn.Module | Exported, pattern: NByM | None = None
) -> dict[str, int | None]:
    """How many groups of weights break an N:M pattern, layer by layer.

    Args:
        learner: As for :func:`~l2l_prune.shipping.export`.
        pattern: ``NByM(2, 4)`` by default.

    Returns:
        For the weight of each linear layer and convolution: the number of groups with too many
        weights (0 if the pattern holds), or ``None`` if its inputs cannot be divided into groups.

    Raises:
        TypeError: If an argument has the wrong type.

    Examples:
        >>> layer = nn.Linear(4, 2, bias=False)
        >>> layer.weight.data = torch.tensor([[1.0, 0.0, 2.0, 0.0], [1.0, 2.0, 3.0, 0.0]])
        >>> n_by_m_faults(nn.Sequential(layer))
        {'0.weight': 1}
    """
    pattern = NByM(2, 4) if pattern is None else pattern
    checks.of_type("pattern", pattern, NByM, "an NByM")
    found: dict[str, int | None] = {}
    for path, module in plain_copy(network_of(learner)).named_modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            tensor = LayerTensor(path, module, "weight")
            weight = tensor.swapped(module.weight.detach())
            if weight.shape[1] % pattern.m:
                found[tensor.full_name] = None
                continue
            groups = (weight != 0).movedim(1, -1).reshape(-1, pattern.m)
            found[tensor.full_name] = int((groups.sum(1) > pattern.n).sum())
    return found


def semi_structured_copy(learner: nn.Module | Exported) -> nn.Module:
    """A copy in half precision whose 2:4 linear layers run on sparse tensor cores.

    Other layers are only converted to half precision: torch has no 2:4 convolution. The copy is for
    inference.

    Args:
        learner: As for :func:`~l2l_prune.shipping.export`, on an NVIDIA GPU.

    Raises:
        ValueError: If it is not on a GPU with sparse tensor cores, or no 2:4 linear layer has a
            size that torch's format takes (outputs in multiples of 32, inputs of 64).
    """
    net = plain_copy(network_of(learner))
    device = next(iter(net.parameters())).device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(
            "sparse tensor cores need an NVIDIA GPU of compute capability 8.0 or later, but the "
            f"network is on {device}"
        )
    faults = n_by_m_faults(net)
    net = net.half().eval()
    changed = 0
    for path, module in net.named_modules():
        name = f"{path}.weight" if path else "weight"
        if not isinstance(module, nn.Linear) or faults[name] != 0:
            continue
        if module.out_features % _ROWS or module.in_features % _COLUMNS:
            continue
        sparse = torch.sparse.to_sparse_semi_structured(module.weight.detach())
        module.weight = nn.Parameter(sparse, requires_grad=False)
        changed += 1
    if not changed:
        raise ValueError(
            "no linear layer is 2:4 with outputs divisible by 32 and inputs by 64: train with "
            "pattern=NByM(2, 4) (n_by_m_faults lists the layers that break it)"
        )
    return net
