"""Reptile whose tasks have channels of their own, against small networks built by hand."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from l2l_prune import ChannelPruner, Schedule, Segment, TaskMasks
from tests.conftest import SmallNet

from .test_reptile import adapt, task
from .test_task_masks import iterate
from .test_task_masks import reptile_of as reptile_with_masks

ALWAYS = Schedule((Segment(9, sparse=True, sparsity=0.5, masks="task"),))
OPTIMIZERS = {
    "momentum": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adam": functools.partial(torch.optim.Adam, lr=0.01, betas=(0.0, 0.999)),
}


def reptile_of(net, schedule=ALWAYS, **options):
    return reptile_with_masks(net, schedule=schedule, channels=True, **options)


def indices(channels):
    """Where the small network's parameters lie in the full one's."""
    first, second = (channels[name].nonzero().flatten() for name in ("conv1", "conv2"))
    read = (second[:, None] * 4 + torch.arange(4)).flatten()  # fc sees 2x2 pixels of each channel
    whole = torch.arange(3)
    return {
        "conv1.weight": (first,),
        "conv1.bias": (first,),
        "norm.weight": (first,),
        "norm.bias": (first,),
        "conv2.weight": torch.meshgrid(second, first, indexing="ij"),
        "fc.weight": torch.meshgrid(whole, read, indexing="ij"),
        "fc.bias": (whole,),
    }


def small_net(channels):
    first, second = (int(channels[name].sum()) for name in ("conv1", "conv2"))
    net = SmallNet()
    net.conv1, net.norm = nn.Conv2d(1, first, 3), nn.BatchNorm2d(first)
    net.conv2, net.fc = nn.Conv2d(first, second, 3, bias=False), nn.Linear(4 * second, 3)
    return net.double()


def by_hand(net, seen, make_optimizer, carry, foml, iterations):
    """Small networks, and state of the inner optimizer that is gathered and scattered by hand."""
    held = {}  # state of full shapes, by name
    full = dict(net.named_parameters())
    for iteration in range(iterations):
        moves = {name: torch.zeros_like(p) for name, p in full.items()}
        for number in range(2):
            channels = seen[2 * iteration + number]
            at, learner = indices(channels), small_net(channels)
            weights = dict(learner.named_parameters())
            optimizer = make_optimizer(learner.parameters())
            for name, weight in weights.items():
                weight.data = full[name].detach()[at[name]].clone()
                for key, value in held.get(name, {}).items():
                    part = value[at[name]].clone() if value.dim() else value.clone()
                    optimizer.state[weight][key] = part
            for x, y in task(10 * iteration + number, torch.float64):
                before = {name: p.detach().clone() for name, p in weights.items()}
                optimizer.zero_grad()
                F.cross_entropy(learner(x), y).backward()
                optimizer.step()
            for name, weight in weights.items():
                start = before[name] if foml else full[name].detach()[at[name]]
                moves[name][at[name]] += weight.detach() - start
                for key, value in optimizer.state[weight].items() if carry else ():
                    own = held.setdefault(name, {})
                    if not isinstance(value, torch.Tensor) or not value.dim():
                        own[key] = value
                        continue
                    if key not in own:  # the largest second moment where nothing was measured
                        most = value.max() if key == "exp_avg_sq" else 0.0
                        own[key] = torch.zeros_like(full[name]) + most
                    own[key][at[name]] = value
        with torch.no_grad():
            for name, parameter in full.items():
                parameter.add_((1 - iteration / ALWAYS.iterations) * 0.9 * moves[name] / 2)


@pytest.mark.parametrize("foml", [False, True], ids=["reptile", "foml"])
@pytest.mark.parametrize("carry", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_equals_small_networks_by_hand(net, optimizer, carry, foml):
    net.double()
    oracle, seen, make = copy.deepcopy(net), [], OPTIMIZERS[optimizer]
    reptile = reptile_of(
        net,
        inner_lr=make.keywords["lr"],
        meta_lr=0.9,
        inner_optimizer=make,
        carry_state=carry,
        foml=foml,
    )
    for iteration in range(4):
        iterate(reptile, iteration, seen=seen)
    assert len({str(channels) for channels in seen}) > 4
    by_hand(oracle, seen, make, carry, foml, 4)
    for (name, ours), theirs in zip(net.named_parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0, msg=name)


def test_learners_are_small_and_the_model_and_evaluation_are_whole(net, batch):
    reptile = reptile_of(net)
    before = copy.deepcopy(net.state_dict())
    with reptile.task_masks():
        learner, again = reptile.clone(), reptile.clone()
    with reptile.task_masks():
        other = reptile.clone()
    for small in (learner, again, other):
        assert small.module.conv1.weight.shape == (2, 1, 3, 3)
        assert small.module.conv1.out_channels == 2
        assert small.module.conv2.weight.shape == (2, 2, 3, 3)
        assert small.module.fc.weight.shape == (3, 8)
        assert small.module.fc.in_features == 8
        assert small.module.norm.running_mean.shape == (2,)
    assert torch.equal(learner.module.fc.weight, again.module.fc.weight)
    adapt(learner, [batch])
    assert reptile.clone().module.conv1.weight.shape == (4, 1, 3, 3)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    for small in (learner, again, other):
        reptile.collect(small)
    assert reptile.clone().module.fc.in_features == 16


def test_what_no_task_had_stays_bit_for_bit(net, batch):
    schedule = Schedule((Segment(9, sparse=True, sparsity=0.75, masks="task"),))
    reptile = reptile_of(net, schedule=schedule, inner_lr=0.1)
    before = copy.deepcopy(dict(net.named_parameters()))
    with reptile.task_masks() as channels:
        learner = reptile.clone()
    reptile.collect(adapt(learner, [batch] * 3))
    reptile.step()
    at = indices(channels)
    for name, parameter in net.named_parameters():
        moved = torch.zeros_like(parameter, dtype=torch.bool)
        moved[at[name]] = True
        assert torch.equal(parameter[~moved], before[name][~moved])
        assert bool((parameter[moved] != before[name][moved]).any()) or name == "conv1.bias"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("foml", [False, True])
@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_small_learner_that_was_cast_can_be_discarded(net, make_optimizer, foml, dtype):
    """It grows back in its own dtype, and later learners are as if it had never been."""

    def go_on(reptile, casts):
        for number in range(3):
            with reptile.task_masks():
                learner = reptile.clone()
            adapt(learner, task(number))
            if casts and number == 1:
                twin = learner.module
                assert adapt(learner.to(dtype), task(5, dtype)).module.fc.in_features == 8
                reptile.discard(learner)
                assert {p.dtype for p in twin.parameters()} == {dtype}
                assert twin.fc.in_features == 16
            elif number == 1:
                reptile.discard(learner)
            else:
                reptile.collect(learner)
        reptile.step()
        return reptile.module

    options = {"inner_optimizer": make_optimizer, "foml": foml, "carry_state": True}
    copies = copy.deepcopy(net), copy.deepcopy(net)
    plain = go_on(reptile_of(copies[0], **options), casts=False)
    after = go_on(reptile_of(copies[1], **options), casts=True)
    assert all(map(torch.equal, plain.parameters(), after.parameters()))


def test_a_share_of_the_tasks_has_all_channels(net):
    schedule = Schedule((Segment(40, sparse=True, sparsity=0.5, masks="task", share=0.5),))
    reptile, small = reptile_of(net, schedule=schedule), 0
    for _ in range(40):
        with reptile.task_masks() as channels:
            learner = reptile.clone()
        small += len(learner.module.conv1.weight) == 2
        assert bool(channels) == (len(learner.module.conv1.weight) == 2)
        reptile.discard(learner)
    assert 10 < small < 30


def test_released_channels_do_not_jump_in_small_learners(net):
    """A held phase before: the first step after the release is bounded in small learners, too."""
    schedule = Schedule(
        (
            Segment(3),
            Segment(3, sparse=True, sparsity=0.5),
            Segment(3, sparse=True, sparsity=0.5, masks="task"),
        )
    )
    reptile = reptile_of(net.double(), schedule=schedule, inner_lr=0.01)
    for iteration in range(6):
        iterate(reptile, iteration)
    with reptile.task_masks() as channels:
        learner = reptile.clone()
    at, before = indices(channels), copy.deepcopy(dict(learner.module.named_parameters()))
    released = {name: mask[at[name]] for name, mask in reptile.pruner.released.items()}
    assert any(bool(mask.any()) for mask in released.values())
    x, y = task(99, torch.float64)[0]
    learner.adapt(F.cross_entropy(learner(x), y))
    for name, mask in released.items():
        step = (learner.module.get_parameter(name) - before[name])[mask]
        assert bool((step.abs() <= 0.01).all())


@pytest.mark.parametrize("adapted", [False, True], ids=["elsewhere", "nowhere"])
def test_learners_that_are_cloned_elsewhere_are_an_error(net, batch, adapted):
    reptile = reptile_of(net)
    before = copy.deepcopy(net.state_dict())
    with reptile.task_masks():
        pass
    learner = reptile.clone()
    reptile.collect(adapt(learner, [batch]) if adapted else learner)
    with pytest.raises(RuntimeError, match=r"no task began: clone the learners .*task_masks"):
        reptile.step()
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())


def test_misuse_is_told(net):
    inputs = torch.zeros(2, 1, 6, 6)
    how = TaskMasks(torch.Generator(), lambda weight, generator: weight)
    with pytest.raises(ValueError, match=r"say how, with task_masks=TaskMasks"):
        ChannelPruner(net, ALWAYS, example_inputs=inputs)
    with pytest.raises(ValueError, match="at random: give task_masks without scores"):
        ChannelPruner(net, ALWAYS, example_inputs=inputs, task_masks=how)
    with pytest.raises(TypeError, match="task_masks must be a TaskMasks"):
        ChannelPruner(net, ALWAYS, example_inputs=inputs, task_masks=0)
    reptile = reptile_of(net)
    with reptile.task_masks():
        reptile.collect(reptile.clone())
        with pytest.raises(RuntimeError, match="leave that block first"):
            reptile.step()
    with pytest.raises(RuntimeError, match="ChannelPruner holds no masks"):
        reptile.task_masks({"fc.weight": torch.ones(3, 16)}).__enter__()
    loop = ChannelPruner(
        net, ALWAYS, example_inputs=inputs, task_masks=TaskMasks(torch.Generator())
    )
    with loop.task_masks():
        net(inputs).sum().backward()
    with pytest.raises(RuntimeError, match=r'other loops need masks="phase"'):
        loop.step()
