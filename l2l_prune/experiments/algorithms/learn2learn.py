"""learn2learn's MAML and its variants, ANIL and ProtoNet; CAVIA and sparse-MAML."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2l_prune.experiments.algorithms.base import (
    conv4,
    eval_mode,
)
from l2l_prune.experiments.algorithms.outer_optimizer import Classifier
from l2l_prune.experiments.config import RunConfig
from l2l_prune.experiments.streams import stream
from l2l_prune.fewshot.data import Episode
from l2l_prune.fewshot.evaluation import query_scores
from l2l_prune.fewshot.models import CaviaConv4
from l2l_prune.metalearners.cavia import CAVIA
from l2l_prune.metalearners.sparse_maml import SparseMAML


class Adapting(Classifier):
    """Learners that take inner steps on the support set."""

    _config: RunConfig

    @abstractmethod
    def _adapted(self, task: Episode, steps: int, **options: Any) -> Any:
        """A learner after its inner steps; ``options`` are passed to ``adapt``."""

    def losses(self, tasks: Sequence[Episode]) -> Iterator[Tensor]:
        for task in tasks:
            learner = self._adapted(task, self._config.inner_steps)
            yield F.cross_entropy(learner(task.query_x), task.query_y)

    def scores(self, episode: Episode) -> Tensor:
        # There is no meta-gradient here, so second derivatives would be wasted work.
        learner = self._adapted(episode, self._config.eval_steps, first_order=True)
        return query_scores(learner, episode, self._config.transductive)


class GradientBased(Adapting):
    """MAML, FOMAML, Meta-SGD, CAVIA and sparse-MAML: clone, adapt, score."""

    def __init__(self, config: RunConfig, image_shape: Sequence[int]) -> None:
        self._config = config
        self.network, self._meta = self._make(config, image_shape)
        self.trained = self._meta
        self.optimizer = torch.optim.Adam(self._meta.parameters(), config.meta_lr)
        if config.algorithm == "cavia":  # as in the authors' script
            self.clamp = 10.0
            self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 5000, 0.9)
        self._prune(self._meta, config, image_shape)

    def _make(self, config: RunConfig, image_shape: Sequence[int]) -> tuple[nn.Module, nn.Module]:
        """The network, and the learn2learn-like wrapper around it."""
        if config.algorithm == "cavia":
            channels, size = image_shape[0], image_shape[-1]
            net: nn.Module = CaviaConv4(config.ways, config.channels, channels, size)
            net.to(config.device)
            return net, CAVIA(net, config.inner_lr)
        net = conv4(config, image_shape)
        if config.algorithm == "sparsemaml":
            generator = stream(config.seed, "inner-step scores")
            return net, SparseMAML(net, config.inner_lr, generator=generator)
        l2l = _learn2learn()
        if config.algorithm == "metasgd":
            return net, l2l.algorithms.MetaSGD(net, lr=config.inner_lr)
        first_order = config.algorithm == "fomaml"
        return net, l2l.algorithms.MAML(net, lr=config.inner_lr, first_order=first_order)

    def _adapted(self, task: Episode, steps: int, **options: Any) -> Any:
        learner: Any = self._meta.clone()  # type: ignore[operator]
        for _ in range(steps):
            learner.adapt(F.cross_entropy(learner(task.support_x), task.support_y), **options)
        return learner


class ANIL(Adapting):
    """The head adapts with MAML, the features do not; the features are pruned."""

    def __init__(self, config: RunConfig, image_shape: Sequence[int]) -> None:
        self._config = config
        net = conv4(config, image_shape)
        self.network = self.trained = net
        self._features = net.features
        head: Any = _learn2learn().algorithms.MAML(net.classifier, lr=config.inner_lr)
        self._head = head
        self.optimizer = torch.optim.Adam(net.parameters(), config.meta_lr)
        self._prune(net.features, config, image_shape)

    def _adapted(self, task: Episode, steps: int, **options: Any) -> Any:
        support = self._features(task.support_x).flatten(1)
        learner = self._head.clone()
        for _ in range(steps):
            learner.adapt(F.cross_entropy(learner(support), task.support_y), **options)
        return nn.Sequential(self._features, nn.Flatten(), learner)


class ProtoNet(Classifier):
    """Distances to class means; evaluated with running batch statistics."""

    scored_in_training = False

    def __init__(self, config: RunConfig, image_shape: Sequence[int]) -> None:
        self._classifier = _learn2learn().nn.PrototypicalClassifier
        net = conv4(config, image_shape)
        self.network = self.trained = net.features
        self.optimizer = torch.optim.Adam(self.network.parameters(), config.meta_lr)
        self._prune(self.network, config, image_shape)

    def _scores(self, task: Episode) -> Tensor:
        support = self.network(task.support_x).flatten(1)
        classifier = self._classifier(support, task.support_y)
        scores: Tensor = classifier(self.network(task.query_x).flatten(1))
        return scores

    def losses(self, tasks: Sequence[Episode]) -> Iterator[Tensor]:
        for task in tasks:
            yield F.cross_entropy(self._scores(task), task.query_y)

    def scores(self, episode: Episode) -> Tensor:
        with torch.no_grad(), eval_mode(self.network):
            return self._scores(episode)


def _learn2learn() -> Any:
    try:
        import learn2learn
    except ImportError as error:
        raise ImportError(
            f'{error}; this algorithm needs: pip install "l2l-prune[learn2learn]"'
        ) from None
    return learn2learn
