"""Reptile with pruning (Algorithms 1 and 2 of the paper), with learn2learn's method names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from l2l_prune._basics import checks, ranks
from l2l_prune._basics.hooks import Hooks
from l2l_prune._basics.precision import forget_casts
from l2l_prune.channels.pruner import ChannelPruner, Structured
from l2l_prune.masking.allocation import Allocation
from l2l_prune.masking.criteria import Criterion, magnitude
from l2l_prune.masking.layers import Layers, Rule
from l2l_prune.masking.masked_layer import held_names
from l2l_prune.masking.patterns import UNSTRUCTURED, Pattern
from l2l_prune.masking.task_masks import TaskMasks
from l2l_prune.pruner import Pruner
from l2l_prune.reptile.adapt_only import AdaptOnly, chosen_parameters
from l2l_prune.reptile.learner import (
    Learner,
    OptimizerFactory,
    Workspace,
    adam,
    copied_state,
    move_state,
    structure,
)
from l2l_prune.scheduled import ScheduledPruner
from l2l_prune.schedules.schedule import Schedule

StepPreHook: TypeAlias = Callable[["PrunedReptile", tuple[()], dict[str, Any]], None]


class PrunedReptile(nn.Module):
    """Reptile whose meta-parameters follow a pruning schedule.

    Each meta-iteration clones a learner per task, adapts it by minibatch steps, collects it, and
    then moves the meta-parameters towards the mean of the adapted ones (Algorithm 2), holds the
    pruned ones at 0 and advances the schedule (Algorithm 1). While sparse, learners are adapted
    under the mask. As in the authors' program the inner optimizer sees the gradients of pruned
    weights, so Adam's second moments are warm when those weights are released.

    Batch normalisation uses batch statistics in training mode; running buffers that a learner
    changes are dropped with it, so nothing leaks from task to task, nor into the model.

    Args:
        model: The network; its initial weights are the start. It is pruned in place.
        schedule: When to prune, and how much.
        inner_lr: Learning rate of the inner optimizer, > 0.
        meta_lr: Step towards the mean of the adapted weights at the start, >= 0.
        meta_lr_final: The step at the end of the schedule; it changes linearly in between.
        annealing: ``"run"``: the meta step goes from the first to the last value once, over the
            whole schedule, as in the paper; ``"phase"``: it does so in each segment, so that
            released weights learn with full steps.
        inner_optimizer: Called as ``inner_optimizer(parameters, lr=inner_lr)``: an optimizer
            class or a ``functools.partial`` of one. By default :func:`adam`, with betas (0, 0.999).
        carry_state: Carry the inner optimizer's state over from one collected task to the next,
            as the authors and learn2learn's example do; otherwise each task starts afresh.
        foml: First-order MAML: move by the last inner step only instead of by all steps.
        layers: As in :class:`~l2l_prune.Pruner`, as are ``only``, ``skip``, ``criterion``,
            ``pattern``, ``allocation`` and ``task_masks``.
        structured: Cut out whole channels instead of masking weights, so that sparse phases run on
            a small network: see :class:`~l2l_prune.channels.pruner.ChannelPruner`. Of the
            pruning arguments above, it can only be combined with ``skip``, for layers, and with
            ``task_masks``, by which learners have channels of their own and are small.
        group: Ranks of torch.distributed (``dist.group.WORLD``) that share the tasks of each
            meta-iteration: every rank adapts its own, at least one, and all call :meth:`step`.
            Weights and masks are then the same on all ranks, as if one process had all tasks
            (for masks see :class:`~l2l_prune.Pruner`). The carried state is averaged over the
            ranks, whereas one process hands it from task to task.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of range, or the model cannot be pruned as asked.

    Examples:
        >>> from l2l_prune import DSDSchedule
        >>> net, x = torch.nn.Linear(4, 2), torch.ones(3, 4)
        >>> reptile = PrunedReptile(net, DSDSchedule(0.5, pretrain=1, prune=1, retrain=1))
        >>> for _ in range(reptile.schedule.iterations):
        ...     for task in range(2):
        ...         learner = reptile.clone()
        ...         learner.adapt(learner(x).square().mean())
        ...         reptile.collect(learner)
        ...     reptile.step()
        >>> reptile.finalize() is net
        True
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        inner_lr: float = 1e-3,
        meta_lr: float = 1.0,
        meta_lr_final: float = 0.0,
        annealing: Literal["run", "phase"] = "run",
        inner_optimizer: OptimizerFactory = adam,
        carry_state: bool = True,
        foml: bool = False,
        layers: Layers = "all",
        only: Rule | Iterable[Rule] | None = None,
        skip: Rule | Iterable[Rule] | None = None,
        criterion: Criterion = magnitude,
        pattern: Pattern = UNSTRUCTURED,
        allocation: Allocation = "layerwise",
        task_masks: TaskMasks | None = None,
        structured: Structured | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        checks.of_type("model", model, nn.Module, "a torch.nn.Module")
        checks.number("meta_lr", meta_lr)
        checks.number("meta_lr_final", meta_lr_final)
        checks.number("inner_lr", inner_lr, above=0)
        if annealing not in ("run", "phase"):
            raise ValueError(f'annealing must be "run" or "phase", got {annealing!r}')
        checks.true_or_false("carry_state", carry_state)
        checks.true_or_false("foml", foml)
        if not callable(inner_optimizer):
            raise TypeError(
                "inner_optimizer must be an optimizer class, or a functools.partial of one, got "
                f"{checks.describe(inner_optimizer)}"
            )
        if structured is not None:
            checks.of_type("structured", structured, Structured, "a Structured")
        if group is not None:  # before a mask is made
            checks.of_type("group", group, dist.ProcessGroup, "a torch.distributed ProcessGroup")
            ranks.take_first([*model.parameters(), *model.buffers()], group)
        self.pruner: ScheduledPruner
        if structured is None:
            self.pruner = Pruner(
                model,
                schedule,
                layers=layers,
                only=only,
                skip=skip,
                criterion=criterion,
                pattern=pattern,
                allocation=allocation,
                task_masks=task_masks,
                group=group,
            )
        else:
            given = (only, layers, criterion, pattern, allocation)
            if given != (None, "all", magnitude, UNSTRUCTURED, "layerwise"):
                raise ValueError(
                    "structured cannot be combined with only, layers, criterion, pattern or "
                    "allocation: it cuts channels out of all layers except those in skip="
                )
            self.pruner = ChannelPruner(
                model,
                schedule,
                example_inputs=structured.example_inputs,
                importance=structured.importance,
                skip=skip,
                task_masks=task_masks,
                group=group,
            )
        self.pruner.follow_states(self._carried_states)
        self.module = model
        self.inner_lr = inner_lr
        self.meta_lr_initial, self.meta_lr_final = meta_lr, meta_lr_final
        self.annealing = annealing
        self.carry_state, self.foml = carry_state, foml
        self.inner_optimizer = inner_optimizer
        self._group = group
        self._workspaces: list[Workspace] = []
        self._seen_modules = [*model.modules()]
        self._seen_kinds = [(p.dtype, p.device) for p in model.parameters()]
        self._inner_state: list[dict[str, Any]] = []
        self._collected: list[Tensor] = []  # sum over tasks, one tensor a parameter
        self._tasks = 0
        self._step_pre_hooks = Hooks()

    @property
    def schedule(self) -> Schedule:
        """The pruning schedule."""
        return self.pruner.schedule

    @property
    def structured(self) -> bool:
        """Whether sparse phases cut out channels instead of masking weights."""
        return self.pruner.changes_shapes

    @property
    def iteration(self) -> int:
        """Meta-iterations done so far."""
        return self.pruner.iteration

    @property
    def meta_lr(self) -> float:
        """The meta step size of the current iteration, which changes linearly."""
        start, stop = 0, self.schedule.iterations
        if self.annealing == "phase":
            spans = self.schedule.spans()
            start, stop, _ = next((s for s in spans if self.iteration < s[1]), spans[-1])
        done = min((self.iteration - start) / (stop - start), 1.0)
        return (1 - done) * self.meta_lr_initial + done * self.meta_lr_final

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the (masked) meta-model."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def clone(self, adapt_only: AdaptOnly | None = None) -> Learner:
        """A learner that starts from the meta-parameters, for one task.

        Several may live at once. Dropping a learner without :meth:`collect` leaves no trace, so
        evaluation is ``clone``, ``adapt``, predict.

        Args:
            adapt_only: What inner steps change, everything by default: names of layers (or of
                modules around them, or of parameters), ``fnmatch`` patterns, module types or
                predicates ``(name, module) -> bool``; or a mapping from layers to the output
                channels that adapt (``None``: all), counted among those that the learner has
                (``structured=`` cuts some out). The backward pass ends at the first layer
                that adapts. Chosen channels (for instance by
                :func:`~l2l_prune.reptile.best_channels.best_channels`) take as much time as
                their whole layers.

        Raises:
            RuntimeError: After :meth:`finalize`.
            TypeError: If ``adapt_only`` is none of these.
            ValueError: If it names an unknown layer or channel, or nothing would adapt.

        Source:
            Only the head: ANIL (Raghu et al., ICLR 2020). Chosen layers and channels: p-Meta (Qu
            et al., KDD 2022), TinyTrain (Kwon et al., ICML 2024).
        """
        self._check_usable()
        workspace = self._workspace()
        workspace.restore(self.module, self._inner_state if self.carry_state else [])
        if adapt_only is not None:
            workspace.narrow(chosen_parameters(workspace.module, adapt_only))
        return Learner(self, self.iteration, workspace)

    @contextmanager
    def task_masks(self, masks: Mapping[str, Tensor] | None = None) -> Iterator[dict[str, Tensor]]:
        """Run one task: a learner that is cloned within keeps masks of its own, to its end.

        In the meta-update, weights that these masks prune count as unchanged: this task does not
        move them. See :meth:`l2l_prune.Pruner.task_masks`; arguments and errors are the same.
        """
        with self.pruner.task_masks(masks) as held:
            yield held

    @torch.no_grad()
    def collect(self, learner: Learner) -> None:
        """Add the adapted weights of ``learner`` to this meta-iteration, and use the learner up.

        Raises:
            RuntimeError: If the learner belongs to another PrunedReptile, was collected before,
                was cloned before the last :meth:`step`, was cast or moved by itself, or has layers
                other than the model's; or after :meth:`finalize`.
        """
        self._check_usable()
        self._check_kinds(learner)
        workspace = self._taken_back(learner)
        if name := workspace.replaced:
            raise RuntimeError(
                f"{name} of this learner is not the one that clone() gave it, so no inner step "
                "adapted it: replace layers in the model, or discard(learner)"
            )
        if self._collects_moves:
            start = workspace.before_last if self.foml else self.module.parameters()
            moved = workspace.moves(start)
        else:
            moved = workspace.adapted(self.module.parameters())
        if not self._collected:
            self._collected = [p.clone() for p in moved]
        else:
            torch._foreach_add_(self._collected, moved)
        self._tasks += 1
        if self.carry_state:
            workspace.clear_momentum()
            self._inner_state = workspace.save_state(self._inner_state)
        self._keep(workspace)

    def discard(self, learner: Learner) -> None:
        """Use a learner up without collecting it, for evaluation.

        Dropping it does the same; this spares the next :meth:`clone` a copy of the model.

        Raises:
            RuntimeError: As for :meth:`collect`.
        """
        self._keep(self._taken_back(learner))

    @torch.no_grad()
    def step(self) -> None:
        """End a meta-iteration: interpolate, project, advance the schedule.

        Raises:
            RuntimeError: If no learner was collected since the last step, or after
                :meth:`finalize`; or if the ranks of ``group`` are at different iterations, or
                masks differ between them.
            ValueError: If weights are NaN or infinite when a mask is due; nothing is changed then.
                :meth:`forget_tasks` drops the tasks that made them so.
        """
        self._check_usable()
        if not self._tasks:
            raise RuntimeError("step() without a task: collect(learner) at least once before it")
        tasks, mean = self._tasks, [total.clone() for total in self._collected]
        if self._group is not None:
            device = mean[0].device
            ranks.check_same_iteration(self.iteration, self._group, device)
            if self.carry_state:
                ranks.average_states(self._inner_state, tasks, self._group, device)
            ranks.sum_over_ranks(mean, self._group)
            tasks = int(ranks.total(torch.tensor(tasks, device=device), self._group))
        torch._foreach_div_(mean, tasks)
        parameters = list(self.module.parameters())
        before = [p.detach().clone() for p in parameters]
        iteration, segment = self.iteration, self.pruner.segment
        observed = bool(self._step_pre_hooks) or self.pruner.mask_due
        try:
            if observed:
                self._show_gradients(mean)
                self._step_pre_hooks.call(self, (), {})
            self._move_weights(mean)
            self.pruner.step()
        except Exception:
            if self.iteration == iteration:  # otherwise a hook failed after the step
                torch._foreach_copy_([p.detach() for p in parameters], before)
            raise
        finally:
            if observed:
                for parameter in parameters:
                    parameter.grad = None
            if self.iteration != iteration:
                self._collected, self._tasks = [], 0
        if self.structured and self.pruner.segment is not segment:
            self._workspaces.clear()  # they have the shapes of the old segment

    def register_step_pre_hook(self, hook: StepPreHook) -> RemovableHandle:
        """Call ``hook(reptile, args, kwargs)`` in each :meth:`step` before the weights move.

        As with torch's optimizers, gradients are there: the parameters' ``grad`` holds Reptile's
        meta-gradient, old minus mean adapted weights, where criteria find it too.

        Returns:
            A handle; its ``remove()`` takes the hook off.
        """
        return self._step_pre_hooks.register(hook)

    def forget_tasks(self) -> None:
        """Drop the tasks collected since the last :meth:`step`, for instance if one diverged."""
        self._collected, self._tasks = [], 0

    def forget_inner_state(self) -> None:
        """Start the inner optimizer's carried state afresh."""
        self._inner_state = []

    def finalize(self) -> nn.Module:
        """Take the masks off and return the plain model (see :meth:`Pruner.finalize`)."""
        self._workspaces.clear()
        return self.pruner.finalize()

    def get_extra_state(self) -> dict[str, Any]:
        """What ``state_dict()`` holds besides the model, for resuming exactly."""
        return {
            "pruner": self.pruner.state_dict(),
            "inner_state": [copied_state(state) for state in self._inner_state],
            "collected": [total.clone() for total in self._collected],
            "tasks": self._tasks,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Called by ``load_state_dict()``.

        Raises:
            ValueError: If the state belongs to another model or schedule; nothing is changed then.
        """
        # Cut tensors get the shapes of the state only later.
        parameters = dict(self.module.named_parameters())
        _check_state(state, parameters, shapes=not self.structured)
        self.pruner.load_state_dict(state["pruner"])
        self._workspaces.clear()
        devices = [parameter.device for parameter in parameters.values()]
        self._inner_state = [
            copied_state(entry, device)
            for entry, device in zip(state["inner_state"], devices, strict=False)
        ]
        self._collected = [
            total.to(device, copy=True)
            for total, device in zip(state["collected"], devices, strict=False)
        ]
        self._tasks = state["tasks"]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrunedReptile:
        """Move or cast: working copies are made anew, and the carried state moves along."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._workspaces.clear()
        self._collected = [fn(total) for total in self._collected]
        for state in self._inner_state:
            move_state(state, fn)
        return self

    def _move_weights(self, means: list[Tensor]) -> None:
        """Algorithm 2's interpolation; a mean of copies would move frozen weights by rounding."""
        pairs = list(zip(self.module.parameters(), means, strict=True))
        weights = [parameter.detach() for parameter, _ in pairs if parameter.requires_grad]
        means = [mean for parameter, mean in pairs if parameter.requires_grad]
        if self._collects_moves:
            torch._foreach_add_(weights, means, alpha=self.meta_lr)
        else:
            torch._foreach_lerp_(weights, means, self.meta_lr)
        forget_casts()

    def _show_gradients(self, means: list[Tensor]) -> None:
        """Reptile's meta-gradient as ``grad``: Nichol et al., 2018, Section 2."""
        for parameter, mean in zip(self.module.parameters(), means, strict=True):
            parameter.grad = -mean if self._collects_moves else parameter.detach() - mean

    @property
    def _collects_moves(self) -> bool:
        """Whether learners give differences, so that weights none has moved stay bit for bit."""
        return self.foml or self.pruner.segment.per_task

    def _check_kinds(self, learner: Learner) -> None:
        """Refuse to add up tensors of another dtype or device than the model's."""
        if not isinstance(learner, Learner) or learner.workspace.origin is not None:
            return
        for mine, own in zip(learner.workspace.parameters, self.module.parameters(), strict=True):
            if (mine.dtype, mine.device) != (own.dtype, own.device):
                raise RuntimeError(
                    f"this learner was cast or moved ({mine.dtype} on {mine.device}, the model is "
                    f"{own.dtype} on {own.device}) and cannot be collected: cast or move the "
                    "PrunedReptile instead"
                )

    def _taken_back(self, learner: Learner) -> Workspace:
        if not isinstance(learner, Learner):
            raise TypeError(f"learner must be one made by clone(), got {checks.describe(learner)}")
        return learner.release(self, self.iteration)

    def _keep(self, workspace: Workspace) -> None:
        """Keep a working copy for the next task, unless that would see what was done to it."""
        if not workspace.altered:
            self._workspaces.append(workspace)

    def _carried_states(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        return zip(self.module.parameters(), self._inner_state, strict=False)

    def _workspace(self) -> Workspace:
        """A working copy of the model as it is now: layers may have been frozen or replaced."""
        modules = [*self.module.modules()]
        if modules != self._seen_modules:
            self._seen_modules, self._inner_state = modules, []  # which belongs to other modules
        kinds = [(p.dtype, p.device) for p in self.module.parameters()]
        if kinds != self._seen_kinds:  # the model was cast or moved, not this PrunedReptile
            self._seen_kinds = kinds
            for parameter, state in self._carried_states():
                move_state(state, functools.partial(_like, parameter))
        parts, masked = structure(self.module), [held_names(module) for module in modules]
        trained = [parameter.requires_grad for parameter in self.module.parameters()]
        buffers = {n: (b.shape, b.dtype, b.device) for n, b in self.module.named_buffers()}
        optimizer = (self.inner_optimizer, self.inner_lr, torch.is_inference_mode_enabled())
        origin = (parts, kinds, trained, buffers, masked, optimizer)
        while self._workspaces:
            workspace = self._workspaces.pop()
            if workspace.origin == origin:
                return workspace
        workspace = Workspace(self.pruner, self.inner_optimizer, self.inner_lr, self.foml)
        workspace.origin = origin
        return workspace

    def _check_usable(self) -> None:
        if self.pruner.finalized:
            raise RuntimeError("PrunedReptile was finalized: make a new one to train on")


def _like(parameter: Tensor, tensor: Tensor) -> Tensor:
    return tensor.to(parameter)


def _check_state(state: Any, parameters: dict[str, nn.Parameter], shapes: bool) -> None:
    """Refuse a state that does not fit these parameters.

    Args:
        state: Supposedly what ``get_extra_state()`` gave.
        parameters: The meta-model's, by name.
        shapes: Whether the collected tensors must have the parameters' shapes now.

    Raises:
        ValueError: Naming what does not fit.
    """
    keys = {"pruner", "inner_state", "collected", "tasks"}
    if not isinstance(state, dict) or set(state) != keys:
        raise ValueError("this is not a PrunedReptile state dict of this version")
    tasks, collected, inner = (state[key] for key in ("tasks", "collected", "inner_state"))
    if not isinstance(collected, list) or not isinstance(inner, list):
        raise ValueError("this is not a PrunedReptile state dict of this version")
    if type(tasks) is not int or tasks < 0:
        raise ValueError(f"the checkpoint's tasks must be a number >= 0, got {tasks!r}")
    if len(collected) != (len(parameters) if tasks else 0):
        raise ValueError(f"the checkpoint has {len(collected)} collected tensors for {tasks} tasks")
    if len(inner) not in (0, len(parameters)):
        raise ValueError(f"the checkpoint's inner_state is for {len(inner)} parameters")
    if not shapes:
        return
    for (name, parameter), total in zip(parameters.items(), collected, strict=False):
        if total.shape != parameter.shape:
            raise ValueError(f"the checkpoint's collected weights do not fit {name}")
