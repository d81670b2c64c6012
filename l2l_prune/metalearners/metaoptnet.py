"""MetaOptNet on learn2learn's parts: an embedding network under a convex base learner."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2l_prune._basics import checks
from l2l_prune._basics.precision import widened

try:
    import learn2learn as l2l
    from qpth.qp import QPFunction
except ImportError as error:
    raise ImportError(f'{error}; MetaOptNet needs: pip install "l2l-prune[learn2learn]"') from None

SVM_C = 0.1
RIDGE = 50.0


class MetaOptNet(nn.Module):
    """Embeds an episode, solves a convex base learner on its support set, scores its queries.

    Only ``features`` has weights to prune; the head's only parameter is the learned ``scale``.

    Args:
        features: Embedding network, images to ``[batch, dimensions]``; see :func:`resnet12`.
        head: ``"svm"`` (Crammer and Singer, as in the paper), ``"ridge"`` or ``"prototype"``.

    Raises:
        TypeError: If ``features`` is not a module.
        ValueError: If ``head`` is another name.

    Source:
        Lee et al., *Meta-Learning with Differentiable Convex Optimization*, CVPR 2019.
    """

    def __init__(self, features: nn.Module, head: str = "svm") -> None:
        super().__init__()
        checks.of_type("features", features, nn.Module, "a torch.nn.Module")
        checks.one_of("head", head, sorted(HEADS))
        self.features = features
        self.head = head
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """Class scores of the queries of one or more tasks.

        Support and queries go through the network separately, each as one batch over all tasks, as
        in the published program; this matters for batch statistics.

        Args:
            support_x: ``[ways * shots, C, H, W]``, or ``[tasks, ways * shots, C, H, W]``.
            support_y: Labels in 0 .. ways - 1, each equally often; ``[ways * shots]``, or
                ``[tasks, ways * shots]``.
            query_x: ``[queries, C, H, W]``, or ``[tasks, queries, C, H, W]``.

        Returns:
            ``[queries, ways]``, or ``[tasks, queries, ways]``, in float32 at least: heads compute
            in the type of the embedding, but never in half precision.

        Raises:
            TypeError: If labels are not integers.
            ValueError: If the classes of an episode have different numbers of shots, or the
                embedding is not finite (SVM).
        """
        if support_y.dim() == 1:
            return cast(Tensor, self(support_x[None], support_y[None], query_x[None])[0])
        for labels in support_y:
            _check_labels(labels)
        support = self.features(support_x.flatten(0, 1)).view(*support_y.shape, -1)
        query = self.features(query_x.flatten(0, 1)).view(*query_x.shape[:2], -1)
        head = HEADS[self.head]
        with torch.autocast(support.device.type, enabled=False):  # half precision is too coarse
            tasks = zip(widened(support), support_y.long(), widened(query), strict=True)
            return self.scale * torch.stack([head(*task) for task in tasks])


def svm_scores(support: Tensor, labels: Tensor, query: Tensor, C: float = SVM_C) -> Tensor:
    """Scores of learn2learn's ``SVClassifier``, with its quadratic program solved in float64.

    In float32 that solver (qpth) stops with errors of 1% on wide embeddings; in float64 they
    are below 1e-7 (docs/guides/metaoptnet.md).

    Args:
        support: ``[n, dimensions]``, float32 or float64.
        labels: ``[n]``.
        query: ``[m, dimensions]``.
        C: Upper bound of the dual variables.

    Returns:
        ``[m, ways]`` in the type of ``support``.
    """
    dual = svm_dual((support @ support.t()).double(), labels, C)
    return query @ support.t() @ dual.to(support.dtype)


def svm_dual(kernel: Tensor, labels: Tensor, C: float = SVM_C) -> Tensor:
    """Dual variables of the Crammer-Singer SVM of MetaOptNet, differentiable in ``kernel``.

    They minimise ``0.5 tr(a' (kernel + I) a) - sum_i a[i, labels[i]]`` over ``a``, where
    ``a[i, j] <= C`` if ``j`` is the label of ``i``, ``<= 0`` otherwise, and rows sum to 0.

    Args:
        kernel: ``[n, n]`` in float64.
        labels: ``[n]`` in 0 .. ways - 1.
        C: Upper bound.

    Returns:
        ``[n, ways]``.

    Raises:
        ValueError: If the kernel is not finite.
    """
    if not bool(kernel.isfinite().all()):
        raise ValueError("the embedding is not finite (NaN or infinite): the training diverged")
    n, ways = len(labels), int(labels.max()) + 1
    one = torch.eye(n * ways, dtype=kernel.dtype, device=kernel.device)
    target = F.one_hot(labels, ways).to(kernel.dtype).flatten()
    rows = torch.eye(n, dtype=kernel.dtype, device=kernel.device).repeat_interleave(ways, 1)
    quadratic = torch.kron(kernel, one[:ways, :ways]) + one
    solve = QPFunction(verbose=-1, maxIter=15)
    solved = solve(quadratic, -target, one, C * target, rows, rows.new_zeros(n))
    dual: Tensor = solved.view(n, ways)
    found = dual.detach().flatten()
    excess = torch.maximum(found - C * target, (rows @ found).abs().max())
    if not float(excess.max()) <= 1e-3 * C:
        warnings.warn(f"the SVM's dual solution is off by {float(excess.max()):.1e}", stacklevel=2)
    return dual


def ridge_scores(support: Tensor, labels: Tensor, query: Tensor, ridge: float = RIDGE) -> Tensor:
    """Scores of ridge regression on one-hot labels, in closed form.

    Args:
        support: Embeddings ``[n, dimensions]``.
        labels: ``[n]`` in 0 .. ways - 1.
        query: Embeddings ``[m, dimensions]``.
        ridge: Weight of the penalty on the solution's squares, > 0.

    Returns:
        ``[m, ways]``.
    """
    target = F.one_hot(labels).to(support.dtype)
    one = torch.eye(len(support), dtype=support.dtype, device=support.device)
    kernel = support @ support.t() + ridge * one
    dual: Tensor = torch.linalg.solve(kernel, 2 * target)
    return query @ support.t() @ dual


def prototype_scores(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    """Negative squared distances to the class means, over the number of dimensions.

    Arguments and shapes are those of :func:`ridge_scores`.
    """
    classifier = l2l.nn.PrototypicalClassifier(support, labels)
    return cast(Tensor, classifier(query)) / support.shape[1]


HEADS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "svm": svm_scores,
    "ridge": ridge_scores,
    "prototype": prototype_scores,
}


def smoothed_cross_entropy(scores: Tensor, labels: Tensor, smoothing: float = 0.1) -> Tensor:
    """Cross entropy against ``1 - smoothing`` at the label, with the rest shared by the others.

    Args:
        scores: ``[..., ways]``.
        labels: ``[...]``.
        smoothing: In [0, 1). torch's own ``label_smoothing`` also gives the label a share of the
            rest, so the same number smooths less there.
    """
    checks.fraction("smoothing", smoothing)
    ways = scores.shape[-1]
    return F.cross_entropy(
        scores.flatten(0, -2), labels.flatten(), label_smoothing=smoothing * ways / (ways - 1)
    )


def resnet12(
    image_size: int = 84, in_channels: int = 3, *, drop_block: bool = True, wider: bool = True
) -> nn.Module:
    """learn2learn's ``ResNet12Backbone`` as MetaOptNet sets it up.

    Args:
        image_size: 84 (16,000 dimensions, blocks of 5x5), or 32 (2,560, blocks of 2x2).
        in_channels: Channels of the images.
        drop_block: Drop 10% with DropBlock, as in the baseline; pruning replaces it in the paper
            (Section 5.3).
        wider: 64, 160, 320 and 640 channels as in MetaOptNet; else 64, 128, 256 and 512.

    Raises:
        ValueError: If the images are too small for DropBlock (28x28: pad them to 32x32).
    """
    if image_size < 32:
        raise ValueError(f"image_size must be >= 32, got {image_size}: pad the images")
    return cast(
        nn.Module,
        l2l.vision.models.ResNet12Backbone(
            avg_pool=False,
            wider=wider,
            dropblock_dropout=0.1 if drop_block else 0.0,
            dropblock_size=5 if image_size >= 84 else 2,
            channels=in_channels,
        ),
    )


def published_lr_factor(progress: float) -> float:
    """Factor on the learning rate 0.1: MetaOptNet's steps at epochs 20, 40 and 50 of 60.

    Args:
        progress: Fraction of the training that is done, in [0, 1].

    Examples:
        >>> [published_lr_factor(epoch / 60) for epoch in (0, 20, 40, 50)]
        [1.0, 0.06, 0.012, 0.0024]
    """
    steps = ((20, 1.0), (40, 0.06), (50, 0.012))
    return next((factor for epoch, factor in steps if progress < epoch / 60), 0.0024)


def _check_labels(labels: Tensor) -> None:
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"support_y must hold integers, got {labels.dtype}")
    if bool((labels < 0).any()):
        raise ValueError("support_y must hold labels in 0 .. ways - 1, got a negative one")
    shots = torch.bincount(labels).tolist() if len(labels) else []
    if len(set(shots)) != 1:
        raise ValueError(
            "an episode needs equally many support examples for each class 0 .. ways - 1, got "
            f"{shots}"
        )
