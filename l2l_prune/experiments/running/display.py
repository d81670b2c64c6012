"""Progress of runs on the console: a live line for each, or plain lines if output is piped."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column

from l2l_prune.experiments.config import RunConfig
from l2l_prune.experiments.run_result import Progress
from l2l_prune.experiments.running.run_folder import Outcome
from l2l_prune.experiments.running.storage import run_name

_WIDE, _NARROW = 100, 60


class Display:
    """Shows the progress of runs; use it as a context manager.

    Args:
        configs: All runs of the command.
        ended: How many of them had finished before.
        console: Where to show it.
    """

    def __init__(self, configs: Sequence[RunConfig], ended: int, console: Console) -> None:
        titles = {config.title for config in configs}
        self._by_title = len(titles) == len(configs)
        self._total, self._before, self._ended = len(configs), ended, ended
        self._console, self._started = console, time.monotonic()
        self._lines: dict[str, TaskID] = {}
        self._first: dict[str, tuple[float, int]] = {}
        self._bars = _bars(console) if console.is_terminal else None

    def __enter__(self) -> Display:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def started(self, config: RunConfig) -> None:
        """A process starts to work on the run."""
        phase = "compiling" if config.compile else "starting"
        self._first.pop(run_name(config), None)
        if self._bars is None:
            self._print(f"{self._label(config)}: {phase}")
        elif run_name(config) not in self._lines:
            total = config.schedule.iterations
            self._lines[run_name(config)] = self._bars.add_task(
                self._label(config), total=total, phase=phase, numbers="", left=""
            )

    def progress(self, config: RunConfig, at: Progress) -> None:
        """A meta-iteration is done; plain lines are printed only for the points of the curves."""
        total = config.schedule.iterations
        phase = at.phase + (f" {100 * at.sparsity:.0f}%" if at.sparsity else "")
        if at.iteration == total:
            phase = "scoring"
        numbers = ""
        if not math.isnan(at.train):  # there was an evaluation
            train, test = map(config.measure.read, (at.train, at.test))
            held_out = "test" if config.held_out == "test" else "val"
            numbers = f"train {train:.0f} {held_out} {test:.0f}{config.measure.ending}"
        left = self._left(run_name(config), at.iteration, total)
        if self._bars is not None:
            self._bars.update(
                self._lines[run_name(config)],
                completed=at.iteration,
                phase=phase,
                numbers=numbers,
                left=left,
            )
        elif at.iteration % config.eval_every == 0 or at.iteration == total:
            parts = [f"{at.iteration}/{total}", phase, numbers, f"{left} left" if left else ""]
            self._print(f"{self._label(config)}: {', '.join(filter(None, parts))}")

    def said(self, config: RunConfig, words: str) -> None:
        """Print a message about the run."""
        self._print(f"{self._label(config)}: {words}")

    def ended(self, config: RunConfig, outcome: Outcome) -> None:
        """The run is over; the time left is that of all remaining runs."""
        self._ended += 1
        if self._bars is not None and run_name(config) in self._lines:
            self._bars.remove_task(self._lines.pop(run_name(config)))
        pace = (time.monotonic() - self._started) / (self._ended - self._before)
        left = _duration(pace * (self._total - self._ended))
        self._print(f"{self._ended}/{self._total} {self._label(config)}: {outcome} ({left} left)")

    def _left(self, name: str, iteration: int, total: int) -> str:
        """Time to the run's end at its pace since its first message; empty at the first."""
        now = time.monotonic()
        began, first = self._first.setdefault(name, (now, iteration))
        if iteration == first:
            return ""
        return _duration((now - began) / (iteration - first) * (total - iteration))

    def _label(self, config: RunConfig) -> str:
        return config.title if self._by_title else run_name(config)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _bars(console: Console) -> Bars:
    """On a narrow console the name is shortened and the scores go, never the remaining time."""

    def fixed(text: str, width: int) -> ProgressColumn:
        return TextColumn(text, table_column=Column(min_width=width, no_wrap=True))

    flexible = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", markup=False, table_column=flexible)
    ]
    if console.width >= _WIDE:
        columns.append(BarColumn(bar_width=20))
    columns += [fixed("{task.percentage:>3.0f}%", 4), fixed("{task.fields[phase]}", 11)]
    if console.width >= _NARROW:
        columns.append(fixed("{task.fields[numbers]}", 19))
    columns.append(fixed("{task.fields[left]:>7}", 7))
    return Bars(*columns, console=console, refresh_per_second=4, expand=True)


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
