"""Tables of finished runs: accuracies in the paper's form, and differences to the dense runs."""

from __future__ import annotations

import itertools

from tabulate import tabulate

from l2l_prune.evaluation import paired_difference
from l2l_prune.experiments.finished import (
    FinishedRun,
    by_method,
    gap_over_seeds,
    grouped,
    over_seeds,
)
from l2l_prune.experiments.over_seeds import OverSeeds, with_verdict
from l2l_prune.experiments.paper_numbers import printed_accuracy


def method_table(runs: list[FinishedRun]) -> str:
    """Method x backbone, with train, test and gap by shots, as Markdown (Tables 1 to 4).

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
                row |= {
                    f"{shots}-shot train": str(over_seeds(same, "train")),
                    f"{shots}-shot test": str(over_seeds(same, "test")),
                    f"{shots}-shot gap": str(gap_over_seeds(same)),
                    f"paper {shots}-shot": printed_accuracy(same[0]) or "",
                }
                row["seeds"] = str(len(same))
            rows.append(row)
    idle = ("", "yes")
    used = {name for row in rows for name, value in row.items() if value not in idle}
    rows = [{name: value for name, value in row.items() if name in used} for row in rows]
    return _markdown(rows)


def difference_table(runs: list[FinishedRun]) -> str:
    """Each method minus dense runs of the same length, paired over the seeds, as Markdown.

    Shorter or longer dense runs stand against the usual ones.
    The last column, where there are dense runs of several lengths, is the difference in test
    accuracy to dense runs that were trained just as far (see :func:`at_equal_training_accuracy`).
    """
    rows = []
    for mine in grouped(runs, lambda run: run.setting).values():
        dense = {(r.seed, r.iterations): r for r in mine if r.config["name"] == "dense"}
        equal = at_equal_training_accuracy(mine)
        for method, same in by_method(mine).items():
            if method == "dense":
                continue
            row = {"minus dense": method, "backbone": same[0].size, "shots": str(same[0].shots)}
            length = same[0].iterations
            if same[0].config["name"] == "dense":
                length = same[0].usual_iterations
            pairs = [(r, dense[r.seed, length]) for r in same if (r.seed, length) in dense]
            row["seeds"] = str(len(pairs))
            if pairs:
                ours, theirs = zip(*pairs, strict=True)
                for part in ("train", "test"):
                    found = paired_difference(over_seeds(ours, part), over_seeds(theirs, part))
                    row[part] = with_verdict(part, found)
                gaps = paired_difference(gap_over_seeds(ours), gap_over_seeds(theirs))
                row["gap"] = with_verdict("gap", gaps)
            else:
                row["test"] = "no dense run of the same seeds and length"
            if method in equal:
                found, of = equal[method], len(same)
                part_of = "" if len(found.values) == of else f", {len(found.values)} of {of} seeds"
                row["test at equal training accuracy"] = with_verdict("test", found) + part_of
            rows.append(row)
    return _markdown(rows)


def at_equal_training_accuracy(runs: list[FinishedRun]) -> dict[str, OverSeeds]:
    """Test accuracy minus that of dense runs that were trained just as far, in one setting.

    A pruned network fits its training tasks less, as a dense one does that was trained for less
    long. Each run is set against the test accuracy that dense runs of the same seed and of
    several lengths reach at its training accuracy, linear between them.

    Returns:
        Differences by method, over the seeds whose dense runs span the training accuracy; empty
        without dense runs of two or more lengths.
    """
    dense = [run for run in runs if run.config["name"] == "dense"]
    if len({run.iterations for run in dense}) < 2:
        return {}
    curves = {
        seed: sorted(_point(run) for run in mine)
        for seed, mine in grouped(dense, lambda run: run.seed).items()
    }
    differences = {}
    for method, same in by_method(run for run in runs if run not in dense).items():
        found = []
        for run in same:
            train, test = _point(run)
            expected = _between(curves.get(run.seed, []), train)
            if expected is not None:
                found.append(test - expected)
        if found:
            differences[method] = OverSeeds(tuple(found))
    return differences


def _point(run: FinishedRun) -> tuple[float, float]:
    return run.entry["train"]["mean"], run.entry["test"]["mean"]


def _between(curve: list[tuple[float, float]], train: float) -> float | None:
    """Test accuracy at ``train`` on the broken line through ``curve``; None outside it."""
    for (low, start), (high, stop) in itertools.pairwise(curve):
        if low <= train <= high:
            share = (train - low) / (high - low) if high > low else 0.5
            return start + share * (stop - start)
    return None


def _markdown(rows: list[dict[str, str]]) -> str:
    if not rows:
        return ""
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True, missingval="-")
