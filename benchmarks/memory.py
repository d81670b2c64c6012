"""Memory and time over a long run: the largest resident memory so far, the last meta-iterations.

28x28, 8 channels, one task of one inner step. Memory should stay where it is after the first tenth;
milliseconds are the mean of the 100 meta-iterations before a mark.
"""

from __future__ import annotations

import resource
import sys
import time

import torch

from benchmarks.timing import show
from benchmarks.workload import conv4, meta_iteration, minibatch
from l2l_prune import DSDSchedule, PrunedReptile, Structured, TaskMasks

ITERATIONS = 10_000
MARKS = (100, 1_000, 5_000, 10_000)
TIMED = 100


def megabytes() -> float:
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main(rounds: int) -> None:
    del rounds
    batch, table = minibatch(28), []
    dsd = DSDSchedule.from_fractions(0.5, ITERATIONS)
    for name, schedule, cut in (
        ("masks", dsd, False),
        ("masks in each task", dsd.per_task(), False),
        ("channels", dsd, True),
        ("channels in each task", dsd.per_task(), True),
    ):
        meta = PrunedReptile(
            conv4(28, 8),
            schedule,
            structured=Structured(batch[0]) if cut else None,
            task_masks=TaskMasks(torch.Generator().manual_seed(0)),
        )
        found, started = [], 0.0
        for iteration in range(ITERATIONS):
            if iteration + TIMED in MARKS:
                started = time.perf_counter()
            meta_iteration(meta, [[batch]])
            if iteration + 1 in MARKS:
                taken = 1000 * (time.perf_counter() - started) / TIMED
                found.append(f"{megabytes():.1f} MB, {taken:.2f} ms")
        table.append((name, *found))
    show(__doc__.split("\n")[0], ("DSD 50%", *map(str, MARKS)), table)
