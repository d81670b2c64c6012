"""Log a run's curves while it trains, to local files of TensorBoard, W&B or MLflow."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from l2l_prune._basics import checks
from l2l_prune._basics.files import replace_file


class Writer(Protocol):
    """What a logger must be able to do."""

    def write(self, values: Mapping[str, float], iteration: int) -> None:
        """Take the values of a meta-iteration."""

    def close(self, ended: bool) -> None:
        """Write what is still buffered; ``ended`` is False for a run that was stopped."""


class EventLog:
    """Writes the scores, their gap and the sparsity at each point of the curves.

    Use it as a context manager.

    Args:
        name: What the scores measure, such as ``"accuracy"``.
        folder: Gets the logger's files; ``None`` writes nothing.
        done: Meta-iterations that were done before; later points of a run that was stopped are
            overwritten.
        logger: One of :data:`LOGGERS`.
        settings: The run's settings, which W&B and MLflow show beside its curves.

    Raises:
        ImportError: If the logger's package is missing.
        ValueError: If there is no such logger.
    """

    def __init__(
        self,
        name: str,
        folder: Path | None,
        done: int,
        logger: str = "tensorboard",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        check_logger(logger)
        self._name = name
        self._writer: Writer | None = None
        if folder is not None:
            try:
                self._writer = LOGGERS[logger](folder, done, settings or {})
            except ImportError as error:
                raise ImportError(
                    f'{error}; --logger {logger} needs: pip install "l2l-prune[{logger}]"'
                ) from None

    def add(self, iteration: int, *, train: float, test: float, sparsity: float) -> None:
        """Write a point of the curves."""
        if self._writer is None:
            return
        values = {
            f"{self._name}/train": train,
            f"{self._name}/test": test,
            f"{self._name}/gap": train - test,
            "sparsity": sparsity,
        }
        self._writer.write(values, iteration)

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._writer is not None:
            self._writer.close(ended=error is None)


class _TensorBoard:
    def __init__(self, folder: Path, done: int, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def write(self, values: Mapping[str, float], iteration: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def close(self, ended: bool) -> None:
        self._writer.close()


class _WandB:
    """Offline, unless ``WANDB_MODE`` says otherwise; ``wandb sync --append`` uploads it later.

    A resumed run writes a second file under the same id. Points in both files are equal, and W&B
    keeps the first.
    """

    def __init__(self, folder: Path, done: int, settings: Mapping[str, Any]) -> None:
        import wandb

        name = folder.resolve().parent.name
        self._run = wandb.init(
            project="l2l-prune",
            name=name,
            id=_remembered(folder, lambda: secrets.token_hex(4)),
            resume="allow",
            reinit="create_new",
            dir=folder,
            mode=None if "WANDB_MODE" in os.environ else "offline",
            config=dict(settings),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def write(self, values: Mapping[str, float], iteration: int) -> None:
        self._run.log(dict(values), step=iteration)

    def close(self, ended: bool) -> None:
        self._run.finish(exit_code=int(not ended))


class _MLflow:
    """Writes to a database in the run's folder, or to the one in ``MLFLOW_TRACKING_URI``."""

    def __init__(self, folder: Path, done: int, settings: Mapping[str, Any]) -> None:
        from mlflow.tracking import MlflowClient

        database = f"sqlite:///{folder.resolve() / 'mlflow.db'}"
        folder.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", database))
        found = self._client.get_experiment_by_name("l2l-prune")
        experiment = found.experiment_id if found else self._client.create_experiment("l2l-prune")
        name = folder.resolve().parent.name
        self._id: str = _remembered(
            folder, lambda: self._client.create_run(experiment, run_name=name).info.run_id
        )
        self._client.update_run(self._id, "RUNNING")
        for key, value in settings.items():
            self._client.log_param(self._id, key, value)
        points = self._client.get_metric_history(self._id, "sparsity")
        self._last = max((point.step for point in points), default=0)

    def write(self, values: Mapping[str, float], iteration: int) -> None:
        if iteration <= self._last:  # written before the run was stopped, after its checkpoint
            return
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=iteration)

    def close(self, ended: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if ended else "KILLED")


LOGGERS: dict[str, Callable[[Path, int, Mapping[str, Any]], Writer]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}
"""The writers of curves, by the name that the option and the extra share."""


def check_logger(name: str) -> str:
    """The name of a logger.

    Raises:
        ValueError: If there is no such logger.
    """
    checks.one_of("logger", name, LOGGERS)
    return name


def _remembered(folder: Path, make: Callable[[], str]) -> str:
    """The run's id: the old one if the run is resumed, else a new one."""
    file = folder / "run_id"
    if file.exists():
        return file.read_text()
    identity = make()
    folder.mkdir(parents=True, exist_ok=True)
    with replace_file(file) as path:
        path.write_text(identity)
    return identity
