"""A trained network for other runtimes (ONNX, ``torch.export``), checked against the network."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2l_prune._basics import checks
from l2l_prune._basics.files import replace_file
from l2l_prune.channels.pruner import Exported
from l2l_prune.masking.masked_layer import plain_copy
from l2l_prune.shipping.folder import network_of

_TOLERANCE = 1e-4
"""Relative to the largest output; runtimes add in different orders."""


def export_onnx(learner: nn.Module | Exported, path: Path | str, example: Tensor) -> float:
    """Write a network as ONNX for any batch size, and check its outputs in ONNX Runtime.

    Batch normalisation in training mode, in which Reptile's learners are scored, is written as the
    batch's mean and variance: torch's own ONNX for it computes something else in ONNX Runtime.
    Dropout is left out. A network on a GPU is copied to the CPU for this.

    Args:
        learner: As for :func:`~l2l_prune.shipping.export`.
        path: The file; nothing is written if the comparison fails.
        example: An input, ``[batch, ...]`` with a batch of at least 2.

    Returns:
        The largest difference to the network's own outputs, on inputs of two batch sizes.

    Raises:
        ImportError: If onnxscript or onnxruntime is missing (extra ``ship``).
        TypeError: If an argument has the wrong type.
        ValueError: If the network cannot be written, or gives other outputs there.
    """
    net, example = _prepared(learner, example)
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise ImportError(f'{error}; ONNX needs: pip install "l2l-prune[ship]"') from None

    program = _exported(net, example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: Any = torch.onnx.export(program, (), dynamo=True, verbose=False)
    data = made.model_proto.SerializeToString()
    try:
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has its own kinds
        why = str(error).strip().partition("\n")[0]
        raise ValueError(f"ONNX Runtime cannot run {type(net).__name__}: {why}") from None
    (given,) = session.get_inputs()

    def runtime(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])

    found = _difference(net, runtime, example, "ONNX Runtime")
    with replace_file(Path(path)) as temporary:
        temporary.write_bytes(data)
    return found


def export_program(learner: nn.Module | Exported, path: Path | str, example: Tensor) -> float:
    """Write a network with ``torch.export`` for any batch size, and check its outputs.

    ``torch.export.load`` reads it without this library; load only files that you trust. A network
    on a GPU is copied to the CPU for this.

    Args:
        learner: As for :func:`~l2l_prune.shipping.export`.
        path: The file, which should end in ``.pt2``; not written if the comparison fails.
        example: As for :func:`export_onnx`.

    Returns:
        The largest difference to the network's own outputs, on inputs of two batch sizes.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the network cannot be written, or gives other outputs there.
    """
    net, example = _prepared(learner, example)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(_exported(net, example), buffer)
        buffer.seek(0)
        again = torch.export.load(buffer).module()
    found = _difference(net, again, example, "the exported program")
    with replace_file(Path(path)) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return found


class _BatchStatistics(nn.Module):
    """Batch normalisation with the batch's own statistics, in operations that any runtime has."""

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """``x``, ``[batch, channels, ...]``, normalised by channel."""
        dims = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        centred = x - x.mean(dims, keepdim=True)
        x = centred * (centred.square().mean(dims, keepdim=True) + self.eps).rsqrt()
        return x if self.weight is None else x * self.weight.view(shape) + self.bias.view(shape)


def _prepared(learner: nn.Module | Exported, example: Tensor) -> tuple[nn.Module, Tensor]:
    """A copy that other runtimes can compute, on the CPU: a GPU rounds to TF32."""
    checks.of_type("example", example, Tensor, "a tensor")
    net = plain_copy(network_of(learner)).cpu()
    if example.dim() < 2 or len(example) < 2:
        raise ValueError(
            "example must be [batch, ...] with a batch of at least 2, got shape "
            f"{tuple(example.shape)}"
        )
    for path, module in list(net.named_modules(remove_duplicate=False)):
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            parent, _, name = path.rpartition(".")
            if not path:
                return _BatchStatistics(module), example.cpu()
            setattr(net.get_submodule(parent), name, _BatchStatistics(module))
    return net, example.cpu()


def _exported(net: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=2)
    try:
        return torch.export.export(net, (example,), dynamic_shapes=({0: batch},))
    except Exception as error:  # whatever tracing meets
        why = str(error).strip().partition("\n")[0]
        raise ValueError(f"torch.export cannot trace {type(net).__name__}: {why}") from None


@torch.no_grad()
def _difference(
    net: nn.Module, other: Callable[[Tensor], Tensor], example: Tensor, name: str
) -> float:
    largest = 0.0
    last = example.flip(0)[:1]
    last = last / 2 if example.is_floating_point() else last // 2
    for x in (example, torch.cat([example, last])):
        expected = net(x)
        if not isinstance(expected, Tensor):
            raise ValueError(
                f"{type(net).__name__} returns {checks.describe(expected)}, not one tensor: export "
                "a module around it that returns one"
            )
        found = other(x)
        difference = float((found - expected).abs().max())
        if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
            raise ValueError(
                f"the outputs of {name} differ from the network's by {difference:.2g}: nothing was "
                "written"
            )
        largest = max(largest, difference)
    return largest
