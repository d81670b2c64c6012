"""Few-shot data: glyphs (rendered here), episodes, minibatches and learn2learn tasksets."""

from l2l_prune.fewshot.data.cache import Images
from l2l_prune.fewshot.data.episodes import Episode, EpisodeSampler
from l2l_prune.fewshot.data.folder import folder_classes, load_folder
from l2l_prune.fewshot.data.glyphs import Glyphs
from l2l_prune.fewshot.data.images import DATA_SETS, load_images
from l2l_prune.fewshot.data.minibatches import minibatches
from l2l_prune.fewshot.data.pictures import load_pictures
from l2l_prune.fewshot.data.sine import SineTasks
from l2l_prune.fewshot.data.tasksets import folder_tasksets, glyphs_tasksets

__all__ = [
    "DATA_SETS",
    "Episode",
    "EpisodeSampler",
    "Glyphs",
    "Images",
    "SineTasks",
    "folder_classes",
    "folder_tasksets",
    "glyphs_tasksets",
    "load_folder",
    "load_images",
    "load_pictures",
    "minibatches",
]
