"""Physically small networks against full ones that are masked by hand, in float64."""

from __future__ import annotations

import ast
import copy
import functools
import pickle
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from l2l_prune import (
    DSDSchedule,
    IHTSchedule,
    PrunedReptile,
    Pruner,
    Schedule,
    Segment,
    TaskMasks,
)
from l2l_prune.channels.pruner import ChannelPruner, Structured
from l2l_prune.fewshot.models import CaviaConv4, Conv4
from l2l_prune.masking.patterns import NByM
from l2l_prune.metalearners.cavia import CAVIA

pytest.importorskip("torch_pruning")

SCHEDULE = DSDSchedule(0.5, pretrain=1, prune=3, retrain=3)
IMAGES = torch.randn(6, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 5
OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": functools.partial(torch.optim.Adam, lr=0.01),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.01),
}


class Residual(nn.Module):
    """A sum of two paths, so that two convolutions must lose the same channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, 2, 1)
        self.conv1 = nn.Conv2d(6, 8, 3, 2, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.short = nn.Conv2d(6, 8, 1, 2, bias=False)
        self.head = nn.Linear(8 * 49, 5)

    def forward(self, x):
        x = F.leaky_relu(self.stem(x), 0.1)
        y = F.leaky_relu(self.norm1(self.conv1(x)), 0.1)
        y = F.leaky_relu(self.norm2(self.conv2(y)) + self.short(x), 0.1)
        return self.head(y.flatten(1))


def wide_conv4():
    return Conv4(5, 8)


def channels_last_conv4():
    return Conv4(5, 8).to(memory_format=torch.channels_last)


def max_conv4():
    return Conv4(5, 6, pooling="max")


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5)
    )


NETS = [wide_conv4, channels_last_conv4, max_conv4, Residual, mlp]


class MaskedFull:
    """The oracle: a full copy in which nothing reads the channels that are gone.

    Weights that read a channel are held at 0 by hand, so it cannot matter; it shares no code with
    the library. Which tensors read which channels is written down here for each network.
    """

    readers: ClassVar = {
        Conv4: {
            f"features.conv{n}": (f"features.conv{n + 1}" if n < 4 else "classifier")
            for n in range(1, 5)
        },
        Residual: {
            "stem": ("conv1", "short"),
            "conv1": "conv2",
            "conv2": "head",
            "short": "head",
        },
        nn.Sequential: {"1": "3", "3": "5"},
    }

    def __init__(self, net):
        self.net = copy.deepcopy(net)
        self.holes = []

    def cut(self, channels):
        readers = self.readers[type(self.net)]
        for layer, kept in channels.items():
            names = readers[layer]
            for name in [names] if isinstance(names, str) else names:
                weight = self.net.get_submodule(name).weight
                made = self.net.get_submodule(layer).weight.shape[0]
                gone = torch.ones(made, dtype=torch.bool)
                gone[kept] = False
                gone = gone.repeat_interleave(weight.shape[1] // made)
                self.holes.append((weight, gone))
        self.hold()

    @torch.no_grad()
    def hold(self):
        for weight, gone in self.holes:
            weight[:, gone] = 0


def train(net, optimizer, steps, after=lambda: None):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(IMAGES), LABELS).backward()
        optimizer.step()
        after()


@pytest.mark.parametrize("make", NETS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_small_net_trains_as_the_masked_full_one_and_grows_back(make, optimizer):
    net = make().double()
    before = [p.shape for p in net.parameters()]
    identities = [id(p) for p in net.parameters()]
    opt = OPTIMIZERS[optimizer](net.parameters())
    pruner = ChannelPruner(net, SCHEDULE, opt, example_inputs=IMAGES)
    train(net, opt, 1)
    oracle = MaskedFull(net)
    their_opt = OPTIMIZERS[optimizer](oracle.net.parameters())
    their_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    pruner.step()
    assert pruner.sparse
    assert pruner.sparsity == 0.5
    assert sum(p.numel() for p in net.parameters()) < sum(shape.numel() for shape in before)
    oracle.cut(pruner.channels)
    assert torch.allclose(net(IMAGES), oracle.net(IMAGES), rtol=0, atol=1e-9)
    train(oracle.net, their_opt, 3, oracle.hold)
    train(net, opt, 3, pruner.step)
    assert not pruner.sparse
    assert [p.shape for p in net.parameters()] == before
    assert [id(p) for p in net.parameters()] == identities
    assert torch.allclose(net(IMAGES), oracle.net(IMAGES), rtol=0, atol=1e-8)
    for (weight, gone), name in zip(
        oracle.holes, dict(oracle.net.named_parameters()), strict=False
    ):
        full = dict(zip(map(id, oracle.net.parameters()), net.parameters(), strict=True))
        mine = full[id(weight)]
        assert (mine[:, gone] == 0).all(), name
        assert mine.is_contiguous() or mine.is_contiguous(memory_format=torch.channels_last)
    for p in net.parameters():
        for value in opt.state[p].values():
            assert not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape == p.shape
    train(net, opt, 3, pruner.step)
    for weight, gone in oracle.holes:
        # They live again, but for units that a ReLU silences anyway.
        assert (full[id(weight)][:, gone] != 0).float().mean() > 0.3
    assert pruner.finalize() is net


@pytest.mark.parametrize("make", NETS)
def test_sizes_and_statistics_are_those_of_a_small_net(make):
    net = make().double()
    pruner = ChannelPruner(net, SCHEDULE, example_inputs=IMAGES)
    pruner.step()
    exported = pruner.export()
    small = exported.module.eval()
    assert small is not net
    assert exported.parameters == sum(p.numel() for p in small.parameters())
    assert exported.full_parameters == sum(p.numel() for p in make().parameters())
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels)
        if isinstance(module, nn.BatchNorm2d):
            assert len(module.weight) == len(module.running_mean) == module.num_features
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
    assert small(IMAGES).shape == (6, 5)


def test_an_activations_own_weights_are_cut_along():
    net = nn.Sequential(nn.Linear(4, 8), nn.PReLU(8), nn.Linear(8, 6), nn.PReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.arange(8))
    made = pruner(net, torch.zeros(2, 4))
    made.step()
    assert net[1].weight.tolist() == made.channels["0"]
    assert (net[1].num_parameters, net[3].num_parameters) == (4, 1)
    made.step()
    assert (net[1].num_parameters, net[1].weight.tolist()) == (8, [*range(8)])


def test_both_halves_of_a_gate_count():
    net = nn.Sequential(nn.Linear(4, 8), nn.GLU(), nn.Linear(4, 2))
    for parameter in net.parameters():
        nn.init.constant_(parameter, 0.1)
    with torch.no_grad():
        net[0].weight[[1, 4 + 3]] = 5.0  # of the first half, and of the second
    made = pruner(net, torch.zeros(2, 4))
    made.step()
    assert made.channels == {"0": [1, 3]}
    assert net[0].weight[:, 0].tolist() == pytest.approx([5.0, 0.1, 0.1, 5.0])


def test_channels_that_are_normalised_with_their_neighbours_stay():
    net = nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.LocalResponseNorm(3), nn.Conv2d(8, 4, 3)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
    )
    made = pruner(net, IMAGES.float())
    assert made.whole["0"] == "its channels are normalised or summed together"
    assert set(made.channels) == {"2"}


def test_counted_operations():
    net = nn.Sequential(nn.Linear(10, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False))
    pruner = ChannelPruner(net, SCHEDULE, example_inputs=torch.zeros(1, 10))
    pruner.step()
    exported = pruner.export()
    # torch-pruning counts an activation's outputs too
    assert exported.full_macs - exported.macs == (80 + 8 + 32) - (40 + 4 + 16)
    assert (exported.full_parameters, exported.parameters) == (112, 56)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7),
    reason="torch's own exporter (dynamo=True) cannot convert Conv4 in torch 2.4 to 2.6",
)
def test_the_small_network_goes_to_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    net = Conv4(5, 8)
    pruner = ChannelPruner(net, SCHEDULE, example_inputs=IMAGES.float())
    pruner.step()
    module = pruner.export().module.eval()
    torch.onnx.export(module, (IMAGES.float(),), tmp_path / "small.onnx", dynamo=True)
    session = runtime.InferenceSession(str(tmp_path / "small.onnx"))
    (name,) = (entry.name for entry in session.get_inputs())
    (scores,) = session.run(None, {name: IMAGES.float().numpy()})
    assert torch.allclose(torch.from_numpy(scores), module(IMAGES.float()), atol=1e-4)


def test_kept_channels_are_the_most_important():
    net = Conv4(5, 8)
    with torch.no_grad():
        net.features.conv2.weight.fill_(0.01)
        net.features.conv2.weight[[1, 4, 5, 7]] = 5.0
        net.features.conv3.weight.fill_(0.01)
    pruner = ChannelPruner(net, SCHEDULE, example_inputs=IMAGES.float(), importance="l1")
    pruner.step()
    assert pruner.channels["features.conv2"] == [1, 4, 5, 7]


@pytest.mark.parametrize("importance", ["l1", "l2", "taylor", "bn_scale"])
def test_importances_of_torch_pruning(importance):
    net = Conv4(5, 8)
    opt = torch.optim.SGD(net.parameters(), 0.01)
    pruner = ChannelPruner(net, SCHEDULE, opt, example_inputs=IMAGES.float(), importance=importance)
    F.cross_entropy(net(IMAGES.float()), LABELS).backward()
    opt.step()
    pruner.step()
    assert all(len(kept) == 4 for kept in pruner.channels.values())


def test_tracing_and_a_fresh_pruner_change_nothing():
    net = Conv4(5, 8).train()
    net.features.norm1.eval()
    before = copy.deepcopy(net.state_dict())
    modes = [m.training for m in net.modules()]
    ChannelPruner(net, SCHEDULE, example_inputs=IMAGES.float())
    assert modes == [m.training for m in net.modules()]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_a_cast_in_the_sparse_phase_reaches_what_was_cut_out():
    net = Conv4(5, 8)
    made = ChannelPruner(net, SCHEDULE, example_inputs=IMAGES.float())
    made.step()
    net.double()
    before = net(IMAGES)
    made.finalize()
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    assert torch.allclose(net(IMAGES), before, rtol=0, atol=1e-10)


def test_cavia_with_film():
    net = CaviaConv4(5, 8, 1, 28, context_size=3, film_at=(1, 3))
    cavia = CAVIA(net, 1.0)
    pruner = ChannelPruner(cavia, SCHEDULE, example_inputs=IMAGES.float())
    learner = cavia.clone()
    learner.adapt(F.cross_entropy(learner(IMAGES.float()), LABELS))
    pruner.step()
    kept = torch.tensor(pruner.channels["module.features.conv3"])
    film = net.features.film3
    assert film.linear.weight.shape == (8, 3)
    assert film.channels == 4
    full = pruner._full["module.features.film3.linear.weight"]
    assert torch.equal(film.linear.weight, full[torch.cat([kept, 8 + kept])])
    learner = cavia.clone()
    learner.adapt(F.cross_entropy(learner(IMAGES.float()), LABELS))
    before = learner(IMAGES.float()).detach()
    pruner.finalize()
    assert (net.features.film3.channels, net.features.film3.linear.weight.shape) == (8, (16, 3))
    assert before.shape == (6, 5)


def test_resnet12_of_metaoptnet():
    pytest.importorskip("learn2learn")
    from l2l_prune.metalearners import metaoptnet

    net = metaoptnet.resnet12(32, 1, drop_block=False).eval()
    x = torch.randn(2, 1, 32, 32)
    pruner = ChannelPruner(net, SCHEDULE, example_inputs=x)
    shape = net(x).shape
    before = sum(p.numel() for p in net.parameters())
    pruner.step()
    assert sum(p.numel() for p in net.parameters()) < before / 2
    small = net(x)
    assert small.shape == shape  # the embedding itself keeps its channels
    pruner.finalize()
    assert torch.allclose(net(x), small, rtol=1e-4, atol=1e-4)


def test_a_loss_that_is_still_held_does_not_matter():
    net = Conv4(5, 8)
    opt = torch.optim.SGD(net.parameters(), 0.01)
    pruner = ChannelPruner(net, SCHEDULE, opt, example_inputs=IMAGES.float())
    held = []
    for _ in range(5):
        opt.zero_grad()
        held.append(F.cross_entropy(net(IMAGES.float()), LABELS))
        held[-1].backward()
        assert all(p.grad.shape == p.shape for p in net.parameters())
        opt.step()
        pruner.step()


def test_first_order_and_second_order_maml_train_the_small_net():
    l2l = pytest.importorskip("learn2learn")
    net = Conv4(5, 8)
    maml = l2l.algorithms.MAML(net, lr=0.1)
    opt = torch.optim.Adam(maml.parameters(), 0.01)
    schedule = Schedule((Segment(2), Segment(2, sparse=True, sparsity=0.5), Segment(2)))
    pruner = ChannelPruner(maml, schedule, opt, example_inputs=IMAGES.float())
    sizes = []
    for iteration in range(6):
        opt.zero_grad()
        learner = maml.clone(first_order=iteration % 2 == 0)
        learner.adapt(F.cross_entropy(learner(IMAGES.float()), LABELS))
        F.cross_entropy(learner(IMAGES.float()), LABELS).backward()
        assert all(p.grad is not None for p in net.parameters())
        opt.step()
        pruner.step()
        sizes.append(net.features.conv2.weight.shape[0])
    assert sizes == [8, 4, 4, 8, 8, 8]


def test_resume_in_mid_phase_is_exact():
    def start():
        torch.manual_seed(0)
        net = Conv4(5, 8).double()
        opt = torch.optim.Adam(net.parameters(), 0.01)
        return net, opt, ChannelPruner(net, SCHEDULE, opt, example_inputs=IMAGES)

    net, opt, pruner = start()
    train(net, opt, 2, pruner.step)
    saved = copy.deepcopy((pruner.state_dict(), net.state_dict(), opt.state_dict()))
    train(net, opt, 5, pruner.step)
    other, their_opt, twin = start()
    for thing, state in zip((twin, other, their_opt), saved, strict=True):
        thing.load_state_dict(state)
    train(other, their_opt, 5, twin.step)
    assert all(map(torch.equal, net.parameters(), other.parameters()))
    twin.load_state_dict(saved[0])  # and back from full to small
    assert twin.sparse
    assert other.features.conv1.weight.shape[0] == 4


@pytest.mark.parametrize("amsgrad", [False, True])
def test_resume_between_the_optimizers_step_and_the_pruners_is_exact(amsgrad):
    def start():
        torch.manual_seed(0)
        net = Conv4(5, 8).double()
        opt = torch.optim.Adam(net.parameters(), 0.01, amsgrad=amsgrad)
        return net, opt, ChannelPruner(net, SCHEDULE, opt, example_inputs=IMAGES)

    net, opt, pruner = start()
    train(net, opt, 4, pruner.step)  # released, and no step since
    train(net, opt, 1, lambda: None)
    saved = copy.deepcopy((pruner.state_dict(), net.state_dict(), opt.state_dict()))
    pruner.step()
    train(net, opt, 2, pruner.step)
    other, their_opt, twin = start()
    for thing, state in zip((twin, other, their_opt), saved, strict=True):
        thing.load_state_dict(state)
    twin.step()
    train(other, their_opt, 2, twin.step)
    assert all(map(torch.equal, net.parameters(), other.parameters()))


def test_channels_that_are_gone_stay_gone_without_a_dense_phase():
    net = Conv4(5, 8)
    schedule = IHTSchedule(0.75, pretrain=1, prune=1, retrain=0, rounds=3, initial_sparsity=0.25)
    opt = torch.optim.SGD(net.parameters(), 0.05)
    pruner = ChannelPruner(net, schedule, opt, example_inputs=IMAGES.float())
    kept = [set(range(8))]
    for _ in range(3):
        F.cross_entropy(net(IMAGES.float()), LABELS).backward()
        opt.step()
        pruner.step()
        kept.append(set(pruner.channels["features.conv3"]))
        opt.zero_grad()
    assert [len(k) for k in kept] == [8, 6, 4, 2]
    assert kept[3] < kept[2] < kept[1]


@pytest.mark.parametrize("carry", [True, False])
def test_reptile_adapts_the_small_net(carry):
    def run(structured, keep=None):
        torch.manual_seed(0)
        net = Conv4(5, 8).double()
        schedule = DSDSchedule(0.5, pretrain=1, prune=2, retrain=2)
        reptile = PrunedReptile(net, schedule, structured=structured, carry_state=carry)
        sizes = []
        for iteration in range(5):
            for task in range(2):
                learner = reptile.clone()
                sizes.append(learner.module.features.conv1.weight.shape[0])
                x = IMAGES.roll(iteration + task, 0)
                for _ in range(2):
                    learner.adapt(F.cross_entropy(learner(x), LABELS))
                reptile.collect(learner)
            reptile.step()
        return reptile, sizes

    reptile, sizes = run(Structured(IMAGES))
    assert sizes == [8, 8, 4, 4, 4, 4, 8, 8, 8, 8]
    net = reptile.finalize()
    assert all(torch.isfinite(p).all() for p in net.parameters())
    assert all(
        p.shape == q.shape for p, q in zip(net.parameters(), Conv4(5, 8).parameters(), strict=True)
    )


def test_reptile_resumes_in_mid_phase():
    def start():
        torch.manual_seed(0)
        return PrunedReptile(Conv4(5, 8).double(), SCHEDULE, structured=Structured(IMAGES))

    def go_on(reptile, iterations):
        for iteration in iterations:
            learner = reptile.clone()
            learner.adapt(F.cross_entropy(learner(IMAGES.roll(iteration, 0)), LABELS))
            reptile.collect(learner)
            reptile.step()
        return reptile

    whole = go_on(start(), range(3))
    saved = copy.deepcopy(whole.state_dict())
    go_on(whole, range(3, 7))
    other = start()
    other.load_state_dict(saved)
    assert other.pruner.sparse
    go_on(other, range(3, 7))
    assert all(map(torch.equal, whole.parameters(), other.parameters()))


class Unknown(nn.Sequential):
    """Sorts the entries of each image, so that nothing is told of the channels."""

    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 3), nn.Linear(4 * 26 * 26, 2))

    def forward(self, x):
        return self[1](self[0](x).flatten(1).sort(1).values)


class FixedSize(Unknown):
    """Knows by heart how many channels there are."""

    def forward(self, x):
        return self[1](self[0](x).view(len(x), 4, 26 * 26).flatten(1))


class OneSided(nn.Sequential):
    """Runs without some of its channels, and then reads the wrong ones."""

    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 3), nn.Conv2d(2, 2, 3))

    def forward(self, x):
        return self[1](self[0](x)[:, :2])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3)
        self.second.weight, self.last = self.first.weight, nn.Linear(4, 2)

    def forward(self, x):
        return self.last(torch.relu(self.first(x) + self.second(x)).mean((2, 3)))


class Branches(nn.Module):
    """Two layers make a part each of the channels of a sum."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 5), nn.Linear(4, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, x):
        return self.last(torch.relu(torch.cat([self.a(x), self.b(x)], 1) + self.c(x)))


class Raw(nn.Module):
    """Its parameters are in no layer."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(2, 8))

    def forward(self, x):
        return F.linear(torch.relu(F.linear(x, self.w1)), self.w2)


@pytest.mark.parametrize("importance", ["l1", "l2", "taylor"])
@pytest.mark.parametrize("small", ["a", "b"])
def test_the_channels_of_parts_are_scored_together_and_each_part_keeps_one(small, importance):
    torch.manual_seed(0)
    net, x = Branches(), torch.randn(6, 4)
    with torch.no_grad():
        for position in range(3) if small == "a" else range(3, 8):
            net.c.weight[position] *= 0.01
            net.last.weight[:, position] *= 0.01
        net.get_submodule(small).weight.mul_(0.01)
    made = pruner(net, x, importance=importance)
    net(x).square().sum().backward()

    def size(weight):
        return {"l1": weight, "l2": weight**2, "taylor": weight * weight.grad}[importance].abs()

    with torch.no_grad():
        scores = torch.cat([size(net.a.weight).sum(1), size(net.b.weight).sum(1)])
        scores += size(net.c.weight).sum(1) + size(net.last.weight).sum(0)
    own = {"a": [0, 1, 2], "b": [3, 4, 5, 6, 7]}[small]
    order = scores.argsort(descending=True).tolist()
    best = next(c for c in order if c in own)
    expected = [best, *(c for c in order if c != best)][:4]
    made.step()
    assert made.channels == {"a": sorted(expected)}
    rows = net.get_submodule(small).weight.shape[0]
    assert rows == len({*expected} & {*own}) > 0


def test_learners_with_random_channels_keep_one_of_each_part():
    schedule = Schedule((Segment(1, sparse=True, sparsity=0.75, masks="task"),))
    reptile = PrunedReptile(
        Branches(),
        schedule,
        structured=Structured(torch.randn(6, 4)),
        task_masks=TaskMasks(torch.Generator().manual_seed(0)),
    )
    for _ in range(20):
        with reptile.task_masks():
            learner = reptile.clone()
        assert [learner.module.a.out_features, learner.module.b.out_features] == [1, 1]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: pruner(Branches(), torch.zeros(2, 4), rate=0.875),
            r"^a has 8 channels that 2 layers share, of which each needs one, and would keep 1:",
        ),
        (
            lambda: pruner(Raw(), torch.zeros(2, 4)),
            r"^the channels of w1 cannot be scored, since no Linear.*skip=\['w1'\]$",
        ),
        (
            lambda: pruner(Branches(), torch.zeros(2, 4), importance="bn_scale"),
            r"^the channels of a, b, c cannot be .*bn_scale needs batch.*skip=\['a', 'b', 'c'\]$",
        ),
        (lambda: pruner(nn.Linear(28, 5), IMAGES.float()[:, 0, 0]), "no channels that can be"),
        (
            lambda: pruner(Unknown(), IMAGES.float()),
            r"^these layers cannot be shrunk: 0: .*unknown.*\['0'\]",
        ),
        (lambda: pruner(FixedSize(), IMAGES.float()), r"without some channels of 0 .*skip=\['0'\]"),
        (lambda: pruner(OneSided(), IMAGES.float()), r"some channels of 0 .*skip=\['0'\]"),
        (
            lambda: pruner(Tied(), IMAGES.float()),
            r"first.weight is tied.*skip=\['first'\]",
        ),
        (lambda: pruner(Conv4(5, 8), skip="conv9"), "'conv9'; there are: features.conv1"),
        (lambda: pruner(Conv4(5, 8), skip="*"), "no channels that can be removed"),
        (lambda: pruner(Conv4(5, 8), importance="size"), "l1, l2, taylor, bn_scale"),
        (lambda: pruner(Conv4(5, 8), rate=0.99), "has 8 channels and would keep 0"),
        (
            lambda: pruner(Conv4(5, 8), importance="taylor").step(),
            "Taylor importance needs gradients",
        ),
        (lambda: pruner(Conv4(5, 8), importance=lambda group: torch.ones(3)).step(), "8 scores"),
        (
            lambda: pruner(
                Conv4(5, 8), importance=lambda group: torch.full((8,), float("nan"))
            ).step(),
            "features.conv1 is not finite",
        ),
    ],
)
def test_what_cannot_be_is_told(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def pruner(net, x=None, rate=0.5, **options):
    schedule = DSDSchedule(rate, pretrain=1, prune=1, retrain=1)
    inputs = IMAGES.float() if x is None else x
    return ChannelPruner(net, schedule, example_inputs=inputs, **options)


@pytest.mark.parametrize("kind", [Unknown, FixedSize, OneSided, Tied])
def test_refused_before_anything_is_changed_and_the_advice_helps(kind):
    net = nn.Sequential(nn.Conv2d(1, 6, 1), nn.ReLU(), nn.Conv2d(6, 1, 1), kind())
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    with pytest.raises(ValueError, match="skip=") as refused:
        pruner(net, IMAGES.float())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.is_leaf for p in net.parameters())
    advice = ast.literal_eval(str(refused.value).rpartition("skip=")[2])
    made = pruner(net, IMAGES.float(), skip=advice)
    made.step()
    assert set(made.channels) == {"0"}
    assert net(IMAGES.float()).shape[0] == 6


def test_a_network_keeps_its_modes_statistics_and_randomness():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4),
        nn.Flatten(), nn.Linear(4 * 24 * 24, 2),
    )  # fmt: skip
    net[1].eval()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    modes = [module.training for module in net.modules()]
    pruner(net, IMAGES.float())
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [module.training for module in net.modules()]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_both_layers_of_a_sum_can_be_named():
    for name in ("short", "conv2"):
        assert set(pruner(Residual(), skip=name).channels) == {"stem", "conv1"}


def test_a_mapping_means_the_same_to_both_pruners():
    """An exact name counts before patterns, wherever it stands; of patterns the first counts."""
    rates = {"features.*": 0.25, "*.conv3": 0.5, "features.conv2": 0.75}
    schedule = Schedule((Segment(1, sparse=True, sparsity=rates),))
    made = ChannelPruner(Conv4(5, 8), schedule, example_inputs=IMAGES.float())
    channels = {name: len(kept) / 8 for name, kept in made.channels.items()}
    masks = Pruner(Conv4(5, 8), schedule, skip="classifier").masks
    weights = {name.removesuffix(".weight"): float(m.float().mean()) for name, m in masks.items()}
    rest = dict.fromkeys(["features.conv1", "features.conv3", "features.conv4"], 0.75)
    assert channels == weights == {"features.conv2": 0.25, **rest}


def test_layers_that_lose_the_same_channels_take_one_value():
    def kept(rates):
        schedule = Schedule((Segment(1, sparse=True, sparsity=rates),))
        made = ChannelPruner(Residual(), schedule, example_inputs=IMAGES.float())
        return {name: len(kept) for name, kept in made.channels.items()}

    assert kept({"short": 0.5, "stem": 0.5}) == {"stem": 3, "conv1": 8, "conv2": 4}
    with pytest.raises(ValueError, match=r"need one value, got conv2: 0.5, short: 0.25"):
        kept({"short": 0.25, "conv2": 0.5})
    with pytest.raises(ValueError, match="head cannot lose channels: it makes the network's out"):
        kept({"head": 0.5})


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ("stem", {"conv1", "conv2"}),
        ("conv?", {"stem"}),
        (nn.Conv2d, set()),
        (lambda name, module: name == "short", {"stem", "conv1"}),
        (["short", "stem.weight"], {"conv1"}),
    ],
)
def test_skip_takes_the_rules_of_the_other_pruner(skip, left):
    if left:
        assert set(pruner(Residual(), skip=skip).channels) == left
    else:
        with pytest.raises(ValueError, match="no channels that can be removed"):
            pruner(Residual(), skip=skip)


def taylor_rounds():
    net = Conv4(5, 8)
    schedule = IHTSchedule(0.75, pretrain=1, prune=1, retrain=0, rounds=3, initial_sparsity=0.25)
    opt = torch.optim.SGD(net.parameters(), 0.05)
    made = ChannelPruner(net, schedule, opt, example_inputs=IMAGES.float(), importance="taylor")
    return net, opt, made


def test_taylor_goes_from_one_sparse_segment_to_the_next():
    net, opt, made = taylor_rounds()
    kept = []
    for _ in range(3):
        opt.zero_grad()
        F.cross_entropy(net(IMAGES.float()), LABELS).backward()
        opt.step()
        made.step()
        kept.append(made.channels["features.conv4"])
    assert [len(k) for k in kept] == [6, 4, 2]
    assert {*kept[2]} < {*kept[1]} < {*kept[0]}


def test_a_failed_choice_between_sparse_segments_changes_nothing():
    net, _, made = taylor_rounds()
    F.cross_entropy(net(IMAGES.float()), LABELS).backward()
    made.step()
    F.cross_entropy(net(IMAGES.float()), LABELS).backward()
    net.classifier.weight.grad = None
    made.released = {"classifier.weight": torch.ones(5, 6, dtype=torch.bool)}
    gradients = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    before, regrown = copy.deepcopy(net.state_dict()), dict(made.released)
    with pytest.raises(ValueError, match="Taylor importance needs gradients"):
        made.step()
    assert (made.iteration, made.sparse) == (1, True)
    assert made.released == regrown
    assert all(torch.equal(net.get_parameter(n).grad, g) for n, g in gradients.items())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_channels_that_come_back_between_sparse_segments_do_not_jump():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    schedule = Schedule(
        (Segment(1, sparse=True, sparsity=0.75), Segment(1, sparse=True, sparsity=0.25))
    )
    made = ChannelPruner(net, schedule, example_inputs=torch.zeros(2, 4))
    few = {*made.channels["0"]}
    made.step()
    more = made.channels["0"]
    assert few < {*more}
    back = torch.tensor([channel not in few for channel in more])
    assert torch.equal(made.released["2.weight"], back.expand(2, 6))


def test_what_has_regrown_is_loaded_to_where_the_network_is():
    """``meta`` stands for a device that is not the file's."""

    def start():
        net = Conv4(5, 8)
        return net, ChannelPruner(net, DSDSchedule(0.5, pretrain=1, prune=1, retrain=1),
                                  example_inputs=IMAGES.float())  # fmt: skip

    _, made = start()
    made.step()
    made.step()
    assert made.released
    net, other = start()
    net.to("meta")
    other.load_state_dict(made.state_dict())
    assert {mask.device.type for mask in other.released.values()} == {"meta"}


def test_what_has_come_back_between_sparse_segments_can_be_resumed():
    def start():
        schedule = Schedule(
            (Segment(1, sparse=True, sparsity=0.75), Segment(2, sparse=True, sparsity=0.25))
        )
        return ChannelPruner(three_layers(), schedule, example_inputs=torch.zeros(2, 4))

    made, other = start(), start()
    made.step()
    other.load_state_dict(made.state_dict())
    assert other.channels == made.channels
    assert made.released.keys() == other.released.keys() != set()
    assert all(torch.equal(mask, other.released[name]) for name, mask in made.released.items())


def without(name, state):
    del state["full"][name]


SPOILED = {
    r"full tensors lack 0\.weight": lambda state: without("0.weight", state),
    r"full tensor 0\.weight does not fit": lambda s: s["full"].update({"0.weight": torch.ones(5)}),
    r"full tensor 9\.weight does not fit": lambda s: s["full"].update({"9.weight": torch.ones(5)}),
    r"full tensor 0\.bias does not fit": lambda s: s["full"].update({"0.bias": [0.0] * 8}),
    r"regrown 0\.bias is not a mask": lambda s: s["regrown"].update({"0.bias": torch.ones(2)}),
    r"regrown 2\.bias is not a mask": lambda s: s["regrown"].update({"2.bias": None}),
    r"regrown 4\.bias is not a mask": lambda s: s["regrown"].update(
        {"4.bias": torch.ones(2, dtype=torch.bool)}  # which holds no channels
    ),
    r"channels of 0 are not numbers": lambda s: s["kept"].update({"0": [0, 1]}),
    "channels of 2 are not numbers": lambda s: s["kept"].update({"2": torch.ones(2)}),
    "not a ChannelPruner state dict": lambda s: s.update(stepped=torch.ones(2)),
    "not a .* state dict of this": lambda s: s.update(regrown=[]),
}


@pytest.mark.parametrize("words", SPOILED)
def test_a_spoiled_state_is_refused_and_changes_nothing(words):
    def start():
        schedule = DSDSchedule(0.75, pretrain=1, prune=2, retrain=1)
        return ChannelPruner(three_layers(), schedule, example_inputs=torch.zeros(2, 4))

    saved, made = start(), start()
    saved.step()
    state = saved.state_dict()
    SPOILED[words](state)
    for _ in range(3):  # released, so that there is something to lose
        made.step()
    before = copy.deepcopy((made.state_dict(), made.model.state_dict()))
    with pytest.raises(ValueError, match=words):
        made.load_state_dict(state)
    after = (made.state_dict(), made.model.state_dict())
    assert all(map(torch.equal, after[1].values(), before[1].values()))
    assert after[0]["iteration"] == before[0]["iteration"]
    assert after[0]["regrown"].keys() == before[0]["regrown"].keys() != set()


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.999)])
def test_regrown_weights_do_not_jump(betas, closure):
    """Converged while small: second moments are tiny, and the first gradients are not."""
    torch.manual_seed(1)
    net = Conv4(5, 8).double()
    opt = torch.optim.Adam(net.parameters(), 1e-3, betas=betas)
    schedule = DSDSchedule(0.5, pretrain=5, prune=300, retrain=5)
    made = ChannelPruner(net, schedule, opt, example_inputs=IMAGES)
    train(net, opt, 305, made.step)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    regrown = dict(made.released)

    def loss():
        opt.zero_grad()
        value = F.cross_entropy(net(IMAGES), LABELS)
        value.backward()
        return value

    opt.step(loss) if closure else (loss(), opt.step())
    moved = [
        (p.detach() - before[name]).abs()[regrown[name]]
        for name, p in net.named_parameters()
        if name in regrown
    ]
    assert torch.cat(moved).max() <= 1e-3 * 1.01


def test_after_finalize_the_optimizer_is_left_alone():
    net = Conv4(5, 8)
    opt = torch.optim.Adam(net.parameters(), 1e-3)
    made = ChannelPruner(net, SCHEDULE, opt, example_inputs=IMAGES.float())
    made.step()
    made.finalize()  # in the sparse phase: channels regrow, and no step() will follow
    assert made.released
    assert not opt._optimizer_step_pre_hooks


def test_reptile_does_not_let_them_jump_either():
    torch.manual_seed(1)
    schedule = DSDSchedule(0.5, pretrain=2, prune=60, retrain=2)
    reptile = PrunedReptile(
        Conv4(5, 8).double(), schedule, structured=Structured(IMAGES), meta_lr_final=1.0
    )
    for _ in range(62):
        learner = reptile.clone()
        for _ in range(5):
            learner.adapt(F.cross_entropy(learner(IMAGES), LABELS))
        reptile.collect(learner)
        reptile.step()
    assert reptile.pruner.released
    learner = reptile.clone()
    before = {name: p.detach().clone() for name, p in learner.module.named_parameters()}
    learner.adapt(F.cross_entropy(learner(IMAGES), LABELS))
    for name, mask in reptile.pruner.released.items():
        moved = (learner.module.get_parameter(name).detach() - before[name]).abs()[mask]
        assert moved.max() <= 1e-3 * 1.01, name


def test_reptile_refuses_what_does_not_go_with_channels():
    for options in ({"only": "conv1"}, {"layers": "authors"}, {"pattern": NByM(2, 4)}):
        with pytest.raises(ValueError, match="structured cannot be combined"):
            PrunedReptile(Conv4(5, 8), SCHEDULE, structured=Structured(IMAGES.float()), **options)
    with pytest.raises(TypeError, match="schedule must be a Schedule"):
        ChannelPruner(Conv4(5, 8), 0.5, example_inputs=IMAGES.float())


def test_a_failed_choice_leaves_the_net_as_it_was():
    made = pruner(Conv4(5, 8), importance="taylor")
    with pytest.raises(ValueError, match="Taylor"):
        made.step()
    assert (made.iteration, made.sparse) == (0, False)
    made.finalize()
    with pytest.raises(RuntimeError, match="was finalized"):
        made.step()


def test_rates_of_meta_sgd_would_not_fit():
    l2l = pytest.importorskip("learn2learn")
    meta = l2l.algorithms.MetaSGD(Conv4(5, 8), lr=0.1)
    with pytest.raises(ValueError, match="MetaSGD holds learning rates"):
        ChannelPruner(meta, SCHEDULE, example_inputs=IMAGES.float())


def test_learned_updates_would_not_fit():
    l2l = pytest.importorskip("learn2learn")
    meta = l2l.algorithms.GBML(Conv4(5, 8), l2l.optim.MetaCurvatureTransform, lr=0.1)
    with pytest.raises(ValueError, match=r"GBML holds .* use a Pruner"):
        ChannelPruner(meta, SCHEDULE, example_inputs=IMAGES.float())


@pytest.mark.parametrize("importance", ["l1", "l2"])
def test_groups_of_transposed_convolutions_are_scored_by_their_own_weights(importance):
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 32, 2, groups=4)),
        *(nn.ReLU(), nn.Conv2d(32, 2, 1)),
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(0.1)
        net[2].weight[4:8] *= 100  # the last two groups
    x = torch.randn(2, 3, 4, 4)
    schedule = DSDSchedule(0.5, pretrain=0, prune=1, retrain=1)
    pruner = ChannelPruner(net, schedule, example_inputs=x, importance=importance)
    assert pruner.channels["0"] == [2, 3]
    depthwise = nn.Sequential(
        *(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, groups=8)),
        *(nn.ReLU(), nn.Conv2d(8, 2, 1)),
    )
    ChannelPruner(depthwise, schedule, example_inputs=x, importance=importance)
    assert depthwise(x).shape == (2, 2, 5, 5)


def trained_channels(make=OPTIMIZERS["adam"]):
    torch.manual_seed(0)
    net = Conv4(5, 8).double()
    optimizer = make(net.parameters())
    return net, optimizer, ChannelPruner(net, SCHEDULE, optimizer, example_inputs=IMAGES[:1])


def test_a_step_in_inference_mode_leaves_a_network_that_can_be_trained():
    net, optimizer, pruner = trained_channels()
    for _ in range(SCHEDULE.iterations):
        optimizer.zero_grad()
        F.cross_entropy(net(IMAGES), LABELS).backward()
        optimizer.step()
        with torch.inference_mode():
            pruner.step()


def test_pickled_with_its_model_it_goes_on():
    net, optimizer, pruner = trained_channels()
    pruner.step()
    twin, other, copied = pickle.loads(pickle.dumps((net, optimizer, pruner)))
    for model, steps, held in ((net, optimizer, pruner), (twin, other, copied)):
        for _ in range(5):
            steps.zero_grad()
            F.cross_entropy(model(IMAGES), LABELS).backward()
            steps.step()
            held.step()
    assert copied.iteration == pruner.iteration == 6
    assert all(map(torch.equal, net.state_dict().values(), twin.state_dict().values()))


def test_a_mask_put_on_later_is_noticed():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    schedule = DSDSchedule(0.5, pretrain=1, prune=1, retrain=1)
    channels = ChannelPruner(net, schedule, example_inputs=torch.zeros(1, 4))
    masks = Pruner(net, schedule)
    with pytest.raises(RuntimeError, match=r"^0 got a mask after the ChannelPruner was made"):
        channels.step()
    masks.finalize()
    channels.step()
    assert net[0].out_features == 4


def test_a_lazy_layer_is_named():
    net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"^0\.weight is not initialized yet"):
        ChannelPruner(net, SCHEDULE, example_inputs=torch.zeros(1, 4))


def three_layers():
    return nn.Sequential(*(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))


def test_a_frozen_layer_that_reads_what_is_cut_is_refused():
    """It would restart from zeros and stay there."""
    net, x = three_layers(), torch.zeros(2, 4)
    net[2].requires_grad_(False)
    before = net[2].weight.clone()
    words = r"^2\.weight is frozen .* channels of 0 .*skip=\['0'\]$"
    with pytest.raises(ValueError, match=words):
        ChannelPruner(net, SCHEDULE, example_inputs=x)
    keep_0 = Schedule((Segment(1), Segment(1, sparse=True, sparsity={"2": 0.5}), Segment(1)))
    for schedule, skip in ((SCHEDULE, "0"), (keep_0, None)):  # what 2 makes comes back as it was
        made = ChannelPruner(net, schedule, example_inputs=x, skip=skip)
        made.step()
        assert net[2].weight.shape == (4, 8)
        made.finalize()
        assert torch.equal(net[2].weight, before)
    tasks = Schedule((Segment(1, sparse=True, sparsity=0.5, masks="task"),))
    ChannelPruner(net, tasks, example_inputs=x, task_masks=TaskMasks(torch.Generator()))


def test_a_layer_that_is_frozen_later_is_noticed_at_the_change():
    net, x = three_layers(), torch.zeros(2, 4)
    made = ChannelPruner(net, DSDSchedule(0.5, pretrain=1, prune=2, retrain=1), example_inputs=x)
    made.step()
    net[2].weight.requires_grad_(False)
    made.step()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"^2\.weight is frozen"):
        made.step()
    assert (made.iteration, made.sparse) == (2, True)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net[2].weight.requires_grad_(True)
    made.step()
    assert not made.sparse


def test_channels_of_a_distributed_model_are_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        with pytest.raises(ValueError, match="would stop averaging gradients"):
            ChannelPruner(model, SCHEDULE, example_inputs=torch.zeros(1, 4))
    finally:
        dist.destroy_process_group()
