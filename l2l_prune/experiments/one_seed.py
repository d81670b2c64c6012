"""Methods of one seed side by side: their table, curves and weights."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from rich.console import Console

from l2l_prune.experiments.config import RunConfig
from l2l_prune.experiments.results import results_table, verdicts, write_results
from l2l_prune.experiments.run import RunResult
from l2l_prune.experiments.side_by_side import run_side_by_side


def run_and_report(
    configs: list[RunConfig],
    folder: Path,
    console: Console,
    jobs: int | None = None,
    checkpoints: Path | None = None,
    events: Path | None = None,
) -> list[RunResult]:
    """Run methods of one seed side by side; print the table, write the files.

    Args:
        configs: The runs; their names differ.
        folder: Where ``results.json``, ``curves.png`` and the weights go; made if missing.
        console: Where progress and table are printed.
        jobs: Runs at once; all by default.
        checkpoints: If given, runs keep their state in this folder and go on from it; it is
            deleted at the end.
        events: Folder for TensorBoard's event files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    config = configs[0]
    size = config.backbone if config.backbone != "conv4" else f"{config.channels} channels"
    classes = "all" if config.train_classes is None else config.train_classes
    console.print(
        f"{config.algorithm} on {config.data}: {config.ways}-way {config.shots}-shot, {size}, "
        f"{classes} training classes, {config.schedule.iterations} meta-iterations, "
        f"seed {config.seed}"
    )
    results = run_side_by_side(configs, console, jobs=jobs, checkpoints=checkpoints, events=events)
    console.print(results_table(configs, results))
    for line in verdicts(results):
        console.print(line)
    write_results(folder, configs, results)
    if checkpoints is not None:
        shutil.rmtree(checkpoints, ignore_errors=True)
    console.print(f"wrote {folder}/ in {time.perf_counter() - started:.0f} s in all")
    return results
