"""The common interface of the command's meta-learners, and helpers for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from l2l_prune.experiments.config import RunConfig
from l2l_prune.fewshot.data import Episode
from l2l_prune.fewshot.evaluation import Mean
from l2l_prune.fewshot.models import Conv4
from l2l_prune.scheduled import ScheduledPruner


class Algorithm(ABC):
    """A meta-learner with its network, outer optimizer and pruner."""

    pruner: ScheduledPruner
    network: nn.Module
    """The network that :meth:`finalize` makes plain; it can load the weights of a result."""
    scored_in_training = True
    """Whether learners are scored in training mode, with their own batch statistics."""

    @abstractmethod
    def train(self, tasks: Sequence[Episode]) -> None:
        """One meta-iteration: the outer step, and the pruner's."""

    @abstractmethod
    def evaluate(self, episodes: Iterable[Episode]) -> Mean:
        """Score each episode, in ``config.measure``; everything is left as it was."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything to resume from bit for bit: tensors and plain values."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the :meth:`state_dict` of a learner with the same settings."""

    @abstractmethod
    def finalize(self) -> nn.Module:
        """The plain network."""


def conv4(config: RunConfig, image_shape: Sequence[int]) -> Conv4:
    """The network of the run's width for images of ``(C, H, W)``, on the run's device."""
    channels, size = image_shape[0], image_shape[-1]
    # Strides on small images and pooling on large ones, as the paper's program does (Section 5.1).
    pooling = "max" if size > 28 else "stride"
    net = Conv4(config.ways, config.channels, channels, size, pooling, config.dropout)
    # Channels-last: faster convolutions, the same numbers.
    return net.to(config.device).to(memory_format=torch.channels_last)


class OwnRandomness:
    """Gives one learner its own copy of torch's global generators, from which dropout draws.

    Args:
        start: Where the CPU's generator starts.
        device: The learner's. If it is not the CPU, its generator gets a seed of the CPU's each
            time, so that :attr:`state` is the CPU's alone.
    """

    def __init__(self, start: torch.Generator, device: str) -> None:
        self.state = start.get_state()
        self._device = torch.device(device)

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Inside, the global generators go on from :attr:`state`; outside, they are unchanged."""
        device = self._device
        on_cpu = device.type == "cpu"
        with torch.random.fork_rng([] if on_cpu else [device], device_type=device.type):
            torch.set_rng_state(self.state)
            if not on_cpu:
                module = torch.get_device_module(device)
                with module.device(device):
                    module.manual_seed(int(torch.randint(2**62, (), device="cpu")))
            yield
            self.state = torch.get_rng_state()


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Put modules in evaluation mode inside, and back in their own mode afterwards."""
    was_training = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, training in zip(modules, was_training, strict=True):
            module.train(training)
