"""The paper's networks."""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

import torch
from torch import Tensor, nn


class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, batch normalisation and ReLU, and a linear classifier.

    The network of Reptile (Nichol et al., 2018) that the paper uses (Section 5.1).

    Args:
        ways: Number of classes.
        channels: Channels of each convolution (32, 64, 128 or 256 in the paper).
        in_channels: Channels of the images.
        image_size: Height and width of the images in pixels.
        pooling: ``"stride"``: convolutions of stride 2, as the authors do for Omniglot.
            ``"max"``: 2x2 max-pooling after each block, as for mini-ImageNet.

    Example:
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
            in_channels, size = channels, (size + 1) // 2
        self.features = nn.Sequential(blocks)
        self.classifier = nn.Linear(channels * size * size, ways)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores ``[batch, ways]`` of ``images`` ``[batch, in_channels, size, size]``."""
        return cast(Tensor, self.classifier(torch.flatten(self.features(images), 1)))
