"""A task's own copy of the model in Reptile, and the inner optimizer that adapts it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from l2l_prune import optimizer_state
from l2l_prune._basics import checks
from l2l_prune._basics.arguments import is_plain
from l2l_prune._basics.losses import check_loss
from l2l_prune._basics.optimizers import held_ids
from l2l_prune._basics.precision import forget_casts
from l2l_prune.masking.masked_layer import held_full_names, plain_copy
from l2l_prune.scheduled import ScheduledPruner

OptimizerFactory = Callable[..., Optimizer]

_SETTINGS = frozenset({bool, int, float, str, tuple, type(None)})


def adam(parameters: Iterable[Tensor], lr: float, weight_decay: float = 0.0) -> Optimizer:
    """The inner optimizer of Reptile's authors and of the paper: Adam without momentum.

    Args:
        parameters: The parameters to optimize.
        lr: The learning rate.
        weight_decay: Decoupled weight decay, as in AdamW; none in the paper.

    Returns:
        ``torch.optim.AdamW`` with betas (0, 0.999), fused into one kernel where torch can.
    """
    held = list(parameters)
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in held)
    return torch.optim.AdamW(
        held, lr, betas=(0.0, 0.999), weight_decay=weight_decay, fused=fused or None
    )


class Learner(nn.Module):
    """A task's own copy of the model; made by :meth:`~l2l_prune.PrunedReptile.clone`.

    Attributes:
        module: A plain copy of the model. In sparse phases its pruned weights are exactly 0 after
            every :meth:`adapt` and before every forward.
    """

    def __init__(self, reptile: nn.Module, iteration: int, workspace: Workspace) -> None:
        super().__init__()
        self.module = workspace.module
        self.training = workspace.module.training
        # In __dict__, so that the meta-model does not become a submodule of each learner.
        self.__dict__.update(_reptile=reptile, _workspace=workspace, _born=iteration)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the learner's model under its mask.

        Raises:
            RuntimeError: If the learner was collected.
        """
        self.workspace.project()
        return self.module(*args, **kwargs)

    def adapt(self, loss: Tensor) -> None:
        """One inner step of the inner optimizer on ``loss``.

        Args:
            loss: Scalar that depends on this learner's parameters.

        Raises:
            RuntimeError: If the learner was collected, or ``loss`` does not depend on it.
            TypeError: If ``loss`` is not a tensor.
            ValueError: If ``loss`` holds several numbers.
        """
        self.workspace.adapt(loss)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Learner:
        """Move or cast this learner alone, under its mask."""
        workspace = self.workspace
        before = [parameter.data for parameter in workspace.parameters]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        pairs = zip(workspace.parameters, before, strict=True)
        if any(parameter.data_ptr() != old.data_ptr() for parameter, old in pairs):
            workspace.move(fn)
        return self

    def release(self, reptile: nn.Module, iteration: int) -> Workspace:
        """Give the working copy back (called by :meth:`~l2l_prune.PrunedReptile.collect`)."""
        workspace = self.workspace
        if self.__dict__["_reptile"] is not reptile:
            raise RuntimeError("this learner was cloned from another PrunedReptile")
        if self.__dict__["_born"] != iteration:
            raise RuntimeError(
                "this learner is stale, cloned before the last step(): clone() a new one"
            )
        workspace.end()
        self.__dict__["_workspace"] = None
        del self.module
        return workspace

    @property
    def workspace(self) -> Workspace:
        """The working copy behind the learner, with its optimizer, masks and weights.

        Raises:
            RuntimeError: If the learner was collected.
        """
        workspace: Workspace | None = self.__dict__["_workspace"]
        if workspace is None:
            raise RuntimeError("this learner was collected: clone() a new one")
        return workspace


class Workspace:
    """A plain working copy of the model with its inner optimizer, used for task after task.

    Attributes:
        origin: What it was copied from; Reptile makes another copy where this has changed, or
            where a caller has altered the working copy (:attr:`altered`).
    """

    origin: object = None

    def __init__(
        self, pruner: ScheduledPruner, factory: OptimizerFactory, inner_lr: float, foml: bool
    ) -> None:
        self._pruner = pruner
        if others := held_full_names(pruner.model) - pruner.masked_names:
            raise RuntimeError(
                f"{', '.join(sorted(others))} has a mask of another Pruner, which learners would "
                "not keep: let PrunedReptile prune it, or finalize the other Pruner"
            )
        self.module = plain_copy(pruner.model)
        self.parameters = list(self.module.parameters())
        given = [p for p in self.parameters if p.requires_grad]
        self.optimizer = checks.of_type(
            "inner_optimizer's result",
            factory(given, lr=inner_lr),
            Optimizer,
            "a torch Optimizer",
        )
        if not held_ids(self.optimizer) <= {id(p) for p in given}:
            raise ValueError("inner_optimizer must step only on the parameters that it is given")
        if isinstance(self.optimizer, LBFGS):
            raise ValueError("inner_optimizer must step without a closure, but L-BFGS needs one")
        self._fresh = [copied_state(self.optimizer.state.get(p, {})) for p in self.parameters]
        self._by_name = dict(self.module.named_parameters())
        self._trained = {name: p.requires_grad for name, p in self._by_name.items()}
        self._options = [_options(group) for group in self.optimizer.param_groups]
        self.partly: list[tuple[Tensor, Tensor, Tensor]] = []  # weight, what adapts, the start
        self._first_step: RemovableHandle | None = None
        if hook := pruner.first_step_hook(self.module):
            self._first_step = self.optimizer.register_step_pre_hook(hook)
        self.masks: dict[str, Tensor] = {}  # in the dtype of the weights, while sparse
        self._masks_of_a_task = False  # where they prune, the model's own weights are not 0
        self._foml = foml
        self.before_last: list[Tensor] = []
        self._grow: Callable[[list[Tensor]], list[Tensor]] | None = None  # while it is small
        self._parts = self._structure()

    def _structure(self) -> list[object]:
        held = [
            (id(p), *(p._backward_hooks or ()), *(p._post_accumulate_grad_hooks or ()))
            for p in self.module.parameters()
        ]
        return [*structure(self.module), *held, len(self.optimizer.param_groups)]

    @property
    def altered(self) -> bool:
        """Whether a caller put other layers, parameters, hooks or parameter groups into it."""
        return self._structure() != self._parts

    @property
    def replaced(self) -> str | None:
        """The first parameter that a caller replaced, which no inner step adapts."""
        now = dict(self.module.named_parameters())
        others = (n for n in {**now, **self._by_name} if now.get(n) is not self._by_name.get(n))
        return next(others, None)

    def restore(self, model: nn.Module, state: list[dict[str, Any]]) -> None:
        """Start again from the meta-model: weights, buffers, modes, masks, optimizer state."""
        torch._foreach_copy_([*self.parameters], [*model.parameters()])
        for parameter in self.parameters:
            parameter.grad = None
        sources = dict(model.named_buffers())
        for name, buffer in self.module.named_buffers():
            buffer.copy_(sources[name])
        for mine, theirs in zip(self.module.modules(), model.modules(), strict=True):
            _take_over_settings(mine, theirs)
        for group, options in zip(self.optimizer.param_groups, self._options, strict=True):
            group.update(options)  # a scheduler of the last task's may have changed them
        if self._first_step and self._pruner.first_step_hook(self.module) is None:
            self._first_step.remove()
            self._first_step = None
        self._masks_of_a_task = self._pruner.in_masked_task
        self._put_on(self._pruner.learner_masks)
        self.project()  # the model's own weights are not pruned by a task's masks
        self.narrow(dict.fromkeys(self._by_name))  # all adapt, also what a caller froze before
        # Some optimizers (Adagrad in older torch) make their state when they are made.
        _restore_state(self.optimizer, self.parameters, state if any(state) else self._fresh)
        forget_casts()
        self._grow = self._pruner.cut_for_task(self.module, self.optimizer)
        self.before_last = [p.detach().clone() for p in self.parameters] if self._foml else []

    def _put_on(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = {
            name: torch.empty_like(self._by_name[name].data).copy_(mask)
            for name, mask in masks.items()
        }

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Take along what belongs to the module, which was moved or cast by itself."""
        self.origin = None  # it serves no other task
        self._put_on(self.masks)
        self.before_last = [fn(tensor) for tensor in self.before_last]
        self.partly = [(weight, fn(adapts), fn(start)) for weight, adapts, start in self.partly]
        for state in self.optimizer.state.values():
            move_state(state, fn)

    def end(self) -> None:
        """The task is over: pruned weights are 0, and all shapes are full again."""
        self.project()
        if self._grow is not None:
            self.before_last = self._grow(self.before_last)
            self._grow = None

    def narrow(self, chosen: Mapping[str, Tensor | None]) -> None:
        """Let only these parameters adapt, until :meth:`restore`.

        Args:
            chosen: By name, ``None`` (all entries) or which entries adapt
                (:func:`~l2l_prune.reptile.adapt_only.chosen_parameters`).
        """
        for name, parameter in self._by_name.items():
            parameter.requires_grad_(self._trained[name] and name in chosen)
        self.partly = [
            (self._by_name[name], keep, self._by_name[name].detach().clone())
            for name, keep in chosen.items()
            if keep is not None
        ]

    def adapt(self, loss: Tensor) -> None:
        """One step of the inner optimizer."""
        self.backward(loss)
        self.step()

    def backward(self, loss: Tensor) -> None:
        """Set gradients of a loss on the parameters that it reaches, none on the others.

        Raises:
            RuntimeError: If it reaches none.
            TypeError: If it is not a tensor.
            ValueError: If it holds several numbers.
        """
        check_loss(loss)
        if loss.requires_grad:
            for parameter in self.parameters:
                parameter.grad = None
            loss.backward()  # type: ignore[no-untyped-call]
        if not loss.requires_grad or all(parameter.grad is None for parameter in self.parameters):
            raise RuntimeError("loss does not depend on this learner: compute it from learner(x)")

    def step(self) -> None:
        """Make the inner optimizer's step with the present gradients."""
        self.about_to_step()
        self.optimizer.step()
        self.project()
        for weight, adapts, start in self.partly:  # decay and momentum would move the others too
            torch.where(adapts, weight.data, start, out=weight.data)
        forget_casts()

    def about_to_step(self) -> None:
        """Save what first-order MAML subtracts."""
        if self._foml:
            torch._foreach_copy_(self.before_last, [p.detach() for p in self.parameters])

    def project(self) -> None:
        """Set pruned weights to exactly 0; ``.data`` leaves a pending backward undisturbed."""
        if self.masks:
            weights = [self._by_name[name].data for name in self.masks]
            torch._foreach_mul_(weights, list(self.masks.values()))

    def adapted(self, start: Iterable[Tensor]) -> list[Tensor]:
        """The parameters, with the values of ``start`` where masks prune: there nothing moved."""
        if not self._masks_of_a_task:  # 0 in both
            return [p.detach() for p in self.parameters]
        own = dict(zip(self._by_name, start, strict=True))
        return [
            torch.where(self.masks[n] != 0, p, own[n]).detach() if n in self.masks else p.detach()
            for n, p in self._by_name.items()
        ]

    def moves(self, start: Iterable[Tensor]) -> list[Tensor]:
        """How far each parameter is from ``start``; pruned weights have not moved."""
        moved = torch._foreach_sub([p.detach() for p in self.parameters], [*start])
        by_name = dict(zip(self._by_name, moved, strict=True))
        for name, mask in self.masks.items():
            by_name[name].mul_(mask)
        return list(moved)

    def clear_momentum(self) -> None:
        """Clear momentum of pruned weights, which would push them when they are released."""
        for name, mask in self.masks.items():
            optimizer_state.clear_momentum(self.optimizer, self._by_name[name], mask)

    def save_state(self, into: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Hand out the optimizer's state; the optimizer goes on with the tensors of ``into``.

        No tensor is copied. The optimizer's own state is meaningless until :meth:`restore`.
        """
        states = [dict(self.optimizer.state.get(p, {})) for p in self.parameters]
        self.optimizer.state.clear()
        self.optimizer.state.update(zip(self.parameters, into, strict=False))
        return states


def structure(module: nn.Module) -> list[object]:
    """The modules of a network, and what was registered to run with them."""
    parts: list[object] = []
    for part in module.modules():
        pre, post = part._forward_pre_hooks, part._forward_hooks
        before, after = part._backward_pre_hooks, part._backward_hooks
        parts += part, *pre.values(), *post.values(), *before.values(), *after.values()
    return parts


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """The settings of a parameter group, without its parameters."""
    return {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in group.items()
        if key != "params"
    }


def _restore_state(
    optimizer: Optimizer, parameters: list[nn.Parameter], saved: list[dict[str, Any]]
) -> None:
    if not any(saved):
        optimizer.state.clear()
        return
    _copy_states(saved, [optimizer.state[p] for p in parameters])
    for group in optimizer.param_groups:
        if group.get("fused") or group.get("capturable"):  # they count their steps on the device
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                for key, value in state.items():  # "step", and NAdam's "mu_product"
                    if isinstance(value, Tensor):
                        state[key] = value.to(parameter.device)


def _copy_states(sources: list[dict[str, Any]], targets: list[dict[str, Any]]) -> None:
    """Make each target dict equal to its source, with one grouped copy for the tensors."""
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


def move_state(state: dict[str, Any], fn: Callable[[Tensor], Tensor]) -> None:
    """Apply the function of a move or cast to one parameter's state; Adam's step count stays."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim():
            state[key] = fn(value)


def _take_over_settings(mine: nn.Module, theirs: nn.Module) -> None:
    """Follow plain attributes that were changed: training mode, dropout's ``p``, a flag, ..."""
    held = vars(mine)
    for name, value in vars(theirs).items():
        if type(value) in _SETTINGS and held.get(name, held) is not value and is_plain(value):
            held[name] = value


def copied_state(state: dict[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """A copy of one parameter's state, on ``device`` if one is given.

    Single numbers (Adam's step count) stay where they are; :meth:`Workspace.restore` moves them to
    where the optimizer counts.
    """
    return {
        k: v.to(device if v.dim() else None, copy=True) if isinstance(v, Tensor) else v
        for k, v in state.items()
    }
