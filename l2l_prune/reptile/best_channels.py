"""Which output channels should adapt, if only a share of the weights may."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from l2l_prune._basics import checks
from l2l_prune.reptile.adapt_only import output_channels
from l2l_prune.reptile.reptile import PrunedReptile


def best_channels(
    reptile: PrunedReptile,
    tasks: Iterable[tuple[Tensor, Tensor]],
    *,
    share: float = 0.25,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> dict[str, list[int]]:
    """The output channels whose adaptation promises most, for ``clone(adapt_only=...)``.

    A channel's score is the squared norm of the gradient of the loss on its weights, summed over
    tasks: how much an infinitesimal gradient step on them alone lowers the losses. Channels are
    taken in the order of their score for each weight, as long as they fit. Pruned weights neither
    score nor count. Layers that do not hold their output channels first never adapt.

    Give support sets of training tasks, so that the choice is made once, before the device. With
    the support set of the task itself it costs a forward and a backward pass more in each task.

    Args:
        reptile: The meta-learner; it is left as it was.
        tasks: Support sets ``(x, y)``, at least one.
        share: Largest share of the weights that may adapt, in [0, 1).
        loss: ``loss(scores, labels)``, a scalar.

    Returns:
        Channels by layer, in rising order; layers without any are left out.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If there is no task, ``share`` is out of range, or no channel that the loss
            depends on fits in it.

    Examples:
        >>> from l2l_prune import DSDSchedule
        >>> schedule = DSDSchedule(0.5, pretrain=1, prune=1, retrain=1)
        >>> reptile = PrunedReptile(torch.nn.Linear(4, 3, bias=False), schedule)
        >>> x, y = torch.eye(4)[:2], torch.tensor([0, 0])
        >>> best_channels(reptile, [(x, y)], share=0.4)
        {'': [0]}

    Source:
        Channels by Fisher information for each weight within a budget: TinyTrain (Kwon et al.,
        ICML 2024, Section 2.2), here with the gradient on weights and not on activations.
    """
    checks.of_type("reptile", reptile, PrunedReptile, "a PrunedReptile")
    checks.fraction("share", share)
    squares: dict[str, Tensor] = {}
    for x, y in tasks:
        learner = reptile.clone()
        workspace = learner.workspace
        workspace.backward(loss(learner(x), y))
        for name, parameter in workspace.module.named_parameters():
            if parameter.grad is not None:
                squares[name] = parameter.grad.square() + squares.get(name, 0)
        reptile.discard(learner)
    if not squares:
        raise ValueError("tasks must hold at least one support set")
    scores: dict[tuple[str, int], float] = {}
    sizes: dict[tuple[str, int], int] = {}
    whole, named = 0, dict(workspace.module.named_parameters())
    for path, layer in workspace.module.named_modules():
        count = output_channels(layer)
        for key, parameter in layer.named_parameters(recurse=False):
            name = f"{path}.{key}" if path else key
            if name not in named:  # tied, and counted where it was found first
                continue
            kept = workspace.masks.get(name, torch.ones_like(parameter)).bool()
            whole += int(kept.sum())
            if count is None or name not in squares:
                continue
            found = (squares[name] * kept).reshape(count, -1).sum(1).tolist()
            weights = kept.reshape(count, -1).sum(1).tolist()
            for place, score, size in zip(
                ((path, channel) for channel in range(count)), found, weights, strict=True
            ):
                scores[place] = scores.get(place, 0.0) + score
                sizes[place] = sizes.get(place, 0) + size
    left = share * whole
    chosen: dict[str, list[int]] = {}
    for place in sorted(scores, key=lambda p: -scores[p] / max(sizes[p], 1)):
        if scores[place] > 0 and sizes[place] <= left:
            left -= sizes[place]
            chosen.setdefault(place[0], []).append(place[1])
    if not chosen:
        raise ValueError(
            f"no channel that the loss depends on fits in {share:g} of {whole} weights: raise share"
        )
    return {name: sorted(channels) for name, channels in chosen.items()}
