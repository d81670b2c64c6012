"""The demo: dense Reptile, DSD and IHT side by side on glyphs."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import l2l_prune
from l2l_prune.data import Glyphs
from l2l_prune.evaluation import Mean, paired_difference, unpaired_difference
from l2l_prune.experiments.files import replace_file
from l2l_prune.experiments.plots import accuracy_curves
from l2l_prune.experiments.run import RunConfig, RunResult
from l2l_prune.experiments.side_by_side import run_side_by_side
from l2l_prune.schedules import DSDSchedule, IHTSchedule, Schedule, Segment


def demo_configs(
    iterations: int, sparsity: float, seed: int, eval_tasks: int = 200
) -> list[RunConfig]:
    """The three runs: the same weights and tasks at the start, other schedules."""
    schedules = {
        "dense": Schedule((Segment(iterations),)),
        "DSD": DSDSchedule.from_fractions(sparsity, iterations),
        "IHT": IHTSchedule.from_fractions(sparsity, iterations),
    }
    return [
        RunConfig(
            name,
            schedule,
            seed,
            eval_every=max(1, iterations // 10),
            curve_tasks=min(12, eval_tasks),
            final_tasks=eval_tasks,
        )
        for name, schedule in schedules.items()
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
        folder: Where ``results.json``, ``curves.png`` and the weights go; made if missing.
        iterations: Meta-iterations of each run.
        sparsity: Fraction pruned in the sparse phases, in (0, 1).
        seed: Seed of weights and tasks.
        eval_tasks: Tasks behind each accuracy of the table.
        console: Where progress and table are printed.

    Returns:
        The results of dense, DSD and IHT.
    """
    configs = demo_configs(iterations, sparsity, seed, eval_tasks)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with console.status("rendering glyphs (first time only)"):
        Glyphs("train")
    config = configs[0]
    console.print(
        f"{config.ways}-way {config.shots}-shot, {config.channels} channels, "
        f"{config.train_classes} training characters, {iterations} meta-iterations, seed {seed}"
    )
    results = run_side_by_side(configs, console)
    console.print(results_table(configs, results))
    for line in verdicts(results):
        console.print(line)
    write_results(folder, configs, results)
    console.print(f"wrote {folder}/ in {time.perf_counter() - started:.0f} s in all")
    return results


def results_table(configs: list[RunConfig], results: list[RunResult]) -> Table:
    """Method, sparsity, train and test accuracy, gap (each with 95% CI over tasks), seconds."""
    tasks = configs[0].final_tasks
    table = Table(title=f"accuracy [%], mean ± 95% CI over {tasks} tasks")
    for header in ("method", "sparsity", "train", "test", "gap", "seconds"):
        table.add_column(header, justify="left" if header == "method" else "right")
    for config, result in zip(configs, results, strict=True):
        gap, width = unpaired_difference(result.train, result.test)
        rates = [segment.sparsity_label for segment in config.schedule.segments if segment.sparse]
        table.add_row(
            result.name,
            rates[-1] if rates else "-",
            str(result.train),
            str(result.test),
            f"{100 * gap:.1f} ± {100 * width:.1f}",
            f"{result.seconds:.0f}",
        )
    return table


def verdicts(results: list[RunResult]) -> list[str]:
    """What the table says about pruning: paired differences to dense on the shared tasks."""
    dense, *others = results
    lines = []
    for other in others:
        difference = paired_difference(other.test, dense.test)
        word = _word(difference)
        lines.append(f"{other.name} - dense on test tasks: {_signed(difference)} ({word})")
    if not any(
        paired_difference(o.test, dense.test).significant
        and paired_difference(o.test, dense.test).mean > 0
        for o in others
    ):
        lines.append("In so short a run (one seed), pruning did not raise test accuracy.")
    else:
        lines.append("One seed only: the intervals are over tasks, not over training runs.")
    return lines


def write_results(folder: Path, configs: list[RunConfig], results: list[RunResult]) -> None:
    """Write ``results.json``, ``curves.png`` and each method's weights as a plain state dict."""
    document = {
        "l2l_prune": l2l_prune.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "runs": [_as_json(c, r) for c, r in zip(configs, results, strict=True)],
    }
    for result in results:
        with replace_file(folder / f"{result.name.lower()}.pt") as path:
            torch.save(result.weights, path)
    accuracy_curves(configs, results, folder / "curves.png")
    with replace_file(folder / "results.json") as path:
        path.write_text(json.dumps(document, indent=1) + "\n")


def _as_json(config: RunConfig, result: RunResult) -> dict[str, Any]:
    settings = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name != "schedule"
    }
    return {
        "config": {**settings, "schedule": config.schedule.to_dict()},
        "train": _mean_json(result.train),
        "test": _mean_json(result.test),
        "seconds": result.seconds,
        "curve": [
            {
                "iteration": point.iteration,
                "phase": point.phase,
                "sparsity": point.sparsity,
                "train": point.train.mean,
                "test": point.test.mean,
            }
            for point in result.curve
        ],
    }


def _mean_json(mean: Mean) -> dict[str, Any]:
    return {"mean": mean.mean, "ci95": mean.ci95, "per_task": list(mean.values)}


def _signed(difference: Mean) -> str:
    return f"{100 * difference.mean:+.1f} ± {100 * difference.ci95:.1f}"


def _word(difference: Mean) -> str:
    if not difference.significant:
        return "not significant"
    return "significant over tasks: " + ("better" if difference.mean > 0 else "worse")
