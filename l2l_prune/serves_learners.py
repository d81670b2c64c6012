"""What a pruner does for learners, which train on copies of its model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

StepPreHook: TypeAlias = Callable[[Optimizer, Any, Any], Any]
States: TypeAlias = Iterable[tuple[Tensor, dict[str, Any]]]


class ServesLearners:
    """Asked by Reptile's learners; here the answers of a pruner that does nothing for them."""

    @property
    def learner_masks(self) -> dict[str, Tensor]:
        """The masks under which a learner made now adapts; none where nothing is pruned."""
        return {}

    @property
    def masked_names(self) -> set[str]:
        """Dense names of the tensors that it holds masks on, whether they prune now or not."""
        return set()

    @property
    def in_masked_task(self) -> bool:
        """Whether a task runs that has masks of its own."""
        return False

    @contextmanager
    def task_masks(self, masks: Mapping[str, Tensor] | None = None) -> Iterator[dict[str, Tensor]]:
        """Run one task, with masks of its own if it has any (:meth:`Pruner.task_masks`)."""
        if masks is not None:
            raise RuntimeError(f"{type(self).__name__} holds no masks")
        yield {}

    def more_task_masks(self, tasks: int) -> list[dict[str, Tensor]]:
        """Masks for more tasks that begin together; none where tasks have no masks of their own."""
        return []

    def cut_for_task(
        self, copy: nn.Module, optimizer: Optimizer
    ) -> Callable[[list[Tensor]], list[Tensor]] | None:
        """Make a learner's copy of the model small, if the task that runs has fewer channels.

        Returns:
            ``None`` where it stays whole. Else a function that gives the copy and the state of its
            optimizer their full shapes again; it takes tensors like the parameters, and returns
            them in full shapes too.
        """
        return None

    def first_step_hook(self, model: nn.Module) -> StepPreHook | None:
        """A step pre-hook for the optimizer of a copy ``model``, so that no released weight jumps.

        ``None`` where nothing was just released.
        """
        return None

    def follow_states(self, states: Callable[[], States]) -> None:
        """Also follow optimizer state that no optimizer holds; ``states`` gives it by parameter."""
