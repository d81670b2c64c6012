"""Pictures of a search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from l2l_prune.experiments.report.plots import COLORS, new_figure, save_figure
from l2l_prune.experiments.search.sensitivity import Sensitivity
from l2l_prune.fewshot.evaluation import Mean, Measure


def heat_map(found: Sensitivity, measure: Measure, path: Path) -> None:
    """What each layer loses at each rate, pruned alone; the number is in each cell."""
    names = list(found.sizes)
    lost = [[measure.read(found.dense - s) for s in found.scores[name]] for name in names]
    figure, (ax,) = new_figure((3.6 + 0.85 * len(found.rates), 1.7 + 0.36 * len(names)))
    ax.grid(visible=False)
    most = max(1e-9, *(value for row in lost for value in row))
    image = ax.imshow(lost, cmap="viridis_r", vmin=0, vmax=most, aspect="auto")
    for y, row in enumerate(lost):
        for x, value in enumerate(row):
            dark = value > 0.5 * most
            ax.text(x, y, f"{value:.1f}", ha="center", va="center", color="w" if dark else "k")
    ax.set_xticks(range(len(found.rates)), [f"{100 * rate:g}%" for rate in found.rates])
    ax.set_yticks(range(len(names)), [f"{name} ({found.sizes[name]:,})" for name in names])
    ax.set_xlabel("pruned of this layer alone, without retraining")
    points = "points" if measure.unit == "%" else measure.unit
    figure.colorbar(image, label=f"{measure.name} lost [{points}]")
    dense = measure.read(found.dense)
    figure.suptitle(f"After adaptation, validation tasks; dense {dense:.1f}{measure.ending or '%'}")
    save_figure(figure, path)


def front_picture(
    points: Sequence[tuple[str, float, Mean]],
    front: Sequence[int],
    dense: int,
    chosen: int,
    path: Path,
) -> None:
    """Scores over stored size, with the Pareto front as a line.

    Args:
        points: Name, kilobytes and scores of each network.
        front: The places of those on the front, by size.
        dense: The place of the dense one.
        chosen: The place of the one that is chosen.
        path: The PNG file to write.
    """
    measure = points[0][2].measure
    figure, (ax,) = new_figure((8.4, 4.4))
    sizes = [math.log(size) for _, size, _ in points]
    middle = (min(sizes) + max(sizes)) / 2
    for place, (name, size, score) in enumerate(points):
        low, width = measure.read(score.mean), measure.read(score.ci95)
        color = COLORS[0] if place == dense else COLORS[1]
        kind = "D" if place == dense else "o"
        filled = color if place in front else "white"
        ax.errorbar(size, low, yerr=width, color=color, alpha=0.35, lw=1)
        ax.plot(size, low, kind, color=color, mfc=filled, zorder=3)
        if place in front or place in (dense, chosen):
            words = f"{name} (chosen)" if place == chosen else name
            right = math.log(size) > middle  # so that no name leaves the panel
            ax.annotate(
                words,
                (size, low),
                (-6 if right else 6, 5),
                textcoords="offset points",
                ha="right" if right else "left",
                fontsize=8,
            )
    line = [points[place] for place in front]
    ax.plot(
        [p[1] for p in line],
        [measure.read(p[2].mean) for p in line],
        color=COLORS[2],
        lw=1,
        drawstyle="steps-post",
    )
    ax.set_xscale("log")
    for axis in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
        axis("{x:g}")
    ax.margins(x=0.16, y=0.1)
    ax.set(xlabel="stored size [KB]", ylabel=f"{measure}, validation tasks")
    figure.suptitle("Networks of full length; the line is the Pareto front")
    save_figure(figure, path)
