"""All checks, and faults as a wrong kernel or a forgotten device could bring them, one for each.

A fault is planted only into what runs on the device under test, never into the reference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from l2l_prune import PrunedReptile, Pruner, optimizer_state
from l2l_prune import pruner as mask_pruner
from l2l_prune.channels import plan as channel_plan
from l2l_prune.channels import pruner as channel_pruner
from l2l_prune.channels import surgery
from l2l_prune.experiments.algorithms import base
from l2l_prune.experiments.algorithms.reptile import Reptile
from l2l_prune.experiments.running import run
from l2l_prune.masking import attached, criteria, masked_layer, patterns, plan, topk
from l2l_prune.metalearners import sparse_maml
from l2l_prune.methods import drop_grad, mgaug, regrowth, rewinding, task_dropout
from l2l_prune.reptile import batched, compiled, learner, reptile
from l2l_prune.shipping import costs, folder, formats
from tests.cuda import (
    command_checks,
    hosts_checks,
    metalearner_checks,
    moving_checks,
    pruner_checks,
    ranks_checks,
    reptile_checks,
    shipping_checks,
    waiting_checks,
)
from tests.cuda.place import Place

Check = Callable[[Place], None]


class Fault(NamedTuple):
    """A name in the library, and what stands there instead: ``instead(original)``."""

    told: str
    owner: Any
    name: str
    instead: Callable[[Any], Any]

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        original = vars(self.owner)[self.name]
        setattr(self.owner, self.name, self.instead(original))
        try:
            yield
        finally:
            setattr(self.owner, self.name, original)


def nothing(original):
    return lambda *args, **kwargs: None


def changed(change):
    """The original's result, changed."""
    return lambda original: lambda *args, **kwargs: change(original(*args, **kwargs))


def after(act):
    """``act(self)`` at the end of a method."""

    def instead(original):
        def method(self, *args, **kwargs):
            found = original(self, *args, **kwargs)
            act(self)
            return found

        return method

    return instead


def without(*dropped):
    """A function that is never given some of its keywords."""
    return lambda original: lambda *a, **k: original(*a, **{n: k[n] for n in k if n not in dropped})


def largest_pruned(original):
    return lambda self, scores, keep: original(self, -scores, keep)


def gradient_times_1024(original):
    """What a scaled gradient looks like."""

    def raised(optimizer: Optimizer, parameter: Tensor, *masks: Tensor) -> None:
        if parameter.grad is not None:
            parameter.grad.mul_(1024)
            original(optimizer, parameter, *masks)
            parameter.grad.div_(1024)

    return raised


def only_unless_fused(original):
    def raised(optimizer, *rest):
        if not optimizer.defaults.get("fused"):
            original(optimizer, *rest)

    return raised


def in_few_steps(original):
    return lambda criterion, weight: original(criterion, weight).mul(4).round()


def waiting(original):
    def raised(*args):
        if bool(args[-1].any()):
            original(*args)

    return raised


def always_compared(original):
    def check_same(self, iteration, **options):
        self._seen = [(buffer, -1) for buffer, _ in self._seen]
        original(self, iteration, **options)

    return check_same


def forgotten(part):
    """A state dict whose ``part`` is empty when it is loaded."""
    return lambda original: lambda self, state: original(self, {**state, part: type(state[part])()})


def refused_in_deterministic_mode(original):
    def threshold(flat, keep):
        flat.clone().put_(torch.zeros(1, dtype=torch.long, device=flat.device), flat[:1])
        return original(flat, keep)

    return threshold


def another_generator(original):
    return lambda generator: original(torch.Generator().manual_seed(99))


def a_choice_of_each_rank(original):
    def choose(self, *args, **kwargs):
        found = original(self, *args, **kwargs)
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            return [mask.flip(0) for mask in found]
        return found

    return choose


def left_where_it_was(original):
    return lambda state, device=None: original(state)


def clones(original):
    return lambda saved, weights: {name: mask.clone() for name, mask in saved.items()}


def last_of_equals(original):
    return lambda scores, keep: original(scores.flip(0), keep).flip(0)


def without_masks(original):
    def update(*given):
        original(*given[:-1], {})

    return update


def all_ones(original):
    return lambda net: {name: torch.ones_like(value) for name, value in original(net).items()}


def masks_dropped(self):
    self._masks, self._masked = [], []


def masks_forgotten(self):
    self.masks = {}


def zeros_put_back(original):
    return lambda self, cuts, whole: original(
        self, cuts, {name: torch.zeros_like(full) for name, full in whole.items()}
    )


def inner_state_dropped(self):
    self._inner_state = []


def moved_to_meta(images):
    return type(images)(*(tensor.to("meta") for tensor in images))


def nothing_around(original):
    return lambda self: contextlib.nullcontext()


def dropout_forgotten(original):
    return lambda self, state: original(self, {**state, "dropout": self._dropout.state})


def all_true(module, name, mask):
    return original_set_mask(module, name, torch.ones_like(mask))


original_set_mask = masked_layer.set_mask
NOT_CLEARED = Fault("momentum is not cleared", optimizer_state, "clear_momentum", nothing)
NOT_LEVELLED = Fault("second moments stay", optimizer_state, "level_second_moment", nothing)
NOT_RAISED = Fault("no look at gradients", optimizer_state, "raise_to_gradient", nothing)
SCALED = Fault("scaled gradients", optimizer_state, "raise_to_gradient", gradient_times_1024)
ALL_TRUE = Fault("masks are not put on", masked_layer, "set_mask", lambda original: all_true)
DEVICE_KEPT = Fault("the state stays where it was", reptile, "copied_state", left_where_it_was)
MASKS_KEPT = Fault("masks stay where they were", mask_pruner, "restored", clones)
NO_REGROWN = Fault("what has regrown is forgotten", Pruner, "load_state_dict", forgotten("regrown"))
NO_STATE = Fault(
    "the inner state is forgotten", PrunedReptile, "set_extra_state", after(inner_state_dropped)
)

PLANTED: list[tuple[Check, Fault]] = [
    (pruner_checks.with_sgd, NOT_CLEARED),
    (pruner_checks.with_sgd, ALL_TRUE),
    (pruner_checks.with_adam, NOT_LEVELLED),
    (pruner_checks.with_adam, NOT_RAISED),
    (pruner_checks.with_adam, ALL_TRUE),
    (
        pruner_checks.variants_of_adam,
        Fault("not where fused", optimizer_state, "raise_to_gradient", only_unless_fused),
    ),
    (
        pruner_checks.other_optimizers,
        Fault("nothing divides", optimizer_state, "_divides", lambda _: lambda key: False),
    ),
    (
        pruner_checks.in_float32,
        Fault("scores are coarse", plan, "scores_of", in_few_steps),
    ),
    (
        pruner_checks.with_patterns,
        Fault("the smallest stay", patterns.NByM, "mask", largest_pruned),
    ),
    (
        pruner_checks.with_patterns,
        Fault("the smallest stay", patterns.Block, "mask", largest_pruned),
    ),
    (
        pruner_checks.with_patterns,
        Fault(
            "ranked the other way",
            plan,
            "global_masks",
            lambda f: lambda scores, keep: f([-score for score in scores], keep),
        ),
    ),
    (
        pruner_checks.with_criteria,
        Fault("other random numbers", criteria, "random", another_generator),
    ),
    (
        pruner_checks.with_criteria,
        Fault("gradients of ones", criteria, "_gradient", changed(torch.ones_like)),
    ),
    (
        pruner_checks.with_movement,
        Fault(
            "sums are halved",
            criteria.Movement,
            "observe",
            after(lambda self: [total.mul_(0.5) for total in self._sums]),
        ),
    ),
    (
        pruner_checks.with_regrowth,
        Fault("no mask moves", regrowth, "exchanged", lambda f: lambda w, mask, g, r: mask),
    ),
    (
        pruner_checks.with_rewinding,
        Fault(
            "another value",
            rewinding.Rewind,
            "_store",
            after(lambda self: [value.mul_(1.01) for value in self._values]),
        ),
    ),
    (
        pruner_checks.masks_of_many_weights,
        Fault("the last of equals stay", pruner_checks, "top_mask", last_of_equals),
    ),
    (
        pruner_checks.masks_of_many_weights,
        Fault("a byte too low", topk, "_bisected_threshold", changed(lambda t: t - 0.02)),
    ),
    (
        pruner_checks.masks_in_deterministic_mode,
        Fault("an operation of chance", topk, "_threshold", refused_in_deterministic_mode),
    ),
    (pruner_checks.under_grad_scaler, SCALED),
    (pruner_checks.under_grad_scaler_fused, SCALED),
    (pruner_checks.under_autocast, NOT_CLEARED),
    (pruner_checks.under_autocast, ALL_TRUE),
    (
        reptile_checks.with_reptile,
        Fault("no projection", learner.Workspace, "project", nothing),
    ),
    (
        reptile_checks.with_reptile,
        Fault("state starts afresh", PrunedReptile, "collect", after(inner_state_dropped)),
    ),
    (reptile_checks.with_reptile, NOT_CLEARED),
    (
        reptile_checks.with_compiled_steps,
        Fault("masks are left out", compiled, "_update", without_masks),
    ),
    (
        reptile_checks.with_batched_learners,
        Fault("masks are left out", batched.BatchedLearners, "__init__", after(masks_dropped)),
    ),
    (
        reptile_checks.with_mgaug,
        Fault("the smallest scores go", mgaug, "top_mask", lambda f: lambda s, keep: f(-s, keep)),
    ),
    (
        reptile_checks.with_drop_grad,
        Fault("no noise", drop_grad.DropGrad, "__call__", lambda f: lambda self, g: g.clone()),
    ),
    (
        reptile_checks.with_task_dropout,
        Fault("no units go", task_dropout.TaskDropout, "forward", lambda f: lambda self, x: x),
    ),
    (
        reptile_checks.with_sparse_maml,
        Fault(
            "signs of steps",
            sparse_maml._Step,
            "forward",
            lambda _: staticmethod(lambda ctx, x: torch.ones_like(x)),
        ),
    ),
    (
        reptile_checks.with_channels,
        Fault("regrown readers are not 0", surgery.Cut, "put", without("zero_incoming")),
    ),
    (
        reptile_checks.with_channels,
        Fault("second moments stay", optimizer_state, "level_state", nothing),
    ),
    (
        reptile_checks.channels_at_usual_precision,
        Fault(
            "no room for rounding", channel_plan, "_step_of_rounding", lambda _: lambda result: 0.0
        ),
    ),
    (
        reptile_checks.with_channels_in_reptile,
        Fault("the inner state is not cut", surgery, "_change_state", nothing),
    ),
    (
        reptile_checks.with_task_channels,
        Fault("the inner state is not cut", surgery, "_change_state", nothing),
    ),
    (
        reptile_checks.with_task_channels,
        Fault("what was cut is 0", surgery.Surgery, "put_back", zeros_put_back),
    ),
    (
        reptile_checks.with_best_channels,
        Fault("pruned weights count", learner.Workspace, "restore", after(masks_forgotten)),
    ),
    (moving_checks.checkpoints_of_a_pruner, NO_REGROWN),
    (
        moving_checks.checkpoints_of_a_pruner,
        Fault(
            "sums are forgotten",
            criteria.Movement,
            "load_state_dict",
            after(lambda self: [total.zero_() for total in self._sums]),
        ),
    ),
    (moving_checks.checkpoints_of_reptile, NO_STATE),
    (
        moving_checks.checkpoints_of_channels,
        Fault(
            "what has regrown is forgotten",
            channel_pruner.ChannelPruner,
            "load_state_dict",
            forgotten("regrown"),
        ),
    ),
    (moving_checks.checkpoints_of_channels_in_reptile, NO_STATE),
    (
        moving_checks.moved_in_the_middle,
        Fault("the inner state is lost", PrunedReptile, "_apply", after(inner_state_dropped)),
    ),
    (moving_checks.loading_puts_state_where_the_weights_are, DEVICE_KEPT),
    (moving_checks.loading_puts_state_where_the_weights_are, MASKS_KEPT),
    (
        waiting_checks.steps_of_a_pruner,
        Fault(
            "a number is read",
            attached.HeldMasks,
            "project",
            after(lambda self: self.values[0].sum().item()),
        ),
    ),
    (
        waiting_checks.steps_of_a_pruner,
        Fault("masks are compared", attached.HeldMasks, "check_same", always_compared),
    ),
    (
        waiting_checks.steps_of_a_pruner,
        Fault("a condition on weights", optimizer_state, "raise_to_gradient", waiting),
    ),
    (
        waiting_checks.steps_of_channels,
        Fault("a condition on weights", optimizer_state, "raise_to_gradient", waiting),
    ),
    (
        waiting_checks.steps_of_reptile,
        Fault(
            "a search for NaN",
            learner.Workspace,
            "about_to_step",
            after(lambda self: bool(self.parameters[0].isnan().any())),
        ),
    ),
    (
        shipping_checks.exports,
        Fault("nothing may differ", formats, "_TOLERANCE", lambda _: 0.0),
    ),
    (shipping_checks.exports, Fault("all masks on", folder, "dense_state_dict", all_ones)),
    (
        shipping_checks.costs_of_adapting,
        Fault("a step is left out", costs._Way, "_adapt", lambda _: costs._Way._step),
    ),
    (hosts_checks.with_learn2learn, NOT_RAISED),
    (hosts_checks.with_learn2learn, ALL_TRUE),
    (hosts_checks.with_higher, ALL_TRUE),
    (hosts_checks.with_lightning, NOT_LEVELLED),
    (metalearner_checks.with_cavia, ALL_TRUE),
    (metalearner_checks.with_metaoptnet, ALL_TRUE),
    (metalearner_checks.with_fields, ALL_TRUE),
    (metalearner_checks.with_fields, NOT_RAISED),
    (hosts_checks.with_lightning, ALL_TRUE),
    (command_checks.runs_of_reptile, ALL_TRUE),
    (command_checks.runs_without_a_host, ALL_TRUE),
    (command_checks.runs_of_learn2learn, ALL_TRUE),
    (command_checks.runs_of_metaoptnet, ALL_TRUE),
    (command_checks.runs_of_fields, ALL_TRUE),
    (
        command_checks.networks_and_images_are_there,
        Fault("images stay where they were", run, "load_split", changed(moved_to_meta)),
    ),
    (
        command_checks.runs_with_dropout,
        Fault("it draws from torch's own", base.OwnRandomness, "drawn", nothing_around),
    ),
    (
        command_checks.runs_resume,
        Fault("it draws anew", Reptile, "load_state_dict", dropout_forgotten),
    ),
    (
        ranks_checks.two_ranks,
        Fault("each rank chooses", plan.MaskChoice, "masks", a_choice_of_each_rank),
    ),
]

MODULES = (
    command_checks,
    pruner_checks,
    reptile_checks,
    moving_checks,
    waiting_checks,
    hosts_checks,
    metalearner_checks,
    shipping_checks,
    ranks_checks,
)
CHECKS: list[Check] = [
    function
    for module in MODULES
    for function in vars(module).values()
    if getattr(function, "__module__", None) == module.__name__
    and getattr(function, "__annotations__", {}) == {"place": "Place", "return": "None"}
]


def as_case(check: Check, *more: object, name: str):
    """A row of ``parametrize``, marked if the check starts processes."""
    marks = pytest.mark.process if check is ranks_checks.two_ranks else ()
    return pytest.param(check, *more, marks=marks, id=name)


each_check = pytest.mark.parametrize("check", [as_case(c, name=c.__name__) for c in CHECKS])
