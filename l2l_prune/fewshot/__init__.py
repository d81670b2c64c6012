"""Few-shot tasks, networks and accuracies."""

from l2l_prune.fewshot.data import (
    Episode,
    EpisodeSampler,
    Glyphs,
    glyphs_tasksets,
    load_images,
    minibatches,
)
from l2l_prune.fewshot.evaluation import Mean, few_shot_accuracy, paired_difference
from l2l_prune.fewshot.models import Conv4

__all__ = [
    "Conv4",
    "Episode",
    "EpisodeSampler",
    "Glyphs",
    "Mean",
    "few_shot_accuracy",
    "glyphs_tasksets",
    "load_images",
    "minibatches",
    "paired_difference",
]
