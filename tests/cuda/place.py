"""Where a check runs, what it runs on, and how a trace of it is compared with the CPU's in float64.

A trace is a dict of tensors by name: weights, masks and optimizer state after every step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2l_prune import DSDSchedule

SCHEDULE = DSDSchedule(0.5, pretrain=2, prune=3, retrain=3)
WIDE = torch.float64
Trace = dict[str, Tensor]


@dataclass(frozen=True)
class Place:
    """A device, and a fault that is planted into what runs there (not into the reference).

    Attributes:
        device: Where the library runs.
        folder: For files.
        fault: Makes a context manager; none by default.
    """

    device: str
    folder: Path
    fault: Callable[[], contextlib.AbstractContextManager] = field(default=contextlib.nullcontext)

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def compare(
        self, run: Callable[[str], Trace], reference: Callable[[str], Trace] | None = None, **close
    ) -> None:
        """``run(device)`` must trace what ``reference("cpu")`` (by default itself) does."""
        expected = (reference or run)("cpu")
        with self.fault():
            found = run(self.device)
        assert_alike(found, expected, **close)


def assert_alike(found: Trace, expected: Trace, atol: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = found[name].to("cpu", value.dtype)
        if value.is_floating_point():
            torch.testing.assert_close(same, value, rtol=0, atol=atol, msg=lambda m, n=name: n + m)
        else:
            assert torch.equal(same, value), name


def network() -> nn.Sequential:
    """All its parameters have true gradients: no bias stands before the normalisation."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(),
        nn.Conv2d(4, 4, 3),
        nn.LeakyReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).to(WIDE)


def batch(number: int, device: str, dtype: torch.dtype = WIDE) -> tuple[Tensor, Tensor]:
    """The same images and labels everywhere."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(8, 1, 6, 6, generator=generator, dtype=WIDE)
    return x.to(device, dtype), torch.randint(0, 3, (8,), generator=generator).to(device)


def loss_of(net: Callable[[Tensor], Tensor], number: int, device: str, dtype=WIDE) -> Tensor:
    x, y = batch(number, device, dtype)
    return F.cross_entropy(net(x), y)


def tensors(value: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested dicts and lists, by their place."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from tensors(entry, f"{path} {key}")
    elif isinstance(value, list | tuple):
        for number, entry in enumerate(value):
            yield from tensors(entry, f"{path} {number}")


def on_device(device: str, *values: object) -> Trace:
    """All tensors of the values, which must be on the device; step counts may be on the CPU."""
    found = {}
    for number, value in enumerate(values):
        for name, tensor in tensors(value, str(number)):
            if tensor.dim():
                assert tensor.device.type == torch.device(device).type, f"{name}: {tensor.device}"
            found[name] = tensor.detach().clone()
    return found


def state_of(optimizer: torch.optim.Optimizer) -> dict[int, dict]:
    return optimizer.state_dict()["state"]
