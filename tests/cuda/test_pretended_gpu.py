"""On torch's fake CUDA tensors, which need no GPU and hold no numbers: devices and waiting.

A fake tensor refuses operations over two devices as a GPU would, and whatever asks for a number.
Backward passes and the choice of masks, which do need a GPU, are replaced by random ones.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import types

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from l2l_prune import PrunedReptile, Pruner
from l2l_prune._basics import ranks
from l2l_prune.masking import attached as held_masks
from l2l_prune.masking import masked_layer as reparam
from l2l_prune.masking.criteria import Movement, scores_of
from l2l_prune.masking.plan import MaskChoice
from l2l_prune.masking.topk import _threshold
from l2l_prune.methods.rewinding import Rewind
from tests.cuda.place import SCHEDULE, on_device
from tests.cuda.waiting_checks import NoWaiting

OPTIMIZERS = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Adam": functools.partial(torch.optim.Adam, lr=0.1),
    "foreach": functools.partial(torch.optim.Adam, lr=0.1, foreach=True),
    "fused": functools.partial(torch.optim.AdamW, lr=0.1, fused=True),
    "capturable": functools.partial(torch.optim.Adam, lr=0.1, capturable=True),
    "NAdam": functools.partial(torch.optim.NAdam, lr=0.1, capturable=True),
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=0.1, momentum=0.9),
}


pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


@pytest.fixture(autouse=True)
def _pretended(monkeypatch):
    monkeypatch.setattr(
        MaskChoice,
        "masks",
        lambda self, position, weights, *_, **__: [torch.rand_like(w) < 0.5 for w in weights],
    )
    monkeypatch.setattr(MaskChoice, "check", lambda *args: None)
    monkeypatch.setattr(reparam, "copy", types.SimpleNamespace(deepcopy=deepcopy))
    with FakeTensorMode():
        yield


def deepcopy(model):
    """Fake tensors cannot be copied by copy.deepcopy."""
    memo = {id(p): nn.Parameter(p.detach().clone()) for p in model.parameters()}
    return copy.deepcopy(model, memo | {id(b): b.clone() for b in model.buffers()})


def network(device="cuda"):
    with torch.device(device):
        return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(6, 3))


def give_gradients(parameters):
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)


class Answers(TorchDispatchMode):
    """Numbers on the CPU are 1 (Adam keeps its count there), and masks that are compared equal."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            if args[0].device.type == "cpu":
                return 1.0
        if function is torch.ops.aten.equal.default:
            return True
        return function(*args, **(kwargs or {}))


class NoWaitingForTheGPU(NoWaiting):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            if args[0].device.type == "cpu":
                return 1.0
        return super().__torch_dispatch__(function, types, args, kwargs)


@contextlib.contextmanager
def allowed_to_wait():
    """Every condition holds."""
    with pytest.MonkeyPatch.context() as patch, Answers():
        patch.setattr(FakeTensor, "__bool__", lambda self: True, raising=False)
        yield


def unless(due):
    return allowed_to_wait() if due else NoWaitingForTheGPU()


def pruned(optimizer):
    with allowed_to_wait():
        net = network()
        held = OPTIMIZERS[optimizer](net.parameters())
        movement = Movement(net.parameters())
        held.register_step_pre_hook(movement.observe)
        pruner = Pruner(net, SCHEDULE, held, criterion=movement)
        Rewind(pruner, to=1)
    return net, held, pruner


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_pruner_mixes_no_devices_and_waits_for_none(optimizer):
    net, held, pruner = pruned(optimizer)
    for _ in range(SCHEDULE.iterations):
        give_gradients(net.parameters())
        with NoWaitingForTheGPU():
            held.step()
        with unless(pruner.mask_due):
            pruner.step()
        on_device("cuda", net.state_dict(), pruner.state_dict(), held.state_dict()["state"])


@pytest.mark.parametrize("carry_state", [False, True])
@pytest.mark.parametrize("optimizer", [None, *OPTIMIZERS])
def test_reptile_mixes_no_devices_and_waits_for_none(optimizer, carry_state):
    options = {}
    if optimizer:
        options["inner_optimizer"] = lambda p, lr: OPTIMIZERS[optimizer](p)
    with allowed_to_wait():
        reptile = PrunedReptile(network(), SCHEDULE, carry_state=carry_state, **options)
    for _ in range(SCHEDULE.iterations):
        with NoWaitingForTheGPU():
            for _ in range(2):
                learner = reptile.clone()
                for _ in range(2):
                    give_gradients(learner.parameters())
                    learner.workspace.step()
                reptile.collect(learner)
        with unless(reptile.pruner.mask_due):
            reptile.step()
        extra = reptile.get_extra_state()
        on_device("cuda", reptile.pruner.masks, extra["inner_state"], extra["pruner"])


@pytest.mark.parametrize("optimizer", [None, *OPTIMIZERS])
@pytest.mark.parametrize(("there", "here"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_reptile_goes_on_with_the_state_of_another_device(there, here, optimizer):
    if optimizer in ("capturable", "NAdam") and "cpu" in (there, here):
        there = here = "cuda:0"  # these are for GPUs only; their state may still come from a file
    options = {}
    if optimizer:
        options["inner_optimizer"] = lambda p, lr: OPTIMIZERS[optimizer](p)

    def iterate(reptile):
        learner = reptile.clone()
        give_gradients(learner.parameters())
        learner.workspace.step()
        reptile.collect(learner)

    with allowed_to_wait():
        first = PrunedReptile(network(there), SCHEDULE, **options)
        iterate(first)
        state = first.state_dict()
        if there == here:
            for entry in state["_extra_state"]["inner_state"]:
                entry.update({key: value.to("cpu") for key, value in entry.items()})
        second = PrunedReptile(network(here), SCHEDULE, **options)
        second.load_state_dict(state)
        iterate(second)
        second.step()
        iterate(second)
    extra = second.get_extra_state()
    on_device(here, second.pruner.masks, extra["inner_state"], extra["collected"])


def test_scores_may_come_from_the_cpu():
    weight = torch.rand(4, 3, device="cuda")
    assert scores_of(weight, lambda w: torch.ones(w.shape)).device == weight.device


class DeterministicMode(TorchDispatchMode):
    """What of it matters here: torch refuses kthvalue on a GPU, for the indices that it gives."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket is not torch.ops.aten.kthvalue
        return function(*args, **(kwargs or {}))


def test_the_threshold_is_found_in_deterministic_mode():
    with DeterministicMode():
        assert _threshold(torch.rand(9, device="cuda"), 3).device.type == "cuda"


def test_waiting_is_noticed(monkeypatch):
    _, _, pruner = pruned("SGD")
    with allowed_to_wait():
        pruner.step()
        pruner.step()
    monkeypatch.setattr(
        held_masks.HeldMasks, "project", lambda self, **_: self.values[0].sum().item()
    )
    with pytest.raises((DataDependentOutputException, RuntimeError), match="local_scalar"):
        pruner.step()


def test_a_mask_on_the_cpu_is_noticed(monkeypatch):
    set_mask = reparam.set_mask

    def on_the_cpu(module, name, mask):
        set_mask(module, name, mask)
        module._buffers[f"{name}_mask"] = torch.ones(mask.shape, device="cpu")

    monkeypatch.setattr(reparam, "set_mask", on_the_cpu)
    net, _, _ = pruned("SGD")
    with pytest.raises(RuntimeError, match="cpu"):
        net(torch.rand(2, 1, 8, 8, device="cuda"))


def test_states_that_count_on_the_cpu_are_averaged_over_ranks(monkeypatch):
    """One message holds tensors of one device, and nccl speaks of GPUs only."""
    sent = []
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: [1] * len(self))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: sent.append(tensor.device.type))
    net = network()
    optimizer = OPTIMIZERS["Adam"](net.parameters())
    give_gradients(net.parameters())
    with allowed_to_wait():
        optimizer.step()
        states = list(optimizer.state.values())
        ranks.average_states(states, 1, None, torch.device("cuda"))
    assert set(sent) == {"cuda"}
    assert {state["step"].device.type for state in states} == {"cpu"}
