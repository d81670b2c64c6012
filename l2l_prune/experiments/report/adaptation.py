"""What adapting costs, in the report: a table in a CSV file, and its picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l2l_prune._basics.files import replace_file
from l2l_prune.experiments.report.pareto import pareto_front
from l2l_prune.experiments.report.plots import COLORS, MARKERS, new_figure, save_figure
from l2l_prune.experiments.report.tables import markdown_table
from l2l_prune.fewshot.evaluation import Mean
from l2l_prune.shipping.costs import AdaptationCost, costs_table

TABLE, PICTURE = "adaptation.csv", "adaptation.png"


def write_adaptation(
    folder: Path, costs: Mapping[str, AdaptationCost], accuracies: Mapping[str, Mean]
) -> list[Path]:
    """Write ``adaptation.csv`` and ``adaptation.png``; the report of the folder shows both.

    Args:
        folder: Made if it is not there.
        costs: From :func:`~l2l_prune.shipping.adaptation_costs`. Names that share what stands
            before the last comma share a colour.
        accuracies: Of the same names, on the same tasks.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = costs_table(costs, accuracies)
    with replace_file(folder / TABLE) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    adaptation_figure(rows, folder / PICTURE)
    return [folder / TABLE, folder / PICTURE]


def read_adaptation(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``adaptation.csv``, none if the folder has no such file.

    Raises:
        ValueError: If the file is damaged.
    """
    path = folder / TABLE
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    try:
        return [{k: v if k == "way" else float(v) for k, v in row.items()} for row in found]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and measure again") from None


def adaptation_figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against the time of adapting to a task; the line joins what nothing else beats.

    Args:
        rows: As of :func:`~l2l_prune.shipping.costs_table`, with accuracies.
        path: The PNG file to write.
    """
    figure, (ax,) = new_figure((8, 4.8))
    kinds = list(dict.fromkeys(row["way"].rpartition(",")[0] for row in rows))
    modes = list(dict.fromkeys(row["way"].rpartition(",")[2] for row in rows))
    for row in rows:
        kind, _, mode = row["way"].rpartition(",")
        ax.errorbar(
            row["episode ms"],
            row["accuracy [%]"],
            yerr=row["ci95"],
            fmt=MARKERS[modes.index(mode) % len(MARKERS)],
            color=COLORS[kinds.index(kind) % len(COLORS)],
            capsize=2,
            label=row["way"],
        )
    front = pareto_front([(row["episode ms"], row["accuracy [%]"]) for row in rows])
    ax.plot(*zip(*front, strict=True), "-", color="0.6", zorder=0)
    ax.set(xlabel="adapting to a task [ms], one thread", ylabel="accuracy [%], 95% CI over tasks")
    ax.set_xscale("log")
    for formatter in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
        formatter("{x:g}")  # 60 and 200, not powers of 10
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)


def adaptation_section(folder: Path) -> list[str]:
    """The report's part on what adapting costs; empty if it was not measured."""
    rows = read_adaptation(folder)
    if not rows:
        return []
    shown = [
        {key: value if key == "way" else f"{value:.3g}" for key, value in row.items()}
        for row in rows
    ]
    parts = [
        "## What adapting costs",
        "One thread, medians of interleaved rounds; ratios are to the first row. Memory is the "
        "peak of an episode. The inner optimizer starts afresh, as on a device; in the runs' own "
        "scores it carried its state over from training, so that they can differ.",
        markdown_table(shown),
    ]
    if (folder / PICTURE).is_file():
        caption = "Accuracy against the time of adapting to a task"
        parts.append(f"![{caption}]({PICTURE})\n\n{caption}")
    return parts
