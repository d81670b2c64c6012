"""sparse-MAML learns which weights the inner loop may change; it removes none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from l2l_prune._basics import checks
from l2l_prune._basics.generators import check_generator, drawn_by
from l2l_prune._basics.losses import inner_gradients
from l2l_prune.masking.masked_layer import lent_masks


class _Step(torch.autograd.Function):
    """1 where the input is >= 0, else 0; gradients go straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class SparseMAML(nn.Module):
    """MAML whose inner steps are masked by learnt signs, with learn2learn's verbs.

    Each parameter has a score ``m`` of its own shape; the inner step is
    ``w - lr * 1[m >= 0] * g``. The outer optimizer trains both weights and scores
    (``parameters()`` holds both); gradients pass straight through the step function.
    To prune the network, give :class:`~l2l_prune.Pruner` this object, not the network alone, so
    that the optimizer's state for the scores rests where weights are pruned.

    Args:
        model: The network; pruned or not, before or after it is wrapped.
        lr: Inner learning rate, > 0.
        first_order: Ignore second derivatives, as the paper does.
        initial_sparsity: Expected fraction of weights that are frozen at the start, in [0, 1).
        generator: Source of the initial scores, on the CPU; torch's own by default.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of range, or the model has no parameters.

    Examples:
        >>> maml, x = SparseMAML(nn.Linear(4, 2), lr=0.1), torch.ones(3, 4)
        >>> learner = maml.clone()
        >>> learner.adapt(learner(x).square().mean())
        >>> learner(x).square().mean().backward()  # gradients of weights and scores
        >>> maml.scores[0].grad.shape
        torch.Size([2, 4])

    Source:
        von Oswald et al., *Learning where to learn: Gradient sparsity in meta and continual
        learning*, NeurIPS 2021, Section 3.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        first_order: bool = True,
        *,
        initial_sparsity: float = 0.5,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        checks.of_type("model", model, nn.Module, "a torch.nn.Module")
        checks.true_or_false("first_order", first_order)
        self.lr = checks.number("lr", lr, above=0)
        rate = checks.fraction("initial_sparsity", initial_sparsity)
        if generator is not None:
            check_generator(generator)
        if next(model.parameters(), None) is None:
            raise ValueError("the model has no parameters to adapt")
        self.module, self.first_order = model, first_order
        self.scores = nn.ParameterList(
            nn.Parameter(torch.rand(p.shape, **drawn_by(generator)).sub_(rate).to(p))
            for p in model.parameters()
        )
        self._adapted: dict[str, Tensor] | None = None
        self._masks: dict[str, Tensor] = {}  # of the learner's task

    @property
    def frozen(self) -> float:
        """Fraction of the weights that inner steps currently leave unchanged, in [0, 1]."""
        total = sum(score.numel() for score in self.scores)
        return float(sum(int((score < 0).sum()) for score in self.scores) / total)

    @property
    def has_adapted(self) -> bool:
        """Whether it is a task's learner whose weights have moved; no state dict holds them."""
        return self._adapted is not None

    def clone(self, first_order: bool | None = None) -> SparseMAML:
        """A learner for one task; its outer loss gives gradients for weights and scores."""
        learner = SparseMAML.__new__(SparseMAML)
        nn.Module.__init__(learner)
        learner.module, learner.scores, learner.lr = self.module, self.scores, self.lr
        learner.first_order = self.first_order if first_order is None else first_order
        learner._adapted = None if self._adapted is None else dict(self._adapted)
        learner._masks = self._masks or lent_masks(self.module)
        learner.training = self.training
        return learner

    def adapt(self, loss: Tensor, first_order: bool | None = None) -> None:
        """One inner step.

        Args:
            loss: Scalar computed from this learner.
            first_order: Overrides the learner's setting.

        Raises:
            RuntimeError: If ``loss`` does not depend on this learner.
            TypeError: If ``loss`` is not a tensor.
            ValueError: If ``loss`` holds several numbers.
        """
        order = self.first_order if first_order is None else first_order
        weights = self._weights()
        scores = dict(zip(weights, self.scores, strict=True))
        trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
        gradients = inner_gradients(
            loss, list(trained.values()), create_graph=not order, of="this learner"
        )
        moved = {
            name: trained[name] - self.lr * _Step.apply(scores[name]) * gradient
            for name, gradient in zip(trained, gradients, strict=True)
            if gradient is not None
        }
        self._adapted = weights | moved

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with this learner's weights."""
        own = {**(self._adapted or {}), **self._masks}
        return (
            functional_call(self.module, own, args, kwargs) if own else self.module(*args, **kwargs)
        )

    def _weights(self) -> dict[str, Tensor]:
        return dict(self.module.named_parameters()) if self._adapted is None else self._adapted
