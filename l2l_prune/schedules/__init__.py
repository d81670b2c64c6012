"""When to prune, and how much: frozen values, without importing torch."""

from l2l_prune.schedules.common import cubic, cyclic, metasparse, one_shot, sparse_from_start
from l2l_prune.schedules.paper import DSDSchedule, IHTSchedule
from l2l_prune.schedules.schedule import Schedule, Segment

__all__ = [
    "DSDSchedule",
    "IHTSchedule",
    "Schedule",
    "Segment",
    "cubic",
    "cyclic",
    "metasparse",
    "one_shot",
    "sparse_from_start",
]
