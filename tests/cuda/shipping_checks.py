"""Exports of what is on a device, their reading, and what adapting there costs."""

from __future__ import annotations

import pytest
import torch

from l2l_prune import DSDSchedule, PrunedReptile
from l2l_prune.fewshot import Conv4, Episode
from l2l_prune.shipping import (
    Adapting,
    adaptation_costs,
    export,
    export_onnx,
    export_program,
    load,
)
from tests.cuda.place import Place

SPARSE = DSDSchedule(0.9, pretrain=0, prune=9, retrain=0)


def reptile_on(device):
    torch.manual_seed(0)
    return PrunedReptile(Conv4(5, 8).to(device), SPARSE)


def exports(place: Place) -> None:
    """A folder is read back bit for bit; other runtimes agree although a GPU rounds to TF32."""
    pytest.importorskip("safetensors")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    reptile = reptile_on(place.device)
    x = torch.rand(4, 1, 28, 28, device=place.device)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        with place.fault():
            export(reptile, place.folder)
            for model in (None, Conv4(5, 8).to(place.device)):
                again = load(place.folder, model)
                for name, weight in reptile.clone().module.named_parameters():
                    assert torch.equal(again.get_parameter(name).cpu(), weight.cpu()), name
            export_onnx(reptile, place.folder / "net.onnx", x)
            export_program(reptile, place.folder / "net.pt2", x)
    finally:
        torch.backends.cudnn.allow_tf32 = before


def costs_of_adapting(place: Place) -> None:
    """Operations and bytes on disk are the same everywhere; memory and time only exist."""
    pytest.importorskip("safetensors")

    def costs(device):
        x, y = torch.rand(5, 1, 28, 28, device=device), torch.arange(5, device=device)
        ways = {
            "all": Adapting(reptile_on(device)),
            "head": Adapting(reptile_on(device), "classifier"),
        }
        return adaptation_costs(ways, Episode(x, y, x, y), steps=2, batch_size=5, rounds=1)

    expected = costs("cpu")
    with place.fault():
        found = costs(place.device)
    for name, cost in found.items():
        assert (cost.macs, cost.stored) == (expected[name].macs, expected[name].stored)
        assert cost.memory > 0
        assert min(cost.milliseconds.values()) > 0
