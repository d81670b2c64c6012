"""Searches over settings of runs: which rate and method to choose, and whether pruning pays."""

from l2l_prune.experiments.search.study import study
from l2l_prune.experiments.search.tune import Tuned, tune

__all__ = ["Tuned", "study", "tune"]
