"""How many runs at once a machine has room for."""

from __future__ import annotations

import os

import psutil

from l2l_prune._basics.cores import usable_cores


def free_cores() -> int:
    """Usable cores that are idle now, at least 1: the usual number of runs at once.

    Each run has one thread, so its numbers are the same at any load. Watches the processor for
    0.3 seconds: a mean load of the last minute would still count a run that has just ended.
    """
    cores = os.cpu_count() or 1
    idle = round(cores * (1 - psutil.cpu_percent(interval=0.3) / 100))
    return max(1, min(usable_cores(), idle))
