"""What differs between networks that were meta-trained with task masks and without.

python docs/results/why_task_masks.py runs/study-task-masks

For each Reptile run of the folder, its network adapts to tasks of its training and of its unseen
characters as in the run's evaluation, from a fresh inner optimizer. Told for each method:

- the mean cosine of two tasks' updates (adapted minus first weights), and their mean length;
- how many of ten training images with labels drawn at random a learner fits: what it can learn by
  heart;
- the training accuracy at which the curves, as means over runs, pass 82% on unseen characters.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

from l2l_prune import PrunedReptile
from l2l_prune.experiments.report.finished_runs import FinishedRun, read_folder
from l2l_prune.experiments.restoring import restored_reptile
from l2l_prune.experiments.running.run import load_split
from l2l_prune.fewshot import EpisodeSampler
from l2l_prune.fewshot.data import Images

TASKS, LEVEL = 40, 0.82


def updates(reptile: PrunedReptile, images: Images, steps: int) -> Tensor:
    """One row for each task: all weights in the model's order."""
    sampler = EpisodeSampler(images.images, images.labels, ways=5, shots=1, queries=0, seed=0)
    found = []
    for task in itertools.islice(sampler, TASKS):
        learner = reptile.clone()
        start = torch.cat([p.detach().flatten() for p in learner.parameters()])
        for _ in range(steps):
            learner.adapt(F.cross_entropy(learner(task.support_x), task.support_y))
        found.append(torch.cat([p.detach().flatten() for p in learner.parameters()]) - start)
    return torch.stack(found)


def learned_by_heart(reptile: PrunedReptile, images: Images, steps: int) -> float:
    """Share of randomly labelled examples that learners fit, two images of each character."""
    sampler = EpisodeSampler(images.images, images.labels, ways=5, shots=2, queries=0, seed=1)
    draws, right = torch.Generator().manual_seed(2), 0.0
    for task in itertools.islice(sampler, TASKS):
        labels = task.support_y[torch.randperm(len(task.support_y), generator=draws)]
        learner = reptile.clone()
        for _ in range(steps):
            learner.adapt(F.cross_entropy(learner(task.support_x), labels))
        with torch.no_grad():
            right += float((learner(task.support_x).argmax(1) == labels).float().mean())
    return right / TASKS


def training_accuracy_at_level(runs: list[FinishedRun]) -> float:
    """Training accuracy where the mean curve on unseen characters first passes the level."""
    curves = [run.entry["curve"] for run in runs]
    train, test = (
        [statistics.mean(point[part] for point in points) for points in zip(*curves, strict=True)]
        for part in ("train", "test")
    )
    for i in range(1, len(test)):
        if test[i - 1] < LEVEL <= test[i]:
            share = (LEVEL - test[i - 1]) / (test[i] - test[i - 1])
            return train[i - 1] + share * (train[i] - train[i - 1])
    return float("nan")


def measures(run: FinishedRun) -> dict[str, float]:
    """Of training and unseen characters."""
    config, told = run.settings_on_cpu(), {}
    for part in ("train", "test"):
        images = load_split(config, part)
        reptile = restored_reptile(run, images)
        rows = updates(reptile, images, config.eval_steps)
        cosines = F.normalize(rows) @ F.normalize(rows).T
        pairs = torch.ones(TASKS, TASKS).triu(1) > 0
        told[f"cosine, {part}"] = float(cosines[pairs].mean())
        told[f"length, {part}"] = float(rows.norm(dim=1).mean())
        if part == "train":
            told["by heart"] = learned_by_heart(reptile, images, config.eval_steps)
    return told


def main(folder: Path) -> None:
    """Print a row for each method."""
    torch.set_num_threads(1)
    found = defaultdict(list)
    for run in read_folder(folder).runs:
        found[f"{run.size} {run.method}"].append(run)
    rows = []
    for method, runs in found.items():
        told = [measures(run) for run in runs]
        row = {"method": method}
        for name in told[0]:
            values = [one[name] for one in told]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            row[name] = f"{statistics.mean(values):.3f} (sd {spread:.3f})"
        row[f"train at test {LEVEL:g}"] = f"{training_accuracy_at_level(runs):.3f}"
        rows.append(row)
    print(tabulate(rows, headers="keys", tablefmt="github"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
