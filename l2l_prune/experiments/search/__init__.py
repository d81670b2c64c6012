"""Searches over settings of runs: which rate and method to choose, and whether pruning pays."""

from l2l_prune.experiments.search.choice import Tuned, tune
from l2l_prune.experiments.search.verdict import study

__all__ = ["Tuned", "study", "tune"]
