"""A misuse as a row of a table, and everything that it must leave as it was."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils import prune
from torch.optim import Optimizer

from l2l_prune import PrunedReptile, Pruner
from l2l_prune.channels.pruner import ChannelPruner


def nothing(folder: Path) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Case:
    """One misuse.

    Args:
        name: What the user does wrong.
        act: Does it, with what ``scene`` made.
        error: Type of the exception, exactly.
        words: Regular expression that the message must match: the culprit, and what to do.
        scene: Makes objects by name (in a temporary folder), all of which must be left as they are.
        ours: Whether the package itself must raise; else the message alone counts.
    """

    name: str
    act: Callable[[SimpleNamespace], object]
    error: type[BaseException]
    words: str
    scene: Callable[[Path], dict[str, Any]] = nothing
    ours: bool = True


def snapshot(scene: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Everything that could have been changed: the scene, the process, the files."""
    process = {
        "torch": hash(torch.get_rng_state().numpy().tobytes()),
        "numpy": str(np.random.get_state()),
        "python": hash(random.getstate()),
        "modes": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()),
    }
    files = {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
    return {"scene": _seen(scene), "process": process, "files": files}


def _seen(thing: Any) -> Any:
    if isinstance(thing, Tensor):
        return _values(thing)
    if isinstance(thing, torch.Generator):
        return hash(thing.get_state().numpy().tobytes())
    if isinstance(thing, nn.Module):
        seen: list[Any] = [_module(path, module) for path, module in thing.named_modules()]
        return [seen, _seen(thing.get_extra_state()) if isinstance(thing, PrunedReptile) else None]
    if isinstance(thing, Optimizer):
        return _optimizer(thing)
    if isinstance(thing, (Pruner, ChannelPruner)):
        return [_seen(thing.state_dict()), thing.finalized, _seen(thing.model)]
    if isinstance(thing, Mapping):
        return {str(key): _seen(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [_seen(value) for value in thing]
    return repr(thing)


def _values(tensor: Tensor) -> Any:
    if isinstance(tensor, UninitializedTensorMixin) or tensor.is_meta:
        return "no data"
    return (tensor.dtype, tensor.layout, str(tensor.detach().to_dense().tolist()))


def _module(path: str, module: nn.Module) -> Any:
    parameters = [
        (name, id(p), p.requires_grad, _values(p), p.grad is not None and _values(p.grad))
        for name, p in module._parameters.items()
        if p is not None
    ]
    buffers = [(name, id(b), _values(b)) for name, b in module._buffers.items() if b is not None]
    hooks = [
        len(vars(module)[kind])
        for kind in ("_forward_pre_hooks", "_forward_hooks", "_state_dict_hooks")
    ]
    what = (path, id(module), type(module), module.training, prune.is_pruned(module))
    return [*what, parameters, buffers, hooks]


def _optimizer(optimizer: Optimizer) -> Any:
    groups = [
        [(key, [id(p) for p in v] if key == "params" else repr(v)) for key, v in group.items()]
        for group in optimizer.param_groups
    ]
    states = [(id(p), _seen(state)) for p, state in optimizer.state.items()]
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    return [groups, states, [len(kind) for kind in hooks]]
