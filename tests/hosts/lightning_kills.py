"""Lightning fits that are killed with SIGKILL and fitted again with ``ckpt_path="last"``.

A process of its own, ``python -m tests.hosts.lightning_kills NAME KILLS``, from which the fits are
forked; see tests/forks.py. Epochs of one task each, since Lightning itself does not
rewind a loader within an epoch.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch

from l2l_prune.integrations.lightning import PruningCallback
from tests.forks import Calls, ended

from .test_lightning import MODULES, SCHEDULE, loader, trainer


def fit(name, folder, kill_at=None):
    """Fit in a forked process; the calls that it took, or None if it was killed."""
    calls = Calls(kill_at)

    def work():
        _fit(name, folder)
        sys.setprofile(None)
        (folder / "calls").write_text(str(calls.count))

    return int((folder / "calls").read_text()) if ended(work, calls) else None


def _fit(name, folder):
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    module, pruning = MODULES[name](), PruningCallback(SCHEDULE, dense_weights=folder / "dense.pt")
    saving = pl.callbacks.ModelCheckpoint(dirpath=folder / "saved", save_last=True)
    last = folder / "saved" / "last.ckpt"
    fitting = trainer(folder, [pruning, saving], epochs=12, enable_checkpointing=True)
    fitting.fit(module, loader(1), ckpt_path=last if last.exists() else None)
    state = {
        "module": module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in fitting.optimizers],
        "schedulers": [entry.scheduler.state_dict() for entry in fitting.lr_scheduler_configs],
        "pruner": pruning.pruner.state_dict(),
    }
    torch.save(state, folder / "end.pt")


def ends(folder):
    return [torch.load(folder / name, weights_only=False) for name in ("end.pt", "dense.pt")]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main(name, kills):
    torch.set_num_threads(1)
    draw, again = random.Random(name), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for part in ("imports", "whole"):
            (folder / part).mkdir()
        _fit(name, folder / "imports")
        total = fit(name, folder / "whole")
        expected = ends(folder / "whole")
        for _ in range(kills):
            victim = folder / "victim"
            victim.mkdir()
            moment = draw.randint(1, total)
            assert fit(name, victim, moment) is None
            again += (victim / "saved" / "last.ckpt").exists()
            assert fit(name, victim) is not None
            assert same(ends(victim), expected), f"{name}, killed at call {moment} of {total}"
            shutil.rmtree(victim)
    print(f"{kills} kills, {again} fits went on")
    assert 0 < again <= kills


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
