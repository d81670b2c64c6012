"""Methods over several seeds, and what can be said about their differences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from tabulate import tabulate

from l2l_prune._files import replace_file
from l2l_prune.evaluation import paired_difference
from l2l_prune.experiments.config import RunConfig
from l2l_prune.experiments.over_seeds import OverSeeds, with_verdict
from l2l_prune.experiments.processes import finish_all
from l2l_prune.experiments.storage import locked_folder


def compare(
    configs: list[RunConfig],
    folder: Path,
    console: Console,
    jobs: int | None = None,
    tensorboard: bool = False,
) -> str:
    """Run what is not yet in ``folder``, and write the table there.

    Args:
        configs: The runs: each method with each seed; the first method is the baseline.
        folder: Gets a folder for each run, filled as it ends, and ``table.md``.
        console: Where progress is shown.
        jobs: Runs at once; all by default.
        tensorboard: Write TensorBoard's event files into each run's folder.

    Returns:
        The table and the verdicts as Markdown.

    Raises:
        RunFailed: If a run failed; those that ended before stay in ``folder``.
        ValueError: If another process writes to ``folder``, or results in it are damaged.
    """
    with locked_folder(folder):
        entries = finish_all(configs, folder, console, jobs=jobs, tensorboard=tensorboard)
        text = _markdown(list(zip(configs, entries, strict=True)))
        with replace_file(folder / "table.md") as path:
            path.write_text(text)
    return text


def _markdown(runs: list[tuple[RunConfig, Any]]) -> str:
    methods = list(dict.fromkeys(config.name for config, _ in runs))
    seeds = sorted({config.seed for config, _ in runs})
    values: dict[tuple[str, str], OverSeeds] = {}
    rows = []
    for method in methods:
        mine = [(config, run) for config, run in runs if config.name == method]
        for part in ("train", "test"):
            means = tuple(run[part]["mean"] for _, run in mine)
            values[method, part] = OverSeeds(means)
        values[method, "gap"] = paired_difference(values[method, "train"], values[method, "test"])
        rates = {s.sparsity_label for s in mine[0][0].schedule.segments if s.sparse}
        parts = [str(values[method, part]) for part in ("train", "test", "gap")]
        seconds = math.fsum(run["seconds"] for _, run in mine) / len(mine)
        rows.append((method, max(rates, default="-"), *parts, f"{seconds:.0f}"))
    table = tabulate(
        rows,
        headers=("method", "rate", "train", "test", "gap", "seconds"),
        tablefmt="github",
        disable_numparse=True,
    )
    config = runs[0][0]
    lines = [
        f"Accuracy [%] of {config.algorithm} on {config.data}, {config.ways}-way "
        f"{config.shots}-shot, {config.schedule.iterations} meta-iterations: mean ± 95% CI over "
        f"{len(seeds)} seeds, {config.final_tasks} tasks each.\n",
        table,
        "",
    ]
    for method in methods[1:]:
        for part in ("train", "test", "gap"):
            found = paired_difference(values[method, part], values[methods[0], part])
            lines.append(f"- {method} - {methods[0]}, {part}: {with_verdict(part, found)}")
    return "\n".join(lines) + "\n"
