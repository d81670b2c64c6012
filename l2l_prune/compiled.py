"""Reptile's inner step as one compiled function: forward, backward, optimizer and mask together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.optim import Adam, AdamW
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from l2l_prune._losses import check_loss, inner_gradients
from l2l_prune.inner_loop import Workspace
from l2l_prune.reptile import Learner

Loss = Callable[..., Tensor]
Named = dict[str, Tensor]

_UPDATES: dict[type[torch.optim.Optimizer], Callable[..., None]] = {Adam: adam, AdamW: adamw}


class CompiledStep:
    """Inner steps through ``torch.compile``; the same numbers as plain ones to rounding.

    In place of ``learner.adapt(F.cross_entropy(learner(x), y))``. Normalisation, activations, the
    step of Adam and the mask become a few kernels, and nothing of torch's autograd runs between
    them. It pays where operations are small: conv4 at 28x28 steps about a fifth faster; at 84x84
    on a CPU plain steps are faster (``python -m benchmarks meta_iteration``).

    The first step for each shape of data, phase and training mode compiles, for some ten seconds
    each; torch needs a C++ compiler for that on a CPU. Adam and AdamW step within the compiled
    function, others after it. A fresh optimizer makes its first step uncompiled. Dropout draws
    other numbers than in plain steps.

    Args:
        loss: ``loss(learner, *data)``, a scalar of ``learner(x)``. Make it once: torch compiles
            anew for each function that it has not seen. For bfloat16 use ``torch.autocast`` in it.

    Raises:
        TypeError: If ``loss`` is no function.

    Examples:
        >>> def loss(learner, x, y):
        ...     return torch.nn.functional.cross_entropy(learner(x), y)
        >>> step = CompiledStep(loss)  # then: step(learner, x, y) for each minibatch
    """

    def __init__(self, loss: Loss) -> None:
        if not callable(loss):
            raise TypeError(f"loss must be a function loss(learner, *data), got {loss!r}")
        self._loss = loss
        self._gradients = torch.compile(_gradients, dynamic=False)
        self._optimizer_step = torch.compile(_optimizer_step, dynamic=False)
        self._reached: WeakKeyDictionary[Workspace, list[str]] = WeakKeyDictionary()

    def __call__(self, learner: Learner, *data: Any) -> Tensor:
        """Adapt a learner by one step.

        Args:
            learner: Made by :meth:`~l2l_prune.PrunedReptile.clone`.
            data: What ``loss`` takes beside it, such as ``x, y``.

        Returns:
            The loss before the step, detached.

        Raises:
            RuntimeError: If the learner was collected, or the loss does not depend on it.
            TypeError: If the loss is no tensor.
            ValueError: If it holds several numbers.
        """
        workspace = learner.workspace
        optimizer = workspace.optimizer
        update = _UPDATES.get(type(optimizer)) if _is_plain(optimizer) else None
        if update is not None and not any(optimizer.state.values()):
            loss = self._loss(learner, *data)
            learner.adapt(loss)
            return loss.detach()
        if workspace not in self._reached:
            self._reached[workspace] = self._find_reached(workspace, data)
        names = self._reached[workspace]
        tensors = {name: p.detach() for name, p in workspace.module.named_parameters()}
        stepped = {name: tensors.pop(name) for name in names}
        buffers = dict(workspace.module.named_buffers())
        network = (self._loss, workspace.module, stepped, tensors, buffers, data)
        with torch.no_grad():
            if update is None:
                gradients, found = self._gradients(*network)
                for name, parameter in workspace.module.named_parameters():
                    parameter.grad = gradients.get(name)
                workspace.step()
            else:
                workspace.about_to_step()
                states = [optimizer.state[workspace.module.get_parameter(n)] for n in names]
                group = optimizer.param_groups[0]
                settings = {key: group[key] for key in ("lr", "weight_decay", "eps", "maximize")}
                settings["beta1"], settings["beta2"] = group["betas"]
                found = self._optimizer_step(update, settings, states, workspace.masks, *network)
        return found

    def _find_reached(self, workspace: Workspace, data: tuple[Any, ...]) -> list[str]:
        """Names of the weights that the loss depends on: optimizers leave the others alone."""
        buffers = {name: buffer.clone() for name, buffer in workspace.module.named_buffers()}
        trained = {n: p for n, p in workspace.module.named_parameters() if p.requires_grad}
        with torch.enable_grad(), torch.random.fork_rng():
            loss = self._loss(
                lambda *a, **k: functional_call(workspace.module, buffers, a, k), *data
            )
            found = inner_gradients(
                loss, list(trained.values()), create_graph=False, of="this learner"
            )
        return [n for n, gradient in zip(trained, found, strict=True) if gradient is not None]


def _is_plain(optimizer: torch.optim.Optimizer) -> bool:
    """Whether one call of torch's functional Adam is the whole step."""
    (group, *others) = optimizer.param_groups
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    return not (others or any(hooks) or group.get("amsgrad") or group.get("differentiable"))


def _gradients(
    loss: Loss,
    module: nn.Module,
    trained: Named,
    fixed: Named,
    buffers: Named,
    data: tuple[Any, ...],
) -> tuple[Named, Tensor]:
    """Gradients of the trained weights, and the loss; buffers move as in a forward pass."""

    def scalar(trained: Named, buffers: Named) -> tuple[Tensor, Named]:
        def network(*args: Any, **kwargs: Any) -> Any:
            return functional_call(module, {**fixed, **trained, **buffers}, args, kwargs)

        return check_loss(loss(network, *data)).reshape(()), buffers

    copies = {name: buffer.clone() for name, buffer in buffers.items()}
    gradients, (value, moved) = grad_and_value(scalar, has_aux=True)(trained, copies)
    for name, buffer in buffers.items():
        buffer.copy_(moved[name])
    return gradients, value


def _optimizer_step(
    update: Callable[..., None],
    settings: dict[str, Any],
    states: list[dict[str, Tensor]],
    masks: Named,
    loss: Loss,
    module: nn.Module,
    trained: Named,
    fixed: Named,
    buffers: Named,
    data: tuple[Any, ...],
) -> Tensor:
    """The whole inner step; weights, optimizer state and buffers are changed in place."""
    gradients, value = _gradients(loss, module, trained, fixed, buffers, data)
    steps = [state["step"].double() for state in states]  # 1 - 0.999 is 5e-5 off in float32
    update(
        list(trained.values()),
        [gradients[name] for name in trained],
        *([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq")),
        [],
        steps,
        foreach=False,
        capturable=False,
        amsgrad=False,
        **settings,
    )
    for state, step in zip(states, steps, strict=True):
        state["step"].copy_(step)
    for name, mask in masks.items():
        if name in trained:
            trained[name].mul_(mask)
    return value
