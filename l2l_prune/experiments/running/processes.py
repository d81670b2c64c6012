"""Run each run in its own process, here or on a cluster; each writes its files to its folder."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import l2l_prune
from l2l_prune._basics import checks
from l2l_prune.experiments.config import RunConfig
from l2l_prune.experiments.run_result import Progress
from l2l_prune.experiments.running.checkpoint import remove_checkpoint
from l2l_prune.experiments.running.display import Display
from l2l_prune.experiments.running.run_folder import Outcome, run_into
from l2l_prune.experiments.running.storage import finished_run, run_name

Work = Callable[..., Outcome]
Message = Progress | Outcome | str | None  # None: the process starts; a string: a warning
_STARTS = 2


class RunFailed(RuntimeError):
    """A run failed; the message contains the run's own error."""


def run_all(
    configs: Sequence[RunConfig],
    folder: Path,
    console: Console,
    *,
    jobs: int | None = None,
    cluster: str | None = None,
    logger: str | None = None,
    work: Work = run_into,
    deadline: float | None = None,
) -> Generator[Outcome]:
    """Run what has not finished in ``folder`` yet, and show the progress.

    A run that fails does not stop the others; closing the generator does.

    Args:
        configs: The runs; no two are the same.
        folder: Gets a folder for each.
        console: Where progress is shown.
        jobs: Runs at once, one thread each; all by default.
        cluster: Hand the runs to submitit: ``"local"`` or ``"slurm"``.
        logger: Also write each run's curves into its folder: a key of
            :data:`~l2l_prune.experiments.running.loggers.LOGGERS`.
        work: What a process does with a run.
        deadline: When to stop, on the clock of ``time.monotonic``; the runs keep their checkpoints.

    Yields:
        The outcomes as runs finish; those that had finished before come first.

    Raises:
        ImportError: If ``cluster`` is given and submitit is missing.
        ValueError: If results in ``folder`` are damaged.
    """
    if jobs is not None:
        checks.whole_number("jobs", jobs, least=1)
    folder.mkdir(parents=True, exist_ok=True)
    missing = []
    for config in configs:
        if found := finished_run(folder / run_name(config), config):
            # It may have been killed after it wrote its result and before it removed these.
            remove_checkpoint(folder / run_name(config) / "checkpoint.pt")
            yield Outcome.finished(config, found["train"]["mean"], found["test"]["mean"])
        else:
            missing.append(config)
    ended = len(configs) - len(missing)
    if ended:
        console.print(f"{ended} of {len(configs)} runs had finished before")
    work = functools.partial(work, folder=folder, logger=logger)
    number = len(configs) if jobs is None else jobs
    if cluster:
        events = _submitted(work, missing, folder / "jobs", number, cluster)
    else:
        events = _local(work, missing, folder / "logs", number)
    with closing(events), Display(configs, ended, console) as display:
        for config, message in events:
            if isinstance(message, Outcome):
                display.ended(config, message)
                yield message
            elif isinstance(message, Progress):
                display.progress(config, message)
            elif message is None:
                display.started(config)
            else:
                display.said(config, message)
            if deadline is not None and time.monotonic() > deadline:
                return


def finish_all(
    configs: Sequence[RunConfig],
    folder: Path,
    console: Console,
    *,
    jobs: int | None = None,
    logger: str | None = None,
) -> list[dict[str, Any]]:
    """Run what has not finished in ``folder`` yet, and stop at the first run that fails.

    Args:
        configs: The runs.
        folder: Gets a folder for each run.
        console: Where progress is shown.
        jobs: Runs at once, one thread each; all by default.
        logger: Also write each run's curves into its folder: a key of
            :data:`~l2l_prune.experiments.running.loggers.LOGGERS`.

    Returns:
        The entries of ``results.json`` in the order of ``configs``.

    Raises:
        RunFailed: If a run failed; the others are stopped, and resume when started again.
        ValueError: If results in ``folder`` are damaged.
    """
    by_name = {run_name(config): config for config in configs}
    outcomes = run_all(configs, folder, console, jobs=jobs, logger=logger)
    with closing(outcomes):
        for outcome in outcomes:
            if outcome.error:
                title = by_name[outcome.name].title
                raise RunFailed(f"the run {title!r} failed: {outcome.error}")
    found = [finished_run(folder / name, config) for name, config in by_name.items()]
    return [entry for entry in found if entry is not None]


def _local(
    work: Work, configs: Sequence[RunConfig], logs: Path, jobs: int
) -> Generator[tuple[RunConfig, Message]]:
    context = multiprocessing.get_context("spawn")
    waiting, starts = deque(configs), Counter[str]()
    running: dict[Connection, tuple[RunConfig, Any]] = {}
    logs.mkdir(exist_ok=True)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                config = waiting.popleft()
                starts[run_name(config)] += 1
                receiving, sending = context.Pipe(duplex=False)
                process = context.Process(
                    target=_work,
                    args=(work, config, _log(logs, config), sending),
                    daemon=config.ranks == 1,  # a daemon could not start other ranks
                )
                _start(process)
                sending.close()  # else this process would not notice when the other one ends
                running[receiving] = (config, process)
                yield config, None
            ready = wait(list(running))
            for receiving in [each for each in running if each in ready]:
                config, process = running[receiving]
                try:
                    message: Message = receiving.recv()
                except (EOFError, OSError):  # killed from outside, perhaps for its memory
                    del running[receiving]
                    process.join()
                    if starts[run_name(config)] < _STARTS:
                        waiting.appendleft(config)  # resumes from its checkpoint
                        continue
                    message = Outcome(run_name(config), _death(process.exitcode, logs, config))
                    with suppress(OSError):  # a report reads it; the folder may be full
                        place = logs.parent / run_name(config)
                        place.mkdir(exist_ok=True)
                        (place / "error.txt").write_text(f"{message.error}\n", encoding="utf-8")
                else:
                    if isinstance(message, Outcome):
                        del running[receiving]
                        process.join()
                yield config, message
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()
        _remove_empty(logs)


def _start(process: Any) -> None:
    """Start with SIGINT blocked, which the process inherits: Ctrl-C is the parent's to handle.

    It is blocked, not ignored, so that a Ctrl-C at this very moment is delayed, not lost.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        process.start()
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _work(work: Work, config: RunConfig, log: Path, sending: Connection) -> None:
    def tell(message: Message) -> None:
        with suppress(OSError):  # the parent was killed: the run finds that out by itself
            sending.send(message)

    _write_to(log)
    shown, ours = warnings.showwarning, Path(l2l_prune.__file__).parent

    def show(said: Warning | str, kind: Any, file: str, *place: Any, **more: Any) -> None:
        if Path(file).is_relative_to(ours):
            tell(str(said))
        else:
            shown(said, kind, file, *place, **more)

    warnings.showwarning = show  # type: ignore[assignment]
    tell(work(config, tell=tell))
    sending.close()


def _log(logs: Path, config: RunConfig) -> Path:
    return logs / f"{run_name(config)}.txt"


def _death(code: int | None, logs: Path, config: RunConfig) -> str:
    words = f"its process was killed (out of memory?), exit code {code}"
    log = _log(logs, config)
    return f"{words}: see {log}" if log.exists() and log.stat().st_size else words


def _write_to(log: Path) -> None:
    """Send all output of this process and its libraries to a file: it would break the display."""
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError:
        handle = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.close(handle)


def _remove_empty(logs: Path) -> None:
    with suppress(OSError):
        for log in logs.glob("*.txt"):
            if log.stat().st_size == 0:
                log.unlink()
        logs.rmdir()


def _submitted(
    work: Work, configs: Sequence[RunConfig], folder: Path, jobs: int, cluster: str
) -> Generator[tuple[RunConfig, Message]]:
    try:
        import submitit
    except ImportError as error:
        raise ImportError(f'{error}; --cluster needs: pip install "l2l-prune[cluster]"') from None
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    except RuntimeError as error:
        raise ValueError(
            f"{error}: is this machine part of a cluster? Or leave --cluster out"
        ) from None
    on_gpu = any(torch.device(config.device).type == "cuda" for config in configs)
    executor.update_parameters(
        timeout_min=3 * 24 * 60,
        cpus_per_task=max((config.ranks for config in configs), default=1),
        slurm_array_parallelism=jobs,
        **({"gpus_per_node": 1} if on_gpu else {}),
    )
    handed = dict(zip(executor.map_array(work, configs), configs, strict=True))
    for job, config in handed.items():
        yield config, f"handed to {cluster} as job {job.job_id}"
    for job in submitit.helpers.as_completed(list(handed), poll_frequency=1):
        config = handed[job]
        try:
            yield config, job.result()
        except Exception as error:  # the job itself died
            yield (
                config,
                Outcome(run_name(config), f"{type(error).__name__}: {error}".splitlines()[0]),
            )
