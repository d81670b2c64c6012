"""Channels of the networks that people have: small, they do what the full ones do without them."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from l2l_prune import DSDSchedule
from l2l_prune.channels.pruner import ChannelPruner

pytest.importorskip("torch_pruning")

SCHEDULE = DSDSchedule(0.5, pretrain=1, prune=2, retrain=1)
OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "adam": functools.partial(torch.optim.Adam, lr=1e-4),
}


def images(side, channels=3):
    given = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, side, side, dtype=torch.float64, generator=given)


class Concat(nn.Module):
    """``cat`` puts the channels of two layers side by side; one of them is read twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 6, 3)
        self.norm, self.c = nn.BatchNorm2d(10), nn.Conv2d(14, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        both = F.elu(self.norm(torch.cat([b, a], 1)))
        return self.head(self.c(torch.cat([both, a], 1)).mean((2, 3)))

    def read(self, gone):
        a, b = gone["a"], gone["b"]
        yield self.c, [*b, *(6 + i for i in a), *(10 + i for i in a)]
        yield self.head, gone["c"]


class Dense(nn.Module):
    """A dense block with a shortcut: each of its layers makes a part of the channels of a sum."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.short, self.head = nn.Conv2d(3, 10, 1), nn.Linear(10, 5)

    def forward(self, x):
        a = F.elu(self.a(x))
        return self.head((torch.cat([a, F.elu(self.b(a))], 1) + self.short(x)).mean((2, 3)))

    def read(self, gone):
        yield self.b, [i for i in gone["a"] if i < 6]
        yield self.head, gone["a"]


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.deep = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 3, groups=6)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = F.silu(self.deep(self.wide(x)))
        scale = self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        return self.head((x * scale).mean((2, 3)))

    def read(self, gone):
        both = [2 * i + k for i in gone["wide"] for k in range(2)]
        yield self.squeeze, both
        yield self.head, both
        yield self.excite, gone["squeeze"]


class Gated(nn.Module):
    """Activations with weights of their own, and one whose halves gate each other."""

    def __init__(self):
        super().__init__()
        self.first, self.each = nn.Conv2d(3, 6, 3), nn.PReLU(6)
        self.wide, self.all = nn.Conv2d(6, 8, 3), nn.PReLU()
        self.gain, self.head = nn.Parameter(torch.full((1,), 0.7)), nn.Linear(4, 5)
        nn.init.uniform_(self.each.weight)

    def forward(self, x):
        x = F.glu(self.wide(self.each(self.first(x))), 1)
        return self.head((self.gain * self.all(x)).mean((2, 3)))

    def read(self, gone):
        yield self.wide, gone["first"]
        yield self.head, gone["wide"]


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, groups=4)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(F.elu(self.grouped(self.first(x))).mean((2, 3)))

    def read(self, gone):
        yield self.head, [3 * i + k for i in gone["first"] for k in range(3)]


class GroupNormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(F.elu(self.up(F.elu(self.norm(self.first(x))))).mean((2, 3)))

    def read(self, gone):
        yield self.up, [2 * i + k for i in gone["first"] for k in range(2)]
        yield self.head, gone["up"]


class Heads(nn.Module):
    """Attention as timm and most others write it."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = 4, 2, 8
        self.patches, self.norm = nn.Conv2d(3, 6, 4, 4), nn.LayerNorm(6)
        self.qkv, self.proj, self.head = nn.Linear(6, 24), nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2)
        return self.head((x + self.proj(y.reshape(batch, tokens, self.attn_dim))).mean(1))

    def read(self, gone):
        yield self.proj, [2 * i + k for i in gone["qkv"] for k in range(2)]


class Shuffled(nn.Module):
    """ShuffleNet's block: a half goes through a layer, then the halves are interleaved."""

    def __init__(self):
        super().__init__()
        self.stem, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 1)
        self.last, self.head = nn.Conv2d(8, 6, 3), nn.Linear(6, 5)

    def forward(self, x):
        left, right = F.elu(self.stem(x)).chunk(2, 1)
        x = torch.cat([left, F.elu(self.right(right))], 1)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2)
        return self.head(self.last(x.reshape(batch, channels, height, width)).mean((2, 3)))

    def read(self, gone):
        """Channel i of the stem's left half goes with its twin, and with the layer's."""
        yield self.right, gone["stem"]
        yield self.last, [2 * i + k for i in gone["stem"] for k in range(2)]
        yield self.head, gone["last"]


def small(kind):
    torch.manual_seed(0)
    return kind().double()


def gone_of(pruner, full):
    return {name: sorted({*every} - {*pruner.channels[name]}) for name, every in full.items()}


KINDS = [Concat, Dense, Depthwise, Gated, Grouped, GroupNormed, Heads, Shuffled]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_small_network_is_the_full_one_in_which_nothing_reads_them(kind, optimizer):
    """Which weights read which channels is written down by hand, in ``read``."""
    net, x = small(kind), images(12)
    opt = OPTIMIZERS[optimizer](net.parameters())
    pruner = ChannelPruner(net, SCHEDULE, opt, example_inputs=x)
    everything = pruner.channels
    train(net, opt, x, 1)
    oracle, their_opt = copy.deepcopy((net, opt))
    shapes = [p.shape for p in net.parameters()]
    pruner.step()
    assert all(len(kept) == len(everything[n]) / 2 for n, kept in pruner.channels.items())

    @torch.no_grad()
    def hold():
        for layer, columns in oracle.read(gone):
            layer.weight.index_fill_(reads(layer), torch.tensor(columns), 0)

    gone = gone_of(pruner, everything)
    hold()
    assert close(net(x), oracle(x))
    train(oracle, their_opt, x, 2, hold)
    train(net, opt, x, 2, pruner.step)
    assert [p.shape for p in net.parameters()] == shapes
    assert close(net(x), oracle(x))
    for layer, columns in net.read(gone):
        assert not layer.weight.index_select(reads(layer), torch.tensor(columns)).any()


def reads(layer):
    return 0 if isinstance(layer, nn.ConvTranspose2d) else 1


def close(one, other):
    return torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def train(net, opt, x, steps, after=lambda: None):
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(first(net(x)), torch.arange(len(x)) % 5).backward()
        opt.step()
        after()


def first(out):
    return out if isinstance(out, torch.Tensor) else out[0]


# ---- whole networks ---------------------------------------------------------------------------


def torchvision(name, **options):
    models = pytest.importorskip("torchvision.models")
    return getattr(models, name)(num_classes=5, **options)


def narrow(name, **options):
    """Its millions of weights in the classifier would only cost memory here."""
    net = torchvision(name)
    wide = net.classifier[0 if "vgg" in name else 1].in_features
    net.classifier = nn.Sequential(nn.Linear(wide, 64), nn.ReLU(), nn.Linear(64, 5))
    return net


def shallow(name, **options):
    resnet = pytest.importorskip("torchvision.models.resnet")
    return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=5, **options)


def little_vit(name, **options):
    models = pytest.importorskip("torchvision.models")
    return models.VisionTransformer(64, 32, 3, 4, 192, 768, num_classes=5)


def timm(name, **options):
    return pytest.importorskip("timm").create_model(name, num_classes=5, **options)


NETWORKS = {
    "resnet18": (torchvision, {}, 64),
    "wide_resnet50_2": (shallow, {"width_per_group": 128}, 64),
    "vgg11_bn": (narrow, {}, 64),
    "alexnet": (narrow, {}, 64),
    "densenet121": (torchvision, {}, 64),
    "squeezenet1_1": (torchvision, {}, 64),
    "googlenet": (torchvision, {"init_weights": False}, 64),
    "inception_v3": (torchvision, {"init_weights": False, "aux_logits": False}, 80),
    "shufflenet_v2_x0_5": (torchvision, {}, 64),
    "mobilenet_v2": (torchvision, {}, 64),
    "mobilenet_v3_small": (torchvision, {}, 64),
    "mnasnet0_5": (torchvision, {}, 64),
    "efficientnet_b0": (torchvision, {}, 64),
    "regnet_y_400mf": (torchvision, {}, 64),
    "resnext50_32x4d": (torchvision, {}, 64),
    "convnext_tiny": (torchvision, {}, 64),
    "swin_t": (torchvision, {}, 64),
    "vit_b_32": (little_vit, {}, 64),
    "vit_tiny_patch16_224": (timm, {"img_size": 64}, 64),
    "convnext_atto": (timm, {}, 64),
    "mobilenetv3_small_050": (timm, {}, 64),
}
QUICK = {("squeezenet1_1", "adam"), ("shufflenet_v2_x0_5", "sgd")}


def network(name):
    """With random weights everywhere: behind a layer that starts at 0 nothing would show."""
    make, options, side = NETWORKS[name]
    torch.manual_seed(0)
    net = make(name, **options).double().eval()
    with torch.no_grad():
        for tensor_name, tensor in (*net.named_parameters(), *net.named_buffers()):
            if tensor.dim() > 1 and isinstance(tensor, nn.Parameter):
                tensor.normal_().mul_((tensor.shape[0] / tensor.numel()) ** 0.5)
            elif tensor_name.endswith(("weight", "bias", "running_mean", "running_var")):
                tensor.uniform_(0.5, 1.5)
    return net, images(side)


def shrink_and_release(name, optimizer):
    """Train small and release, against the full network whose readers are held at 0."""
    net, x = network(name)
    opt = OPTIMIZERS[optimizer](net.parameters())
    pruner = ChannelPruner(net, SCHEDULE, opt, example_inputs=x)
    found = {"before": sum(p.numel() for p in net.parameters())}
    train(net, opt, x, 1)
    oracle, their_opt = copy.deepcopy((net, opt))
    pruner.step()
    found["after"] = sum(p.numel() for p in net.parameters())
    saved = copy.deepcopy((pruner.state_dict(), net.state_dict(), opt.state_dict()))
    with torch.no_grad():
        cut = first(net(x))
    train(net, opt, x, 1, pruner.step)
    with torch.no_grad():
        small = first(net(x))
    assert not torch.allclose(cut, small, rtol=1e-6)  # else equality would say nothing
    train(net, opt, x, 1)
    with torch.no_grad():
        trained = first(net(x))
    pruner.step()
    with torch.no_grad():
        released = first(net(x))
    found["release"] = float((trained - released).abs().max() / released.abs().max())
    # The oracle: every weight that is 0 now, and was not, reads a channel that is gone.
    holes = [(p, (q == 0) & (p != 0)) for p, q in zip(*map(params, (oracle, net)), strict=True)]

    @torch.no_grad()
    def hold():
        for parameter, hole in holes:
            parameter[hole] = 0

    hold()
    train(oracle, their_opt, x, 2, hold)
    with torch.no_grad():
        found["training"] = float((first(oracle(x)) - released).abs().max() / released.abs().max())
    # Resumed from the cut on, the same happens bit by bit.
    again, x = network(name)
    opt = OPTIMIZERS[optimizer](again.parameters())
    twin = ChannelPruner(again, SCHEDULE, opt, example_inputs=x)
    for thing, state in zip((twin, again, opt), saved, strict=True):
        thing.load_state_dict(state)
    train(again, opt, x, 1, twin.step)
    with torch.no_grad():
        assert torch.equal(first(again(x)), small)
    train(again, opt, x, 1, twin.step)
    found["resumed"] = all(map(torch.equal, params(net), params(again)))
    return found


def params(net):
    return list(net.parameters())


CASES = [(name, optimizer) for name in NETWORKS for optimizer in OPTIMIZERS]


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_networks_that_people_have(name, optimizer):
    found = shrink_and_release(name, optimizer)
    # A little ViT is mostly patch embedding and class token, whose width the residual stream keeps.
    assert found["after"] < (0.8 if name == "vit_b_32" else 0.75) * found["before"]
    assert found["release"] < 1e-9
    assert found["training"] < 1e-6
    assert found["resumed"]
