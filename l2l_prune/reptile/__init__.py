"""Reptile with pruning (Algorithms 1 and 2 of the paper), with learn2learn's method names."""

from l2l_prune.reptile.batched import BatchedLearners
from l2l_prune.reptile.best_channels import best_channels
from l2l_prune.reptile.compiled import CompiledStep
from l2l_prune.reptile.learner import Learner, adam
from l2l_prune.reptile.reptile import PrunedReptile

__all__ = [
    "BatchedLearners",
    "CompiledStep",
    "Learner",
    "PrunedReptile",
    "adam",
    "best_channels",
]
