"""What adapting to a new task costs on one thread, and what accuracy it gives.

Conv4 meta-trained by Reptile on rendered characters, 5-way 1-shot, scored on characters of unseen
alphabets: dense, masked, with channels cut out, and each with only some layers adapting. Writes
``adaptation.csv`` and ``adaptation.png`` for ``l2l-prune report``. Trains for some minutes first:
``python -m benchmarks.adaptation [--size 84] [--out FOLDER]``.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import torch
import typer
from tabulate import tabulate
from torch.nn import functional as F

from benchmarks.workload import WAYS
from l2l_prune import DSDSchedule, PrunedReptile
from l2l_prune.channels import Structured
from l2l_prune.experiments.exporting import BEST, PARTS, SHARE
from l2l_prune.experiments.report.adaptation import write_adaptation
from l2l_prune.fewshot import (
    Conv4,
    EpisodeSampler,
    Glyphs,
    few_shot_accuracy,
    minibatches,
    paired_difference,
)
from l2l_prune.reptile import best_channels
from l2l_prune.reptile.adapt_only import AdaptOnly
from l2l_prune.shipping import Adapting, adaptation_costs, costs_table

LEARNERS: dict[str, tuple[float, bool]] = {
    "dense": (0.5, False),
    "90% masked": (0.9, False),
    "half of the channels": (0.5, True),
    "quarter of the channels": (0.75, True),
}


def meta_learner(name: str, size: int, channels: int, iterations: int) -> PrunedReptile:
    """Trained from the same weights on the same tasks, and left in its sparse phase."""
    rate, structured = LEARNERS[name]
    dense = iterations if name == "dense" else iterations // 4
    schedule = DSDSchedule(rate, pretrain=dense, prune=iterations - dense, retrain=0)
    torch.manual_seed(0)
    net = Conv4(WAYS, channels, 1, size, "stride" if size == 28 else "max")
    net = net.to(memory_format=torch.channels_last)
    cut = Structured(torch.zeros(2, 1, size, size)) if structured else None
    reptile = PrunedReptile(net, schedule, structured=cut)
    data = Glyphs("train", size=size)
    sampler = EpisodeSampler(data.images, data.labels, ways=WAYS, shots=10, queries=0)
    draws = torch.Generator().manual_seed(0)
    for _ in range(iterations):
        for task in itertools.islice(sampler, 4):
            learner = reptile.clone()
            x, y = task.support_x, task.support_y
            for a, b in minibatches(x, y, batch_size=10, steps=5, generator=draws):
                learner.adapt(F.cross_entropy(learner(a), b))
            reptile.collect(learner)
        reptile.step()
    return reptile


def channels_that_adapt(reptile: PrunedReptile, size: int) -> AdaptOnly:
    """Chosen on tasks like those that are measured, of the training classes."""
    data = Glyphs("train", size=size)
    sampler = EpisodeSampler(data.images, data.labels, ways=WAYS, shots=1, queries=0, seed=1)
    tasks = [(task.support_x, task.support_y) for task in itertools.islice(sampler, 12)]
    return best_channels(reptile, tasks, share=SHARE)


def main(
    size: Annotated[int, typer.Option(help="28, or larger with pooling.")] = 28,
    channels: Annotated[int, typer.Option()] = 32,
    iterations: Annotated[int, typer.Option(help="Meta-iterations of each learner.")] = 400,
    tasks: Annotated[int, typer.Option(help="Test tasks behind each accuracy.")] = 200,
    steps: Annotated[int, typer.Option(help="Inner steps on a new task.")] = 15,
    rounds: Annotated[int, typer.Option(min=2, help="Timed rounds.")] = 9,
    out: Annotated[Path, typer.Option(help="Folder for table and picture.")] = Path("runs/cost"),
) -> None:
    """Train, score, measure, print the table."""
    torch.set_num_threads(1)
    unseen = Glyphs("test", size=size)
    sampler = EpisodeSampler(unseen.images, unseen.labels, ways=WAYS, shots=1, queries=5, seed=1)
    episodes = list(itertools.islice(sampler, tasks))
    ways, accuracies = {}, {}
    for name in LEARNERS:
        reptile = meta_learner(name, size, channels, iterations)
        for part, only in {**PARTS, BEST: channels_that_adapt(reptile, size)}.items():
            way = f"{name}, {part}"
            ways[way] = Adapting(reptile, only)
            accuracies[way] = few_shot_accuracy(
                reptile,
                episodes,
                steps=steps,
                batch_size=5,
                adapt_only=only,
                generator=torch.Generator().manual_seed(0),
            )
            print(way, accuracies[way], flush=True)
    costs = adaptation_costs(ways, episodes[0], steps=steps, batch_size=5, rounds=rounds)
    rows = costs_table(costs, accuracies)
    first = next(iter(accuracies.values()))
    for row in rows:
        row["to dense"] = str(paired_difference(accuracies[row["way"]], first))
    print(tabulate(rows, headers="keys", floatfmt=".4g", tablefmt="github"))
    write_adaptation(out, costs, accuracies)


if __name__ == "__main__":
    typer.run(main)
