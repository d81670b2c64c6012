"""Variants timed side by side: interleaved in one run, told as ratios to the first."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

from tabulate import tabulate

from benchmarks.workload import finish

Times = dict[str, list[float]]


def interleaved(variants: dict[str, Callable[[], object]], rounds: int, warmup: int = 1) -> Times:
    """Seconds of each round of each variant; each round starts with another one."""
    times: Times = {name: [] for name in variants}
    order = list(variants)
    for number in range(rounds + warmup):
        shift = number % len(order)
        for name in order[shift:] + order[:shift]:
            finish()
            started = time.perf_counter()
            variants[name]()
            finish()
            if number >= warmup:
                times[name].append(time.perf_counter() - started)
    return times


def rows(times: Times, floor: str, *labels: str) -> list[tuple[str, ...]]:
    """A row for each variant: median seconds, median ratio to ``floor``, its middle half."""
    found = []
    for name, taken in times.items():
        ratios = [a / b for a, b in zip(taken, times[floor], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        seconds = f"{statistics.median(taken):.4f}"
        found.append((*labels, name, seconds, f"{middle:.3f}", f"{low:.3f} - {high:.3f}"))
    return found


def show(title: str, headers: Iterable[str], table: list[tuple[str, ...]]) -> None:
    """Print a table with its title."""
    print(f"\n{title}\n", tabulate(table, headers=[*headers], disable_numparse=True), sep="\n")
