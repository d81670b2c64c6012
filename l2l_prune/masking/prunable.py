"""Whether a tensor of a model can be pruned: a mask must reach all of it, at all times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize, prune

from l2l_prune.masking.masked_layer import held_names

_PRUNABLE = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


@dataclass(frozen=True)
class LayerTensor:
    """One prunable tensor: ``module.<name>``, found in the model under ``path``."""

    path: str
    module: nn.Module
    name: str

    @property
    def full_name(self) -> str:
        """Dense name in the model: ``"features.conv2.weight"``."""
        return f"{self.path}.{self.name}" if self.path else self.name

    @property
    def shape(self) -> torch.Size:
        """Its shape, under a mask or not."""
        parameters = self.module._parameters
        weight = parameters.get(self.name)
        weight = parameters[f"{self.name}_orig"] if weight is None else weight
        assert weight is not None
        return weight.shape

    def swapped(self, tensor: Tensor) -> Tensor:
        """Turn a tensor of its shape into ``[outputs, inputs, ...]``, or such a tensor back.

        Transposed convolutions hold ``[inputs, outputs / groups, ...]``, which becomes
        ``[outputs, inputs / groups, ...]`` as convolutions have it; others stay as they are.
        """
        if self.name != "weight" or not isinstance(self.module, nn.modules.conv._ConvTransposeNd):
            return tensor
        grouped = tensor.reshape(self.module.groups, -1, *tensor.shape[1:])
        return grouped.transpose(1, 2).flatten(0, 1)

    def named_by(self, pattern: str) -> bool:
        """Whether a module name, tensor name or ``fnmatch`` pattern means this tensor."""
        return fnmatchcase(self.path, pattern) or fnmatchcase(self.full_name, pattern)


def check_all_prunable(model: nn.Module, tensors: Iterable[LayerTensor]) -> None:
    """Refuse tensors if one of them cannot be pruned, or its weight is used elsewhere too.

    Args:
        model: The whole model, which is searched for shared weights.
        tensors: The tensors to prune.

    Raises:
        ValueError: Naming the tensor and what to do.
    """
    shared = tied(model)
    for tensor in tensors:
        check_prunable(tensor)
        if shared(tensor.module._parameters[tensor.name]):
            raise ValueError(
                f"{tensor.full_name} is tied: the model uses the same weight in another place, "
                "which a mask here would not reach; untie it or leave it out with skip="
            )


def check_prunable(tensor: LayerTensor) -> None:
    """Refuse a tensor that cannot be masked correctly.

    Raises:
        ValueError: Naming the tensor and what to do.
    """
    module, name, where = tensor.module, tensor.name, tensor.full_name
    weight = module._parameters.get(name)
    advice = "leave it out with skip="
    problem = None
    if _already_pruned(module, name):
        own = name in held_names(module)
        how = "finalize() the Pruner that holds its mask" if own else "prune.remove() its mask"
        problem = f"is already pruned: {how} first, or {advice}"
    elif parametrize.is_parametrized(module, name):
        problem = f"is parametrized: remove the parametrization first, or {advice}"
    elif weight is None:
        problem = (
            "is not a parameter of its module (weight_norm or spectral_norm?): "
            f"remove that reparametrization first, or {advice}"
        )
    elif taken := [n for n in (f"{name}_orig", f"{name}_mask") if hasattr(module, n)]:
        problem = (
            f"needs the names {name}_orig and {name}_mask, but its module has an attribute "
            f"{taken[0]} of its own: rename that, or {advice}"
        )
    elif getattr(module, "sparse", False) and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        problem = (
            "gets sparse gradients (sparse=True), which a mask would make dense: make it with "
            f"sparse=False, or {advice}"
        )
    elif getattr(module, "max_norm", None) is not None and isinstance(
        module, (nn.Embedding, nn.EmbeddingBag)
    ):
        problem = (
            "is renormalised in place by its layer (max_norm), which would not reach the weight "
            f"behind a mask: make it with max_norm=None, or {advice}"
        )
    elif isinstance(weight, UninitializedParameter):
        problem = "is not initialized yet: run one forward pass before pruning"
    elif not isinstance(weight, nn.Parameter):
        problem = "is not a Parameter: attach the Pruner to the original model, not to a clone"
    elif weight.is_meta:
        problem = "has no data (meta device): materialize the model before pruning"
    elif weight.numel() == 0:
        problem = f"has no entries: {advice}"
    elif weight.layout != torch.strided:
        problem = f"is {weight.layout}, not a dense tensor: {advice}"
    elif weight.is_inference():
        problem = "was made in inference_mode, so it cannot be changed: make the model outside it"
    elif any(
        step == 0 < size - 1 for step, size in zip(weight.stride(), weight.shape, strict=True)
    ):
        problem = f"has entries that share memory (expand?): clone it first, or {advice}"
    elif weight.dtype not in _PRUNABLE:
        problem = f"is {weight.dtype}, not real floating point: {advice}"
    elif not weight.requires_grad:
        problem = (
            "is frozen (requires_grad=False), so pruned entries could never be retrained: "
            f"unfreeze it or {advice}"
        )
    if problem:
        raise ValueError(f"{where} {problem}")


def _already_pruned(module: nn.Module, name: str) -> bool:
    plain = name.removesuffix("_orig")
    return f"{plain}_mask" in module._buffers or any(
        isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == plain
        for hook in module._forward_pre_hooks.values()
    )


def _identity(weight: Tensor | None) -> object:
    """Same object or same memory means the same weight; empty storage has no address."""
    if weight is None or isinstance(weight, UninitializedParameter) or weight.numel() == 0:
        return id(weight)
    if weight.layout != torch.strided:  # has no address either
        return id(weight)
    address = 0 if weight.is_meta else weight.data_ptr()
    return (weight.device, address) if address else id(weight)


def tied(model: nn.Module) -> Callable[[Tensor | None], bool]:
    """A function that tells whether the model uses a parameter, or its memory, more than once."""
    uses = Counter(
        _identity(weight)
        for module in model.modules()
        for weight in module._parameters.values()
        if weight is not None
    )
    return lambda weight: uses[_identity(weight)] > 1
