"""Two processes that stand for two ranks of torch.distributed."""

from __future__ import annotations

from torch import multiprocessing

RANKS = 2


def on_two_ranks(work, *args):
    """Run ``work(rank, *args)`` in two processes; what fails in one of them is raised here.

    They are forks of a process that holds these imports and nothing else: neither a GPU nor
    threads, which forks of this one might miss. So no rank waits for an import.
    """
    methods = multiprocessing.get_all_start_methods()
    multiprocessing.set_forkserver_preload(["torch._dynamo", "l2l_prune", "tests.conftest"])
    multiprocessing.start_processes(
        work, args, nprocs=RANKS, start_method="forkserver" if "forkserver" in methods else "spawn"
    )
