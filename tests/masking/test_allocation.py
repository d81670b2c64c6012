from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from l2l_prune import DSDSchedule, PrunedReptile, Pruner, Schedule, Segment
from l2l_prune.masking.allocation import erk, global_masks
from l2l_prune.masking.patterns import UNSTRUCTURED, Block, NByM

PHASES = {"pretrain": 0, "prune": 2, "retrain": 1}
SCHEDULE = DSDSchedule(0.5, **PHASES)


def test_erk_solves_its_equations(net):
    """Densities in proportion to the sum of dimensions over their product, none above 1."""
    for sparsity in (0.0, 0.1, 0.5, 0.9):
        rates = erk(net, sparsity)
        shapes = {n: p.shape for n, p in net.named_parameters() if p.dim() > 1}
        assert rates.keys() == shapes.keys()
        kept = sum((1 - rates[n]) * s.numel() for n, s in shapes.items())
        assert kept == pytest.approx((1 - sparsity) * sum(s.numel() for s in shapes.values()))
        factors = {n: (1 - rates[n]) * s.numel() / sum(s) for n, s in shapes.items() if rates[n]}
        assert max(factors.values(), default=0) == pytest.approx(min(factors.values(), default=0))
        for name, shape in shapes.items():
            if not rates[name] and factors:  # dense, since its share would have been 1 or more
                assert next(iter(factors.values())) * sum(shape) / shape.numel() >= 1 - 1e-9


def test_erk_is_a_schedules_sparsity(net):
    rates = erk(net, 0.5, skip="conv1")
    pruner = Pruner(net, DSDSchedule(rates, pretrain=0, prune=1, retrain=1), skip="conv1")
    for name, mask in pruner.masks.items():
        assert int(mask.sum()) == mask.numel() - round(rates[name] * mask.numel())


def test_global_masks_are_the_largest_of_all(net):
    dense = copy.deepcopy(net)
    pruner = Pruner(net, SCHEDULE, allocation="global")
    weights = {n: p for n, p in dense.named_parameters() if n in pruner.masks}
    ranked = sorted(
        ((-abs(v), n, i) for n, p in weights.items() for i, v in enumerate(p.flatten().tolist()))
    )
    kept = {(n, i) for _, n, i in ranked[: len(ranked) - round(0.5 * len(ranked))]}
    found = {
        (n, i) for n, m in pruner.masks.items() for i in m.flatten().nonzero().flatten().tolist()
    }
    assert found == kept
    assert pruner.sparsity == pytest.approx(0.5, abs=1 / len(ranked))
    assert len({float(m.float().mean()) for m in pruner.masks.values()}) > 1  # not layerwise


def test_global_masks_cut_no_layer_through():
    masks = global_masks([torch.tensor([9.0, 8, 7, 6]), torch.tensor([0.1, 0.2])], 3)
    assert [m.tolist() for m in masks] == [[True, True, False, False], [False, True]]


def test_global_masks_resume_and_advance(net):
    schedule = Schedule((Segment(2, sparse=True, sparsity=0.5), Segment(2)))
    twin = copy.deepcopy(net)
    fresh = Pruner(copy.deepcopy(net), schedule, allocation="global")
    pruner = Pruner(net, schedule, allocation="global")
    pruner.step()
    resumed = Pruner(twin, schedule, allocation="global")
    twin.load_state_dict(net.state_dict())
    resumed.load_state_dict(pruner.state_dict())
    assert resumed.iteration == 1
    resumed.step()
    assert resumed.sparsity == 0
    state = pruner.state_dict()
    state["masks"]["fc.weight"] = torch.ones_like(state["masks"]["fc.weight"])
    with pytest.raises(ValueError, match="all tensors keeps"):
        fresh.load_state_dict(state)


def test_reptile_takes_it(net):
    reptile = PrunedReptile(net, SCHEDULE, allocation="global")
    assert len({float(m.float().mean()) for m in reptile.pruner.masks.values()}) > 1


BY_LAYER = DSDSchedule({"fc": 0.5}, pretrain=0, prune=1, retrain=0)
COUNTED = DSDSchedule(0.5, pretrain=0, prune=1, retrain=0, keep={"fc": 3})


@pytest.mark.parametrize("pattern", [UNSTRUCTURED, Block(1, 2)])
@pytest.mark.parametrize("trainer", [Pruner, PrunedReptile])
def test_a_pruner_shares_by_erk_itself(net, trainer, pattern):
    given = copy.deepcopy(net)
    rates = erk(net, 0.5, skip="conv1")
    explicit = trainer(given, DSDSchedule(rates, **PHASES), skip="conv1", pattern=pattern)
    made = trainer(net, DSDSchedule(0.5, **PHASES), skip="conv1", pattern=pattern, allocation="erk")
    explicit, made = (getattr(p, "pruner", p) for p in (explicit, made))
    assert made.layerwise == (pattern == UNSTRUCTURED)
    assert made.masks.keys() == explicit.masks.keys()
    assert all(torch.equal(mask, explicit.masks[name]) for name, mask in made.masks.items())


@pytest.mark.parametrize("schedule", [BY_LAYER, COUNTED])
def test_erk_takes_one_sparsity(net, schedule):
    with pytest.raises(ValueError, match='"erk" shares one sparsity among the layers'):
        Pruner(net, schedule, allocation="erk")


@pytest.mark.parametrize(
    ("options", "schedule", "words"),
    [
        ({"pattern": NByM(2, 4)}, SCHEDULE, "cannot be combined with pattern"),
        ({}, BY_LAYER, "one sparsity among"),
        ({}, COUNTED, "one sparsity"),
        ({}, DSDSchedule(0.999, pretrain=0, prune=1, retrain=0), "leaves 0 weights for 3 layers"),
    ],
)
def test_what_cannot_be_global_is_refused(net, options, schedule, words):
    with pytest.raises(ValueError, match=words):
        Pruner(net, schedule, allocation="global", **options)


def test_unknown_allocation(net):
    with pytest.raises(ValueError, match="one of layerwise, erk, global, got 'fair'"):
        Pruner(net, SCHEDULE, allocation="fair")
    with pytest.raises(TypeError, match="model"):
        erk(3, 0.5)
    with pytest.raises(ValueError, match="sparsity"):
        erk(nn.Linear(2, 2), 1.5)
