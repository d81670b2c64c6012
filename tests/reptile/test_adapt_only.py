"""Learners of which only some parameters adapt, against the same steps made by hand."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from l2l_prune import DSDSchedule, PrunedReptile, Schedule, Segment
from l2l_prune.channels import Structured
from l2l_prune.fewshot import EpisodeSampler, few_shot_accuracy
from l2l_prune.reptile.batched import BatchedLearners
from l2l_prune.reptile.best_channels import best_channels
from l2l_prune.reptile.compiled import CompiledStep
from tests.conftest import SmallNet, without_compiler

SPARSE = DSDSchedule(0.5, pretrain=0, prune=9, retrain=0)
DENSE = DSDSchedule(0.5, pretrain=9, prune=0, retrain=0)
CHANNELS = {"conv2": [0, 3], "fc": None}
CHOICES = {
    "head": ("fc", {"fc.weight", "fc.bias"}),
    "one bias": ("conv1.bias", {"conv1.bias"}),
    "pattern": ("conv*", {"conv1.weight", "conv1.bias", "conv2.weight"}),
    "type": (nn.BatchNorm2d, {"norm.weight", "norm.bias"}),
    "several": (["fc", "norm.bias"], {"fc.weight", "fc.bias", "norm.bias"}),
    "predicate": (lambda name, module: name == "conv2", {"conv2.weight"}),
}
adamw = functools.partial(torch.optim.AdamW, betas=(0.5, 0.9), weight_decay=0.1)


def steps(learner, batch, count=3):
    x, y = batch
    for _ in range(count):
        learner.adapt(F.cross_entropy(learner(x), y))


def by_hand(model, trained, batch, rows=None, count=3):
    """The same on a copy in which everything else is put back after each step."""
    twin = copy.deepcopy(model)
    start = copy.deepcopy(dict(twin.named_parameters()))
    zero = {n: p == 0 for n, p in start.items() if bool((p == 0).any()) and p.dim() > 1}
    optimizer = adamw([p for n, p in twin.named_parameters() if n in trained], lr=0.01)
    x, y = batch
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                if name in zero:
                    parameter[zero[name]] = 0
                for row in range(len(parameter)):
                    if name in (rows or {}) and row not in rows[name]:
                        parameter[row] = start[name][row]
    return dict(twin.named_parameters())


@pytest.mark.parametrize("schedule", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("choice", CHOICES)
def test_only_the_chosen_adapt(net, batch, choice, schedule):
    rule, names = CHOICES[choice]
    reptile = PrunedReptile(net, schedule, inner_lr=0.01, inner_optimizer=adamw)
    learner = reptile.clone(adapt_only=rule)
    expected = by_hand(learner.module, names, batch)
    before = {n: p.detach().clone() for n, p in learner.module.named_parameters()}
    steps(learner, batch)
    for name, parameter in learner.module.named_parameters():
        torch.testing.assert_close(parameter, expected[name])
        assert torch.equal(parameter, before[name]) == (name not in names), name


@pytest.mark.parametrize("schedule", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_chosen_channels(net, batch, schedule):
    reptile = PrunedReptile(net, schedule, inner_lr=0.01, inner_optimizer=adamw)
    learner = reptile.clone(adapt_only=CHANNELS)
    names = {"conv2.weight", "fc.weight", "fc.bias"}
    expected = by_hand(learner.module, names, batch, {"conv2.weight": [0, 3]})
    before = learner.module.conv2.weight.detach().clone()
    steps(learner, batch)
    for name, parameter in learner.module.named_parameters():
        torch.testing.assert_close(parameter, expected[name])
    assert torch.equal(learner.module.conv2.weight[1:3], before[1:3])
    assert not torch.equal(learner.module.conv2.weight[0], before[0])


def differences(module, mask, x, y, step=1e-5):
    """The loss's derivatives by each remaining weight, from central differences."""
    found = {}
    for name, parameter in module.named_parameters():
        flat = parameter.detach().view(-1)
        kept = mask.get(name, torch.ones_like(parameter)).flatten()
        gradient = torch.zeros_like(flat)
        for i in range(len(flat)):
            value, losses = flat[i].clone(), []
            for sign in (1, -1):
                flat[i] = value + sign * step
                losses.append(F.cross_entropy(module(x), y).detach())
            flat[i] = value
            gradient[i] = (losses[0] - losses[1]) / (2 * step) * kept[i]
        found[name] = gradient.view_as(parameter)
    return found


@pytest.mark.parametrize("schedule", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_the_best_channels_are_those_found_by_hand_and_others_stay(net, batch, schedule):
    reptile = PrunedReptile(net.double(), schedule, inner_lr=0.01, inner_optimizer=adamw)
    x, y = batch[0].double(), batch[1]
    tasks = [(x[:4], y[:4]), (x[4:], y[4:])]
    module, masks = copy.deepcopy(reptile.clone().module), reptile.pruner.learner_masks
    gradients = [differences(module, masks, *task) for task in tasks]
    rows = []
    for layer in ("conv1", "norm", "conv2", "fc"):
        own = [n for n in gradients[0] if n.startswith(f"{layer}.")]
        for channel in range(len(gradients[0][own[0]])):
            score = sum(float(g[n][channel].square().sum()) for g in gradients for n in own)
            size = sum(
                int(masks.get(n, torch.ones_like(gradients[0][n]))[channel].sum()) for n in own
            )
            rows.append((score / max(size, 1), size, layer, channel))
    whole = sum(size for _, size, _, _ in rows)
    for share in (0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.3):
        found = best_channels(reptile, tasks, share=share)
        left, expected = share * whole, {}
        for score, size, layer, channel in sorted(rows, key=lambda row: -row[0]):
            if size <= left and score > 1e-12:
                left -= size
                expected.setdefault(layer, []).append(channel)
        assert found == {layer: sorted(channels) for layer, channels in expected.items()}
        assert 0 < sum(map(len, found.values())) < len(rows)

    learner = reptile.clone(found)
    names = {n for n in gradients[0] if n.split(".")[0] in found}
    chosen = {n: found[n.split(".")[0]] for n in names}
    after = by_hand(learner.module, names, (x, y), chosen)
    before = {n: p.detach().clone() for n, p in learner.module.named_parameters()}
    steps(learner, (x, y))
    for name, parameter in learner.module.named_parameters():
        torch.testing.assert_close(parameter, after[name], rtol=1e-12, atol=1e-14)
        frozen = [c for c in range(len(parameter)) if c not in chosen.get(name, [])]
        assert torch.equal(parameter[frozen], before[name][frozen])
        if name in masks:
            assert not parameter[masks[name] == 0].any()
            assert not before[name][masks[name] == 0].any()


def test_no_channel_can_be_chosen(net, batch):
    reptile = PrunedReptile(net, DENSE)
    with pytest.raises(ValueError, match=r"fits in 0\.001 of 243 weights: raise share"):
        best_channels(reptile, [batch], share=0.001)
    with pytest.raises(ValueError, match="tasks must hold at least one support set"):
        best_channels(reptile, [])
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\), got 30; 30% is 0.3"):
        best_channels(reptile, [batch], share=30)
    with pytest.raises(TypeError, match="reptile must be a PrunedReptile"):
        best_channels(net, [batch])


class Tied(nn.Module):
    """``last`` uses ``first``'s weight, and ``again`` is ``middle``; ``head`` may be pruned."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last, self.head = (nn.Linear(4, 4) for _ in range(4))
        self.last.weight, self.again = self.first.weight, self.middle

    def forward(self, x):
        return self.head(self.again(self.last(self.middle(self.first(x).tanh())).tanh()))


@pytest.mark.parametrize(
    ("only", "moved"),
    [
        ("last", {"first.weight", "last.bias"}),
        (["last.weight"], {"first.weight"}),
        ({"last": [1]}, {"first.weight", "last.bias"}),
        ({"last": None}, {"first.weight", "last.bias"}),
        ("again", {"middle.weight", "middle.bias"}),
        ({"again": [1]}, {"middle.weight", "middle.bias"}),
    ],
)
def test_tied_weights_adapt_under_any_of_their_names(only, moved):
    torch.manual_seed(0)
    model = Tied()
    before = copy.deepcopy(dict(model.named_parameters()))
    reptile = PrunedReptile(model, Schedule([Segment(1)]), inner_lr=0.01, only="head")
    learner = reptile.clone(adapt_only=only)
    steps(learner, (torch.randn(6, 4), torch.arange(6) % 4))
    adapted = dict(learner.module.named_parameters())
    for name, parameter in before.items():
        rows = {row for row in range(4) if not torch.equal(adapted[name][row], parameter[row])}
        expected = {1} if isinstance(only, dict) and None not in only.values() else {*range(4)}
        assert rows == (expected if name in moved else set())


def test_the_next_learner_adapts_everything_again(net, batch):
    reptile = PrunedReptile(net, SPARSE, inner_lr=0.01)
    whole = reptile.clone()
    steps(whole, batch)
    for rule in ("fc", CHANNELS):
        learner = reptile.clone(rule)
        steps(learner, batch)
        reptile.discard(learner)
    again = reptile.clone()
    steps(again, batch)
    for one, other in zip(whole.module.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(one, other)


def test_nothing_is_computed_for_what_comes_before(net, batch):
    learner = PrunedReptile(net, DENSE).clone("fc")
    loss = F.cross_entropy(learner(batch[0]), batch[1])
    learner.adapt(loss)
    reached = {n for n, p in learner.module.named_parameters() if p.grad is not None}
    assert reached == {"fc.weight", "fc.bias"}


def test_training_moves_the_chosen_alone(net, batch):
    reptile = PrunedReptile(net, DENSE, inner_lr=0.01, meta_lr_final=1.0)
    before = copy.deepcopy(net.state_dict())
    for rule in ("fc", None):
        for _ in range(2):
            learner = reptile.clone(rule)
            steps(learner, batch)
            reptile.collect(learner)
        reptile.step()
        moved = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
        everything = {n for n, _ in net.named_parameters()}
        expected = {n for n in everything if n.startswith("fc.")} if rule else everything
        assert moved == expected


def test_a_network_with_channels_cut_out(net, batch):
    pytest.importorskip("torch_pruning")
    reptile = PrunedReptile(net, SPARSE, structured=Structured(batch[0]))
    learner = reptile.clone({"conv2": [1], "fc": None})
    assert learner.module.conv2.weight.shape == (2, 2, 3, 3)
    before = learner.module.conv2.weight.detach().clone()
    steps(learner, batch)
    same = (learner.module.conv2.weight == before).flatten(1).all(1)
    assert same.tolist() == [True, False]


def episodes():
    images, labels = torch.rand(40, 1, 6, 6), torch.arange(40) // 10
    sampler = EpisodeSampler(images, labels, ways=3, shots=2, queries=4)
    return [sampler.sample() for _ in range(4)]


def test_accuracies_one_by_one_and_together(net):
    reptile = PrunedReptile(net, SPARSE, inner_lr=0.05)
    found = [
        few_shot_accuracy(
            reptile,
            tasks,
            steps=5,
            batch_size=4,
            adapt_only=only,
            tasks_at_once=together,
            generator=torch.Generator().manual_seed(0),
        ).values
        for tasks in [episodes()]
        for only in ("fc", None)
        for together in (1, 4)
    ]
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert found[0] != found[2]


@pytest.mark.parametrize("rule", ["fc", CHANNELS], ids=["head", "channels"])
def test_compiled_steps(net, batch, rule):
    with without_compiler():
        reptile = PrunedReptile(net, SPARSE, inner_lr=0.01)
        plain, other = reptile.clone(rule), reptile.clone(rule)
        step = CompiledStep(lambda learner, x, y: F.cross_entropy(learner(x), y))
        for _ in range(3):
            step(other, *batch)
        steps(plain, batch)
    for one, two in zip(plain.module.parameters(), other.module.parameters(), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    ("rule", "error", "words"),
    [
        ("head", ValueError, "adapt_only: no layer is called 'head'; there are: conv1, norm,"),
        (3, TypeError, "adapt_only takes names"),
        ([], ValueError, "adapt_only leaves no parameter"),
        ({}, ValueError, "adapt_only names no layer"),
        ({"conv9": [0]}, ValueError, "no layer is called 'conv9'"),
        ({"conv2": [4]}, ValueError, r"adapt_only\['conv2'\] names channel 4, but there are 4"),
        ({"conv2": [-1]}, ValueError, r"adapt_only\['conv2'\] must be >= 0"),
        ({"conv2": []}, ValueError, "names no channel"),
        ({"conv2": [0.5]}, TypeError, "must be an integer"),
    ],
)
def test_what_cannot_adapt(net, rule, error, words):
    reptile = PrunedReptile(net, DENSE)
    with pytest.raises(error, match=words):
        reptile.clone(rule)


def test_what_does_not_go_together(net):
    reptile = PrunedReptile(net, DENSE)
    with pytest.raises(ValueError, match="chosen channels adapt one task at a time"):
        BatchedLearners(reptile, 2, CHANNELS)

    class Other:
        def clone(self):
            return SmallNet()

    with pytest.raises(ValueError, match="adapt_only needs a PrunedReptile, got Other"):
        few_shot_accuracy(Other(), episodes(), steps=1, batch_size=1, adapt_only="fc")
    transposed = PrunedReptile(nn.Sequential(nn.ConvTranspose2d(2, 3, 3), nn.Linear(3, 2)), DENSE)
    with pytest.raises(ValueError, match="cannot choose channels of 0, a ConvTranspose2d"):
        transposed.clone({"0": [0]})
