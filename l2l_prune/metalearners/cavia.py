"""CAVIA: tasks are learnt in a small context vector, while the network is shared."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2l_prune._basics import checks
from l2l_prune._basics.losses import inner_gradients


class ContextModule(nn.Module):
    """A layer that reads the context of the running :class:`CAVIA` learner.

    Args:
        context_size: Length of the context vector, >= 1.
    """

    context: Tensor | None

    def __init__(self, context_size: int) -> None:
        super().__init__()
        self.context_size = checks.whole_number("context_size", context_size, least=1)
        self.context = None

    def read(self) -> Tensor:
        """The context ``[context_size]`` of the learner that is running.

        Raises:
            RuntimeError: If the model runs outside a CAVIA learner.
        """
        if self.context is None:
            raise RuntimeError(
                f"{type(self).__name__} has no context: run the model through CAVIA(model) or one "
                "of its clones"
            )
        return self.context


class FiLM(ContextModule):
    """Scales and shifts each channel by a linear function of the context.

    Its linear layers are part of the network: shared by all tasks and prunable.

    Args:
        context_size: Length of the context vector, >= 1.
        channels: Channels ``C`` of the input ``[batch, C, ...]``, >= 1.
        hidden_layers: 0, or 1 for one hidden layer of width ``2 * channels`` with ReLU.

    Source:
        Zintgraf et al., *Fast Context Adaptation via Meta-Learning*, ICML 2019.
    """

    def __init__(self, context_size: int, channels: int, hidden_layers: int = 0) -> None:
        super().__init__(context_size)
        self.channels = checks.whole_number("channels", channels, least=1)
        if hidden_layers not in (0, 1):
            raise ValueError(f"hidden_layers must be 0 or 1, got {hidden_layers!r}")
        self.linear = nn.Linear(context_size, 2 * channels)
        self.hidden = nn.Linear(2 * channels, 2 * channels) if hidden_layers else None

    def forward(self, x: Tensor) -> Tensor:
        """``scale * x + shift`` for ``x`` of shape ``[batch, channels, ...]``.

        Raises:
            ValueError: If ``x`` has another number of channels.
        """
        if x.dim() < 2 or x.shape[1] != self.channels:  # a single channel would be broadcast
            raise ValueError(
                f"FiLM expects {self.channels} channels, got an input of shape {tuple(x.shape)}"
            )
        film = self.linear(self.read())
        if self.hidden is not None:
            film = self.hidden(F.relu(film))
        scale, shift = film.view(2, 1, -1, *[1] * (x.dim() - 2))
        return cast(Tensor, scale * x + shift)


class ConcatContext(ContextModule):
    """Appends the context to each row of ``[batch, features]``; put it before a linear layer.

    Args:
        context_size: Length of the context vector, >= 1.

    Source:
        Zintgraf et al., ICML 2019.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, features + context_size]``.

        Raises:
            ValueError: If ``x`` has another shape.
        """
        if x.dim() != 2:
            raise ValueError(
                f"ConcatContext expects an input [batch, features], got shape {tuple(x.shape)}"
            )
        return torch.cat([x, self.read().expand(len(x), -1)], dim=1)


class CAVIA(nn.Module):
    """Wraps a model with context layers and gives it learn2learn's verbs.

    The context starts at 0 in each task, and :meth:`adapt` changes nothing else. All learners share
    the weights, and a learner's outer loss gives the meta-gradient of the weights. The context is
    not a parameter, so no optimizer and no pruning ever touches it.

    Args:
        model: Any module with :class:`FiLM` or :class:`ConcatContext` layers (or other subclasses
            of :class:`ContextModule`), which share one context vector.
        lr: Learning rate of the context, > 0.
        first_order: Ignore second derivatives.

    Raises:
        TypeError: If ``model`` is not a module, or ``lr`` not a number.
        ValueError: If the model has no context layer, the layers' context sizes differ, or ``lr``
            is not positive.

    Examples:
        >>> net = nn.Sequential(ConcatContext(5), nn.Linear(1 + 5, 40), nn.ReLU(), nn.Linear(40, 1))
        >>> cavia, x = CAVIA(net, lr=1.0), torch.ones(3, 1)
        >>> learner = cavia.clone()
        >>> learner.adapt(F.mse_loss(learner(x), 2 * x))
        >>> F.mse_loss(learner(x), 2 * x).backward()  # gradients of the shared weights
        >>> learner.context.shape
        torch.Size([5])

    Source:
        Zintgraf et al., *Fast Context Adaptation via Meta-Learning*, ICML 2019.
    """

    def __init__(self, model: nn.Module, lr: float = 1.0, first_order: bool = False) -> None:
        super().__init__()
        checks.of_type("model", model, nn.Module, "a torch.nn.Module")
        layers = _context_layers(model)
        if not layers:
            raise ValueError(
                "the model has no context layers: put a FiLM or ConcatContext layer where the "
                "context should act"
            )
        sizes = {name: layer.context_size for name, layer in layers.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"context layers must share one context_size, got {sizes}")
        checks.number("lr", lr, above=0)
        self.module = model
        self.lr = lr
        self.first_order = checks.true_or_false("first_order", first_order)
        self._context: Tensor | None = None

    @property
    def context(self) -> Tensor:
        """The context vector ``[context_size]``; zeros before any :meth:`adapt`."""
        if self._context is None:
            layer = next(iter(_context_layers(self.module).values()))
            like = next(layer.parameters(), next(self.module.parameters(), torch.zeros(())))
            zeros = torch.zeros(layer.context_size, dtype=like.dtype, device=like.device)
            self._context = zeros.requires_grad_()
        return self._context

    @property
    def has_adapted(self) -> bool:
        """Whether it is a task's learner whose context has moved; no state dict holds that."""
        return self._context is not None and not self._context.is_leaf

    def clone(self, first_order: bool | None = None) -> CAVIA:
        """A learner that shares the weights and has its own context.

        A clone of a learner starts from that learner's context, and gradients flow back to it.

        Args:
            first_order: Overrides the wrapper's setting.
        """
        order = self.first_order if first_order is None else first_order
        learner = CAVIA(self.module, self.lr, order)
        learner.training = self.training
        if self._context is not None and self.has_adapted:
            learner._context = self._context.clone()
        return learner

    def adapt(self, loss: Tensor, first_order: bool | None = None) -> None:
        """One gradient step on the context (the inner loop).

        Args:
            loss: Scalar computed from this learner.
            first_order: Overrides the learner's setting.

        Raises:
            RuntimeError: If ``loss`` does not depend on this learner's context.
            TypeError: If ``loss`` is not a tensor.
            ValueError: If ``loss`` holds several numbers.
        """
        order = self.first_order if first_order is None else first_order
        (gradient,) = inner_gradients(
            loss, [self.context], create_graph=not order, of="this learner's context"
        )
        self._context = self.context - self.lr * cast(Tensor, gradient)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with this learner's context."""
        layers = _context_layers(self.module).values()
        for layer in layers:
            layer.context = self.context
        try:
            return self.module(*args, **kwargs)
        finally:
            for layer in layers:
                layer.context = None

    def _apply(self, fn: Any, recurse: bool = True) -> CAVIA:
        """Move or cast, with the context that a learner has adapted."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._context is not None:
            with torch.enable_grad():  # meta-gradients flow back through it
                self._context = fn(self._context) if self.has_adapted else None
        return self


def _context_layers(model: nn.Module) -> dict[str, ContextModule]:
    return {name: m for name, m in model.named_modules() if isinstance(m, ContextModule)}
