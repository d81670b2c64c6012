"""The demo: dense Reptile, DSD and IHT side by side on glyphs."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from l2l_prune.experiments.config import RunConfig, make_config
from l2l_prune.experiments.running.compare_one_seed import compare_one_seed
from l2l_prune.experiments.running.run import RunResult
from l2l_prune.fewshot.data import Glyphs


def demo_configs(
    iterations: int, sparsity: float, seed: int, eval_tasks: int = 200
) -> list[RunConfig]:
    """The three runs: they share initial weights and tasks, and differ in their schedules."""
    return [
        make_config(
            "reptile",
            schedule,
            iterations=iterations,
            sparsity=sparsity,
            seed=seed,
            final_tasks=eval_tasks,
        )
        for schedule in ("dense", "dsd", "iht")
    ]


def run_demo(
    folder: Path,
    *,
    iterations: int,
    sparsity: float,
    seed: int,
    eval_tasks: int,
    console: Console,
) -> list[RunResult]:
    """Train, print the table, write the files.

    Args:
        folder: Gets a folder of results and weights for each run, and ``curves.png`` of all; made
            if missing.
        iterations: Meta-iterations of each run.
        sparsity: Fraction pruned in the sparse phases, in (0, 1).
        seed: Seed of weights and tasks.
        eval_tasks: Tasks behind each accuracy of the table.
        console: Where progress and table are printed.

    Returns:
        The results of dense, DSD and IHT.
    """
    configs = demo_configs(iterations, sparsity, seed, eval_tasks)
    with console.status("rendering glyphs (first time only)"):
        Glyphs("train")
    return compare_one_seed(configs, folder, console)
