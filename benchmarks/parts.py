"""Where the time of a whole run goes: DSD of the demo, 400 meta-iterations, by part.

CPU seconds of the process and shares of the run, one thread. A part does not count what parts
within it do; all that happens within evaluation is evaluation.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.timing import show
from l2l_prune import PrunedReptile
from l2l_prune.experiments.algorithms.reptile import Reptile
from l2l_prune.experiments.demo import demo_configs
from l2l_prune.experiments.running import run, run_folder
from l2l_prune.fewshot.data.episodes import EpisodeSampler
from l2l_prune.reptile.learner import Workspace

PARTS: list[tuple[object, str, str]] = [
    (run, "_load", "data"),
    (EpisodeSampler, "sample", "sampling"),
    (PrunedReptile, "clone", "clone"),
    (Reptile, "_loss", "forward"),
    (Workspace, "backward", "backward"),
    (Workspace, "step", "inner optimizer and mask"),
    (PrunedReptile, "collect", "collect"),
    (PrunedReptile, "step", "outer step and pruner"),
    (Reptile, "evaluate", "evaluation"),
    (run, "save_checkpoint", "checkpoint"),
    (run_folder, "write_results", "results and picture"),
]
EVALUATION = "evaluation"


class Clock:
    """Seconds by part, each without those of the parts within it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[tuple[str, float]] = []  # parts that run now, and what was within them

    def around(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """``function``, its time counted."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if any(name == EVALUATION for name, _ in self._open):
                return function(*args, **kwargs)
            started = time.process_time()
            self._open.append((part, 0.0))
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.process_time() - started
                self.seconds[part] += taken - self._open.pop()[1]
                if self._open:
                    name, within = self._open[-1]
                    self._open[-1] = (name, within + taken)

        return timed


def main(rounds: int, iterations: int = 400) -> None:
    del rounds  # one run is long enough
    config = demo_configs(iterations, sparsity=0.5, seed=0)[1]
    clock = Clock()
    patches = [patch.object(o, n, clock.around(getattr(o, n), part)) for o, n, part in PARTS]
    for one in patches:
        one.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            started = time.process_time()
            outcome = run_folder.run_into(config, Path(folder))
            total = time.process_time() - started
    finally:
        for one in patches:
            one.stop()
    if outcome.error:
        raise RuntimeError(outcome.error)
    clock.seconds["loop, minibatches, the rest"] = total - sum(clock.seconds.values())
    table = [
        (part, f"{seconds:.2f}", f"{100 * seconds / total:.1f}%")
        for part, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1])
    ]
    show(__doc__.split("\n")[0], ("part", "seconds", "share"), table)
