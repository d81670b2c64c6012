"""Exports against safetensors' own reader, the networks' outputs, and damage of every kind."""

from __future__ import annotations

import copy
import errno
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from l2l_prune import ChannelPruner, DSDSchedule, PrunedReptile, Pruner, TaskMasks
from l2l_prune.channels import Structured
from l2l_prune.fewshot import Conv4, Mean
from l2l_prune.fewshot.models import CaviaConv4, CaviaMLP
from l2l_prune.masking.masked_layer import plain_copy
from l2l_prune.metalearners import CAVIA, SparseMAML
from l2l_prune.metalearners.fields import FourierFeatureMLP, Siren
from l2l_prune.shipping import export, load, read_manifest
from l2l_prune.shipping.folder import TENSORS
from l2l_prune.shipping.manifest import NAME
from tests.conftest import SmallNet

safetensors = pytest.importorskip("safetensors.torch")

NETWORKS = {
    "Conv4": lambda: Conv4(5, 8, 3, 32, "max", 0.1),
    "CaviaConv4": lambda: CaviaConv4(5, 8, image_size=32, film_at=(2, 3), film_hidden=1),
    "CaviaMLP": lambda: CaviaMLP(hidden=(8, 6)),
    "Siren": lambda: Siren(width=8, omega_0=12.0),
    "FourierFeatureMLP": lambda: FourierFeatureMLP(width=8, features=4),
}


def sparse(rate):
    return DSDSchedule(rate, pretrain=0, prune=9, retrain=0)


def equal_states(one, other):
    one, other = one.state_dict(), other.state_dict()
    return list(one) == list(other) and all(map(torch.equal, one.values(), other.values()))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rate", [0.0, 0.5, 0.97])
def test_networks_of_this_library_are_made_anew(name, rate, tmp_path):
    net = NETWORKS[name]()
    with torch.no_grad():
        for p in net.parameters():
            p[torch.rand_like(p) < rate] = 0
    before = torch.get_rng_state()
    export(net, tmp_path)
    again = load(tmp_path)
    assert type(again) is type(net)
    assert again.made_with == net.made_with
    assert equal_states(again, net)
    assert torch.equal(torch.get_rng_state(), before)
    assert export(again, tmp_path / "again")["files"] == read_manifest(tmp_path)["files"]


def test_the_file_is_as_safetensors_reads_it(tmp_path):
    net = SmallNet()
    Pruner(net, sparse(0.8))
    told = export(net, tmp_path)
    stored = safetensors.load_file(tmp_path / TENSORS)
    weight = net.conv2.weight.detach().flatten()
    assert torch.equal(stored["conv2.weight"], weight[weight != 0])
    bits = stored["conv2.weight#bitmask"].tolist()
    assert [bool(bits[i // 8] >> i % 8 & 1) for i in range(144)] == (weight != 0).tolist()
    assert stored["norm.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(stored["norm.weight"], net.norm.weight)
    assert told["tensors"]["conv2.weight"] == {
        "shape": [4, 4, 3, 3],
        "dtype": "float32",
        "stored": "bitmask",
        "nonzero": 29,
    }
    assert told["rates"]["by_tensor"]["conv2.weight"] == pytest.approx(1 - 29 / 144)
    zeros = sum(int((p == 0).sum()) for p in load(tmp_path, SmallNet()).parameters())
    whole = sum(p.numel() for p in net.parameters())
    assert told["rates"]["zero"] == pytest.approx(zeros / whole)
    assert told["rates"]["parameters"] == whole


@pytest.mark.parametrize("half", [False, True])
def test_a_masked_learner_comes_back_without_masks(batch, half, tmp_path):
    reptile = PrunedReptile(SmallNet(), sparse(0.8))
    learner = reptile.clone()
    learner.adapt(learner(batch[0]).square().mean())
    for given in (reptile, reptile.module, learner):
        export(given, tmp_path, half=half)
        net = load(tmp_path, SmallNet())
        assert type(net.conv1) is nn.Conv2d
        plain = learner.module if given is learner else plain_copy(reptile.module)
        for name, tensor in plain.state_dict().items():
            expected = tensor.half().float() if half and tensor.is_floating_point() else tensor
            assert torch.equal(net.state_dict()[name], expected), name


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9, 0.99])
def test_each_tensor_takes_the_fewest_bytes(rate, half, tmp_path):
    net = nn.Sequential(nn.Linear(300, 40), nn.Linear(40, 5))
    if rate:
        Pruner(net, sparse(rate))
    export(net, tmp_path, half=half)
    stored = safetensors.load_file(tmp_path / TENSORS)
    each = 2 if half else 4
    for name, width in (("0.weight", 2), ("1.weight", 1), ("0.bias", 1), ("1.bias", 1)):
        weight = load(tmp_path, nn.Sequential(nn.Linear(300, 40), nn.Linear(40, 5))).state_dict()
        numel, left = weight[name].numel(), int(weight[name].count_nonzero())
        ways = (each * numel, -(-numel // 8) + each * left, (width + each) * left)
        found = [t for key, t in stored.items() if key.partition("#")[0] == name]
        assert sum(t.numel() * t.element_size() for t in found) == min(ways), name


def test_networks_with_channels_cut_are_restored_small(tmp_path):
    pytest.importorskip("torch_pruning")
    x = torch.rand(4, 3, 32, 32)
    net = Conv4(5, 8, 3, 32, "max")
    pruner = ChannelPruner(net, sparse(0.5), example_inputs=x)
    for given in (net, pruner.export()):
        told = export(given, tmp_path)
        for model in (None, Conv4(5, 8, 3, 32, "max")):
            small = load(tmp_path, model)
            assert small.features.conv2.weight.shape == (4, 4, 3, 3)
            assert small.features.conv2.out_channels == 4
            assert small.features.norm2.num_features == 4
            assert all(p.requires_grad for p in small.parameters())
            assert torch.equal(small(x), copy.deepcopy(net)(x))
            small(x).sum().backward()
    assert told["rates"]["parameters"] == sum(p.numel() for p in net.parameters())


def test_channels_cut_and_masked_and_grouped(tmp_path):
    pytest.importorskip("torch_pruning")

    def make():
        return nn.Sequential(
            nn.Conv2d(2, 8, 3),
            nn.GroupNorm(4, 8),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.Flatten(),
            nn.Linear(32, 3),
        )

    x = torch.rand(2, 2, 6, 6)
    net = make()
    small = ChannelPruner(net, sparse(0.5), example_inputs=x).export().module
    Pruner(small, sparse(0.5))
    export(small, tmp_path)
    again = load(tmp_path, make())
    assert (again[2].groups, again[1].num_groups, again[4].in_features) == (4, 2, 16)
    assert torch.equal(again(x), small(x))


def test_learners_of_reptile_whose_channels_are_cut(batch, tmp_path):
    pytest.importorskip("torch_pruning")
    reptile = PrunedReptile(SmallNet(), sparse(0.5), structured=Structured(batch[0]))
    learner = reptile.clone()
    learner.adapt(learner(batch[0]).square().mean())
    export(learner, tmp_path)
    assert torch.equal(load(tmp_path, SmallNet())(batch[0]), learner(batch[0]))


def test_masks_of_a_task_and_what_adapts_are_not_the_models(tmp_path):
    masks = TaskMasks(torch.Generator().manual_seed(0))
    reptile = PrunedReptile(Conv4(5, 8), sparse(0.5).per_task(), task_masks=masks)
    export(reptile, tmp_path / "model")
    assert equal_states(load(tmp_path / "model"), plain_copy(reptile.module))
    assert bool(load(tmp_path / "model").features.conv4.weight.all())
    with reptile.task_masks():
        learner = reptile.clone("classifier")
    export(learner, tmp_path / "learner")
    assert equal_states(load(tmp_path / "learner"), learner.module)
    assert int(learner.module.features.conv4.weight.count_nonzero()) == 9 * 8 * 8 // 2
    assert all(p.requires_grad for p in load(tmp_path / "learner").parameters())


def test_what_is_said_about_it(tmp_path):
    told = export(
        Conv4(5, 4),
        tmp_path,
        data="glyphs",
        accuracy=Mean((0.25, 0.75)),
        about={"inner_lr": 1e-3, "steps": 50},
    )
    assert told == read_manifest(str(tmp_path))
    assert told["accuracy"]["mean"] == 0.5
    assert told["accuracy"]["tasks"] == 2
    assert told["about"] == {"inner_lr": 1e-3, "steps": 50}
    assert told["data"] == "glyphs"
    assert told["network"]["class"] == "l2l_prune.fewshot.models.Conv4"
    assert told["network"]["arguments"]["pooling"] == "stride"
    assert told["versions"]["torch"] == torch.__version__


def test_the_mode_comes_back(tmp_path):
    for net in (Conv4(5, 4).eval(), Conv4(5, 4)):
        export(net, tmp_path)
        assert load(tmp_path).training == net.training


def test_types_and_odd_tensors(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 5, dtype=torch.float64).mT)
            self.brain = nn.Parameter(torch.randn(300).bfloat16())
            self.tied = self.brain
            self.register_buffer("count", torch.tensor(7, dtype=torch.int32))
            self.register_buffer("flags", torch.arange(40) % 9 == 0)
            self.register_buffer("empty", torch.empty(0, 3))
            self.register_buffer("numbers", torch.tensor([0.0, -0.0, torch.inf, torch.nan]))

    odd = Odd()
    with torch.no_grad():
        odd.brain[5:] = 0
    for half in (False, True):
        export(odd, tmp_path / str(half), half=half)
        again = load(tmp_path / str(half), Odd())
        assert again.tied is again.brain
        for name, tensor in odd.state_dict().items():
            other = again.state_dict()[name]
            assert other.dtype == tensor.dtype
            exact = 2e-3 if half else 0
            torch.testing.assert_close(other, tensor, rtol=exact, atol=exact, equal_nan=True)


@pytest.mark.process
def test_loading_needs_neither_safetensors_nor_pickle(tmp_path):
    export(Conv4(5, 4), tmp_path)
    code = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("safetensors", "torch_pruning", "matplotlib", "onnx"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
import pickle
from l2l_prune.shipping import export, load
def refuse(*args, **kwargs): raise AssertionError
pickle.load = pickle.loads = pickle.Unpickler = refuse
net = load({str(tmp_path)!r})
print(type(net).__name__, sum(p.numel() for p in net.parameters()))
try:
    export(net, {str(tmp_path)!r})
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == f"Conv4 {sum(p.numel() for p in Conv4(5, 4).parameters())}"
    assert 'pip install "l2l-prune[ship]"' in second


# ---- what must be refused -------------------------------------------------------------------


def test_every_damaged_byte_is_found(tmp_path):
    net = nn.Linear(3, 2)
    export(net, tmp_path)
    target = nn.Linear(3, 2)
    before = copy.deepcopy(target.state_dict())
    for name in (TENSORS, NAME):
        data = (tmp_path / name).read_bytes()
        for place in range(len(data)):
            (tmp_path / name).write_bytes(
                data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
            )
            with pytest.raises(ValueError, match=r"is damaged|is an export of"):
                load(tmp_path, target)
        for length in range(0, len(data) - 1, 3):
            (tmp_path / name).write_bytes(data[:length])
            with pytest.raises(ValueError, match="is damaged"):
                load(tmp_path, target)
        (tmp_path / name).write_bytes(data)
    load(tmp_path, nn.Linear(3, 2))
    assert all(map(torch.equal, target.state_dict().values(), before.values()))


def rewrite(folder, change):
    """The manifest changed, with a checksum that fits."""
    from l2l_prune.shipping import manifest

    told = json.loads((folder / NAME).read_text())
    told.pop("sha256")
    change(told)
    told["sha256"] = manifest._checksum(told)
    (folder / NAME).write_text(json.dumps(told))


def test_another_version(tmp_path):
    export(Conv4(5, 4), tmp_path)
    rewrite(tmp_path, lambda told: told.update(format_version=2))
    with pytest.raises(ValueError, match="is an export of format 2, but this l2l_prune reads 1"):
        load(tmp_path)


def test_a_strange_class_is_never_imported(tmp_path):
    export(Conv4(5, 4), tmp_path)
    rewrite(tmp_path, lambda told: told["network"].update({"class": "os.system"}))
    with pytest.raises(
        ValueError, match=r"export of os\.system, which cannot be made from its export"
    ):
        load(tmp_path)


def test_wrong_networks(tmp_path):
    export(SmallNet(), tmp_path)
    with pytest.raises(ValueError, match=r"SmallNet, but model is a .*models\.Conv4"):
        load(tmp_path, Conv4(5, 4))
    more = SmallNet()
    more.register_buffer("extra", torch.zeros(1))
    before = copy.deepcopy(more.state_dict())
    with pytest.raises(ValueError, match="only one of the export and model has the tensors extra"):
        load(tmp_path, more)
    strided = SmallNet()
    strided.conv1.stride = (2, 2)
    with pytest.raises(ValueError, match=r"conv1\.stride is \[1, 1\] in the export and \[2, 2\]"):
        load(tmp_path, strided)
    narrow = SmallNet()
    narrow.conv2 = nn.Conv2d(4, 3, 3, bias=False)
    with pytest.raises(ValueError, match=r"conv2\.weight has the shape \(4, 4, 3, 3\)"):
        load(tmp_path, narrow)
    assert all(map(torch.equal, more.state_dict().values(), before.values()))


def test_a_network_with_another_layer_is_refused(tmp_path):
    """ReLU and Tanh hold no tensors and no settings that differ."""
    net = Conv4(5, 4)
    net.features.relu2 = nn.Tanh()
    export(net, tmp_path)
    with pytest.raises(ValueError, match=r"relu2 is .*Tanh in the export and .*ReLU in model"):
        load(tmp_path)
    own = Conv4(5, 4)
    own.features.relu2 = nn.Tanh()
    x = torch.rand(3, 1, 28, 28)
    assert torch.equal(load(tmp_path, own)(x), net(x))
    rewrite(tmp_path, lambda told: told["network"].pop("layers"))  # as older versions wrote
    load(tmp_path)


def test_arguments_may_be_numpys(tmp_path):
    export(Conv4(ways=np.int64(3), channels=np.int32(4), dropout=np.float32(0.5)), tmp_path)
    again = load(tmp_path)
    assert again.made_with["ways"] == 3
    assert type(again.made_with["dropout"]) is float


@pytest.mark.parametrize("failure", ["accuracy", "disk"])
def test_an_earlier_export_outlives_one_that_fails(failure, tmp_path, monkeypatch):
    first = Conv4(5, 4)
    export(first, tmp_path)
    accuracy = 0.5
    if failure == "accuracy":
        accuracy = Mean((math.nan, 0.5))
    else:

        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises((ValueError, OSError), match=r"accuracy must be|No space left"):
        export(Conv4(5, 4), tmp_path, accuracy=accuracy)
    monkeypatch.undo()
    assert equal_states(load(tmp_path), first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export.json", "model.safetensors"]


def test_what_cannot_be_exported(tmp_path):
    net = SmallNet()
    out = tmp_path / "out"
    with torch.no_grad():
        net.fc.bias[0] = 1e6
    with pytest.raises(ValueError, match=r"fc\.bias holds numbers .* half precision"):
        export(net, out, half=True)
    net.register_buffer("wave", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"wave has the type torch\.complex64"):
        export(net, out)
    assert not out.exists()


def test_each_layer_comes_back_in_its_mode(tmp_path):
    net = Conv4(5, 8).train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    export(net, tmp_path)
    for found in (load(tmp_path), load(tmp_path, Conv4(5, 8).eval())):
        modes = {name: module.training for name, module in found.named_modules()}
        assert modes == {name: module.training for name, module in net.named_modules()}


def test_a_learner_that_was_collected_is_not_exported(tmp_path):
    reptile = PrunedReptile(SmallNet(), sparse(0.5))
    learner = reptile.clone()
    export(learner, tmp_path / "one")
    reptile.collect(learner)
    with pytest.raises(RuntimeError, match="was collected"):
        export(learner, tmp_path / "two")


def cavia():
    return CAVIA(CaviaMLP(hidden=(8, 6)), lr=1.0), torch.rand(10, 1)


def sparse_maml():
    return SparseMAML(nn.Linear(4, 2), lr=0.1), torch.rand(10, 4)


@pytest.mark.parametrize("make", [cavia, sparse_maml])
def test_a_learner_whose_task_no_file_would_hold_is_refused(make, tmp_path):
    meta, x = make()
    learner = meta.clone()
    learner.adapt(learner(x).square().mean())
    with pytest.raises(ValueError, match="learner that has adapted to a task"):
        export(learner, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(meta, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out", make()[0])(x), meta(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half", [True, False])
def test_networks_that_are_made_anew_have_the_type_of_the_exported_one(dtype, half, tmp_path):
    net = Conv4(5, 8).to(dtype)
    export(net, tmp_path, half=half)
    again = load(tmp_path)
    for (name, a), b in zip(again.named_parameters(), net.parameters(), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b.half().to(dtype) if half else b)
