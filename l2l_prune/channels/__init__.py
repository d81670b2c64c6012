"""Pruning of whole channels: in sparse phases the network is physically small."""

from l2l_prune.channels.pruner import ChannelPruner, Exported, Structured

__all__ = ["ChannelPruner", "Exported", "Structured"]
