"""The base of all pruners: a schedule, a position in it, one ``step()`` per meta-iteration."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from l2l_prune._basics import checks
from l2l_prune._basics.hooks import Hooks
from l2l_prune.schedules.schedule import Schedule, Segment
from l2l_prune.serves_learners import ServesLearners


class ScheduledPruner(ServesLearners, ABC):
    """The base of :class:`~l2l_prune.Pruner` and :class:`~l2l_prune.ChannelPruner`.

    Args:
        model: What is pruned.
        schedule: The schedule to follow, from its first iteration on.

    Attributes:
        changes_shapes: Whether tensors have other shapes in sparse phases.

    Raises:
        TypeError: If ``model`` is not a module or ``schedule`` not a
            :class:`~l2l_prune.Schedule`.
    """

    changes_shapes: ClassVar[bool] = False

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        self.model = checks.of_type("model", model, nn.Module, "a torch.nn.Module")
        self.schedule = checks.of_type("schedule", schedule, Schedule, "a Schedule")
        self._iteration = 0
        self._position = schedule.index(0)
        self._finalized = False
        self._step_pre_hooks, self._step_hooks = Hooks(), Hooks()

    # ---- where it is ------------------------------------------------------------------------

    @property
    def iteration(self) -> int:
        """Number of :meth:`step` calls so far."""
        return self._iteration

    @property
    def segment(self) -> Segment:
        """The current segment of the schedule."""
        return self.schedule.segments[self._position]

    @property
    def phase(self) -> str:
        """The segment's name; in DSD and IHT ``"pretrain"``, ``"prune"`` or ``"retrain"``."""
        return self.segment.phase

    @property
    def mask_due(self) -> bool:
        """Whether the next :meth:`step` enters another segment."""
        return self.schedule.index(self._iteration + 1) != self._position

    @property
    def finalized(self) -> bool:
        """Whether :meth:`finalize` has ended the pruning."""
        return self._finalized

    @property
    def masks(self) -> dict[str, Tensor]:
        """Boolean mask of each masked tensor by its dense name; True stays."""
        return {}

    @property
    @abstractmethod
    def sparse(self) -> bool:
        """Whether anything is pruned now."""

    @property
    @abstractmethod
    def sparsity(self) -> float:
        """Fraction that is pruned now, in [0, 1)."""

    # ---- training ---------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """End a meta-iteration; call it after the (outer) optimizer's step.

        Keeps pruned weights pruned and, when the schedule says so, enters the next segment. After
        the end of the schedule the last segment goes on.

        Raises:
            RuntimeError: After :meth:`finalize`, if other code changed a mask, or if masks differ
                between the ranks of a group.
            ValueError: If no choice of what to prune is possible (weights are NaN or infinite,
                say); nothing is changed then.
        """
        self._check_usable(thoroughly=self.mask_due)
        self._step_pre_hooks.call(self)
        following = self.schedule.index(self._iteration + 1)
        with torch.inference_mode(False), torch.no_grad():  # what is made here is trained later
            self._end_iteration(following if following != self._position else None)
        self._position = following
        self._iteration += 1
        self._step_hooks.call(self)

    def finalize(self) -> nn.Module:
        """End the pruning and leave a plain module: original classes, names, order and shapes.

        Weights under a mask at that moment keep the value 0, and channels that are cut out come
        back as at the end of a sparse phase; both are free to change from then on.

        Returns:
            The model that was given, changed in place.

        Raises:
            RuntimeError: If called twice, or if other code changed a mask.

        Warns:
            UserWarning: If something is pruned and the schedule would still retrain it.
        """
        self._check_usable(thoroughly=True)
        to_come = self.schedule.segments[self._position + 1 :]
        if self.segment.held and any(s.iterations and not s.sparse for s in to_come):
            warnings.warn(
                f"finalize() before the schedule retrains what is pruned ({self._place()}): pruned "
                "weights stay 0; to retrain them, call step() once per meta-iteration to the end",
                stacklevel=2,
            )
        with torch.no_grad():
            self._let_go()
        self._finalized = True
        return self.model

    def register_step_pre_hook(self, hook: Callable[[Self], None]) -> RemovableHandle:
        """Call ``hook(pruner)`` at the start of each :meth:`step`; ``remove()`` takes it off."""
        return self._step_pre_hooks.register(hook)

    def register_step_hook(self, hook: Callable[[Self], None]) -> RemovableHandle:
        """Call ``hook(pruner)`` at the end of each :meth:`step`; ``remove()`` takes it off."""
        return self._step_hooks.register(hook)

    # ---- saving and resuming ------------------------------------------------------------------

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs besides the model's and the optimizer's own state dicts."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from what :meth:`state_dict` gave, for the same model and schedule."""

    # ---- what a pruner adds -------------------------------------------------------------------

    @abstractmethod
    def _end_iteration(self, entered: int | None) -> None:
        """Keep pruned weights pruned; enter the segment ``entered`` unless it is None."""

    @abstractmethod
    def _let_go(self) -> None:
        """Leave a plain module behind."""

    @abstractmethod
    def _check_usable(self, *, thoroughly: bool = False) -> None:
        """Refuse to go on after :meth:`finalize`, or if other code changed what is held."""

    def _check_state(self, state: Any, keys: set[str], version: int) -> None:
        """Refuse a state dict of another kind, version or schedule."""
        kind = type(self).__name__
        if not isinstance(state, dict) or set(state) != keys or state["version"] != version:
            raise ValueError(f"this is not a {kind} state dict of this version")
        if type(state["iteration"]) is not int or state["iteration"] < 0:
            raise ValueError(f"the checkpoint's iteration must be >= 0, got {state['iteration']!r}")
        if state["schedule"] != self.schedule.to_dict():
            differing = _differing(state["schedule"], self.schedule.to_dict())
            raise ValueError(
                f"the checkpoint belongs to another schedule than that of this {kind}: {differing}"
            )

    def _place(self) -> str:
        """The position in the schedule in words, as the heading of a summary."""
        done = f"iteration {self._iteration} of {self.schedule.iterations}"
        return f"{done}, phase {self.segment.label}"


def _differing(saved: Any, own: dict[str, Any]) -> str:
    """In which fields a checkpoint's schedule is not this one, in words; of many the first ones."""
    try:
        pairs = [("type", saved["type"], own["type"])]
        pairs += [("number of segments", len(saved["segments"]), len(own["segments"]))]
        segments = zip(saved["segments"], own["segments"], strict=False)
        for number, (theirs, ours) in enumerate(segments, start=1):
            where = f"of segment {number} ({ours['phase']})"
            names = {**theirs, **ours}
            pairs += [(f"{name} {where}", theirs.get(name), ours.get(name)) for name in names]
        shown = checks.describe
        found = [f"{n} is {shown(a)} there and {shown(b)} here" for n, a, b in pairs if a != b]
    except (AttributeError, LookupError, TypeError):
        return f"it holds {checks.describe(saved)}"
    more = f"; and {len(found) - _MOST_SHOWN} more" if len(found) > _MOST_SHOWN else ""
    return "; ".join(found[:_MOST_SHOWN]) + more


_MOST_SHOWN = 4
