"""Reptile whose tasks have masks of their own, against a loop over plain copies in float64."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from l2l_prune import PrunedReptile, Schedule, Segment, Structured, TaskMasks
from l2l_prune.reptile.batched import BatchedLearners
from l2l_prune.reptile.compiled import CompiledStep
from tests.conftest import SmallNet, without_compiler
from tests.ranks import RANKS, on_two_ranks

from .test_reptile import adapt, task

PHASES = Schedule(
    (
        Segment(1),
        Segment(2, sparse=True, sparsity=0.4, masks="task"),
        Segment(1, sparse=True, sparsity=0.5),
        Segment(2, sparse=True, sparsity=0.6, masks="task", share=0.5),
        Segment(1),
    )
)
SGD = functools.partial(torch.optim.SGD, momentum=0.9)


def reptile_of(net, seed=0, schedule=PHASES, channels=False, **options):
    masks = TaskMasks(torch.Generator().manual_seed(seed))
    if channels:
        dtype = next(net.parameters()).dtype
        options["structured"] = Structured(torch.zeros(2, 1, 6, 6, dtype=dtype))
    return PrunedReptile(net, schedule, task_masks=masks, **options)


masks_and_channels = pytest.mark.parametrize("channels", [False, True], ids=["masks", "channels"])


def iterate(reptile, iteration, tasks=2, seen=None, dtype=torch.float64):
    """``seen`` gets the masks of each task, or its channels."""
    for number in range(tasks):
        with reptile.task_masks() as masks:
            learner = reptile.clone()
        if seen is not None:
            seen.append({name: mask.clone() for name, mask in masks.items()})
        reptile.collect(adapt(learner, task(10 * iteration + number, dtype)))
    reptile.step()


def by_hand(net, masks_of, make_optimizer, foml, iterations):
    """Plain copies; pruned entries are set to 0 before every forward, and left where they were."""
    state = None
    for i in range(iterations):
        moves = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
        for number in range(2):
            masks = masks_of(i, number)
            learner = copy.deepcopy(net)
            weights = dict(learner.named_parameters())

            def hold(weights=weights, masks=masks):
                with torch.no_grad():
                    for name, mask in masks.items():
                        weights[name].mul_(mask)

            optimizer = make_optimizer(learner.parameters())
            if state is not None:
                optimizer.load_state_dict(state)
            hold()
            for x, y in task(10 * i + number, torch.float64):
                before = {n: p.detach().clone() for n, p in weights.items()}
                optimizer.zero_grad()
                F.cross_entropy(learner(x), y).backward()
                optimizer.step()
                hold()
            for name, mask in masks.items():
                for key in ("momentum_buffer", "exp_avg"):
                    if key in optimizer.state[weights[name]]:
                        optimizer.state[weights[name]][key].mul_(mask)
            state = copy.deepcopy(optimizer.state_dict())
            start = before if foml else dict(net.named_parameters())
            for name, weight in weights.items():
                kept = masks.get(name, torch.tensor(True))
                moves[name] += torch.where(kept, weight.detach() - start[name].detach(), 0.0)
        with torch.no_grad():
            rate = (1 - i / PHASES.iterations) * 0.9
            for name, parameter in net.named_parameters():
                parameter.add_(rate * moves[name] / 2)


@pytest.mark.parametrize("foml", [False, True], ids=["reptile", "foml"])
@pytest.mark.parametrize(
    "optimizer",
    [
        functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        functools.partial(torch.optim.Adam, lr=0.01, betas=(0.0, 0.999)),
    ],
    ids=["momentum", "adam"],
)
def test_equals_the_loop_by_hand(net, optimizer, foml):
    net.double()
    oracle, seen = copy.deepcopy(net), []
    schedule = Schedule((Segment(PHASES.iterations, sparse=True, sparsity=0.4, masks="task"),))
    reptile = reptile_of(
        net,
        schedule=schedule,
        inner_lr=optimizer.keywords["lr"],
        meta_lr=0.9,
        inner_optimizer=optimizer,
        foml=foml,
    )
    for iteration in range(3):
        iterate(reptile, iteration, seen=seen)
    assert all(not mask.all() for masks in seen for mask in masks.values())
    by_hand(oracle, lambda i, number: seen[2 * i + number], optimizer, foml, 3)
    for ours, theirs in zip(net.parameters(), oracle.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10, rtol=0)


def test_what_no_task_held_stays_bit_for_bit(net):
    reptile = reptile_of(
        net, schedule=Schedule((Segment(9, sparse=True, sparsity=0.8, masks="task"),))
    )
    before = {n: w.detach().clone() for n, w in reptile.pruner.weights.items()}
    seen = []
    iterate(reptile, 0, tasks=3, seen=seen, dtype=torch.float32)
    for name, weight in reptile.pruner.weights.items():
        held = torch.stack([masks[name] for masks in seen]).any(0)
        assert not held.all()
        assert torch.equal(weight[~held], before[name][~held])
        assert bool((weight[held] != before[name][held]).any())


def test_learners_live_side_by_side_and_evaluation_has_no_masks(net):
    reptile = reptile_of(
        net, schedule=Schedule((Segment(9, sparse=True, sparsity=0.5, masks="task"),))
    )
    learners = []
    for _ in range(2):
        with reptile.task_masks() as masks:
            learners.append((reptile.clone(), dict(masks)))
    plain = reptile.clone()
    for learner, masks in learners:
        adapt(learner, task(0))
        for name, mask in masks.items():
            weight = learner.module.get_parameter(name)
            assert torch.equal(weight != 0, mask)
    adapt(plain, task(0))
    assert all(bool((plain.module.get_parameter(n) != 0).all()) for n in reptile.pruner.masks)
    assert torch.equal(plain.module(task(0)[0][0]), plain(task(0)[0][0]))


@pytest.mark.parametrize("foml", [False, True], ids=["reptile", "foml"])
@pytest.mark.parametrize("sparse", [False, True])
def test_masks_that_are_given_in_other_phases_leave_what_they_prune(net, sparse, foml):
    """In a dense phase, and in one whose masks the model has itself."""
    net.double()
    schedule = Schedule((Segment(9, sparse=sparse, sparsity=0.3 if sparse else 0.0),))
    reptile = PrunedReptile(net, schedule, meta_lr=0.9, meta_lr_final=0.9, foml=foml)
    before = {n: w.detach().clone() for n, w in reptile.pruner.weights.items()}
    draws = torch.Generator().manual_seed(0)
    masks = {n: torch.rand(w.shape, generator=draws) < 0.5 for n, w in before.items()}
    with reptile.task_masks(masks) as held:
        held = {n: mask.clone() for n, mask in held.items()}
        learner = reptile.clone()
    batches = task(0, torch.float64)
    reptile.collect(adapt(learner, batches))
    reptile.step()
    for name, weight in reptile.pruner.weights.items():
        still = ~held[name]
        assert bool(still.any())
        assert torch.allclose(weight[still], before[name][still], atol=1e-15, rtol=0)
        assert bool((weight[~still] != before[name][~still]).any())


@masks_and_channels
@pytest.mark.parametrize("at", range(PHASES.iterations))
def test_resumes_bit_for_bit_within_any_iteration(net, at, channels):
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

    reptile = reptile_of(net, channels=channels)
    for iteration in range(at):
        iterate(reptile, iteration, dtype=torch.float32)
    begin(reptile)
    file = io.BytesIO()
    torch.save(reptile.state_dict(), file)
    expected = end(reptile)
    file.seek(0)
    twin = reptile_of(SmallNet(), seed=5, channels=channels)
    twin.load_state_dict(torch.load(file, weights_only=True))
    for ours, theirs in zip(end(twin), expected, strict=True):
        assert torch.equal(ours, theirs)


@masks_and_channels
def test_compiled_steps_under_task_masks(net, channels):
    def loss(learner, x, y):
        return F.cross_entropy(learner(x), y)

    twin = reptile_of(copy.deepcopy(net.double()), channels=channels)
    reptile = reptile_of(net, channels=channels)
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


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_batched_learners_have_masks_each(net, share):
    schedule = Schedule((Segment(9, sparse=True, sparsity=0.5, masks="task", share=share),))
    twin = copy.deepcopy(net.double())
    reptile = reptile_of(net, schedule=schedule, inner_optimizer=SGD, inner_lr=0.05)
    alone = reptile_of(twin, schedule=schedule, inner_optimizer=SGD, inner_lr=0.05)
    with reptile.task_masks():
        learners = BatchedLearners(reptile, 3)
    data = [task(number, torch.float64) for number in range(3)]
    for batches in zip(*data, strict=True):
        x, y = (torch.stack(parts) for parts in zip(*batches, strict=True))
        learners.adapt(learners.each(lambda net, x, y: F.cross_entropy(net(x), y), x, y))
    for number in range(3):
        with alone.task_masks():
            learner = alone.clone()
        adapt(learner, data[number])
        for name, parameter in learner.module.named_parameters():
            assert torch.allclose(learners.weights[name][number], parameter, atol=1e-12, rtol=0)


def test_forgotten_blocks_are_an_error(net):
    reptile = reptile_of(net, schedule=PHASES)
    iterate(reptile, 0, dtype=torch.float32)
    before = copy.deepcopy(net.state_dict())
    reptile.collect(adapt(reptile.clone(), task(0)))
    with pytest.raises(RuntimeError, match="no task began"):
        reptile.step()
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())


def on_a_rank(rank, folder, channels):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    reptile = reptile_of(SmallNet().double(), channels=channels, group=dist.group.WORLD)
    seen = []
    for iteration in range(PHASES.iterations):
        with reptile.task_masks() as masks:
            learner = reptile.clone()
        seen.append({name: mask.clone() for name, mask in masks.items()})
        reptile.collect(adapt(learner, task(2 * iteration + rank, torch.float64)))
        reptile.step()
    weights = [p.detach() for p in reptile.finalize().parameters()]
    torch.save({"seen": seen, "weights": weights}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.process
@masks_and_channels
def test_ranks_with_one_seed_draw_other_masks_and_stay_alike(tmp_path, channels):
    on_two_ranks(on_a_rank, str(tmp_path), channels)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    for ours, theirs in zip(first["weights"], second["weights"], strict=True):
        assert torch.equal(ours, theirs)
    for iteration in range(PHASES.iterations):
        segment = PHASES.segment(iteration)
        pair = [str(seen[iteration]) for seen in (first["seen"], second["seen"])]
        if segment.per_task and segment.share == 1:
            assert pair[0] != pair[1]
        elif not segment.per_task:
            assert pair[0] == pair[1]
