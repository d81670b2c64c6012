"""Rivals that hook onto the steps of a Pruner: rewinding, regrowth."""

from l2l_prune.methods.regrowth import Regrowth
from l2l_prune.methods.rewinding import Rewind

__all__ = ["Regrowth", "Rewind"]
