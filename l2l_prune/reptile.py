"""Reptile with network pruning (Algorithms 1 and 2 of the paper) in learn2learn's verbs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from l2l_prune import optimizer_state
from l2l_prune.criteria import Criterion, magnitude
from l2l_prune.patterns import UNSTRUCTURED, Pattern
from l2l_prune.pruner import Pruner
from l2l_prune.reparam import plain_copy
from l2l_prune.schedules import Schedule
from l2l_prune.selection import Layers, Rule
from l2l_prune.structured import ChannelPruner, Structured, raise_regrown

OptimizerFactory = Callable[..., Optimizer]


def adam(parameters: Iterable[Tensor], lr: float, weight_decay: float = 0.0) -> Optimizer:
    """The inner optimizer of Reptile's authors and of the paper: Adam without momentum.

    Args:
        parameters: What it steps on.
        lr: Its learning rate.
        weight_decay: Decoupled weight decay, as in AdamW; none in the paper.

    Returns:
        ``torch.optim.AdamW`` with betas (0, 0.999), fused into one kernel where torch has that.
    """
    held = list(parameters)
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in held)
    return torch.optim.AdamW(
        held, lr, betas=(0.0, 0.999), weight_decay=weight_decay, fused=fused or None
    )


class PrunedReptile(nn.Module):
    """Reptile whose meta-parameters follow a pruning schedule.

    Each meta-iteration clones a learner per task, adapts it by minibatch steps, collects it, and
    then moves the meta-parameters towards the mean of the adapted ones (Algorithm 2), holds the
    pruned ones at 0 and advances the schedule (Algorithm 1). While sparse, learners are adapted
    under the mask. As in the authors' program the inner optimizer sees the gradients of pruned
    weights, so Adam's second moments are warm when those weights are released.

    Batch normalisation uses batch statistics in training mode; running buffers that a learner
    changes are dropped with it, so nothing leaks from task to task, nor into the model.

    Args:
        model: The network; its initial weights are the start. It is pruned in place.
        schedule: When to prune, and how much.
        inner_lr: Learning rate of the inner optimizer, > 0.
        meta_lr: Step towards the mean of the adapted weights at the start, >= 0.
        meta_lr_final: The same at the end of the schedule; linear in between.
        inner_optimizer: Called as ``inner_optimizer(parameters, lr=inner_lr)``: an optimizer
            class or a ``functools.partial`` of one. By default :func:`adam`, with betas (0, 0.999).
        carry_state: Carry the inner optimizer's state over from one collected task to the next,
            as the authors and learn2learn's example do; else each task starts afresh.
        foml: First-order MAML: move by the last inner step only, instead of by all.
        layers: As in :class:`~l2l_prune.Pruner`, likewise ``only``, ``skip``,
            ``criterion`` and ``pattern``.
        structured: Cut out whole channels instead of masking weights, so that sparse phases run on
            a small network: see :class:`~l2l_prune.structured.ChannelPruner`. Of the arguments
            before it, only ``skip`` goes with this, as names of layers.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of range, or the model cannot be pruned as asked.

    Example:
        >>> from l2l_prune import DSDSchedule
        >>> net, x = torch.nn.Linear(4, 2), torch.ones(3, 4)
        >>> reptile = PrunedReptile(net, DSDSchedule(0.5, pretrain=1, prune=1, retrain=1))
        >>> for _ in range(reptile.schedule.iterations):
        ...     for task in range(2):
        ...         learner = reptile.clone()
        ...         learner.adapt(learner(x).square().mean())
        ...         reptile.collect(learner)
        ...     reptile.step()
        >>> reptile.finalize() is net
        True
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        inner_lr: float = 1e-3,
        meta_lr: float = 1.0,
        meta_lr_final: float = 0.0,
        inner_optimizer: OptimizerFactory = adam,
        carry_state: bool = True,
        foml: bool = False,
        layers: Layers = "all",
        only: Rule | Iterable[Rule] | None = None,
        skip: Rule | Iterable[Rule] | None = None,
        criterion: Criterion = magnitude,
        pattern: Pattern = UNSTRUCTURED,
        structured: Structured | None = None,
    ) -> None:
        super().__init__()
        for name, rate in (("meta_lr", meta_lr), ("meta_lr_final", meta_lr_final)):
            if not 0 <= rate < float("inf"):
                raise ValueError(f"{name} must be a number >= 0, got {rate!r}")
        if not 0 < inner_lr < float("inf"):
            raise ValueError(f"inner_lr must be a number > 0, got {inner_lr!r}")
        self.pruner: Pruner | ChannelPruner
        if structured is None:
            self.pruner = Pruner(
                model,
                schedule,
                layers=layers,
                only=only,
                skip=skip,
                criterion=criterion,
                pattern=pattern,
            )
        else:
            if only is not None or layers != "all" or criterion is not magnitude:
                raise ValueError("with structured, layers are chosen by skip= alone")
            self.pruner = ChannelPruner(
                model,
                schedule,
                example_inputs=structured.example_inputs,
                importance=structured.importance,
                skip=skip or (),  # type: ignore[arg-type]
            )
            self.pruner.more_states = self._carried_states
        self.module = model
        self.inner_lr = inner_lr
        self.meta_lr_initial, self.meta_lr_final = meta_lr, meta_lr_final
        self.carry_state, self.foml = carry_state, foml
        self._inner_optimizer = inner_optimizer
        self._workspaces: list[_Workspace] = []
        self._inner_state: list[dict[str, Any]] = []
        self._collected: list[Tensor] = []  # sum over tasks, one tensor a parameter
        self._tasks = 0

    @property
    def schedule(self) -> Schedule:
        """The pruning schedule."""
        return self.pruner.schedule

    @property
    def iteration(self) -> int:
        """Meta-iterations done so far."""
        return self.pruner.iteration

    @property
    def meta_lr(self) -> float:
        """The meta step size of the current iteration: linear from start to end."""
        done = min(self.iteration / self.schedule.iterations, 1.0)
        return (1 - done) * self.meta_lr_initial + done * self.meta_lr_final

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the (masked) meta-model."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def clone(self) -> Learner:
        """A learner that starts from the meta-parameters, for one task.

        Several may live at once. Dropping a learner without :meth:`collect` leaves no trace, so
        evaluation is ``clone``, ``adapt``, predict.

        Raises:
            RuntimeError: After :meth:`finalize`.
        """
        self._check_usable()
        workspace = self._workspaces.pop() if self._workspaces else self._new_workspace()
        workspace.restore(self.module, self._inner_state if self.carry_state else [])
        return Learner(self, workspace)

    @torch.no_grad()
    def collect(self, learner: Learner) -> None:
        """Take the adapted weights of ``learner`` into this meta-iteration, and use it up.

        Raises:
            RuntimeError: If the learner is another's, was collected before, or was cloned before
                the last :meth:`step`.
        """
        workspace = self._released(learner)
        moved = [p.detach() for p in workspace.parameters]
        if self.foml:
            moved = list(torch._foreach_sub(moved, workspace.before_last))
        if not self._collected:
            self._collected = [p.clone() for p in moved]
        else:
            torch._foreach_add_(self._collected, moved)
        self._tasks += 1
        if self.carry_state:
            workspace.clear_momentum()
            self._inner_state = workspace.save_state(self._inner_state)
        self._workspaces.append(workspace)

    def discard(self, learner: Learner) -> None:
        """Use a learner up without collecting it, for evaluation.

        Dropping it does the same; this spares the next :meth:`clone` a copy of the model.

        Raises:
            RuntimeError: As for :meth:`collect`.
        """
        self._workspaces.append(self._released(learner))

    @torch.no_grad()
    def step(self) -> None:
        """End a meta-iteration: interpolate, project, advance the schedule.

        Raises:
            RuntimeError: If no learner was collected since the last step, or after
                :meth:`finalize`.
            ValueError: If weights are NaN or infinite when a mask is due.
        """
        self._check_usable()
        if not self._tasks:
            raise RuntimeError("step() without a task: collect(learner) at least one before it")
        parameters = [p.detach() for p in self.module.parameters()]
        torch._foreach_div_(self._collected, self._tasks)
        if self.foml:
            torch._foreach_add_(parameters, self._collected, alpha=self.meta_lr)
        else:
            torch._foreach_lerp_(parameters, self._collected, self.meta_lr)
        self._collected, self._tasks = [], 0
        segment = self.pruner.segment
        self.pruner.step()
        if isinstance(self.pruner, ChannelPruner) and self.pruner.segment is not segment:
            self._workspaces.clear()  # their shapes are those of the old segment

    def finalize(self) -> nn.Module:
        """Take the masks off and return the plain model (see :meth:`Pruner.finalize`)."""
        self._workspaces.clear()
        return self.pruner.finalize()

    def get_extra_state(self) -> dict[str, Any]:
        """What ``state_dict()`` holds beside the model, to resume exactly."""
        return {
            "pruner": self.pruner.state_dict(),
            "inner_state": [_copied(state) for state in self._inner_state],
            "collected": [total.clone() for total in self._collected],
            "tasks": self._tasks,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Called by ``load_state_dict()``.

        Raises:
            ValueError: If the state belongs to another model or schedule.
        """
        self.pruner.load_state_dict(state["pruner"])
        self._workspaces.clear()
        self._inner_state = [_copied(entry) for entry in state["inner_state"]]
        self._collected = [total.clone() for total in state["collected"]]
        self._tasks = state["tasks"]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrunedReptile:
        """Move or cast: working copies are made anew, the carried state goes along."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._workspaces.clear()
        self._collected = [fn(total) for total in self._collected]
        for state in self._inner_state:
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim():  # Adam's step count stays
                    state[key] = fn(value)
        return self

    def _released(self, learner: Learner) -> _Workspace:
        if not isinstance(learner, Learner):
            raise TypeError(f"this takes a learner made by clone(), got {type(learner)}")
        return learner.release(self)

    def _carried_states(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        return zip(self.module.parameters(), self._inner_state, strict=False)

    def _new_workspace(self) -> _Workspace:
        workspace = _Workspace(self.pruner, self._inner_optimizer, self.inner_lr, self.foml)
        if isinstance(self.pruner, ChannelPruner) and self.pruner.regrown:
            copies, pruner = dict(workspace.module.named_parameters()), self.pruner

            def first_steps(optimizer: Optimizer) -> None:
                raise_regrown(optimizer, copies, pruner.regrown)

            hook = optimizer_state.gradient_hook(first_steps)
            workspace.optimizer.register_step_pre_hook(hook)
        return workspace

    def _check_usable(self) -> None:
        if self.pruner.finalized:
            raise RuntimeError("PrunedReptile was finalized: make a new one to train on")


class Learner(nn.Module):
    """A task's own copy of the model; made by :meth:`PrunedReptile.clone`.

    Attributes:
        module: A plain copy of the model; while sparse its pruned weights are exactly 0 after
            every :meth:`adapt` and before every forward.
    """

    def __init__(self, reptile: PrunedReptile, workspace: _Workspace) -> None:
        super().__init__()
        self.module = workspace.module
        self.training = workspace.module.training
        # In __dict__, so that the meta-model does not become a submodule of each learner.
        self.__dict__.update(_reptile=reptile, _workspace=workspace, _born=reptile.iteration)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the learner's model under the mask.

        Raises:
            RuntimeError: If the learner was collected.
        """
        self._in_use().project()
        return self.module(*args, **kwargs)

    def adapt(self, loss: Tensor) -> None:
        """One inner step of the inner optimizer on ``loss``.

        Args:
            loss: Scalar that depends on this learner's parameters.

        Raises:
            RuntimeError: If the learner was collected, or ``loss`` does not depend on it.
        """
        self._in_use().adapt(loss)

    def release(self, reptile: PrunedReptile) -> _Workspace:
        """Give the working copy back (called by :meth:`PrunedReptile.collect`)."""
        workspace = self._in_use()
        if self.__dict__["_reptile"] is not reptile:
            raise RuntimeError("this learner was cloned from another PrunedReptile")
        if self.__dict__["_born"] != reptile.iteration:
            raise RuntimeError("this learner was cloned before the last step(): its start is stale")
        workspace.project()
        self.__dict__["_workspace"] = None
        del self.module
        return workspace

    def _in_use(self) -> _Workspace:
        workspace: _Workspace | None = self.__dict__["_workspace"]
        if workspace is None:
            raise RuntimeError("this learner was collected: clone() a new one")
        return workspace


class _Workspace:
    """A plain working copy of the model with its inner optimizer, used for task after task."""

    def __init__(
        self, pruner: Pruner | ChannelPruner, factory: OptimizerFactory, inner_lr: float, foml: bool
    ) -> None:
        self._pruner = pruner
        self.module = plain_copy(pruner.model)
        self.parameters = list(self.module.parameters())
        self.optimizer = factory([p for p in self.parameters if p.requires_grad], lr=inner_lr)
        if isinstance(self.optimizer, LBFGS):
            raise ValueError("inner_optimizer must step on one loss; L-BFGS needs a closure")
        self._by_name = dict(self.module.named_parameters())
        self._masked: list[Tensor] = []
        self._masks: list[Tensor] = []
        self._foml = foml
        self.before_last: list[Tensor] = []

    def restore(self, model: nn.Module, state: list[dict[str, Any]]) -> None:
        """Start from the meta-model: weights, buffers, modes, masks, optimizer state."""
        torch._foreach_copy_([*self.parameters], [*model.parameters()])
        for parameter in self.parameters:
            parameter.grad = None
        sources = dict(model.named_buffers())
        for name, buffer in self.module.named_buffers():
            buffer.copy_(sources[name])
        for mine, theirs in zip(self.module.modules(), model.modules(), strict=True):
            mine.training = theirs.training
        self._masked, self._masks = [], []
        if self._pruner.sparse:
            masks = self._pruner.masks
            self._masked = [self._by_name[name].data for name in masks]
            self._masks = [
                mask.to(weight.dtype)
                for mask, weight in zip(masks.values(), self._masked, strict=True)
            ]
        self.before_last = [p.detach().clone() for p in self.parameters] if self._foml else []
        _restore_state(self.optimizer, self.parameters, state)

    def adapt(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        if all(parameter.grad is None for parameter in self.parameters):
            raise RuntimeError("loss does not depend on this learner: compute it from learner(x)")
        if self._foml:
            torch._foreach_copy_(self.before_last, [p.detach() for p in self.parameters])
        self.optimizer.step()
        self.project()

    def project(self) -> None:
        """Pruned weights to exactly 0; ``.data`` so that a pending backward is not disturbed."""
        if self._masks:
            torch._foreach_mul_(self._masked, self._masks)

    def clear_momentum(self) -> None:
        """Pruned weights must not be pushed by an old momentum when they are released."""
        if self._masks:
            for name, mask in self._pruner.masks.items():
                optimizer_state.clear_momentum(self.optimizer, self._by_name[name], mask)

    def save_state(self, into: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Copy the optimizer's state out, reusing the tensors of ``into`` where they fit."""
        states = [self.optimizer.state.get(p, {}) for p in self.parameters]
        if len(into) != len(states):
            return [_copied(state) for state in states]
        _copy_states(states, into)
        return into


def _restore_state(
    optimizer: Optimizer, parameters: list[nn.Parameter], saved: list[dict[str, Any]]
) -> None:
    if not any(saved):
        optimizer.state.clear()
        return
    _copy_states(saved, [optimizer.state[p] for p in parameters])
    for group in optimizer.param_groups:
        if group.get("fused") or group.get("capturable"):  # these count their steps on the device
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if "step" in state:
                    state["step"] = state["step"].to(parameter.device)


def _copy_states(sources: list[dict[str, Any]], targets: list[dict[str, Any]]) -> None:
    """Make each target dict equal to its source; tensors in one grouped copy."""
    old: list[Tensor] = []
    new: list[Tensor] = []
    for source, target in zip(sources, targets, strict=True):
        for key in target.keys() - source.keys():
            del target[key]
        for key, value in source.items():
            held = target.get(key)
            if isinstance(value, Tensor) and isinstance(held, Tensor):
                old.append(held)
                new.append(value)
            else:
                target[key] = value.clone() if isinstance(value, Tensor) else value
    if old:
        torch._foreach_copy_(old, new)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
