"""Judges a plan of the study on published tables of runs.

python docs/results/verdicts.py docs/results/study/rivals.toml docs/results/study/rivals.csv

Prints the means of the arms and the verdicts of the stated comparisons. Several tables are read
as one. With `--runs FOLDER` the finished runs of that folder that the plan names are first written
to the first table, in place of rows of the same arm and replicate: so a family can run on
several machines, replicate by replicate.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from tabulate import tabulate

from l2l_prune.experiments.report.comparisons import (
    Comparison,
    comparison_table,
    judge_differences,
    matching,
    nameable,
    read_comparisons,
)
from l2l_prune.experiments.report.finished_runs import FinishedRun, read_folder
from l2l_prune.experiments.report.seed_statistics import OverSeeds
from l2l_prune.experiments.toml_files import read_toml

SCORES = ("train", "test", "weights", "seconds")
COLUMN_OF = {"name": "method"}

Row = dict[str, str]
Arm = tuple[tuple[str, str], ...]


def main(
    plan: Path,
    tables: list[Path],
    runs: Annotated[Path | None, typer.Option(help="Folder of finished runs to add.")] = None,
) -> None:
    """Judge PLAN on the runs in TABLES."""
    comparisons = read_comparisons(read_toml(plan)["comparison"])
    if runs is not None:
        add_runs(tables[0], comparisons, read_folder(runs).runs)
    rows = read_tables(tables)
    print(tabulate(means(rows), headers="keys", tablefmt="github"), end="\n\n")
    differences = [difference(comparison, rows) for comparison in comparisons]
    print(comparison_table(judge_differences(comparisons, differences)))


def add_runs(
    table: Path, comparisons: Sequence[Comparison], finished: Sequence[FinishedRun]
) -> None:
    """Write the runs that the comparisons name to the table, sorted by replicate and arm."""
    sides = [side for c in comparisons for side in (c.treatment, c.control)]
    named = list(dict.fromkeys(COLUMN_OF.get(key, key) for side in sides for key in side))
    columns = ["replicate", *named, *SCORES]
    rows = {key(row): row for row in (read_tables([table]) if table.is_file() else [])}
    for side in sides:
        try:
            found = matching(side, finished).values()
        except ValueError as error:
            print(error)  # none has run here
            continue
        for run in found:
            row = as_row(run, named)
            rows[key(row)] = row
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[one] for one in sorted(rows))
    table.write_text(text.getvalue())


def as_row(run: FinishedRun, named: Sequence[str]) -> Row:
    """A run as a row of a table."""
    settings = {COLUMN_OF.get(name, name): value for name, value in nameable(run).items()}
    scores = {part: f"{run.entry[part]['mean']:.4f}" for part in ("train", "test")}
    return {
        "replicate": str(run.seed),
        **{name: str(settings[name]) for name in named},
        **scores,
        "weights": str(run.weights),
        "seconds": f"{run.entry['seconds']:.0f}",
    }


def read_tables(tables: Sequence[Path]) -> list[Row]:
    """The rows of the tables, those of one arm and replicate once."""
    rows: dict[tuple[str, Arm], Row] = {}
    for table in tables:
        with table.open() as file:
            for row in csv.DictReader(file):
                other = rows.setdefault(key(row), row)
                if other != row:
                    raise SystemExit(f"{table}: {row} is {other} elsewhere")
    return list(rows.values())


def key(row: Row) -> tuple[str, Arm]:
    """Replicate and arm."""
    return row["replicate"], arm(row)


def arm(row: Row) -> Arm:
    """All that is neither the replicate nor a score."""
    return tuple((k, v) for k, v in row.items() if k not in ("replicate", *SCORES))


def means(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A row for each arm: means over its replicates, with 95% intervals."""
    shown = []
    for one in dict.fromkeys(map(arm, rows)):
        own = [row for row in rows if arm(row) == one]
        columns = {name: [float(row[name]) for row in own] for name in SCORES if name in own[0]}
        scores = {name: columns[name] for name in ("train", "test") if name in columns}
        if len(scores) == 2:
            scores["gap"] = [a - b for a, b in zip(*scores.values(), strict=True)]
        shown.append(
            dict(one)
            | {"replicates": len(own)}
            | {part: str(OverSeeds(tuple(values))) for part, values in scores.items()}
            | {
                name: round(fmean(columns[name]))
                for name in ("weights", "seconds")
                if name in columns
            }
        )
    return shown


def difference(comparison: Comparison, rows: Sequence[Row]) -> OverSeeds:
    """The paired differences of test accuracy."""
    treated, control = (side_of(s, rows) for s in (comparison.treatment, comparison.control))
    shared = sorted(treated.keys() & control.keys())
    if len(shared) < 2:
        raise SystemExit(f"{comparison.title}: {len(shared)} replicates have both sides")
    return OverSeeds(tuple(treated[one] - control[one] for one in shared))


def side_of(wanted: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, float]:
    """Test accuracy by replicate. What a table has no column for is the same in all of its rows."""
    found: dict[str, float] = {}
    for row in rows:
        if all(row.get(COLUMN_OF.get(k, k), str(v)) == str(v) for k, v in wanted.items()):
            if row["replicate"] in found:
                raise SystemExit(f"{dict(wanted)} means two rows of replicate {row['replicate']}")
            found[row["replicate"]] = float(row["test"])
    return found


if __name__ == "__main__":
    typer.run(main)
