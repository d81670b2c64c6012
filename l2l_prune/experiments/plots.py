"""Pictures of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from l2l_prune._files import replace_file
from l2l_prune.evaluation import Mean
from l2l_prune.experiments.config import RunConfig
from l2l_prune.experiments.run import RunResult

# Okabe-Ito: told apart by people with any colour vision; train is dashed besides.
TRAIN, TEST = "#D55E00", "#0072B2"


def accuracy_curves(configs: list[RunConfig], results: list[RunResult], path: Path) -> None:
    """Training and test accuracy over meta-iterations, one panel a method, phases shaded.

    Args:
        configs: The runs' settings.
        results: Their results, in the same order.
        path: The PNG file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(results), 3.4), layout="constrained")
    axes = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for ax, config, result in zip(axes, configs, results, strict=True):
        _panel(ax, config, result)
    axes[0].set_ylabel("accuracy [%]")
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def _panel(ax: Any, config: RunConfig, result: RunResult) -> None:
    config.schedule.shade(ax)
    iterations = [point.iteration for point in result.curve]
    _band(ax, iterations, [p.train for p in result.curve], TRAIN, "--", "train tasks")
    _band(ax, iterations, [p.test for p in result.curve], TEST, "-", "test tasks")
    ax.set(title=result.name, xlabel="meta-iteration", xlim=(0, config.schedule.iterations))
    ax.grid(alpha=0.25)


def _band(
    ax: Any, iterations: list[int], means: list[Mean], color: str, line: str, label: str
) -> None:
    middle = [100 * m.mean for m in means]
    low = [100 * (m.mean - m.ci95) for m in means]
    high = [100 * (m.mean + m.ci95) for m in means]
    ax.plot(iterations, middle, line, color=color, label=label)
    ax.fill_between(iterations, low, high, color=color, alpha=0.15, lw=0)
