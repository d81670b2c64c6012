"""The cores that this process may use."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

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
