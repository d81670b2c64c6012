"""The three splits of a data set, and random divisions of its classes into them."""

from __future__ import annotations

import torch
from torch import Tensor

from l2l_prune._basics import checks

SPLITS = ("train", "validation", "test")


def check_split(split: str) -> None:
    """Refuse a name that is not in :data:`SPLITS`."""
    checks.one_of("split", split, SPLITS)


def shuffled(count: int, seed: int) -> Tensor:
    """The numbers below ``count`` in random order, on the CPU.

    Raises:
        ValueError: If the seed has more than 64 bits.
    """
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"the seed of a split must fit in 64 bits, got {seed}")
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu")


def random_split(count: int, split: str, seed: int, train: int, validation: int) -> list[int]:
    """Which of ``count`` items are in a split of a random order, in ascending order.

    Args:
        count: Number of items.
        split: A name in :data:`SPLITS`.
        seed: Seed of the order.
        train: How many items go to training; they come first.
        validation: How many go to validation; they come next, and the rest is for testing.
    """
    edges = (0, train, train + validation, count)
    place = SPLITS.index(split)
    return sorted(shuffled(count, seed)[edges[place] : edges[place + 1]].tolist())


def most_for_training(count: int) -> tuple[int, int]:
    """Numbers of items for training and validation: 60% and 15%, so that 25% are for testing."""
    train = round(count * 0.6)
    return train, round(count * 0.75) - train
