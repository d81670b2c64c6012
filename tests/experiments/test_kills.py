"""Kill -9 at fifty moments: see kills.py. About two minutes of one core."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("learn2learn")
pytest.importorskip("torch_pruning")


@pytest.mark.process
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills are tried on forked processes")
@pytest.mark.slow
def test_killed_runs_end_bit_for_bit_as_if_they_never_were():
    """``L2L_PRUNE_KILLS=1000`` tries more, at other moments."""
    kills = os.environ.get("L2L_PRUNE_KILLS", "56")
    # A process of its own: a fork of one with threads may hang.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.experiments.kills", "--kills", kills],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    killed = json.loads(done.stdout.splitlines()[-1])
    assert sum(killed.values()) == int(kills)
    assert killed.keys() >= {
        *("training", "masks", "checkpoint", "evaluation", "results", "report"),
        "a later start",
    }
