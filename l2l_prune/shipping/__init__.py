"""From a meta-learner to a device: files without code, other formats, the cost of adapting."""

from l2l_prune.shipping.costs import AdaptationCost, Adapting, adaptation_costs, costs_table
from l2l_prune.shipping.folder import export, load
from l2l_prune.shipping.formats import export_onnx, export_program
from l2l_prune.shipping.manifest import read_manifest
from l2l_prune.shipping.patterns import n_by_m_faults, semi_structured_copy

__all__ = [
    "AdaptationCost",
    "Adapting",
    "adaptation_costs",
    "costs_table",
    "export",
    "export_onnx",
    "export_program",
    "load",
    "n_by_m_faults",
    "read_manifest",
    "semi_structured_copy",
]
