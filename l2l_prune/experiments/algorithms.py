"""Every meta-learner of the command behind one face: train on tasks, score episodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2l_prune.cavia import CAVIA
from l2l_prune.data import Episode
from l2l_prune.data.minibatches import minibatches
from l2l_prune.evaluation import Mean, accuracy, few_shot_accuracy, query_scores
from l2l_prune.experiments.config import RunConfig
from l2l_prune.experiments.models import CaviaConv4, Conv4
from l2l_prune.pruner import Pruner
from l2l_prune.reptile import PrunedReptile


class Algorithm(ABC):
    """A meta-learner with its network, outer optimizer and pruner."""

    pruner: Pruner

    @abstractmethod
    def train(self, tasks: Sequence[Episode]) -> None:
        """One meta-iteration: the outer step, and the pruner's."""

    @abstractmethod
    def evaluate(self, episodes: Sequence[Episode]) -> Mean:
        """Accuracy on each episode's queries; leaves everything as it was."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything to resume from bit for bit: tensors and plain values."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict` of a learner of the same settings."""

    @abstractmethod
    def finalize(self) -> nn.Module:
        """The plain network."""


def build(config: RunConfig, image_shape: Sequence[int]) -> Algorithm:
    """The meta-learner that ``config`` names, with fresh weights from torch's generator.

    Args:
        config: The settings.
        image_shape: ``(C, H, W)`` of the images.

    Raises:
        ImportError: If its host library is missing.
    """
    kinds: dict[str, type[Algorithm]] = {
        "reptile": _Reptile,
        "anil": _ANIL,
        "protonet": _ProtoNet,
        "metaoptnet": _MetaOptNet,
    }
    return kinds.get(config.algorithm, _GradientBased)(config, image_shape)  # type: ignore[call-arg]


class _Reptile(Algorithm):
    def __init__(self, config: RunConfig, image_shape: Sequence[int]) -> None:
        self._config = config
        self._batches = torch.Generator().manual_seed(config.seed)
        self._reptile = PrunedReptile(
            _conv4(config, image_shape),
            config.schedule,
            inner_lr=config.inner_lr,
            meta_lr=config.meta_lr,
            layers=config.layers,
        )
        self.pruner = self._reptile.pruner

    def train(self, tasks: Sequence[Episode]) -> None:
        for task in tasks:
            learner = self._reptile.clone()
            for x, y in minibatches(
                task.support_x,
                task.support_y,
                batch_size=self._config.inner_batch,
                steps=self._config.inner_steps,
                generator=self._batches,
            ):
                learner.adapt(F.cross_entropy(learner(x), y))
            self._reptile.collect(learner)
        self._reptile.step()

    def evaluate(self, episodes: Sequence[Episode]) -> Mean:
        return few_shot_accuracy(
            self._reptile,
            episodes,
            steps=self._config.eval_steps,
            batch_size=self._config.eval_batch,
            transductive=self._config.transductive,
            generator=torch.Generator().manual_seed(self._config.seed),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"reptile": self._reptile.state_dict(), "batches": self._batches.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reptile.load_state_dict(state["reptile"])
        self._batches.set_state(state["batches"])

    def finalize(self) -> nn.Module:
        return self._reptile.finalize()


class _WithOuterOptimizer(Algorithm):
    """Gradients of the mean query loss over the tasks, an optimizer, and the pruner."""

    network: nn.Module
    trained: nn.Module  # holds every trained parameter: the network, or a wrapper around it
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    clamp: float | None = None

    def train(self, tasks: Sequence[Episode]) -> None:
        self.optimizer.zero_grad()
        for loss in self.losses(tasks):
            (loss / len(tasks)).backward()  # type: ignore[no-untyped-call]
        if self.clamp is not None:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_value_(parameters, self.clamp)
        self.optimizer.step()
        self.pruner.step()
        if self.scheduler is not None:
            self.scheduler.step()

    @abstractmethod
    def losses(self, tasks: Sequence[Episode]) -> Iterator[Tensor]:
        """Query losses that sum to the sum over the tasks."""

    @abstractmethod
    def scores(self, episode: Episode) -> Tensor:
        """Class scores of the queries after learning from the support set."""

    def evaluate(self, episodes: Sequence[Episode]) -> Mean:
        with _kept_buffers(self.network):
            return accuracy(self.scores, episodes)

    def state_dict(self) -> dict[str, Any]:
        scheduler = self.scheduler.state_dict() if self.scheduler is not None else None
        return {
            "model": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pruner": self.pruner.state_dict(),
            "scheduler": scheduler,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trained.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.pruner.load_state_dict(state["pruner"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])

    def finalize(self) -> nn.Module:
        self.pruner.finalize()
        return self.network


class _GradientBased(_WithOuterOptimizer):
    """MAML, FOMAML, Meta-SGD and CAVIA: clone, adapt, score."""

    def __init__(self, config: RunConfig, image_shape: Sequence[int]) -> None:
        self._config = config
        self.network, self._meta = self._make(config, image_shape)
        self.trained = self._meta
        self.optimizer = torch.optim.Adam(self._meta.parameters(), config.meta_lr)
        if config.algorithm == "cavia":  # as the authors' script
            self.clamp = 10.0
            self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 5000, 0.9)
        self.pruner = Pruner(self._meta, config.schedule, self.optimizer, layers=config.layers)

    def _make(self, config: RunConfig, image_shape: Sequence[int]) -> tuple[nn.Module, nn.Module]:
        """The network, and the learn2learn-like wrapper around it."""
        if config.algorithm == "cavia":
            channels, size = image_shape[0], image_shape[-1]
            net: nn.Module = CaviaConv4(config.ways, config.channels, channels, size)
            return net, CAVIA(net, config.inner_lr)
        l2l = _learn2learn()
        net = _conv4(config, image_shape)
        if config.algorithm == "metasgd":
            return net, l2l.algorithms.MetaSGD(net, lr=config.inner_lr)
        first_order = config.algorithm == "fomaml"
        return net, l2l.algorithms.MAML(net, lr=config.inner_lr, first_order=first_order)

    def _adapted(self, task: Episode, steps: int, **options: Any) -> Any:
        learner: Any = self._meta.clone()  # type: ignore[operator]
        for _ in range(steps):
            learner.adapt(F.cross_entropy(learner(task.support_x), task.support_y), **options)
        return learner

    def losses(self, tasks: Sequence[Episode]) -> Iterator[Tensor]:
        for task in tasks:
            learner = self._adapted(task, self._config.inner_steps)
            yield F.cross_entropy(learner(task.query_x), task.query_y)

    def scores(self, episode: Episode) -> Tensor:
        # Without a meta-gradient, second derivatives would be work for nothing.
        learner = self._adapted(episode, self._config.eval_steps, first_order=True)
        return query_scores(learner, episode, self._config.transductive)


class _ANIL(_WithOuterOptimizer):
    """The head adapts by MAML, the features do not; the features are pruned."""

    def __init__(self, config: RunConfig, image_shape: Sequence[int]) -> None:
        self._config = config
        net = _conv4(config, image_shape)
        self.network = self.trained = net
        self._features = net.features
        head: Any = _learn2learn().algorithms.MAML(net.classifier, lr=config.inner_lr)
        self._head = head
        self.optimizer = torch.optim.Adam(net.parameters(), config.meta_lr)
        self.pruner = Pruner(net.features, config.schedule, self.optimizer, layers=config.layers)

    def _adapted(self, task: Episode, steps: int) -> nn.Module:
        support = self._features(task.support_x).flatten(1)
        learner = self._head.clone()
        for _ in range(steps):
            learner.adapt(F.cross_entropy(learner(support), task.support_y))
        return nn.Sequential(self._features, nn.Flatten(), learner)

    def losses(self, tasks: Sequence[Episode]) -> Iterator[Tensor]:
        for task in tasks:
            learner = self._adapted(task, self._config.inner_steps)
            yield F.cross_entropy(learner(task.query_x), task.query_y)

    def scores(self, episode: Episode) -> Tensor:
        learner = self._adapted(episode, self._config.eval_steps)
        return query_scores(learner, episode, self._config.transductive)


class _ProtoNet(_WithOuterOptimizer):
    """Distances to class means; evaluated with running batch statistics."""

    def __init__(self, config: RunConfig, image_shape: Sequence[int]) -> None:
        self._classifier = _learn2learn().nn.PrototypicalClassifier
        net = _conv4(config, image_shape)
        self.network = self.trained = net.features
        self.optimizer = torch.optim.Adam(self.network.parameters(), config.meta_lr)
        self.pruner = Pruner(self.network, config.schedule, self.optimizer, layers=config.layers)

    def _scores(self, task: Episode) -> Tensor:
        support = self.network(task.support_x).flatten(1)
        classifier = self._classifier(support, task.support_y)
        scores: Tensor = classifier(self.network(task.query_x).flatten(1))
        return scores

    def losses(self, tasks: Sequence[Episode]) -> Iterator[Tensor]:
        for task in tasks:
            yield F.cross_entropy(self._scores(task), task.query_y)

    def scores(self, episode: Episode) -> Tensor:
        with torch.no_grad(), _eval_mode(self.network):
            return self._scores(episode)


class _MetaOptNet(_WithOuterOptimizer):
    """SVM head on an embedding; SGD with the published steps; running batch statistics."""

    def __init__(self, config: RunConfig, image_shape: Sequence[int]) -> None:
        from l2l_prune.integrations import metaoptnet

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
            features = nn.Sequential(_conv4(config, image_shape).features, nn.Flatten())
        self._model = metaoptnet.MetaOptNet(features)
        self._loss = metaoptnet.smoothed_cross_entropy
        self.network = self.trained = self._model
        self.optimizer = torch.optim.SGD(
            self._model.parameters(), config.meta_lr, 0.9, weight_decay=5e-4, nesterov=True
        )
        total = config.schedule.iterations
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda done: metaoptnet.published_lr_factor(done / total)
        )
        self.pruner = Pruner(self._model, config.schedule, self.optimizer, layers=config.layers)
        self._random = torch.Generator().manual_seed(config.seed).get_state()

    def train(self, tasks: Sequence[Episode]) -> None:
        with torch.random.fork_rng(devices=[]):  # DropBlock draws from torch's global generator
            torch.set_rng_state(self._random)
            super().train(tasks)
            self._random = torch.get_rng_state()

    def state_dict(self) -> dict[str, Any]:
        counts = [block.num_batches_tracked for block in self._drop_blocks()]
        return {**super().state_dict(), "random": self._random, "blocks": counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._random = state["random"]
        for block, count in zip(self._drop_blocks(), state["blocks"], strict=True):
            block.num_batches_tracked = count

    def evaluate(self, episodes: Sequence[Episode]) -> Mean:
        counts = [block.num_batches_tracked for block in self._drop_blocks()]
        try:
            return super().evaluate(episodes)
        finally:
            for block, count in zip(self._drop_blocks(), counts, strict=True):
                block.num_batches_tracked = count

    def _drop_blocks(self) -> list[Any]:
        """learn2learn's residual blocks, which count batches for DropBlock's rate in an int.

        It is in no state dict, and evaluation counts too.
        """
        return [m for m in self._model.modules() if hasattr(m, "drop_block")]

    def losses(self, tasks: Sequence[Episode]) -> Iterator[Tensor]:
        support_x, support_y, query_x, query_y = map(torch.stack, zip(*tasks, strict=True))
        scores = self._model(support_x, support_y, query_x)
        yield len(tasks) * self._loss(scores, query_y)

    def scores(self, episode: Episode) -> Tensor:
        with torch.no_grad(), _eval_mode(self.network):
            scores: Tensor = self._model(episode.support_x, episode.support_y, episode.query_x)
        return scores


def _conv4(config: RunConfig, image_shape: Sequence[int]) -> Conv4:
    channels, size = image_shape[0], image_shape[-1]
    # Strides on small images and pooling on large ones, as the paper's program does (Section 5.1).
    pooling = "max" if size > 28 else "stride"
    return Conv4(config.ways, config.channels, channels, size, pooling)


def _learn2learn() -> Any:
    try:
        import learn2learn
    except ImportError as error:
        raise ImportError(
            f'{error}; this algorithm needs: pip install "l2l-prune[learn2learn]"'
        ) from None
    return learn2learn


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


@contextmanager
def _kept_buffers(module: nn.Module) -> Iterator[None]:
    """Running statistics that an evaluation in training mode moves are put back."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
