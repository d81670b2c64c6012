"""Few-shot tasks, networks and accuracies."""

from l2l_prune.fewshot.data import (
    Episode,
    EpisodeSampler,
    Glyphs,
    SineTasks,
    glyphs_tasksets,
    load_images,
    minibatches,
)
from l2l_prune.fewshot.evaluation import Mean, few_shot_accuracy, paired_difference
from l2l_prune.fewshot.models import CaviaConv4, CaviaMLP, Conv4

__all__ = [
    "CaviaConv4",
    "CaviaMLP",
    "Conv4",
    "Episode",
    "EpisodeSampler",
    "Glyphs",
    "Mean",
    "SineTasks",
    "few_shot_accuracy",
    "glyphs_tasksets",
    "load_images",
    "minibatches",
    "paired_difference",
]
