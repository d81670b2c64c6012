"""A meta-iteration of 4 tasks on 2 processes of 1 thread, and on 1 process of 2 threads.

Conv4 with 64 channels, 8 inner steps of 10 examples, gloo; ratios to 1 process of 1 thread.
"""

from __future__ import annotations

import statistics
import tempfile
import time

import torch
import torch.distributed as dist
from torch import multiprocessing

from benchmarks.timing import Times, rows, show
from benchmarks.workload import SPARSE, STEPS, conv4, meta_iteration, minibatch
from l2l_prune import PrunedReptile

TASKS = 4


def work(rank: int, size: int, rounds: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    batches = [minibatch(size)] * STEPS
    shared = PrunedReptile(conv4(size), SPARSE, group=dist.group.WORLD)
    own = PrunedReptile(conv4(size), SPARSE)
    times: Times = {"1 process x 1 thread": [], "1 x 2": [], "2 x 1": []}
    for number in range(rounds + 1):
        for name, taken in times.items():
            dist.barrier()
            started = time.perf_counter()
            torch.set_num_threads(2 if name == "1 x 2" else 1)
            if name == "2 x 1":
                meta_iteration(shared, [batches] * (TASKS // 2))
            elif rank == 0:  # the other rank sleeps at the barrier
                meta_iteration(own, [batches] * TASKS)
            dist.barrier()
            if number:
                taken.append(time.perf_counter() - started)
    if rank == 0:
        torch.save(times, f"{folder}/times.pt")
    dist.destroy_process_group()


def main(rounds: int) -> None:
    table = []
    for size in (28, 84):
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(work, (size, rounds, folder), nprocs=2)
            times = torch.load(f"{folder}/times.pt", weights_only=True)
        table += rows(times, "1 process x 1 thread", f"{size}x{size}")
        ratio = statistics.median(
            a / b for a, b in zip(times["2 x 1"], times["1 x 2"], strict=True)
        )
        table.append((f"{size}x{size}", "2 x 1 to 1 x 2", "", f"{ratio:.2f}", ""))
    show(__doc__.split("\n")[0], ("images", "variant", "seconds", "ratio", "middle half"), table)
