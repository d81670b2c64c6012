"""Tables of finished runs: scores in the paper's form, and differences to the dense runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from statistics import fmean

from tabulate import tabulate

from l2l_prune.experiments.report import same_settings
from l2l_prune.experiments.report.finished_runs import (
    FinishedRun,
    by_method,
    gap_over_seeds,
    grouped,
    mean_weights,
    over_seeds,
)
from l2l_prune.experiments.report.paper_numbers import printed_accuracy
from l2l_prune.experiments.report.seed_statistics import OverSeeds, with_verdict
from l2l_prune.fewshot.evaluation import paired_difference


def method_table(runs: list[FinishedRun]) -> str:
    """Method x backbone, with train, test and gap by shots, as Markdown (Tables 1 to 4).

    Beside them the weights that are not 0 at the end, and the seconds a run took.

    Where some runs leave out pre-training or retraining, columns say so; where the paper printed
    numbers for some of them, those stand beside.
    """
    rows = []
    for size, of_size in grouped(runs, lambda run: run.size).items():
        for method, mine in by_method(of_size).items():
            row = {"method": method, "backbone": size}
            for phase in ("pretrain", "retrain"):
                held = mine[0].family == "dense" or mine[0].phase_iterations(phase)
                row[phase] = "yes" if held else "no"
            for shots, same in sorted(grouped(mine, lambda run: run.shots).items()):
                which = f"{shots}-shot " if same[0].few_shot else ""
                row |= {
                    f"{which}train": str(over_seeds(same, "train")),
                    f"{which}test": str(over_seeds(same, "test")),
                    f"{which}gap": str(gap_over_seeds(same)),
                    f"paper {shots}-shot": printed_accuracy(same[0]) or "",
                }
            row["seeds"] = _seeds(mine)
            weights = mean_weights(mine)
            row["weights"] = "" if weights is None else f"{weights:,.0f}"
            row["seconds"] = f"{fmean(run.entry['seconds'] for run in mine):,.0f}"
            rows.append(row)
    idle = ("", "yes")
    used = {name for row in rows for name, value in row.items() if value not in idle}
    rows = [{name: value for name, value in row.items() if name in used} for row in rows]
    return markdown_table(rows)


def _seeds(runs: list[FinishedRun]) -> str:
    """How many there are: ``"3"``, or ``"3 (1-shot), 2 (5-shot)"``."""
    numbers = {shots: len(s) for shots, s in sorted(grouped(runs, lambda r: r.shots).items())}
    if len(set(numbers.values())) == 1:
        return str(next(iter(numbers.values())))
    return ", ".join(f"{number} ({shots}-shot)" for shots, number in numbers.items())


def difference_table(runs: list[FinishedRun]) -> str:
    """Each method minus dense runs, paired over the seeds, as Markdown.

    The dense runs are those of the same settings and length, see :func:`dense_partner`.
    The last column, where there are dense runs of several lengths, is the difference in test
    scores to dense runs that were trained just as far (see :func:`at_equal_training_score`).
    """
    rows = []
    for mine in grouped(runs, lambda run: run.shared_settings).values():
        equal = at_equal_training_score(mine)
        of_replicate = grouped(mine, lambda run: run.replicate)
        for method, same in by_method(mine).items():
            pairs = [
                (r, dense) for r in same if (dense := dense_partner(r, of_replicate[r.replicate]))
            ]
            if same[0].baseline or (same[0].dense and not pairs):
                continue  # what others are compared with
            row = {"minus dense": method, "backbone": same[0].size}
            if same[0].few_shot:
                row["shots"] = str(same[0].shots)
            row["seeds"] = str(len(pairs))
            if pairs:
                ours, theirs = zip(*pairs, strict=True)
                for part in ("train", "test"):
                    found = paired_difference(over_seeds(ours, part), over_seeds(theirs, part))
                    row[part] = with_verdict(part, found)
                gaps = paired_difference(gap_over_seeds(ours), gap_over_seeds(theirs))
                row["gap"] = with_verdict("gap", gaps)
            else:
                row["test"] = "no dense run of the same settings, seeds and length"
            if method in equal:
                found, of = equal[method], len(same)
                part_of = "" if len(found.values) == of else f", {len(found.values)} of {of} seeds"
                heading = f"test at equal training {same[0].measure.name}"
                row[heading] = with_verdict("test", found) + part_of
            rows.append(row)
    return markdown_table(rows)


def dense_partner(run: FinishedRun, runs: list[FinishedRun]) -> FinishedRun | None:
    """The dense run of the same seed to set ``run`` against, out of the same setting.

    For a pruned run, the dense one of the same regularisers and length. For a dense run with
    regularisers of its own, the one without; for a shorter or longer one, that of usual length.
    """
    shorter = run.dense and run.regularisers == run.usual_regularisers
    length = run.usual_iterations if shorter else run.iterations
    return _closest(run, (d for d in _dense_beside(run, runs) if d.iterations == length))


def _dense_beside(run: FinishedRun, runs: list[FinishedRun]) -> list[FinishedRun]:
    """Dense runs of its seed, of all lengths, with the regularisers of its baseline."""
    # Dropout that is held for a task is a rival like ordinary dropout, and has its control.
    held = not run.pruned and run.identity["dropout_per"] == "task"
    wanted = run.usual_regularisers if run.dense or held else run.regularisers
    return [
        r for r in runs if r.dense and r.replicate == run.replicate and r.regularisers == wanted
    ]


def _closest(run: FinishedRun, dense: Iterable[FinishedRun]) -> FinishedRun | None:
    """The one that is most like ``run``, where dense runs differ in what changes no score."""
    return min(
        dense, key=lambda d: len(same_settings.varying([d.identity, run.identity])), default=None
    )


def at_equal_training_score(runs: list[FinishedRun]) -> dict[str, OverSeeds]:
    """Test score minus that of dense runs that were trained just as far, in one setting.

    A pruned network fits its training tasks less, as a dense one does that was trained for less
    long. Each run is set against the test score that dense runs of the same seed and of
    several lengths reach at its training score, linear between them.

    Returns:
        Differences by method, over the seeds whose dense runs span the training score; empty
        without dense runs of two or more lengths.
    """
    differences = {}
    of_replicate = grouped(runs, lambda run: run.replicate)
    for method, same in by_method(runs).items():
        if same[0].dense and same[0].regularisers == same[0].usual_regularisers:
            continue
        found = []
        for run in same:
            dense = _dense_beside(run, of_replicate[run.replicate])
            lengths = grouped(dense, lambda dense: dense.iterations).values()
            curve = [d for of_length in lengths if (d := _closest(run, of_length))]
            train, test = _point(run)
            expected = _between(sorted(map(_point, curve)), train)
            if expected is not None:
                found.append(test - expected)
        if found:
            differences[method] = OverSeeds(tuple(found), same[0].measure)
    return differences


def _point(run: FinishedRun) -> tuple[float, float]:
    return run.entry["train"]["mean"], run.entry["test"]["mean"]


def _between(curve: list[tuple[float, float]], train: float) -> float | None:
    """Test score at ``train`` on the broken line through ``curve``; None outside it."""
    for (low, start), (high, stop) in itertools.pairwise(curve):
        if low <= train <= high:
            share = (train - low) / (high - low) if high > low else 0.5
            return start + share * (stop - start)
    return None


def markdown_table(rows: list[dict[str, str]]) -> str:
    """Rows as a Markdown table; empty without rows. Names may hold any character."""
    if not rows:
        return ""
    rows = [{key: _cell(value) for key, value in row.items()} for row in rows]
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True, missingval="-")


def _cell(text: str) -> str:
    for special in ("|", "*"):
        text = text.replace(special, f"\\{special}")
    return " ".join(text.split("\n"))
