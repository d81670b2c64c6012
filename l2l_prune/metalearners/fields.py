"""Neural fields: small networks from coordinates to values, and MAML over many signals at once."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from l2l_prune._basics import checks
from l2l_prune._basics.arguments import keeps_arguments
from l2l_prune._basics.generators import check_generator, drawn_by


@keeps_arguments
class Siren(nn.Module):
    """A network of sine layers, with its published initialisation.

    Each layer but the last computes ``sin(omega_0 * (W x + b))``. Weights start uniform in
    ``[-bound, bound]``, with ``bound = 1 / in`` in the first layer and ``sqrt(6 / in) / omega_0``
    in all others; biases start as in torch's linear layers.

    Args:
        in_features: Coordinates of a point, >= 1.
        out_features: Values at a point (1 for grey, 3 for colour), >= 1.
        width: Neurons in a layer, >= 1.
        depth: Number of sine layers, >= 1; a linear layer follows.
        omega_0: Frequency of the sines, > 0.
        generator: Source of the initial weights, on the CPU; torch's own by default.

    Raises:
        TypeError: If a number has the wrong type.
        ValueError: If it is out of range.

    Examples:
        >>> Siren(width=16)(coordinates(28, 28)).shape
        torch.Size([784, 1])

    Source:
        Sitzmann et al., *Implicit Neural Representations with Periodic Activation Functions*,
        NeurIPS 2020, Section 3.2.
    """

    def __init__(
        self,
        in_features: int = 2,
        out_features: int = 1,
        *,
        width: int = 64,
        depth: int = 3,
        omega_0: float = 30.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.omega_0 = checks.number("omega_0", omega_0, above=0)
        layers = _linear_layers(in_features, out_features, width, depth)
        self.layers = nn.ModuleList(layers)
        for number, layer in enumerate(layers):
            fan_in = layer.in_features
            bound = math.sqrt(6 / fan_in) / self.omega_0 if number else 1 / fan_in
            _uniform(layer.weight, bound, generator)
            _uniform(layer.bias, 1 / math.sqrt(fan_in), generator)

    def forward(self, x: Tensor) -> Tensor:
        """Values ``[..., out_features]`` at points ``[..., in_features]``."""
        *hidden, last = self.layers
        for layer in hidden:
            x = torch.sin(self.omega_0 * layer(x))
        return cast(Tensor, last(x))


@keeps_arguments
class FourierFeatureMLP(nn.Module):
    """A ReLU network on sines and cosines of the coordinates at random frequencies.

    Args:
        in_features: Coordinates of a point, >= 1.
        out_features: Values at a point, >= 1.
        width: Neurons in a layer, >= 1.
        depth: Number of hidden layers, >= 1; a linear layer follows.
        features: Number of random frequencies, >= 1; the first layer has twice as many inputs.
        scale: Standard deviation of the frequencies, > 0.
        generator: Source of frequencies and initial weights, on the CPU; torch's own by default.

    Attributes:
        frequencies: ``[in_features, features]``, a buffer: neither trained nor pruned.

    Raises:
        TypeError: If a number has the wrong type.
        ValueError: If it is out of range.

    Source:
        Tancik et al., *Fourier Features Let Networks Learn High Frequency Functions in Low
        Dimensional Domains*, NeurIPS 2020, Section 4.
    """

    frequencies: Tensor

    def __init__(
        self,
        in_features: int = 2,
        out_features: int = 1,
        *,
        width: int = 64,
        depth: int = 3,
        features: int = 32,
        scale: float = 3.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        checks.whole_number("in_features", in_features, least=1)
        checks.whole_number("features", features, least=1)
        checks.number("scale", scale, above=0)
        drawn = torch.randn(in_features, features, **_source(generator))
        layers = _linear_layers(2 * features, out_features, width, depth)
        self.register_buffer("frequencies", scale * drawn.to(layers[0].weight.device))
        self.layers = nn.ModuleList(layers)
        for layer in layers:
            _uniform(layer.weight, math.sqrt(6 / layer.in_features), generator)
            _uniform(layer.bias, 1 / math.sqrt(layer.in_features), generator)

    def forward(self, x: Tensor) -> Tensor:
        """Values ``[..., out_features]`` at points ``[..., in_features]``."""
        angles = 2 * math.pi * x @ self.frequencies
        x = torch.cat([angles.sin(), angles.cos()], -1)
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        return cast(Tensor, last(x))


def _linear_layers(in_features: int, out_features: int, width: int, depth: int) -> list[nn.Linear]:
    checks.whole_number("in_features", in_features, least=1)
    checks.whole_number("out_features", out_features, least=1)
    checks.whole_number("width", width, least=1)
    checks.whole_number("depth", depth, least=1)
    sizes = [in_features, *[width] * depth, out_features]
    return [nn.Linear(a, b) for a, b in pairwise(sizes)]


def _uniform(tensor: Tensor, bound: float, generator: torch.Generator | None) -> None:
    drawn = torch.empty(tensor.shape, dtype=tensor.dtype, device=_source(generator)["device"])
    with torch.no_grad():
        tensor.copy_(drawn.uniform_(-bound, bound, generator=generator))


def _source(generator: torch.Generator | None) -> dict[str, Any]:
    return drawn_by(None if generator is None else check_generator(generator))


def coordinates(height: int, width: int) -> Tensor:
    """The pixels of a picture as points in [-1, 1]: row and column, row by row.

    Args:
        height: Rows, >= 1.
        width: Columns, >= 1.

    Returns:
        float32 ``[height * width, 2]``; corners are at exactly -1 and 1.

    Examples:
        >>> coordinates(2, 2).tolist()
        [[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]
    """
    rows = torch.linspace(-1, 1, checks.whole_number("height", height, least=1))
    columns = torch.linspace(-1, 1, checks.whole_number("width", width, least=1))
    return torch.cartesian_prod(rows, columns)


class ImageSignals:
    """Pictures of one size as signals: one point for each pixel, with the pixel's values.

    Args:
        images: ``[n, C, H, W]``: uint8, or real numbers in [0, 1].

    Attributes:
        coordinates: Points ``[H * W, 2]`` in [-1, 1].
        values: float32 ``[n, H * W, C]`` in [0, 1].

    Raises:
        TypeError: If ``images`` is not a tensor.
        ValueError: If it has another shape or range.
    """

    def __init__(self, images: Tensor) -> None:
        checks.of_type("images", images, Tensor, "a tensor [n, C, H, W]")
        if images.dim() != 4 or not images.numel():
            raise ValueError(f"images must be [n, C, H, W], got shape {tuple(images.shape)}")
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        if not bool(((scaled >= 0) & (scaled <= 1)).all()):  # also refuses NaN
            raise ValueError("images must be uint8, or real numbers in [0, 1]")
        self._size = tuple(images.shape[2:])
        with torch.device(images.device):
            self.coordinates = coordinates(*self._size)
        self.values = scaled.flatten(2).transpose(1, 2).contiguous()

    def __len__(self) -> int:
        return len(self.values)

    def sample(self, signals: int, generator: torch.Generator | None = None) -> Tensor:
        """Values of distinct signals, drawn uniformly: ``[signals, H * W, C]``.

        Args:
            signals: Number of signals, from 1 to all.
            generator: Source of the draw, on the CPU; torch's own by default.

        Raises:
            ValueError: If there are fewer signals than that.
        """
        if not 1 <= signals <= len(self):
            raise ValueError(f"signals must be in [1, {len(self)}], got {signals}")
        order = torch.randperm(len(self), **_source(generator))[:signals]
        return self.values[order.to(self.values.device)]

    def pictures(self, values: Tensor) -> Tensor:
        """Values ``[..., H * W, C]`` as pictures ``[..., C, H, W]``, clamped to [0, 1]."""
        flat = values.transpose(-1, -2)
        return flat.reshape(*flat.shape[:-1], *self._size).clamp(0, 1)


def psnr(predicted: Tensor, values: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of signals whose values lie in [0, 1].

    Args:
        predicted: ``[..., points, C]``.
        values: Likewise.

    Returns:
        ``-10 log10(mean squared error)`` of each signal.
    """
    return -10 * (predicted - values).square().mean((-2, -1)).log10()


class FieldMAML(nn.Module):
    """MAML whose tasks are signals; all signals adapt at once, through ``torch.vmap``.

    Each signal is learned from all of its points. The meta-loss is its loss after ``steps`` plain
    gradient steps on the mean squared error. Masks hold in the inner loop: prune the network or
    this object with :class:`~l2l_prune.Pruner`, before or after wrapping.

    Args:
        model: The field: any module from points ``[points, D]`` to values ``[points, C]``.
        lr: Inner learning rate, > 0.
        steps: Inner steps, >= 1.
        first_order: Ignore second derivatives.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of range, or the model has no parameters to adapt.

    Examples:
        >>> from l2l_prune import Pruner
        >>> from l2l_prune.schedules.common import metasparse
        >>> x, y = coordinates(8, 8), torch.rand(3, 64, 1)
        >>> maml = FieldMAML(Siren(width=16), lr=0.01)
        >>> opt = torch.optim.Adam(maml.parameters(), 1e-4)
        >>> pruner = Pruner(maml, metasparse(0.95, pretrain=2, interval=1), opt)
        >>> for _ in range(pruner.schedule.iterations):
        ...     opt.zero_grad()
        ...     maml.loss(x, y).backward()
        ...     opt.step()
        ...     pruner.step()
        >>> psnr(maml(x, maml.adapt(x, y)), y).shape
        torch.Size([3])

    Source:
        Finn et al., *Model-Agnostic Meta-Learning*, ICML 2017; for fields Sitzmann et al.,
        *MetaSDF*, and Tancik et al., *Learned Initializations*, CVPR 2021.
    """

    def __init__(
        self, model: nn.Module, lr: float = 0.01, steps: int = 2, first_order: bool = False
    ) -> None:
        super().__init__()
        self.module = checks.of_type("model", model, nn.Module, "a torch.nn.Module")
        self.lr = checks.number("lr", lr, above=0)
        self.steps = checks.whole_number("steps", steps, least=1)
        self.first_order = checks.true_or_false("first_order", first_order)
        if not self._weights():
            raise ValueError("the model has no parameters to adapt")

    def forward(self, coordinates: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Values at points.

        Args:
            coordinates: ``[points, D]``.
            weights: Weights of adapted signals, from :meth:`adapt` or :meth:`fit`.

        Returns:
            ``[points, C]`` from the shared network, or ``[signals, points, C]`` from ``weights``.
        """
        if weights is None:
            return cast(Tensor, self.module(coordinates))
        return vmap(self._run, (0, None))(dict(weights), coordinates)

    def adapt(
        self, coordinates: Tensor, values: Tensor, *, steps: int | None = None
    ) -> dict[str, Tensor]:
        """Take inner steps on every signal, from the shared weights.

        Gradients flow back to the shared weights, through the steps unless ``first_order``. If you
        need none, call it under ``torch.no_grad()``, which takes less time and memory.

        Args:
            coordinates: ``[points, D]``, the same for all.
            values: ``[signals, points, C]``.
            steps: Inner steps, :attr:`steps` by default.

        Returns:
            Weights by parameter name, ``[signals, *shape]``.

        Raises:
            ValueError: If the values do not fit the points.
        """
        count = self.steps if steps is None else checks.whole_number("steps", steps, least=1)
        _check_fit(coordinates, values)
        if not self.first_order:
            return self._descend(self._weights(), coordinates, values, count)
        shared = self._weights()
        with torch.no_grad():
            adapted = self._descend(shared, coordinates, values, count)
            moved = {name: adapted[name] - weight for name, weight in shared.items()}
        return {name: weight + moved[name] for name, weight in shared.items()}

    def loss(self, coordinates: Tensor, values: Tensor) -> Tensor:
        """The meta-loss: mean squared error after adapting, averaged over the signals.

        Args:
            coordinates: ``[points, D]``.
            values: ``[signals, points, C]``.
        """
        return F.mse_loss(self(coordinates, self.adapt(coordinates, values)), values)

    def fit(
        self, coordinates: Tensor, values: Tensor, *, steps: int = 100, lr: float = 1e-3
    ) -> dict[str, Tensor]:
        """Fit longer with Adam, from the shared weights, which do not change.

        Args:
            coordinates: ``[points, D]``.
            values: ``[signals, points, C]``.
            steps: Steps of Adam, >= 1.
            lr: Its learning rate, > 0.

        Returns:
            As :meth:`adapt`, detached.

        Raises:
            ValueError: If the values do not fit the points.
        """
        checks.whole_number("steps", steps, least=1)
        checks.number("lr", lr, above=0)
        _check_fit(coordinates, values)
        weights = {
            name: weight.detach().expand(len(values), *weight.shape).clone().requires_grad_()
            for name, weight in self._weights().items()
        }
        optimizer = torch.optim.Adam(weights.values(), lr)
        with torch.enable_grad():
            for _ in range(steps):
                optimizer.zero_grad()
                errors = (self(coordinates, weights) - values).square()
                errors.mean((1, 2)).sum().backward()
                optimizer.step()
        return {name: weight.detach() for name, weight in weights.items()}

    def field(self, weights: Mapping[str, Tensor], signal: int) -> nn.Module:
        """A copy of the network with the weights of one adapted signal, masks included.

        Args:
            weights: From :meth:`adapt` or :meth:`fit`.
            signal: Index of the signal, from 0.
        """
        field = copy.deepcopy(self.module)
        parameters = dict(field.named_parameters())
        with torch.no_grad():
            for name, weight in weights.items():
                parameters[name].copy_(weight[signal])
        return field

    def _weights(self) -> dict[str, Tensor]:
        return {n: p for n, p in self.module.named_parameters() if p.requires_grad}

    def _run(self, weights: dict[str, Tensor], coordinates: Tensor) -> Tensor:
        return cast(Tensor, functional_call(self.module, weights, (coordinates,)))

    def _descend(
        self, shared: dict[str, Tensor], coordinates: Tensor, values: Tensor, steps: int
    ) -> dict[str, Tensor]:
        def error(weights: dict[str, Tensor], own: Tensor) -> Tensor:
            return F.mse_loss(self._run(weights, coordinates), own)

        def one(own: Tensor) -> dict[str, Tensor]:
            # The first forward pass is the same for all signals, and vmap runs it once.
            weights = shared
            for _ in range(steps):
                gradients = grad(error)(weights, own)
                weights = {n: w - self.lr * gradients[n] for n, w in weights.items()}
            return weights

        return vmap(one)(values)


def _check_fit(coordinates: Tensor, values: Tensor) -> None:
    checks.of_type("coordinates", coordinates, Tensor, "a tensor [points, D]")
    checks.of_type("values", values, Tensor, "a tensor [signals, points, C]")
    if coordinates.dim() != 2 or values.dim() != 3 or values.shape[1] != len(coordinates):
        raise ValueError(
            f"values must be [signals, points, C] with as many points as coordinates, got shape "
            f"{tuple(values.shape)} for coordinates of shape {tuple(coordinates.shape)}"
        )
