"""Means over training runs, and the words for their differences."""

from __future__ import annotations

import math

from l2l_prune.fewshot.evaluation import Mean, tenths

WORDS = {"train": ("higher", "lower"), "test": ("better", "worse"), "gap": ("larger", "smaller")}


class OverSeeds(Mean):
    """A mean over seeds; so few need Student's t for their 95% confidence interval."""

    @property
    def ci95(self) -> float:
        """Half width of the interval; NaN for one seed."""
        if len(self.values) < 2:
            return math.nan
        from scipy import stats  # takes a second, which processes of single runs need not spend

        quantile = stats.t.ppf(0.975, len(self.values) - 1)
        return float(quantile * stats.sem(self.values))

    def verdict(self, more: str, less: str) -> str:
        """Of a difference: one of the words, ``"not significant"`` or ``"one seed"``."""
        if len(self.values) < 2:
            return "one seed"
        if not self.significant:
            return "not significant"
        return more if self.mean > 0 else less

    def __str__(self) -> str:
        return super().__str__() if len(self.values) > 1 else tenths(self.measure.read(self.mean))


def signed(difference: Mean) -> str:
    """A difference, of accuracies in percentage points, with its sign: ``"+1.2 ± 0.5"``."""
    read = difference.measure.read
    width = f" ± {tenths(read(difference.ci95))}" if len(difference.values) > 1 else ""
    return f"{tenths(read(difference.mean), '+')}{width}"


def amount(difference: Mean) -> str:
    """A difference with its sign and unit: ``"+1.2 ± 0.5 points"``, or in decibels."""
    return difference.measure.difference(signed(difference))


def with_verdict(part: str, difference: OverSeeds) -> str:
    """A difference of ``"train"``, ``"test"`` or ``"gap"`` with its verdict in brackets."""
    return f"{signed(difference)} ({difference.verdict(*WORDS[part])})"
