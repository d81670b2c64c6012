"""Masks of single tasks: how they are drawn, held and given back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from l2l_prune import DSDSchedule, Pruner, Schedule, Segment, TaskMasks
from l2l_prune.masking.patterns import Block, NByM, Rows
from l2l_prune.masking.task_scores import Catfish, magnitude
from tests.conftest import SmallNet

PER_TASK = Schedule((Segment(9, sparse=True, sparsity=0.5, masks="task"),))


def drawing(seed=0, *args, **options):
    return TaskMasks(torch.Generator().manual_seed(seed), *args, **options)


def drawn(pruner):
    with pruner.task_masks() as masks:
        return {name: mask.clone() for name, mask in masks.items()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_task_is_pruned_and_the_model_is_not(net):
    before = copy.deepcopy(net.state_dict())
    pruner = Pruner(net, PER_TASK, task_masks=drawing())
    assert not pruner.sparse
    assert pruner.sparsity == 0
    with pruner.task_masks() as masks:
        for name, mask in masks.items():
            weight = net.get_submodule(name.rpartition(".")[0]).weight
            assert int(mask.sum()) == mask.numel() - round(0.5 * mask.numel())
            assert torch.equal(weight, before[name] * mask)
    assert torch.equal(net.conv1.weight, before["conv1.weight"])
    pruner.step()
    after = pruner.finalize().state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_any_weight_is_as_likely_to_go():
    net = nn.Linear(3, 2)
    pruner = Pruner(net, PER_TASK, task_masks=drawing())
    kept = torch.stack([drawn(pruner)["weight"] for _ in range(4000)]).double()
    assert (kept.sum((1, 2)) == 3).all()
    assert ((kept.mean(0) - 0.5).abs() < 4 * 0.5 / 4000**0.5).all()
    pairs = (kept.flatten(1).T @ kept.flatten(1)) / 4000  # both stay: 3 of 6, then 2 of 5
    off = pairs[~torch.eye(6, dtype=torch.bool)]
    assert ((off - 0.2).abs() < 4 * 0.4 / 4000**0.5).all()


def test_a_share_of_the_tasks(net):
    schedule = PER_TASK.per_task(0.3)
    pruner = Pruner(net, schedule, task_masks=drawing())
    masked = [not drawn(pruner)["fc.weight"].all() for _ in range(2000)]
    assert abs(sum(masked) / 2000 - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5


def test_clones_keep_their_own_masks(net):
    pruner = Pruner(net, PER_TASK, task_masks=drawing())
    learners = []
    for _ in range(3):
        with pruner.task_masks() as masks:
            learners.append((copy.deepcopy(net), dict(masks)))
    pruner.step()
    assert not equal(learners[0][1], learners[1][1])
    for learner, masks in learners:
        assert torch.equal(learner.fc.weight != 0, masks["fc.weight"])


def test_gradients_are_those_of_the_masked_loss(net, batch):
    """One outer step on the sum over tasks: entry by entry, from the tasks that hold it."""
    net.double()
    x, y = batch[0].double(), batch[1]
    pruner = Pruner(net, PER_TASK, task_masks=drawing())
    plain, total, expected = SmallNet().double(), 0.0, 0.0
    plain.load_state_dict(
        {k.replace("_orig", ""): v for k, v in net.state_dict().items() if not k.endswith("_mask")}
    )
    values = {n: p.detach().clone().requires_grad_() for n, p in plain.named_parameters()}
    for _ in range(3):
        with pruner.task_masks() as masks:
            total = total + F.cross_entropy(net(x), y)
        masked = {n: p * masks[n] if n in masks else p for n, p in values.items()}
        expected = expected + F.cross_entropy(torch.func.functional_call(plain, masked, (x,)), y)
    total.backward()
    theirs = torch.autograd.grad(expected, list(values.values()))
    for ours, by_hand in zip(net.parameters(), theirs, strict=True):
        assert torch.allclose(ours.grad, by_hand, atol=1e-12, rtol=0)


def test_the_same_in_every_phase_and_no_draw_in_others(net):
    masks = drawing()
    start = masks.generator.get_state()
    schedule = DSDSchedule(0.5, pretrain=1, prune=1, retrain=1)
    pruner = Pruner(net, schedule, task_masks=masks)
    for _ in range(3):
        with pruner.task_masks() as held:
            assert equal(held, pruner.masks)
        pruner.step()
    assert torch.equal(masks.generator.get_state(), start)


def test_given_masks_again_and_within_a_phase(net):
    schedule = Schedule((*PER_TASK.segments, Segment(9, sparse=True, sparsity=0.25)))
    pruner = Pruner(net, schedule, task_masks=drawing())
    first = drawn(pruner)
    with pruner.task_masks(first) as masks:
        assert equal(masks, first)
        assert torch.equal(net.fc.weight != 0, first["fc.weight"])
    while not pruner.sparse:
        drawn(pruner)
        pruner.step()
    held = pruner.masks["fc.weight"]
    with pruner.task_masks({"fc.weight": first["fc.weight"]}) as masks:
        assert torch.equal(masks["fc.weight"], first["fc.weight"] & held)
        assert torch.equal(masks["conv1.weight"], pruner.masks["conv1.weight"])
    assert torch.equal(net.fc.weight != 0, held)
    assert torch.equal(pruner.masks["fc.weight"], held)


def test_resumes_exactly_within_a_meta_iteration(net):
    pruner = Pruner(net, PER_TASK, task_masks=drawing(1))
    drawn(pruner)
    pruner.step()
    drawn(pruner)
    state = copy.deepcopy(pruner.state_dict())
    then = [drawn(pruner)]
    pruner.step()
    then.append(drawn(pruner))
    twin = Pruner(SmallNet(), PER_TASK, task_masks=drawing(7))
    twin.load_state_dict(state)
    now = [drawn(twin)]
    twin.step()
    now.append(drawn(twin))
    assert all(equal(a, b) for a, b in zip(then, now, strict=True))


def test_rates_ramp_and_masks_of_the_phase_are_released(net):
    schedule = Schedule(
        (
            Segment(1, sparse=True, sparsity=0.75),
            Segment(1, sparse=True, sparsity=0.25, masks="task"),
            Segment(1, sparse=True, sparsity=0.5, masks="task"),
            Segment(1),
        )
    )
    pruner = Pruner(net, schedule, task_masks=drawing())
    kept = []
    for _ in range(4):
        kept.append((int(drawn(pruner)["fc.weight"].sum()), int(pruner.masks["fc.weight"].sum())))
        pruner.step()
    assert kept == [(12, 12), (36, 48), (24, 48), (48, 48)]


@pytest.mark.parametrize("pattern", [NByM(2, 4), Block(1, 2)])
def test_patterns(pattern):
    net = nn.Linear(8, 4)
    pruner = Pruner(net, PER_TASK, task_masks=drawing(0, pattern=pattern))
    mask = drawn(pruner)["weight"]
    size = 4 if isinstance(pattern, NByM) else 2
    groups = mask.view(-1, size).sum(1)
    assert set(groups.tolist()) == ({2} if size == 4 else {0, 2})
    assert mask.sum() == 16


def test_layers_ranked_together(net):
    pruner = Pruner(net, PER_TASK, task_masks=drawing(), allocation="global")
    counts = {tuple(int(m.sum()) for m in drawn(pruner).values()) for _ in range(5)}
    assert len(counts) > 1
    assert len({sum(kept) for kept in counts}) == 1


def test_an_error_gives_the_masks_back(net):
    pruner = Pruner(net, PER_TASK, task_masks=drawing())
    with pytest.raises(ZeroDivisionError):
        with pruner.task_masks():
            raise ZeroDivisionError
    assert bool((net.fc.weight != 0).all())
    drawn(pruner)
    pruner.step()


def test_refusals(net):
    with pytest.raises(ValueError, match="task_masks=TaskMasks"):
        Pruner(net, PER_TASK)
    assert type(net.fc) is nn.Linear
    with pytest.raises(TypeError, match="generator"):
        TaskMasks(0)
    with pytest.raises(TypeError, match="scores"):
        TaskMasks(torch.Generator(), "random")
    pruner = Pruner(net, PER_TASK, task_masks=drawing())
    with pytest.raises(RuntimeError, match="no task began"):
        pruner.step()
    with pruner.task_masks():
        for call in (pruner.step, pruner.finalize, pruner.task_masks().__enter__):
            with pytest.raises(RuntimeError, match="within task_masks"):
                call()
    with pytest.raises(ValueError, match="'fc' is not one of the pruned"):
        pruner.task_masks({"fc": torch.ones(3, 16).bool()}).__enter__()
    with pytest.raises(ValueError, match=r"the mask of fc\.weight must be boolean"):
        pruner.task_masks({"fc.weight": torch.ones(3, 16)}).__enter__()
    state = pruner.state_dict()
    for damage in ({"tasks": 0}, {"generator": torch.zeros(3)}, {"more": 1}, {"tasks": "x"}):
        with pytest.raises(ValueError, match="task_masks"):
            pruner.load_state_dict({**state, "task_masks": {**state["task_masks"], **damage}})
    drawn(pruner)
    pruner.step()


@pytest.mark.parametrize(
    ("scores", "error", "words"),
    [
        (lambda w, g: torch.ones(2), ValueError, "fc.weight for a task .* a score for each"),
        (lambda w, g: torch.full_like(w, float("nan")), ValueError, "NaN"),
        (lambda w, g: w != 0, TypeError, "real numbers"),
    ],
)
def test_bad_scores_are_named(net, scores, error, words):
    pruner = Pruner(net, PER_TASK, task_masks=drawing(0, scores), only="fc")
    with pytest.raises(error, match=words):
        pruner.task_masks().__enter__()
    assert bool((net.fc.weight != 0).all())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"masks": "episode"}, ValueError),
        ({"share": 0.0, "masks": "task"}, ValueError),
        ({"share": 1.5, "masks": "task"}, ValueError),
        ({"share": "all", "masks": "task"}, TypeError),
        ({"share": 0.5}, ValueError),
    ],
)
def test_segments_that_cannot_be(options, error):
    with pytest.raises(error, match=r"share|masks"):
        Segment(1, sparse=True, sparsity=0.5, **options)


def test_schedules_of_old_checkpoints_still_fit():
    dense, sparse = Schedule((Segment(1), Segment(1, sparse=True, sparsity=0.5))).to_dict()[
        "segments"
    ]
    assert set(dense) == {"iterations", "sparse", "sparsity", "keep", "phase", "round"}
    assert set(sparse) == set(dense)
    assert PER_TASK.to_dict()["segments"][0]["masks"] == "task"
    assert "50% in each task" in PER_TASK.describe()


def test_magnitude_keeps_in_proportion_to_size():
    net = nn.Linear(2, 1)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, -3.0]]))
    for temperature in (0.5, 1.0, 4.0):
        pruner = Pruner(copy.deepcopy(net), PER_TASK, task_masks=drawing(0, magnitude(temperature)))
        kept = torch.stack([drawn(pruner)["weight"][0] for _ in range(3000)]).double().mean(0)
        wanted = 3 ** (1 / temperature) / (1 + 3 ** (1 / temperature))
        assert abs(kept[1] - wanted) < 4 * (wanted * (1 - wanted) / 3000) ** 0.5
    pruner = Pruner(net, PER_TASK, task_masks=drawing(0, magnitude(1e-3)))
    assert all(drawn(pruner)["weight"].tolist() == [[False, True]] for _ in range(20))
    with pytest.raises(ValueError, match="temperature"):
        magnitude(0)


def test_magnitude_takes_weights_of_zero():
    net = nn.Linear(4, 2)
    nn.init.zeros_(net.weight)
    pruner = Pruner(net, PER_TASK, task_masks=drawing(0, magnitude(1.0)))
    assert int(drawn(pruner)["weight"].sum()) == 4


def test_catfish_prunes_what_the_task_needs_most(net, batch):
    net.double()
    x, y = batch[0].double(), batch[1]
    oracle = copy.deepcopy(net)
    F.cross_entropy(oracle(x), y).backward()
    catfish = Catfish()
    pruner = Pruner(net, PER_TASK, task_masks=drawing(0, catfish))
    catfish.observe(F.cross_entropy(net(x), y), net.parameters())
    assert all(p.grad is None for p in net.parameters())
    for name, mask in drawn(pruner).items():
        weight = oracle.get_parameter(name)
        score = (weight * weight.grad).detach().abs()
        assert score[mask].max() <= score[~mask].min()
    with pytest.raises(ValueError, match="seen no loss for this task"):
        pruner.task_masks().__enter__()
    with pytest.raises(RuntimeError, match="loss reaches no weight"):
        catfish.observe(torch.tensor(1.0), net.parameters())


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_whole_output_channels(rate):
    net = nn.Conv2d(3, 8, 3)
    schedule = Schedule((Segment(9, sparse=True, sparsity=rate, masks="task"),))
    pruner = Pruner(net, schedule, task_masks=drawing(0, pattern=Rows()))
    mask = drawn(pruner)["weight"].flatten(1)
    assert (mask.all(1) | ~mask.any(1)).all()
    assert int(mask.any(1).sum()) == 8 - round(8 * rate)


def test_given_masks_count_as_a_task_also_after_resuming_within_the_iteration(net):
    pruner = Pruner(net, PER_TASK, task_masks=drawing())
    given = drawn(Pruner(SmallNet(), PER_TASK, task_masks=drawing(1)))
    with pytest.raises(RuntimeError, match="no task began"):
        pruner.step()
    with pruner.task_masks(given) as held:
        assert equal(held, given)
    resumed = Pruner(SmallNet(), PER_TASK, task_masks=drawing())
    resumed.load_state_dict(pruner.state_dict())
    for one in (pruner, resumed):
        one.step()
        with pytest.raises(RuntimeError, match="no task began"):
            one.step()
    old = pruner.state_dict()
    del old["task_masks"]["begun"]  # as older versions saved it
    resumed.load_state_dict(old)


@pytest.mark.parametrize("held", [False, True], ids=["dense", "held"])
@pytest.mark.parametrize("dense_keys", [False, True], ids=["torch's keys", "dense keys"])
@pytest.mark.parametrize("what", ["apply", "reset", "save"])
def test_what_writes_within_a_block_leaves_what_only_the_task_prunes(what, dense_keys, held):
    net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    first = Segment(1, sparse=held, sparsity=0.25 if held else 0.0)
    schedule = Schedule((first, Segment(3, sparse=True, sparsity=0.5, masks="task")))
    pruner = Pruner(net, schedule, task_masks=drawing(), dense_keys=dense_keys)
    given = {name: torch.rand(w.shape) > 0.5 for name, w in pruner.weights.items()}
    before = {name: weight.clone() for name, weight in pruner.weights.items()}
    with pruner.task_masks(given) as masks:
        if what == "apply":
            net.apply(lambda module: module.eval())
        elif what == "save":
            saved = {name: value.clone() for name, value in net.state_dict().items()}
        else:
            net[0].reset_parameters()
            before["0.weight"] = net[0].weight_orig.detach().clone()
            own = pruner.masks["0.weight"]
            assert torch.equal(before["0.weight"] != 0, own)
        for name, mask in masks.items():
            inside = net.get_submodule(name.rpartition(".")[0]).weight
            assert torch.equal(inside, before[name] * mask)
        with pytest.raises(RuntimeError, match="leave that block first"):
            pruner.project()
    assert all(torch.equal(weight, before[name]) for name, weight in pruner.weights.items())
    if what == "save" and dense_keys:
        assert all(torch.equal(saved[name], weight) for name, weight in before.items())
    pruner.step()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dense_keys", [False, True], ids=["torch's keys", "dense keys"])
def test_weights_loaded_within_a_block_keep_the_tasks_masks(dense_keys, assign):
    """As in loops that start each task from the meta-weights."""
    net = nn.Linear(6, 8)
    schedule = Schedule((Segment(9, sparse=True, sparsity=0.5, masks="task"),))
    pruner = Pruner(net, schedule, task_masks=drawing(), dense_keys=dense_keys)
    meta = copy.deepcopy(net.state_dict())
    with pruner.task_masks() as masks:
        with torch.no_grad():
            pruner.weights["weight"].add_(1)
        net.load_state_dict(meta, assign=assign)
        mask = masks["weight"]
        assert int(mask.sum()) == 24
        value = meta["weight" if dense_keys else "weight_orig"]
        assert torch.equal(net.weight, value * mask)
    assert torch.equal(net.weight, value)
    pruner.step()


def test_a_clone_saved_within_a_block_has_the_tasks_masks():
    net = nn.Linear(6, 8)
    pruner = Pruner(net, PER_TASK, task_masks=drawing())
    with pruner.task_masks() as masks:
        twin = copy.deepcopy(net)
        twin.apply(lambda module: None)
        assert torch.equal(twin.weight_mask.bool(), masks["weight"])
        assert torch.equal(twin.weight_orig != 0, masks["weight"])
    assert torch.equal(twin.weight_mask.bool(), masks["weight"])
    assert bool((net.weight_orig != 0).all())
