"""Methods side by side for one seed: their table and curves."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from l2l_prune.experiments.config import RunConfig
from l2l_prune.experiments.report.plots import run_curves
from l2l_prune.experiments.report.results import (
    conclusions,
    read_result,
    results_table,
    write_curves,
)
from l2l_prune.experiments.run_result import RunResult
from l2l_prune.experiments.running.processes import finish_all
from l2l_prune.experiments.running.storage import locked_folder, run_name


def compare_one_seed(
    configs: list[RunConfig],
    folder: Path,
    console: Console,
    jobs: int | None = None,
    logger: str | None = None,
    controls: Mapping[str, str] | None = None,
) -> list[RunResult]:
    """Run the methods that have not finished yet; print the table and write the files.

    Args:
        configs: The runs, of one seed; their names differ.
        folder: Gets a folder for each run, and ``curves.csv`` and ``curves.png`` of all; made if
            missing.
        console: Where progress and table are printed.
        jobs: Runs at once; all by default.
        logger: Also write each run's curves into its folder: a key of
            :data:`~l2l_prune.experiments.running.loggers.LOGGERS`.
        controls: The names of methods, and of what to compare each with besides dense.

    Returns:
        The results in the order of ``configs``, without weights, which are in the folders.

    Raises:
        RunFailed: If a run failed; the others are stopped, and resume when started again.
        ValueError: If another process writes to ``folder``, or results in it are damaged.
    """
    started = time.perf_counter()
    config = configs[0]
    sizes = {"conv4": f"{config.channels} channels", "resnet12": "resnet12"}
    size = sizes.get(config.backbone, f"{config.backbone} of {config.channels} neurons a layer")
    classes = "all" if config.train_classes is None else config.train_classes
    tasks = "one picture" if config.picture_tasks else f"{config.ways}-way {config.shots}-shot"
    with locked_folder(folder):
        console.print(
            f"{config.algorithm} on {config.data}: {tasks}, {size}, "
            f"{classes} training classes, {config.schedule.iterations} meta-iterations, "
            f"seed {config.seed}"
        )
        entries = finish_all(configs, folder, console, jobs=jobs, logger=logger)
        results = [
            read_result(entry, folder / run_name(config) / "results.json")
            for config, entry in zip(configs, entries, strict=True)
        ]
        console.print(results_table(configs, results, [e.get("weights") for e in entries]))
        for line in conclusions(results, controls, config.held_out):
            console.print(line, markup=False)
        write_curves(results, folder / "curves.csv")
        run_curves(configs, results, folder / "curves.png")
    seconds = time.perf_counter() - started
    console.print(f"wrote {folder}/ in {seconds:.0f} s in all", markup=False)
    return results
