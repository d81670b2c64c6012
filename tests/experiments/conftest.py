from __future__ import annotations

import pytest

from l2l_prune.experiments.running import processes


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
