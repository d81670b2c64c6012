"""Which channels of a network belong together, found with torch-pruning's dependency graph."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from l2l_prune import _values
from l2l_prune.cavia import FiLM

Importance = Callable[[Any], Tensor]

_CONV = nn.modules.conv._ConvNd
_NORM = nn.modules.batchnorm._NormBase


@dataclass(frozen=True)
class Slot:
    """Where the channels of a group lie in one tensor.

    Attributes:
        module: The layer.
        path: Its name in the model.
        tensor: Name of its parameter or buffer.
        dim: The dimension along which the channels lie.
        index: Positions on it, ``[channels, positions of each]``.
        incoming: Whether the layer reads the channels; else it makes or carries them.
    """

    module: nn.Module
    path: str
    tensor: str
    dim: int
    index: Tensor
    incoming: bool

    @property
    def name(self) -> str:
        """Full name of the tensor."""
        return f"{self.path}.{self.tensor}" if self.path else self.tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only be removed together, from every tensor that holds them.

    Attributes:
        name: The layer that makes them (of several, as in a residual sum, the first found).
        channels: How many there are.
        slots: Where they lie.
        source: torch-pruning's group, for its importance functions.
    """

    name: str
    channels: int
    slots: tuple[Slot, ...]
    source: Any


def find_groups(
    model: nn.Module, example_inputs: Any, skip: Sequence[str] = ()
) -> list[ChannelGroup]:
    """Every group of channels that can be removed without changing the model's output shape.

    Args:
        model: The network; one forward pass is traced, which leaves no trace in it.
        example_inputs: Inputs of a forward pass, as torch-pruning takes them.
        skip: Names or ``fnmatch`` patterns of layers whose output channels stay.

    Raises:
        ImportError: If torch-pruning is missing.
        ValueError: If the model does not run on the inputs, channels pass through a layer that is
            not known here, a name matches nothing, or no group is left.
    """
    graph = _trace(model, example_inputs)
    paths = {module: path for path, module in model.named_modules()}
    groups, names = [], []
    for source in graph.get_all_groups(root_module_types=[_CONV, nn.Linear]):
        kinds = {type(item.dep.target.module).__name__ for item in source}
        readers = [item for item in source if _reads(item) and item.dep.target.module in paths]
        if "_OutputOp" in kinds or not readers:
            continue  # these are the model's output
        makers = {paths[i.dep.target.module] for i in source if _makes(i, paths)}
        names += sorted(makers)
        if not any(fnmatchcase(name, pattern) for name in makers for pattern in skip):
            groups.append(_group(source, paths))
    check_names(names, skip)
    if not groups:
        out = ", ".join(names)
        raise ValueError(f"there are no channels that can be removed (skip= leaves out: {out})")
    _refuse_tied(model, groups)
    return groups


def check_names(names: Sequence[str], patterns: Iterable[str]) -> None:
    """Refuse a name or ``fnmatch`` pattern that means no layer.

    Raises:
        ValueError: Naming it, and the layers that there are.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            known = ", ".join(names)
            raise ValueError(f"no layer with prunable channels is called {pattern!r}: {known}")


def _reads(item: Any) -> bool:
    return "in_channels" in item.dep.handler.__name__


def _makes(item: Any, paths: dict[nn.Module, str]) -> bool:
    module = item.dep.target.module
    return module in paths and isinstance(module, (_CONV, nn.Linear)) and not _reads(item)


def _group(source: Any, paths: dict[nn.Module, str]) -> ChannelGroup:
    channels = len(source[0].idxs)
    slots: list[Slot] = []
    seen = set()
    for item in source:
        module, incoming = item.dep.target.module, _reads(item)
        if module not in paths or (module, incoming) in seen:
            continue  # torch-pruning's own nodes for operations without parameters
        seen.add((module, incoming))
        # The order of positions means nothing; each tells which channel it belongs to.
        roots, order = torch.tensor(item.root_idxs).sort(stable=True)
        each = len(roots) // channels
        if not torch.equal(roots, torch.arange(channels).repeat_interleave(each)):
            raise ValueError(
                f"the channels that reach {paths[module]} are not told apart: leave the layers "
                "before it out with skip="
            )
        positions = torch.tensor(item.idxs)[order].view(channels, each)
        slots += _slots(module, paths[module], positions, incoming)
    return ChannelGroup(paths[source[0].dep.target.module], channels, tuple(slots), source)


def _refuse_tied(model: nn.Module, groups: list[ChannelGroup]) -> None:
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    for group in groups:
        for slot in group.slots:
            if uses[id(slot.module._parameters.get(slot.tensor))] > 1:
                raise ValueError(
                    f"{slot.name} is tied to another weight: leave {group.name} out with skip="
                )


def importance_function(importance: str | Importance) -> Importance:
    """torch-pruning's importance by name, or the function that is given.

    Args:
        importance: ``"l1"``, ``"l2"``, ``"taylor"``, ``"bn_scale"``, or any function from
            torch-pruning's group to a score a channel.

    Raises:
        TypeError: If it is neither.
        ValueError: If there is no such name.
    """
    if callable(importance):
        return importance
    if not isinstance(importance, str):
        raise TypeError(f"importance must be a name or a function, got {_values.told(importance)}")
    scores = _torch_pruning().importance
    made = {
        "l1": lambda: scores.GroupMagnitudeImportance(p=1),
        "l2": lambda: scores.GroupMagnitudeImportance(p=2),
        "taylor": scores.GroupTaylorImportance,
        "bn_scale": scores.BNScaleImportance,
    }
    if importance not in made:
        raise ValueError(f"importance must be one of {', '.join(made)}, got {importance!r}")
    function: Importance = made[importance]()
    return function


def count_operations(model: nn.Module, example_inputs: Any) -> tuple[int, int]:
    """Parameters, and multiply-accumulate operations of a forward pass, by torch-pruning."""
    twin = copy.deepcopy(model).eval()
    macs, parameters = _torch_pruning().utils.count_ops_and_params(twin, example_inputs)
    return int(parameters), int(macs)


def _trace(model: nn.Module, example_inputs: Any) -> Any:
    """torch-pruning's graph; modes, statistics and gradients of the model stay as they were."""
    library = _torch_pruning()

    class FiLMChannels(library.BasePruningFunc):  # type: ignore[name-defined,misc]
        def prune_out_channels(self, layer: FiLM, idxs: list[int]) -> FiLM:
            raise NotImplementedError("only traced")

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: FiLM) -> int:
            return layer.channels

        get_in_channels = get_out_channels

    modes = [(module, module.training) for module in model.modules()]
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    hooks = [(module, module._forward_hooks.copy()) for module in model.modules()]
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return library.DependencyGraph().build_dependency(
                model,
                example_inputs=example_inputs,
                customized_pruners={FiLM: FiLMChannels()},
                verbose=False,
            )
    except Exception:
        for module, forward_hooks in hooks:  # torch-pruning leaves its own behind
            module._forward_hooks = forward_hooks
        _try_inputs(model, example_inputs)  # are they at fault?
        raise
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def _try_inputs(model: nn.Module, example_inputs: Any) -> None:
    """A forward pass as torch-pruning makes it, to tell wrong inputs from its own trouble."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            if isinstance(example_inputs, dict):
                model(**example_inputs)
            elif isinstance(example_inputs, (list, tuple)):
                model(*example_inputs)
            else:
                model(example_inputs)
    except Exception as error:
        raise ValueError(
            f"the model does not run on example_inputs: {type(error).__name__}: {error}"
        ) from error


def _slots(module: nn.Module, path: str, positions: Tensor, incoming: bool) -> list[Slot]:
    """The tensors of one layer that hold channels, and where: ``[channels, each]``."""
    advice = f"leave the layers before {path} out with skip="
    if isinstance(module, FiLM):
        return _film_slots(module, path, positions)
    if isinstance(module, _CONV) and module.groups > 1:
        raise ValueError(f"{path} is a grouped convolution, which cannot be shrunk here: {advice}")
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        raise ValueError(f"{path} is a transposed convolution, unknown here: {advice}")
    if isinstance(module, (_CONV, nn.Linear)):
        names = ["weight"] if incoming else ["weight", "bias"]
        dims = {"weight": int(incoming), "bias": 0}
    elif isinstance(module, _NORM):
        names = ["weight", "bias", "running_mean", "running_var"]
        dims = dict.fromkeys(names, 0)
    else:
        if not list(module.parameters()) and not list(module.buffers()):
            return []
        raise ValueError(f"{path} ({type(module).__name__}) cannot be shrunk here: {advice}")
    held = [name for name in names if getattr(module, name, None) is not None]
    for name in held:
        if name not in module._parameters and name not in module._buffers:
            raise ValueError(
                f"{path}.{name} is pruned or reparametrized already: take that off first"
            )
    return [Slot(module, path, name, dims[name], positions, incoming) for name in held]


def _film_slots(film: FiLM, path: str, positions: Tensor) -> list[Slot]:
    """Scale and shift of channel c are outputs c and C + c of its last linear layer."""
    last, name = (film.linear, "linear") if film.hidden is None else (film.hidden, "hidden")
    both = torch.cat([positions, positions + film.channels], dim=1)
    parts = [tensor for tensor in ("weight", "bias") if getattr(last, tensor) is not None]
    return [Slot(last, f"{path}.{name}", tensor, 0, both, False) for tensor in parts]


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(
            f'{error}; pruning channels needs: pip install "l2l-prune[structured]"'
        ) from None
    return torch_pruning
