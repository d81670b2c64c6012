from __future__ import annotations

import contextlib
import copy
import functools
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from l2l_prune import DSDSchedule, IHTSchedule, PrunedReptile, Pruner, Schedule, Segment
from l2l_prune.masking.masked_layer import dense_state_dict
from l2l_prune.reptile import learner as inner_loop
from l2l_prune.reptile.learner import adam
from tests.conftest import SmallNet

SCHEDULE = DSDSchedule(0.5, pretrain=2, prune=3, retrain=2)
SGD = functools.partial(torch.optim.SGD, momentum=0.9)
LAYERS = ["conv1.weight", "conv2.weight", "fc.weight"]


def task(seed, dtype=torch.float32, batches=3):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(6, 1, 6, 6, generator=generator).to(dtype),
            torch.randint(0, 3, (6,), generator=generator),
        )
        for _ in range(batches)
    ]


def adapt(learner, batches):
    for x, y in batches:
        learner.adapt(F.cross_entropy(learner(x), y))
    return learner


def iterate(reptile, iteration, tasks=2, dtype=torch.float32):
    for number in range(tasks):
        reptile.collect(adapt(reptile.clone(), task(10 * iteration + number, dtype)))
    reptile.step()


def brute_force_reptile(net, schedule, make_optimizer, carry, foml, meta_lr, iterations):
    """learn2learn's deepcopy style on a plain net, masked by hand before every forward."""
    names = [n for n, _ in net.named_parameters()]
    masks, state = {}, None
    sparse_before = False
    for i in range(iterations):
        segment = schedule.segment(i)
        if segment.sparse and not sparse_before:
            for n, p in net.named_parameters():
                if n in LAYERS:
                    keep = p.numel() - round(segment.sparsity * p.numel())
                    order = p.detach().abs().flatten().sort(descending=True, stable=True).indices
                    mask = torch.zeros(p.numel(), dtype=p.dtype)
                    mask[order[:keep]] = 1
                    masks[n] = mask.view(p.shape)
        elif not segment.sparse:
            masks = {}
        sparse_before = segment.sparse

        def hold(model, masks=masks):
            with torch.no_grad():
                for n, p in model.named_parameters():
                    if n in masks:
                        p.mul_(masks[n])

        hold(net)
        moves = []
        for number in range(2):
            learner = copy.deepcopy(net)
            optimizer = make_optimizer(learner.parameters())
            if carry and state is not None:
                optimizer.load_state_dict(state)
            for x, y in task(10 * i + number, torch.float64):
                hold(learner)
                before = copy.deepcopy(learner.state_dict())
                optimizer.zero_grad()
                F.cross_entropy(learner(x), y).backward()
                optimizer.step()
            hold(learner)
            if carry:
                for n, p in learner.named_parameters():
                    for key in ("momentum_buffer", "exp_avg"):
                        if n in masks and key in optimizer.state[p]:
                            optimizer.state[p][key].mul_(masks[n])
                state = copy.deepcopy(optimizer.state_dict())
            start = before if foml else net.state_dict()
            moves.append({n: learner.state_dict()[n] - start[n] for n in names})
        with torch.no_grad():
            for n, p in net.named_parameters():
                p.add_(meta_lr(i) * (moves[0][n] + moves[1][n]) / 2)
        hold(net)


@pytest.mark.parametrize("foml", [False, True], ids=["reptile", "foml"])
@pytest.mark.parametrize("carry", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize(
    "optimizer",
    [
        functools.partial(torch.optim.SGD, lr=0.05),
        functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
        functools.partial(torch.optim.Adam, lr=0.01, betas=(0.0, 0.999)),
        functools.partial(torch.optim.Adam, lr=0.01),
    ],
    ids=["sgd", "momentum", "reptile-adam", "adam"],
)
def test_equals_the_deepcopy_loop(net, optimizer, carry, foml):
    net.double()
    oracle = copy.deepcopy(net)
    schedule = IHTSchedule(0.6, pretrain=1, prune=2, retrain=1, rounds=2, initial_sparsity=0.3)
    reptile = PrunedReptile(
        net,
        schedule,
        inner_lr=optimizer.keywords["lr"],
        meta_lr=0.9,
        meta_lr_final=0.2,
        inner_optimizer=optimizer,
        carry_state=carry,
        foml=foml,
    )
    n = schedule.iterations
    for i in range(n):
        iterate(reptile, i, dtype=torch.float64)
    brute_force_reptile(
        oracle, schedule, optimizer, carry, foml, lambda i: 0.9 + (0.2 - 0.9) * i / n, n
    )
    for (name, a), (_, b) in zip(net.named_parameters(), oracle.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-8, rtol=0), name


def test_learners_and_model_are_exactly_zero_while_sparse(net):
    reptile = PrunedReptile(net, SCHEDULE, inner_lr=0.05, inner_optimizer=SGD)
    sparse_seen = 0
    for i in range(SCHEDULE.iterations):
        learner = reptile.clone()
        masks = reptile.pruner.masks if reptile.pruner.sparse else {}
        sparse_seen += bool(masks)

        def check(model, masks=masks):
            for name, mask in masks.items():
                assert (model.get_submodule(name[:-7]).weight[~mask] == 0).all()

        check(learner.module)
        for x, y in task(i):
            learner.adapt(F.cross_entropy(learner(x), y))
            check(learner.module)
        reptile.collect(learner)
        reptile.step()
        check(net)  # also where this step released them: they restart from 0
    assert sparse_seen == 3


def test_pruned_weights_that_somebody_moves_are_zero_in_the_next_forward(net):
    """A user may train a learner with an optimizer of his own."""
    reptile = PrunedReptile(net, DSDSchedule(0.5, pretrain=0, prune=3, retrain=1))
    learner = reptile.clone()
    mask = reptile.pruner.masks["fc.weight"]
    own = torch.optim.SGD(learner.parameters(), lr=0.1)
    for x, y in task(0):
        loss = F.cross_entropy(learner(x), y)
        assert (learner.module.fc.weight[~mask] == 0).all()
        own.zero_grad()
        loss.backward()
        own.step()
    reptile.collect(learner)
    reptile.step()
    assert (net.fc.weight[~mask] == 0).all()


def test_two_forwards_before_one_backward(net):
    reptile = PrunedReptile(net, DSDSchedule(0.5, pretrain=0, prune=3, retrain=1))
    learner = reptile.clone()
    (x, y), (x2, y2), _ = task(0)
    learner.adapt(F.cross_entropy(learner(x), y) + F.cross_entropy(learner(x2), y2))


def test_meta_lr_is_linear_and_stays_at_its_end(net):
    reptile = PrunedReptile(net, SCHEDULE, meta_lr=1.0, meta_lr_final=0.3)
    seen = []
    for i in range(SCHEDULE.iterations + 2):
        seen.append(reptile.meta_lr)
        iterate(reptile, i, tasks=1)
    assert seen == pytest.approx([1 - 0.1 * i for i in range(8)] + [0.3])


def test_batch_norm_buffers_do_not_leak(net):
    reptile = PrunedReptile(net, SCHEDULE)
    before = {n: b.clone() for n, b in net.named_buffers()}
    learner = adapt(reptile.clone(), task(0))
    assert not torch.equal(learner.module.norm.running_mean, before["norm.running_mean"])
    reptile.collect(learner)
    again = reptile.clone()
    assert torch.equal(again.module.norm.running_mean, before["norm.running_mean"])
    assert int(again.module.norm.num_batches_tracked) == 0
    reptile.step()
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers() if "norm" in n)


def test_training_modes_follow_the_model(net):
    reptile = PrunedReptile(net, SCHEDULE)
    reptile.collect(reptile.clone())
    net.norm.eval()
    learner = reptile.clone()
    assert not learner.module.norm.training
    assert learner.module.conv1.training
    reptile.eval()
    assert not any(m.training for m in reptile.clone().modules())


@pytest.mark.parametrize("iterations", [1, 3])
def test_evaluation_leaves_everything_exactly_as_it_was(net, iterations):
    twin = copy.deepcopy(net)
    evaluated, plain = PrunedReptile(net, SCHEDULE), PrunedReptile(twin, SCHEDULE)
    for i in range(SCHEDULE.iterations):
        for number in range(2):
            for reptile in (evaluated, plain):
                learner = adapt(reptile.clone(), task(10 * i + number))
                if reptile is evaluated:
                    state = str(reptile.state_dict())
                    other = adapt(reptile.clone(), task(99))
                    other(task(99)[0][0])
                    assert str(reptile.state_dict()) == state
                    del other
                reptile.collect(learner)
        evaluated.step(), plain.step()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_learners_may_live_side_by_side(net):
    """State is carried in the order of collect(), whatever the order of adapting."""
    twin = copy.deepcopy(net)
    together = PrunedReptile(net, SCHEDULE, carry_state=False)
    alone = PrunedReptile(twin, SCHEDULE, carry_state=False)
    a, b = together.clone(), together.clone()
    for (xa, ya), (xb, yb) in zip(task(0), task(1), strict=True):
        a.adapt(F.cross_entropy(a(xa), ya))
        b.adapt(F.cross_entropy(b(xb), yb))
    together.collect(a), together.collect(b)
    together.step()
    iterate(alone, 0)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("stop", [0, 1, 2, 4, 5, 6, 8])
@pytest.mark.parametrize("halfway", [False, True], ids=["between", "halfway"])
def test_resumes_bit_exactly(stop, halfway):
    def build(seed):
        torch.manual_seed(seed)
        return PrunedReptile(SmallNet(), SCHEDULE, inner_lr=0.01)

    reptile = build(0)
    for i in range(stop):
        iterate(reptile, i)
    if halfway:  # one of two tasks of the next iteration is collected already
        reptile.collect(adapt(reptile.clone(), task(10 * stop)))
    file = io.BytesIO()
    torch.save(reptile.state_dict(), file)
    file.seek(0)
    again = build(1)
    again.collect(adapt(again.clone(), task(7)))
    again.load_state_dict(torch.load(file, weights_only=True))
    for one in (reptile, again):
        if halfway:
            one.collect(adapt(one.clone(), task(10 * stop + 1)))
            one.step()
        for i in range(stop + halfway, SCHEDULE.iterations + 1):
            iterate(one, i)
    for a, b in zip(reptile.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert repr(reptile.pruner) == repr(again.pruner)


def test_checkpoint_of_another_schedule_changes_nothing(net):
    other = PrunedReptile(SmallNet(), DSDSchedule(0.4, pretrain=2, prune=3, retrain=2))
    reptile = PrunedReptile(net, SCHEDULE)
    before = str(reptile.state_dict())
    with pytest.raises(ValueError, match="another schedule"):
        reptile.load_state_dict(other.state_dict())
    assert str(reptile.state_dict()) == before


def test_cast_in_the_middle(net):
    reptile = PrunedReptile(net, SCHEDULE)
    for i in range(3):
        iterate(reptile, i)
    reptile.double()
    for i in range(3, 7):
        iterate(reptile, i, dtype=torch.float64)
    assert net.fc.weight.dtype == torch.float64


def test_deepcopy_continues_alike(net):
    reptile = PrunedReptile(net, SCHEDULE)
    for i in range(3):
        iterate(reptile, i)
    twin = copy.deepcopy(reptile)
    for i in range(3, 7):
        iterate(reptile, i), iterate(twin, i)
    for a, b in zip(reptile.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_finalize_returns_the_plain_model(net):
    keys = list(SmallNet().state_dict())
    reptile = PrunedReptile(net, Schedule((Segment(1), Segment(1, sparse=True, sparsity=0.5))))
    iterate(reptile, 0)
    assert reptile.finalize() is net
    assert list(net.state_dict()) == keys
    assert (net.fc.weight == 0).sum() == 24
    for call in (reptile.clone, reptile.step, reptile.finalize):
        with pytest.raises(RuntimeError, match="finalized"):
            call()


def test_frozen_parameters_stay(net):
    net.conv1.weight.requires_grad_(False)
    before = net.conv1.weight.detach().clone()
    reptile = PrunedReptile(net, SCHEDULE, skip="conv1")
    for i in range(4):
        iterate(reptile, i)
    assert torch.equal(net.conv1.weight, before)


def test_misuse_is_told(net):
    reptile, other = PrunedReptile(net, SCHEDULE), PrunedReptile(SmallNet(), SCHEDULE)
    with pytest.raises(RuntimeError, match="without a task"):
        reptile.step()
    learner = reptile.clone()
    with pytest.raises(RuntimeError, match="does not depend on this learner"):
        learner.adapt(torch.ones((), requires_grad=True) * 2)
    with pytest.raises(RuntimeError, match="does not depend on this learner"):
        learner.adapt(torch.ones(()))
    with pytest.raises(RuntimeError, match="another PrunedReptile"):
        other.collect(learner)
    with pytest.raises(TypeError, match="made by clone"):
        reptile.collect(net)
    reptile.collect(learner)
    x, y = task(0)[0]
    for call in (
        lambda: reptile.collect(learner),
        lambda: learner(x),
        lambda: learner.adapt(y.float().sum()),
    ):
        with pytest.raises(RuntimeError, match="collected"):
            call()
    stale = reptile.clone()
    reptile.step()
    with pytest.raises(RuntimeError, match="before the last step"):
        reptile.collect(stale)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_lr": 0.0}, "inner_lr"),
        ({"inner_lr": float("nan")}, "inner_lr"),
        ({"meta_lr": -1.0}, "meta_lr"),
        ({"meta_lr_final": float("inf")}, "meta_lr_final"),
        ({"only": "nope"}, "nope"),
    ],
)
def test_bad_settings(net, options, message):
    with pytest.raises(ValueError, match=message):
        PrunedReptile(net, SCHEDULE, **options)
    assert list(net.state_dict()) == list(SmallNet().state_dict())


def test_lbfgs_is_refused(net):
    reptile = PrunedReptile(net, SCHEDULE, inner_optimizer=torch.optim.LBFGS)
    with pytest.raises(ValueError, match="L-BFGS needs one"):
        reptile.clone()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_fused_default_optimizer_is_plain_adam(weight_decay):
    """Against the formula: beta1 = 0, bias correction, epsilon outside it, decoupled decay."""
    weight = torch.nn.Parameter(torch.randn(7, 3, dtype=torch.float64))
    expected, second = weight.detach().clone(), torch.zeros(7, 3, dtype=torch.float64)
    optimizer = adam([weight], lr=0.01, weight_decay=weight_decay)
    assert optimizer.param_groups[0]["fused"]
    for step in range(1, 6):
        weight.grad = torch.randn(7, 3, dtype=torch.float64)
        second = 0.999 * second + 0.001 * weight.grad**2
        corrected = (second / (1 - 0.999**step)).sqrt() + 1e-8
        expected = expected * (1 - 0.01 * weight_decay) - 0.01 * weight.grad / corrected
        optimizer.step()
        assert torch.allclose(weight.detach(), expected, rtol=0, atol=1e-12)


def test_the_default_optimizer_is_not_fused_where_torch_cannot():
    assert not adam([torch.nn.Parameter(torch.ones(2, device="meta"))], 0.1).defaults["fused"]


def test_discarded_learners_leave_no_trace_and_need_one_copy(net, monkeypatch):
    copies = []
    copy_model = inner_loop.plain_copy
    monkeypatch.setattr(
        inner_loop, "plain_copy", lambda model: copies.append(1) or copy_model(model)
    )
    reptile = PrunedReptile(net, SCHEDULE)
    reptile.collect(adapt(reptile.clone(), task(0)))
    before = copy.deepcopy(reptile.state_dict())
    outputs = []
    for _ in range(3):
        learner = adapt(reptile.clone(), task(1))
        outputs.append(learner(task(2)[0][0]).detach())
        reptile.discard(learner)
        with pytest.raises(RuntimeError, match="was collected"):
            learner(task(2)[0][0])
    assert len(copies) == 1
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    for key, value in reptile.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, before[key]), key
    assert reptile.state_dict()["_extra_state"]["tasks"] == 1
    with pytest.raises(TypeError, match="made by clone"):
        reptile.discard(net)


def test_autocast_to_bfloat16_follows_the_plain_path(net, batch):
    x, y = batch
    weights = {}
    for enabled in (False, True):
        torch.manual_seed(0)
        reptile = PrunedReptile(
            copy.deepcopy(net),
            DSDSchedule(0.5, pretrain=1, prune=2, retrain=1),
            inner_lr=0.01,
            inner_optimizer=torch.optim.SGD,
        )
        for _ in range(3):
            learner = reptile.clone()
            for _ in range(3):
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    loss = F.cross_entropy(learner(x), y)
                learner.adapt(loss)
            reptile.collect(learner)
            reptile.step()
        for name, mask in reptile.pruner.masks.items():
            held = dense_state_dict(reptile.module)[name]
            assert held.dtype == torch.float32
            assert (held[~mask] == 0).all()
        weights[enabled] = torch.cat([p.detach().flatten() for p in reptile.module.parameters()])
    start = torch.cat([p.detach().flatten() for p in net.parameters()])
    apart = (weights[True] - weights[False]).norm() / (weights[False] - start).norm()
    assert 0 < apart < 0.1


@pytest.mark.skipif(not hasattr(torch.optim, "Adafactor"), reason="torch 2.5 brought Adafactor")
def test_an_inner_optimizer_with_state_of_other_shapes_resumes(net, batch):
    """Adafactor keeps rows and columns of squared gradients instead of one entry a weight."""
    x, y = batch
    factory = torch.optim.Adafactor

    def make(model):
        return PrunedReptile(
            model, DSDSchedule(0.5, pretrain=1, prune=2, retrain=1), inner_optimizer=factory
        )

    def iterate_once(reptile):
        learner = reptile.clone()
        learner.adapt(F.cross_entropy(learner(x), y))
        reptile.collect(learner)
        reptile.step()

    resumed, whole = make(copy.deepcopy(net)), make(net)
    iterate_once(whole)
    resumed.load_state_dict(whole.state_dict())
    iterate_once(whole)
    iterate_once(resumed)
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("foml", [False, True])
def test_a_step_that_fails_changes_nothing_and_can_be_repeated(net, foml):
    """A hook that raises, and weights that are NaN when a mask is due."""
    schedule = DSDSchedule(0.5, pretrain=1, prune=2, retrain=1)
    twin = PrunedReptile(copy.deepcopy(net), schedule, foml=foml)
    reptile = PrunedReptile(net, schedule, foml=foml)
    for one in (reptile, twin):
        for number in range(2):
            one.collect(adapt(one.clone(), task(number)))
    twin.step()
    before = str(reptile.state_dict())

    def failing(reptile, args, kwargs):
        raise ArithmeticError("no")

    handle = reptile.register_step_pre_hook(failing)
    for _ in range(2):
        with pytest.raises(ArithmeticError):
            reptile.step()
    handle.remove()
    kept = reptile.pruner._tensors[0].module.weight_orig.detach().clone()
    total, reptile._collected[0] = reptile._collected[0], torch.full_like(kept, torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        reptile.step()
    reptile._collected[0] = total
    assert str(reptile.state_dict()) == before
    assert all(p.grad is None for p in net.parameters())

    def failing_afterwards(pruner):
        raise ArithmeticError("no")

    reptile.pruner.register_step_hook(failing_afterwards)
    with pytest.raises(ArithmeticError):
        reptile.step()
    assert reptile.iteration == 1  # the step itself is done, and its tasks are used up
    with pytest.raises(RuntimeError, match="without a task"):
        reptile.step()
    for p, q in zip(reptile.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("entry", ["collected", "inner_state"])
def test_a_state_without_its_lists_is_refused(net, entry):
    reptile = PrunedReptile(net, SCHEDULE)
    state = reptile.get_extra_state()
    state[entry] = None
    with pytest.raises(ValueError, match="not a PrunedReptile state dict"):
        reptile.set_extra_state(state)


def test_the_meta_step_can_start_again_in_each_phase(net):
    schedule = IHTSchedule(0.5, pretrain=4, prune=2, retrain=3, rounds=2)
    reptile = PrunedReptile(net, schedule, meta_lr=1.0, meta_lr_final=0.2, annealing="phase")
    found = []
    for _ in range(schedule.iterations + 2):
        found.append(reptile.meta_lr)
        reptile.collect(reptile.clone())
        reptile.step()
    expected = [1 - 0.8 * k / n for n in (4, 2, 3, 2, 3) for k in range(n)]
    assert found[: len(expected)] == pytest.approx(expected)
    assert found[len(expected) :] == pytest.approx([0.2, 0.2])  # past the end
    with pytest.raises(ValueError, match="annealing"):
        PrunedReptile(SmallNet(), schedule, annealing="round")


def moves(reptile, x):
    """How far a task moves each parameter, by name."""
    learner = reptile.clone()
    for _ in range(2):
        learner.adapt(learner(x).square().mean())
    new = dict(learner.module.named_parameters())
    found = {
        name.replace("_orig", ""): float(
            (new[name.replace("_orig", "")] - old).detach().abs().max()
        )
        for name, old in reptile.module.named_parameters()
    }
    reptile.collect(learner)
    reptile.step()
    return found


def test_working_copies_follow_what_is_frozen_replaced_or_slowed_down():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    reptile = PrunedReptile(net, Schedule((Segment(99),)), skip="0", inner_lr=0.1, meta_lr=0.5)
    x = torch.randn(8, 4)
    assert all(moves(reptile, x).values())
    net[0].requires_grad_(False)
    still = moves(reptile, x)
    assert still["0.weight"] == still["0.bias"] == 0.0
    assert still["2.weight"] > 0
    net[0].requires_grad_(True)
    assert moves(reptile, x)["0.weight"] > 0
    reptile.inner_lr = 1e-5
    assert max(moves(reptile, x).values()) < 1e-4
    net[1] = nn.Tanh()
    assert type(reptile.clone().module[1]) is nn.Tanh
    net.append(nn.Linear(2, 2))
    assert moves(reptile, x)["3.weight"] > 0


def test_what_a_caller_did_to_a_learner_ends_with_it():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    reptile = PrunedReptile(net, Schedule((Segment(99),)), inner_lr=0.1)
    x, seen = torch.randn(8, 4), []

    def note(*_):
        seen.append(1)

    learner = reptile.clone()
    rates = torch.optim.lr_scheduler.StepLR(learner.workspace.optimizer, 1, 0.1)
    learner.adapt(learner(x).square().mean())
    rates.step()
    reptile.discard(learner)
    assert reptile.clone().workspace.optimizer.param_groups[0]["lr"] == 0.1

    def replace_head(module):
        module[2] = nn.Linear(4, 3)

    for change in (
        lambda module: module[0].register_forward_hook(note),
        lambda module: module[2].register_full_backward_hook(note),
        lambda module: module[0].weight.register_hook(note),
        replace_head,
    ):
        learner = reptile.clone()
        change(learner.module)
        learner.adapt(learner(x).square().mean())
        reptile.discard(learner)
        seen.clear()
        learner = reptile.clone()
        assert learner(x).shape == (8, 2)
        learner.adapt(learner(x).square().mean())
        assert not seen
        reptile.discard(learner)
    learner = reptile.clone()
    replace_head(learner.module)
    with pytest.raises(RuntimeError, match=r"2\.weight of this learner is not the one"):
        reptile.collect(learner)
    net[0].register_forward_hook(note)
    reptile.clone()(x)
    assert seen == [1]


def test_learners_follow_a_model_that_was_cast_and_another_inner_optimizer():
    torch.manual_seed(0)
    net, twin = SmallNet(), SmallNet().double()
    twin.load_state_dict(net.state_dict())
    reptile, expected = (PrunedReptile(n, SCHEDULE, meta_lr=0.5) for n in (net, twin))
    x, y = task(0)[0]

    def once(reptile, x):
        learner = reptile.clone()
        learner.adapt(F.cross_entropy(learner(x), y))
        reptile.collect(learner)
        reptile.step()

    once(reptile, x)
    once(expected, x.double())
    net.double()  # not the PrunedReptile around it
    once(reptile, x.double())
    once(expected, x.double())
    assert net.fc.weight.dtype == torch.float64
    assert torch.allclose(net.fc.weight, twin.fc.weight, atol=1e-5)
    reptile.inner_optimizer = torch.optim.SGD
    assert type(reptile.clone().workspace.optimizer) is torch.optim.SGD


class Scaled(nn.Module):
    """With a plain attribute, dropout, and a buffer that may be made later."""

    def __init__(self):
        super().__init__()
        self.layer, self.dropout, self.scale = nn.Linear(4, 3), nn.Dropout(0.0), 1.0
        self.blocks = (self.layer, 2)

    def forward(self, x):
        return self.dropout(self.blocks[0](x)) * self.scale


def test_working_copies_follow_plain_attributes_and_buffers():
    torch.manual_seed(0)
    net, x = Scaled(), torch.ones(2, 4)
    reptile = PrunedReptile(net, Schedule((Segment(99),)))
    learner = reptile.clone()
    reptile.discard(learner)
    net.scale = 3.0
    torch.testing.assert_close(reptile.clone()(x), 3 * net.layer(x))
    net.scale, net.dropout.p = 1.0, 1.0
    assert (reptile.clone()(x) == 0).all()
    reptile.discard(reptile.clone())
    net.register_buffer("seen", torch.zeros(2))
    learner = reptile.clone()
    assert learner.module.seen.shape == (2,)
    reptile.discard(learner)
    net.seen = torch.ones(5)
    learner = reptile.clone()
    assert torch.equal(learner.module.seen, torch.ones(5))
    assert learner.module.blocks[0] is learner.module.layer is not net.layer


def test_learners_made_in_inference_mode_leave_no_trace(net):
    reptile = PrunedReptile(net, DSDSchedule(0.5, pretrain=0, prune=9, retrain=1))
    with torch.inference_mode():
        learner = reptile.clone()
        learner(torch.zeros(1, 1, 6, 6))
        reptile.discard(learner)
    iterate(reptile, 0)


@pytest.mark.parametrize(
    "change", [nn.Module.double, lambda m: m.to(memory_format=torch.channels_last)]
)
def test_a_learner_that_is_cast_by_itself_stays_under_its_mask(net, change):
    reptile = PrunedReptile(net, DSDSchedule(0.5, pretrain=0, prune=9, retrain=1))
    learner = reptile.clone()
    change(learner)
    dtype = learner.module.fc.weight.dtype
    adapt(learner, task(0, dtype))
    for name, mask in reptile.pruner.masks.items():
        weight = learner.module.get_parameter(name)
        assert (weight[~mask] == 0).all()
        assert (weight[mask] != 0).all()
    if dtype == torch.float64:
        with pytest.raises(RuntimeError, match=r"was cast or moved .*float64"):
            reptile.collect(learner)
        reptile.discard(learner)
    else:
        reptile.collect(learner)
        reptile.step()
    twin = PrunedReptile(SmallNet(), reptile.schedule)
    twin.load_state_dict(reptile.state_dict())
    iterate(reptile, 1)
    iterate(twin, 1)
    assert all(map(torch.equal, reptile.parameters(), twin.parameters()))


def test_a_learner_that_is_moved_to_where_it_is_stays_as_it_was(net):
    reptile = PrunedReptile(net, SCHEDULE)
    learner = reptile.clone()
    held = learner.workspace
    adapt(learner.to("cpu"), task(0))
    reptile.collect(learner)
    assert reptile.clone().workspace is held


def test_frozen_weights_stay_bit_for_bit_whatever_the_number_of_tasks():
    torch.manual_seed(0)
    net = SmallNet()
    net.conv1.requires_grad_(False)
    before = copy.deepcopy(net.conv1.state_dict())
    reptile = PrunedReptile(net, SCHEDULE, skip="conv1")
    for iteration in range(5):
        iterate(reptile, iteration, tasks=7)
    assert all(torch.equal(before[key], value) for key, value in net.conv1.state_dict().items())


def test_a_task_that_diverged_can_be_dropped(net):
    reptile = PrunedReptile(net, DSDSchedule(0.5, pretrain=1, prune=1, retrain=1))
    learner = reptile.clone()
    with torch.no_grad():
        learner.module.fc.weight.fill_(float("nan"))
    reptile.collect(learner)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"fc\.weight"):
        reptile.step()
    reptile.forget_tasks()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    with pytest.raises(RuntimeError, match="without a task"):
        reptile.step()
    reptile.forget_inner_state()
    iterate(reptile, 0)
    assert all(weight.isfinite().all() for weight in net.parameters())


def test_an_autocast_block_around_the_loop_learns_like_one_around_each_forward_pass(net):
    """Autocast keeps casts of leaf weights; learners write theirs in place."""
    reptile = PrunedReptile(net, SCHEDULE, inner_lr=0.05)

    half = functools.partial(torch.autocast, "cpu", torch.bfloat16)

    def trained(whole):
        twin = copy.deepcopy(reptile)
        with half() if whole else contextlib.nullcontext():
            for iteration in range(3):
                for number in range(2):  # the second task gets the first one's working copy
                    learner = twin.clone()
                    for x, y in task(10 * iteration + number):
                        with half():
                            loss = F.cross_entropy(learner(x), y)
                        learner.adapt(loss)
                    twin.collect(learner)
                twin.step()
            model = F.cross_entropy(twin.module(task(99)[0][0]), task(99)[0][1])
        return [*twin.module.parameters()], float(model.detach())

    around, loss = trained(True)
    inside, _ = trained(False)
    start = [*net.parameters()]
    for a, b, first in zip(around, inside, start, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, first)
    with half():  # the model's own casts were fresh, too
        twin = copy.deepcopy(reptile)
        torch._foreach_copy_([p.detach() for p in twin.module.parameters()], around)
        again = F.cross_entropy(twin.module(task(99)[0][0]), task(99)[0][1])
    assert loss == pytest.approx(float(again.detach()), abs=1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_masks_of_another_pruner_are_refused_where_learners_would_lose_them(net, first):
    others = []
    if first:
        others.append(Pruner(net, SCHEDULE, only="fc"))
    reptile = PrunedReptile(net, SCHEDULE, only="conv*")
    if not first:
        iterate(reptile, 0)  # working copies are there
        others.append(Pruner(net, SCHEDULE, only="fc"))
    with pytest.raises(RuntimeError, match=r"^fc\.weight has a mask of another Pruner"):
        reptile.clone()
    others[0].finalize()
    iterate(reptile, 1)


def test_what_a_caller_freezes_in_a_learner_ends_with_it():
    net = SmallNet()
    reptile = PrunedReptile(net, SCHEDULE, inner_lr=0.1)
    scored = reptile.clone()
    scored.module.conv1.requires_grad_(False)
    reptile.discard(adapt(scored, task(0)))
    before = net.conv1.weight.detach().clone()
    reptile.collect(adapt(reptile.clone(), task(1)))
    reptile.step()
    assert not torch.equal(net.conv1.weight, before)


def test_a_copy_of_a_learner_keeps_its_masks():
    reptile = PrunedReptile(SmallNet(), Schedule([Segment(4, sparse=True, sparsity=0.5)]))
    learner = adapt(reptile.clone(), task(0))
    pruned = learner.module.fc.weight == 0
    assert pruned.any()
    copied = adapt(copy.deepcopy(learner), task(1))
    assert (copied.module.fc.weight[pruned] == 0).all()
    assert not torch.equal(copied.module.fc.weight, learner.module.fc.weight)
