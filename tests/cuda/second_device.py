"""A second device without a GPU: torch's Python backend, whose tensors hold tensors of the CPU.

Operations run on the CPU, so that all numbers are the CPU's bit for bit. Tensors of both devices
are refused in one operation where CUDA refuses them. Unlike torch's fake tensors, these train.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import overrides
from torch.utils import _python_dispatch, _pytree, backend_registration

DEVICE = "second"
_aten = torch.ops.aten
_COPIES = (_aten.copy_.default, _aten._to_copy.default)
_BY_INDEX = (_aten.index.Tensor, _aten.index_put_.default, _aten._index_put_impl_.default)


class Tensor(torch.Tensor):
    """Has the second device's name and, in :attr:`inner`, its numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Tensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(DEVICE, 0),
        )
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:
        return f"<{self.inner} on the second device>"

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        if function == torch.Tensor.tolist:  # torch refuses it for subclasses
            return args[0].inner.tolist()
        if function == torch.Tensor.data.__get__:  # torch would return it without its numbers
            return Tensor(args[0].inner)
        if function == torch.Tensor.__getitem__ and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]))  # torch would make it on the device
        with torch._C.DisableTorchFunctionSubclass():
            found = function(*args, **(kwargs or {}))
        if function == torch.Tensor.data.__set__:  # else only torch's side would change
            args[0].inner = args[1].inner
        return found

    @classmethod
    def __torch_dispatch__(cls, function, kinds, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Numbers(overrides.TorchFunctionMode):
    """``torch.tensor(numbers, device=...)``, which torch makes without a dispatch."""

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.tensor and _is_second(kwargs.get("device")):
            device = kwargs.pop("device")
            return torch.tensor(*args, **kwargs).to(device)
        return function(*args, **kwargs)


class _Devices(_python_dispatch.TorchDispatchMode):
    """Within it, tensors can be made on the second device and moved to it."""

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _is_second(kwargs.get("device")) or any(issubclass(each, Tensor) for each in kinds):
            return _run(function, args, kwargs)
        return function(*args, **kwargs)


def _is_second(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE


def _run(function, args, kwargs):
    tensors = [t for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    here = [t for t in tensors if isinstance(t, Tensor)]
    must_fit = tensors
    if function in _BY_INDEX and isinstance(args[0], Tensor):  # indices may be on the CPU
        must_fit = [args[0], *args[2:3]]
    elsewhere = {t.device for t in must_fit if t.dim() and not isinstance(t, Tensor)}
    if here and elsewhere and function not in _COPIES:
        raise RuntimeError(f"{function}: tensors on the second device and on {elsewhere}")
    plain_args, plain = _pytree.tree_map_only(Tensor, lambda t: t.inner, (args, kwargs))
    to = kwargs.get("device")
    if _is_second(to):
        plain = {**plain, "device": "cpu"}
    found = function(*plain_args, **plain)
    if not (here if to is None else _is_second(to)):
        return found
    wrapped = _pytree.tree_map_only(torch.Tensor, Tensor, found)
    return _python_dispatch.return_and_correct_aliasing(function, args, kwargs, wrapped)


# What torch and the library ask of a device's module; its random numbers are the CPU's.
_MODULE = types.SimpleNamespace(
    is_initialized=lambda: True,
    is_available=lambda: True,
    _is_in_bad_fork=lambda: False,
    current_device=lambda: 0,
    device_count=lambda: 1,
    device=lambda device: contextlib.nullcontext(),
    get_rng_state=lambda device: torch.empty(0),
    set_rng_state=lambda state, device: None,
    manual_seed=lambda seed: None,
    manual_seed_all=lambda seed: None,
    synchronize=lambda device: None,
    get_amp_supported_dtype=lambda: [torch.bfloat16],
)


@contextlib.contextmanager
def devices() -> Iterator[None]:
    """Within the block torch knows :data:`DEVICE`."""
    if not hasattr(torch, DEVICE):  # once in a process
        backend_registration._setup_privateuseone_for_python_backend(DEVICE, _MODULE)
    with _Devices(), _Numbers():
        yield
