"""Evaluation of 20 tasks one after the other and together (tasks_at_once).

Conv4, 5-way 1-shot, 15 inner steps of 5 examples, one thread; ratios to one after the other.
"""

from __future__ import annotations

import functools

import torch

from benchmarks.timing import interleaved, rows, show
from benchmarks.workload import SPARSE, WAYS, colours, conv4, device
from l2l_prune import PrunedReptile
from l2l_prune.fewshot import Episode, EpisodeSampler, few_shot_accuracy

TASKS = 20


def main(rounds: int) -> None:
    table = []
    for size, channels in ((28, 8), (28, 16), (28, 32), (28, 64), (28, 128), (84, 16)):
        reptile = PrunedReptile(conv4(size, channels), SPARSE)
        images = torch.rand(160, colours(size), size, size)
        sampler = EpisodeSampler(images, torch.arange(160) // 16, ways=WAYS, shots=1, queries=15)
        drawn = (sampler.sample() for _ in range(TASKS))
        episodes = [Episode(*(part.to(device()) for part in episode)) for episode in drawn]
        variants = {
            name: functools.partial(
                few_shot_accuracy, reptile, episodes, steps=15, batch_size=5, tasks_at_once=together
            )
            for name, together in (("one by one", 1), ("12 together", 12), ("20 together", 20))
        }
        times = interleaved(variants, max(2, rounds // 3))
        table += rows(times, "one by one", f"{size}x{size}", str(channels))
    headers = ("images", "channels", "evaluation", "seconds", "ratio", "middle half")
    show(__doc__.split("\n")[0], headers, table)
