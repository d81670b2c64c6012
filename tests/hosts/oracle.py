"""The oracle for every host: a dense model, masked by hand through functional_call in float64.

It shares no code with l2l_prune. A *meta-objective* is a function of the (masked) weights alone;
the oracle differentiates it with torch.autograd, steps its own optimizer, and prunes by sorting.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from l2l_prune import Schedule, Segment

PHASES = Schedule(
    (
        Segment(2),
        Segment(2, sparse=True, sparsity=0.5),
        Segment(2),
        Segment(2, sparse=True, sparsity=0.3),
    )
)
"""Crosses every border: dense -> sparse -> dense -> sparse."""


class TinyNet(nn.Module):
    """A convolution, a square layer and a head, without batch statistics; float64."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.square = nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)
        self.double()

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.square(torch.tanh(self.conv(x)).flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


LAYERS = ("conv.weight", "square.weight", "head.weight")
Values = dict[str, Tensor]


def tasks(iteration: int, count: int = 2) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Support and query of each task of a meta-iteration."""
    generator = torch.Generator().manual_seed(iteration)

    def draw() -> tuple[Tensor, Tensor]:
        x = torch.randn(6, 1, 4, 4, generator=generator, dtype=torch.float64)
        return x, torch.randint(0, 3, (6,), generator=generator)

    return [(*draw(), *draw()) for _ in range(count)]


class Oracle:
    """A dense twin of ``net`` with masks kept beside it."""

    def __init__(self, net: nn.Module, layers: tuple[str, ...] = LAYERS, prefix: str = "") -> None:
        self.net = copy.deepcopy(net)
        self.parameters = dict(self.net.named_parameters())
        self.layers, self.prefix = layers, prefix
        self.masks: Values = {}
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=0.01)

    def masked(self, values: Values) -> Values:
        return {n: v * self.masks[n] if n in self.masks else v for n, v in values.items()}

    def run(self, values: Values, x: Tensor) -> Tensor:
        return functional_call(self.net, self.masked(values), (x,))

    def loss(self, values: Values, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.run(values, x), y)

    def gradients(self, objective: Tensor) -> list[Tensor]:
        return list(
            torch.autograd.grad(objective, list(self.parameters.values()), allow_unused=True)
        )

    def step(self, gradients: list[Tensor], iteration: int) -> None:
        """What Pruner(..., release_state="keep") promises around an optimizer step."""
        for p, g in zip(self.parameters.values(), gradients, strict=True):
            p.grad = g
        self.optimizer.step()
        segment = PHASES.segment(iteration + 1)
        if segment is not PHASES.segment(iteration):
            self.masks = {}
            for name in self.layers if segment.sparse else ():
                self.masks[name] = largest(self.parameters[name].detach(), segment.sparsity)
        with torch.no_grad():
            for name, mask in self.masks.items():
                self.parameters[name].mul_(mask)
                state = self.optimizer.state.get(self.parameters[name], {})
                if "exp_avg" in state:
                    state["exp_avg"].mul_(mask)


def largest(weight: Tensor, sparsity: float) -> Tensor:
    keep = weight.numel() - round(sparsity * weight.numel())
    order = sorted(range(weight.numel()), key=lambda i: (-abs(float(weight.flatten()[i])), i))
    mask = torch.zeros(weight.numel(), dtype=weight.dtype)
    mask[order[:keep]] = 1
    return mask.view(weight.shape)


def sgd_inner(loss: Callable[[Values], Tensor], values: Values, lr: float, order: int) -> Values:
    """One inner SGD step on a dict of weights; ``order`` 1 cuts the graph of the gradients."""
    gradients = torch.autograd.grad(
        loss(values), list(values.values()), create_graph=order == 2, allow_unused=True
    )
    return {
        n: v if g is None else v - lr * g
        for (n, v), g in zip(values.items(), gradients, strict=True)
    }


def assert_equal(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-8) -> None:
    for a, b in zip(ours, theirs, strict=True):
        b = torch.zeros_like(a) if b is None else b
        a = torch.zeros_like(b) if a is None else a
        assert torch.allclose(a, b, atol=tolerance, rtol=0), float((a - b).abs().max())


def assert_pruned(module: nn.Module, masks: Values) -> None:
    """Pruned entries are exactly 0 in a model, clone or functional module."""
    for name, mask in masks.items():
        path, _, weight = name.rpartition(".")
        layer = module
        for part in path.split("."):
            layer = getattr(layer, part)
        assert (getattr(layer, weight)[mask == 0] == 0).all(), name
