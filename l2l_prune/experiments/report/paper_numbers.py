"""The accuracies printed in the paper (``paper_tables.csv``), to show next to ours."""

from __future__ import annotations

import csv
from importlib import resources

from l2l_prune.experiments.report.finished_runs import FinishedRun


def printed_accuracy(run: FinishedRun) -> str | None:
    """What the paper printed for a run's method, size, rate, phases, data set and shots.

    Returns:
        Like ``"51.1 ± 0.4"`` (over tasks, one training run), or ``None`` if it printed nothing.
    """
    algorithm, data, ways = run.problem
    special = str(run.config["name"]).partition(", ")[2]
    if ways != 5 or run.rate is None or special not in ("", "no pretrain", "no retrain"):
        return None
    wanted = {
        "data": data,
        "algorithm": algorithm,
        "family": run.family,
        "size": run.size,
        "shots": str(run.shots),
        "pretrain": _yes(run.family == "dense" or run.phase_iterations("pretrain")),
        "retrain": _yes(run.family == "dense" or run.phase_iterations("retrain")),
    }
    for row in _printed():
        same_rate = abs(float(row["rate"]) - run.rate) < 1e-9
        if same_rate and all(row[key] == value for key, value in wanted.items()):
            return f"{float(row['accuracy']):.1f} ± {float(row['ci95']):.1f}"
    return None


def _yes(value: object) -> str:
    return "yes" if value else "no"


def _printed() -> list[dict[str, str]]:
    text = resources.files(__package__).joinpath("paper_tables.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
