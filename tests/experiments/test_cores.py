"""How many runs at once are chosen, on pretended machines."""

from __future__ import annotations

import os

import pytest
import torch

from l2l_prune.experiments import cli
from l2l_prune.experiments.running import cores


def machine(monkeypatch, tmp_path, *, total, allowed, load, quota="max 100000"):
    monkeypatch.setattr(os, "cpu_count", lambda: total)
    monkeypatch.setattr(os, "sched_getaffinity", lambda who: set(range(allowed)), raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / "cpu.max")


@pytest.mark.parametrize(
    ("given", "usable", "free"),
    [
        ({"total": 8, "allowed": 8, "load": 0.1}, 8, 8),
        ({"total": 8, "allowed": 8, "load": 5.2}, 8, 3),
        ({"total": 8, "allowed": 2, "load": 5.2}, 2, 2),  # others work on the cores beside ours
        ({"total": 2, "allowed": 2, "load": 9.0}, 2, 1),
        ({"total": 64, "allowed": 64, "load": 0.0, "quota": "250000 100000"}, 3, 3),
        ({"total": 64, "allowed": 64, "load": 0.0, "quota": "1000 100000"}, 1, 1),
        ({"total": 4, "allowed": 4, "load": 0.0, "quota": "damaged"}, 4, 4),
    ],
)
def test_cores(given, usable, free, monkeypatch, tmp_path):
    machine(monkeypatch, tmp_path, **given)
    assert cores.usable_cores() == usable
    assert cores.free_cores() == free


def test_without_load_affinity_and_quota_all_cores_count(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "getloadavg", raising=False)
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / "none")
    assert cores.free_cores() == 6


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
