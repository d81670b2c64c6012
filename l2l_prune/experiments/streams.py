"""Random streams of a run: one for each purpose, all independent."""

from __future__ import annotations

import numpy as np
import torch

PURPOSES = {
    "weights": 0,
    "training tasks": 1,
    "curve tasks": 2,
    "final tasks": 3,
    "training minibatches": 4,
    "evaluation minibatches": 5,
    "dropout": 6,
    "criterion": 7,
    "regrowth": 8,
    "inner-step scores": 9,
    "task masks": 10,
    "MGAug": 11,
    "DropGrad": 12,
    "task dropout": 13,
}
"""What is drawn, and its key. A key never changes and is never reused, so that published runs can
be repeated."""


def stream(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """A generator whose draws are independent of those of any other seed or purpose.

    Args:
        seed: The seed of the run, >= 0.
        purpose: A key of :data:`PURPOSES`.
        indices: Which of several streams of one purpose, such as the split; each >= 0.

    Raises:
        KeyError: If there is no such purpose.

    Examples:
        >>> first, again = (stream(1, "training tasks") for _ in range(2))
        >>> torch.equal(torch.rand(3, generator=first), torch.rand(3, generator=again))
        True
        >>> stream(1, "weights").initial_seed() == stream(1, "training tasks").initial_seed()
        False
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(PURPOSES[purpose], *indices))
    # torch's CPU generator uses only 32 bits of its seed.
    return torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))
