"""The processes that share a run's tasks: ranks of torch.distributed, without torchrun.

The run's own process is rank 0. It starts the others, evaluates, and writes all files; they train
on their tasks and end with it.
"""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from l2l_prune.experiments.config import RunConfig

_PATIENCE = datetime.timedelta(days=30)
"""How long ranks wait while rank 0 evaluates; if a rank dies, the others notice at once."""


@contextmanager
def shared_tasks(config: RunConfig, checkpoint: Path | None) -> Iterator[None]:
    """Inside, the default group of torch.distributed is the run's ranks; this process is rank 0.

    If ``config.ranks`` is 1, nothing happens.

    Args:
        config: The run.
        checkpoint: The checkpoint that rank 0 has resumed from, if any; all others do so too.

    Raises:
        ValueError: If this process belongs to a group already.
    """
    if config.ranks == 1:
        yield
        return
    if dist.is_initialized():
        raise ValueError(
            "ranks starts its own processes: leave it out where torch.distributed runs already"
        )
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        others = [
            context.Process(target=_work, args=(config, rank, store, checkpoint), daemon=True)
            for rank in range(1, config.ranks)
        ]
        for process in others:
            process.start()
        try:
            _join(config, 0, store)
            yield
        finally:
            for process in others:
                process.terminate()
            for process in others:
                process.join()
            if dist.is_initialized():
                dist.destroy_process_group()


def _join(config: RunConfig, rank: int, store: str) -> None:
    dist.init_process_group(
        "gloo", f"file://{store}", rank=rank, world_size=config.ranks, timeout=_PATIENCE
    )


def _work(config: RunConfig, rank: int, store: str, checkpoint: Path | None) -> None:
    from l2l_prune.experiments.running.run import follow  # it imports this file

    torch.set_num_threads(1)
    _join(config, rank, store)
    follow(config, checkpoint)
