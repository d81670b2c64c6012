"""Exported fields against counts of their bytes and the rounding to half precision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from l2l_prune import DSDSchedule, Pruner
from l2l_prune.metalearners.field_files import export_field, read_field
from l2l_prune.metalearners.fields import FieldMAML, FourierFeatureMLP, Siren, coordinates

HEAD, EACH = 12, 5


def rounded(net):
    """The same network with all numbers rounded to half precision."""
    return copy.deepcopy(net).half().float()


@pytest.mark.parametrize("kind", [Siren, FourierFeatureMLP])
def test_a_dense_field_comes_back_rounded(kind):
    net, other = kind(width=9), kind(width=9)
    read_field(export_field(net), other)
    for name, value in rounded(net).state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 255, 256, 257, 300, 65_536, 65_537, 70_000])
@pytest.mark.parametrize("kept", [0, 1, 3, 40, 250])
def test_any_positions_come_back_in_the_fewest_bytes(numel, kept):
    net = nn.Linear(numel, 1, bias=False)
    where = torch.randperm(numel)[:kept]
    with torch.no_grad():
        values = torch.zeros(numel)
        values[where] = torch.randn(len(where)).half().float() + 10
        net.weight.copy_(values.half().float()[None])
    data = export_field(net)
    count = min(kept, numel)
    index = 1 if numel <= 256 else 2 if numel <= 65_536 else 3
    sizes = (2 * numel, (numel + 7) // 8 + 2 * count, (index + 2) * count)
    assert len(data) == HEAD + EACH + min(sizes)
    other = read_field(data, nn.Linear(numel, 1, bias=False))
    assert torch.equal(other.weight, net.weight)


def test_an_adapted_sparse_field_is_small_and_read_back_without_masks():
    x, y = coordinates(8, 8), torch.rand(2, 64, 1)
    maml = FieldMAML(Siren(width=32))
    dense = len(export_field(maml.module))
    Pruner(maml, DSDSchedule(0.95, pretrain=0, prune=9, retrain=0), allocation="global")
    field = maml.field(maml.fit(x, y, steps=3), 1)
    data = export_field(field)
    assert len(data) < 0.25 * dense
    plain = read_field(data, Siren(width=32))
    assert type(plain.layers[0]) is nn.Linear
    torch.testing.assert_close(plain(x), field(x), atol=0.02, rtol=0)


def test_every_damaged_byte_is_found():
    net = Siren(width=3, depth=1)
    data = export_field(net)
    before = copy.deepcopy(net.state_dict())
    for place in range(len(data)):
        broken = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with pytest.raises(ValueError, match="the bytes"):
            read_field(broken, net)
    for length in range(len(data)):
        with pytest.raises(ValueError, match="the bytes"):
            read_field(data[:length], net)
    assert all(map(torch.equal, net.state_dict().values(), before.values()))


def test_what_cannot_be_exported_or_read():
    with pytest.raises(ValueError, match="another network"):
        read_field(export_field(Siren(width=4)), Siren(width=5))
    with pytest.raises(TypeError, match="data must be bytes"):
        read_field("text", Siren())
    net = Siren(width=4)
    masked = Siren(width=4)
    Pruner(masked, DSDSchedule(0.5, pretrain=0, prune=1, retrain=0))
    before = copy.deepcopy(masked.state_dict())
    with pytest.raises(ValueError, match="field has masks"):
        read_field(export_field(net), masked)
    assert all(map(torch.equal, masked.state_dict().values(), before.values()))
    with torch.no_grad():
        net.layers[1].bias[0] = 1e6
    with pytest.raises(ValueError, match=r"layers\.1\.bias .* half precision"):
        export_field(net)
    with pytest.raises(ValueError, match=r"num_batches_tracked has the type torch\.int64"):
        export_field(nn.BatchNorm1d(3))
