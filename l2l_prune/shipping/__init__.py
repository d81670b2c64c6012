"""From a meta-learner to a device: files without code, other formats, what adapting costs."""

from l2l_prune.shipping.costs import AdaptationCost, Adapting, adaptation_costs, costs_table
from l2l_prune.shipping.folder import export, load
from l2l_prune.shipping.manifest import read_manifest

__all__ = [
    "AdaptationCost",
    "Adapting",
    "adaptation_costs",
    "costs_table",
    "export",
    "load",
    "read_manifest",
]
