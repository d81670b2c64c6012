"""The checks of ``make test-cuda`` on a second device in Python: devices are not mixed.

`test_second_device.py` runs this file in a process of its own, since torch must know the device
before its first backward pass.
"""

from __future__ import annotations

import pytest
import torch

from tests.cuda import second_device
from tests.cuda.faults import CHECKS
from tests.cuda.place import Place

LEFT_OUT = {
    "checkpoints_of_a_pruner": "torch loads no files to a device in Python",
    "checkpoints_of_reptile": "the same",
    "checkpoints_of_channels": "the same",
    "checkpoints_of_channels_in_reptile": "the same",
    "runs_resume": "the same",
    "under_autocast": "such a device has no autocast",
    "with_lightning": "Lightning does not know the device",
    "costs_of_adapting": "costs are measured on the CPU or on CUDA",
    "two_ranks": "other processes do not know the device",
    "steps_of_a_pruner": "nothing waits for this device",
    "steps_of_channels": "the same",
    "steps_of_reptile": "the same",
}
CHECKED = {check.__name__: check for check in CHECKS if check.__name__ not in LEFT_OUT}


@pytest.mark.parametrize("name", CHECKED)
def test_on_device(name, tmp_path):
    with second_device.devices():
        CHECKED[name](Place(second_device.DEVICE, tmp_path))


def test_what_is_left_out_exists():
    assert LEFT_OUT.keys() < {check.__name__ for check in CHECKS}


def test_devices_are_not_mixed():
    with second_device.devices():
        there = torch.ones(2, device=second_device.DEVICE)
        with pytest.raises(RuntimeError, match="second device and on"):
            there + torch.ones(2)
        assert (there + torch.ones(())).device == there.device
        assert there[torch.tensor([1])].device == there.device
        with pytest.raises(RuntimeError, match="second device and on"):
            torch.ones(2)[torch.ones(1, dtype=torch.long, device=second_device.DEVICE)]
        with pytest.raises(RuntimeError, match="second device and on"):
            there[torch.tensor([0, 1])] = torch.ones(2)
