"""How alike the updates of different tasks are, for the Reptile runs of a folder.

python docs/results/similarity.py runs/study-task-masks

For each run, its network adapts to tasks of its training and of its unseen characters as in the
run's evaluation, from a fresh inner optimizer. An update is adapted minus first weights; told are
the mean cosine of two updates, and their mean length, over the runs of a method.
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
from l2l_prune.experiments.device import restored_reptile
from l2l_prune.experiments.report.finished_runs import FinishedRun, read_folder
from l2l_prune.experiments.running.run import load_split
from l2l_prune.fewshot import EpisodeSampler
from l2l_prune.fewshot.data import Images

TASKS = 40


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


def measures(run: FinishedRun) -> dict[str, float]:
    """Of training and unseen characters."""
    config, told = run.settings_on_cpu(), {}
    for part in ("train", "test"):
        images = load_split(config, part)
        rows = updates(restored_reptile(run, images), images, config.eval_steps)
        cosines = F.normalize(rows) @ F.normalize(rows).T
        pairs = torch.ones(TASKS, TASKS).triu(1) > 0
        told[f"cosine, {part}"] = float(cosines[pairs].mean())
        told[f"length, {part}"] = float(rows.norm(dim=1).mean())
    return told


def main(folder: Path) -> None:
    """Print a row for each method."""
    torch.set_num_threads(1)
    found = defaultdict(lambda: defaultdict(list))
    for run in read_folder(folder).runs:
        for name, value in measures(run).items():
            found[f"{run.size} {run.method}"][name].append(value)
    rows = []
    for method, columns in found.items():
        row = {"method": method}
        for name, values in columns.items():
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            row[name] = f"{statistics.mean(values):.3f} (sd {spread:.3f})"
        rows.append(row)
    print(tabulate(rows, headers="keys", tablefmt="github"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
