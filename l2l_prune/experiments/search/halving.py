"""Successive halving on validation tasks, over run folders and the processes of sweeps.

A rung is a length of runs, and a candidate is trained anew for each rung that it reaches. A run
that is stopped halfway through its schedule says nothing about the candidate (two DSD runs of
different rates are identical until the first of them prunes); in a shorter run, phases and the
meta step shrink with the length. A rung ends before the next begins, so that the choice does not
depend on which process was faster, and a search that was killed finds its finished runs in their
folders.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from l2l_prune._basics import checks
from l2l_prune._basics.files import replace_file
from l2l_prune.experiments.config import RunConfig, make_config
from l2l_prune.experiments.report.finished_runs import schedule_rate
from l2l_prune.experiments.running.processes import run_all
from l2l_prune.experiments.running.storage import finished_run, run_name
from l2l_prune.fewshot.evaluation import Mean

REDUCTION = 3
"""One candidate in this many goes on to the next rung, which is this many times longer."""

_MOST_RUNGS, _SHORTEST = 3, 20


@dataclass(frozen=True)
class Candidate:
    """Settings that take part in a race.

    Args:
        settings: Arguments of :func:`~l2l_prune.experiments.config.make_config`, with
            ``algorithm`` and ``method``, for the full length.
    """

    settings: Mapping[str, Any]

    def config(self, iterations: int, held_out: str = "validation") -> RunConfig:
        """The run of ``iterations``."""
        given = {**self.settings, "iterations": iterations, "scale": None, "held_out": held_out}
        return make_config(**given)

    @property
    def whole(self) -> RunConfig:
        """The run of the full length, scored on validation tasks."""
        return make_config(**{**self.settings, "held_out": "validation"})

    @property
    def title(self) -> str:
        """``"RigL, erk 90%"``."""
        config = self.whole
        rate = schedule_rate(config.schedule)
        return config.name if rate in ("-", "per layer") else f"{config.name} {rate}"

    @property
    def ends_sparse(self) -> bool:
        """Whether weights are 0, or channels are cut, at the end."""
        return self.whole.schedule.last.held


@dataclass(frozen=True)
class Standing:
    """The result of a candidate in the longest rung that it reached.

    Attributes:
        candidate: The candidate.
        iterations: The length of that rung.
        entry: Its entry of ``results.json``.
    """

    candidate: Candidate
    iterations: int
    entry: Mapping[str, Any]

    @property
    def score(self) -> Mean:
        """Its scores on the validation tasks."""
        return Mean(tuple(self.entry["test"]["per_task"]), self.candidate.whole.measure)


class Runs:
    """The run folders of a search, and its time limit, which counts over restarts.

    Args:
        folder: Gets a folder for each run; made if missing.
        console: Where progress is shown.
        jobs: Runs at once, one thread each.
        hours: Time limit of the search, which counts until the last finished run.
        clock: The file that records the time taken; all folders of a search share it.

    Raises:
        ValueError: If ``hours`` is not > 0.
    """

    def __init__(
        self, folder: Path, console: Console, *, jobs: int, hours: float | None, clock: Path
    ) -> None:
        if hours is not None:
            checks.number("hours", hours, above=0)
        self.folder, self._console, self._jobs = folder, console, jobs
        self._hours = hours
        self._most = None if hours is None else 3600 * hours
        self._clock, self._started = clock, time.monotonic()
        self._before = 0.0
        if clock.exists():
            try:
                self._before = checks.number("seconds", json.loads(clock.read_text())["seconds"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{clock} is damaged ({error}): delete it, and the time is counted from now"
                ) from None
        self.failed: dict[str, str] = {}

    def beside(self, folder: Path) -> Runs:
        """The same search, with another folder for its runs."""
        return Runs(folder, self._console, jobs=self._jobs, hours=self._hours, clock=self._clock)

    @property
    def seconds(self) -> float:
        """How long the search has taken."""
        return self._before + time.monotonic() - self._started

    def over(self, share: float = 1.0) -> bool:
        """Whether ``share`` of the hours is used up."""
        return self._most is not None and self.seconds >= share * self._most

    def finish(
        self, configs: Sequence[RunConfig], share: float = 1.0
    ) -> list[dict[str, Any] | None]:
        """Train what has not finished, until ``share`` of the hours is used up.

        Returns:
            The entries of ``results.json``; ``None`` where a run failed (see :attr:`failed`) or was
            stopped, in which case it resumes when the search is started again.

        Raises:
            ValueError: If results are damaged.
        """
        unique = {run_name(config): config for config in configs}
        if not self.over(share):
            left = None if self._most is None else share * self._most - self.seconds
            deadline = None if left is None else time.monotonic() + left
            self.folder.mkdir(parents=True, exist_ok=True)
            outcomes = run_all(
                list(unique.values()),
                self.folder,
                self._console,
                jobs=self._jobs,
                deadline=deadline,
            )
            with closing(outcomes):
                for outcome in outcomes:
                    if outcome.error:
                        self.failed[outcome.name] = outcome.error
                    self._save_clock()
            self._save_clock()
        if self.over(share):  # what failed before is not tried again
            for name in unique:
                if (error := self.folder / name / "error.txt").is_file():
                    self.failed.setdefault(name, f"see {error}")
        return [finished_run(self.folder / run_name(config), config) for config in configs]

    def finish_one(self, config: RunConfig, name: str, share: float = 1.0) -> dict[str, Any]:
        """The same for one run that the search cannot do without.

        Raises:
            ValueError: If it failed or was stopped; the message calls it ``name``.
        """
        [entry] = self.finish([config], share)
        if entry is None:
            hours = "the hours were used up; repeat with more hours"
            why = self.failed.get(run_name(config), hours)
            raise ValueError(f"{name} did not finish: {why}")
        return entry

    def _save_clock(self) -> None:
        with replace_file(self._clock) as path:
            path.write_text(json.dumps({"seconds": self.seconds}))


def rungs(candidates: Sequence[Candidate], iterations: int) -> list[int]:
    """The lengths of a race, the full one last: up to three, each a third of the next.

    Lengths that are too short for the phases of a candidate are left out.

    Raises:
        ValueError: If ``iterations`` is too small for a candidate.
    """
    for candidate in candidates:
        candidate.config(iterations)
    lengths = [iterations]
    while len(lengths) < _MOST_RUNGS and (shorter := lengths[0] // REDUCTION) >= _SHORTEST:
        try:
            for candidate in candidates:
                candidate.config(shorter)
        except ValueError:
            break
        lengths.insert(0, shorter)
    return lengths


def race(
    candidates: Sequence[Candidate], lengths: Sequence[int], runs: Runs, share: float = 1.0
) -> list[Standing]:
    """Let the best third of each rung go on to the next.

    If the time runs out during a rung, the rung before it counts; if it is the first, none does.

    Returns:
        All candidates that were scored: those that went furthest first, and among these the best.
    """
    standings: dict[int, Standing] = {}
    left = list(range(len(candidates)))
    for length in lengths:
        entries = runs.finish([candidates[i].config(length) for i in left], share)
        found = {i: e for i, e in zip(left, entries, strict=True) if e is not None}
        names = {i: run_name(candidates[i].config(length)) for i in left}
        failed = [i for i in left if names[i] in runs.failed and i not in found]
        if len(found) + len(failed) < len(left):
            break
        standings |= {i: Standing(candidates[i], length, e) for i, e in found.items()}
        ranked = sorted(found, key=lambda i: -standings[i].score.mean)
        left = ranked[: max(1, math.ceil(len(left) / REDUCTION))]
        if not left:
            break
    return sorted(standings.values(), key=lambda s: (-s.iterations, -s.score.mean))


def check_search(file: Path, settings: Mapping[str, Any]) -> None:
    """Check that a search's settings are those recorded in its folder, if there are any.

    Raises:
        ValueError: If the folder belongs to another search.
    """
    plain = _plain(settings)
    if file.exists():
        try:
            before = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}): choose another folder") from None
        if before != plain:
            differing = [k for k in {**before, **plain} if before.get(k, ...) != plain.get(k, ...)]
            raise ValueError(
                f"{file.parent} holds a search with other settings of {', '.join(differing)}: "
                "choose another folder"
            )


def record_search(file: Path, settings: Mapping[str, Any]) -> None:
    """Record a search's settings in its folder, once they are known to be possible."""
    with replace_file(file) as path:
        path.write_text(json.dumps(_plain(settings), indent=1) + "\n")


def _plain(settings: Mapping[str, Any]) -> Any:
    """As JSON gives them back."""
    return json.loads(json.dumps(dict(settings)))


def base_settings(base: Mapping[str, Any], chosen: Sequence[str]) -> dict[str, Any]:
    """Settings of ``run`` that every candidate shares.

    Args:
        base: What was given; ``None`` is left out.
        chosen: Settings that the search chooses itself.

    Raises:
        ValueError: If one of these was given.
    """
    given = {name: value for name, value in base.items() if value is not None}
    if both := sorted(given.keys() & set(chosen)):
        raise ValueError(f"leave {', '.join(both)} out: the search chooses it")
    return given


def toml_lines(settings: Mapping[str, Any]) -> list[str]:
    """Plain values as lines of TOML, whose strings, numbers and booleans are nearly JSON's.

    TOML has no escapes for halves of a character, and wants one for "delete".
    """
    return [
        f"{name} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f")
        for name, value in settings.items()
    ]
