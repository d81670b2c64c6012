"""The networks of the paper's experiments."""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2l_prune._basics.arguments import keeps_arguments
from l2l_prune.metalearners.cavia import ConcatContext, FiLM


@keeps_arguments
class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, batch normalisation and ReLU, and a linear classifier.

    The network of Reptile (Nichol et al., 2018) that the paper uses (Section 5.1).

    Args:
        ways: Number of classes.
        channels: Channels of each convolution (32, 64, 128 or 256 in the paper).
        in_channels: Channels of the images.
        image_size: Height and width of the images in pixels.
        pooling: ``"stride"`` for convolutions of stride 2, as the authors do for Omniglot;
            ``"max"`` for 2x2 max-pooling after each block, as for mini-ImageNet.
        dropout: Dropout rate after each block, in [0, 1); the paper uses none.

    Raises:
        ValueError: If ``pooling`` is neither.

    Examples:
        >>> Conv4(ways=5, channels=8)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        ways: int,
        channels: int = 64,
        in_channels: int = 1,
        image_size: int = 28,
        pooling: str = "stride",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if pooling not in ("stride", "max"):
            raise ValueError(f'pooling must be "stride" or "max", got {pooling!r}')
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        size = image_size
        for number in range(1, 5):
            blocks[f"conv{number}"] = nn.Conv2d(
                in_channels, channels, 3, stride=2 if pooling == "stride" else 1, padding=1
            )
            blocks[f"norm{number}"] = nn.BatchNorm2d(channels, eps=1e-3)
            if pooling == "max":
                blocks[f"pool{number}"] = nn.MaxPool2d(2, ceil_mode=True)
            blocks[f"relu{number}"] = nn.ReLU()
            if dropout:
                blocks[f"dropout{number}"] = nn.Dropout(dropout)
            in_channels, size = channels, (size + 1) // 2
        self.features = nn.Sequential(blocks)
        self.classifier = nn.Linear(channels * size * size, ways)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores ``[batch, ways]`` of ``images`` ``[batch, in_channels, size, size]``."""
        return cast(Tensor, self.classifier(torch.flatten(self.features(images), 1)))


@keeps_arguments
class CaviaConv4(nn.Module):
    """CAVIA's classification network: [conv, BN, max-pool, FiLM where asked, ReLU] x 4, linear.

    Images of 84x84 give a 5x5 map before the classifier, 28x28 a 1x1 map. Batch normalisation
    keeps no running statistics.

    Args:
        ways: Number of classes.
        channels: Channels of each convolution (128 in the pruning paper's Table 4).
        in_channels: Channels of the images.
        image_size: Height and width of the images, >= 16.
        context_size: Length of the context vector.
        film_at: Blocks (1 to 4) whose maps the context scales and shifts, at least one.
        film_hidden: Hidden layers of each FiLM layer, 0 or 1.

    Raises:
        ValueError: If ``film_at`` is empty or names no block, or the images are too small.

    Source:
        Zintgraf et al., ICML 2019; the authors' script sets 100 context values at block 3.
    """

    def __init__(
        self,
        ways: int,
        channels: int = 128,
        in_channels: int = 3,
        image_size: int = 84,
        context_size: int = 100,
        film_at: tuple[int, ...] = (3,),
        film_hidden: int = 0,
    ) -> None:
        super().__init__()
        if not film_at or not set(film_at) <= {1, 2, 3, 4}:
            raise ValueError(f"film_at must name one or more of the blocks 1 to 4, got {film_at!r}")
        if image_size < 16:
            raise ValueError(f"image_size must be >= 16, got {image_size}")
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        for number in range(1, 5):
            blocks[f"conv{number}"] = nn.Conv2d(in_channels, channels, 3, padding=1)
            blocks[f"norm{number}"] = nn.BatchNorm2d(channels, track_running_stats=False)
            blocks[f"pool{number}"] = nn.MaxPool2d(2)
            if number in film_at:
                blocks[f"film{number}"] = FiLM(context_size, channels, film_hidden)
            blocks[f"relu{number}"] = nn.ReLU()
            in_channels = channels
        self.features = nn.Sequential(blocks)
        self.classifier = nn.Linear(channels * (image_size // 16) ** 2, ways)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            elif isinstance(module, FiLM):
                nn.init.kaiming_uniform_(module.linear.weight, nonlinearity="linear")
        nn.init.kaiming_uniform_(self.classifier.weight, nonlinearity="linear")
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores ``[batch, ways]``; run it through :class:`~l2l_prune.metalearners.CAVIA`."""
        return cast(Tensor, self.classifier(torch.flatten(self.features(images), 1)))


@keeps_arguments
class CaviaMLP(nn.Module):
    """CAVIA's regression network: the context joins the input of an MLP with ReLU.

    Args:
        inputs: Length of an input (1 for the sine tasks).
        outputs: Length of an output.
        context_size: Length of the context vector.
        hidden: Width of each hidden layer.

    Source:
        Zintgraf et al., ICML 2019; for sine tasks the authors' script sets these defaults.
    """

    def __init__(
        self,
        inputs: int = 1,
        outputs: int = 1,
        context_size: int = 5,
        hidden: tuple[int, ...] = (40, 40),
    ) -> None:
        super().__init__()
        self.context = ConcatContext(context_size)
        widths = (inputs + context_size, *hidden, outputs)
        self.layers = nn.ModuleList(map(nn.Linear, widths[:-1], widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``[batch, outputs]``; run it through :class:`~l2l_prune.metalearners.CAVIA`."""
        x = self.context(x)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return cast(Tensor, self.layers[-1](x))
