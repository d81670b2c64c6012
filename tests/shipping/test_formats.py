"""Files for other runtimes, read back by these runtimes; and 2:4 against counting."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from l2l_prune import DSDSchedule, PrunedReptile, Pruner
from l2l_prune.fewshot import Conv4
from l2l_prune.masking.patterns import NByM
from l2l_prune.metalearners.fields import Siren
from l2l_prune.shipping import (
    export_onnx,
    export_program,
    n_by_m_faults,
    semi_structured_copy,
)

SPARSE = DSDSchedule(0.5, pretrain=0, prune=9, retrain=0)


def write_onnx(learner, folder, x):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export_onnx(learner, folder / "net.onnx", x)
    session = runtime.InferenceSession(str(folder / "net.onnx"))
    (given,) = session.get_inputs()
    return lambda x: torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])


def write_program(learner, folder, x):
    export_program(learner, folder / "net.pt2", x)
    return torch.export.load(folder / "net.pt2").module()


@pytest.mark.parametrize("write", [write_onnx, write_program])
@pytest.mark.parametrize("training", [True, False])
def test_other_runtimes_compute_the_same(write, training, tmp_path):
    """In training mode batch normalisation takes the batch's statistics, there as here."""
    torch.manual_seed(0)
    reptile = PrunedReptile(Conv4(5, 8, 1, 28, "max", 0.3).train(training), SPARSE)
    for module in reptile.module.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    x = torch.rand(5, 1, 28, 28)
    other = write(reptile, tmp_path, x)
    for size in (2, 7):
        x = torch.rand(size, 1, 28, 28)
        expected = copy.deepcopy(reptile.module)(x).detach()
        torch.testing.assert_close(other(x).detach(), expected, atol=1e-5, rtol=1e-4)


def test_a_field_goes_to_onnx(tmp_path):
    field = Siren(width=8)
    other = write_onnx(field, tmp_path, torch.rand(4, 2))
    x = torch.rand(9, 2)
    torch.testing.assert_close(other(x), field(x).detach(), atol=1e-5, rtol=1e-4)


def test_what_computes_something_else_is_not_written(tmp_path):
    class Drawing(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    with pytest.raises(ValueError, match=r"differ from the network's by .*: nothing was written"):
        export_program(Drawing(), tmp_path / "net.pt2", torch.ones(2, 3))
    assert not any(tmp_path.iterdir())


def test_bad_examples(tmp_path):
    for example, words in ((torch.ones(1, 4), "batch of at least 2"), (torch.ones(4), "batch")):
        with pytest.raises(ValueError, match=words):
            export_program(nn.Linear(4, 2), tmp_path / "net.pt2", example)
    with pytest.raises(ValueError, match=r"torch\.export cannot trace Linear"):
        export_program(nn.Linear(4, 2), tmp_path / "net.pt2", torch.ones(2, 3))
    with pytest.raises(TypeError, match="example must be a tensor"):
        export_program(nn.Linear(4, 2), tmp_path / "net.pt2", [1.0])
    assert not any(tmp_path.iterdir())


def faults_by_counting(weight, transposed=False):
    weight = weight.transpose(0, 1) if transposed else weight
    found = 0
    for row in weight.flatten(2) if weight.dim() > 2 else weight[..., None]:
        for place in range(row.shape[-1]):
            values = row[:, place].tolist()
            found += sum(
                sum(v != 0 for v in values[i : i + 4]) > 2 for i in range(0, len(values), 4)
            )
    return found


def test_faults_of_two_by_four():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(8, 4, 3), nn.ConvTranspose2d(4, 6, 2), nn.Linear(8, 3), nn.Linear(6, 2)
    )
    with torch.no_grad():
        for module in net:
            module.weight[torch.rand_like(module.weight) < 0.5] = 0
    assert n_by_m_faults(net) == {
        "0.weight": faults_by_counting(net[0].weight),
        "1.weight": faults_by_counting(net[1].weight, transposed=True),
        "2.weight": faults_by_counting(net[2].weight),
        "3.weight": None,
    }
    assert n_by_m_faults(nn.Linear(4, 2)) == {"weight": 2}
    masked = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    Pruner(masked, SPARSE, pattern=NByM(2, 4))
    assert set(n_by_m_faults(masked).values()) == {0}
    assert set(n_by_m_faults(masked, NByM(1, 4)).values()) != {0}


def test_sparse_tensor_cores_are_asked_for_where_there_are_some():
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    Pruner(net, SPARSE, pattern=NByM(2, 4))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="the network is on cpu"):
            semi_structured_copy(net)
        return
    net = net.cuda()
    x = torch.rand(64, 64, device="cuda")
    torch.testing.assert_close(
        semi_structured_copy(net)(x.half()).float(), net(x), atol=1e-2, rtol=1e-2
    )
    with pytest.raises(ValueError, match="no linear layer is 2:4"):
        semi_structured_copy(nn.Linear(64, 32).cuda())


class Words(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 2))


class Two(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize("write", [write_onnx, write_program])
def test_whole_numbers_are_inputs_too(write, tmp_path):
    net, words = Words(), torch.randint(0, 7, (4, 3))
    other = torch.randint(0, 7, (9, 3))
    assert torch.allclose(write(net, tmp_path, words)(other), net(other), atol=1e-6)


@pytest.mark.parametrize("write", [write_onnx, write_program])
def test_several_outputs_are_refused(write, tmp_path):
    with pytest.raises(ValueError, match=r"Two returns .*tuple, not one tensor"):
        write(Two(4, 2), tmp_path, torch.rand(3, 4))
    assert not list(tmp_path.iterdir())


def test_a_type_that_onnx_runtime_lacks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ONNX Runtime cannot run Linear: "):
        write_onnx(nn.Linear(4, 2).bfloat16(), tmp_path, torch.rand(3, 4).bfloat16())
    assert not list(tmp_path.iterdir())
