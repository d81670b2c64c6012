from __future__ import annotations

import contextlib
import os

import pytest
import torch

from tests.cuda.place import Place

DEVICE = os.environ.get("L2L_PRUNE_TEST_DEVICE", "cuda")


@pytest.fixture
def place(tmp_path):
    """Where the checks run: on ``L2L_PRUNE_TEST_DEVICE``, by default a GPU, without a fault."""
    if torch.device(DEVICE).type == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU here (L2L_PRUNE_TEST_DEVICE=cpu runs the same code without)")
    with full_precision():
        yield Place(DEVICE, tmp_path)


@contextlib.contextmanager
def full_precision():
    """float32 is float32: without TensorFloat32, which has 10 bits of 23."""
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = allowed
