"""What makes a weight worth keeping: a criterion is one function from a weight to scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from l2l_prune._basics.generators import check_generator, drawn_by
from l2l_prune._basics.optimizers import held_ids
from l2l_prune._basics.precision import step_gradient, widened

Criterion: TypeAlias = Callable[[Tensor], Tensor]
"""Takes one weight, the parameter itself (with its ``grad``, if any), and returns a real tensor of
the same shape; in each tensor the entries with the largest scores are kept. Called with gradients
off, each time a mask is due."""


def scores_of(weight: Tensor, criterion: Criterion) -> Tensor:
    """The scores of a weight, on its device.

    Raises:
        TypeError: If they are not real numbers.
        ValueError: If there is not one for each entry of the weight.
    """
    scores = criterion(weight)
    if not isinstance(scores, Tensor) or scores.shape != weight.shape:
        raise ValueError("there must be a score for each of its weights")
    if scores.dtype == torch.bool or scores.is_complex():
        raise TypeError(f"the scores must be real numbers, got {scores.dtype}")
    return scores.to(weight.device)


def magnitude(weight: Tensor) -> Tensor:
    """The paper's criterion: the absolute value (Section 4.1).

    Raises:
        TypeError: If ``weight`` is complex.
    """
    if weight.is_complex():
        raise TypeError("complex weights cannot be ranked by magnitude: leave them out with skip=")
    return weight.detach().abs()


def random(generator: torch.Generator) -> Criterion:
    """Random scores: the control that any other criterion should beat.

    Args:
        generator: Source of the scores, on the CPU; save its state to resume exactly.

    Raises:
        TypeError: If ``generator`` is not a generator (but a seed, for instance) or not on
            the CPU.

    Examples:
        >>> scores = random(torch.Generator().manual_seed(0))
        >>> scores(torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """
    return _Random(check_generator(generator))


@dataclass
class _Random:  # not a closure: copies of a Pruner have a generator of their own, and pickles one
    generator: torch.Generator

    def __call__(self, weight: Tensor) -> Tensor:
        return torch.rand(weight.shape, **drawn_by(self.generator)).to(weight.device)


def saliency(weight: Tensor, gradient: Tensor) -> Tensor:
    """``|w * g|``, in float32 where the weight has fewer bits."""
    return (widened(weight.detach()) * widened(gradient)).abs()


def snip(weight: Tensor) -> Tensor:
    """``|w * g|``: how much the loss changes when a weight is removed, to first order.

    ``g`` is the weight's ``grad`` when the mask is due: the meta-gradient that the outer step has
    just used (for :class:`~l2l_prune.PrunedReptile` its direction, old minus mean adapted weights).

    Raises:
        ValueError: If the weight has no gradient.

    Source:
        Lee, Ajanthan and Torr, *SNIP: Single-shot Network Pruning based on Connection
        Sensitivity*, ICLR 2019, Equation 6 (its division by the sum does not change the order).
    """
    return saliency(weight, _gradient(weight, "snip"))


def taylor(weight: Tensor) -> Tensor:
    """``(w * g)**2``: the squared first-order change of the loss; ``g`` as in :func:`snip`.

    It ranks single weights as :func:`snip` does; sums over a ``Block`` pattern differ.

    Raises:
        ValueError: If the weight has no gradient.

    Source:
        Molchanov et al., *Importance Estimation for Neural Network Pruning*, CVPR 2019, Equation 8.
    """
    return (widened(weight) * _gradient(weight, "taylor")).square()


def grasp(loss: Callable[[], Tensor], parameters: Iterable[Tensor]) -> Criterion:
    """``w * (H g)``: keep the weights whose removal would cost the most gradient flow.

    Args:
        loss: Computes the (meta-)loss of the model as it is, a scalar, on the same data at every
            call.
        parameters: All parameters that the loss is differentiated by; those that it does not
            reach do not count.

    Raises:
        ValueError: On use, if a weight is not among ``parameters``, or the loss does not reach it.

    Source:
        Wang, Zhang and Grosse, *Picking Winning Tickets Before Training by Preserving Gradient
        Flow*, ICLR 2020, Equation 8 (which removes the largest of ``-w * (H g)``).
    """
    held = list(parameters)

    def scores(weight: Tensor) -> Tensor:
        number = _position(weight, held, "grasp")
        with torch.enable_grad():
            value = loss()
            gradients: tuple[Tensor | None, ...] = (None,) * len(held)
            if value.requires_grad:
                gradients = torch.autograd.grad(value, held, create_graph=True, allow_unused=True)
            if gradients[number] is None:
                raise ValueError(
                    "grasp's loss gives no gradient for this tensor: compute the loss from the "
                    "pruned model, and leave out tensors that it does not use with skip="
                )
            flows = (widened(g) * widened(g.detach()) for g in gradients if g is not None)
            flow = sum((part.sum() for part in flows), weight.new_zeros(()))
            (product,) = torch.autograd.grad(flow, weight, allow_unused=True)
        if product is None:  # a loss that is linear in this weight
            product = torch.zeros_like(weight)
        return widened(weight.detach()) * widened(product)

    return scores


class Movement:
    """``-sum w * g`` over the outer steps: weights that move away from 0 stay.

    It sees the gradients through a step hook, of a torch optimizer or of
    :class:`~l2l_prune.PrunedReptile`::

        movement = Movement(model.parameters())
        optimizer.register_step_pre_hook(movement.observe)
        pruner = Pruner(model, schedule, optimizer, criterion=movement)

    With several optimizers, register it with each. While a weight is pruned its gradient is 0, and
    its sum stays as it was. Copies of an optimizer have no hooks: register :meth:`observe` again.

    Args:
        parameters: The parameters to watch.

    Source:
        Sanh, Wolf and Rush, *Movement Pruning: Adaptive Sparsity by Fine-Tuning*, NeurIPS 2020,
        Section 4.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters: Sequence[Tensor] = list(parameters)
        self._sums = [torch.zeros_like(widened(p.detach())) for p in self._parameters]
        self._seen = 0

    @torch.no_grad()
    def observe(self, source: Any = None, args: Any = (), kwargs: Any = None) -> None:
        """Add a step's ``-w * g``; call it before the step, as step pre-hooks are.

        Sums are in float32 at least. A step that a gradient scaler skips adds nothing.

        Raises:
            ValueError: If the optimizer steps with a closure, which finds the gradient only later.
        """
        if len(args) > 1 or (kwargs or {}).get("closure") is not None:
            raise ValueError("movement cannot watch an optimizer that steps with a closure")
        # Reptile is no optimizer: it moves all weights.
        moving = held_ids(source) if isinstance(source, Optimizer) else None
        for number, parameter in enumerate(self._parameters):
            if parameter.grad is not None and (moving is None or id(parameter) in moving):
                weight = widened(parameter)
                total, gradient = (
                    self._sums[number].to(weight),
                    step_gradient(source, parameter.grad),
                )
                self._sums[number] = total.addcmul_(weight, gradient, value=-1)
        self._seen += 1

    def __call__(self, weight: Tensor) -> Tensor:
        """The scores of one weight.

        Raises:
            ValueError: If it is not among the watched parameters, or no step was observed yet.
        """
        number = _position(weight, self._parameters, "movement")
        if not self._seen:
            raise ValueError(
                "movement has observed no step: register movement.observe as a step pre-hook, and "
                "begin with a dense phase"
            )
        return self._sums[number]

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, for resuming."""
        return {"seen": self._seen, "sums": [total.clone() for total in self._sums]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: If it is no such state or belongs to other parameters; nothing is changed
                then.
        """
        try:
            given, seen = [tuple(total.shape) for total in state["sums"]], int(state["seen"])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError("this is not a Movement state dict of this version") from None
        if given != [tuple(p.shape) for p in self._parameters]:
            raise ValueError("the checkpoint's movement scores are of other parameters")
        self._seen = seen
        self._sums = [total.clone() for total in state["sums"]]


def _gradient(weight: Tensor, name: str) -> Tensor:
    if weight.grad is None:
        raise ValueError(
            f"{name} needs gradients when a mask is due: begin with a dense phase, and call step() "
            "between backward() and zero_grad()"
        )
    return widened(weight.grad)


def _position(weight: Tensor, parameters: Sequence[Tensor], name: str) -> int:
    for number, parameter in enumerate(parameters):
        if parameter is weight:
            return number
    raise ValueError(f"{name} was made for other parameters: give it those of the pruned model")
