"""Learners of many tasks, adapted at once: each tensor holds all tasks along a first axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, optim
from torch.func import functional_call, vmap

from l2l_prune._basics import checks
from l2l_prune.reptile.adapt_only import AdaptOnly
from l2l_prune.reptile.learner import copied_state
from l2l_prune.reptile.reptile import PrunedReptile

# These step on each weight by itself, so one optimizer of stacked weights serves all tasks.
ELEMENTWISE = (
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
    optim.Adagrad,
    optim.Adadelta,
    optim.Rprop,
)
COUNTS = ("step", "mu_product")  # one number for a whole parameter in their state


class BatchedLearners:
    """Learners of one :class:`~l2l_prune.PrunedReptile` for several tasks, adapted by ``vmap``.

    They give the same numbers as learners one after the other, up to rounding. If they are made
    within :meth:`~l2l_prune.PrunedReptile.task_masks`, each has masks of its own. Faster for narrow
    networks on small images, whose many small operations become few; slower for wide ones.

    Args:
        reptile: Whose learners they are; it is left as it was.
        tasks: How many learners, >= 1.
        adapt_only: As in :meth:`PrunedReptile.clone`, whole layers only.

    Attributes:
        weights: Parameters by name, ``[tasks, *shape]``.
        buffers: Buffers by name, likewise.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``tasks`` is < 1, channels are cut out (``structured``), the inner optimizer
            does not step on each weight by itself, or ``adapt_only`` chooses channels or unknown
            layers.

    Examples:
        >>> from l2l_prune import DSDSchedule
        >>> schedule = DSDSchedule(0.5, pretrain=1, prune=1, retrain=1)
        >>> reptile, x = PrunedReptile(torch.nn.Linear(4, 2), schedule), torch.ones(3, 10, 4)
        >>> learners = BatchedLearners(reptile, tasks=3)
        >>> learners.adapt(learners.each(lambda learner, x: learner(x).square().mean(), x))
        >>> learners.each(lambda learner, x: learner(x), x).shape
        torch.Size([3, 10, 2])
    """

    def __init__(
        self, reptile: PrunedReptile, tasks: int, adapt_only: AdaptOnly | None = None
    ) -> None:
        checks.of_type("reptile", reptile, PrunedReptile, "a PrunedReptile")
        checks.whole_number("tasks", tasks, least=1)
        if reptile.structured:
            raise ValueError("structured learners adapt one at a time: set tasks_at_once=1")
        self._reptile, self._learner = reptile, reptile.clone(adapt_only)
        workspace = self._learner.workspace
        if workspace.partly:
            raise ValueError("chosen channels adapt one task at a time: set tasks_at_once=1")
        if type(workspace.optimizer) not in ELEMENTWISE:
            raise ValueError(
                f"{type(workspace.optimizer).__name__} may step on several weights together: set "
                f"tasks_at_once=1, or use {', '.join(c.__name__ for c in ELEMENTWISE)}"
            )

        def stacked(tensor: Tensor) -> Tensor:
            # vmap's convolutions of many networks are faster in this format, even if one's are not.
            held = tensor.detach().expand(tasks, *tensor.shape)
            return held.clone(memory_format=torch.contiguous_format)

        self._module = workspace.module
        self.buffers = {name: stacked(b) for name, b in self._module.named_buffers()}
        own = zip(self._module.named_parameters(), reptile.module.parameters(), strict=True)
        self.weights = {  # the model's: the learner's are under its task's mask already
            name: stacked(weight).requires_grad_(p.requires_grad) for (name, p), weight in own
        }
        self._tasks = tasks
        self._masks = self._all_masks(tasks)
        trained = [p for p in self.weights.values() if p.requires_grad]
        self._optimizer = reptile.inner_optimizer(trained, lr=reptile.inner_lr)
        for name, parameter in self._module.named_parameters():
            self._optimizer.state[self.weights[name]] = {
                key: stacked(value) if isinstance(value, Tensor) and key not in COUNTS else value
                for key, value in copied_state(workspace.optimizer.state[parameter]).items()
            }

    def _all_masks(self, tasks: int) -> dict[str, Tensor]:
        """Masks by name: one for all learners or, if each has its own, stacked."""
        first = self._learner.workspace.masks
        others = self._reptile.pruner.more_task_masks(tasks - 1)
        held = first
        if others:
            every = [first, *others]
            names = {name for masks in every for name in masks}
            whole = {name: torch.ones_like(self.weights[name][0].detach()) for name in names}
            held = {
                name: torch.stack([masks.get(name, whole[name]).to(whole[name]) for masks in every])
                for name in names
            }
        for name, mask in held.items():
            self.weights[name].detach().mul_(mask)
        return held

    def discard(self) -> None:
        """Use the learners up; this spares Reptile's next ``clone()`` a copy of the model."""
        self._reptile.discard(self._learner)

    def each(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """``function(learner, *tensors)`` for every task, with ``learner(x)`` as its network.

        Args:
            function: Called once on one task's part of the tensors, as ``torch.vmap`` does.
            tensors: Each with the tasks along its first axis.

        Returns:
            The results, stacked along a first axis.
        """

        def one(weights: dict[str, Tensor], buffers: dict[str, Tensor], *own: Tensor) -> Tensor:
            def learner(x: Tensor) -> Any:
                return functional_call(self._module, (weights, buffers), (x,))

            return function(learner, *own)

        found: Tensor = vmap(one, randomness="different")(self.weights, self.buffers, *tensors)
        return found

    def adapt(self, losses: Tensor) -> None:
        """One inner step of every learner.

        Args:
            losses: One per task, ``[tasks]``, from :meth:`each`.

        Raises:
            RuntimeError: If the losses do not depend on the learners.
            TypeError: If they are not a tensor.
            ValueError: If there is not one for each task.
        """
        checks.of_type("losses", losses, Tensor, "a tensor")
        if losses.shape != (self._tasks,):
            raise ValueError(
                f"losses must hold one number for each of the {self._tasks} tasks, got the shape "
                f"{tuple(losses.shape)}"
            )
        if not losses.requires_grad:
            raise RuntimeError("the losses do not depend on the learners: compute them with each()")
        self._optimizer.zero_grad()
        losses.sum().backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        if self._masks:
            with torch.no_grad():
                masked = [self.weights[name].detach() for name in self._masks]
                torch._foreach_mul_(masked, list(self._masks.values()))
