"""PrunedReptile against the recorded runs of the authors' TensorFlow program."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from l2l_prune.reptile.learner import adam

from .authors_program import write_iht_trace
from .replay import TFAdam, replay

DATA = Path(__file__).parent / "data"
TORCH_ADAM = functools.partial(torch.optim.Adam, betas=(0.0, 0.999))


@pytest.mark.parametrize(
    "optimizer", [TFAdam, TORCH_ADAM, adam], ids=["tf-adam", "torch-adam", "default"]
)
@pytest.mark.parametrize("trace", ["reptile", "dsd"])
def test_replays_the_authors_program(trace, optimizer):
    result = replay(DATA / f"authors_trace_{trace}.npz", optimizer)
    print(
        f"\n{trace}: weights {max(result.weights):.1e}, logits {result.logits:.1e}, "
        f"second moments {result.second_moments:.1e}"
    )
    assert len(result.weights) == 10
    assert max(result.weights) < 2e-4
    assert result.logits < 2e-4
    assert result.second_moments < 2e-4
    assert result.masks_equal == ([True] * 4 if trace == "dsd" else [])


@pytest.mark.parametrize("always_sparse", [False, True], ids=["ratio-0.6", "ratio-1"])
def test_replays_an_iht_trace(tmp_path, always_sparse):
    """IHT from a plain re-reading of the authors' loop, itself checked against their DSD trace."""
    path = tmp_path / "iht.npz"
    write_iht_trace(DATA / "authors_trace_dsd.npz", path, always_sparse=always_sparse)
    result = replay(path)
    assert len(result.masks_equal) == 12
    assert all(result.masks_equal)
    assert max(result.weights) < 2e-4


def test_the_replay_can_fail(tmp_path):
    """A wrong start, rate or order must show: the tolerance is not so wide that all passes."""
    with np.load(DATA / "authors_trace_dsd.npz") as archive:
        trace = dict(archive)
    trace["mask_rate"] = np.array([0.4])
    np.savez(tmp_path / "wrong.npz", **trace)
    result = replay(tmp_path / "wrong.npz")
    assert max(result.weights) > 1e-3
    assert not any(result.masks_equal)
