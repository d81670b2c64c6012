"""One run with its files in its own folder: a checkpoint, the results, or the error."""

from __future__ import annotations

import math
import multiprocessing
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from l2l_prune.experiments.config import RunConfig
from l2l_prune.experiments.report.results import write_results
from l2l_prune.experiments.run_result import Progress, RunResult
from l2l_prune.experiments.running.checkpoint import remove_checkpoint
from l2l_prune.experiments.running.run import run
from l2l_prune.experiments.running.storage import finished_run, in_words, locked_folder, run_name
from l2l_prune.fewshot.evaluation import ACCURACY, Measure, tenths

_PATIENCE = 120
"""Seconds for a process whose command was killed to notice at its next meta-iteration."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``error`` is ``None``, or one line that says what went wrong."""

    name: str
    error: str | None
    train: float = math.nan
    test: float = math.nan
    measure: Measure = ACCURACY
    held_out: str = "test"

    @classmethod
    def finished(cls, config: RunConfig, train: float, test: float) -> Outcome:
        """Of a run with these mean scores."""
        return cls(run_name(config), None, train, test, config.measure, config.held_out)

    def __str__(self) -> str:
        if self.error:
            return self.error
        train, test = map(self.measure.read, (self.train, self.test))
        return f"train {tenths(train)}, {self.held_out} {tenths(test)}{self.measure.ending}"


def run_into(
    config: RunConfig,
    folder: Path,
    logger: str | None = None,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Train in ``folder / run_name(config)``, from its checkpoint if there is one.

    A run that fails writes ``error.txt`` there and raises nothing. If its command is killed, the
    run ends by itself and leaves its checkpoint for the next one.

    Args:
        config: The run.
        folder: The folder of all runs.
        logger: Also write the curves: a key of
            :data:`~l2l_prune.experiments.running.loggers.LOGGERS`.
        tell: Called with the progress after each meta-iteration.
    """
    torch.set_num_threads(1)
    name = run_name(config)
    try:
        with locked_folder(folder / name, patience=_PATIENCE):
            return _train(config, folder / name, logger, tell)
    except Exception as error:  # another process has the folder: touch nothing in it
        return Outcome(name, _in_a_line(error))


def _train(
    config: RunConfig, place: Path, logger: str | None, tell: Callable[[Progress], None]
) -> Outcome:
    checkpoint = place / "checkpoint.pt"
    parent = multiprocessing.parent_process()
    try:
        (place / "error.txt").unlink(missing_ok=True)
        if found := finished_run(place, config):  # finished by the process that we waited for
            train, test = (found[part]["mean"] for part in ("train", "test"))
            outcome = Outcome.finished(config, train, test)
        else:
            events = place / logger if logger else None
            for message in run(config, checkpoint, events=events, logger=logger):
                if parent is not None and not parent.is_alive():
                    return Outcome(place.name, "its command was killed")
                if isinstance(message, RunResult):
                    write_results(place, [config], [message])
                    train, test = message.train.mean, message.test.mean
                    outcome = Outcome.finished(config, train, test)
                else:
                    tell(message)
        remove_checkpoint(checkpoint)
    except Exception as error:
        with suppress(OSError):  # such as a full disk: the outcome holds the error too
            (place / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return Outcome(place.name, _in_a_line(error))
    return outcome


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {in_words(error)}"
