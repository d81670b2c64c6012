"""Figures of what test scores depend on: training scores, phases, sparsity and its bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from l2l_prune._basics.tensor_files import load_tensors
from l2l_prune.experiments.algorithms.base import conv4
from l2l_prune.experiments.report.finished_runs import (
    FinishedRun,
    by_method,
    gap_over_seeds,
    grouped,
    mean_weights,
    over_seeds,
    rate_in_words,
)
from l2l_prune.experiments.report.plots import COLORS, new_figure, save_figure, styles
from l2l_prune.experiments.report.same_settings import frozen, in_words, varying
from l2l_prune.experiments.report.seed_statistics import OverSeeds
from l2l_prune.fewshot.data import EpisodeSampler, load_images
from l2l_prune.fewshot.theory import (
    Assumptions,
    covering_gap_bound,
    dense_gap_bound,
    estimate_smoothness,
    parameter_counts,
    sparse_gap_bound,
)
from l2l_prune.schedules.paper import DSDSchedule


def overview_figure(runs: list[FinishedRun], path: Path) -> None:
    """Test scores over training scores, over seconds and, where known, over weights.

    A point a method with its 95% interval over seeds; a line joins dense runs of several lengths.

    Args:
        runs: Runs of one problem.
        path: The PNG file to write.
    """
    measure = runs[0].measure
    shown = _labelled(runs)
    weights = [mean_weights(same) for same in shown.values()]
    panels = 3 if all(weights) and len(set(weights)) > 1 else 2
    figure, axes = new_figure((3 + 3.6 * panels, max(4, 0.18 * len(shown))), panels, sharey=True)
    for (label, same), kept, (color, marker) in zip(shown.items(), weights, styles(), strict=False):
        test, train = over_seeds(same, "test"), over_seeds(same, "train")
        seconds = sum(run.entry["seconds"] for run in same) / len(same)
        for ax, x in zip(axes, (measure.read(train.mean), seconds, kept), strict=False):
            ax.errorbar(
                x,
                measure.read(test.mean),
                yerr=_bar(test),
                fmt=marker,
                color=color,
                capsize=2,
                label=label if ax is axes[0] else None,
            )
    for same in grouped(_reference(runs), lambda run: run.shared_settings).values():
        lengths = sorted(grouped(same, lambda run: run.iterations).items())
        if len(lengths) > 1:
            means = [
                [measure.read(over_seeds(_once_a_seed(of), p).mean) for _, of in lengths]
                for p in ("train", "test")
            ]
            axes[0].plot(*means, "-", color=COLORS[0], zorder=0)
    axes[0].set(xlabel=f"training {measure}", ylabel=f"test {measure}, 95% CI over seeds")
    axes[1].set(xlabel="seconds a run", xlim=(0, None))
    if panels == 3:
        from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

        axes[2].set(xlabel="weights that are not 0", xscale="log")
        axes[2].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[2].xaxis.set_major_formatter(EngFormatter(sep=""))
        axes[2].xaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    save_figure(figure, path)


def _labelled(runs: list[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """Runs by method, and by size and shots where those vary."""
    sizes, shots = {run.size for run in runs}, {run.shots for run in runs}

    def label(run: FinishedRun) -> str:
        parts = [run.method, *[run.size] * (len(sizes) > 1)]
        return ", ".join([*parts, *[f"{run.shots}-shot"] * (len(shots) > 1)])

    ordered = [run for same in by_method(runs).values() for run in same]
    return grouped(ordered, label)


def _pretrain(run: FinishedRun) -> str:
    return f"pretrain {run.phase_iterations('pretrain')}"


# What Figures 3 and 4 vary: name of the axis, family, value of a run, and in words what else of the
# schedule must be alike for runs to stand on one line.
_STUDIES: list[tuple[str, str, Callable[[FinishedRun], float], Callable[[FinishedRun], str]]]
_STUDIES = [
    (
        "pre-training iterations",
        "DSD",
        lambda run: run.phase_iterations("pretrain"),
        lambda run: f"retrain {run.phase_iterations('retrain')}",
    ),
    (
        "retraining iterations",
        "DSD",
        lambda run: run.phase_iterations("retrain"),
        _pretrain,
    ),
    (
        "pruning share of an interval [%]",
        "IHT",
        lambda run: 100 * _pruning_share(run),
        lambda run: f"{_pretrain(run)}, {_rounds(run)} rounds",
    ),
    (
        "iterations of an interval",
        "IHT",
        lambda run: (run.iterations - run.phase_iterations("pretrain")) / _rounds(run),
        lambda run: f"{_pretrain(run)}, {_pruning_share(run):.0%} pruned",
    ),
]


def hyperparameter_figure(runs: list[FinishedRun], path: Path) -> bool:
    """Test scores by the lengths of phases (Figures 3 and 4 of the paper).

    Returns:
        Whether there was something to draw: three values of one length, all else alike.
    """
    panels = []
    for label, family, value, held in _STUDIES:
        mine = [
            run
            for run in runs
            if run.family == family
            and run.config["criterion"] == "magnitude"
            and run.iterations == run.usual_iterations
            and run.rate is not None
        ]
        alike = grouped(mine, lambda r, held=held: (r.rate, held(r), frozen(_but_schedule(r))))  # type: ignore[misc]
        lines = [same for same in alike.values() if len({value(run) for run in same}) > 2]
        if lines:
            several = len({held(same[0]) for same in lines}) > 1
            panels.append((label, family, value, held, several, lines))
    if not panels:
        return False
    figure, axes = new_figure((1 + 4 * len(panels), 3.6), len(panels), sharey=True)
    dense, measure = _once_a_seed(run for run in runs if run.baseline), runs[0].measure
    for ax, (label, family, value, held, several, lines) in zip(axes, panels, strict=True):
        if dense:
            level = measure.read(over_seeds(dense, "test").mean)
            ax.axhline(level, color="0.4", ls="--", label="dense")
        differing = varying(_but_schedule(same[0]) for same in lines)
        for style, same in zip(styles(others=True), lines, strict=False):
            # Schedules that differ by rounding alone stand at one place as points of their own.
            points = list(grouped(sorted(same, key=value), lambda r: frozen(r.identity)).values())
            means = [over_seeds(at, "test") for at in points]
            parts = [f"{family} {rate_in_words(same[0].rate)}"]
            parts += [held(same[0])] if several else []
            parts += [in_words(name, same[0].identity[name]) for name in differing]
            _line(ax, [value(at[0]) for at in points], means, style, ", ".join(parts))
        ax.set(xlabel=label)
        ax.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel(f"test {measure}, 95% CI over seeds")
    save_figure(figure, path)
    return True


def bounds_figure(runs: list[FinishedRun], path: Path) -> bool:
    """The measured gap by sparsity, and beside it the paper's bounds for the same network.

    The bounds are of the order that Theorem 1 states with 1 as its constant, for an error in
    [0, 1] and as many tasks as the dense runs saw; their radius, G and H are measured at a dense
    run's weights on training tasks. They lie far above 1: only their shape speaks.

    Returns:
        Whether there was something to draw: conv4 under Reptile, dense and at two rates, and its
        images can be read.
    """
    plain = [run for run in runs if run.plain and run.rate is not None]
    rates = {run.rate for run in plain}
    dense = [run for run in plain if run.dense]
    if len(rates) < 3 or not dense or dense[0].config["algorithm"] != "reptile":
        return False
    weights = dense[0].weights_file.path
    if not weights.is_file():
        return False
    sparsities = np.linspace(0, 0.95, 39)
    try:
        bounds = _bounds(dense[0], weights, sparsities)
    except (OSError, ValueError, ImportError):  # the images may be on another machine
        return False
    figure, (left, right) = new_figure((10, 3.8), 2)
    for family, style in zip(("DSD", "IHT"), styles(others=True), strict=False):
        mine = [run for run in plain if run.family == family]
        points = sorted(grouped(dense + mine, lambda run: run.rate or 0.0).items())
        if mine:
            gaps = [gap_over_seeds(same) for _, same in points]
            _line(left, [100 * rate for rate, _ in points], gaps, style, family)
    left.set(xlabel="sparsity [%]", ylabel="train - test accuracy [%], measured")
    left.legend(frameon=False)
    for values, label, line in bounds:
        right.semilogy(100 * sparsities, values, line, color=COLORS[0], label=label)
    for formatter in (right.yaxis.set_major_formatter, right.yaxis.set_minor_formatter):
        formatter("{x:g}")  # 6 and 20, not powers of 10
    right.set(xlabel="sparsity [%]", ylabel="bound on the gap of the error")
    right.legend(frameon=False, fontsize=8)
    save_figure(figure, path)
    return True


def _bounds(
    run: FinishedRun, weights: Path, sparsities: np.ndarray[Any, Any]
) -> list[tuple[list[float], str, str]]:
    config = run.settings_on_cpu()
    data = load_images(
        config.data, "train", max_classes=config.train_classes, **config.data_options
    )
    net = conv4(config.rebuilt(config.schedule), data.images.shape[1:])
    net.load_state_dict(load_tensors(weights))
    task = EpisodeSampler(
        data.images, data.labels, ways=config.ways, shots=config.train_shots, queries=0
    ).sample()
    lipschitz, smoothness = estimate_smoothness(
        lambda: F.cross_entropy(net(task.support_x), task.support_y),
        net.parameters(),
        radius=0.1,
        samples=10,
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        radius = float(torch.cat([p.flatten() for p in net.parameters()]).norm())
    assumptions = Assumptions(
        tasks=run.iterations * config.tasks,
        loss_bound=1.0,
        lipschitz=lipschitz,
        smoothness=smoothness,
        radius=radius,
        inner_lr=config.inner_lr,
    )
    counts = []
    for sparsity in sparsities:
        schedule = DSDSchedule(float(sparsity), pretrain=0, prune=1, retrain=0)
        counts.append(parameter_counts(net, schedule, layers=config.layers))
    total = counts[0][1]
    return [
        ([sparse_gap_bound(k, p, assumptions) for k, p in counts], "Theorem 1, constant 1", "-"),
        (
            [covering_gap_bound(k, p, assumptions) for k, p in counts],
            "all constants explicit",
            "--",
        ),
        ([dense_gap_bound(total, assumptions)] * len(counts), "dense, sqrt(p / M)", ":"),
    ]


def _reference(runs: Iterable[FinishedRun]) -> list[FinishedRun]:
    """The dense runs, of all lengths, that add no regulariser."""
    return [run for run in runs if run.dense and run.regularisers == run.usual_regularisers]


def _once_a_seed(dense: Iterable[FinishedRun]) -> list[FinishedRun]:
    """Dense runs of one length can differ in what changes no score; no seed counts twice."""
    return list({run.replicate: run for run in dense}.values())


def _but_schedule(run: FinishedRun) -> dict[str, Any]:
    return {k: v for k, v in run.identity.items() if k not in ("name", "schedule")}


def _pruning_share(run: FinishedRun) -> float:
    prune, retrain = run.phase_iterations("prune"), run.phase_iterations("retrain")
    return prune / (prune + retrain)


def _rounds(run: FinishedRun) -> int:
    return max(int(segment["round"]) for segment in run.segments)


def _line(
    ax: Any, xs: list[float], means: list[OverSeeds], style: tuple[str, str], label: str
) -> None:
    """Means with their intervals, joined by a line."""
    heights, bars = [m.measure.read(m.mean) for m in means], [_bar(m) for m in means]
    color, marker = style
    ax.errorbar(xs, heights, yerr=bars, fmt=f"-{marker}", capsize=2, color=color, label=label)


def _bar(mean: OverSeeds) -> float:
    return mean.measure.read(mean.ci95) if len(mean.values) > 1 else 0.0
