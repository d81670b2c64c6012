"""Many runs over a grid of settings, on this machine (joblib) or a cluster (submitit)."""

from __future__ import annotations

import datetime
import functools
import itertools
import math
import os
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError
from rich.console import Console

from l2l_prune import _values
from l2l_prune.experiments.checkpoint import remove_checkpoint
from l2l_prune.experiments.config import KNOWN, RunConfig, make_config
from l2l_prune.experiments.results import write_results
from l2l_prune.experiments.run import RunResult, run
from l2l_prune.experiments.storage import finished_run, locked_folder, run_name

MOST_RUNS = 100_000


def expand(base: dict[str, Any], grid: dict[str, Any] | list[dict[str, Any]]) -> list[RunConfig]:
    """Every combination of the grid's values over the base settings.

    Args:
        base: Arguments of :func:`make_config`.
        grid: Lists of values for the same; ``seeds = 3`` is short for ``seed = [0, 1, 2]``. Of
            several grids, all combinations of each.

    Returns:
        The runs, the first seed of all methods first; those that differ in nothing (a dense run at
        several sparsities) only once.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a setting is unknown or not possible.

    Examples:
        >>> grid = {"method": ["dense", "dsd"], "sparsity": [0.3, 0.5], "seeds": 2}
        >>> len(expand({"algorithm": "reptile"}, grid))
        6
    """
    grids = grid if isinstance(grid, list) else [grid]
    for name, table in (("base", base), *(("grid", one) for one in grids)):
        _values.instance(name, table, dict, "a table")
    configs = [config for one in grids for config in _combinations(base, one)]
    unique = {run_name(config): config for config in configs}.values()
    return sorted(unique, key=lambda config: config.seed)


def _combinations(base: dict[str, Any], grid: dict[str, Any]) -> list[RunConfig]:
    base, grid = _with_method(base), _with_method(grid)
    axes: dict[str, Sequence[Any]] = {
        name: value if isinstance(value, list) else [value] for name, value in grid.items()
    }
    if "seeds" in axes:
        axes["seed"] = _seeds(grid)
        del axes["seeds"]
    if empty := sorted(name for name, values in axes.items() if not values):
        raise ValueError(f"{', '.join(empty)} must not be empty: leave it out for its default")
    size = math.prod(len(values) for values in axes.values())
    if size > MOST_RUNS:
        raise ValueError(f"the grid has {size} runs, and {MOST_RUNS} are the most")
    given = base.keys() | axes.keys()
    known = KNOWN | {"algorithm", "method"}
    if unknown := sorted(given - known):
        raise ValueError(f"there is no setting {', '.join(unknown)}; there are {sorted(known)}")
    if missing := sorted({"algorithm", "method"} - given):
        raise ValueError(f"{' and '.join(missing)} must be given in [base] or [grid]")
    return [
        make_config(**base | dict(zip(axes, values, strict=True)))
        for values in itertools.product(*axes.values())
    ]


def _with_method(table: dict[str, Any]) -> dict[str, Any]:
    """``schedule`` is the old name of ``method``."""
    if "schedule" not in table:
        return table
    if "method" in table:
        raise ValueError("give method or schedule (its old name), not both")
    return {"method" if name == "schedule" else name: value for name, value in table.items()}


def _seeds(grid: dict[str, Any]) -> range:
    number = grid["seeds"]
    if isinstance(number, list):
        raise TypeError(
            f"seeds must be an integer, got {number}: to list them write seed = {number}"
        )
    if "seed" in grid:
        raise ValueError("give seeds or seed, not both")
    return range(_values.count("seeds", number, least=1))


@dataclass(frozen=True)
class Outcome:
    """How a run of a sweep ended: ``error`` is ``None``, or what went wrong in a line."""

    name: str
    error: str | None
    train: float = math.nan
    test: float = math.nan

    def __str__(self) -> str:
        if self.error:
            return f"{self.name}: {self.error}"
        return f"{self.name}: train {100 * self.train:.1f}, test {100 * self.test:.1f}"


def sweep(
    configs: list[RunConfig],
    folder: Path,
    console: Console,
    *,
    jobs: int = 2,
    cluster: str | None = None,
    tensorboard: bool = False,
) -> list[Outcome]:
    """Run what has not ended yet; each run writes its own folder as the demo does.

    A run that fails leaves ``error.txt`` in its folder and does not stop the others. A sweep that
    was stopped goes on from the runs' checkpoints when it is started again.

    Args:
        configs: The runs.
        folder: Gets a folder for each.
        console: Gets a line for each run that ends, with its accuracies and the time left.
        jobs: Runs at once, one thread each.
        cluster: Hand the runs to submitit instead of joblib: ``"local"`` or ``"slurm"``.
        tensorboard: Write TensorBoard's event files into each run's folder.

    Returns:
        The outcomes, in the order of ``configs``.

    Raises:
        ImportError: If ``cluster`` is given and submitit is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    waiting = [c for c in configs if finished_run(folder / run_name(c), c) is None]
    ended = {run_name(c): Outcome(run_name(c), None) for c in configs if c not in waiting}
    for name in ended:  # killed between its result and the end of its checkpoint
        remove_checkpoint(folder / name / "checkpoint.pt")
    if ended:
        console.print(f"{len(ended)} of {len(configs)} runs had ended before")
    work = functools.partial(run_into, folder=folder, tensorboard=tensorboard)
    if cluster:
        engine = _submitted(work, waiting, folder / "jobs", jobs, cluster)
    else:
        engine = _local(functools.partial(work, parent=os.getpid()), waiting, jobs)
    started, before = time.monotonic(), len(ended)
    for outcome in engine:
        ended[outcome.name] = outcome
        pace = (time.monotonic() - started) / (len(ended) - before)
        left = datetime.timedelta(seconds=round(pace * (len(configs) - len(ended))))
        console.print(
            f"{len(ended)}/{len(configs)} {outcome} ({left} left)", markup=False, highlight=False
        )
    return [ended[run_name(config)] for config in configs]


def run_into(
    config: RunConfig, folder: Path, tensorboard: bool = False, parent: int | None = None
) -> Outcome:
    """One run with its files in ``folder / run_name(config)``; never raises for a failed run.

    Args:
        config: The run.
        folder: The sweep's folder.
        tensorboard: Also write TensorBoard's event files.
        parent: Process id of the sweep; a run in another process ends when that is gone, and
            leaves its checkpoint for the next sweep.
    """
    torch.set_num_threads(1)
    name = run_name(config)
    place = folder / name
    try:
        with locked_folder(place):
            (place / "error.txt").unlink(missing_ok=True)
            events = place / "tensorboard" if tensorboard else None
            for message in run(config, place / "checkpoint.pt", events=events):
                if parent not in (None, os.getpid(), os.getppid()):
                    return Outcome(name, "its sweep was killed")
                if isinstance(message, RunResult):
                    write_results(place, [config], [message])
                    outcome = Outcome(name, None, message.train.mean, message.test.mean)
            remove_checkpoint(place / "checkpoint.pt")
    except Exception as error:
        with suppress(OSError):  # on a full disk, say: the outcome tells it too
            (place / "error.txt").write_text(traceback.format_exc())
        return Outcome(name, f"{type(error).__name__}: {error}")
    return outcome


Work = Callable[[RunConfig], Outcome]


def _local(work: Work, configs: list[RunConfig], jobs: int) -> Iterable[Outcome]:
    left = {run_name(config): config for config in configs}
    while left:
        before = len(left)
        engine = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1)
        try:
            for outcome in engine(joblib.delayed(work)(c) for c in list(left.values())):
                del left[outcome.name]
                yield outcome
        except TerminatedWorkerError:  # killed from outside, say for its memory
            if len(left) == before:  # nothing ended since the last time: do not go round for ever
                for name in left:
                    yield Outcome(name, "its process was killed (out of memory?)")
                return


def _submitted(
    work: Work, configs: list[RunConfig], folder: Path, jobs: int, cluster: str
) -> Iterable[Outcome]:
    try:
        import submitit
    except ImportError as error:
        raise ImportError(f'{error}; --cluster needs: pip install "l2l-prune[cluster]"') from None
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    executor.update_parameters(
        timeout_min=3 * 24 * 60, cpus_per_task=1, slurm_array_parallelism=jobs
    )
    handed = executor.map_array(work, configs)
    for config, job in zip(configs, handed, strict=True):
        try:
            yield job.result()
        except Exception as error:  # the job itself died
            yield Outcome(run_name(config), f"{type(error).__name__}: {error}".splitlines()[0])
