"""A run's curves as TensorBoard event files, while it trains."""

from __future__ import annotations

from pathlib import Path


class EventLog:
    """Writes scores, their gap and sparsity of each point of the curves.

    Args:
        name: What the scores are: ``"accuracy"``.
        folder: Gets the event files; ``None`` writes nothing.
        done: Meta-iterations that were done before; later events of a run that was stopped are
            superseded.

    Raises:
        ImportError: If the package tensorboard is missing.
    """

    def __init__(self, name: str, folder: Path | None, done: int) -> None:
        self._name, self._writer = name, None
        if folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    f'{error}; --tensorboard needs: pip install "l2l-prune[tensorboard]"'
                ) from None
            self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

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
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Write what is still held back."""
        if self._writer is not None:
            self._writer.close()
