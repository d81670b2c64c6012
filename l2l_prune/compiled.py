"""Reptile's inner step as one compiled function: forward, backward, optimizer and mask together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.optim import Adam, AdamW
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from l2l_prune._losses import check_loss, inner_gradients
from l2l_prune.inner_loop import Workspace
from l2l_prune.learner import Learner

Loss = Callable[..., Tensor]
Named = dict[str, Tensor]

_UPDATES: dict[type[torch.optim.Optimizer], Callable[..., None]] = {Adam: adam, AdamW: adamw}


class _Network(NamedTuple):
    """What a loss is computed from."""

    loss: Loss
    module: nn.Module
    trained: Named
    fixed: Named
    buffers: Named
    data: tuple[Any, ...]


class CompiledStep:
    """Inner steps through ``torch.compile``; the same numbers as plain ones to rounding.

    In place of ``learner.adapt(F.cross_entropy(learner(x), y))``. Normalisation, activations, the
    step of Adam and the mask become a few kernels, and nothing of torch's autograd runs between
    them. It pays where operations are small: conv4 steps a tenth faster at 28x28; at 84x84
    on a CPU plain steps are faster (``python -m benchmarks meta_iteration``).

    The first step for each shape of data, phase and training mode compiles, for some ten seconds
    each; torch needs a C++ compiler for that on a CPU. Adam and AdamW step within the compiled
    function, others after it. A fresh optimizer makes its first step uncompiled. Dropout draws
    other numbers than in plain steps. Pruned weights are set to 0 at the end of each step: what
    somebody writes there in between is used once.

    Args:
        loss: ``loss(learner, *data)``, a scalar of ``learner(x)``. Make it once: torch compiles
            anew for each function that it has not seen. For bfloat16 use ``torch.autocast`` in it.

    Raises:
        RuntimeError: If torch is older than 2.6, which cannot compile the step as a whole and whose
            kernels turn off subnormal numbers in the whole process.
        TypeError: If ``loss`` is no function.

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
        self._gradients = torch.compile(_gradients, dynamic=False)
        self._optimizer_step = torch.compile(_optimizer_step, dynamic=False)
        self._tensors: WeakKeyDictionary[Workspace, tuple[Named, ...]] = WeakKeyDictionary()

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
        if workspace not in self._tensors:
            self._tensors[workspace] = self._sorted_tensors(workspace, data)
        trained, fixed, buffers = self._tensors[workspace]
        if update is not None and not all(optimizer.state.get(p) for p in trained.values()):
            loss = self._loss(learner, *data)  # a plain step makes the state
            learner.adapt(loss)
            return loss.detach()
        values = {name: parameter.detach() for name, parameter in trained.items()}
        network = _Network(self._loss, workspace.module, values, fixed, buffers, data)
        with torch.no_grad():
            if update is None:
                gradients, found = self._gradients(network)
                for parameter in workspace.parameters:
                    parameter.grad = None
                for name, gradient in gradients.items():
                    trained[name].grad = gradient
                workspace.step()
            else:
                workspace.about_to_step()
                group = optimizer.param_groups[0]
                settings = {key: group[key] for key in ("lr", "weight_decay", "eps", "maximize")}
                settings["beta1"], settings["beta2"] = group["betas"]
                held = [optimizer.state[parameter] for parameter in trained.values()]
                states = [[s[key] for s in held] for key in ("exp_avg", "exp_avg_sq", "step")]
                found = self._optimizer_step(update, settings, states, workspace.masks, network)
        return found

    def _sorted_tensors(self, workspace: Workspace, data: tuple[Any, ...]) -> tuple[Named, ...]:
        """Weights that the loss reaches, the others, which optimizers leave alone, and buffers."""
        module = workspace.module
        buffers = dict(module.named_buffers())
        copies = {name: buffer.clone() for name, buffer in buffers.items()}
        weights = dict(module.named_parameters())
        trained: Named = {name: p for name, p in weights.items() if p.requires_grad}
        cuda = {p.device for p in weights.values() if p.is_cuda}
        with torch.enable_grad(), torch.random.fork_rng(devices=list(cuda)):
            loss = self._loss(lambda *a, **k: functional_call(module, copies, a, k), *data)
            of = "this learner"
            found = inner_gradients(loss, list(trained.values()), create_graph=False, of=of)
        for name, gradient in zip(list(trained), found, strict=True):
            if gradient is None:
                del trained[name]
        fixed = {name: p.detach() for name, p in weights.items() if name not in trained}
        return trained, fixed, buffers


def _is_plain(optimizer: torch.optim.Optimizer) -> bool:
    """Whether one call of torch's functional Adam is the whole step."""
    (group, *others) = optimizer.param_groups
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    return not (others or any(hooks) or group.get("amsgrad") or group.get("differentiable"))


def _gradients(network: _Network) -> tuple[Named, Tensor]:
    """Gradients of the trained weights, and the loss; buffers move as in a forward pass."""
    loss, module, trained, fixed, buffers, data = network

    def scalar(trained: Named, buffers: Named) -> tuple[Tensor, Named]:
        def learner(*args: Any, **kwargs: Any) -> Any:
            return functional_call(module, {**fixed, **trained, **buffers}, args, kwargs)

        return check_loss(loss(learner, *data)).reshape(()), buffers

    copies = {name: buffer.clone() for name, buffer in buffers.items()}
    gradients, (value, moved) = grad_and_value(scalar, has_aux=True)(trained, copies)
    for name, buffer in buffers.items():
        buffer.copy_(moved[name])
    return gradients, value


def _optimizer_step(
    update: Callable[..., None],
    settings: dict[str, Any],
    states: list[list[Tensor]],
    masks: Named,
    network: _Network,
) -> Tensor:
    """The whole inner step; weights, optimizer state and buffers are changed in place."""
    gradients, value = _gradients(network)
    trained = network.trained
    firsts, seconds, counts = states
    steps = [count.double() for count in counts]  # in float32 1 - 0.999 is 5e-5 off
    update(
        list(trained.values()),
        [gradients[name] for name in trained],
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
    for name, mask in masks.items():
        if name in trained:
            trained[name].mul_(mask)
    return value
