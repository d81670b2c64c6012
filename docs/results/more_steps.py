"""Scores the Reptile runs of a folder again, adapted in other ways.

python docs/results/more_steps.py runs/study docs/results/study/more-steps.toml more-steps.csv

Only runs that the plan's comparisons name are scored, with their last weights, on the tasks of
their own final scores. The inner optimizer starts afresh, so scores after the runs' own 5 steps
stand beside those after 50. The plan's `[adaptation]` says which settings tell the runs apart, how
many steps there are, and on what each learns: a minibatch of the run's own size, or the whole
support set. Scores are kept in the CSV, on which `verdicts.py` judges the plan: repeat a stopped
command to go on.
"""

from __future__ import annotations

import csv
import itertools
import sys
from pathlib import Path

import torch

from l2l_prune.experiments.algorithms.reptile import tasks_at_once
from l2l_prune.experiments.report.comparisons import matching, read_comparisons
from l2l_prune.experiments.report.finished_runs import FinishedRun, read_folder
from l2l_prune.experiments.restoring import restored_reptile
from l2l_prune.experiments.running.run import evaluation_tasks, load_split
from l2l_prune.experiments.streams import stream
from l2l_prune.experiments.toml_files import read_toml
from l2l_prune.fewshot.evaluation import few_shot_accuracy

OF_SCORES = ("steps", "batch")  # settings of scores, not of runs


def score(run: FinishedRun, steps: int, batch: str) -> float:
    """Test accuracy after so many steps."""
    config = run.settings_on_cpu()
    sizes = {"own": config.eval_batch, "whole": config.ways * config.shots}
    images = load_split(config, "test")
    return few_shot_accuracy(
        restored_reptile(run, images),
        evaluation_tasks(images, config, "final tasks", "test"),
        steps=steps,
        batch_size=sizes[batch],
        transductive=config.transductive,
        generator=stream(config.seed, "evaluation minibatches"),
        tasks_at_once=tasks_at_once(config.channels, images.images.shape[-1]),
    ).mean


def main(folder: Path, plan_file: Path, table: Path) -> None:
    """Score what is missing."""
    torch.set_num_threads(1)
    plan = read_toml(plan_file)
    comparisons = read_comparisons(plan["comparison"])
    adaptation = plan.get("adaptation", {"columns": ["channels"], "steps": [5, 50]})
    runs = read_folder(folder).runs
    sides = [
        {name: value for name, value in side.items() if name not in OF_SCORES}
        for comparison in comparisons
        for side in (comparison.treatment, comparison.control)
    ]
    named = {id(run): run for side in sides for run in matching(side, runs).values()}
    scored: set[tuple[str, ...]] = set()
    if table.is_file():
        with table.open() as file:
            scored = {tuple(row[:-1]) for row in list(csv.reader(file))[1:]}
    else:
        batch = ["batch"] if "batch" in adaptation else []
        columns = ["replicate", "method", *adaptation["columns"], "steps", *batch, "test"]
        table.write_text(",".join(columns) + "\n")
    for run in sorted(named.values(), key=lambda run: (run.seed, run.method)):
        own = [str(run.config[column]) for column in adaptation["columns"]]
        for steps, batch in itertools.product(
            adaptation["steps"], adaptation.get("batch", ["own"])
        ):
            key = (str(run.seed), run.config["name"], *own, str(steps))
            key += (batch,) if "batch" in adaptation else ()
            if key not in scored:
                row = (*key, f"{score(run, steps, batch):.4f}")
                with table.open("a") as file:
                    csv.writer(file, lineterminator="\n").writerow(row)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
