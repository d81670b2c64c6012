"""Many runs over a grid of settings, on this machine or a cluster."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from l2l_prune._basics import checks
from l2l_prune.experiments.config import KNOWN, RunConfig, make_config
from l2l_prune.experiments.report.comparisons import Comparison, both_sides, nameable
from l2l_prune.experiments.report.finished_runs import FinishedRun
from l2l_prune.experiments.running.processes import run_all
from l2l_prune.experiments.running.run_folder import Outcome
from l2l_prune.experiments.running.storage import locked_folder, run_name
from l2l_prune.experiments.toml_files import with_new_names

MOST_RUNS = 100_000
FIRST_REPLICATE = 100
"""Seeds and splits of replicates start here: runs that choose something use those below."""


def expand(base: dict[str, Any], grid: dict[str, Any] | list[dict[str, Any]]) -> list[RunConfig]:
    """Every combination of the grid's values over the base settings.

    Args:
        base: Arguments of :func:`make_config`.
        grid: Lists of values for the same arguments; ``seeds = 3`` is short for
            ``seed = [0, 1, 2]``, and ``replicates = 8`` for seeds 100 to 107, each with the split
            of its number. Several grids give all combinations of each.

    Returns:
        The runs, the first seed of all methods first; identical runs (a dense run at several
        sparsities) only once.

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
        checks.of_type(name, table, dict, "a table")
    if not grids:
        raise ValueError("grid must not be empty")
    configs = [config for one in grids for config in _combinations(base, one)]
    unique = {run_name(config): config for config in configs}.values()
    return sorted(unique, key=lambda config: config.seed)


def _combinations(base: dict[str, Any], grid: dict[str, Any]) -> list[RunConfig]:
    if lists := sorted(name for name, value in base.items() if isinstance(value, list)):
        raise TypeError(f"{', '.join(lists)} of [base] must be one value: lists belong in [grid]")
    base, grid = with_new_names(base), with_new_names(grid)
    axes: dict[str, Sequence[Any]] = {
        name: value if isinstance(value, list) else [value] for name, value in grid.items()
    }
    for name, values in axes.items():
        if any(isinstance(value, (list, dict)) for value in values):
            raise TypeError(f"{name} must list single values, got {list(values)}")
    if "seeds" in axes:
        axes["seed"] = _numbered("seeds", grid, ("seed", "replicates"))
        del axes["seeds"]
    if "replicates" in axes:
        numbers = _numbered("replicates", grid, ("seed", "split"))
        axes["replicates"] = [FIRST_REPLICATE + number for number in numbers]
    if empty := sorted(name for name, values in axes.items() if not values):
        raise ValueError(f"{', '.join(empty)} must not be empty: leave it out to use its default")
    size = math.prod(len(values) for values in axes.values())
    if size > MOST_RUNS:
        raise ValueError(f"the grid has {size} runs, more than the limit of {MOST_RUNS}")
    given = base.keys() | axes.keys() - {"replicates"}
    known = KNOWN | {"algorithm", "method"}
    if unknown := sorted(given - known):
        near = {n for name in unknown for n in difflib.get_close_matches(name, known)}
        words = f"did you mean {' or '.join(sorted(near))}?" if near else "see l2l-prune run --help"
        raise ValueError(f"there is no setting {', '.join(unknown)}: {words}")
    if missing := sorted({"algorithm", "method"} - given):
        raise ValueError(f"{' and '.join(missing)} must be given in [base] or [grid]")
    combinations = [
        base | dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
    ]
    if "replicates" in axes:
        for settings in combinations:
            settings["seed"] = settings["split"] = settings.pop("replicates")
    return [make_config(**settings) for settings in combinations]


def _numbered(name: str, grid: dict[str, Any], instead: Sequence[str]) -> range:
    """0 up to the number that ``grid[name]`` gives, which has no place beside ``instead``."""
    number = grid[name]
    if isinstance(number, list):
        raise TypeError(
            f"{name} must be an integer, got {number}: to list seeds, write seed = {number}"
        )
    if both := [other for other in instead if other in grid]:
        raise ValueError(f"give {name} or {both[0]}, not both")
    return range(checks.whole_number(name, number, least=1))


def check_arms(configs: Sequence[RunConfig], comparisons: Sequence[Comparison]) -> list[str]:
    """Refuse comparisons of runs that a sweep will not have, before it trains for hours.

    Args:
        configs: The runs of the sweep.
        comparisons: What its file states.

    Returns:
        Settings that comparisons name and no run has: they are those of scores that another program
        adds, or slips. They do not count here.

    Raises:
        ValueError: If a side has no run, or two of one replicate.
    """
    runs = [
        FinishedRun({"config": config.to_json()}, Path(run_name(config)), 0) for config in configs
    ]
    known, unknown = {name for run in runs for name in nameable(run)}, set[str]()
    for one in comparisons:
        sides = (one.treatment, one.control)
        unknown |= {name for side in sides for name in side} - known
        treatment, control = ({n: v for n, v in side.items() if n in known} for side in sides)
        both_sides(dataclasses.replace(one, treatment=treatment, control=control), runs)
    return sorted(unknown)


def sweep(
    configs: list[RunConfig],
    folder: Path,
    console: Console,
    *,
    jobs: int | None = 2,
    cluster: str | None = None,
    logger: str | None = None,
) -> list[Outcome]:
    """Run what has not finished yet; a run that fails does not stop the others.

    A stopped sweep resumes from the runs' checkpoints when it is started again.

    Args:
        configs: The runs.
        folder: Gets a folder for each.
        console: Gets a line for each finished run, with its accuracies and the time left.
        jobs: Runs at once, one thread each; all with ``None``.
        cluster: Hand the runs to submitit: ``"local"`` or ``"slurm"``.
        logger: Also write each run's curves into its folder: a key of
            :data:`~l2l_prune.experiments.running.loggers.LOGGERS`.

    Returns:
        The outcomes, in the order of ``configs``.

    Raises:
        ImportError: If ``cluster`` is given and submitit is missing.
        ValueError: If another process writes to ``folder``, or results in it are damaged.
    """
    with locked_folder(folder):
        outcomes = run_all(configs, folder, console, jobs=jobs, cluster=cluster, logger=logger)
        ended = {outcome.name: outcome for outcome in outcomes}
    return [ended[run_name(config)] for config in configs]
