"""The output of finished runs, for people and programs: table, conclusions, files."""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import JustifyMethod
from rich.markup import escape
from rich.table import Table

import l2l_prune
from l2l_prune._basics.files import replace_file
from l2l_prune._basics.tensor_files import save_tensors
from l2l_prune.experiments.config import RunConfig, file_name
from l2l_prune.experiments.defaults import measure_of
from l2l_prune.experiments.report.finished_runs import schedule_rate
from l2l_prune.experiments.report.plots import run_curves
from l2l_prune.experiments.report.seed_statistics import signed
from l2l_prune.experiments.run_result import Point, RunResult
from l2l_prune.fewshot.evaluation import Mean, paired_difference, tenths, unpaired_difference


def results_table(
    configs: list[RunConfig], results: list[RunResult], weights: list[int | None]
) -> Table:
    """Method, sparsity, weights, train and test score, gap (with 95% CI over tasks), seconds.

    Args:
        configs: The runs.
        results: What came out, in the same order.
        weights: How many weights of each are not 0 at the end; ``None`` where unknown.
    """
    tasks, measure = configs[0].final_tasks, configs[0].measure
    # Escaped: [dB] would be markup.
    table = Table(title=f"{escape(str(measure))}, mean ± 95% CI over {tasks} tasks")
    held_out = configs[0].held_out
    for header in ("method", "sparsity", "weights", "train", held_out, "gap", "seconds"):
        justify: JustifyMethod = "left" if header == "method" else "right"
        table.add_column(header, justify=justify, overflow="fold")  # no digit is left out
    for config, result, size in zip(configs, results, weights, strict=True):
        gap, width = unpaired_difference(result.train, result.test)
        table.add_row(
            result.name,
            schedule_rate(config.schedule),
            "" if size is None else f"{size:,}",
            str(result.train),
            str(result.test),
            f"{tenths(measure.read(gap))} ± {tenths(measure.read(width))}",
            f"{result.seconds:.0f}",
        )
    return table


def conclusions(
    results: list[RunResult],
    controls: Mapping[str, str] | None = None,
    held_out: str = "test",
) -> list[str]:
    """What the table says about pruning: paired differences of test scores.

    Args:
        results: Dense first: all others are compared with it.
        controls: The names of methods, and of what to compare each with besides dense.
        held_out: What the classes of the scores are called.
    """
    dense, *others = results
    if dense.name.partition(",")[0] != "dense" or not others:
        return []
    named = {result.name: result for result in results}
    pairs = [(other, dense) for other in others]
    pairs += [(named[name], named[control]) for name, control in (controls or {}).items()]
    found = [(a.name, b.name, paired_difference(a.test, b.test)) for a, b in pairs]
    lines = [f"{a} - {b} on {held_out} tasks: {signed(d)} ({_word(d)})" for a, b, d in found]
    to_dense = [difference for _, _, difference in found[: len(others)]]
    if any(difference.significant and difference.mean > 0 for difference in to_dense):
        lines.append("One seed only: the intervals are over tasks, not over training runs.")
    else:
        word = " significantly" if any(difference.mean > 0 for difference in to_dense) else ""
        lines.append(
            f"In this run (one seed), pruning did not raise {held_out} "
            f"{dense.test.measure.name}{word} above that of dense."
        )
    return lines


def write_results(folder: Path, configs: list[RunConfig], results: list[RunResult]) -> None:
    """Write ``results.json``, ``curves.csv``, ``curves.png`` and the weights as state dicts.

    ``results.json`` comes last: where it stands, the others do.
    """
    document = {
        "l2l_prune": l2l_prune.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "runs": [_as_json(c, r) for c, r in zip(configs, results, strict=True)],
    }
    for result in results:
        save_tensors(result.weights, folder / f"{file_name(result.name)}.pt")
    write_curves(results, folder / "curves.csv")
    run_curves(configs, results, folder / "curves.png")
    with replace_file(folder / "results.json") as path:
        path.write_text(json.dumps(document, indent=1) + "\n")


def read_result(entry: dict[str, Any], file: Path) -> RunResult:
    """A run's result from its entry of ``results.json``, without its weights.

    Args:
        entry: The entry.
        file: Where it is from, for messages.

    Raises:
        ValueError: If the entry is damaged.
    """

    def mean(values: list[float]) -> Mean:
        return Mean(tuple(map(float, values)), measure)

    try:
        measure = measure_of(entry["config"]["algorithm"])
        curve = [
            Point(
                point["iteration"],
                point["phase"],
                point["sparsity"],
                mean(point["train_per_task"]),
                mean(point["test_per_task"]),
            )
            for point in entry["curve"]
        ]
        train, test = (mean(entry[part]["per_task"]) for part in ("train", "test"))
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}): delete it and run it again"
        ) from None
    return RunResult(entry["config"]["name"], train, test, entry["seconds"], curve)


def write_curves(results: list[RunResult], path: Path) -> None:
    """Write the points of the curves as CSV; accuracies are fractions."""
    columns = (
        "method",
        "iteration",
        "phase",
        "sparsity",
        "train",
        "train_ci95",
        "test",
        "test_ci95",
    )
    with replace_file(path) as temporary, temporary.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        for result in results:
            for p in result.curve:
                scores = (p.train.mean, p.train.ci95, p.test.mean, p.test.ci95)
                rows.writerow((result.name, p.iteration, p.phase, p.sparsity, *scores))


def _as_json(config: RunConfig, result: RunResult) -> dict[str, Any]:
    return {
        "config": config.to_json(),
        "train": _mean_json(result.train),
        "test": _mean_json(result.test),
        "seconds": result.seconds,
        "weights": result.size,
        "curve": [
            {
                "iteration": point.iteration,
                "phase": point.phase,
                "sparsity": point.sparsity,
                "train": point.train.mean,
                "test": point.test.mean,
                "train_per_task": list(point.train.values),
                "test_per_task": list(point.test.values),
            }
            for point in result.curve
        ],
    }


def _mean_json(mean: Mean) -> dict[str, Any]:
    return {"mean": mean.mean, "ci95": mean.ci95, "per_task": list(mean.values)}


def _word(difference: Mean) -> str:
    if not difference.significant:
        return "not significant"
    return "significant over tasks: " + ("better" if difference.mean > 0 else "worse")
