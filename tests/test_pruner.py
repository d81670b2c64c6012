from __future__ import annotations

import copy
import io
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrize

from l2l_prune import DSDSchedule, IHTSchedule, Pruner, Schedule, Segment
from l2l_prune.masking import Rows
from l2l_prune.schedules import one_shot

SPARSE_NOW = Schedule((Segment(5, sparse=True, sparsity=0.5),))
IHT = IHTSchedule(0.5, pretrain=2, prune=3, retrain=2, rounds=2, initial_sparsity=0.3)

OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, weight_decay=0.1),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda ps: torch.optim.Adam(ps, lr=0.01, amsgrad=True),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1),
    "adam-loop": lambda ps: torch.optim.Adam(ps, lr=0.01, foreach=False),
    "adam-fused": lambda ps: torch.optim.Adam(ps, lr=0.01, fused=True),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=0.01),
    "radam": lambda ps: torch.optim.RAdam(ps, lr=0.01),
    "adamax": lambda ps: torch.optim.Adamax(ps, lr=0.01),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.05),
    "adadelta": lambda ps: torch.optim.Adadelta(ps, lr=1.0),
    "rprop": lambda ps: torch.optim.Rprop(ps, lr=0.01),
    "asgd": lambda ps: torch.optim.ASGD(ps, lr=0.05),
}


def batches(count, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(8, 1, 6, 6, generator=generator).to(dtype),
            torch.randint(0, 3, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def train_step(model, optimizer, x, y):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def brute_force_mask(weight, keep):
    flat = weight.detach().double().numpy().reshape(-1)
    order = sorted(range(flat.size), key=lambda i: (-abs(flat[i]), i))
    mask = np.zeros(flat.size, bool)
    mask[order[:keep]] = True
    return torch.from_numpy(mask.reshape(tuple(weight.shape)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_hold_through_every_phase_with_any_optimizer(net, name):
    optimizer = OPTIMIZERS[name](net.parameters())
    pruner = Pruner(net, IHT, optimizer)
    for x, y in batches(IHT.iterations + 3):
        before = {n: m.clone() for n, m in pruner.masks.items()}
        was_sparse = pruner.sparse
        train_step(net, optimizer, x, y)
        if was_sparse:
            for n, mask in before.items():
                assert (net.get_submodule(n[:-7]).weight[~mask] == 0).all()
        pruner.step()
        for n, mask in pruner.masks.items():
            layer = net.get_submodule(n[:-7])
            rate = pruner.segment.sparsity if pruner.sparse else 0
            assert int(mask.sum()) == mask.numel() - round(rate * mask.numel())
            assert (layer.weight_orig[~mask] == 0).all()
            assert torch.isfinite(layer.weight_orig).all()


def test_mask_is_the_largest_weights_of_each_layer(net):
    optimizer = OPTIMIZERS["adam"](net.parameters())
    pruner = Pruner(net, DSDSchedule(0.4, pretrain=3, prune=2, retrain=1), optimizer)
    weights = {}
    for x, y in batches(3):
        train_step(net, optimizer, x, y)
        weights = {n: net.get_submodule(n[:-7]).weight.detach().clone() for n in pruner.masks}
        pruner.step()
    assert pruner.phase == "prune"
    for n, mask in pruner.masks.items():
        keep = mask.numel() - round(0.4 * mask.numel())
        assert torch.equal(mask, brute_force_mask(weights[n], keep))
        assert torch.equal(net.get_submodule(n[:-7]).weight, weights[n] * mask)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_equals_a_dense_model_masked_by_hand(net, name):
    """Oracle: functional_call on dense weights times masks, with its own optimizer, in float64."""
    net.double()
    dense = copy.deepcopy(net)
    layers = ["conv1.weight", "conv2.weight", "fc.weight"]
    ours, theirs = OPTIMIZERS[name](net.parameters()), OPTIMIZERS[name](dense.parameters())
    schedule = Schedule((Segment(2), Segment(3, sparse=True, sparsity=0.5), Segment(3)))
    pruner = Pruner(net, schedule, ours, release_state="keep")
    masks = None
    parameters = dict(dense.named_parameters())
    for iteration, (x, y) in enumerate(batches(8, torch.float64)):
        train_step(net, ours, x, y)
        pruner.step()
        theirs.zero_grad()
        values = {n: p * masks[n] if masks and n in layers else p for n, p in parameters.items()}
        F.cross_entropy(functional_call(dense, values, (x,)), y).backward()
        theirs.step()
        with torch.no_grad():
            if iteration + 1 == 2:
                masks = {
                    n: brute_force_mask(parameters[n], round(0.5 * parameters[n].numel()))
                    for n in layers
                }
            for n in layers if masks else []:
                parameters[n].mul_(masks[n])
                state = theirs.state.get(parameters[n], {})
                for key in ("momentum_buffer", "exp_avg"):
                    if isinstance(state.get(key), torch.Tensor):
                        state[key].mul_(masks[n])
            if iteration + 1 == 5:
                masks = None
        for a, b in zip(net.parameters(), dense.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-12, rtol=0)


def test_released_weights_restart_from_zero_and_move(net):
    optimizer = OPTIMIZERS["momentum"](net.parameters())
    pruner = Pruner(net, DSDSchedule(0.5, pretrain=2, prune=2, retrain=5), optimizer)
    data = batches(5)
    for x, y in data[:4]:
        train_step(net, optimizer, x, y)
        old = pruner.masks["fc.weight"]
        pruner.step()
    assert pruner.phase == "retrain"
    assert pruner.sparsity == 0
    assert (net.fc.weight[~old] == 0).all()
    train_step(net, optimizer, *data[4])
    pruner.step()
    moved = net.fc.weight[~old] != 0
    assert torch.equal(moved, net.fc.weight_orig.grad[~old] != 0)
    assert moved.any()


def test_second_round_can_bring_weights_back(net):
    """A new mask replaces the old: counts do not stack (0.5 twice is not 0.75)."""
    pruner = Pruner(net, IHTSchedule(0.5, pretrain=0, prune=1, retrain=1, rounds=2))
    first = pruner.masks["fc.weight"]
    pruner.step()
    with torch.no_grad():
        net.fc.weight_orig[~first] = 100.0
    pruner.step()
    assert torch.equal(pruner.masks["fc.weight"], ~first)
    assert int(first.sum()) == 24


def test_dense_phases_are_bit_identical_to_no_plugin(net):
    twin = copy.deepcopy(net)
    ours, theirs = OPTIMIZERS["adam"](net.parameters()), OPTIMIZERS["adam"](twin.parameters())
    pruner = Pruner(net, Schedule((Segment(5), Segment(5, sparse=True, sparsity=0.0))), ours)
    for x, y in batches(10):
        train_step(net, ours, x, y)
        pruner.step()
        train_step(twin, theirs, x, y)
        for a, b in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a, b)


def test_pretrain_zero_prunes_at_once_and_retrain_zero_stays_sparse(net):
    pruner = Pruner(net, DSDSchedule(0.5, pretrain=0, prune=2, retrain=0))
    assert pruner.sparse
    assert (net.fc.weight == 0).sum() == 24
    for _ in range(5):
        pruner.step()
    assert pruner.sparse
    assert pruner.iteration == 5


def test_rounds_without_retraining_make_a_new_mask_each(net):
    schedule = IHTSchedule(0.6, pretrain=1, prune=2, retrain=0, rounds=3, initial_sparsity=0.2)
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    pruner = Pruner(net, schedule, optimizer)
    sparsities = []
    for x, y in batches(schedule.iterations):
        train_step(net, optimizer, x, y)
        pruner.step()
        sparsities.append(round(pruner.sparsity, 2))
    assert sparsities == [0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.6]


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (DSDSchedule(0.5, pretrain=0, prune=2, retrain=1), 2),
        (one_shot(0.5, pretrain=1, prune=3), 2),  # sparse to the end
        (DSDSchedule(0.5, pretrain=1, prune=2, retrain=0), 2),
    ],
)
def test_finalize_warns_of_nothing_but_missing_retraining(net, schedule, steps, recwarn):
    pruner = Pruner(net, schedule)
    for _ in range(steps):
        pruner.step()
    pruner.finalize()
    assert not recwarn.list


def test_finalize_gives_back_the_plain_model(net, batch):
    keys, classes = list(net.state_dict()), [type(m) for m in net.modules()]
    parameters = list(net.parameters())
    pruner = Pruner(net, DSDSchedule(0.5, pretrain=0, prune=2, retrain=1))
    out = net(batch[0])
    with pytest.warns(UserWarning, match=r"iteration 0 of 3, phase prune.* step\(\)"):
        assert pruner.finalize() is net
    assert list(net.state_dict()) == keys
    assert [type(m) for m in net.modules()] == classes
    assert [id(p) for p in net.parameters()] == [id(p) for p in parameters]
    assert all(not m._forward_pre_hooks for m in net.modules())
    assert torch.equal(net(batch[0]), out)
    for call in (
        pruner.step,
        pruner.finalize,
        pruner.state_dict and (lambda: pruner.load_state_dict({})),
    ):
        with pytest.raises(RuntimeError, match="finalized"):
            call()
    Pruner(net, DSDSchedule(0.5, pretrain=1, prune=2, retrain=1))  # can be attached again


# ---- regrown weights ------------------------------------------------------------------------


def first_steps_after_release(noise, beta1, release_state, sparse_steps=3000, steps=20):
    """Linear regression whose target needs all weights; returns step sizes in learning rates."""
    generator = torch.Generator().manual_seed(0)
    lr = 1e-3
    layer = nn.Linear(20, 1, bias=False)
    target = torch.randn(20, 1, generator=generator)
    optimizer = torch.optim.Adam(layer.parameters(), lr=lr, betas=(beta1, 0.999))
    pruner = Pruner(
        layer,
        DSDSchedule(0.5, pretrain=10, prune=sparse_steps, retrain=steps),
        optimizer,
        release_state=release_state,
    )
    fixed = torch.randn(64, 20, generator=generator)
    kept_steps, regrown_steps = [], []
    regrown = None
    for _ in range(10 + sparse_steps + steps):
        x = torch.randn(64, 20, generator=generator) if noise else fixed
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        (layer(x) - x @ target).square().mean().backward()
        optimizer.step()
        if pruner.sparse:
            regrown = ~pruner.masks["weight"]
        elif regrown is not None:
            moved = (layer.weight.detach() - before).abs() / lr
            kept_steps.append(float(moved[~regrown].max()))
            regrown_steps.append(float(moved[regrown].max()))
        pruner.step()
    return kept_steps, regrown_steps


@pytest.mark.parametrize("noise", [True, False], ids=["noisy", "converged"])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_regrown_weights_do_not_jump(noise, beta1):
    kept, regrown = first_steps_after_release(noise, beta1, "match")
    print([f"{k:.2f}/{r:.2f}" for k, r in zip(kept, regrown, strict=True)])
    assert 0 < regrown[0] <= kept[0]
    assert max(regrown[:10]) <= max(kept[:10])


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_without_the_rule_they_would(beta1):
    _, regrown = first_steps_after_release(True, beta1, "keep")
    assert max(regrown) > 3


def test_weights_freed_by_finalize_do_not_jump():
    """As if the sparse phase had ended there: the same layer, with and without the rule."""

    def first_step(release_state):
        generator = torch.Generator().manual_seed(0)
        layer = nn.Linear(20, 1, bias=False)
        target = torch.randn(20, 1, generator=generator)
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
        schedule = DSDSchedule(0.5, pretrain=10, prune=5000, retrain=0)
        pruner = Pruner(layer, schedule, optimizer, release_state=release_state)
        for iteration in range(3012):
            x = torch.randn(64, 20, generator=generator)
            optimizer.zero_grad()
            (layer(x) - x @ target).square().mean().backward()
            before = layer.weight.detach().clone()
            optimizer.step()
            if iteration < 3010:
                pruner.step()
                mask = pruner.masks.get("weight")
            elif iteration == 3010:
                pruner.finalize()
        moved = (layer.weight.detach() - before).abs() / 1e-3
        return float(moved[mask].max()), float(moved[~mask].max())

    kept, freed = first_step("match")
    assert 0 < freed <= kept
    assert first_step("keep")[1] > 2


def test_regrow_rule_under_an_optimizer_closure():
    """Lightning passes a closure: the gradients exist only inside optimizer.step."""

    def run(closure):
        torch.manual_seed(0)
        layer, x = nn.Linear(6, 1), torch.randn(9, 6)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, betas=(0.0, 0.999))
        pruner = Pruner(layer, DSDSchedule(0.5, pretrain=1, prune=50, retrain=9), optimizer)

        def loss():
            optimizer.zero_grad()
            value = (layer(x) - x.sum(1, keepdim=True)).square().mean()
            value.backward()
            return value

        for _ in range(60):
            if closure == "positional":
                optimizer.step(loss)
            elif closure == "keyword":
                optimizer.step(closure=loss)
            else:
                loss()
                optimizer.step()
            pruner.step()
        return layer.weight_orig.detach()

    plain = run(None)
    assert torch.equal(run("positional"), plain)
    assert torch.equal(run("keyword"), plain)


def test_momentum_of_pruned_entries_is_zeroed(net):
    optimizers = {k: OPTIMIZERS[k](net.parameters()) for k in ("momentum", "adam")}
    for optimizer in optimizers.values():
        for x, y in batches(3):
            train_step(net, optimizer, x, y)
    pruner = Pruner(
        net, DSDSchedule(0.5, pretrain=0, prune=2, retrain=2), list(optimizers.values())
    )
    weight, mask = net.fc.weight_orig, pruner.masks["fc.weight"]
    momentum = optimizers["momentum"].state[weight]["momentum_buffer"]
    adam = optimizers["adam"].state[weight]
    assert (momentum[~mask] == 0).all()
    assert (momentum[mask] != 0).any()
    assert (adam["exp_avg"][~mask] == 0).all()
    assert (adam["exp_avg_sq"][~mask] != 0).any()


def test_lbfgs_starts_afresh_at_each_mask(net):
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)
    pruner = Pruner(net, IHT, optimizer)
    for x, y in batches(IHT.iterations):

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        if pruner.sparse:
            assert (net.fc.weight_orig[~pruner.masks["fc.weight"]] == 0).all()
        pruner.step()
        assert all(torch.isfinite(p).all() for p in net.parameters())


# ---- resuming -------------------------------------------------------------------------------


def build(seed=0):
    torch.manual_seed(seed)
    from tests.conftest import SmallNet

    net = SmallNet()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    return net, optimizer, Pruner(net, IHT, optimizer)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("stop", [0, 1, 2, 4, 5, 6, 7, 10, 12, 13])
def test_resumes_bit_exactly_in_any_phase_and_order(stop, order):
    data = batches(IHT.iterations + 1)
    net, optimizer, pruner = build()
    for x, y in data[:stop]:
        train_step(net, optimizer, x, y)
        pruner.step()
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (net, optimizer, pruner)], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    again = build(seed=99)
    for position in order:
        again[position].load_state_dict(states[position])
    for x, y in data[stop:]:
        for one, two, three in ((net, optimizer, pruner), again):
            train_step(one, two, x, y)
            three.step()
        assert all(
            torch.equal(a, b) for a, b in zip(net.parameters(), again[0].parameters(), strict=True)
        )
    assert repr(pruner) == repr(again[2])
    ours, theirs = pruner.masks, again[2].masks
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_model_state_alone_is_noticed(net):
    pruned, *_, pruner = build()
    for _ in range(3):
        pruner.step()
    assert pruner.sparse
    other = Pruner(net, IHT)
    net.load_state_dict(pruned.state_dict())
    with pytest.raises(RuntimeError, match=r"conv1.weight.*load Pruner.state_dict"):
        other.step()
    other.load_state_dict(pruner.state_dict())
    other.step()


def change(state, **entries):
    return {**copy.deepcopy(state), **entries}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: {}, "not a Pruner state dict"),
        (lambda s: [], "not a Pruner state dict"),
        (lambda s: change(s, version=99), "not a Pruner state dict"),
        (lambda s: change(s, iteration=-1), "iteration must be >= 0, got -1"),
        (lambda s: change(s, iteration="3"), "iteration must be >= 0, got '3'"),
        (
            lambda s: change(
                s, schedule=DSDSchedule(0.5, pretrain=1, prune=1, retrain=1).to_dict()
            ),
            "another schedule",
        ),
        (lambda s: change(s, masks={}), "other tensors"),
        (
            lambda s: change(
                s, masks={**s["masks"], "fc.weight": torch.ones(2, 2, dtype=torch.bool)}
            ),
            "fc.weight does not fit",
        ),
        (
            lambda s: change(s, masks={**s["masks"], "fc.weight": torch.ones(3, 16)}),
            "fc.weight does not fit",
        ),
    ],
)
def test_foreign_checkpoints_are_refused_and_change_nothing(spoil, message):
    net, _, pruner = build()
    for _ in range(3):
        pruner.step()
    before = copy.deepcopy((pruner.state_dict(), net.state_dict()))
    with pytest.raises(ValueError, match=message):
        pruner.load_state_dict(spoil(pruner.state_dict()))
    for old, new in zip(before, (pruner.state_dict(), net.state_dict()), strict=True):
        assert str(old) == str(new)


# ---- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_diverged_weights_are_named_and_nothing_changes(net, bad):
    pruner = Pruner(net, DSDSchedule(0.5, pretrain=1, prune=2, retrain=1))
    with torch.no_grad():
        net.fc.weight_orig[0, 0] = bad
    before = copy.deepcopy(pruner.state_dict())
    with pytest.raises(ValueError, match=r"fc.weight at iteration .*NaN or infinity"):
        pruner.step()
    assert str(before) == str(pruner.state_dict())
    with torch.no_grad():
        net.fc.weight_orig[0, 0] = 1
    pruner.step()
    assert pruner.sparse


def test_failed_construction_leaves_the_model_untouched(net):
    with torch.no_grad():
        net.fc.weight[0, 0] = float("nan")
    keys = list(net.state_dict())
    with pytest.raises(ValueError, match=r"fc\.weight"):
        Pruner(net, DSDSchedule(0.5, pretrain=0, prune=2, retrain=1))
    assert list(net.state_dict()) == keys
    assert type(net.conv1) is nn.Conv2d


SCHEDULE = DSDSchedule(0.5, pretrain=1, prune=1, retrain=1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda n: (3, SCHEDULE), TypeError, "model"),
        (lambda n: (n, 0.5), TypeError, "schedule"),
        (lambda n: (n, SCHEDULE, 3), TypeError, "optimizer|iterable"),
        (lambda n: (n, SCHEDULE, ["sgd"]), TypeError, "optimizer"),
        (
            lambda n: (n, SCHEDULE, torch.optim.SGD(copy.deepcopy(n).parameters(), lr=1)),
            ValueError,
            "optimizer holds none",
        ),
        (
            lambda n: (n, DSDSchedule({"nope": 0.5}, pretrain=1, prune=1, retrain=1)),
            ValueError,
            "'nope'",
        ),
    ],
)
def test_bad_arguments(net, arguments, error, message):
    with pytest.raises(error, match=message):
        Pruner(*arguments(net))
    with pytest.raises(ValueError, match="release_state"):
        Pruner(net, SCHEDULE, release_state="fast")
    assert type(net.conv1) is nn.Conv2d


def test_a_count_that_the_pattern_rounds_to_nothing_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    schedule = DSDSchedule(keep={"0": 1}, pretrain=0, prune=2, retrain=1)
    with pytest.raises(ValueError, match=r"keep=1 .* all 64 weights of 0\.weight"):
        Pruner(model, schedule, pattern=Rows())


def test_masks_that_were_given_are_copied(net):
    pruner = Pruner(net, SPARSE_NOW)
    mask = pruner.masks["fc.weight"].clone().flip(0)
    pruner.replace_masks({"fc.weight": mask})
    mask.zero_()
    assert int(pruner.masks["fc.weight"].sum()) == 24
    pruner.step()


def test_a_replaced_layer_is_noticed(net):
    pruner = Pruner(net, SPARSE_NOW)
    net.fc = nn.Linear(16, 3)
    for call in (pruner.step, pruner.finalize):
        with pytest.raises(RuntimeError, match=r"module of fc\.weight was replaced"):
            call()


def test_a_wrapped_layer_is_still_there(net, batch):
    pruner = Pruner(net, SPARSE_NOW)
    net.fc = nn.Sequential(net.fc, nn.Identity())
    pruner.step()
    assert int((net.fc[0].weight == 0).sum()) == 24
    pruner.finalize()


def test_finalize_takes_off_all_masks_or_none(net):
    pruner = Pruner(net, SPARSE_NOW)
    parametrize.register_parametrization(net.fc, "bias", nn.Identity())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"mask of fc\.weight cannot be taken off"):
            pruner.finalize()
    assert "weight_mask" in dict(net.conv1.named_buffers())
    parametrize.remove_parametrizations(net.fc, "bias")
    assert type(pruner.finalize().fc) is nn.Linear


def test_with_dense_keys_the_pruner_s_state_comes_first(net):
    pruner = Pruner(net, SPARSE_NOW, dense_keys=True)
    states = pruner.state_dict(), net.state_dict()
    fresh = type(net)()
    again = Pruner(fresh, SPARSE_NOW, dense_keys=True)
    with pytest.raises(RuntimeError, match=r"after the Pruner\.state_dict\(\) that belongs to it"):
        fresh.load_state_dict(states[1])
    again.load_state_dict(states[0])
    fresh.load_state_dict(states[1])
    assert torch.equal(fresh.fc.weight, net.fc.weight)
    again.step()


def test_a_compiled_optimizer_step_at_a_release():
    """Oracle: the same with a plain step."""
    schedule = DSDSchedule(0.5, pretrain=1, prune=2, retrain=3)
    x, y, found = torch.randn(8, 6), torch.arange(8) % 3, []
    first = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    for compiled in (False, True):
        model = copy.deepcopy(first)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        pruner = Pruner(model, schedule, optimizer)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(6):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            step()
            pruner.step()
        found.append(model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


def test_somebody_elses_removal_is_noticed(net):
    pruner = Pruner(net, SCHEDULE)
    nn.utils.prune.remove(net.fc, "weight")
    with pytest.raises(RuntimeError, match=r"mask of fc.weight was removed"):
        pruner.step()


def test_casting_and_moving_between_steps(net):
    pruner = Pruner(net, DSDSchedule(0.5, pretrain=1, prune=3, retrain=1))
    pruner.step()
    net.double()
    pruner.project()
    pruner.step()
    assert net.fc.weight.dtype == torch.float64
    assert (net.fc.weight == 0).sum() == 24


def test_summary_counts_by_hand(net):
    pruner = Pruner(net, DSDSchedule({"conv*": 0.5}, pretrain=0, prune=1, retrain=1))
    rows = [line.split() for line in pruner.summary().splitlines()]
    assert ["conv2.weight", "(4,", "4,", "3,", "3)", "72/144", "50.0%", "0/4"] in rows
    assert ["fc.weight", "(3,", "16)", "48/48", "0.0%", "0/3"] in rows
    whole = sum(p.numel() for p in net.parameters())
    assert ["selected", "layers", "138/228", "39.5%"] in rows
    assert ["whole", "model", f"{whole - 90}/{whole}", f"{100 * 90 / whole:.1f}%"] in rows
    assert "iteration 0 of 2, phase prune" in pruner.summary()


def test_summary_counts_outputs_that_lost_all_weights():
    net = nn.Sequential(nn.Linear(3, 4), nn.ConvTranspose2d(2, 6, 1, groups=2))
    with torch.no_grad():
        net[0].weight[[1, 3]] /= 1000
        net[1].weight[:, 2] /= 1000  # the third output of either group
    pruner = Pruner(net, DSDSchedule({"0": 0.5, "1": 1 / 3}, pretrain=0, prune=1, retrain=1))
    rows = [line.split() for line in pruner.summary().splitlines()]
    assert [row[-1] for row in rows if row[0].endswith(".weight")] == ["2/4", "2/6"]


def test_old_masks_survive_for_a_pending_backward(net, batch):
    """A mask change between a clone's forward and its backward must not touch that graph."""
    pruner = Pruner(net, DSDSchedule(0.5, pretrain=0, prune=1, retrain=1))
    mask = pruner.masks["fc.weight"]
    loss = F.cross_entropy(net(batch[0]).double(), batch[1])
    net.fc._buffers["weight_mask"] = torch.ones_like(net.fc.weight_mask)
    loss.backward()
    assert (net.fc.weight_orig.grad[~mask] == 0).all()


def test_the_old_name_of_release_state_works_with_a_warning(net):
    with pytest.warns(DeprecationWarning, match="regrow_state is now called release_state") as seen:
        pruner = Pruner(net, SCHEDULE, regrow_state="keep")
    assert seen[0].filename == __file__
    assert not pruner._optimizers._match


def test_masks_that_are_handed_out_are_copies(net):
    optimizer = torch.optim.Adam(net.parameters())
    pruner = Pruner(net, DSDSchedule(0.5, pretrain=0, prune=2, retrain=1), optimizer)
    held = net.fc.weight_mask.clone()
    masks = pruner.masks
    masks["fc.weight"].zero_()
    with pruner.task_masks() as lent:
        lent["fc.weight"].zero_()
    assert torch.equal(pruner.masks["fc.weight"], held.bool())
    masks = pruner.masks
    masks["fc.weight"].logical_not_()
    pruner.replace_masks(masks)
    assert torch.equal(net.fc.weight_mask, (~held.bool()).float())
    assert torch.equal(pruner.state_dict()["regrown"]["fc.weight"], ~held.bool())


def test_masks_are_where_the_model_is(net):
    pruner = Pruner(net, SCHEDULE)
    net.to("meta")
    assert {mask.device.type for mask in pruner.masks.values()} == {"meta"}


def test_a_step_that_divides_by_zero_leaves_no_nan_under_the_mask():
    layer = torch.nn.Linear(8, 1, bias=False)
    optimizer = torch.optim.RMSprop(layer.parameters(), lr=0.01, eps=0.0)
    pruner = Pruner(layer, DSDSchedule(0.5, pretrain=0, prune=9, retrain=1), optimizer)
    layer(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    pruner.step()
    (mask,) = pruner.masks.values()
    assert (layer.weight_orig[~mask] == 0).all()
    assert layer.weight_orig.isfinite().all()


def test_an_eps_that_is_0_in_half_precision_leaves_no_nan_under_the_mask():
    layer = torch.nn.Linear(16, 8).half()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)  # eps 1e-8
    pruner = Pruner(layer, DSDSchedule(0.5, pretrain=0, prune=9, retrain=1), optimizer)
    layer(torch.ones(4, 16).half()).float().square().mean().backward()
    optimizer.step()
    assert layer.weight_orig[~pruner.masks["weight"]].isnan().any()  # torch's own
    pruner.step()
    assert (layer.weight_orig[~pruner.masks["weight"]] == 0).all()


def test_a_head_beside_the_network_of_ones_own_wrapper_is_pruned():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def clone(self):
            return self

        def adapt(self, loss):
            pass

    pruner = Pruner(Mine(), DSDSchedule(0.5, pretrain=0, prune=2, retrain=1))
    assert list(pruner.masks) == ["module.weight", "head.weight"]


def test_finalized_pruners_still_name_their_weights(net):
    pruner = Pruner(net, SCHEDULE)
    pruner.finalize()
    assert pruner.weights["fc.weight"] is net.fc.weight


def test_a_step_in_inference_mode_leaves_ordinary_tensors(net):
    pruner = Pruner(net, DSDSchedule(0.5, pretrain=1, prune=9, retrain=1))
    with torch.inference_mode():
        pruner.step()
    net(torch.zeros(2, 1, 6, 6)).sum().backward()
    assert (net.fc.weight_orig.grad[~pruner.masks["fc.weight"]] == 0).all()


def test_resuming_is_exact_while_a_second_optimizer_has_not_stepped_on_what_was_released():
    schedule = DSDSchedule(0.5, pretrain=2, prune=20, retrain=10)

    def build():
        torch.manual_seed(0)
        net = torch.nn.Linear(6, 4)
        often = torch.optim.Adam([net.weight], 1e-2)
        seldom = torch.optim.Adam([net.weight, net.bias], 1e-2)
        return net, often, seldom, Pruner(net, schedule, [often, seldom])

    def run(parts, iterations):
        net, often, seldom, pruner = parts
        for iteration in iterations:
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(iteration))
            net.zero_grad()
            (net(x) - x[:, :4] * (6 if iteration > 22 else 1)).square().mean().backward()
            often.step()
            if iteration % 4 == 1:
                seldom.step()
            pruner.step()

    whole, resumed = build(), build()
    run(whole, range(24))  # released at 22; only the first has stepped since
    assert whole[3].state_dict()["stepped"] == [["weight", 0, False]]
    for part, state in zip(resumed, [copy.deepcopy(p.state_dict()) for p in whole], strict=True):
        part.load_state_dict(state)
    run(whole, range(24, 28))
    run(resumed, range(24, 28))
    assert torch.equal(whole[0].weight, resumed[0].weight)
    assert whole[3].state_dict()["stepped"] == resumed[3].state_dict()["stepped"] == []
