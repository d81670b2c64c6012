"""No step waits for the device but those in which a mask is due.

torch itself raises on a GPU; on the CPU the operations count that would make it wait there.
"""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from l2l_prune import PrunedReptile, Pruner
from l2l_prune.channels.pruner import ChannelPruner, Structured
from l2l_prune.masking.criteria import Movement
from l2l_prune.methods.regrowth import Regrowth
from l2l_prune.methods.rewinding import Rewind
from tests.cuda.place import SCHEDULE, Place, batch, loss_of, network, tensors
from tests.cuda.pruner_checks import adam, sgd
from tests.cuda.reptile_checks import STEPS, TASKS

WAITING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim"}
WAITING |= {"_unique2", "unique_consecutive"}


COPIES = {"_to_copy", "copy_", "_foreach_copy_"}


class NoWaiting(TorchDispatchMode):
    """Raises at operations whose result, or its size, Python must know, and between devices."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING or by_mask:
            raise RuntimeError(f"{name} waits for the device")
        found = function(*args, **(kwargs or {}))
        if name in COPIES:
            pairs = zip(*args[:2], strict=True) if name == "_foreach_copy_" else [(args, found)]
            for pair in pairs:
                devices = {tensor.device.type for _, tensor in tensors(pair)}
                if len(devices) > 1:
                    raise RuntimeError(f"{name} between {devices} waits for the device")
        return found


@contextlib.contextmanager
def no_waiting(place):
    if not place.on_gpu:
        with NoWaiting():
            yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def unless(due, place):
    return contextlib.nullcontext() if due else no_waiting(place)


def steps_of_a_pruner(place: Place) -> None:
    """The optimizer's steps too, with the library's hooks on them; also just after a release."""
    makers = [sgd, functools.partial(adam, fused=True)]
    if place.on_gpu:
        makers += [adam, functools.partial(adam, capturable=True)]
    for make in makers:
        with place.fault():
            net = network().to(place.device)
            optimizer = make(net.parameters(), place.device)
            movement = Movement(net.parameters())
            optimizer.register_step_pre_hook(movement.observe)
            pruner = Pruner(net, SCHEDULE, optimizer, criterion=movement)
            Rewind(pruner, to=1)
            Regrowth(pruner, interval=2)
            for number in range(SCHEDULE.iterations):
                optimizer.zero_grad()
                loss_of(net, number, place.device).backward()
                with no_waiting(place):
                    optimizer.step()
                with unless(pruner.mask_due or number == 3, place):  # one exchange of weights
                    pruner.step()


def steps_of_channels(place: Place) -> None:
    pytest.importorskip("torch_pruning")
    with place.fault():
        net = network().to(place.device)
        optimizer = adam(net.parameters(), place.device, fused=True)
        x, _ = batch(0, place.device)
        pruner = ChannelPruner(net, SCHEDULE, optimizer, example_inputs=x)
        for number in range(SCHEDULE.iterations):
            optimizer.zero_grad()
            loss_of(net, number, place.device).backward()
            with no_waiting(place):
                optimizer.step()
            with unless(pruner.mask_due, place):
                pruner.step()


def steps_of_reptile(place: Place) -> None:
    """Whole meta-iterations: clone, adapt, collect, step."""
    kinds = [{}, {"foml": True}, {"carry_state": False}]
    with contextlib.suppress(ImportError):
        import torch_pruning  # noqa: F401

        kinds.append({"structured": Structured(batch(0, place.device)[0])})
    for options in kinds:
        with place.fault():
            reptile = PrunedReptile(network().to(place.device), SCHEDULE, **options)
            for iteration in range(SCHEDULE.iterations):
                data = [batch(10 * iteration + n, place.device) for n in range(STEPS)]
                with no_waiting(place):
                    for _ in range(TASKS):
                        learner = reptile.clone()
                        for x, y in data:
                            learner.adapt(torch.nn.functional.cross_entropy(learner(x), y))
                        reptile.collect(learner)
                with unless(reptile.pruner.mask_due, place):
                    reptile.step()
