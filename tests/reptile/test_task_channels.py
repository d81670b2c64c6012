"""Reptile whose tasks have channels of their own, against small networks built by hand."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from l2l_prune import ChannelPruner, PrunedReptile, Schedule, Segment, Structured, TaskMasks
from l2l_prune.reptile.compiled import CompiledStep
from tests.conftest import SmallNet, without_compiler
from tests.ranks import RANKS, on_two_ranks

from .test_reptile import adapt, task

PHASES = Schedule(
    (
        Segment(1),
        Segment(2, sparse=True, sparsity=0.5, masks="task"),
        Segment(1, sparse=True, sparsity=0.25),
        Segment(2, sparse=True, sparsity=0.5, masks="task", share=0.5),
        Segment(1),
    )
)
ALWAYS = Schedule((Segment(9, sparse=True, sparsity=0.5, masks="task"),))
OPTIMIZERS = {
    "momentum": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adam": functools.partial(torch.optim.Adam, lr=0.01, betas=(0.0, 0.999)),
}


def reptile_of(net, seed=0, schedule=PHASES, **options):
    return PrunedReptile(
        net,
        schedule,
        structured=Structured(torch.zeros(2, 1, 6, 6, dtype=next(net.parameters()).dtype)),
        task_masks=TaskMasks(torch.Generator().manual_seed(seed)),
        **options,
    )


def iterate(reptile, iteration, tasks=2, seen=None, dtype=torch.float64):
    for number in range(tasks):
        with reptile.task_masks() as channels:
            learner = reptile.clone()
        if seen is not None:
            seen.append(channels)
        reptile.collect(adapt(learner, task(10 * iteration + number, dtype)))
    reptile.step()


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
        schedule=ALWAYS,
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
    reptile = reptile_of(net, schedule=ALWAYS)
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


@pytest.mark.parametrize("at", range(PHASES.iterations))
def test_resumes_bit_for_bit_within_any_iteration(net, at):
    def begin(reptile):
        with reptile.task_masks():
            learner = reptile.clone()
        reptile.collect(adapt(learner, task(7)))

    def end(reptile):
        for iteration in range(at, PHASES.iterations):
            if iteration > at:
                begin(reptile)
            iterate(reptile, iteration, tasks=1, dtype=torch.float32)
        return [p.detach().clone() for p in reptile.module.parameters()]

    reptile = reptile_of(net)
    for iteration in range(at):
        iterate(reptile, iteration, dtype=torch.float32)
    begin(reptile)
    file = io.BytesIO()
    torch.save(reptile.state_dict(), file)
    expected = end(reptile)
    file.seek(0)
    twin = reptile_of(SmallNet(), seed=5)
    twin.load_state_dict(torch.load(file, weights_only=True))
    for ours, theirs in zip(end(twin), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_compiled_steps_are_plain_steps(net):
    def loss(learner, x, y):
        return F.cross_entropy(learner(x), y)

    twin = reptile_of(copy.deepcopy(net.double()))
    reptile = reptile_of(net)
    with without_compiler():
        step = CompiledStep(loss)
        for iteration in range(PHASES.iterations):
            for number in range(2):
                with reptile.task_masks():
                    learner = reptile.clone()
                for x, y in task(10 * iteration + number, torch.float64):
                    step(learner, x, y)
                reptile.collect(learner)
            reptile.step()
            iterate(twin, iteration)
    for ours, theirs in zip(net.parameters(), twin.module.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10, rtol=0)


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
    reptile = reptile_of(net, schedule=ALWAYS)
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
    reptile = reptile_of(net, schedule=ALWAYS)
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


def on_a_rank(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    reptile = reptile_of(SmallNet().double(), group=dist.group.WORLD)
    seen = []
    for iteration in range(PHASES.iterations):
        with reptile.task_masks() as channels:
            learner = reptile.clone()
        seen.append(channels)
        reptile.collect(adapt(learner, task(2 * iteration + rank, torch.float64)))
        reptile.step()
    weights = [p.detach() for p in reptile.finalize().parameters()]
    torch.save({"seen": seen, "weights": weights}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.process
def test_ranks_draw_other_channels_and_stay_alike(tmp_path):
    on_two_ranks(on_a_rank, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    for ours, theirs in zip(first["weights"], second["weights"], strict=True):
        assert torch.equal(ours, theirs)
    assert str(first["seen"][1:3]) != str(second["seen"][1:3])
