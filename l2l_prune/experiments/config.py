"""The settings of a run, with defaults for each algorithm."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from l2l_prune import _values
from l2l_prune.experiments.check_config import check_types
from l2l_prune.experiments.defaults import DEFAULTS, INSTANCES, PUBLISHED
from l2l_prune.experiments.methods import METHODS, make_schedule, published_phases
from l2l_prune.schedules import Schedule
from l2l_prune.selection import Layers

_NO_THIRD_DERIVATIVE = ("maml", "metasgd", "cavia", "metaoptnet")
"""Batch normalisation has derivatives up to the second order, the SVM of the first."""


@dataclass(frozen=True)
class RunConfig:
    """Settings of one run.

    Args:
        name: Name of the method, for tables and files.
        schedule: When to prune, and how much; its length is the run's.
        seed: Seed of weights, tasks and minibatches. Runs with one seed see the same tasks.
        algorithm: A key of :data:`~l2l_prune.experiments.defaults.DEFAULTS`.
        data: Name of the data set, see :func:`l2l_prune.data.load_images`.
        data_root: Folder of its files.
        ways: Classes of a task.
        shots: Support examples of a class at evaluation.
        queries: Query examples of a class at evaluation.
        train_shots: Support examples of a class in a training task.
        train_queries: Query examples of a class in a training task (Reptile has none).
        train_classes: Number of classes to train on, ``None`` for all.
        backbone: ``"conv4"`` or ``"resnet12"`` (MetaOptNet only).
        channels: Channels of each convolution of conv4.
        drop_block: DropBlock in ResNet-12; ``None``: in the dense baseline alone, as the paper
            lets pruning replace it.
        dropout: Rate of dropout after each block of conv4 in training (Reptile only), in [0, 1).
        weight_decay: Decoupled weight decay of the inner steps in training and evaluation (Reptile
            only), >= 0.
        layers: Which layers are pruned, as in :class:`~l2l_prune.Pruner`.
        criterion: By what weights are kept: ``"magnitude"``, ``"random"``, ``"snip"``,
            ``"taylor"``, ``"grasp"`` or ``"movement"``, see :mod:`l2l_prune.criteria`.
        allocation: How pruned weights are shared among layers: ``"layerwise"``, ``"erk"`` or
            ``"global"``, see :mod:`l2l_prune.allocation`.
        rewind: If given, sparse phases restart from the weights of this iteration, see
            :class:`~l2l_prune.rewinding.Rewind`.
        regrow: If given, masks move within sparse phases: ``"random"`` (SET) or ``"gradient"``
            (RigL) weights grow, see :class:`~l2l_prune.regrowth.Regrowth`.
        structured: Cut out whole channels instead, of all layers, by their L2 norm (Reptile only).
        compile: Inner steps through :class:`~l2l_prune.compiled.CompiledStep` (Reptile only):
            faster on small images.
        bf16: Networks compute in bfloat16 in the inner steps (Reptile only), where the processor
            has it.
        tasks: Tasks in a meta-iteration.
        inner_steps: Inner steps in training.
        inner_batch: Examples in an inner step in training (Reptile; the others take all).
        inner_lr: Learning rate of the inner steps.
        meta_lr: Reptile's first meta step size, falling linearly to 0, or the learning rate of
            the outer optimizer.
        eval_steps: Inner steps at evaluation.
        eval_batch: Examples in an inner step at evaluation (Reptile).
        transductive: Score all queries of a task at once, so that batch statistics see them
            together; else one by one beside the support set. ProtoNet and MetaOptNet use running
            statistics, where it makes no difference.
        select: Weights to score at the end: ``"last"``, or the ``"best"`` on validation tasks at a
            point of the curves.
        eval_every: Meta-iterations between points of the accuracy curves.
        curve_tasks: Tasks for each point of the curves, from each of training and test classes.
        final_tasks: Tasks for the accuracies at the end, from each of training and test classes.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is out of range, a name unknown, or settings do not go together.
    """

    name: str
    schedule: Schedule
    seed: int = 0
    algorithm: str = "reptile"
    data: str = "glyphs"
    data_root: str | None = None
    ways: int = 5
    shots: int = 1
    queries: int = 5
    train_shots: int = 10
    train_queries: int = 0
    train_classes: int | None = 30
    backbone: str = "conv4"
    channels: int = 64
    drop_block: bool | None = None
    dropout: float = 0.0
    weight_decay: float = 0.0
    layers: Layers = "authors"
    criterion: str = "magnitude"
    allocation: str = "layerwise"
    rewind: int | None = None
    regrow: str | None = None
    structured: bool = False
    compile: bool = False
    bf16: bool = False
    tasks: int = 5
    inner_steps: int = 5
    inner_batch: int = 10
    inner_lr: float = 1e-3
    meta_lr: float = 1.0
    eval_steps: int = 5
    eval_batch: int = 5
    transductive: bool = True
    select: str = "last"
    eval_every: int = 25
    curve_tasks: int = 12
    final_tasks: int = 200

    def __post_init__(self) -> None:
        if self.algorithm not in DEFAULTS:
            raise ValueError(f"algorithm must be one of {', '.join(DEFAULTS)}: {self.algorithm!r}")
        check_types({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        special = ("dropout", "weight_decay", "structured", "compile", "bf16")
        if self.algorithm != "reptile" and any(getattr(self, name) for name in special):
            raise ValueError(
                "dropout, weight_decay, structured, compile and bf16 go with the algorithm "
                "reptile only"
            )
        masks = (self.criterion, self.allocation, self.rewind, self.regrow)
        if self.structured and masks != ("magnitude", "layerwise", None, None):
            raise ValueError("structured takes no criterion, allocation, rewind or regrow")
        if self.criterion == "grasp" and self.algorithm in _NO_THIRD_DERIVATIVE:
            raise ValueError(
                f"criterion grasp does not go with {self.algorithm}, whose meta-gradient cannot be "
                "differentiated once more"
            )
        if self.regrow and self.allocation == "global":
            raise ValueError("regrow counts layer by layer: it goes without allocation global")
        if self.backbone == "resnet12" and self.algorithm != "metaoptnet":
            raise ValueError("backbone resnet12 goes with the algorithm metaoptnet only")

    @property
    def with_drop_block(self) -> bool:
        """Whether ResNet-12 drops blocks in this run."""
        if self.drop_block is not None:
            return self.drop_block
        return not any(segment.sparse for segment in self.schedule.segments)

    @property
    def title(self) -> str:
        """Name and seed: ``"DSD seed 0"``."""
        return f"{self.name} seed {self.seed}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, the schedule as its own dict."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**values, "schedule": self.schedule.to_dict()}


def make_config(
    algorithm: str,
    schedule: str,
    *,
    iterations: int | None = None,
    sparsity: float | None = None,
    pretrain: float | None = None,
    retrain: float | None = None,
    rounds: int | None = None,
    published: bool = False,
    scale: float = 1.0,
    **settings: Any,
) -> RunConfig:
    """The settings of a run from an algorithm's defaults and what is given.

    Args:
        algorithm: A key of :data:`~l2l_prune.experiments.defaults.DEFAULTS`.
        schedule: A key of :data:`~l2l_prune.experiments.methods.METHODS`, which may set more than
            the schedule.
        iterations: Meta-iterations, 400 (or the published number) by default.
        sparsity: As in :func:`~l2l_prune.experiments.methods.make_schedule`, likewise
            ``pretrain``, ``retrain`` and ``rounds``.
        pretrain: See ``sparsity``.
        retrain: See ``sparsity``.
        rounds: See ``sparsity``.
        published: Start from :data:`~l2l_prune.experiments.defaults.PUBLISHED`, with all training
            classes; for Reptile on a data set of the paper also from its phases and rates.
        scale: Factor on the meta-iterations, > 0; phases shrink alike.
        **settings: Fields of :class:`RunConfig`; those that are ``None`` keep their default. A
            ``name`` replaces the one that says the schedule and what is special.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a name or number is not possible, or a setting unknown.
    """
    if algorithm not in DEFAULTS:
        raise ValueError(f"algorithm must be one of {', '.join(DEFAULTS)}, got {algorithm!r}")
    known = {field.name for field in dataclasses.fields(RunConfig)}
    if unknown := sorted(settings.keys() - known):
        raise ValueError(f"there is no setting {', '.join(unknown)}; there are {sorted(known)}")
    chosen = dict(DEFAULTS[algorithm])
    if published:
        if algorithm not in PUBLISHED:
            raise ValueError(f"there are published settings for {', '.join(PUBLISHED)} only")
        chosen |= {**PUBLISHED[algorithm], "train_classes": None}
    default = chosen.pop("iterations", 400)
    whole = _values.count("iterations", default if iterations is None else iterations, least=1)
    iterations = round(_values.number("scale", scale, above=0) * whole)
    if iterations < 1:
        raise ValueError(f"scale={scale} leaves nothing of {whole} iterations")
    chosen |= {name: value for name, value in settings.items() if value is not None}
    data, channels = chosen.get("data", "glyphs"), chosen.get("channels", RunConfig.channels)
    paper = published_phases(schedule, data, channels) if published else {}
    given = {"sparsity": sparsity, "pretrain": pretrain, "retrain": retrain, "rounds": rounds}
    phases = {name: value for name, value in given.items() if value is not None}
    pruning = make_schedule(schedule, iterations, **(paper | phases))
    chosen = {**METHODS[schedule].settings, **chosen}
    if algorithm not in ("reptile", "metaoptnet") and settings.get("train_shots") is None:
        chosen["train_shots"] = chosen.get("shots", RunConfig.shots)
    if data != "glyphs":
        chosen.setdefault("train_classes", None)
    if published and data in INSTANCES and settings.get("train_queries") is None:
        room = INSTANCES[data] - chosen.get("train_shots", RunConfig.train_shots)
        chosen["train_queries"] = min(chosen.get("train_queries", 0), max(room, 0))
    if settings.get("final_tasks") and not settings.get("curve_tasks"):
        usual = chosen.get("curve_tasks", RunConfig.curve_tasks)
        chosen["curve_tasks"] = min(usual, settings["final_tasks"])  # no more on the way
    phases.pop("sparsity", None)
    derived = {
        "name": _name(schedule, {} if schedule == "dense" else phases, chosen),
        "eval_every": max(1, iterations // 10),
    }
    return RunConfig(algorithm=algorithm, schedule=pruning, **{**derived, **chosen})


def file_name(name: str) -> str:
    """A method's name for files: ``"DSD, random"`` gives ``"dsd-random"``."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())


def _name(schedule: str, phases: dict[str, Any], settings: dict[str, Any]) -> str:
    """The schedule, and all by which a method can differ from its default."""
    method = METHODS[schedule]
    parts = [method.title]
    for phase in ("pretrain", "retrain"):
        if phase in phases:
            parts.append(f"{phase} {100 * phases[phase]:g}%" if phases[phase] else f"no {phase}")
    if "rounds" in phases:
        parts.append(f"{phases['rounds']} rounds")
    usual = {"criterion": "magnitude", "allocation": "layerwise", **method.settings}
    for name in ("criterion", "allocation"):
        if settings.get(name, usual[name]) != usual[name] and schedule != "dense":
            parts.append(settings[name])
    if settings.get("structured") and schedule != "dense":
        parts.append("channels")
    if settings.get("dropout"):
        parts.append(f"dropout {settings['dropout']:g}")
    if settings.get("weight_decay"):
        parts.append(f"decay {settings['weight_decay']:g}")
    return ", ".join(parts)
