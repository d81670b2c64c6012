"""Few-shot data: glyphs (rendered here), episodes, minibatches and learn2learn tasksets."""

from l2l_prune.data.episodes import Episode, EpisodeSampler
from l2l_prune.data.glyphs import Glyphs
from l2l_prune.data.minibatches import minibatches
from l2l_prune.data.tasksets import glyphs_tasksets

__all__ = ["Episode", "EpisodeSampler", "Glyphs", "glyphs_tasksets", "minibatches"]
