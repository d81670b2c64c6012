"""MetaOptNet."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from l2l_prune.experiments.algorithms.base import (
    OwnRandomness,
    conv4,
    eval_mode,
)
from l2l_prune.experiments.algorithms.outer_optimizer import Classifier
from l2l_prune.experiments.config import RunConfig
from l2l_prune.experiments.streams import stream
from l2l_prune.fewshot.data import Episode
from l2l_prune.fewshot.evaluation import Mean


class MetaOptNetLearner(Classifier):
    """SVM head on an embedding, SGD with the published steps, running batch statistics."""

    scored_in_training = False

    def __init__(self, config: RunConfig, image_shape: Sequence[int]) -> None:
        from l2l_prune.metalearners import metaoptnet

        channels, size = image_shape[0], image_shape[-1]
        if config.backbone == "resnet12":
            margin = max(0, 32 - size)
            parts = OrderedDict(
                pad=nn.ZeroPad2d((margin // 2, margin - margin // 2) * 2),
                resnet12=metaoptnet.resnet12(
                    size + margin, channels, drop_block=config.with_drop_block
                ),
            )
            features: nn.Module = nn.Sequential(parts)
        else:
            features = nn.Sequential(conv4(config, image_shape).features, nn.Flatten())
        self._model = metaoptnet.MetaOptNet(features).to(config.device)
        self._loss = metaoptnet.smoothed_cross_entropy
        self.network = self.trained = self._model
        self.optimizer = torch.optim.SGD(
            self._model.parameters(), config.meta_lr, 0.9, weight_decay=5e-4, nesterov=True
        )
        total = config.schedule.iterations
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda done: metaoptnet.published_lr_factor(done / total)
        )
        self._prune(self._model, config)
        self._drop_block = OwnRandomness(stream(config.seed, "dropout"), config.device)

    def train(self, tasks: Sequence[Episode]) -> None:
        with self._drop_block.drawn():
            super().train(tasks)

    def state_dict(self) -> dict[str, Any]:
        counts = [block.num_batches_tracked for block in self._drop_blocks()]
        return {**super().state_dict(), "random": self._drop_block.state, "blocks": counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._drop_block.state = state["random"]
        for block, count in zip(self._drop_blocks(), state["blocks"], strict=True):
            block.num_batches_tracked = count

    def evaluate(self, episodes: Iterable[Episode]) -> Mean:
        counts = [block.num_batches_tracked for block in self._drop_blocks()]
        try:
            return super().evaluate(episodes)
        finally:
            for block, count in zip(self._drop_blocks(), counts, strict=True):
                block.num_batches_tracked = count

    def _drop_blocks(self) -> list[Any]:
        """learn2learn's residual blocks, which count batches in an int for DropBlock's rate.

        That int is in no state dict, and evaluation increases it too.
        """
        return [m for m in self._model.modules() if hasattr(m, "drop_block")]

    def losses(self, tasks: Sequence[Episode]) -> Iterator[Tensor]:
        support_x, support_y, query_x, query_y = map(torch.stack, zip(*tasks, strict=True))
        scores = self._model(support_x, support_y, query_x)
        yield len(tasks) * self._loss(scores, query_y)

    def scores(self, episode: Episode) -> Tensor:
        with torch.no_grad(), eval_mode(self.network):
            scores: Tensor = self._model(episode.support_x, episode.support_y, episode.query_x)
        return scores
