"""The Pruner: schedules, optimizers, patterns, criteria, masks that move, mixed precision."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import nn

from l2l_prune import DSDSchedule, Pruner, Schedule, Segment
from l2l_prune.masking import criteria
from l2l_prune.masking.patterns import Block, NByM
from l2l_prune.masking.topk import top_mask
from l2l_prune.methods.regrowth import Regrowth
from l2l_prune.methods.rewinding import Rewind
from tests.cuda.place import (
    SCHEDULE,
    WIDE,
    Place,
    assert_alike,
    batch,
    loss_of,
    network,
    on_device,
    state_of,
)

LATER_LAYERS = {"only": ["3", "6"]}  # with 4 and 16 inputs


def sgd(parameters, device):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adam(parameters, device, **options):
    return torch.optim.Adam(parameters, lr=0.01, **options)


def train(device, optimizer=adam, *, schedule=SCHEDULE, dtype=WIDE, prepare=None, **options):
    """A trace of a whole schedule; ``prepare(pruner, optimizer)`` comes before the first step."""
    net = network().to(device, dtype)
    held = optimizer(net.parameters(), device)
    if "criterion" in options:
        options["criterion"] = options["criterion"](net, device)
    pruner = Pruner(net, schedule, held, **options)
    if prepare:
        prepare(pruner, held)
    trace = {}
    for number in range(schedule.iterations):
        held.zero_grad()
        loss_of(net, number, device, dtype).backward()
        held.step()
        pruner.step()
        values = net.state_dict(), pruner.masks, state_of(held)
        trace |= {f"{number}: {k}": v for k, v in on_device(device, *values).items()}
    return trace


def with_sgd(place: Place) -> None:
    place.compare(functools.partial(train, optimizer=sgd))


def with_adam(place: Place) -> None:
    place.compare(functools.partial(train, optimizer=adam))


def variants_of_adam(place: Place) -> None:
    """Fused, foreach and (on a GPU) capturable steps against plain ones."""
    variants = [{"fused": True}, {"foreach": True}]
    if place.on_gpu:
        variants += [{"capturable": True}, {"capturable": True, "foreach": True}]
        variants += [{"capturable": True, "fused": True}]
    for options, kind in itertools.product(variants, (torch.optim.Adam, torch.optim.AdamW)):

        def plain(parameters, device, kind=kind):
            return kind(parameters, lr=0.01, foreach=False)

        def variant(parameters, device, kind=kind, options=options):
            return kind(parameters, lr=0.01, **options)

        # A capturable step computes its bias correction on the device, in float32.
        close = {"atol": 1e-5} if "capturable" in options else {}
        runs = (functools.partial(train, optimizer=make) for make in (variant, plain))
        place.compare(*runs, **close)


def other_optimizers(place: Place) -> None:
    kinds = [
        functools.partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
        functools.partial(torch.optim.Adagrad, lr=0.01),
        functools.partial(torch.optim.NAdam, lr=0.01),
    ]
    for kind in kinds:
        place.compare(functools.partial(train, optimizer=lambda p, device, kind=kind: kind(p)))


def in_float32(place: Place) -> None:
    """Few steps, so that rounding does not yet choose another mask."""
    schedule = DSDSchedule(0.5, pretrain=1, prune=2, retrain=2)
    run = functools.partial(train, optimizer=sgd, schedule=schedule)
    place.compare(lambda d: run(d, dtype=torch.float32), lambda d: run(d), atol=1e-4)


def with_patterns(place: Place) -> None:
    for options in (
        {"pattern": NByM(2, 4), **LATER_LAYERS},
        {"pattern": Block(1, 4), **LATER_LAYERS},
        {"allocation": "global"},
    ):
        place.compare(functools.partial(train, **options))


def with_criteria(place: Place) -> None:
    def grasp(net, device):
        return criteria.grasp(lambda: loss_of(net, 0, device), net.parameters())

    def random(net, device):
        return criteria.random(torch.Generator().manual_seed(1))

    for criterion in (grasp, random):
        place.compare(functools.partial(train, criterion=criterion))

    def on_the_cpu(weight):
        return weight.detach().abs().cpu()

    for criterion in (criteria.snip, criteria.taylor, on_the_cpu):
        place.compare(functools.partial(train, criterion=lambda *_, c=criterion: c))


def with_movement(place: Place) -> None:
    def run(device):
        movements = []

        def criterion(net, device):
            movements.append(criteria.Movement(net.parameters()))
            return movements[0]

        def watch(pruner, optimizer):
            optimizer.register_step_pre_hook(movements[0].observe)

        trace = train(device, criterion=criterion, prepare=watch)
        return trace | on_device(device, movements[0].state_dict()["sums"])

    place.compare(run)


def with_regrowth(place: Place) -> None:
    schedule = Schedule((Segment(1), Segment(6, sparse=True, sparsity=0.5), Segment(2)))
    for gradients in (False, True):

        def exchange(pruner, optimizer, gradients=gradients):
            device = next(pruner.model.parameters()).device
            loss = (lambda: loss_of(pruner.model, 0, device)) if gradients else None
            Regrowth(pruner, interval=2, loss=loss)

        place.compare(functools.partial(train, schedule=schedule, prepare=exchange))


def with_rewinding(place: Place) -> None:
    place.compare(functools.partial(train, prepare=lambda pruner, _: Rewind(pruner, to=1)))


def masks_of_many_weights(place: Place) -> None:
    """Ties, and so many entries that the threshold is found by halving."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(999, generator=generator, dtype=WIDE)
    scores = [few, few.round(), torch.randn(2**22 + 7, generator=generator).round(decimals=2)]

    def run(device):
        return {
            f"{number} {keep}": on_device(device, top_mask(given.to(device), keep))["0"]
            for number, given in enumerate(scores)
            for keep in (1, len(given) // 2)
        }

    place.compare(run)


def masks_in_deterministic_mode(place: Place) -> None:
    """torch refuses operations there whose result on a GPU depends on chance."""
    scores = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))

    def run(device):
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            given = scores.to(device)
            found = [p.mask(given, 1000) for p in (NByM(2, 4), Block(5, 4))]
            return on_device(device, top_mask(given, 1000), found)
        finally:
            torch.use_deterministic_algorithms(before)

    place.compare(run)


def scaled_run(device, scale, *, optimizer=adam, overflow_at=None, precision=None):
    """With GradScaler's scale, a power of 2, all numbers must be those without one."""
    net = network().to(device)
    held = optimizer(net.parameters(), device)
    pruner = Pruner(net, SCHEDULE, held)
    scaler = torch.amp.GradScaler(
        torch.device(device).type, init_scale=scale, growth_interval=10**6, enabled=scale > 1
    )
    trace = {}
    for number in range(SCHEDULE.iterations):
        held.zero_grad()
        loss = loss_of(net, number, device)
        scaler.scale(
            loss * float("inf") if number == overflow_at and scale > 1 else loss
        ).backward()
        if number != overflow_at or scale > 1:  # without a scaler, skipped by hand
            scaler.step(held)
        scaler.update()
        pruner.step()
        values = net.state_dict(), pruner.masks, state_of(held)
        trace |= {f"{number}: {k}": v for k, v in on_device(device, *values).items()}
    return trace


FIRST_REGROWN = 5  # the step in which released weights move first


def under_grad_scaler(place: Place) -> None:
    """Unscaled steps against scaled ones, also with an overflow when weights have just regrown."""
    for overflow_at in (None, FIRST_REGROWN):
        for make in (sgd, adam):
            run = functools.partial(scaled_run, optimizer=make, overflow_at=overflow_at)
            place.compare(lambda d, r=run: r(d, 2.0**10), lambda d, r=run: r(d, 1.0))


def under_grad_scaler_fused(place: Place) -> None:
    """Fused steps are handed scaled gradients, and the scale beside them."""
    for options in [{"fused": True}] + ([{"capturable": True}] if place.on_gpu else []):
        for overflow_at in (None, FIRST_REGROWN):
            make = functools.partial(adam, **options)
            run = functools.partial(scaled_run, scale=2.0**10, optimizer=make)
            plain = functools.partial(scaled_run, scale=1.0, optimizer=adam)
            close = {"atol": 1e-5} if "capturable" in options else {}
            place.compare(
                functools.partial(run, overflow_at=overflow_at),
                functools.partial(plain, overflow_at=overflow_at),
                **close,
            )


def under_autocast(place: Place) -> None:
    """Pruned weights are exactly 0, the others near those of float64, in 16 bits."""
    kinds = [torch.bfloat16, torch.float16] if place.on_gpu else [torch.bfloat16]
    for kind in kinds:
        with place.fault():
            net = network().to(place.device, torch.float32)
            optimizer = sgd(net.parameters(), place.device)
            pruner = Pruner(net, SCHEDULE, optimizer)
            scaler = torch.amp.GradScaler(
                torch.device(place.device).type, enabled=kind == torch.float16
            )
            for number in range(SCHEDULE.iterations):
                x, y = batch(number, place.device, torch.float32)
                optimizer.zero_grad()
                with torch.autocast(torch.device(place.device).type, kind):
                    scores = net(x)
                    loss = nn.functional.cross_entropy(scores, y)
                assert scores.dtype == kind
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                pruner.step()
                for name, mask in pruner.masks.items():
                    stored = pruner.weights[name]
                    momentum = optimizer.state[stored]["momentum_buffer"]
                    assert stored.dtype == torch.float32
                    assert not pruner.sparse or mask.sum() == mask.numel() // 2, name
                    assert not stored[~mask].any(), name
                    assert not momentum[~mask].any(), name
            found = on_device(place.device, dict(pruner.finalize().named_parameters()))
        expected = train("cpu", sgd)
        last = SCHEDULE.iterations - 1
        near = {
            key: expected[f"{last}: {key}_orig"]
            if f"{last}: {key}_orig" in expected
            else expected[f"{last}: {key}"]
            for key in found
        }
        assert_alike(found, near, atol=0.15)
