"""Rivals: rewinding and regrowth of masks; MGAug, DropGrad and dropout for tasks."""

from l2l_prune.methods.drop_grad import DropGrad
from l2l_prune.methods.mgaug import MGAug
from l2l_prune.methods.regrowth import Regrowth
from l2l_prune.methods.rewinding import Rewind
from l2l_prune.methods.task_dropout import TaskDropout

__all__ = ["DropGrad", "MGAug", "Regrowth", "Rewind", "TaskDropout"]
