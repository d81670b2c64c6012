"""A trained learner as a folder without code in it, and back."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2l_prune._basics import checks
from l2l_prune._basics.arguments import is_plain
from l2l_prune._basics.files import replace_file
from l2l_prune._basics.packing import ALL, NO_PLACES, WAYS, Packed, pack, unpack
from l2l_prune._basics.tensor_files import DamagedFile
from l2l_prune.channels.pruner import Exported
from l2l_prune.fewshot.evaluation import Mean
from l2l_prune.fewshot.models import CaviaConv4, CaviaMLP, Conv4
from l2l_prune.masking.masked_layer import check_unmasked, dense_state_dict, held_base
from l2l_prune.metalearners.cavia import CAVIA
from l2l_prune.metalearners.fields import FourierFeatureMLP, Siren
from l2l_prune.metalearners.sparse_maml import SparseMAML
from l2l_prune.reptile.learner import Learner
from l2l_prune.reptile.reptile import PrunedReptile
from l2l_prune.shipping.manifest import NAME, manifest_text, read_manifest
from l2l_prune.shipping.tensor_reader import read_safetensors

TENSORS = "model.safetensors"

_NETWORKS: tuple[type[nn.Module], ...] = (Conv4, CaviaConv4, CaviaMLP, Siren, FourierFeatureMLP)
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


def export(
    learner: nn.Module | Exported,
    folder: Path | str,
    *,
    half: bool = False,
    data: str | None = None,
    accuracy: Mean | float | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a trained learner as ``model.safetensors`` and ``export.json``; nothing is pickled.

    Masked weights are written as zeros. Tensors with many zeros are written as their other values,
    with a bitmask or indices, whichever is smaller. A network with cut channels is written small.

    Args:
        learner: A network with or without masks, a :class:`~l2l_prune.PrunedReptile` or one of its
            learners (their network is written), or the result of :meth:`ChannelPruner.export`.
        folder: The folder to write to; made if missing. An export in it is replaced.
        half: Write real numbers in half precision; :func:`load` restores their type.
        data: What the network was trained on.
        accuracy: Its accuracy; say in ``data`` or ``about`` on which tasks.
        about: More plain values, such as the inner learning rate and the number of steps.

    Returns:
        The content of ``export.json``.

    Raises:
        ImportError: If safetensors is missing (extra ``ship``).
        OSError: If a file cannot be written.
        RuntimeError: If the learner was collected: export the PrunedReptile then.
        TypeError: If an argument has the wrong type, or the state holds anything but tensors.
        ValueError: If numbers are not finite in half precision, the accuracy is not finite, or a
            tensor's type cannot be written.

    Examples:
        >>> import tempfile
        >>> from l2l_prune import DSDSchedule, PrunedReptile
        >>> schedule = DSDSchedule(0.9, pretrain=0, prune=1, retrain=0)
        >>> reptile = PrunedReptile(Conv4(ways=5, channels=8), schedule)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     told = export(reptile, folder, half=True)
        ...     net = load(folder)
        >>> told["tensors"]["features.conv2.weight"]["stored"], type(net).__name__
        ('bitmask', 'Conv4')
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError(f'{error}; exporting needs: pip install "l2l-prune[ship]"') from None
    network = network_of(learner)
    checks.true_or_false("half", half)
    if data is not None:
        checks.of_type("data", data, str, "a string")
    told = {"data": data, "accuracy": _accuracy(accuracy), "about": _plain(about)}
    packed, entries = _pack_all(network, half)
    content = save(packed)
    described = {
        "network": _describe(network),
        "tensors": entries,
        "rates": _rates(network, entries),
        **told,
        "files": {
            TENSORS: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()},
        },
    }
    text = manifest_text(described)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    # Both are complete before either replaces that of an earlier export.
    with replace_file(place / NAME) as manifest, replace_file(place / TENSORS) as tensors:
        manifest.write_text(text, encoding="utf-8")
        tensors.write_bytes(content)
    return read_manifest(place)


def load(folder: Path | str, model: nn.Module | None = None) -> nn.Module:
    """Load the network of an export, with torch and this library only; the files run no code.

    Checksums are compared first, and nothing is changed if anything does not match.

    Args:
        folder: Written by :func:`export`.
        model: A network of the exported class with layers of the same classes, without masks, that
            receives the weights; where channels are cut out, its layers become small. It may be
            left out for networks of this library, which are made again from their arguments.

    Returns:
        ``model``, or the new network; each of its layers is in the mode (training or evaluation) of
        the exported one.

    Raises:
        OSError: If a file cannot be read.
        TypeError: If ``model`` is not a module.
        ValueError: If the export is damaged, of another version of the format, or of another
            network; ``model`` is then unchanged.
    """
    place = Path(folder)
    manifest = read_manifest(place)
    state = _read_tensors(place, manifest)
    network = manifest["network"]
    if model is None:
        model = _remade(network, place)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in state and tensor.is_floating_point() and state[name].is_floating_point():
                tensor.data = tensor.data.to(state[name].dtype)
    checks.of_type("model", model, nn.Module, "a torch.nn.Module")
    check_unmasked("model", model)
    if (given := _class_path(model)) != network["class"]:
        raise ValueError(f"{place} is an export of {network['class']}, but model is a {given}")
    _check_layers(model, network.get("layers"))
    sizes = _changed_sizes(model, network["settings"])
    _check_shapes(model, state, cut=bool(sizes))
    for module, name, value in sizes:
        setattr(module, name, value)
    _fill(model, state)
    model.train(network["training"])
    for path, module in model.named_modules():
        if path in network.get("other_mode", ()):  # frozen normalisation, say
            module.training = not model.training
    return model


def network_of(learner: nn.Module | Exported) -> nn.Module:
    """The network of a learner, a meta-learner or an export of channels; else the module itself."""
    if isinstance(learner, Learner):
        return learner.workspace.module
    if isinstance(learner, (PrunedReptile, Exported)):
        return learner.module
    if isinstance(learner, (CAVIA, SparseMAML)) and learner.has_adapted:
        raise ValueError(
            f"this is a {type(learner).__name__} learner that has adapted to a task, which no file "
            "would hold: give the meta-learner that it was cloned from, and adapt on the device"
        )
    return checks.of_type("learner", learner, nn.Module, "a torch.nn.Module")


# ---- writing --------------------------------------------------------------------------------


def _pack_all(network: nn.Module, half: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the file, and what ``export.json`` says about each."""
    packed: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    for name, tensor in dense_state_dict(network).items():
        checks.of_type(name, tensor, Tensor, "a tensor, like everything in the state dict")
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in _DTYPES or tensor.layout != torch.strided:
            raise ValueError(f"{name} has the type {tensor.dtype}, which cannot be exported")
        if half and tensor.is_floating_point():
            rounded = tensor.half()
            if not bool((rounded.isfinite() | ~tensor.isfinite()).all()):
                raise ValueError(f"{name} holds numbers that are not finite in half precision")
            tensor = rounded
        found = pack(tensor)
        for key, value in _keys(name, found.how).items():
            packed[key] = found.values if value else found.places
        if found.how == ALL:
            packed[name] = found.values.view(tensor.shape)
        entries[name] = {
            "shape": list(tensor.shape),
            "dtype": kind,
            "stored": found.how,
            "nonzero": int(tensor.count_nonzero()),
        }
    if sum(len(_keys(name, entry["stored"])) for name, entry in entries.items()) != len(packed):
        raise ValueError(
            'a name in the state dict contains "#bitmask" or "#indices": rename that tensor'
        )
    return packed, entries


def _keys(name: str, how: str) -> dict[str, bool]:
    """The names of a tensor in the file, and whether each holds its values."""
    return {name: True} if how == ALL else {name: True, f"{name}#{how}": False}


def _describe(network: nn.Module) -> dict[str, Any]:
    known, training = _class_path(network) in map(_path, _NETWORKS), network.training
    return {
        "class": _class_path(network),
        "layers": _layers(network),
        "arguments": getattr(network, "made_with", None) if known else None,
        "training": network.training,
        "other_mode": [path for path, m in network.named_modules() if m.training != training],
        "settings": {path: found for path, found in _settings(network) if found},
    }


def _layers(network: nn.Module) -> dict[str, str]:
    """The class of each module below the network."""
    return {path: _class_path(module) for path, module in network.named_modules() if path}


def _settings(network: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """Plain attributes of each layer: sizes, strides, rates, ..."""
    for path, module in network.named_modules():
        values = vars(module).items()
        yield path, {k: v for k, v in values if k[0] != "_" and k != "training" and is_plain(v)}


def _rates(network: nn.Module, entries: dict[str, Any]) -> dict[str, Any]:
    """The fractions of the weights that are 0."""
    names = [name for name, _ in network.named_parameters()]
    names = [n if n in entries else n.removesuffix("_orig") for n in names]
    numel = {name: math.prod(entries[name]["shape"]) for name in names}
    left = {name: entries[name]["nonzero"] for name in names}
    whole = sum(numel.values())
    return {
        "parameters": whole,
        "zero": 1 - sum(left.values()) / whole if whole else 0.0,
        "by_tensor": {n: 1 - left[n] / numel[n] for n in names if left[n] < numel[n]},
    }


def _accuracy(accuracy: Mean | float | None) -> dict[str, Any] | None:
    if accuracy is None:
        return None
    if not isinstance(accuracy, Mean):
        return {"mean": checks.number("accuracy", accuracy)}
    ci95 = accuracy.ci95 if math.isfinite(accuracy.ci95) else None
    return {
        "mean": checks.number("accuracy", accuracy.mean),
        "ci95": ci95,
        "tasks": len(accuracy.values),
    }


def _plain(about: Mapping[str, Any] | None) -> dict[str, Any]:
    if about is None:
        return {}
    if not isinstance(about, Mapping):
        raise TypeError(f"about must map names to plain values, got {checks.describe(about)}")
    try:
        found: dict[str, Any] = json.loads(json.dumps(dict(about), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"about must hold only values that JSON can hold ({error})") from None
    return found


# ---- reading --------------------------------------------------------------------------------


def _read_tensors(place: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    path = place / TENSORS
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest["files"][TENSORS]["sha256"]:
        raise DamagedFile(path, f"its checksum is not the one in {NAME}")
    stored = read_safetensors(data, path)
    state = {}
    for name, entry in manifest["tensors"].items():
        shape, how = torch.Size(entry["shape"]), entry["stored"]
        try:
            places = NO_PLACES if how == ALL else stored[f"{name}#{how}"]
            packed = Packed(WAYS[WAYS.index(how)], stored[name].flatten(), places)
            values = unpack(packed, shape.numel())
            state[name] = values.view(shape).to(_DTYPES[entry["dtype"]])
        except (KeyError, ValueError) as error:
            raise DamagedFile(path, f"{name}: {error}") from None
    return state


def _remade(network: dict[str, Any], place: Path) -> nn.Module:
    """Make a network of this library; only the classes in ``_NETWORKS`` are ever made."""
    kind = {_path(known): known for known in _NETWORKS}.get(network["class"])
    if kind is None or network["arguments"] is None:
        raise ValueError(
            f"{place} is an export of {network['class']}, which cannot be made from its export: "
            "make one yourself and call load(folder, model)"
        )
    arguments = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in network["arguments"].items()
    }
    with torch.random.fork_rng(devices=[]):  # its initial weights are drawn, then replaced
        return kind(**arguments)


def _check_layers(model: nn.Module, layers: dict[str, str] | None) -> None:
    """Refuse a network with other layers; files of older versions do not say theirs."""
    if layers is None:
        return
    mine = _layers(model)
    for path in dict.fromkeys([*layers, *mine]):
        if mine.get(path) != layers.get(path):
            raise ValueError(
                f"{path} is {layers.get(path, 'missing')} in the export and "
                f"{mine.get(path, 'missing')} in model: make a network with the exported layers "
                "and call load(folder, model)"
            )


def _changed_sizes(model: nn.Module, settings: dict[str, Any]) -> list[tuple[nn.Module, str, int]]:
    """Whole numbers that differ, in a network whose other settings are the same."""
    changed: list[tuple[nn.Module, str, int]] = []
    for path, here in _settings(model):
        module = model.get_submodule(path)
        for name, value in settings.get(path, {}).items():
            if name not in here:  # an attribute of another torch version
                continue
            mine = json.loads(json.dumps(here[name]))
            if type(mine) is int and type(value) is int and mine != value:
                changed.append((module, name, value))
            elif mine != value:
                raise ValueError(
                    f"{path or 'model'}.{name} is {value!r} in the export and {mine!r} in model: "
                    "make the model with the arguments of the exported one"
                )
    return changed


def _check_shapes(model: nn.Module, state: dict[str, Tensor], cut: bool) -> None:
    mine = model.state_dict()
    if wrong := sorted(mine.keys() ^ state.keys()):
        raise ValueError(f"only one of the export and model has the tensors {', '.join(wrong)}")
    for name, tensor in mine.items():
        shape = state[name].shape
        fits = len(shape) == tensor.dim() and all(
            size == full or (cut and size < full)
            for size, full in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"{name} has the shape {tuple(shape)} in the export and {tuple(tensor.shape)} in "
                "model: make the model with the arguments of the exported one"
            )


@torch.no_grad()
def _fill(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Write a state into a model; tensors of another size are replaced, and ties are kept."""
    new: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                full_name = f"{path}.{name}" if path else name
                if tensor is None or full_name not in state:
                    continue
                if state[full_name].shape == tensor.shape:
                    tensor.copy_(state[full_name])
                    continue
                if id(tensor) not in new:
                    value = state[full_name].to(tensor.device, tensor.dtype)
                    is_weight = isinstance(tensor, nn.Parameter)
                    made = nn.Parameter(value, tensor.requires_grad) if is_weight else value
                    new[id(tensor)] = made
                held[name] = new[id(tensor)]


def _class_path(module: nn.Module) -> str:
    return _path(held_base(module))


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
