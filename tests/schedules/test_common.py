from __future__ import annotations

import pytest
import torch
from torch import nn

from l2l_prune import Pruner
from l2l_prune.schedules.common import cubic, cyclic, metasparse, one_shot, sparse_from_start


def test_cubic_is_the_papers_equation_at_every_iteration():
    """s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3, t at the starts of intervals."""
    t0, n, dt, s_i, s_f = 7, 5, 3, 0.1, 0.9
    schedule = cubic(s_f, pretrain=t0, steps=n, interval=dt, hold=4, initial_sparsity=s_i)
    assert schedule.iterations == t0 + n * dt + 4
    for t in range(schedule.iterations):
        segment = schedule.segment(t)
        if t < t0:
            assert not segment.sparse
            continue
        grid = t0 + (t - t0) // dt * dt
        s = s_f if grid >= t0 + n * dt else s_f + (s_i - s_f) * (1 - (grid - t0) / (n * dt)) ** 3
        assert segment.sparsity == pytest.approx(s)
        assert segment.sparse


def test_cyclic_repeats_it():
    ramp = cubic(0.8, pretrain=0, steps=3, interval=2, hold=2)
    twice = cyclic(0.8, pretrain=5, cycles=2, steps=3, interval=2, hold=2)
    rates = [segment.sparsity for segment in ramp.segments[1:]]
    assert [segment.sparsity for segment in twice.segments] == [0.0, *rates, *rates]
    assert {segment.round for segment in twice.segments} == {0, 1, 2}


def test_sparse_from_the_start_has_no_dense_iteration():
    schedule = sparse_from_start(0.9, 7)
    assert schedule.iterations == 7
    assert all(schedule.segment(i).sparse for i in range(7))
    assert {schedule.segment(i).sparsity for i in range(7)} == {0.9}


def test_one_shot_never_retrains():
    schedule = one_shot(0.5, pretrain=3, prune=4)
    assert [schedule.segment(i).sparse for i in range(10)] == [False] * 3 + [True] * 7


def test_a_pruner_follows_a_ramp_and_a_new_cycle():
    torch.manual_seed(0)
    net = nn.Linear(10, 10)
    schedule = cyclic(0.8, pretrain=1, cycles=2, steps=2, interval=1, hold=1)
    pruner = Pruner(net, schedule)
    zeros = []
    for _ in range(schedule.iterations):
        zeros.append(int((net.weight == 0).sum()))
        with torch.no_grad():
            net.weight_orig.add_(torch.randn_like(net.weight_orig))
        pruner.step()
    assert zeros == [0, 0, 70, 80, 80, 70, 80]  # released weights restart from 0


def test_metasparse_prunes_a_fifth_of_what_is_left():
    schedule = metasparse(pretrain=7, interval=3)
    left, spans = 1.0, schedule.spans()
    assert spans[0][:2] == (0, 7)
    assert not spans[0][2].sparse
    for number, (start, stop, segment) in enumerate(spans[1:], 1):
        left = max(left - left * 0.2, 0.05)  # round by round, as the authors' program
        assert (start, stop) == (4 + 3 * number, 7 + 3 * number)
        assert 1 - segment.sparsity == pytest.approx(left)
        assert segment.round == number
    assert len(spans) == 15
    assert schedule.segments[-1].sparsity == 0.95
    assert [s.round for s in metasparse(0.36, pretrain=1, interval=1).segments] == [0, 1, 2]
    assert metasparse().iterations == 150_000 + 14 * 30_000
    assert metasparse(0.0).iterations == 150_000


@pytest.mark.parametrize("allocation", ["global", "layerwise"])
def test_metasparse_masks_are_nested_and_counted(allocation):
    """Against a brute force that takes the smallest of what is left, all layers together."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5))
    pruner = Pruner(net, metasparse(pretrain=1, interval=1), allocation=allocation)
    alive = torch.ones(340, dtype=torch.bool)
    for number in range(1, 15):
        with torch.no_grad():
            for weight in pruner.weights.values():
                weight.add_(torch.randn_like(weight))
        flat = torch.cat([m.flatten() for m in (net[0].weight, net[2].weight)])
        pruner.step()
        masks = torch.cat([mask.flatten() for mask in pruner.masks.values()])
        assert not (masks & ~alive).any()  # nothing comes back
        if allocation == "global":
            keep = 340 - round((1 - max(0.8**number, 0.05)) * 340)
            ranked = flat.abs().masked_fill(~alive, -1).argsort(descending=True)[:keep]
            assert torch.equal(masks.nonzero().squeeze(1), ranked.sort().values)
        alive = masks
    assert int(alive.sum()) == 17


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: cubic(0.5, pretrain=0, steps=0, interval=1, hold=0), "steps must be >= 1"),
        (lambda: cubic(0.5, pretrain=0, steps=1, interval=0, hold=0), "interval must be >= 1"),
        (
            lambda: cubic(0.5, pretrain=0, steps=1, interval=1, hold=0, initial_sparsity=0.6),
            "initial_sparsity=0.6 is more than sparsity=0.5",
        ),
        (
            lambda: cyclic(0.5, pretrain=0, cycles=0, steps=1, interval=1, hold=0),
            "cycles must be >= 1",
        ),
        (lambda: sparse_from_start(0.5, 0), "iterations must be >= 1"),
        (lambda: one_shot(1.0, pretrain=0, prune=1), "sparsity"),
        (lambda: metasparse(1.0), "sparsity must be in"),
        (lambda: metasparse(amount=1), "amount must be in"),
        (lambda: metasparse(amount=0), "amount must be in"),
        (lambda: metasparse(interval=0), "interval must be >= 1"),
    ],
)
def test_impossible_numbers(make, words):
    with pytest.raises(ValueError, match=words):
        make()
