"""Long runs hold no more than short ones: memory, objects, clones."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref

import pytest
import torch
from torch.nn import functional as F

from l2l_prune import IHTSchedule, PrunedReptile, Pruner

# A process of its own, so that its memory is that of the loop alone.
LONG_RUN = """
import collections, gc, json, os, sys, torch
from torch import nn
from l2l_prune import IHTSchedule, PrunedReptile

torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
schedule = IHTSchedule(0.5, pretrain=0, prune=5, retrain=5, rounds=1000)
reptile = PrunedReptile(net, schedule)
x, y = torch.randn(6, 4), torch.arange(6) % 3

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def counts():
    gc.collect()
    return collections.Counter(type(entry).__name__ for entry in gc.get_objects())

changes, before = 0, None
for iteration in range(schedule.iterations):
    learner = reptile.clone()
    learner.adapt(nn.functional.cross_entropy(learner(x), y))
    reptile.collect(learner)
    if iteration % 10 == 3:
        reptile.clone()(x)  # dropped, as in evaluation
    was = reptile.pruner.sparse
    reptile.step()
    changes += was != reptile.pruner.sparse
    if iteration == 2000:
        start, memory = counts(), resident()
del learner, iteration, was
more = {k: v for k, v in (counts() - start).items() if v > 20}
print(json.dumps({
    "iterations": reptile.iteration, "changes": changes, "more": more,
    "megabytes": (resident() - memory) / 2**20,
}))
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_ten_thousand_meta_iterations_and_two_thousand_mask_changes_hold_no_more():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LONG_RUN], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["iterations"] == 10_000
    assert found["changes"] >= 1999
    assert found["more"] == {}
    assert found["megabytes"] < 8  # of 8,000 iterations: a kilobyte each would be seen


def test_dropped_learners_are_freed_without_the_garbage_collector(net, batch):
    x, y = batch
    reptile = PrunedReptile(net, IHTSchedule(0.5, pretrain=0, prune=1, retrain=1, rounds=2))
    torch.optim.SGD([torch.zeros(1)], lr=0.1)  # torch holds the frames of a process's first one
    gc.collect()
    gc.disable()
    try:
        learner = reptile.clone()
        loss = F.cross_entropy(learner(x), y)
        learner.adapt(loss)
        weight = weakref.ref(learner.module.fc.weight)
        gone = weakref.ref(learner)
        del learner, loss
        assert gone() is None
        assert weight() is None
    finally:
        gc.enable()


def test_old_masks_are_freed_when_they_are_replaced(net):
    pruner = Pruner(net, IHTSchedule(0.5, pretrain=0, prune=1, retrain=1, rounds=2))
    old = weakref.ref(net.fc.weight_mask)
    pruner.step()
    with torch.no_grad():
        net.fc.weight_orig.add_(torch.randn_like(net.fc.weight_orig))
    pruner.step()
    assert net.fc.weight_mask is not None
    assert old() is None
