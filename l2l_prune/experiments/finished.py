"""Finished runs as a report reads them: settings, methods, accuracies over seeds."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from l2l_prune import _values
from l2l_prune.evaluation import paired_difference
from l2l_prune.experiments.over_seeds import OverSeeds

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class FinishedRun:
    """A run of ``results.json``.

    Args:
        entry: Its entry in the file.
        folder: The folder of the file, where its weights are too.
        usual_iterations: Meta-iterations of most runs in the same setting; others say theirs in
            :attr:`method`.
    """

    entry: dict[str, Any]
    folder: Path
    usual_iterations: int

    @property
    def config(self) -> dict[str, Any]:
        """The settings, as :meth:`RunConfig.to_json` gives them."""
        config: dict[str, Any] = self.entry["config"]
        return config

    @property
    def seed(self) -> int:
        """Seed of weights and tasks."""
        return int(self.config["seed"])

    @property
    def shots(self) -> int:
        """Support examples of a class at evaluation."""
        return int(self.config["shots"])

    @property
    def family(self) -> str:
        """The method by the head of its name: ``"dense"``, ``"DSD"``, ``"IHT"``, ``"cubic"`` ..."""
        return str(self.config["name"]).partition(",")[0]

    @property
    def plain(self) -> bool:
        """Whether nothing but rate and size differs from the family's default."""
        return self.config["name"] == self.family and self.iterations == self.usual_iterations

    @cached_property
    def segments(self) -> list[dict[str, Any]]:
        """The segments of the schedule that are not empty."""
        listed = self.config["schedule"]["segments"]
        return [segment for segment in listed if segment["iterations"]]

    @property
    def iterations(self) -> int:
        """Meta-iterations of the run."""
        return sum(segment["iterations"] for segment in self.segments)

    @property
    def rate(self) -> float | None:
        """The largest sparsity, 0 for a dense run, ``None`` if it goes by layer."""
        rates = [segment["sparsity"] for segment in self.segments if segment["sparse"]]
        return None if any(isinstance(r, list) for r in rates) else max(rates, default=0.0)

    @property
    def method(self) -> str:
        """Family, rate and what else is special: ``"DSD 50%, no retrain"``."""
        family, comma, rest = str(self.config["name"]).partition(",")
        if any(segment["sparse"] for segment in self.segments):
            family += " per layer" if self.rate is None else f" {100 * self.rate:g}%"
        name = family + comma + rest
        if self.iterations != self.usual_iterations:
            name += f", {self.iterations} iterations"
        return name

    @property
    def size(self) -> str:
        """The backbone as the paper writes it, and bfloat16 where it computes in that."""
        conv4 = "-".join([str(self.config["channels"])] * 4)
        backbone = conv4 if self.config["backbone"] == "conv4" else "ResNet-12"
        return f"{backbone}, bf16" if self.config.get("bf16") else backbone

    @property
    def problem(self) -> tuple[str, str, int]:
        """Algorithm, data set and ways."""
        return str(self.config["algorithm"]), str(self.config["data"]), int(self.config["ways"])

    @property
    def setting(self) -> tuple[str, str, int, str, int]:
        """What runs must share to be compared: problem, size and shots."""
        return (*self.problem, self.size, self.shots)

    @property
    def title(self) -> str:
        """The setting in words."""
        algorithm, data, ways, size, shots = self.setting
        return f"{algorithm} on {data}, {ways}-way {shots}-shot, {size}"

    def check(self) -> None:
        """Touch all that a report reads, so that damage shows where it can still be named.

        Raises:
            KeyError: If something is missing.
            TypeError: If something has another type.
            ValueError: If something is no number.
        """
        numbers = [self.entry[part]["mean"] for part in ("train", "test")]
        for point in self.entry["curve"]:
            numbers += [point[key] for key in ("iteration", "sparsity", "train", "test")]
        for value in (*numbers, self.entry["seconds"], self.seed):
            _values.instance("a number of the results", value, (int, float), "a number")  # type: ignore[arg-type]
        _ = (self.method, self.setting, self.phase_iterations("prune"))

    def phase_iterations(self, phase: str) -> int:
        """Meta-iterations in all segments of a phase."""
        return sum(s["iterations"] for s in self.segments if s["phase"] == phase)


def read_runs(file: Path) -> list[dict[str, Any]]:
    """The entries of a ``results.json``, each with all that a report reads of it.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        runs: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["runs"]
        for run in runs:
            FinishedRun(run, file.parent, 0).check()
        if not runs:
            raise ValueError("it holds no run")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}): delete it and run it again"
        ) from None
    return runs


def collect(folder: Path) -> list[FinishedRun]:
    """The finished runs below a folder, by width and name.

    Raises:
        ValueError: If there is none, or a ``results.json`` is damaged.
    """
    entries: list[tuple[dict[str, Any], Path]] = []
    for file in sorted(folder.glob("*/results.json")):
        entries += [(entry, file.parent) for entry in read_runs(file)]
    if not entries:
        raise ValueError(f"there is no finished run in {folder}")
    lengths: dict[Hashable, Counter[int]] = defaultdict(Counter)
    for entry, place in entries:
        run = FinishedRun(entry, place, 0)
        lengths[run.setting][run.iterations] += 1
    runs = []
    for entry, place in sorted(entries, key=lambda item: int(item[0]["config"]["channels"])):
        run = FinishedRun(entry, place, 0)
        usual = max(lengths[run.setting].items(), key=lambda item: (item[1], item[0]))[0]
        runs.append(FinishedRun(entry, place, usual))
    return runs


def grouped(
    runs: Iterable[FinishedRun], key: Callable[[FinishedRun], Key]
) -> dict[Key, list[FinishedRun]]:
    """Runs by what ``key`` says of them, in the order of their first ones."""
    groups: dict[Key, list[FinishedRun]] = defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return dict(groups)


def over_seeds(runs: Iterable[FinishedRun], part: str) -> OverSeeds:
    """Mean accuracies of the runs on ``"train"`` or ``"test"`` tasks."""
    return OverSeeds(tuple(run.entry[part]["mean"] for run in runs))


def gap_over_seeds(runs: Sequence[FinishedRun]) -> OverSeeds:
    """Training minus test accuracy of each run."""
    return paired_difference(over_seeds(runs, "train"), over_seeds(runs, "test"))


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
