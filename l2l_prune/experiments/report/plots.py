"""Pictures of runs."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from l2l_prune._basics.files import replace_file
from l2l_prune.experiments.config import RunConfig
from l2l_prune.experiments.report.finished_runs import FinishedRun
from l2l_prune.experiments.run_result import RunResult
from l2l_prune.fewshot.evaluation import Mean

# Okabe-Ito: told apart by people with any colour vision; train is dashed besides. Of more than
# three the green and the pink are alike in deuteranopia, so that markers must tell them apart.
TRAIN, TEST = "#D55E00", "#0072B2"
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX*<>ph"


def new_figure(
    size: tuple[float, float], panels: int = 1, sharey: bool = False, rows: int = 1
) -> tuple[Any, Any]:
    """A figure of ``size`` inches and its panels in order, apart from pyplot's state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    places = figure.subplots(rows, -(-panels // rows), squeeze=False, sharey=sharey).flat
    axes = list(places)
    for ax in axes[panels:]:
        ax.remove()
    for ax in axes[:panels]:
        ax.grid(alpha=0.25)
    return figure, axes[:panels]


def styles(others: bool = False) -> Iterator[tuple[str, str]]:
    """A colour and a marker for each method, without end; ``others``: without the dense one's."""
    pairs = zip(itertools.cycle(COLORS), itertools.cycle(MARKERS), strict=False)
    return itertools.islice(pairs, int(others), None)


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def run_curves(configs: list[RunConfig], results: list[RunResult], path: Path) -> None:
    """Training and test scores over meta-iterations, one panel a method, phases shaded.

    Args:
        configs: The runs' settings.
        results: Their results, in the same order.
        path: The PNG file to write.
    """
    figure, axes = new_figure((4 * len(results), 3.4), len(results), sharey=True)
    for ax, config, result in zip(axes, configs, results, strict=True):
        _panel(ax, config, result)
    axes[0].set_ylabel(str(configs[0].measure))
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, path)


def curves_by_method(
    panels: dict[str, dict[str, list[FinishedRun]]], path: Path, title: str
) -> None:
    """Mean curves over seeds, a line a method (Figures 1 and 2 of the paper).

    Args:
        panels: The runs of each method, by panel. Sparse phases are shaded if all methods of a
            panel that have any have the same ones.
        path: The PNG file to write.
        title: Above the figure.
    """
    rows = -(-len(panels) // 3)
    size = (1 + 5.5 * -(-len(panels) // rows), 4.2 * rows)
    figure, axes = new_figure(size, len(panels), sharey=True, rows=rows)
    for ax, shown in zip(axes, panels.values(), strict=True):
        for style, (label, runs) in zip(styles(), shown.items(), strict=False):
            _seed_means(ax, runs, label, *style)
        phases = {tuple(_sparse_spans(runs[0])) for runs in shown.values()} - {()}
        shaded = phases.pop() if len(phases) == 1 else ()
        for start, stop in shaded:
            ax.axvspan(start, stop, color="0.5", alpha=0.18, lw=0)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set(xlabel="meta-iteration" + (" (sparse phases shaded)" if shaded else ""))
        # Below, since curves fill the panel.
        ax.legend(
            frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2
        )
    measure = next(iter(next(iter(panels.values())).values()))[0].measure
    for ax in axes:
        if ax.get_subplotspec().is_first_col():
            ax.set_ylabel(f"{measure}, test solid, training dashed")
    figure.suptitle(title)
    save_figure(figure, path)


def _seed_means(ax: Any, runs: list[FinishedRun], label: str, color: str, marker: str) -> None:
    points = list(zip(*(run.entry["curve"] for run in runs), strict=True))
    iterations = [seeds[0]["iteration"] for seeds in points]
    for part, line in (("test", "-"), ("train", "--")):
        read = runs[0].measure.read
        means = [read(sum(p[part] for p in seeds) / len(seeds)) for seeds in points]
        shown = {"label": label} if part == "test" else {}
        ax.plot(iterations, means, line, marker=marker, ms=4, color=color, **shown)


def _sparse_spans(run: FinishedRun) -> list[tuple[int, int]]:
    spans, done = [], 0
    for segment in run.segments:
        if segment["sparse"]:
            spans.append((done, done + segment["iterations"]))
        done += segment["iterations"]
    return spans


def _panel(ax: Any, config: RunConfig, result: RunResult) -> None:
    config.schedule.shade(ax)
    iterations = [point.iteration for point in result.curve]
    _band(ax, iterations, [p.train for p in result.curve], TRAIN, "--", "train tasks")
    _band(ax, iterations, [p.test for p in result.curve], TEST, "-", f"{config.held_out} tasks")
    ax.set(xlabel="meta-iteration", xlim=(0, config.schedule.iterations))
    ax.set_title(textwrap.fill(result.name, 28))


def _band(
    ax: Any, iterations: list[int], means: list[Mean], color: str, line: str, label: str
) -> None:
    middle = [m.measure.read(m.mean) for m in means]
    low = [m.measure.read(m.mean - m.ci95) for m in means]
    high = [m.measure.read(m.mean + m.ci95) for m in means]
    ax.plot(iterations, middle, line, color=color, label=label)
    ax.fill_between(iterations, low, high, color=color, alpha=0.15, lw=0)
