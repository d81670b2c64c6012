from __future__ import annotations

import functools

import pytest

from l2l_prune.experiments.config import make_config
from l2l_prune.experiments.run_result import RunResult
from l2l_prune.experiments.running import processes
from l2l_prune.experiments.running.run import run


def settings(**options):
    """Of a short run of DSD, for tests of what happens to its files."""
    return make_config(
        "reptile",
        "dsd",
        iterations=20,
        **{"channels": 4, "tasks": 1, "inner_steps": 2, "eval_steps": 3},
        **{"final_tasks": 3, "curve_tasks": 2, **options},
    )


@functools.cache
def whole_run(config):
    """The result of a run that nothing interrupts, shared by the tests that compare with it."""
    *_, result = run(config)
    assert isinstance(result, RunResult)
    return result


def run_here(patch):
    """Let commands do their runs in this process: each of their own spends seconds on imports."""

    def local(work, configs, logs, jobs):
        for config in configs:
            yield config, None
            told = []
            outcome = work(config, tell=told.append)
            yield from ((config, message) for message in told)
            yield config, outcome

    patch.setattr(processes, "_local", local)


@pytest.fixture
def in_this_process(monkeypatch):
    run_here(monkeypatch)
