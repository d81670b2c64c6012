"""Network pruning for meta-learning with PyTorch, learn2learn and higher."""

from l2l_prune._basics.moved import install as _install
from l2l_prune.channels import ChannelPruner, Structured
from l2l_prune.masking.masked_layer import dense_state_dict
from l2l_prune.masking.task_masks import TaskMasks
from l2l_prune.methods import DropGrad, MGAug, Regrowth, Rewind, TaskDropout
from l2l_prune.pruner import Pruner
from l2l_prune.reptile import CompiledStep, PrunedReptile
from l2l_prune.schedules import DSDSchedule, IHTSchedule, Schedule, Segment

__version__ = "0.2.0"

__all__ = [
    "ChannelPruner",
    "CompiledStep",
    "DSDSchedule",
    "DropGrad",
    "IHTSchedule",
    "MGAug",
    "PrunedReptile",
    "Pruner",
    "Regrowth",
    "Rewind",
    "Schedule",
    "Segment",
    "Structured",
    "TaskDropout",
    "TaskMasks",
    "dense_state_dict",
]

_install()
