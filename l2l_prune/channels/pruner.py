"""Channel pruning that really shrinks: the network is physically small in sparse phases."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from l2l_prune import optimizer_state
from l2l_prune._basics import checks, ranks
from l2l_prune._basics.precision import skips_step
from l2l_prune.channels.groups import (
    Importance,
    count_operations,
    find_channels,
    importance_function,
)
from l2l_prune.channels.plan import (
    channel_counts,
    choose_channels,
    read_channels_of,
    refuse_frozen_readers,
    try_cuts,
    try_scores,
)
from l2l_prune.channels.surgery import Surgery
from l2l_prune.channels.task_channels import SmallCopy, TaskChannels
from l2l_prune.masking.layers import Rule, read_rules, refuse_learning_rates
from l2l_prune.masking.masked_layer import held_names
from l2l_prune.masking.task_masks import TaskMasks
from l2l_prune.scheduled import ScheduledPruner
from l2l_prune.schedules.schedule import Schedule
from l2l_prune.serves_learners import States, StepPreHook


@dataclass(frozen=True)
class Structured:
    """How :class:`~l2l_prune.PrunedReptile` prunes channels: arguments of :class:`ChannelPruner`.

    Args:
        example_inputs: Inputs of a forward pass, for finding which channels belong together.
        importance: How important a channel is, as in :class:`ChannelPruner`.
    """

    example_inputs: Any
    importance: str | Importance = "l2"


@dataclass(frozen=True)
class Exported:
    """What :meth:`ChannelPruner.export` gives.

    Attributes:
        module: A copy of the network as it is now.
        parameters: Its number of parameters.
        macs: Multiply-accumulate operations of a forward pass of the example inputs.
        full_parameters: The parameters of the full network.
        full_macs: The multiply-accumulate operations of the full network.
    """

    module: nn.Module
    parameters: int
    macs: int
    full_parameters: int
    full_macs: int


_STATE_VERSION = 2
_DISTRIBUTED = (
    "a DistributedDataParallel model cannot lose channels: it would stop averaging gradients. "
    "Average them by hand, with group=, or mask weights with Pruner"
)


class ChannelPruner(ScheduledPruner):
    """Removes whole channels by a schedule; used like :class:`~l2l_prune.Pruner`.

    On entering a sparse segment the least important channels are cut out of every tensor that
    holds them (through normalisation, FiLM, residual sums, concatenation, grouped and depthwise
    convolutions, channel shuffles, attention heads), so the network is small and fast with no
    masks at all. On leaving it the network gets its full shapes back. Weights that read a restored
    channel are 0, so the function is unchanged and they learn at once; the filters that make it
    are as they were when they were cut, since a filter of zeros before a ReLU would never get a
    gradient again.

    Parameters keep their identity and order; their shapes change, and so does the state of the
    optimizers. Channels of the network's output always stay, as do those that are normalised
    together (``LayerNorm``); see :attr:`whole`. Before the network is accepted, a copy is cut and
    run on the example inputs.

    Args:
        model: The network, or a wrapper that can run ``example_inputs``.
        schedule: When to prune, and what fraction of the channels.
        optimizer: The optimizer (or several) whose state is cut and restored too.
        example_inputs: Inputs of a forward pass: a tensor, a tuple or list, or a dict.
        importance: ``"l1"``, ``"l2"`` (of all weights of a channel), ``"taylor"`` (needs
            gradients), ``"bn_scale"``, or a function of torch-pruning's group.
        skip: Names, ``fnmatch`` patterns, types or predicates ``(name, module) -> bool`` of layers
            whose output channels stay.
        task_masks: Whose generator draws the channels of single tasks, for schedules with sparse
            segments of ``masks="task"``: the network stays whole, and each learner of
            :class:`~l2l_prune.PrunedReptile` that is cloned in :meth:`task_masks` is small.
        group: Ranks of torch.distributed that train the same model and average its gradients
            themselves; at each change they compare their weights, then the channels that they
            keep. Not for DistributedDataParallel, which loses track of parameters that change
            their shape: a model that holds it is refused. A pruner cannot see one *around* what
            it is given; with ``group`` the ranks notice at the next change that their weights
            have drifted apart, without it nothing does.

    Raises:
        ImportError: If torch-pruning is missing.
        TypeError: If an argument has the wrong type.
        ValueError: If the network cannot be shrunk, a name matches nothing, a segment would leave
            a layer no channel, a frozen layer reads channels that are cut, ``model`` is
            learn2learn's Meta-SGD or GBML, whose rates or updates would not fit, or is trained by
            DistributedDataParallel, or an optimizer's state cannot be cut (L-BFGS, Adafactor).

    Examples:
        >>> from l2l_prune import DSDSchedule
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> schedule = DSDSchedule(0.5, pretrain=1, prune=1, retrain=1)
        >>> pruner = ChannelPruner(net, schedule, example_inputs=torch.zeros(1, 4))
        >>> pruner.step()
        >>> net[0].weight.shape, net[2].weight.shape
        (torch.Size([4, 4]), torch.Size([2, 4]))
        >>> pruner.step()
        >>> pruner.finalize()[0].weight.shape
        torch.Size([8, 4])
    """

    changes_shapes = True

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        *,
        example_inputs: Any,
        importance: str | Importance = "l2",
        skip: Rule | Iterable[Rule] | None = None,
        task_masks: TaskMasks | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(model, schedule)
        if group is not None:
            checks.of_type("group", group, dist.ProcessGroup, "a torch.distributed ProcessGroup")
        if ranks.group_of(model) is not None:
            raise ValueError(_DISTRIBUTED)
        self._group = group
        self._importance = importance_function(importance)
        self._needs_gradients = importance == "taylor"
        refuse_learning_rates(model)
        rules = read_rules("skip", skip, model)
        channels = find_channels(model, example_inputs, rules)
        self._channels = try_cuts(model, channels, example_inputs, schedule)
        self._surgery = Surgery(model, self._channels)
        cuts = self._surgery.plan(self._channels.all())
        self._shapes = {name: cut.get().shape for name, cut in cuts.items()}
        self._example_inputs = example_inputs
        self._full_size = count_operations(model, example_inputs)
        self._counts = [  # None where the network itself is whole
            channel_counts(self._channels, s) if s.held else None for s in schedule.segments
        ]
        self._cut = [  # groups that the network itself loses channels of
            group
            for number, group in enumerate(self._channels.groups)
            if any(c is not None and c[number] < group.channels for c in self._counts)
        ]
        refuse_frozen_readers(self._channels, self._cut)
        named = self._importance if isinstance(importance, str) else None
        try_scores(model, self._channels, self._cut, named)
        self._tasks = TaskChannels(task_masks, self._channels, schedule, group)
        self._copies: WeakKeyDictionary[nn.Module, SmallCopy] = WeakKeyDictionary()
        self._optimizers = optimizer_state.as_optimizers(optimizer)
        for given in self._optimizers:
            optimizer_state.check_by_entry(given)
            optimizer_state.check_holds(given, [cut.get() for cut in cuts.values()])
        self._more_states: Callable[[], States] = tuple
        self._kept: Tensor | None = None
        self._full: dict[str, Tensor] = {}
        self.released: dict[str, Tensor] = {}
        if self.segment.held:
            self._shrink(self._choose(self._position))
        self._stepped = False  # whether an optimizer has stepped since the release
        self._handles: list[RemovableHandle] = []
        self._watch()

    # ---- what is going on -------------------------------------------------------------------

    @property
    def sparse(self) -> bool:
        """Whether the network is small now."""
        return self._kept is not None

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable channels that is cut out now."""
        return 0.0 if self._kept is None else 1 - int(self._kept.sum()) / len(self._kept)

    @property
    def channels(self) -> dict[str, list[int]]:
        """The channels that are present now, by the layer that makes them.

        Where channels can only be removed in blocks (attention heads, groups of a grouped
        convolution or of group normalisation), the blocks are counted.
        """
        return {name: kept.tolist() for name, kept in self._by_name().items()}

    @property
    def whole(self) -> dict[str, str]:
        """Layers that always keep all of their channels, with the reason."""
        return dict(self._channels.whole)

    def summary(self) -> str:
        """A table of kept and all channels by layer, and which layers stay whole."""
        from tabulate import tabulate

        here = self.channels
        rows = [(g.name, len(here[g.name]), g.channels) for g in self._channels.groups]
        table = tabulate(rows, headers=("layer", "channels", "of"))
        whole = "".join(f"\n{name} stays whole: {why}" for name, why in self.whole.items())
        return f"{self._place()}\n{table}{whole}"

    # ---- training ---------------------------------------------------------------------------

    def first_step_hook(self, model: nn.Module) -> StepPreHook | None:
        """A step pre-hook for the optimizer of a copy, so that no released weight jumps.

        Args:
            model: The copy.

        Returns:
            The hook, or ``None`` if no channel was just released.
        """
        return self._raising_hook(model) if self.released else None

    @contextmanager
    def task_masks(self, masks: Mapping[str, Tensor] | None = None) -> Iterator[dict[str, Tensor]]:
        """Run one task: learners that are cloned within are small, if the schedule says so.

        Several learners of a block have the same channels.

        Args:
            masks: Only ``None``: there are no masks.

        Yields:
            Which channels the task's learners have, by the layer that makes them; empty until one
            is cloned, and for a task that has all.

        Raises:
            RuntimeError: If ``masks`` are given, within another such block, or after
                :meth:`finalize`.
        """
        self._check_usable()
        with super().task_masks(masks), self._tasks.block(self._position) as kept:
            yield kept

    def cut_for_task(
        self, copy: nn.Module, optimizer: Optimizer
    ) -> Callable[[list[Tensor]], list[Tensor]] | None:
        """Make a learner's copy of the network small, if the task that runs has fewer channels."""
        kept = self._tasks.draw()
        if kept is None:
            return None
        if copy not in self._copies:
            self._copies[copy] = SmallCopy(copy, self._channels)
        small = self._copies[copy]
        small.shrink(kept, optimizer)
        return functools.partial(small.grow, optimizer)

    def follow_states(self, states: Callable[[], States]) -> None:
        """Also cut and restore optimizer state that no optimizer holds.

        Args:
            states: Gives each parameter of the model with its state.
        """
        self._more_states = states

    def export(self) -> Exported:
        """A plain copy of the network as it is now, small in a sparse phase, with its counts.

        For use as it is, or for ``torch.onnx.export(exported.module, (inputs,))``.
        """
        size = count_operations(self.model, self._example_inputs)
        return Exported(copy.deepcopy(self.model), *size, *self._full_size)

    # ---- saving and resuming ----------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs besides the model's and optimizer's own state dicts."""
        return {
            **self._tasks.state_dict(),
            "version": _STATE_VERSION,
            "schedule": self.schedule.to_dict(),
            "iteration": self._iteration,
            "kept": None if self._kept is None else self._by_name(),
            "full": {name: tensor.clone() for name, tensor in self._full.items()},
            "regrown": {name: mask.clone() for name, mask in self.released.items()},
            "stepped": self._stepped,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume. Call it **before** the model's and the optimizer's: it sets their shapes.

        Raises:
            ValueError: If the state belongs to another model or schedule; nothing is changed.
        """
        self._check_usable()
        keys = {"version", "schedule", "iteration", "kept", "full", "regrown", "stepped"}
        if isinstance(state, dict):  # of older versions
            state = {"stepped": False, **state}
        self._check_state(state, keys | set(self._tasks.state_dict()), _STATE_VERSION)
        self._tasks.check_state(state)
        kept = read_channels_of(state, self.schedule, self._surgery, self._counts, self._shapes)
        self._tasks.load_state_dict(state)
        self._grow()
        self._iteration = state["iteration"]
        self._position = self.schedule.index(self._iteration)
        self.released = {}
        if kept is not None:
            self._shrink(kept)
            for name, tensor in state["full"].items():
                self._full[name].copy_(tensor)
        for name, mask in state["regrown"].items():
            self.released[name] = mask.to(self.model.get_parameter(name).device, copy=True)
        self._stepped = state["stepped"]

    # ---- inside -----------------------------------------------------------------------------

    def _end_iteration(self, entered: int | None) -> None:
        self._tasks.check_begun(self._position, self._iteration)
        if entered is not None:
            refuse_frozen_readers(self._channels, self._cut)
        kept = None if entered is None else self._choose(entered)
        if self._stepped or not self._optimizers:  # a gradient scaler may have skipped the step
            self.released = {}
        if entered is not None:
            self._grow()
            self._shrink(kept)
        self._tasks.end_iteration()

    def _let_go(self) -> None:
        self._grow()
        for handle in self._handles:
            handle.remove()

    def _check_usable(self, *, thoroughly: bool = False) -> None:
        if self._finalized:
            raise RuntimeError("the ChannelPruner was finalized: make a new one to prune again")
        self._tasks.check_outside()
        here = {id(module) for module in self.model.modules()}
        for slot in self._channels.slots:
            if id(slot.module) not in here:
                raise RuntimeError(
                    f"{slot.axis.path} was replaced after the ChannelPruner was made, so that the "
                    "new one would keep all its channels: finalize the ChannelPruner before you "
                    "replace modules, and make a new one"
                )
            if held_names(slot.module):
                raise RuntimeError(
                    f"{slot.axis.path} got a mask after the ChannelPruner was made: finalize that "
                    "Pruner, or make it with skip= for this layer"
                )

    def _watch(self) -> None:
        hook = self._raising_hook(self.model)
        self._handles = [held.register_step_pre_hook(hook) for held in self._optimizers]

    def _raising_hook(self, model: nn.Module) -> StepPreHook:
        @torch.no_grad()
        def act(optimizer: Optimizer) -> None:
            if not self.released or skips_step(optimizer):
                return
            self._stepped = True
            cuts = self._copies[model].cuts if model in self._copies else {}
            for name, mask in self.released.items():
                parameter = model.get_parameter(name)
                here = mask.to(parameter.device)  # the network may have moved since
                here = cuts[name].take(here) if name in cuts else here
                optimizer_state.raise_to_gradient(optimizer, parameter, ~here, here)

        return optimizer_state.gradient_hook(act)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles: torch copies an optimizer without its hooks."""
        return {**self.__dict__, "_handles": [], "_copies": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._copies = WeakKeyDictionary()
        if not self._finalized:
            self._watch()

    def _choose(self, position: int) -> Tensor | None:
        """Channels to keep in a segment, or None if the network is whole there.

        Raises:
            RuntimeError: If the ranks have different weights or would keep different channels.
        """
        self._check_ranks()
        counts = self._counts[position]
        if counts is None:
            return None
        here = next(self.model.parameters()).device
        with ranks.failing_together(self._group, here):
            kept = choose_channels(
                self._channels,
                counts,
                self._importance,
                needs_gradients=self._needs_gradients,
                before=self._kept,
            )
        ranks.check_same({"channels": kept.to(here)}, self._iteration, self._group)
        return kept

    def _check_ranks(self) -> None:
        if ranks.group_of(self.model) is not None:  # put into it since
            raise RuntimeError(_DISTRIBUTED)
        weights = {name: weight.detach() for name, weight in self.model.named_parameters()}
        ranks.check_same(
            weights,
            self._iteration,
            self._group,
            what="weights",
            advice="start from the same ones, and average the gradients by hand before each "
            "optimizer step (DistributedDataParallel stops doing so when channels are cut)",
        )

    def _by_name(self) -> dict[str, Tensor]:
        """Positions of the channels that are present now, by group."""
        kept = self._channels.all() if self._kept is None else self._kept
        groups = self._channels.groups
        return {g.name: kept[list(g.units)].nonzero().squeeze(1) for g in groups}

    def _shrink(self, kept: Tensor | None) -> None:
        if kept is None:
            return
        self._full = self._surgery.shrink(kept, self._states)
        self._kept = kept
        cuts = self._surgery.plan(kept)
        partly = {name: cuts[name].take(mask) for name, mask in self.released.items()}
        self.released = {name: mask for name, mask in partly.items() if bool(mask.any())}

    def _grow(self) -> None:
        if self._kept is None:
            return
        self._stepped = False
        self.released = self._surgery.grow(self._kept, self._full, self._states)
        self._kept, self._full = None, {}

    def _states(self, parameter: Tensor) -> Iterator[dict[str, Any]]:
        for optimizer in self._optimizers:
            if parameter in optimizer.state:
                yield optimizer.state[parameter]
        for held, state in self._more_states():
            if held is parameter:
                yield state
