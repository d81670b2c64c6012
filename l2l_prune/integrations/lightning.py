"""Pruning in Lightning, including learn2learn's Lightning algorithms."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from l2l_prune._basics import checks
from l2l_prune._basics.moved import renamed
from l2l_prune._basics.tensor_files import save_tensors
from l2l_prune.masking.allocation import Allocation
from l2l_prune.masking.criteria import Criterion, magnitude
from l2l_prune.masking.layers import Layers, Rule, made_later, select
from l2l_prune.masking.masked_layer import (
    attach,
    dense_state_dict,
    detach,
    held_names,
    make_exact,
)
from l2l_prune.masking.patterns import UNSTRUCTURED, Pattern
from l2l_prune.masking.task_masks import TaskMasks, check_broadcasts
from l2l_prune.optimizer_state import plain_optimizer
from l2l_prune.pruner import Pruner
from l2l_prune.schedules.schedule import Schedule


def _callback_class() -> Any:
    """The Callback class of the installed Lightning package; both packages have the same hooks."""
    for package in ("pytorch_lightning", "lightning.pytorch"):  # learn2learn uses the first
        with suppress(ImportError):
            return importlib.import_module(package).Callback
    raise ImportError('PruningCallback needs: pip install "l2l-prune[lightning]"')


class PruningCallback(_callback_class()):  # type: ignore[misc]
    """Runs a pruning schedule while a Lightning trainer fits.

    One optimizer step is one iteration of the schedule. Steps skipped by gradient accumulation or a
    gradient scaler do not count, even if a fused optimizer skips them itself. With several
    optimizers, the steps of the first that holds pruned weights count; for the others, only their
    state follows the masks. The callback logs ``pruning/sparsity`` and ``pruning/phase`` (the
    number of the segment), and saves and restores itself with Lightning's checkpoints. The model
    keeps its masks after the fit, so that its checkpoints can still be loaded;
    ``callback.pruner.finalize()`` makes it plain.

    ``validate``, ``test`` and ``predict`` prune nothing themselves: a module that this callback has
    not fitted gets masks only from a checkpoint, and is plain again afterwards. Each fitted module
    starts the schedule anew, unless a checkpoint of its own is given.

    If the schedule draws masks for each task, each training batch is a task, as in learn2learn's
    Lightning algorithms: it has its own masks from its start to the step of the counting optimizer,
    or to its end. Evaluation has none.

    Args:
        schedule: When to prune, and how much, in optimizer steps.
        layers: As in :class:`~l2l_prune.Pruner`, like ``only``, ``skip``, ``criterion``,
            ``pattern``, ``allocation``, ``release_state`` and ``task_masks``; names start at the
            LightningModule.
        only: See ``layers``.
        skip: See ``layers``.
        criterion: See ``layers``.
        pattern: See ``layers``.
        allocation: See ``layers``.
        release_state: See ``layers``.
        task_masks: See ``layers``.
        regrow_state: Deprecated: the old name of ``release_state``.
        dense_weights: If given, the weights are written to this file at the end of the fit, as a
            state dict with dense keys, by ``torch.save``.

    Raises:
        TypeError: If ``schedule`` is not a Schedule, or ``dense_weights`` not a path.
        FileNotFoundError: When the fit starts, if the folder of ``dense_weights`` does not exist.
        ValueError: When the fit starts, if the module cannot be pruned as asked, makes layers in
            ``setup()`` or ``configure_model()`` that would have to be pruned, no optimizer holds a
            pruned weight, weight averaging stands before this callback, or
            DistributedDataParallel would overwrite the masks of tasks.

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
        release_state: Literal["match", "keep"] = "match",
        task_masks: TaskMasks | None = None,
        regrow_state: Literal["match", "keep"] | None = None,
        dense_weights: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        release_state = renamed("regrow_state", regrow_state, "release_state", release_state)
        self.schedule = checks.of_type("schedule", schedule, Schedule, "a Schedule")
        if dense_weights is not None:
            checks.of_type("dense_weights", dense_weights, (str, os.PathLike), "a path")  # type: ignore[arg-type]
        self.pruner: Pruner | None = None
        self._options: dict[str, Any] = {
            "layers": layers,
            "only": only,
            "skip": skip,
            "criterion": criterion,
            "pattern": pattern,
            "allocation": allocation,
            "release_state": release_state,
            "task_masks": task_masks,
        }
        self._dense_weights = dense_weights
        self._known: set[nn.Module] = set()  # what the module was made of when masks were attached
        self._restored: dict[str, Any] | None = None
        self._handles: list[Any] = []
        self._lent: list[tuple[nn.Module, str]] = []
        self._task = ExitStack()  # the masks of the batch that is running

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Attach before Lightning restores weights, whose keys are those of a pruned model.

        Raises:
            FileNotFoundError: If the folder of ``dense_weights`` does not exist; raised before the
                training, not after it.
        """
        if stage != "fit":
            self._lend_masks(pl_module)
            return
        if self._dense_weights is not None:
            folder = Path(self._dense_weights).absolute().parent
            if not folder.is_dir():
                raise FileNotFoundError(f"dense_weights: there is no folder {folder}")
        _check_order(trainer.callbacks, self)
        held = self.pruner
        if held is None or held.model is not pl_module or held.finalized:
            # Lightning wraps the module later; the ranks are there already.
            group = dist.group.WORLD if trainer.world_size > 1 and dist.is_initialized() else None
            self.pruner = Pruner(pl_module, self.schedule, group=group, **self._options)
            self._known = set(pl_module.modules())
            state, self._restored = self._restored, None  # for this module and no other
            if state is not None:
                self.pruner.load_state_dict(state)

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Remove the masks that were attached for an evaluation."""
        self._take_masks_back()

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Find the optimizers of the pruned weights and count their steps from here on."""
        pruner = self._attached()
        self._check_no_layer_is_late(pl_module)
        if any(segment.per_task for segment in self.schedule.segments):
            check_broadcasts(trainer.strategy.model)
        pruner.forget_optimizers()  # of an earlier fit
        plain = [plain_optimizer(optimizer) for optimizer in trainer.optimizers]
        found = [optimizer for optimizer in plain if pruner.concerns(optimizer)]
        if not found:
            raise ValueError(
                "none of the trainer's optimizers holds a pruned weight: check layers, only and "
                "skip, or configure_optimizers()"
            )
        for number, optimizer in enumerate(found):
            pruner.add_optimizer(optimizer)
            then = self._count if number == 0 else self._project
            self._handles.append(optimizer.register_step_post_hook(then))

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, *args: Any) -> None:
        """A batch is a task: draw masks for it, if the schedule says so."""
        self._task.close()  # of a batch that the module skipped by returning -1
        if self._attached().segment.per_task:
            self._task.enter_context(self._attached().task_masks())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Log sparsity and phase."""
        self._task.close()  # where gradients are accumulated, no step has ended it
        pruner = self._attached()
        position = float(self.schedule.index(pruner.iteration))
        pl_module.log("pruning/sparsity", pruner.sparsity, on_step=True, on_epoch=False)
        pl_module.log("pruning/phase", position, on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """A batch that was skipped has no end; its task is over."""
        self._task.close()

    def on_validation_batch_start(
        self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Weight averaging has put its averages in place, of masks too: make them masks again."""
        if batch_idx == 0:
            make_exact(pl_module)

    def on_validation_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """And now the model's own."""
        make_exact(pl_module)

    def on_fit_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Stop counting, and write the dense weights if requested."""
        self._unhook()
        make_exact(pl_module)  # weight averaging leaves its averages
        if self._dense_weights is not None and trainer.is_global_zero:
            save_tensors(dense_state_dict(pl_module), Path(self._dense_weights))

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Stop counting after a failed or interrupted fit; remove the masks of an evaluation."""
        self._unhook()
        self._take_masks_back()

    def state_dict(self) -> dict[str, Any]:
        """Saved in Lightning's checkpoints."""
        return {} if self.pruner is None else self.pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restored from Lightning's checkpoints, for the module of the current fit.

        Before the first fit, the state is kept for the module of that fit.
        """
        if not state_dict:
            return
        if self.pruner is None:
            self._restored = state_dict
        else:
            self.pruner.load_state_dict(state_dict)

    def _attached(self) -> Pruner:
        if self.pruner is None:
            raise RuntimeError("PruningCallback is not set up: give it to Trainer(callbacks=...)")
        return self.pruner

    def _check_no_layer_is_late(self, pl_module: nn.Module) -> None:
        """Masks must be there before Lightning restores weights, so no layer may come later."""
        rules = {key: self._options[key] for key in ("only", "skip")}
        if late := made_later(pl_module, self._known, **rules):
            raise ValueError(
                f"{', '.join(tensor.full_name for tensor in late)} would not be pruned: setup() or "
                "configure_model() made it after the masks; make it in __init__(), or leave it out "
                "with skip="
            )

    def _count(self, optimizer: Optimizer, *args: Any) -> None:
        # A scaler lets fused optimizers skip a step themselves, and signals it by this tensor.
        overflow = getattr(optimizer, "found_inf", None)
        self._task.close()
        if overflow is None or not overflow.item():
            self._attached().step()

    def _project(self, *args: Any) -> None:
        self._attached().project()

    def _lend_masks(self, pl_module: nn.Module) -> None:
        """Attach masks of ones to a plain module, for a checkpoint to fill."""
        if any(held_names(module) for module in pl_module.modules()):
            return
        choice = {key: self._options[key] for key in ("layers", "only", "skip")}
        for tensor in select(pl_module, **choice):
            attach(tensor.module, tensor.name)
            self._lent.append((tensor.module, tensor.name))

    def _take_masks_back(self) -> None:
        for module, name in self._lent:
            detach(module, name)
        self._lent = []

    def _unhook(self) -> None:
        self._task.close()
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _check_order(callbacks: Iterable[Any], pruning: PruningCallback) -> None:
    """Refuse callbacks that copy the module before the masks are there."""
    for callback in callbacks:
        if callback is pruning:
            return
        if any(kind.__name__ == "WeightAveraging" for kind in type(callback).__mro__):
            raise ValueError(
                f"{type(callback).__name__} copies the module before it is pruned: put "
                "PruningCallback before it in Trainer(callbacks=...)"
            )
