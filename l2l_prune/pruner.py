"""The Pruner: a schedule carried out on a model and its optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from l2l_prune import optimizer_state
from l2l_prune._basics import checks, ranks
from l2l_prune._basics.moved import renamed
from l2l_prune.masked_optimizers import MaskedOptimizers
from l2l_prune.masking.allocation import Allocation
from l2l_prune.masking.attached import HeldMasks
from l2l_prune.masking.criteria import Criterion, magnitude
from l2l_prune.masking.layers import Layers, Rule, select
from l2l_prune.masking.named_masks import check_saved, mask_table, restored, updated
from l2l_prune.masking.patterns import UNSTRUCTURED, Pattern
from l2l_prune.masking.plan import MaskChoice
from l2l_prune.masking.task_masks import TaskBlocks, TaskMasks
from l2l_prune.scheduled import ScheduledPruner
from l2l_prune.schedules.schedule import Schedule

_STATE_VERSION = 2


class Pruner(ScheduledPruner):
    """Prunes a model by a schedule, in any training loop that calls :meth:`step`.

    While attached, each selected weight is a masked view: ``module.weight`` equals
    ``weight_orig * weight_mask``, computed at each access, in the model and in every clone,
    copy and functional call. Parameters keep their identity and order. On entering a sparse
    segment, the ``k_l`` best weights of each tensor by ``criterion`` are kept and the others become
    exactly 0; on leaving it they restart from 0 (Algorithm 1 of the paper).

    Reading ``module.weight`` gives a new product, so what is written to it in place is lost: write
    to ``weight_orig``. ``reset_parameters()``, and functions to which ``model.apply(...)`` gives
    the layer itself, reach the stored weights as they are.

    Args:
        model: The module to prune, or a learn2learn wrapper (MAML, MetaSGD, ...) around it.
        schedule: When to prune, and how much.
        optimizer: The optimizer (or several) whose momentum and second moments follow the masks.
            Without it the masks still hold; only the state is left alone.
        layers: ``"all"``: convolution, linear and attention weights; ``"authors"``: the same
            without the first convolution.
        only: Names, ``fnmatch`` patterns, module types or predicates ``(name, module) -> bool``
            that a tensor must match; see :func:`l2l_prune.masking.layers.select`.
        skip: The same, for tensors to leave dense.
        criterion: Scores the entries of a weight, of which the best are kept: by magnitude by
            default; see :mod:`l2l_prune.masking.criteria`.
        pattern: Where pruned weights may lie: anywhere by default, ``NByM(2, 4)``,
            ``Block(rows, columns)`` or ``Rows()`` (whole outputs) of
            :mod:`l2l_prune.masking.patterns`.
        allocation: ``"layerwise"``: each tensor is pruned at the schedule's sparsity. ``"erk"``:
            large tensors more than small ones (:func:`l2l_prune.masking.allocation.erk`), with
            that sparsity over all. ``"global"``: all weights are ranked together, so each layer
            loses as much as its scores say.
        release_state: What happens to the second moments (Adam, RMSprop, ...) of released weights.
            ``"match"``: they are raised to the largest of the tensor's kept weights, and at the
            first step to what the gradient asks for, so that released weights do not jump.
            ``"keep"``: they stay as the optimizer left them.
        task_masks: How masks of single tasks are drawn, for schedules with sparse segments of
            ``masks="task"``; see :meth:`task_masks`.
        dense_keys: Let the model's ``state_dict()`` give ``weight`` (pruned entries 0), as if it
            had no masks, instead of torch's ``weight_orig`` and ``weight_mask``: for programs
            that save checkpoints while they train and load them into plain models.
        group: Ranks of torch.distributed that train this model together: by default those of
            DistributedDataParallel, if ``model`` is or holds such a wrapper, else none. Name them
            (``dist.group.WORLD``) if the model is wrapped only later, or if the loop averages
            gradients by itself. Scores are added up over the ranks and each change of masks is
            compared, so that all prune the same; every rank must make the calls that change masks.
            Between changes nothing is sent.
        regrow_state: Deprecated: the old name of ``release_state``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If nothing can be pruned, a name or number does not fit the model, a selected
            weight cannot be pruned correctly, or ``optimizer`` holds no selected weight.
        RuntimeError: If masks differ between the ranks of ``group``.

    Examples:
        >>> from l2l_prune import DSDSchedule
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruner = Pruner(model, DSDSchedule(0.5, pretrain=1, prune=1, retrain=1), optimizer)
        >>> for _ in range(pruner.schedule.iterations):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(1, 4)).sum().backward()
        ...     optimizer.step()
        ...     pruner.step()
        >>> type(pruner.finalize()).__name__
        'Linear'
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        *,
        layers: Layers = "all",
        only: Rule | Iterable[Rule] | None = None,
        skip: Rule | Iterable[Rule] | None = None,
        criterion: Criterion = magnitude,
        pattern: Pattern = UNSTRUCTURED,
        allocation: Allocation = "layerwise",
        release_state: Literal["match", "keep"] = "match",
        task_masks: TaskMasks | None = None,
        dense_keys: bool = False,
        group: dist.ProcessGroup | None = None,
        regrow_state: Literal["match", "keep"] | None = None,
    ) -> None:
        super().__init__(model, schedule)
        release_state = renamed("regrow_state", regrow_state, "release_state", release_state)
        if release_state not in ("match", "keep"):
            raise ValueError(f'release_state must be "match" or "keep", got {release_state!r}')
        checks.true_or_false("dense_keys", dense_keys)
        if group is not None:
            checks.of_type("group", group, dist.ProcessGroup, "a torch.distributed ProcessGroup")
        self.group = ranks.group_of(model) if group is None else group
        self._pattern = pattern
        self._tensors = select(model, layers=layers, only=only, skip=skip)
        self._choice = MaskChoice(
            self._tensors, schedule, criterion, pattern, allocation, self.group
        )
        self._tasks = TaskBlocks(task_masks, model, self._tensors, schedule, allocation, self.group)
        self._optimizers = MaskedOptimizers(
            model, self._tensors, optimizer, match=release_state == "match"
        )

        # Computed before anything is attached, so that a failure leaves the model untouched.
        weights = [tensor.module._parameters[tensor.name] for tensor in self._tensors]
        first = self._new_masks(self._position, weights)  # type: ignore[arg-type]
        self._held = HeldMasks(model, self._tensors, dense_keys=dense_keys)
        self._put_masks(first)
        self._optimizers.watch()

    # ---- what is going on -------------------------------------------------------------------

    @property
    def sparse(self) -> bool:
        """Whether masks prune the model itself now; masks of single tasks do not count."""
        return self.segment.held and not self._finalized

    @property
    def sparsity(self) -> float:
        """Fraction of the selected weights that is pruned now, in [0, 1)."""
        if not self.sparse:
            return 0.0
        total = sum(mask.numel() for mask in self._held.values)
        return 1 - self._choice.kept(self._position) / total

    @property
    def masks(self) -> dict[str, Tensor]:
        """Boolean mask of each selected tensor by its dense name, a copy; True stays."""
        return self._named(mask.clone() for mask in self._held.values)

    @property
    def learner_masks(self) -> dict[str, Tensor]:
        """The masks under which a learner made now adapts; none where nothing is pruned."""
        if self._tasks.lent is not None:
            return self._named(self._tasks.lent)
        return self._named(self._held.values) if self.sparse else {}

    @property
    def masked_names(self) -> set[str]:
        """Dense names of the tensors that it holds masks on, whether they prune now or not."""
        return {tensor.full_name for tensor in self._tensors}

    @property
    def in_masked_task(self) -> bool:
        """Whether a task runs that has masks of its own."""
        return self._tasks.lent is not None

    @property
    def weights(self) -> dict[str, Tensor]:
        """The stored parameter (``weight_orig``) of each selected tensor by its dense name."""
        return self._named(self._held.originals())

    @property
    def layerwise(self) -> bool:
        """Whether any mask with the right count per tensor is allowed: no pattern, not global."""
        return self._choice.by_tensor

    def summary(self) -> str:
        """A table: shape, kept / total and sparsity per layer and for the whole model.

        "Outputs lost" counts channels or neurons that have lost all of their weights. Before a ReLU
        they may never return, even if retraining is dense: they then pass no gradient. Small first
        convolutions suffer first; ``layers="authors"`` or a lower rate spares them.
        """
        return f"{self._place()}\n{mask_table(self._tensors, self._held.values, self.model)}"

    def __repr__(self) -> str:
        return (
            f"Pruner({self.schedule}, iteration={self._iteration}, phase={self.segment.label!r}, "
            f"sparsity={self.sparsity:.3f}, tensors={len(self._tensors)})"
        )

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """The optimizers whose state follows the masks."""
        return tuple(self._optimizers.all)

    def add_optimizer(self, optimizer: Optimizer) -> None:
        """Let the state of an optimizer that was made after the Pruner follow the masks too.

        Raises:
            TypeError: If it is no optimizer.
            ValueError: If it holds none of the pruned weights and no learning rates of theirs, or
                follows them already.
        """
        self._check_usable(masks=False)
        self._optimizers.add(optimizer)

    def concerns(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer holds pruned weights, or learning rates of theirs (Meta-SGD)."""
        return optimizer_state.holds(optimizer, self._optimizers.followed)

    def forget_optimizers(self) -> None:
        """Let the state of no optimizer follow the masks any more, until others are added."""
        self._check_usable(masks=False)
        self._optimizers.forget()

    # ---- training ---------------------------------------------------------------------------

    @torch.no_grad()
    def replace_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Change masks within a sparse segment; weights and optimizer state follow as in a step.

        Args:
            masks: Boolean tensors by dense name; tensors that are not named keep theirs.

        Raises:
            RuntimeError: In a dense segment, or after :meth:`finalize`, or if the masks differ
                between the ranks of ``group``.
            TypeError: If these are not tensors by name; nothing is changed then.
            ValueError: If a name, shape or count does not fit; nothing is changed then.
        """
        self._check_usable()
        if not self.sparse:
            raise RuntimeError("there are no masks to replace in a dense segment")
        with ranks.failing_together(self.group, self._held.values[0].device):
            new = updated(self._named(self._held.values), masks)
            self._choice.check(new, self._position, "the new")
        ranks.check_same(new, self._iteration, self.group)
        self._put_masks(list(new.values()))

    @contextmanager
    def task_masks(self, masks: Mapping[str, Tensor] | None = None) -> Iterator[dict[str, Tensor]]:
        """Run one task: what is cloned within has masks of its own; see :class:`TaskMasks`.

        Args:
            masks: Masks to use instead of drawn ones, in any segment: boolean tensors by dense
                name; other tensors keep theirs. To continue a task, pass what its block yielded.

        Yields:
            The masks by dense name, all True for a task that is not pruned.

        Raises:
            RuntimeError: Within another such block, or after :meth:`finalize`.
            TypeError: If ``masks`` are not tensors by name.
            ValueError: If a name, shape or dtype of ``masks`` does not fit.
        """
        self._check_usable()
        own = self._named(self._held.values)
        given = None if masks is None else list(updated(own, masks).values())
        with self._tasks.block(self._position, self._held, given) as held:
            yield self._named(mask.clone() for mask in held)

    def more_task_masks(self, tasks: int) -> list[dict[str, Tensor]]:
        """Draw masks for more tasks in a :meth:`task_masks` block, for learners made together."""
        drawn = self._tasks.more(tasks, self._held.originals())
        return [{} if masks is None else self._named(masks) for masks in drawn]

    @contextmanager
    def opened_masks(self) -> Iterator[None]:
        """Let gradients with respect to :attr:`weights` reach pruned entries, which stay 0.

        What the model computes is the same, and so is every inner loop: with ``m`` the mask,
        ``phi_0 = w`` and ``phi_(t+1) = phi_t + m * step_t(phi_t)``. Gradients of a meta-loss
        ``L(phi_K)`` within the block are ``dL / dw`` in all entries, through all steps. No outer
        optimizer may step there.
        """
        self._check_usable()
        with self._held.opened():
            yield

    @torch.no_grad()
    def project(self) -> None:
        """Set the pruned weights to exactly 0 (:meth:`step` does it; harmless to repeat).

        Raises:
            RuntimeError: Within :meth:`task_masks`.
        """
        self._tasks.check_outside()
        if self.sparse:
            self._held.project(nan_too=self._optimizers.may_divide_by_zero)

    # ---- saving and resuming ----------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs besides the model's and optimizer's own state dicts.

        Holds only tensors and plain values, so ``torch.load(weights_only=True)`` reads it.
        """
        return {
            **self._tasks.state_dict(),
            "version": _STATE_VERSION,
            "schedule": self.schedule.to_dict(),
            "pattern": str(self._pattern),
            "iteration": self._iteration,
            "masks": self.masks,
            "regrown": {name: mask.clone() for name, mask in self._optimizers.released.items()},
            "stepped": self._optimizers.stepped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume; the model's and optimizer's state dicts may be loaded before or after.

        With ``dense_keys`` load the Pruner's first: dense weights must fit the masks.

        Args:
            state: What :meth:`state_dict` gave, for the same model and schedule.

        Raises:
            ValueError: If it belongs to another model or schedule; nothing is changed then.
            RuntimeError: After :meth:`finalize`.
        """
        self._check_usable(masks=False)
        keys = {"version", "schedule", "pattern", "iteration", "masks", "regrown", "stepped"}
        if isinstance(state, dict):  # of older versions
            state = {"stepped": [], **state}
        self._check_state(state, keys | set(self._tasks.state_dict()), _STATE_VERSION)
        self._tasks.check_state(state)
        if state["pattern"] != str(self._pattern):
            raise ValueError(
                f"the checkpoint's pattern is {state['pattern']}, this Pruner's {self._pattern}"
            )
        check_saved(state, {tensor.full_name: tensor.shape for tensor in self._tensors})
        position = self.schedule.index(state["iteration"])
        in_order = {tensor.full_name: state["masks"][tensor.full_name] for tensor in self._tensors}
        self._choice.check(in_order, position, f"iteration {state['iteration']}'s")
        self._tasks.load_state_dict(state)
        self._iteration, self._position = state["iteration"], position
        self._held.set(list(restored(state["masks"], self.weights).values()))
        released = restored(state["regrown"], self.weights)
        self._optimizers.resume(self._held.values, released, state["stepped"])

    # ---- inside -----------------------------------------------------------------------------

    def _end_iteration(self, entered: int | None) -> None:
        self._tasks.check_begun(self._position, self._iteration)
        self.project()
        if entered is not None:
            self._put_masks(self._new_masks(entered, self._held.originals()))
        self._tasks.end_iteration()

    def _let_go(self) -> None:
        self._held.take_off()
        self._optimizers.release()

    def _check_usable(self, *, thoroughly: bool = False, masks: bool = True) -> None:
        if self._finalized:
            raise RuntimeError("the Pruner was finalized: make a new one to prune again")
        self._tasks.check_outside()
        self._held.check_there()
        if masks:
            self._held.check_same(self._iteration, thoroughly=thoroughly)

    def _named(self, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
        return dict(zip((t.full_name for t in self._tensors), tensors, strict=True))

    def _new_masks(self, position: int, weights: list[Tensor]) -> list[Tensor]:
        masks = self._choice.masks(position, weights, f"at iteration {self._iteration}")
        ranks.check_same(self._named(masks), self._iteration, self.group)
        return masks

    def _put_masks(self, masks: list[Tensor]) -> None:
        """Change masks during training: weights, momentum and second moments follow."""
        old = self._held.values
        self._held.set(masks)
        self._optimizers.follow(old, masks)
