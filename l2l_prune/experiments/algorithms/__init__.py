"""Every meta-learner of the command behind one interface: train on tasks, score episodes."""

from __future__ import annotations

from collections.abc import Sequence

from l2l_prune.experiments.algorithms.base import Algorithm
from l2l_prune.experiments.algorithms.field import Field
from l2l_prune.experiments.algorithms.learn2learn import ANIL, GradientBased, ProtoNet
from l2l_prune.experiments.algorithms.metaoptnet import MetaOptNetLearner
from l2l_prune.experiments.algorithms.reptile import Reptile
from l2l_prune.experiments.config import RunConfig

__all__ = ["Algorithm", "build"]


def build(config: RunConfig, image_shape: Sequence[int]) -> Algorithm:
    """The meta-learner that ``config`` names, with fresh weights from torch's generator.

    It is on the run's device; its weights are drawn on the CPU, the same for all devices.

    Args:
        config: The settings.
        image_shape: ``(C, H, W)`` of the images.

    Raises:
        ImportError: If its host library is missing.
        ValueError: If the images are not square.
    """
    *_, height, width = image_shape
    if height != width and not config.picture_tasks:
        raise ValueError(
            f"images must be square, not {height} x {width} pixels: image_size crops and resizes "
            "them"
        )
    kinds: dict[str, type[Algorithm]] = {
        "reptile": Reptile,
        "anil": ANIL,
        "protonet": ProtoNet,
        "metaoptnet": MetaOptNetLearner,
        "field": Field,
    }
    return kinds.get(config.algorithm, GradientBased)(config, image_shape)  # type: ignore[call-arg]
