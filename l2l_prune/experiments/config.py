"""The settings of a run, with defaults for each algorithm."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, get_args

import torch

from l2l_prune._basics import checks
from l2l_prune.experiments.defaults import DEFAULTS, INSTANCES, PICTURE_TASKS, PUBLISHED, measure_of
from l2l_prune.experiments.methods import (
    METHODS,
    make_schedule,
    published_phases,
    read_layer_rates,
)
from l2l_prune.experiments.settings import check_settings, setting, settings_of
from l2l_prune.fewshot.data.images import DATA_SETS, OWN_SPLITS
from l2l_prune.fewshot.evaluation import Measure
from l2l_prune.masking.allocation import ALLOCATIONS
from l2l_prune.masking.layers import Layers
from l2l_prune.masking.patterns import NByM, read_pattern
from l2l_prune.methods.drop_grad import Noise
from l2l_prune.methods.mgaug import Way
from l2l_prune.schedules.schedule import Schedule, Segment

_BY_ALGORITHM, _BY_METHOD = "by algorithm", "by method"
MGAUG = ("reptile", "maml", "fomaml", "anil", "metasgd", "protonet")
"""Algorithms whose runs can add sub-networks to each task."""
_FOR_TRAINING = (
    *("criterion", "pattern", "rewind", "regrow", "dropout", "dropout_per"),
    *("drop_grad", "drop_grad_noise", "mgaug", "mgaug_rate", "mgaug_networks"),
    *("compile", "ranks", "device"),
)
"""What :meth:`RunConfig.rebuilt` sets back to the default."""
_NO_THIRD_DERIVATIVE = ("maml", "metasgd", "cavia", "metaoptnet")
"""Batch normalisation has derivatives up to the second order, the SVM up to the first."""


@dataclass(frozen=True)
class Phases:
    """How a run is divided into phases; ``None`` leaves a value to the method."""

    iterations: int | None = setting(None, "Meta-iterations.", least=1, shown=_BY_ALGORITHM)
    sparsity: float | None = setting(
        None,
        "Fraction pruned in the sparse phases, in (0, 1).",
        share=True,
        shown="0.5; 0.8 for recommended; 0.95 for metasparse; the paper's with --published",
        panel="What",
    )
    pretrain: float | None = setting(
        None, "Dense start, as a fraction of the run.", shown=_BY_METHOD
    )
    retrain: float | None = setting(
        None, "Dense end, as a fraction of the run (DSD) or of a round (IHT).", shown=_BY_METHOD
    )
    rounds: int | None = setting(
        None, "Rounds of IHT, or cycles of cyclic.", least=1, shown=_BY_METHOD
    )
    ramp: float | None = setting(
        None,
        "Share of the iterations after the dense start in which the rate rises, in (0, 1) (cubic "
        "only).",
        share=True,
        shown=_BY_METHOD,
    )
    task_share: float | None = setting(
        None, "Share of tasks to prune, in (0, 1] (task-masks only).", above=0, shown="all"
    )
    layer_rates: str | None = setting(
        None,
        "Rates of single layers, such as 'features.conv4.weight=0.9,features.conv3.*=0.5': only "
        "these layers are pruned, and sparsity is ignored.",
        shown="none",
    )
    scale: float = setting(1.0, "Factor on the meta-iterations, and so on every phase.", above=0)
    published: bool = setting(
        False, "Start from the published settings (reptile, cavia, metaoptnet, field)."
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class RunConfig:
    """Settings of one run.

    Each field below says its default and range; ``l2l-prune run --help`` lists them all.

    Args:
        name: Name of the method, for tables and files.
        schedule: When to prune, and how much; its length is the run's.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is out of range, a name is unknown, or settings cannot be combined.
    """

    name: str
    schedule: Schedule
    seed: int = setting(
        0, "Seed of weights, tasks and minibatches: runs with one seed see the same tasks."
    )
    algorithm: str = setting("reptile", "Meta-learner", choices=tuple(DEFAULTS), panel="What")
    data: str = setting("glyphs", "Data set", choices=DATA_SETS, panel="What")
    data_root: str | None = setting(
        None, "Folder of the data set's files.", panel="What", shown="none"
    )
    split: int | None = setting(
        None,
        "Seed that splits the characters of glyphs, the pictures, or the classes of a folder at "
        "random into training, validation and test.",
        least=0,
        shown="by script for glyphs, 0 for pictures, the folder's own split",
    )
    skip_damaged: bool = setting(
        False, "Leave out those pictures of a folder that cannot be read.", panel="What"
    )
    image_size: int | None = setting(
        None,
        "Side in pixels: glyphs are drawn at this size (16 to 128), pictures and images "
        "of a folder are cropped to squares and resampled.",
        least=1,
        panel="What",
        shown="28 for glyphs, 64 for pictures, unchanged for a folder",
    )
    ways: int = setting(5, "Classes in a task (field has none).", least=1, shown="5; 1 for field")
    shots: int = setting(1, "Support examples per class at evaluation.", least=1)
    queries: int = setting(
        5, "Query examples per class at evaluation.", least=0, shown=_BY_ALGORITHM
    )
    train_shots: int = setting(
        10, "Support examples per class in training.", least=1, shown=_BY_ALGORITHM
    )
    train_queries: int = setting(
        0, "Query examples per class in training (reptile has none).", least=0, shown=_BY_ALGORITHM
    )
    train_classes: int | None = setting(
        30,
        "Classes, or pictures, to train on.",
        least=1,
        shown="30 for glyphs; all for other data and for field",
    )
    backbone: str = setting(
        "conv4",
        "Network (resnet12: metaoptnet only; siren, fourier: field only)",
        choices=("conv4", "resnet12", "siren", "fourier"),
        shown=_BY_ALGORITHM,
    )
    channels: int = setting(
        64,
        "Channels of each convolution of conv4, or neurons in each layer of a field.",
        least=1,
        shown=_BY_ALGORITHM,
    )
    depth: int = setting(3, "Hidden layers (field only).", least=1)
    omega: float = setting(30.0, "Frequency of the sines of siren.", above=0)
    drop_block: bool | None = setting(
        None,
        "DropBlock in resnet12: pruning replaces it, as in the paper.",
        shown="in dense runs only",
    )
    dropout: float = setting(
        0.0, "Dropout after each block of conv4 in training (reptile only).", share=True
    )
    dropout_per: str = setting(
        "step",
        "How long a dropout mask is held (task: the same units in all examples of an inner loop)",
        choices=("step", "task"),
    )
    drop_grad: float = setting(
        0.0, "Rate of DropGrad's noise on inner gradients in training (reptile only).", share=True
    )
    drop_grad_noise: str = setting("gaussian", "Noise of DropGrad", choices=get_args(Noise))
    mgaug: str | None = setting(
        None,
        "Add the meta-gradients of pruned sub-networks, and how these are chosen",
        choices=get_args(Way),
        shown="none",
    )
    mgaug_rate: float = setting(
        0.2, "Largest fraction that a sub-network of MGAug loses, in (0, 1).", share=True
    )
    mgaug_networks: int = setting(3, "Sub-networks of MGAug for each task.", least=1)
    weight_decay: float = setting(0.0, "Decoupled weight decay of the inner steps (reptile only).")
    layers: Layers = setting(  # noqa: RUF009 - it makes a field
        "authors",
        "Layers to prune (authors: all but the first convolution)",
        choices=get_args(Layers),
        shown=_BY_ALGORITHM,
    )
    criterion: str = setting(
        "magnitude",
        "Which weights to keep",
        choices=("magnitude", "random", "snip", "taylor", "grasp", "movement"),
        shown="magnitude; random for static, set, rigl and recommended",
    )
    pattern: str | None = setting(
        None,
        "Where pruned weights may lie: N:M such as 2:4 (N of M neighbours along the inputs stay, "
        "which sets the sparsity), ROWSxCOLUMNS such as 4x1 (whole blocks), or rows (whole output "
        "channels).",
        shown="anywhere",
    )
    allocation: str = setting(
        "layerwise",
        "How layers share what is pruned",
        choices=ALLOCATIONS,
        shown="layerwise; global for metasparse",
    )
    rewind: int | None = setting(
        None, "Restart sparse phases from the weights of this iteration.", least=0, shown=_BY_METHOD
    )
    regrow: str | None = setting(
        None,
        "Exchange weights within sparse phases, and how those that grow are chosen",
        choices=("random", "gradient"),
        shown=_BY_METHOD,
    )
    prune_head: bool = setting(True, "Prune the classifier, too.")
    structured: bool = setting(
        False, "Cut out whole channels instead of single weights (reptile only)."
    )
    compile: bool = setting(
        False,
        "Compile inner steps with torch.compile (reptile only): may be faster on small images, "
        "after some ten seconds of compiling for each phase and shape.",
    )
    bf16: bool = setting(
        False, "Run inner steps in bfloat16 (reptile only): faster where the processor supports it."
    )
    device: str = setting(
        "cpu", "Where to train and evaluate: cpu, cuda, or one GPU of several, such as cuda:1."
    )
    label_noise: float = setting(
        0.0,
        "Probability that a label in training is replaced by another class of its task.",
        share=True,
    )
    tasks: int = setting(5, "Tasks in a meta-iteration.", least=1, shown=_BY_ALGORITHM)
    ranks: int = setting(
        1,
        "Processes that share the tasks of each meta-iteration, one thread each (reptile only).",
        least=1,
    )
    inner_steps: int = setting(5, "Inner steps in training.", least=1, shown=_BY_ALGORITHM)
    inner_batch: int = setting(10, "Examples in an inner step in training (reptile only).", least=1)
    inner_lr: float = setting(
        1e-3, "Learning rate of the inner steps.", above=0, shown=_BY_ALGORITHM
    )
    meta_lr: float = setting(
        1.0,
        "Reptile's first meta step, which falls linearly to 0; else the outer learning rate.",
        shown=_BY_ALGORITHM,
    )
    annealing: str = setting(
        "run",
        "Whether the meta step falls to 0 once over the run or again in each phase (reptile only)",
        choices=("run", "phase"),
    )
    eval_steps: int = setting(5, "Inner steps at evaluation.", least=0, shown=_BY_ALGORITHM)
    eval_batch: int = setting(5, "Examples in an inner step at evaluation (reptile only).", least=1)
    transductive: bool = setting(
        True, "Score all queries of a task together, so that batch statistics see them."
    )
    select: str = setting(
        "last",
        "Which weights to score (best: on validation tasks, of those as sparse as at the end)",
        choices=("last", "best"),
    )
    eval_every: int = setting(
        25, "Meta-iterations between points of the curves.", least=1, shown="a tenth of the run"
    )
    held_out: str = setting(
        "test",
        "Classes to score on besides those of training (validation leaves test classes unseen)",
        choices=("test", "validation"),
    )
    curve_tasks: int = setting(
        12, "Tasks for each point of the curves.", least=1, shown=_BY_ALGORITHM
    )
    final_tasks: int = setting(
        200, "Tasks behind each score at the end.", least=2, shown=_BY_ALGORITHM
    )

    def __post_init__(self) -> None:
        checks.of_type("schedule", self.schedule, Schedule, "a Schedule")
        if not checks.of_type("name", self.name, str, "a string"):
            raise ValueError("name must not be empty: tables and files use it")
        if file_name(self.name) == "checkpoint":
            raise ValueError(f"name must not be {self.name!r}: the run's checkpoint is called so")
        check_settings(self)
        self._check_data()
        self._check_tasks()
        if self.annealing != "run" and self.algorithm != "reptile":
            raise ValueError("annealing works only with the algorithm reptile")
        special = ("dropout", "drop_grad", "weight_decay", "structured", "compile", "bf16")
        if self.algorithm != "reptile" and any(getattr(self, name) for name in special):
            raise ValueError(
                "dropout, drop_grad, weight_decay, structured, compile and bf16 work only with the "
                "algorithm reptile"
            )
        self._check_rivals()
        self._check_device()
        self._check_ranks()
        masks = (self.criterion, self.pattern, self.allocation, self.rewind, self.regrow)
        if self.structured and masks != ("magnitude", None, "layerwise", None, None):
            raise ValueError(
                "structured cannot be combined with criterion, pattern, allocation, rewind or "
                "regrow"
            )
        self._check_pattern()
        per_task = any(segment.per_task for segment in self.schedule.segments)
        if per_task and (self.criterion, self.rewind, self.regrow) != ("magnitude", None, None):
            raise ValueError(
                "task masks are random: they cannot be combined with criterion, rewind or regrow"
            )
        if self.criterion == "grasp" and self.algorithm in _NO_THIRD_DERIVATIVE:
            raise ValueError(
                f"criterion grasp cannot be combined with {self.algorithm}, whose meta-gradient "
                "cannot be differentiated again"
            )
        if self.regrow and self.allocation == "global":
            raise ValueError(
                "regrow counts layer by layer: it cannot be combined with allocation global"
            )
        if self.backbone == "resnet12" and self.algorithm != "metaoptnet":
            raise ValueError("backbone resnet12 works only with the algorithm metaoptnet")

    def _check_pattern(self) -> None:
        if self.pattern is None:
            return
        pattern = read_pattern(self.pattern)
        if self.allocation == "global" or self.regrow:
            raise ValueError(
                "pattern counts layer by layer: it cannot be combined with allocation global or "
                "regrow"
            )
        sparse = [segment for segment in self.schedule.segments if segment.sparse]
        rates = {one.sparsity for one in sparse if isinstance(one.sparsity, float)}
        if isinstance(pattern, NByM) and (wrong := rates - {pattern.sparsity}):
            raise ValueError(
                f"pattern {self.pattern} prunes {pattern.sparsity:g} of the weights, and "
                f"the schedule {', '.join(f'{rate:g}' for rate in sorted(wrong))}: set sparsity, "
                "and choose a method whose rate does not rise"
            )

    def _check_rivals(self) -> None:
        """Check MGAug, DropGrad and dropout for tasks, and what they cannot be combined with."""
        held = self.dropout_per == "task"
        if held and not self.dropout:
            raise ValueError("dropout_per needs a rate: set dropout, too")
        if self.drop_grad_noise != RunConfig.drop_grad_noise and not self.drop_grad:
            raise ValueError("drop_grad_noise needs a rate: set drop_grad, too")
        if self.compile and (held or self.drop_grad):
            raise ValueError("compile cannot be combined with drop_grad or dropout_per=task")
        if self.structured and held:
            raise ValueError("structured cannot be combined with dropout_per=task")
        if self.mgaug is None:
            usual = (RunConfig.mgaug_rate, RunConfig.mgaug_networks)
            if (self.mgaug_rate, self.mgaug_networks) != usual:
                raise ValueError(
                    "mgaug_rate and mgaug_networks need a choice of sub-networks: set mgaug, too"
                )
            return
        if self.algorithm not in MGAUG:
            raise ValueError(f"mgaug works only with the algorithms {', '.join(MGAUG)}")
        if self.mgaug_rate == 0:
            raise ValueError("mgaug_rate must be in (0, 1), got 0")
        if any(segment.sparse for segment in self.schedule.segments):
            raise ValueError(
                "mgaug prunes sub-networks of a dense model: it works only with the method dense"
            )
        if self.structured or held:
            raise ValueError("mgaug cannot be combined with structured or dropout_per=task")

    def _check_device(self) -> None:
        """Check the name alone: a GPU need not be here, but where the run will be."""
        try:
            computes = torch.device(self.device).type != "meta"  # whose tensors hold no numbers
        except RuntimeError:
            computes = False
        if not computes:
            raise ValueError(
                f"device must be one that torch can compute on, such as cpu or cuda, got "
                f"{self.device!r}"
            )

    def _check_ranks(self) -> None:
        if self.ranks == 1:
            return
        if self.device != "cpu":
            raise ValueError(
                f"ranks share the cores of the CPU: leave ranks out, or device={self.device}"
            )
        if self.algorithm != "reptile":
            raise ValueError("ranks works only with the algorithm reptile")
        if self.tasks % self.ranks:
            raise ValueError(
                f"tasks must be a multiple of ranks, so that all ranks get equally many: got "
                f"{self.tasks} tasks and {self.ranks} ranks"
            )
        if self.dropout or self.drop_grad or self.criterion == "grasp":
            raise ValueError(
                "dropout, drop_grad and grasp need all tasks of a meta-iteration in one process: "
                "leave ranks out"
            )

    def _check_data(self) -> None:
        if self.data_root is not None and self.data == "glyphs":
            raise ValueError(
                "data_root is the folder of another data set's files, and glyphs need none: say "
                "which with data, as in data=folder for images of your own"
            )
        if self.split is not None and self.data in OWN_SPLITS:
            raise ValueError(
                f"split works only with glyphs, pictures and folder: {self.data} has splits of its "
                "own"
            )
        if self.image_size is not None and self.data in OWN_SPLITS:
            raise ValueError(
                f"image_size works only with glyphs, pictures and folder: images of {self.data} "
                "have a size of their own"
            )
        if self.skip_damaged and self.data != "folder":
            raise ValueError("skip_damaged works only with data=folder")
        if self.data == "pictures" and self.algorithm not in PICTURE_TASKS:
            raise ValueError(
                f"pictures have no classes for {self.algorithm} to learn: data=pictures works only "
                f"with the algorithm {', '.join(PICTURE_TASKS)}"
            )

    def _check_tasks(self) -> None:
        """Check that the tasks and the network are those of the algorithm."""
        fields = ("siren", "fourier")
        if not self.picture_tasks:
            checks.whole_number("ways", self.ways, least=2)
            checks.whole_number("queries", self.queries, least=1)
            if self.backbone in fields:
                raise ValueError(f"backbone {self.backbone} works only with the algorithm field")
            if (self.depth, self.omega) != (RunConfig.depth, RunConfig.omega):
                raise ValueError("depth and omega work only with the algorithm field")
            return
        one = {"ways": 1, "shots": 1, "train_shots": 1, "queries": 0, "train_queries": 0}
        if wrong := [name for name, value in one.items() if getattr(self, name) != value]:
            raise ValueError(
                f"a task of {self.algorithm} is one picture: leave {', '.join(wrong)} out"
            )
        if self.backbone not in fields:
            raise ValueError(f"{self.algorithm} needs one of the backbones {', '.join(fields)}")
        if self.label_noise:
            raise ValueError(f"{self.algorithm} has no labels: leave label_noise out")
        if self.backbone != "siren" and self.omega != RunConfig.omega:
            raise ValueError("omega works only with the backbone siren")

    @property
    def picture_tasks(self) -> bool:
        """Whether a task is one picture instead of a few examples of some classes."""
        return self.algorithm in PICTURE_TASKS

    @property
    def measure(self) -> Measure:
        """What the run's scores measure."""
        return measure_of(self.algorithm)

    @property
    def data_options(self) -> dict[str, Any]:
        """The settings among the arguments of ``load_images``, except the split and its classes."""
        return {
            "root": self.data_root,
            "split_seed": self.split,
            "image_size": self.image_size,
            "skip_damaged": self.skip_damaged,
        }

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

    @property
    def special(self) -> dict[str, Any]:
        """What differs from the defaults: a new setting thus leaves the names of runs unchanged."""
        usual = {f.name: f.default for f in dataclasses.fields(self)}
        return {name: value for name, value in self.to_json().items() if value != usual[name]}

    def to_json(self) -> dict[str, Any]:
        """Plain values; the schedule is a dict of its own."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**values, "schedule": self.schedule.to_dict()}

    def rebuilt(self, schedule: Schedule, **changes: Any) -> RunConfig:
        """The same network under another schedule, without what only its training needs.

        It is on the CPU, in one process, without dropout and other rivals; masks go by magnitude.

        Args:
            schedule: The other schedule.
            **changes: Settings that are to differ.
        """
        usual = {name: getattr(RunConfig, name) for name in _FOR_TRAINING}
        return dataclasses.replace(self, schedule=schedule, **{**usual, **changes})

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunConfig:
        """The inverse of :meth:`to_json`; settings that an older version lacked have their default.

        Raises:
            TypeError: If a setting is unknown, as those of newer versions are.
        """
        segments: list[dict[str, Any]] = [
            {key: dict(held) if isinstance(held, list) else held for key, held in segment.items()}
            for segment in values["schedule"]["segments"]
        ]
        schedule = Schedule(tuple(Segment(**segment) for segment in segments))
        return cls(**{**values, "schedule": schedule})


def make_config(algorithm: str, method: str, **settings: Any) -> RunConfig:
    """The settings of a run: an algorithm's defaults, changed by the settings that are given.

    Args:
        algorithm: A key of :data:`~l2l_prune.experiments.defaults.DEFAULTS`.
        method: A key of :data:`~l2l_prune.experiments.methods.METHODS`: it makes the schedule, and
            may set more.
        **settings: Fields of :class:`Phases` and :class:`RunConfig`; those that are ``None`` keep
            their default. With ``published``, defaults are those of
            :data:`~l2l_prune.experiments.defaults.PUBLISHED`, with all training classes; for
            Reptile on a data set of the paper also its phases and rates. A ``name`` replaces the
            usual one, which gives the method and what is special about the run.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is not possible, or a setting is unknown.
    """
    checks.one_of("algorithm", algorithm, DEFAULTS)
    if unknown := sorted(settings.keys() - KNOWN):
        raise ValueError(
            f"there is no setting {', '.join(unknown)}; the settings are {sorted(KNOWN)}"
        )
    given = {name: value for name, value in settings.items() if value is not None}
    phases = Phases(**{name: given.pop(name) for name in settings_of(Phases) if name in given})
    chosen = dict(DEFAULTS[algorithm])
    if phases.published:
        if algorithm not in PUBLISHED:
            raise ValueError(
                f"there are no published settings for {algorithm}, only for {', '.join(PUBLISHED)}"
            )
        chosen |= {**PUBLISHED[algorithm], "train_classes": None}
    whole = chosen.pop("iterations", 400) if phases.iterations is None else phases.iterations
    chosen.pop("iterations", None)
    iterations = round(phases.scale * whole)
    if iterations < 1:
        raise ValueError(f"scale={phases.scale} leaves none of the {whole} iterations")
    chosen |= given
    data, channels = chosen.get("data", "glyphs"), chosen.get("channels", RunConfig.channels)
    paper = published_phases(method, data, channels) if phases.published else {}
    shape = {
        name: value
        for name in ("sparsity", "pretrain", "retrain", "rounds", "ramp", "task_share")
        if (value := getattr(phases, name)) is not None
    }
    if phases.layer_rates is not None:
        shape["sparsity"] = read_layer_rates(phases.layer_rates)
        if chosen.get("allocation", "layerwise") != "layerwise" or chosen.get("structured"):
            raise ValueError(
                "layer_rates works only with the allocation layerwise, and not with structured"
            )
    elif chosen.get("pattern") is not None and phases.sparsity is None:
        pattern = read_pattern(chosen["pattern"])
        if isinstance(pattern, NByM):  # which leaves no choice
            paper["sparsity"] = pattern.sparsity
    pruning = make_schedule(method, iterations, **(paper | shape))
    chosen = {**METHODS[method].settings, **chosen}
    if algorithm not in ("reptile", "metaoptnet") and "train_shots" not in given:
        chosen["train_shots"] = chosen.get("shots", RunConfig.shots)
    if data != "glyphs":
        chosen.setdefault("train_classes", None)
    if phases.published and data in INSTANCES and "train_queries" not in given:
        room = INSTANCES[data] - chosen.get("train_shots", RunConfig.train_shots)
        chosen["train_queries"] = min(chosen.get("train_queries", 0), max(room, 0))
    if "final_tasks" in given and "curve_tasks" not in given:
        usual = chosen.get("curve_tasks", RunConfig.curve_tasks)
        chosen["curve_tasks"] = min(usual, given["final_tasks"])  # no more than at the end
    by_layer = isinstance(shape.pop("sparsity", None), dict)
    derived = {
        "name": _name(method, {} if method == "dense" else shape, chosen, by_layer),
        "eval_every": max(1, iterations // 10),
    }
    return RunConfig(algorithm=algorithm, schedule=pruning, **{**derived, **chosen})


KNOWN = (settings_of(RunConfig).keys() | settings_of(Phases).keys() | {"name"}) - {"algorithm"}
"""The settings that :func:`make_config` takes besides algorithm and method."""


def file_name(name: str) -> str:
    """A method's name for files: ``"DSD, random"`` gives ``"dsd-random"``."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())


def _name(
    kind: str, phases: dict[str, Any], settings: dict[str, Any], by_layer: bool = False
) -> str:
    """The method, and everything in which the run differs from its default."""
    method = METHODS[kind]
    parts = [method.title]
    for phase in ("pretrain", "retrain"):
        if phase in phases:
            parts.append(f"{phase} {100 * phases[phase]:g}%" if phases[phase] else f"no {phase}")
    if "rounds" in phases:
        parts.append(f"{phases['rounds']} rounds")
    if "ramp" in phases:
        parts.append(f"ramp {100 * phases['ramp']:g}%")
    if "task_share" in phases:
        parts.append(f"{100 * phases['task_share']:g}% of tasks")
    if by_layer and kind != "dense":
        parts.append("rates by layer")
    usual = {"criterion": "magnitude", "allocation": "layerwise", **method.settings}
    for name in ("criterion", "allocation"):
        if settings.get(name, usual[name]) != usual[name] and kind != "dense":
            parts.append(settings[name])
    if settings.get("pattern") and kind != "dense":
        parts.append(settings["pattern"])
    if settings.get("structured") and kind != "dense":
        parts.append("channels")
    if settings.get("dropout"):
        held = " per task" if settings.get("dropout_per") == "task" else ""
        parts.append(f"dropout {settings['dropout']:g}{held}")
    if settings.get("drop_grad"):
        noise = settings.get("drop_grad_noise", RunConfig.drop_grad_noise)
        other = f" {noise}" if noise != RunConfig.drop_grad_noise else ""
        parts.append(f"DropGrad {settings['drop_grad']:g}{other}")
    if settings.get("mgaug"):
        rate = settings.get("mgaug_rate", RunConfig.mgaug_rate)
        number = settings.get("mgaug_networks", RunConfig.mgaug_networks)
        parts.append(f"MGAug {settings['mgaug']} {100 * rate:g}%")
        if number != RunConfig.mgaug_networks:
            parts.append(f"{number} sub-network{'s' if number > 1 else ''}")
    if settings.get("weight_decay"):
        parts.append(f"decay {settings['weight_decay']:g}")
    return ", ".join(parts)
