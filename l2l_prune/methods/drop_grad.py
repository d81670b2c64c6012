"""DropGrad: the gradients of inner steps are multiplied by noise."""

from __future__ import annotations

from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from l2l_prune._basics import checks
from l2l_prune._basics.generators import check_generator, drawn_by, restore
from l2l_prune.reptile.learner import Learner

Noise = Literal["gaussian", "bernoulli"]


class DropGrad:
    """Multiplies inner gradients by noise of mean 1, drawn for each entry and inner step.

    With the rate ``p``, the noise is normal with variance ``p / (1 - p)``, or 0 with probability
    ``p`` and else ``1 / (1 - p)``. Use it in training only; evaluation adapts without noise. The
    product is differentiable, so meta-gradients pass through it.

    In Reptile, ``drop.adapt(learner, loss)`` takes the place of ``learner.adapt(loss)``. In other
    loops, ``drop(gradient)`` takes the place of each inner gradient.

    Args:
        rate: ``p``, in [0, 1); the authors recommend 0.1 to 0.2.
        generator: Source of the noise, on the CPU. Save its state with :meth:`state_dict`.
        noise: ``"gaussian"`` or ``"bernoulli"``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``rate`` is out of range, or there is no such noise.

    Examples:
        >>> drop = DropGrad(0.5, torch.Generator().manual_seed(0), "bernoulli")
        >>> drop(torch.ones(4)).tolist()
        [0.0, 2.0, 0.0, 0.0]

    Source:
        Tseng et al., *Regularizing Meta-Learning via Gradient Dropout*, ACCV 2020
        (arXiv 2004.05859), at a constant rate, as in the authors' program.
    """

    def __init__(self, rate: float, generator: torch.Generator, noise: Noise = "gaussian") -> None:
        self._rate = checks.fraction("rate", rate)
        self._generator = check_generator(generator)
        if noise not in get_args(Noise):
            raise ValueError(f'noise must be "gaussian" or "bernoulli", got {noise!r}')
        self._noise = noise

    @overload
    def __call__(self, gradient: Tensor) -> Tensor: ...

    @overload
    def __call__(self, gradient: None) -> None: ...

    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        """``gradient`` times new noise; None, a frozen parameter's gradient, stays None.

        Raises:
            TypeError: If it is not a real tensor.
        """
        if gradient is None:
            return None
        checks.of_type("gradient", gradient, Tensor, "a tensor")
        if not gradient.is_floating_point():
            raise TypeError(f"gradient must be real, got {gradient.dtype}")
        return gradient * self._drawn(gradient.shape).to(gradient)

    def adapt(self, learner: Learner, loss: Tensor) -> None:
        """One inner step of a Reptile learner with noise on its gradients.

        Raises:
            RuntimeError: If the learner was collected, or ``loss`` does not depend on it.
            TypeError: If ``learner`` is none of Reptile's, or ``loss`` is not a tensor.
            ValueError: If ``loss`` holds several numbers.
        """
        checks.of_type("learner", learner, Learner, "a learner of PrunedReptile")
        workspace = learner.workspace
        workspace.backward(loss)
        for parameter in workspace.parameters:
            if parameter.grad is not None:
                parameter.grad.copy_(self(parameter.grad))
        workspace.step()

    def state_dict(self) -> dict[str, Any]:
        """The generator's state."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: If it is not such a state; nothing is changed then.
        """
        restore(self._generator, state, "a DropGrad")

    def _drawn(self, shape: torch.Size) -> Tensor:
        drawn = drawn_by(self._generator)
        if self._noise == "bernoulli":
            kept = torch.rand(shape, **drawn) >= self._rate
            return kept / (1 - self._rate)
        spread: float = (self._rate / (1 - self._rate)) ** 0.5
        return 1 + spread * torch.randn(shape, **drawn)
