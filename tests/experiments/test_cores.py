"""How many runs at once are chosen, on pretended machines."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest
import torch

from l2l_prune._basics import cores as usable
from l2l_prune.experiments import cli
from l2l_prune.experiments.running import cores


def machine(monkeypatch, tmp_path, *, total, allowed, busy, quota="max 100000"):
    monkeypatch.setattr(os, "cpu_count", lambda: total)
    monkeypatch.setattr(os, "sched_getaffinity", lambda who: set(range(allowed)), raising=False)
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 100 * busy / total)
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(usable, "_QUOTA", tmp_path / "cpu.max")


@pytest.mark.parametrize(
    ("given", "most", "free"),
    [
        ({"total": 8, "allowed": 8, "busy": 0.1}, 8, 8),
        ({"total": 8, "allowed": 8, "busy": 5.2}, 8, 3),
        ({"total": 8, "allowed": 2, "busy": 5.2}, 2, 2),  # others work on the cores beside ours
        ({"total": 2, "allowed": 2, "busy": 2.0}, 2, 1),
        ({"total": 64, "allowed": 64, "busy": 0.0, "quota": "250000 100000"}, 3, 3),
        ({"total": 64, "allowed": 64, "busy": 0.0, "quota": "1000 100000"}, 1, 1),
        ({"total": 4, "allowed": 4, "busy": 0.0, "quota": "damaged"}, 4, 4),
    ],
)
def test_cores(given, most, free, monkeypatch, tmp_path):
    machine(monkeypatch, tmp_path, **given)
    assert usable.usable_cores() == most
    assert cores.free_cores() == free


def test_without_affinity_and_quota_all_cores_count(monkeypatch, tmp_path):
    machine(monkeypatch, tmp_path, total=6, allowed=1, busy=0.0)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(usable, "_QUOTA", tmp_path / "none")
    assert cores.free_cores() == 6


def test_work_that_has_just_begun_counts():
    work = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(os.cpu_count() or 1)
    ]
    try:
        time.sleep(0.5)  # until they run
        assert cores.free_cores() == 1
    finally:
        for process in work:
            process.kill()
            process.wait()


@pytest.mark.parametrize(("told", "threads"), [(None, 1), ("2", 2)])
def test_the_command_itself_has_one_thread_unless_told(told, threads, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "app", lambda: seen.append(torch.get_num_threads()))
    if told is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # as torch finds 2 cores, or 2 in the environment
    try:
        cli.main()
    finally:
        torch.set_num_threads(before)
    assert seen == [threads]
    assert os.environ["OMP_NUM_THREADS"] == str(threads)  # for the processes that it starts
