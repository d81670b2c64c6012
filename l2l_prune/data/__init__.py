"""Few-shot data: glyphs (rendered here), episodes, minibatches and learn2learn tasksets."""

from l2l_prune.data.benchmarks import Images
from l2l_prune.data.episodes import Episode, EpisodeSampler
from l2l_prune.data.glyphs import Glyphs
from l2l_prune.data.images import DATA_SETS, load_images
from l2l_prune.data.minibatches import minibatches
from l2l_prune.data.pictures import load_pictures
from l2l_prune.data.sine import SineTasks
from l2l_prune.data.tasksets import glyphs_tasksets

__all__ = [
    "DATA_SETS",
    "Episode",
    "EpisodeSampler",
    "Glyphs",
    "Images",
    "SineTasks",
    "glyphs_tasksets",
    "load_images",
    "load_pictures",
    "minibatches",
]
