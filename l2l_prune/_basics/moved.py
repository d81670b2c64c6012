"""Old import paths and argument names, which work with a warning until version 0.3."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_PACKAGE = "l2l_prune"

MOVED = {
    "allocation": "masking.allocation",
    "batched": "reptile.batched",
    "cavia": "metalearners.cavia",
    "cli": "experiments.cli",
    "cli_options": "experiments.options",
    "compiled": "reptile.compiled",
    "criteria": "masking.criteria",
    "data": "fewshot.data",
    "evaluation": "fewshot.evaluation",
    "experiments.algorithms.masks": "experiments.algorithms.pruning",
    "experiments.checkpoint": "experiments.running.checkpoint",
    "experiments.compare": "experiments.running.compare_seeds",
    "experiments.finished": "experiments.report.finished_runs",
    "experiments.models": "fewshot.models",
    "experiments.one_seed": "experiments.running.compare_one_seed",
    "experiments.over_seeds": "experiments.report.seed_statistics",
    "experiments.paper_numbers": "experiments.report.paper_numbers",
    "experiments.plots": "experiments.report.plots",
    "experiments.results": "experiments.report.results",
    "experiments.run": "experiments.running.run",
    "experiments.storage": "experiments.running.storage",
    "experiments.studies": "experiments.report.figures",
    "experiments.sweep": "experiments.running.sweep",
    "experiments.tables": "experiments.report.tables",
    "experiments.tensorboard": "experiments.running.loggers",
    "following": "masked_optimizers",
    "held_masks": "masking.attached",
    "inner_loop": "reptile.learner",
    "integrations.metaoptnet": "metalearners.metaoptnet",
    "learner": "reptile.learner",
    "mask_choice": "masking.plan",
    "masks": "masking.topk",
    "on_schedule": "scheduled",
    "other_schedules": "schedules.common",
    "patterns": "masking.patterns",
    "prunable": "masking.prunable",
    "regrowth": "methods.regrowth",
    "reparam": "masking.masked_layer",
    "rewinding": "methods.rewinding",
    "segments": "schedules.schedule",
    "selection": "masking.layers",
    "sparse_maml": "metalearners.sparse_maml",
    "structured": "channels.pruner",
    "theory": "fewshot.theory",
}
"""Old module or package to new, both below ``l2l_prune``."""


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a moved module under its old name."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        new = _new_name(fullname)
        if new is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, loader_state=new)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new = spec.loader_state
        if spec.name.removeprefix(f"{_PACKAGE}.") in MOVED:  # else its package has warned
            warnings.warn(
                f"{spec.name} has moved to {new}; version 0.3 removes the old path",
                DeprecationWarning,
                stacklevel=2,  # the import statement, since frames of importlib do not count
            )
        module = importlib.import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the spec, which importlib has overwritten; the module was executed before."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def _new_name(fullname: str) -> str | None:
    package, _, old = fullname.partition(".")
    if package != _PACKAGE:
        return None
    if old in MOVED:
        return f"{_PACKAGE}.{MOVED[old]}"
    parent, _, child = old.rpartition(".")
    return f"{_PACKAGE}.{MOVED[parent]}.{child}" if parent in MOVED else None


def install() -> None:
    """Make old import paths work.

    This finder comes first: otherwise a module of a moved package would be found in the package's
    folder, and executed a second time under its old name.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def renamed(old: str, value: Any, new: str, current: Any) -> Any:
    """An argument that may come under its old name, which still works with a warning.

    Args:
        old: The old name.
        value: What was given under it, or ``None``.
        new: The new name.
        current: What was given under that.
    """
    if value is None:
        return current
    warnings.warn(
        f"{old} is now called {new}; version 0.3 removes the old name",
        DeprecationWarning,
        stacklevel=3,
    )
    return value
