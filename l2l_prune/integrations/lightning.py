"""Pruning in a Lightning training, learn2learn's Lightning algorithms included."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from l2l_prune import _values
from l2l_prune._tensor_files import save_tensors
from l2l_prune.allocation import Allocation
from l2l_prune.criteria import Criterion, magnitude
from l2l_prune.patterns import UNSTRUCTURED, Pattern
from l2l_prune.pruner import Pruner
from l2l_prune.reparam import dense_state_dict
from l2l_prune.segments import Schedule
from l2l_prune.selection import Layers, Rule


def _callback_class() -> Any:
    """Callback of the Lightning package that is installed; the two packages share their hooks."""
    for package in ("pytorch_lightning", "lightning.pytorch"):  # learn2learn uses the first
        with suppress(ImportError):
            return importlib.import_module(package).Callback
    raise ImportError('PruningCallback needs: pip install "l2l-prune[lightning]"')


class PruningCallback(_callback_class()):  # type: ignore[misc]
    """Carries a pruning schedule out while a Lightning trainer fits.

    One optimizer step is one iteration of the schedule: steps skipped by gradient accumulation
    or a gradient scaler do not count. Of several optimizers the first that holds pruned weights
    counts; the others only have their state follow the masks. The callback logs
    ``pruning/sparsity`` and ``pruning/phase`` (the number of the segment), and saves and restores
    itself with Lightning's checkpoints. The model stays attached after the fit, so that its
    checkpoints go on to load; ``callback.pruner.finalize()`` makes it plain.

    Args:
        schedule: When to prune, and how much, in optimizer steps.
        layers: As in :class:`~l2l_prune.Pruner`, likewise ``only``, ``skip``,
            ``criterion``, ``pattern``, ``allocation`` and ``regrow_state``; names start at the
            LightningModule.
        only: See ``layers``.
        skip: See ``layers``.
        criterion: See ``layers``.
        pattern: See ``layers``.
        allocation: See ``layers``.
        regrow_state: See ``layers``.
        dense_weights: If given, at the end of the fit the weights are written to this file under
            dense keys, as ``torch.save`` of a state dict.

    Raises:
        TypeError: If ``schedule`` is no Schedule, or ``dense_weights`` no path.
        FileNotFoundError: When the fit starts, if the folder of ``dense_weights`` is not there.
        ValueError: When the fit starts, if the module cannot be pruned as asked, or no optimizer
            holds a pruned weight.

    Examples:
        ``Trainer(callbacks=[PruningCallback(DSDSchedule(0.3, pretrain=300, prune=600,
        retrain=100))])``
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        layers: Layers = "all",
        only: Rule | Iterable[Rule] | None = None,
        skip: Rule | Iterable[Rule] | None = None,
        criterion: Criterion = magnitude,
        pattern: Pattern = UNSTRUCTURED,
        allocation: Allocation = "layerwise",
        regrow_state: Literal["match", "keep"] = "match",
        dense_weights: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        self.schedule = _values.instance("schedule", schedule, Schedule, "a Schedule")
        if dense_weights is not None:
            _values.instance("dense_weights", dense_weights, (str, os.PathLike), "a path")  # type: ignore[arg-type]
        self.pruner: Pruner | None = None
        self._options: dict[str, Any] = {
            "layers": layers,
            "only": only,
            "skip": skip,
            "criterion": criterion,
            "pattern": pattern,
            "allocation": allocation,
            "regrow_state": regrow_state,
        }
        self._dense_weights = dense_weights
        self._restored: dict[str, Any] | None = None
        self._handles: list[Any] = []

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Attach before Lightning restores weights, whose keys are those of a pruned model.

        Raises:
            FileNotFoundError: If the folder of ``dense_weights`` is not there: said now, and not
                after the training.
        """
        if self._dense_weights is not None:
            folder = Path(self._dense_weights).absolute().parent
            if not folder.is_dir():
                raise FileNotFoundError(f"dense_weights: there is no folder {folder}")
        if self.pruner is None or self.pruner.model is not pl_module:
            self.pruner = Pruner(pl_module, self.schedule, **self._options)
            if self._restored is not None:
                self.pruner.load_state_dict(self._restored)

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Find the optimizers of the pruned weights and count their steps from here on."""
        pruner = self._attached()
        found = [_plain(o) for o in trainer.optimizers if pruner.owns(_plain(o))]
        if not found:
            raise ValueError("none of the trainer's optimizers holds a weight that is pruned")
        for number, optimizer in enumerate(found):
            if optimizer not in pruner.optimizers:
                pruner.add_optimizer(optimizer)
            then = self._count if number == 0 else self._project
            self._handles.append(optimizer.register_step_post_hook(then))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Log sparsity and phase."""
        pruner = self._attached()
        position = float(self.schedule.index(pruner.iteration))
        pl_module.log("pruning/sparsity", pruner.sparsity, on_step=True, on_epoch=False)
        pl_module.log("pruning/phase", position, on_step=True, on_epoch=False)

    def on_fit_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Stop counting; write the dense weights if asked to."""
        self._unhook()
        if self._dense_weights is not None and trainer.is_global_zero:
            save_tensors(dense_state_dict(pl_module), Path(self._dense_weights))

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Stop counting after a fit that failed or was interrupted."""
        self._unhook()

    def state_dict(self) -> dict[str, Any]:
        """Saved in Lightning's checkpoints."""
        return {} if self.pruner is None else self.pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restored from Lightning's checkpoints."""
        if not state_dict:
            return
        self._restored = state_dict
        if self.pruner is not None:
            self.pruner.load_state_dict(state_dict)

    def _attached(self) -> Pruner:
        if self.pruner is None:
            raise RuntimeError("PruningCallback is not set up: pass it to Trainer(callbacks=...)")
        return self.pruner

    def _count(self, *args: Any) -> None:
        self._attached().step()

    def _project(self, *args: Any) -> None:
        self._attached().project()

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _plain(optimizer: Any) -> Optimizer:
    """The torch optimizer inside Lightning's wrapper."""
    inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner
