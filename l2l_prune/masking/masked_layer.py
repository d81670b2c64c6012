"""Holding a mask on a module through torch.nn.utils.prune, without its stale or leaking tensors.

``torch.nn.utils.prune`` recomputes ``module.weight`` in a forward pre-hook and stores it as a
plain attribute, which breaks deepcopy, goes stale after every optimizer step, leaks functional
tensors, and moves the parameter to the end of ``parameters()``. Here ``weight`` is a property of
a subclass of the module's own class instead: each access multiplies ``weight_orig`` by
``weight_mask`` with torch's own ``apply_mask``. Torch's names and its pre-hook object stay, so
that ``prune.is_pruned`` and other tools recognise the module.

An entry of a mask that is not 0 keeps its weight whole: averaging a model's buffers (EMA, SWA)
turns masks into fractions, but the averaged ``weight_orig`` is already the average of the masked
weights. Writing in place to ``module.weight`` writes to a product that nobody holds; functions
given to ``Module.apply`` and ``reset_parameters()`` get the stored weight instead.

Many few-shot programs (after CloserLookFewShot: LibFewShot, ...) keep a task's adapted weight as an
attribute ``fast`` of the parameter, and their layers read ``module.weight.fast``: that is under
the mask too.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from l2l_prune._basics import checks


class HeldMask(prune.BasePruningMethod):
    """The pruning method that torch sees on a module; masks are set with :func:`set_mask`."""

    PRUNING_TYPE = "unstructured"

    @property
    def __name__(self) -> str:
        """Asked for by torch.jit.script."""
        raise AttributeError("a pruned module cannot be scripted: call Pruner.finalize() first")

    def __init__(self, tensor_name: str) -> None:
        self._tensor_name = tensor_name

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Do nothing, since the property computes the masked tensor at each access."""

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Return ``default_mask``: masks come from the schedule, not from torch's calls."""
        return default_mask

    def remove(self, module: nn.Module) -> None:
        """Undo :func:`attach` for ``torch.nn.utils.prune.remove``, keeping the pruned zeros."""
        hooks = OrderedDict(module._forward_pre_hooks)
        detach(module, self._tensor_name)
        # torch deletes the hook itself next; give it a dict of this module's own, since
        # learn2learn's clones share the dict with the model that they were cloned from.
        module._forward_pre_hooks = hooks


def attach(module: nn.Module, name: str, *, dense_keys: bool = False) -> None:
    """Put ``module.<name>`` under an all-ones mask.

    The ``Parameter`` object stays the same and keeps its place in ``parameters()``; it is then
    called ``<name>_orig``, beside the buffer ``<name>_mask``.

    Args:
        module: The module that owns the parameter (see ``prunable.check_prunable``).
        name: Name of the parameter in ``module``.
        dense_keys: Let ``state_dict()`` give the masked weight as ``<name>``, instead of
            ``<name>_orig`` and ``<name>_mask``.
    """
    weight = cast(nn.Parameter, module._parameters[name])
    names = held_names(module)
    base = held_base(module)
    _rename_parameter(module, name, f"{name}_orig")
    mask = torch.ones_like(weight, memory_format=torch.preserve_format)
    module.register_buffer(f"{name}_mask", _marked(mask))
    module.__dict__.pop("_flat_weights", None)  # recurrent layers: see _flat_weights_property
    module.__class__ = held_class(base, (*names, name))
    module.register_forward_pre_hook(HeldMask(name))
    if dense_keys and not names:
        module._register_state_dict_hook(_give_dense_keys)  # type: ignore[no-untyped-call]


def detach(module: nn.Module, name: str) -> None:
    """Undo :func:`attach`: original class, name, order and keys, with the pruned weights at 0.

    Args:
        module: A module (or a learn2learn clone of one) that holds a mask on ``name``.
        name: Name of the parameter in ``module``.

    Raises:
        TypeError: If ``module`` holds no such mask, or its class was wrapped by other code.
    """
    if not can_detach(module, name):
        raise TypeError(f"{type(module).__name__} holds no mask on {name!r} that could be removed")
    names, base = held_names(module), held_base(module)
    remaining = tuple(held for held in names if held != name)
    original, mask = held_tensors(module, name)
    module.__class__ = held_class(base, remaining) if remaining else base
    del module._buffers[f"{name}_mask"]
    module._non_persistent_buffers_set.discard(f"{name}_mask")
    _rename_parameter(module, f"{name}_orig", name)
    if original.is_leaf:
        with torch.no_grad():
            original.masked_fill_(mask == 0, 0)
    else:  # a clone in the middle of an inner loop keeps its graph
        module._parameters[name] = original * mask.to(original.dtype)  # type: ignore[assignment]
    hooks = module._forward_pre_hooks.items()
    module._forward_pre_hooks = OrderedDict(
        (key, hook)
        for key, hook in hooks
        if not (isinstance(hook, HeldMask) and hook._tensor_name == name)
    )
    if not remaining:
        saving = module._state_dict_hooks.items()
        module._state_dict_hooks = OrderedDict(
            (key, hook) for key, hook in saving if hook is not _give_dense_keys
        )
    if isinstance(module, nn.RNNBase) and not remaining:
        module._flat_weights = [getattr(module, key) for key in module._flat_weights_names]


def can_detach(module: nn.Module, name: str) -> bool:
    """Whether ``module`` holds a mask on ``name``, and its class is not wrapped by other code."""
    names, base = held_names(module), held_base(module)
    return name in names and _is_own_class(type(module), base, names)


def set_mask(module: nn.Module, name: str, mask: Tensor) -> None:
    """Replace the mask by a new buffer, and set the weights that it prunes to 0.

    The old buffer is left as it was: a clone made earlier may still need it for its backward.

    Args:
        module: A module that holds a mask on ``name``.
        name: Name of the parameter in ``module``.
        mask: Boolean tensor of the parameter's shape; True stays.
    """
    put_mask(module, name, mask)
    original, new = held_tensors(module, name)
    with torch.no_grad():
        original.masked_fill_(new == 0, 0)  # also where it is infinite


def put_mask(module: nn.Module, name: str, mask: Tensor) -> None:
    """Replace the mask by a new buffer; the stored weights stay as they are.

    Args:
        module: A module that holds a mask on ``name``.
        name: Name of the parameter in ``module``.
        mask: Boolean tensor of the parameter's shape; True stays.
    """
    original, _ = held_tensors(module, name)
    new = torch.empty_like(original).copy_(mask)  # in its memory format, for fast products
    module._buffers[f"{name}_mask"] = _marked(new.data)  # counts its versions from 0


_OWN: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()
"""The own masks of modules that lend others. Clones and copies lend nothing."""


def lend_mask(module: nn.Module, name: str, mask: Tensor) -> None:
    """Put another mask in place until :func:`return_mask`, for what runs or is cloned meanwhile.

    Stored weights keep what it prunes, also when they are written, saved or loaded: then the
    module's own mask holds.

    Args:
        module: A module that holds a mask on ``name``, and lends none there.
        name: Name of the parameter in ``module``.
        mask: Boolean tensor of the parameter's shape; True stays.
    """
    _OWN.setdefault(module, {})[name] = cast(Tensor, module._buffers[f"{name}_mask"])
    put_mask(module, name, mask)


def return_mask(module: nn.Module, name: str) -> None:
    """Undo :func:`lend_mask`; clones that were made since keep what was lent."""
    module._buffers[f"{name}_mask"] = _OWN[module].pop(name)


def lent_masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks that the modules of ``model`` lend now, by the names of their buffers."""
    return {
        f"{path}.{name}_mask" if path else f"{name}_mask": cast(
            Tensor, module._buffers[f"{name}_mask"]
        )
        for path, module in model.named_modules()
        for name in _OWN.get(module, {})
    }


@contextmanager
def _own_masks(module: nn.Module) -> Iterator[None]:
    """Within the block the module has its own masks again, whatever it lends."""
    own = dict(_OWN.get(module, {}))
    lent = {name: cast(Tensor, module._buffers[f"{name}_mask"]) for name in own}
    for name in own:
        return_mask(module, name)
    try:
        yield
    finally:
        for name, mask in lent.items():
            lend_mask(module, name, mask)


def open_mask(module: nn.Module, name: str) -> bool:
    """Let gradients of ``<name>_orig`` reach its pruned entries, until :func:`close_mask`.

    ``module.<name>`` has the same values, but its pruned entries are then those of this module's
    own parameter, in every clone and functional copy too: no inner step moves them.

    Args:
        module: A module that holds a mask on ``name``, and 0 under it.
        name: Name of the parameter in ``module``.

    Returns:
        Whether it was not open before.
    """
    opened = module.__dict__.setdefault("_l2l_prune_opened", {})
    if name in opened:
        return False
    opened[name], _ = held_tensors(module, name)
    return True


def close_mask(module: nn.Module, name: str) -> None:
    """Undo :func:`open_mask`, in the clones that were made since as well."""
    opened = module.__dict__["_l2l_prune_opened"]
    del opened[name]  # clones share this dict
    if not opened:
        del module.__dict__["_l2l_prune_opened"]


def held_tensors(module: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """The stored parameter ``<name>_orig`` and the buffer ``<name>_mask`` of ones and zeros."""
    _make_exact(module, name)
    original = cast(Tensor, module._parameters[f"{name}_orig"])
    return original, cast(Tensor, module._buffers[f"{name}_mask"])


def stored_tensor(module: nn.Module, name: str) -> Tensor:
    """The stored parameter, whether there is a mask on it or not."""
    parameters = module._parameters
    return cast(Tensor, parameters[f"{name}_orig" if name in held_names(module) else name])


def _marked(mask: Tensor) -> Tensor:
    """Mark a mask as holding only ones and zeros, which is true until it is written to.

    The mark counts while the version is 0, which no mask has after a write, copies included.
    """
    mask._l2l_prune_exact = True  # type: ignore[attr-defined]
    return mask


def _make_exact(module: nn.Module, name: str) -> None:
    """Replace a mask that was written to (averaged or loaded, say) by one of ones and zeros.

    Does not wait for the device. The old buffer is left alone: a backward may still need it. The
    new one is an ordinary tensor, whatever surrounds the read: inference mode, vmap, grad.
    """
    mask = module._buffers.get(f"{name}_mask")
    if mask is None:
        return
    if not mask.is_inference() and not mask._version and hasattr(mask, "_l2l_prune_exact"):
        return
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch._C._functorch.is_functorch_wrapped_tensor(mask):  # else it is here for a call
            stack.enter_context(torch._C._DisableFuncTorch())
        module._buffers[f"{name}_mask"] = _marked((mask != 0).to(mask.dtype))


def make_exact(model: nn.Module) -> None:
    """Make the masks of ``model`` ones and zeros again, after writes that leave no trace.

    Lightning's weight averaging writes through ``.data``, which counts no version.
    """
    for module in model.modules():
        for name in held_names(module):
            mask = module._buffers[f"{name}_mask"]
            if mask is not None and hasattr(mask, "_l2l_prune_exact"):
                del mask._l2l_prune_exact
            _make_exact(module, name)


@contextmanager
def stored_weights(module: nn.Module) -> Iterator[None]:
    """Within the block ``module.<name>`` is the stored parameter and can be written in place.

    What was written to pruned entries is set to 0 afterwards.

    Args:
        module: A module that holds masks.
    """
    names, base = held_names(module), held_base(module)
    if type(module) is not held_class(base, names):
        yield
        return
    opened = _stored_class(base, names)
    module.__class__ = opened
    try:
        yield
    finally:
        if type(module) is opened:
            module.__class__ = held_class(base, names)
        with torch.no_grad(), _own_masks(module):
            for name in held_names(module):
                original, mask = held_tensors(module, name)
                if original.is_leaf:
                    original.masked_fill_(mask == 0, 0)


def held_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of ``module`` (not of its children) that are under a mask."""
    return getattr(type(module), "_l2l_prune_held", ())


def check_unmasked(name: str, model: nn.Module) -> None:
    """Refuse a model with masks; ``name`` is what the message calls it.

    Raises:
        ValueError: Saying what to do.
    """
    if any(held_names(module) for module in model.modules()):
        raise ValueError(f"{name} has masks: give one without (Pruner.finalize removes them)")


def held_full_names(model: nn.Module) -> set[str]:
    """Dense names of all tensors of a model that are under a mask, whoever holds it."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in held_names(module)
    }


def held_base(module: nn.Module) -> type[nn.Module]:
    """The class that ``module`` has without masks."""
    return getattr(type(module), "_l2l_prune_base", type(module))


def plain_copy(model: nn.Module) -> nn.Module:
    """A deep copy of ``model`` without masks: plain modules, pruned weights at 0."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for name in held_names(module):
            detach(module, name)
    return twin


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that ``model`` would have without masks: dense keys, pruned weights at 0.

    Args:
        model: Any module; masks may be held on it or not.

    Returns:
        Keys in the order of a model that was never pruned, so that scripts which load dense
        checkpoints read it. The tensors are detached; masked ones are new, others are shared
        with the model, as in ``Module.state_dict()``.

    Raises:
        TypeError: If ``model`` is not a module.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 1))
        >>> attach(net[0], "weight")
        >>> list(dense_state_dict(net))
        ['0.weight', '0.bias']
    """
    checks.of_type("model", model, nn.Module, "a torch.nn.Module")
    state = model.state_dict()
    masks: set[str] = set()
    originals: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name in held_names(module):
            masks.add(f"{prefix}{name}_mask")
            originals[f"{prefix}{name}_orig"] = f"{prefix}{name}"
    dense: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in originals:
            mask = state[f"{originals[key]}_mask"]
            dense[originals[key]] = value * (mask != 0)
        elif key not in masks:
            dense[key] = value
    return dense


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def held_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of ``base`` in which each of ``names`` is a masked property; one per pair."""
    if (base, names) not in _CLASSES:
        _CLASSES[base, names] = _make_held_class(base, names)
    return _CLASSES[base, names]


def _make_held_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    def fill(namespace: dict[str, Any]) -> None:
        namespace["__module__"] = base.__module__
        namespace["_l2l_prune_base"] = base
        namespace["_l2l_prune_held"] = names
        namespace["_l2l_prune_opened"] = {}  # see open_mask
        for name in names:
            namespace[name] = _masked_property(base, name)
        if issubclass(base, nn.RNNBase):
            namespace["_flat_weights"] = _flat_weights_property()

        def reduce_ex(self: nn.Module, protocol: Any) -> Any:
            return _reduce_held(base, names, base.__reduce_ex__(self, protocol))

        def load(self: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
            for key in (f"{prefix}{name}_mask" for name in names):
                if isinstance(state_dict.get(key), Tensor):  # fractions, if it was averaged
                    state_dict[key] = (state_dict[key] != 0).to(state_dict[key].dtype)
            with _own_masks(self):
                _translate_dense_keys(self, state_dict, prefix, error_msgs=args[-1])
                base._load_from_state_dict(self, state_dict, prefix, *args)

        def register(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            if name in names:  # torch's message would say that the attribute already exists
                _refuse_assignment(base, name)
            base.register_parameter(self, name, parameter)

        def apply(self: nn.Module, fn: Callable[[nn.Module], Any]) -> nn.Module:
            def within(module: nn.Module) -> None:
                if module is self:
                    with stored_weights(self):
                        fn(self)
                else:
                    fn(module)

            return base.apply(self, within)

        namespace["apply"] = apply
        for method in ("reset_parameters", "_reset_parameters"):
            if hasattr(base, method):
                namespace[method] = _on_stored_weights(getattr(base, method))
        namespace["register_parameter"] = register
        namespace["__reduce_ex__"] = reduce_ex
        namespace["_load_from_state_dict"] = load

    return types.new_class(f"Pruned{base.__name__}", (base,), exec_body=fill)


def _on_stored_weights(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with stored_weights(self):
            return method(self, *args, **kwargs)

    return run


_STORED: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _stored_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The held class while :func:`stored_weights` is active."""

    def fill(namespace: dict[str, Any]) -> None:
        for name in names:
            namespace[name] = _masked_property(base, name, stored=True)

    if (base, names) not in _STORED:
        held = held_class(base, names)
        _STORED[base, names] = types.new_class(held.__name__, (held,), exec_body=fill)
    return _STORED[base, names]


def _is_own_class(cls: type[nn.Module], base: type[nn.Module], names: tuple[str, ...]) -> bool:
    """Whether a class was made here, and is not a wrapper around such a class."""
    return cls in (_CLASSES.get((base, names)), _STORED.get((base, names)))


def _masked_property(base: type[nn.Module], name: str, stored: bool = False) -> property:
    method = HeldMask(name)

    def read_stored(module: nn.Module) -> Tensor:
        return cast(Tensor, module._parameters[f"{name}_orig"])

    def read(module: Any) -> Tensor:
        compiling = torch.compiler.is_compiling()
        if not compiling:
            _make_exact(module, name)
        # Not from _parameters: DataParallel's replicas hold plain attributes.
        original, mask = getattr(module, f"{name}_orig"), getattr(module, f"{name}_mask")
        if name in module._l2l_prune_opened:
            return torch.where(mask != 0, original, module._l2l_prune_opened[name])
        if compiling:  # the mask may hold fractions
            return cast(Tensor, original * (mask != 0).to(original.dtype))
        masked: Any = method.apply_mask(module)  # type: ignore[no-untyped-call]
        if hasattr(original, "fast"):
            fast = original.fast
            masked.fast = fast * mask.to(fast.dtype) if isinstance(fast, Tensor) else fast
        return cast(Tensor, masked)

    def write(module: nn.Module, value: object) -> None:
        _refuse_assignment(base, name)

    def delete(module: nn.Module) -> None:
        _refuse_assignment(base, name)

    return property(read_stored if stored else read, write, delete)


def _refuse_assignment(base: type[nn.Module], name: str) -> NoReturn:
    raise RuntimeError(
        f"{base.__name__}.{name} is under an l2l_prune mask and cannot be "
        f"assigned: write to '{name}_orig' (its name in functional_call and state dicts), "
        "or take the masks off first with Pruner.finalize()"
    )


def _flat_weights_property() -> property:
    """Recurrent layers cache their weights in a list, which would go stale: build it on access."""

    def read(module: Any) -> list[Tensor]:
        held = {f"{name}_orig": name for name in held_names(module)}
        return [getattr(module, held.get(name, name)) for name in module._flat_weights_names]

    def write(module: nn.Module, value: object) -> None:
        """Ignore torch's own refreshes of the cache."""

    return property(read, write)


def _reduce_held(base: type[nn.Module], names: tuple[str, ...], reduced: Any) -> Any:
    """Pickle and copy through the base class, since the subclass has no importable name."""
    function, args, *rest = reduced
    if rest and "_l2l_prune_opened" in rest[0]:  # a copy is another model: its masks are closed
        rest[0] = {key: value for key, value in rest[0].items() if key != "_l2l_prune_opened"}
    if function.__name__ != "__newobj__" or not _is_own_class(args[0], base, names):
        raise TypeError(
            f"{base.__name__} has its own way of pickling, which would lose the masks: "
            "save dense_state_dict(model), or finalize the Pruner first"
        )
    return (_new_held, (base, names, *args[1:]), *rest)


def _new_held(base: type[nn.Module], names: tuple[str, ...], *args: Any) -> nn.Module:
    cls = held_class(base, names)
    return cls.__new__(cls, *args)


def _give_dense_keys(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    """State dict hook for ``attach(dense_keys=True)``; the order of the keys stays.

    The tensors are the model's own, as in any state dict: programs that average models write to
    them.
    """
    mine = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    own = _OWN.get(module, {})
    for name in held_names(module):
        mask, key = mine.pop(f"{prefix}{name}_mask"), f"{prefix}{name}_orig"
        if module._parameters[key.removeprefix(prefix)].is_leaf:  # type: ignore[union-attr]
            with torch.no_grad():  # an outer step may not have been ended yet
                mine[key].masked_fill_(own.get(name, mask) == 0, 0)
        else:  # a clone in the middle of an inner loop keeps its graph
            mine[key] = mine[key] * (mask != 0)
    dense = {f"{prefix}{name}_orig": f"{prefix}{name}" for name in held_names(module)}
    state_dict.update((dense.get(key, key), value) for key, value in mine.items())


def _translate_dense_keys(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]
) -> None:
    """Accept dense weights that fit the mask; refuse others, even with strict=False."""
    for name in held_names(module):
        dense, original = f"{prefix}{name}", f"{prefix}{name}_orig"
        if dense not in state_dict or original in state_dict:
            continue
        _, mask = held_tensors(module, name)
        value = state_dict[dense]
        fits = value.shape != mask.shape or not bool(value.to(mask.device)[mask == 0].any())
        if fits:  # torch reports a wrong shape
            state_dict[original] = state_dict.pop(dense)
            state_dict[f"{prefix}{name}_mask"] = mask.clone()
        else:
            error_msgs.append(
                f"{dense} is a dense weight, but the model is pruned: load it before the pruning "
                "phase, or after the Pruner.state_dict() that belongs to it"
            )


def _rename_parameter(module: nn.Module, old: str, new: str) -> None:
    """Rename in place, so that the order of ``parameters()`` does not change."""
    items = [(new if key == old else key, value) for key, value in module._parameters.items()]
    module._parameters.clear()
    module._parameters.update(items)
    if isinstance(module, nn.RNNBase):  # higher looks these names up among the parameters
        names = module._flat_weights_names
        module._flat_weights_names = [new if name == old else name for name in names]
