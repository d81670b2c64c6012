"""Several runs at once, each in a process of its own, with progress bars and a clean Ctrl-C."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import filelock
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from l2l_prune.experiments.config import RunConfig
from l2l_prune.experiments.run import Progress, RunResult, run
from l2l_prune.experiments.storage import in_words

_PATIENCE = 120  # seconds for a meta-iteration of a process that is to end


class RunFailed(RuntimeError):
    """A run in another process raised; the message holds what it said.

    Args:
        config: The run.
        said: What it said.
    """

    def __init__(self, config: RunConfig, said: str) -> None:
        super().__init__(f"the run {config.title!r} failed: {said}")
        self.config, self.said = config, said


def run_side_by_side(
    configs: list[RunConfig],
    console: Console,
    *,
    jobs: int | None = None,
    on_result: Callable[[RunConfig, RunResult], None] = lambda config, result: None,
    checkpoints: Path | None = None,
    events: Path | None = None,
) -> list[RunResult]:
    """Run all configs in parallel processes of one thread each.

    Args:
        configs: The runs.
        console: Where the progress bars go.
        jobs: How many may run at once; all by default.
        on_result: Called with each result as it comes.
        checkpoints: Folder in which runs keep their state, and from which they go on.
        events: Folder for TensorBoard's event files.

    Returns:
        Results in the order of ``configs``.

    Raises:
        RunFailed: If a run raised; the others are stopped.
        KeyboardInterrupt: On Ctrl-C, after all processes have ended.
    """
    context = multiprocessing.get_context("spawn")
    messages: Queue[tuple[int, Any]] = context.Queue()
    workers = [
        context.Process(
            target=_work, args=(number, config, checkpoints, events, messages), daemon=True
        )
        for number, config in enumerate(configs)
    ]
    results: dict[int, RunResult] = {}
    waiting = list(workers)
    try:
        for _ in range(len(workers) if jobs is None else jobs):
            _start_next(waiting)
        with _bars(console) as bars:
            tasks = [
                bars.add_task(
                    config.title, total=config.schedule.iterations, phase="waiting", numbers=""
                )
                for config in configs
            ]
            while len(results) < len(configs):
                number, message = _next_message(messages, workers, results)
                if isinstance(message, Progress):
                    phase, numbers = _columns(message)
                    if message.iteration == configs[number].schedule.iterations:
                        phase = "scoring"
                    bars.update(
                        tasks[number],
                        completed=message.iteration,
                        phase=phase,
                        numbers=numbers,
                    )
                elif isinstance(message, Warning):
                    console.print(f"{configs[number].title}: {message}", markup=False)
                elif isinstance(message, RunResult):
                    results[number] = message
                    bars.update(tasks[number], phase="done", numbers=_numbers(message))
                    on_result(configs[number], message)
                    _start_next(waiting)
                else:
                    raise RunFailed(configs[number], str(message))
    finally:
        started = [worker for worker in workers if worker.pid is not None]
        for worker in started:
            worker.terminate()
        for worker in started:
            worker.join()
    return [results[number] for number in range(len(configs))]


def _start_next(waiting: list[Any]) -> None:
    """Start with SIGINT blocked, which the process inherits: Ctrl-C is the parent's to handle.

    Blocked and not ignored, so that a Ctrl-C at this very moment is late and not lost.
    """
    if not waiting:
        return
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        waiting.pop(0).start()
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        waiting.pop(0).start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _work(
    number: int,
    config: RunConfig,
    checkpoints: Path | None,
    events: Path | None,
    messages: Queue[tuple[int, Any]],
) -> None:
    torch.set_num_threads(1)
    # The bars would write over what a process says by itself.
    warnings.showwarning = lambda said, *args, **kw: messages.put((number, UserWarning(str(said))))
    parent = multiprocessing.parent_process()
    try:
        with _own_checkpoint(config, checkpoints) as checkpoint:
            log_to = events / config.slug if events is not None else None
            for message in run(config, checkpoint, events=log_to):
                if parent is not None and not parent.is_alive():
                    return  # killed: its successor goes on from the checkpoint
                messages.put((number, _sendable(message)))
    except (ValueError, OSError, ImportError, MemoryError) as error:  # settings that cannot be
        messages.put((number, in_words(error)))
    except Exception:
        messages.put((number, traceback.format_exc()))
    messages.close()
    messages.join_thread()


@contextmanager
def _own_checkpoint(config: RunConfig, folder: Path | None) -> Iterator[Path | None]:
    """The run's checkpoint; waits for a process whose parent was killed to leave it."""
    if folder is None:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"{config.slug}.pt"
    try:
        with filelock.FileLock(folder / f".{config.slug}.lock", timeout=_PATIENCE):
            yield checkpoint
    except filelock.Timeout:
        raise ValueError(f"another process is still at work on {checkpoint}: try later") from None


def _sendable(message: Progress | RunResult) -> Progress | RunResult:
    """Weights travel as numpy arrays: torch would pass a handle that dies with the process."""
    if isinstance(message, RunResult):
        message.weights = {key: value.numpy() for key, value in message.weights.items()}  # type: ignore[misc]
    return message


def _next_message(
    messages: Queue[tuple[int, Any]], workers: list[Any], results: dict[int, RunResult]
) -> tuple[int, Any]:
    import queue

    while True:
        try:
            number, message = messages.get(timeout=1)
        except queue.Empty:
            for number, worker in enumerate(workers):
                if number not in results and worker.exitcode is not None and messages.empty():
                    return number, f"its process ended with exit code {worker.exitcode}"
            continue
        if isinstance(message, RunResult):
            arrays = message.weights.items()
            message.weights = {key: torch.as_tensor(value) for key, value in arrays}
        return number, message


def _bars(console: Console) -> Bars:
    return Bars(
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[phase]:<18}"),
        TextColumn("{task.fields[numbers]:<24}"),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=4,
    )


def _columns(progress: Progress) -> tuple[str, str]:
    sparsity = f" {100 * progress.sparsity:.0f}% pruned" if progress.sparsity else ""
    numbers = ""
    if progress.train == progress.train:  # not NaN: there is a first evaluation
        numbers = f"train {100 * progress.train:.0f}  test {100 * progress.test:.0f}"
    return progress.phase + sparsity, numbers


def _numbers(result: RunResult) -> str:
    return f"train {100 * result.train.mean:.1f}  test {100 * result.test.mean:.1f}"
