"""Network pruning for meta-learning with PyTorch, learn2learn and higher."""

from l2l_prune.masking.masked_layer import dense_state_dict
from l2l_prune.pruner import Pruner
from l2l_prune.reptile.reptile import PrunedReptile
from l2l_prune.schedules.paper import DSDSchedule, IHTSchedule, Schedule, Segment

__version__ = "0.1.0"

__all__ = [
    "DSDSchedule",
    "IHTSchedule",
    "PrunedReptile",
    "Pruner",
    "Schedule",
    "Segment",
    "dense_state_dict",
]
