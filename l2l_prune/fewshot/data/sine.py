"""Sine regression tasks from the meta-learning literature."""

from __future__ import annotations

import math

import torch

from l2l_prune._basics import checks
from l2l_prune.fewshot.data.episodes import Episode


class SineTasks:
    """Draws tasks ``y = a sin(x - b)``: a in [0.1, 5], b in [0, pi], x in [-5, 5].

    Args:
        shots: Support points in a task, >= 1.
        queries: Query points in a task, >= 0.
        seed: Seed of the draws.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is out of range.

    Source:
        Finn et al., *Model-Agnostic Meta-Learning*, ICML 2017, Section 5.1.
    """

    def __init__(self, *, shots: int = 10, queries: int = 10, seed: int = 0) -> None:
        self.shots = checks.whole_number("shots", shots, least=1)
        self.queries = checks.whole_number("queries", queries)
        self._generator = torch.Generator().manual_seed(seed)

    def sample(self) -> Episode:
        """One task: inputs and targets float32 ``[shots, 1]`` and ``[queries, 1]``."""
        amplitude, phase = torch.rand(2, generator=self._generator, device="cpu").tolist()
        count = self.shots + self.queries
        x = 10 * torch.rand(count, 1, generator=self._generator, device="cpu") - 5
        y = (0.1 + 4.9 * amplitude) * torch.sin(x - math.pi * phase)
        return Episode(x[: self.shots], y[: self.shots], x[self.shots :], y[self.shots :])
