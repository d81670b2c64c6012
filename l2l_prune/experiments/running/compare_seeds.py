"""Methods over several seeds, and what can be said about their differences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from tabulate import tabulate

from l2l_prune._basics.files import replace_file
from l2l_prune.experiments.config import RunConfig
from l2l_prune.experiments.report import same_settings
from l2l_prune.experiments.report.finished_runs import schedule_rate
from l2l_prune.experiments.report.seed_statistics import OverSeeds, with_verdict
from l2l_prune.experiments.running.processes import finish_all
from l2l_prune.experiments.running.storage import locked_folder
from l2l_prune.fewshot.evaluation import paired_difference


def compare_seeds(
    configs: list[RunConfig],
    folder: Path,
    console: Console,
    jobs: int | None = None,
    logger: str | None = None,
) -> str:
    """Run what is not yet in ``folder``, and write the table there.

    Args:
        configs: The runs: each method with each seed; the first method is the baseline.
        folder: Gets a folder for each run, filled as it ends, and ``table.md``.
        console: Where progress is shown.
        jobs: Runs at once; all by default.
        logger: Also write each run's curves into its folder: a key of
            :data:`~l2l_prune.experiments.running.loggers.LOGGERS`.

    Returns:
        The table and the verdicts as Markdown.

    Raises:
        RunFailed: If a run failed; finished runs stay in ``folder``, and the failed one's folder
            holds ``error.txt``, which a report reads.
        ValueError: If another process writes to ``folder``, results in it are damaged, or
            ``configs`` differ in more than method and seed.
    """
    _check(configs)
    with locked_folder(folder):
        entries = finish_all(configs, folder, console, jobs=jobs, logger=logger)
        text = _markdown(list(zip(configs, entries, strict=True)))
        with replace_file(folder / "table.md") as path:
            path.write_text(text, encoding="utf-8")
    return text


def _check(configs: list[RunConfig]) -> None:
    """Check that only method and seed differ: a row pools seeds, and differences pair them."""
    plain = [config.to_json() for config in configs]
    if differing := same_settings.varying(
        same_settings.shared_settings(values) for values in plain
    ):
        raise ValueError(
            f"runs to compare must differ only in method and seed, not in {', '.join(differing)}: "
            "use a sweep for that"
        )
    seeds = sorted({config.seed for config in configs})
    for name in dict.fromkeys(config.name for config in configs):
        mine = [values for values in plain if values["name"] == name]
        if differing := same_settings.varying(map(same_settings.identity, mine)):
            raise ValueError(f"runs of {name} must differ only in seed, not in {differing[0]}")
        if sorted(values["seed"] for values in mine) != seeds:
            raise ValueError(f"{name} must have each of the seeds {seeds} once, like all methods")


def _markdown(runs: list[tuple[RunConfig, Any]]) -> str:
    methods = list(dict.fromkeys(config.name for config, _ in runs))
    seeds = sorted({config.seed for config, _ in runs})
    measure = runs[0][0].measure
    values: dict[tuple[str, str], OverSeeds] = {}
    rows = []
    for method in methods:
        mine = sorted(
            ((config, run) for config, run in runs if config.name == method),
            key=lambda pair: pair[0].seed,
        )
        for part in ("train", "test"):
            means = tuple(run[part]["mean"] for _, run in mine)
            values[method, part] = OverSeeds(means, measure)
        values[method, "gap"] = paired_difference(values[method, "train"], values[method, "test"])
        parts = [str(values[method, part]) for part in ("train", "test", "gap")]
        seconds = math.fsum(run["seconds"] for _, run in mine) / len(mine)
        rows.append((method, schedule_rate(mine[0][0].schedule), *parts, f"{seconds:.0f}"))
    config = runs[0][0]
    held_out = config.held_out
    table = tabulate(
        rows,
        headers=("method", "sparsity", "train", held_out, "gap", "seconds"),
        tablefmt="github",
        disable_numparse=True,
    )
    heading = str(measure)[0].upper() + str(measure)[1:]
    lengths = " or ".join(map(str, sorted({c.schedule.iterations for c, _ in runs})))
    lines = [
        f"{heading} of {config.algorithm} on {config.data}, "
        f"{'' if config.picture_tasks else f'{config.ways}-way {config.shots}-shot, '}"
        f"{lengths} meta-iterations: mean ± 95% CI over {len(seeds)} seeds, {config.final_tasks} "
        "tasks each.\n",
        table,
        "",
    ]
    for method in methods[1:]:
        for part in ("train", "test", "gap"):
            found = paired_difference(values[method, part], values[methods[0], part])
            word = held_out if part == "test" else part
            lines.append(f"- {method} - {methods[0]}, {word}: {with_verdict(part, found)}")
    return "\n".join(lines) + "\n"
