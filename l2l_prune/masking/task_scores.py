"""Which weights a task's own mask keeps: any, mostly large ones, or those that fit it least."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from l2l_prune._basics import checks
from l2l_prune._basics.generators import drawn_by
from l2l_prune._basics.losses import check_loss
from l2l_prune._basics.precision import widened
from l2l_prune.masking.criteria import saliency

TaskScores: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]
"""Takes one weight, the parameter itself, and this task's own generator on the CPU; returns a real
tensor of the weight's shape. The entries with the largest scores stay in the task's learner.
Called with gradients off."""


def uniform(weight: Tensor, generator: torch.Generator) -> Tensor:
    """All masks are equally likely."""
    return torch.rand(weight.shape, **drawn_by(generator))


def magnitude(temperature: float) -> TaskScores:
    """Large weights stay more often: they are drawn in turn, in proportion to ``|w|^(1/T)``.

    Args:
        temperature: ``T``, > 0. Near 0 the smallest weights go, as in the paper's masks; far above
            1 all are about equally likely to go.

    Raises:
        TypeError: If ``temperature`` is not a number.
        ValueError: If it is not > 0.

    Source:
        The largest logits plus Gumbel noise are such a draw: Kool et al., *Stochastic Beams and
        Where to Find Them*, ICML 2019, Section 2.3.
    """
    temperature = checks.number("temperature", temperature, above=0)

    def scores(weight: Tensor, generator: torch.Generator) -> Tensor:
        size = widened(weight.detach()).abs().cpu()
        logits = size.clamp_min(torch.finfo(size.dtype).tiny).log() / temperature
        waiting = torch.empty_like(logits).exponential_(generator=generator)
        return logits - waiting.clamp_min(torch.finfo(size.dtype).tiny).log()

    return scores


class Catfish:
    """Prune the weights that fit a task best: those without which its loss would change most.

    The change is taken to first order, ``|w * dL/dw|``. Show each task's loss to :meth:`observe`
    before the task's block begins; each loss serves one draw.

    Examples:
        >>> from l2l_prune import Pruner, Schedule, Segment, TaskMasks
        >>> net, catfish = torch.nn.Linear(2, 1, bias=False), Catfish()
        >>> schedule = Schedule([Segment(1, sparse=True, sparsity=0.5, masks="task")])
        >>> masks = TaskMasks(torch.Generator().manual_seed(0), catfish)
        >>> pruner = Pruner(net, schedule, task_masks=masks)
        >>> catfish.observe(net(torch.tensor([[0.0, 5.0]])).sum(), net.parameters())
        >>> with pruner.task_masks() as held:
        ...     held["weight"].tolist()
        [[True, False]]

    Source:
        After catfish pruning in Wang et al., *Improving Generalization in Meta-Learning via
        Meta-Gradient Augmentation*, IJCAI 2025 (arXiv 2306.08460). The authors' program scores by
        the gradient of the query loss, and adds gradients of sub-networks to the full one's:
        :class:`~l2l_prune.methods.mgaug.MGAug`.
    """

    def __init__(self) -> None:
        self._gradients: dict[int, Tensor] = {}

    def observe(self, loss: Tensor, weights: Iterable[Tensor]) -> None:
        """Take the gradients of a task's loss; the weights' own ``grad`` is left alone.

        Args:
            loss: One number, computed by the model without the task's mask.
            weights: Parameters of the pruned model; those that the loss does not reach score 0.

        Raises:
            RuntimeError: If the loss reaches none of them.
            TypeError: If it is not a tensor.
            ValueError: If it holds several numbers.
        """
        check_loss(loss)
        held = [weight for weight in weights if weight.requires_grad]
        if not loss.requires_grad or not held:
            raise RuntimeError("the loss reaches no weight: compute it with the pruned model")
        found = torch.autograd.grad(loss, held, allow_unused=True)
        self._gradients = {
            id(weight): torch.zeros_like(weight) if gradient is None else gradient
            for weight, gradient in zip(held, found, strict=True)
        }

    def __call__(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """``-|w * g|``.

        Raises:
            ValueError: If no loss of this task was shown.
        """
        gradient = self._gradients.pop(id(weight), None)
        if gradient is None:
            raise ValueError(
                "catfish has seen no loss for this task: call observe(loss, model.parameters()) "
                "before each block"
            )
        return -saliency(weight, gradient)
