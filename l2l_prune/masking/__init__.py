"""Which weights are pruned, and how a mask holds them at zero."""

from l2l_prune.masking.allocation import erk
from l2l_prune.masking.criteria import Movement, grasp, magnitude, random, snip, taylor
from l2l_prune.masking.patterns import Block, NByM, Pattern, Rows
from l2l_prune.masking.task_masks import TaskMasks

__all__ = [
    "Block",
    "Movement",
    "NByM",
    "Pattern",
    "Rows",
    "TaskMasks",
    "erk",
    "grasp",
    "magnitude",
    "random",
    "snip",
    "taylor",
]
