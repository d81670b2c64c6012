"""Finished runs as a report reads them: settings, methods, scores over seeds."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from l2l_prune._basics import checks
from l2l_prune._basics.tensor_files import DamagedFile, load_tensors
from l2l_prune.experiments.config import RunConfig, file_name
from l2l_prune.experiments.defaults import PICTURE_TASKS, measure_of
from l2l_prune.experiments.report import same_settings
from l2l_prune.experiments.report.seed_statistics import OverSeeds
from l2l_prune.fewshot.evaluation import Measure, paired_difference
from l2l_prune.schedules.paper import Schedule

Key = TypeVar("Key", bound=Hashable)

_SHOWN = ("algorithm", "data", "ways", "shots", "backbone", "channels", "bf16")
"""Settings that appear in titles and columns of tables."""

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Buffers of batch normalisation, which are not parameters."""


Replicate = tuple[int, int | None]
"""Seed and split."""


class WeightsFile:
    """The file of a run's weights at its end; however much is asked of it, it is read once.

    Args:
        path: Where it is, if nobody deleted it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _found(self) -> tuple[str, int | None]:
        """A tensor that is not finite, and how many parameters are not 0; no tensor is kept."""
        if not self.path.is_file():  # who deletes them has seen them
            return "", None
        state = read_weights(self.path)
        for name, value in state.items():
            if not torch.isfinite(value).all():
                return name, None
        return "", count_weights(state)

    @property
    def not_finite(self) -> str:
        """The first tensor that is not finite; empty if all are, or the file is gone.

        Raises:
            ValueError: If the file is damaged.
        """
        return self._found[0]

    @property
    def count(self) -> int | None:
        """How many parameters are not 0; ``None`` if the file is gone or holds none."""
        return self._found[1]


_NO_WEIGHTS = WeightsFile(Path())


@dataclass(frozen=True)
class FinishedRun:
    """A run of ``results.json``.

    Args:
        entry: Its entry in the file.
        folder: The folder of the file.
        usual_iterations: Meta-iterations of most runs in the same setting.
        usual_regularisers: What :attr:`regularisers` are where the method adds none: those that
            all runs in the same setting share, 0 of the others.
        variation: Regularisers and length in words, where they vary among the runs of its table.
        settings: All other settings that vary there, in words.
        special: What else tells it from runs of the same name, in words.
        weights_file: The file of its weights; copies of this object share it.
    """

    entry: dict[str, Any]
    folder: Path
    usual_iterations: int
    usual_regularisers: tuple[float, ...] = (0.0,) * len(same_settings.REGULARISERS)
    variation: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    special: tuple[str, ...] = ()
    weights_file: WeightsFile = _NO_WEIGHTS

    @property
    def config(self) -> dict[str, Any]:
        """The settings, as :meth:`RunConfig.to_json` gives them."""
        config: dict[str, Any] = self.entry["config"]
        return config

    def settings_on_cpu(self) -> RunConfig:
        """The settings to rebuild its network and tasks, wherever it was trained.

        Raises:
            ValueError: If another version wrote settings that this one does not know.
        """
        try:
            return RunConfig.from_json({**self.config, "device": "cpu"})
        except TypeError as error:
            raise ValueError(
                f"{self.folder / 'results.json'} was written by another version ({error})"
            ) from None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What distinguishes it from others of its seed, see :func:`same_settings.identity`."""
        return same_settings.identity(self.config)

    @property
    def measure(self) -> Measure:
        """What its scores measure."""
        return measure_of(str(self.config["algorithm"]))

    @property
    def seed(self) -> int:
        """Seed of weights and tasks."""
        return int(self.config["seed"])

    @property
    def replicate(self) -> Replicate:
        """Seed and split, which runs share to be compared as a pair."""
        return self.seed, self.config.get("split")

    @property
    def shots(self) -> int:
        """Support examples per class at evaluation."""
        return int(self.config["shots"])

    @property
    def regularisers(self) -> tuple[float, ...]:
        """Dropout and weight decay."""
        return tuple(self.identity[name] for name in same_settings.REGULARISERS)

    @property
    def family(self) -> str:
        """The method by the head of its name: ``"dense"``, ``"DSD"``, ``"IHT"``, ``"cubic"`` ..."""
        return str(self.config["name"]).partition(",")[0]

    @property
    def variant(self) -> str:
        """What the name says besides family and regularisers: ``"no retrain"``, or nothing."""
        regularisers = {
            f"{word} {self.identity[n]:g}" for n, word in same_settings.REGULARISERS.items()
        }
        _, *parts = str(self.config["name"]).split(", ")
        return ", ".join(part for part in parts if part not in regularisers)

    @property
    def dense(self) -> bool:
        """Whether it can be a baseline: a dense run, with whatever regularisers."""
        plain = self.family == "dense" and not self.pruned and not self.variant
        return plain and not same_settings.has_rival(self.identity)

    @property
    def plain(self) -> bool:
        """Whether nothing but rate and size differs from the family's default."""
        return (
            not self.variant
            and not self.special
            and self.iterations == self.usual_iterations
            and self.regularisers == self.usual_regularisers
        )

    @property
    def baseline(self) -> bool:
        """Whether others of its setting are compared with it, and it with none."""
        return (
            self.dense
            and self.iterations == self.usual_iterations
            and self.regularisers == self.usual_regularisers
        )

    @cached_property
    def segments(self) -> list[dict[str, Any]]:
        """The segments of the schedule that are not empty."""
        listed = self.config["schedule"]["segments"]
        return [segment for segment in listed if segment["iterations"]]

    @property
    def pruned(self) -> bool:
        """Whether it has a sparse phase."""
        return any(segment["sparse"] for segment in self.segments)

    @property
    def iterations(self) -> int:
        """Meta-iterations of the run."""
        return sum(segment["iterations"] for segment in self.segments)

    @property
    def rate(self) -> float | None:
        """The largest sparsity, 0 for a dense run, ``None`` if it goes by layer."""
        return largest_rate(self.segments)

    @property
    def method(self) -> str:
        """Family, rate and what else is special: ``"DSD 50%, no retrain"``."""
        name = f"{self.family} {rate_in_words(self.rate)}" if self.pruned else self.family
        said = self.variant.split(", ")  # "dropout 0.1 per task" says "dropout 0.1", too
        varying = [part for part in self.variation if not any(s.startswith(part) for s in said)]
        parts = (name, self.variant, *varying, *self.settings, *self.special)
        return ", ".join(part for part in parts if part)

    @property
    def size(self) -> str:
        """The backbone as the paper writes it, and bfloat16 where it computes in that."""
        width = str(self.config["channels"])
        names = {"conv4": "-".join([width] * 4), "resnet12": "ResNet-12"}
        names |= {"siren": f"SIREN {width}", "fourier": f"Fourier features {width}"}
        backbone = names[self.config["backbone"]]
        return f"{backbone}, bf16" if self.config.get("bf16") else backbone

    @property
    def problem(self) -> tuple[str, str, int]:
        """Algorithm, data set and ways."""
        return str(self.config["algorithm"]), str(self.config["data"]), int(self.config["ways"])

    @cached_property
    def shared_settings(self) -> Hashable:
        """What runs must share to be compared, see :func:`same_settings.shared_settings`."""
        return same_settings.frozen(same_settings.shared_settings(self.config))

    @property
    def few_shot(self) -> bool:
        """Whether its tasks have ways and shots."""
        return self.config["algorithm"] not in PICTURE_TASKS

    @property
    def problem_title(self) -> str:
        """The problem in words."""
        algorithm, data, ways = self.problem
        return f"{algorithm} on {data}" + (f", {ways}-way" if self.few_shot else "")

    @property
    def title(self) -> str:
        """The setting in words."""
        shots = f" {self.shots}-shot" if self.few_shot else ""
        return ", ".join((self.problem_title + shots, self.size, *self.settings))

    def check(self) -> None:
        """Check everything that a report reads, while an error can still name the file.

        Raises:
            KeyError: If something is missing.
            TypeError: If something has another type.
            ValueError: If something is no number.
        """
        numbers = self._scores()
        for point in self.entry["curve"]:
            numbers += [point[key] for key in ("iteration", "sparsity")]
        if self.entry.get("weights") is not None:
            numbers.append(self.entry["weights"])
        for value in (*numbers, self.entry["seconds"], self.seed):
            checks.of_type("a number of the results", value, (int, float), "a number")  # type: ignore[arg-type]
            float(value)  # not beyond all floats
        _ = (self.method, hash(self.shared_settings), self.phase_iterations("prune"))
        _ = (self.size, self.measure)

    def _scores(self) -> list[float]:
        points = self.entry["curve"]
        return [
            *(self.entry[part]["mean"] for part in ("train", "test")),
            *(point[part] for point in points for part in ("train", "test")),
        ]

    @property
    def diverged(self) -> str:
        """Says what is not finite in it; empty if everything is finite.

        Accuracies of weights that are not finite are those of chance, and look like a result. What
        l2l_prune writes today cannot be so, but older files can: those are known by that they do
        not say how many weights there are.

        Raises:
            ValueError: If the file of its weights is damaged.
        """
        if not all(map(math.isfinite, self._scores())):
            return "its scores are not finite"
        return self.spoilt_weights if self.entry.get("weights") is None else ""

    @property
    def spoilt_weights(self) -> str:
        """Says what is not finite in the file of its weights; empty if everything is finite.

        Raises:
            ValueError: If the file is damaged.
        """
        name = self.weights_file.not_finite
        return f"its weights are not finite ({name} of {self.weights_file.path.name})" * bool(name)

    @property
    def weights(self) -> int | None:
        """How many of its parameters are not 0 at the end.

        Results of older versions do not say it: then of the file, if that is there.
        """
        recorded: int | None = self.entry.get("weights")
        return self.weights_file.count if recorded is None else recorded

    def phase_iterations(self, phase: str) -> int:
        """Meta-iterations in all segments of a phase."""
        return sum(s["iterations"] for s in self.segments if s["phase"] == phase)


def count_weights(state: Mapping[str, Tensor]) -> int | None:
    """How many parameters of a state dict are not 0; ``None`` if it has none."""
    held = [value for name, value in state.items() if name.rpartition(".")[2] not in _STATISTICS]
    return sum(int(value.count_nonzero()) for value in held) or None


def read_weights(file: Path) -> dict[str, Tensor]:
    """The state dict that a run left.

    Raises:
        ValueError: If the file is damaged.
        OSError: If it cannot be read.
    """
    state = load_tensors(file)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DamagedFile(file, "no state dict")
    return state


def largest_rate(segments: Iterable[dict[str, Any]]) -> float | None:
    """The largest sparsity of segments, 0 without a sparse one, ``None`` if one goes by layer."""
    rates = [s["sparsity"] for s in segments if s["sparse"] and s["iterations"]]
    by_layer = any(s.get("keep") for s in segments if s["sparse"] and s["iterations"])
    if by_layer or any(isinstance(rate, list) for rate in rates):
        return None
    return max(rates, default=0.0)


def rate_in_words(rate: float | None) -> str:
    """``"50%"``, or ``"per layer"``."""
    return "per layer" if rate is None else f"{100 * rate:g}%"


def schedule_rate(schedule: Schedule) -> str:
    """The largest sparsity of a schedule in words, ``"-"`` for a dense one."""
    if not any(segment.sparse for segment in schedule.segments if segment.iterations):
        return "-"
    return rate_in_words(largest_rate(schedule.to_dict()["segments"]))


def read_runs(file: Path) -> list[dict[str, Any]]:
    """The entries of a ``results.json``, each with all that a report reads of it.

    Raises:
        ValueError: If the file or one of weights is damaged, or holds a run that diverged.
    """
    runs = _read(file)
    for run in runs:
        # A run whose weights have been damaged since does not count as finished.
        if why := run.diverged or run.spoilt_weights:
            raise ValueError(f"{file} holds a run that diverged, {why}: delete it and run it again")
    return [run.entry for run in runs]


def _read(file: Path) -> list[FinishedRun]:
    try:
        entries: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["runs"]
        runs = [_finished(entry, file.parent) for entry in entries]
        for run in runs:
            run.check()
        if not runs:
            raise ValueError("it holds no run")
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}): delete it and run it again"
        ) from None
    return runs


def _finished(entry: dict[str, Any], folder: Path) -> FinishedRun:
    weights = WeightsFile(folder / f"{file_name(entry['config']['name'])}.pt")
    return FinishedRun(entry, folder, 0, weights_file=weights)


@dataclass(frozen=True)
class FolderRuns:
    """What a folder holds.

    Args:
        runs: The finished runs, by width and name; of copies one.
        failed: Runs without a result, by name, and why.
        copies: Folders that hold a copy, and of which other folder.
    """

    runs: list[FinishedRun]
    failed: dict[str, str]
    copies: dict[str, str]


def read_folder(folder: Path) -> FolderRuns:
    """The runs in a folder and in its direct subfolders.

    Raises:
        ValueError: If there is none, a ``results.json`` is damaged, or two hold different results
            of the same settings and seed.
    """
    places = [folder, *sorted(path for path in folder.glob("*") if path.is_dir())]
    runs: list[FinishedRun] = []
    failed = {}
    for place in places:
        results, error = place / "results.json", place / "error.txt"
        name = str(place.relative_to(folder))
        if results.is_file():
            for run in _read(results):
                if why := run.diverged:
                    failed[f"{name}: {run.method}, seed {run.seed}"] = why
                else:
                    runs.append(run)
        elif error.is_file():
            lines = error.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            failed[name] = lines[-1] if lines else "it does not say why"
    if not runs and not failed:
        below = sorted({str(file.parent.parent) for file in folder.glob("*/*/results.json")})
        there = f": give {' or '.join(below)}, where there are some" if below else ""
        there = there if folder.is_dir() else ": there is no such folder"
        raise ValueError(f"there is no finished run in {folder}{there}")
    runs, copies = _without_copies(runs, folder)
    in_order = sorted(runs, key=lambda run: int(run.config["channels"]))
    named = [run for same in grouped(in_order, _problem).values() for run in _named(same)]
    return FolderRuns(named, failed, copies)


def _problem(run: FinishedRun) -> Hashable:
    return run.problem


def _without_copies(
    runs: list[FinishedRun], folder: Path
) -> tuple[list[FinishedRun], dict[str, str]]:
    """Each run once, and which folders hold copies; a copied folder is no other seed."""
    kept: dict[Hashable, FinishedRun] = {}
    copies = {}
    for run in runs:
        first = kept.setdefault((same_settings.frozen(run.identity), run.replicate), run)
        if first is run:
            continue
        if any(first.entry[part] != run.entry[part] for part in ("train", "test", "curve")):
            raise ValueError(
                f"{first.folder} and {run.folder} hold different results of {run.method}, seed "
                f"{run.seed}, in the same settings: move the one that is wrong away"
            )
        copies[str(run.folder.relative_to(folder))] = str(first.folder.relative_to(folder))
    return list(kept.values()), copies


def _named(runs: list[FinishedRun]) -> list[FinishedRun]:
    """The runs of one problem, with names that say everything in which they differ."""
    usual = _most([run.iterations for run in runs])
    settings = same_settings.train_shots_aside(
        same_settings.shared_settings(run.config) for run in runs
    )
    varying = [name for name in same_settings.varying(settings) if name not in _SHOWN]
    rivals = [
        name
        for name in same_settings.varying(run.identity for run in runs)
        if name in same_settings.REGULARISERS
    ]
    found = []
    for same in grouped(runs, lambda run: run.shared_settings).values():
        length = _most([run.iterations for run in same])
        shared = tuple(
            values[0] if len(set(values)) == 1 else 0.0
            for values in zip(*(run.regularisers for run in same), strict=True)
        )
        for run in same:
            own = same_settings.shared_settings(run.config)
            words = [same_settings.in_words(n, run.identity[n]) for n in rivals if run.identity[n]]
            if run.iterations != usual:
                words.append(f"{run.iterations} iterations")
            found.append(
                dataclasses.replace(
                    run,
                    usual_iterations=length,
                    usual_regularisers=shared,
                    variation=tuple(words),
                    settings=tuple(same_settings.in_words(n, own[n]) for n in varying if n in own),
                )
            )
    return [run for same in grouped(found, _row).values() for run in _told_apart(same)]


def _row(run: FinishedRun) -> Hashable:
    return run.size, run.method


def _told_apart(runs: list[FinishedRun]) -> list[FinishedRun]:
    """Runs of one name, which say more where they are not the same but for shots and seed."""
    rest = same_settings.train_shots_aside(run.identity for run in runs)
    varying = [name for name in same_settings.varying(rest) if name != "shots"]
    return [
        dataclasses.replace(
            run, special=tuple(same_settings.in_words(n, own[n]) for n in varying if n in own)
        )
        for run, own in zip(runs, rest, strict=True)
    ]


def _most(numbers: list[int]) -> int:
    """The most frequent one, the largest of several."""
    return max(Counter(numbers).items(), key=lambda item: (item[1], item[0]))[0]


def grouped(
    runs: Iterable[FinishedRun], key: Callable[[FinishedRun], Key]
) -> dict[Key, list[FinishedRun]]:
    """Runs by what ``key`` says of them, in the order of their first ones."""
    groups: dict[Key, list[FinishedRun]] = defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return dict(groups)


def over_seeds(runs: Iterable[FinishedRun], part: str) -> OverSeeds:
    """Mean scores of the runs, of one algorithm, on ``"train"`` or ``"test"`` tasks."""
    runs = list(runs)
    return OverSeeds(tuple(run.entry[part]["mean"] for run in runs), runs[0].measure)


def gap_over_seeds(runs: Sequence[FinishedRun]) -> OverSeeds:
    """Training minus test score of each run."""
    return paired_difference(over_seeds(runs, "train"), over_seeds(runs, "test"))


def mean_weights(runs: Sequence[FinishedRun]) -> float | None:
    """Mean number of weights that are not 0; ``None`` where a run's file of weights is gone."""
    numbers = [run.weights for run in runs]
    known = [number for number in numbers if number is not None]
    return sum(known) / len(known) if len(known) == len(numbers) else None


def by_method(runs: Iterable[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """Runs by method: dense first, then as DSD, IHT and by rate."""
    order = ["dense", "DSD", "IHT"]
    ranked = sorted(
        runs,
        key=lambda r: (
            order.index(r.family) if r.family in order else len(order),
            not r.plain,
            r.iterations != r.usual_iterations,
            r.rate or 0.0,
            r.method,
            r.seed,
        ),
    )
    return grouped(ranked, lambda run: run.method)
