"""How many runs at once a machine has room for."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

import psutil

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""A container's share of the processor: microseconds of each period, or ``max``."""


def usable_cores() -> int:
    """The cores that this process may use: by its affinity, and by its container's quota."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        allowed, period = _QUOTA.read_text().split()
        cores = min(cores, math.ceil(int(allowed) / int(period)))
    return max(cores, 1)


def free_cores() -> int:
    """Usable cores that are idle now, at least 1: the usual number of runs at once.

    Each run has one thread, so its numbers are the same at any load. Watches the processor for
    0.3 seconds: a mean load of the last minute would still count a run that has just ended.
    """
    cores = os.cpu_count() or 1
    idle = round(cores * (1 - psutil.cpu_percent(interval=0.3) / 100))
    return max(1, min(usable_cores(), idle))
