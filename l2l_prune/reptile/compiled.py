"""Reptile's inner step through torch.compile: the loss and its gradients, then the update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Adam, AdamW
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from l2l_prune._basics.precision import forget_casts
from l2l_prune.reptile.learner import Learner, Workspace

Loss = Callable[..., Tensor]
Named = dict[str, Tensor]
Places = dict[str, tuple[nn.Module, str]]
Update = Callable[..., None]

_UPDATES: dict[type[torch.optim.Optimizer], Update] = {Adam: adam, AdamW: adamw}
# Options that may have any value: _update uses them, or they only choose a kernel.
_TAKEN = {"params", "lr", "betas", "eps", "weight_decay", "maximize"}
_TAKEN |= {"foreach", "fused", "capturable"}


class CompiledStep:
    """Inner steps through ``torch.compile``, with the same numbers as plain steps up to rounding.

    Replaces ``learner.adapt(F.cross_entropy(learner(x), y))``. Normalisation, activations, the
    step of Adam and the mask become a few kernels. It may pay where operations are small: at 28x28
    conv4 saved a tenth on one machine and nothing on another. At 84x84 on a CPU plain steps are
    faster. Measure first (``python -m benchmarks meta_iteration``).

    The first step for each shape of data, phase and training mode compiles, which takes some ten
    seconds; on a CPU torch needs a C++ compiler for that. The step of Adam and AdamW is compiled
    if all of its options are known here; otherwise, and for the first step of a fresh optimizer,
    the optimizer's own ``step()`` runs. Weights that a loss does not reach stay, as in plain
    steps. Dropout draws other numbers than in plain steps. Pruned weights are set to 0 at the end
    of each step: a value that is written there in between is used once.

    Args:
        loss: ``loss(learner, *data)``, a scalar of ``learner(x)``. Make it once: torch compiles
            again for each new function. For bfloat16 use ``torch.autocast`` in it.

    Raises:
        RuntimeError: If torch is older than 2.6; kernels of older versions turn off subnormal
            numbers in the whole process.
        TypeError: If ``loss`` is not a function.

    Examples:
        >>> def loss(learner, x, y):
        ...     return torch.nn.functional.cross_entropy(learner(x), y)
        >>> step = CompiledStep(loss)  # doctest: +SKIP
    """

    def __init__(self, loss: Loss) -> None:
        if not callable(loss):
            raise TypeError(f"loss must be a function loss(learner, *data), got {loss!r}")
        if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
            raise RuntimeError(
                f"compiled steps need torch 2.6 or newer, this is {torch.__version__}: use adapt()"
            )
        self._loss = loss
        self._compiled_loss = torch.compile(_loss_of, dynamic=False)
        self._update = torch.compile(_update, dynamic=False)
        self._tensors: WeakKeyDictionary[Workspace, tuple[Named, Places]] = WeakKeyDictionary()

    def __call__(self, learner: Learner, *data: Any) -> Tensor:
        """Adapt a learner by one step.

        Args:
            learner: Made by :meth:`~l2l_prune.PrunedReptile.clone`.
            data: What ``loss`` takes besides the learner, such as ``x, y``.

        Returns:
            The loss before the step, detached.

        Raises:
            RuntimeError: If the learner was collected, or the loss does not depend on it.
            TypeError: If the loss is not a tensor.
            ValueError: If it holds several numbers.
        """
        workspace = learner.workspace
        if workspace not in self._tensors:
            module = workspace.module
            self._tensors[workspace] = dict(module.named_parameters()), _buffer_places(module)
        weights, places = self._tensors[workspace]
        buffers: dict[str, Any] = {
            name: module._buffers[key] for name, (module, key) in places.items()
        }
        loss: Tensor = self._compiled_loss(self._loss, workspace.module, weights, buffers, data)
        workspace.backward(loss)
        reached = {name: p for name, p in weights.items() if p.grad is not None}
        optimizer = workspace.optimizer
        update = _functional(optimizer)
        # A plain step makes missing state, and handles chosen channels.
        if (
            update is None
            or workspace.partly
            or not all(optimizer.state.get(p) for p in reached.values())
        ):
            workspace.step()
        else:
            workspace.about_to_step()
            self._update_all(update, optimizer, reached, workspace.masks)
            forget_casts()
        return loss.detach().reshape(())

    @torch.no_grad()
    def _update_all(
        self, update: Update, optimizer: torch.optim.Optimizer, reached: Named, masks: Named
    ) -> None:
        group = optimizer.param_groups[0]
        settings = {key: group[key] for key in ("lr", "weight_decay", "eps", "maximize")}
        settings["beta1"], settings["beta2"] = group["betas"]
        gradients = [parameter.grad for parameter in reached.values()]
        held = [optimizer.state[parameter] for parameter in reached.values()]
        self._update(
            update,
            settings,
            [parameter.detach() for parameter in reached.values()],
            gradients,
            [[state[key] for state in held] for key in ("exp_avg", "exp_avg_sq", "step")],
            {n: masks[name] for n, name in enumerate(reached) if name in masks},
        )


def _functional(optimizer: torch.optim.Optimizer) -> Update | None:
    """Torch's function for a step, if a single call of it is known to be the whole step."""
    update = _UPDATES.get(type(optimizer))
    (group, *others) = optimizer.param_groups
    needed = {
        "amsgrad": False,
        "differentiable": False,
        "decoupled_weight_decay": update is adamw,
    }
    known = all(
        key in _TAKEN or (key in needed and needed[key] == value) for key, value in group.items()
    )
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    )
    if others or not known or any(hooks) or "step" in vars(optimizer):
        return None
    return update


def _buffer_places(model: nn.Module) -> Places:
    """Where buffers are: a learner whose channels are cut has other tensors there in each task."""
    return {
        name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
        for name, _ in model.named_buffers()
    }


def _loss_of(loss: Loss, module: nn.Module, weights: Named, buffers: Named, data: Any) -> Any:
    """The loss of a network; buffers are updated as in a forward pass."""

    def learner(*args: Any, **kwargs: Any) -> Any:
        return functional_call(module, {**weights, **buffers}, args, kwargs)

    return loss(learner, *data)


def _update(
    update: Update,
    settings: dict[str, Any],
    weights: list[Tensor],
    gradients: list[Tensor | None],
    states: list[list[Tensor]],
    masks: dict[int, Tensor],
) -> None:
    """The optimizer's step and the mask; weights and optimizer state are changed in place."""
    firsts, seconds, counts = states
    steps = [count.double() for count in counts]  # in float32 1 - 0.999 is 5e-5 off
    update(
        weights,
        gradients,
        firsts,
        seconds,
        [],
        steps,
        foreach=False,
        capturable=False,
        amsgrad=False,
        **settings,
    )
    for count, step in zip(counts, steps, strict=True):
        count.copy_(step)
    for number, mask in masks.items():
        weights[number].mul_(mask)
