"""Pytest plugin: writes docs/support.md from the results, so that the table cannot lie.

Use: ``make support``. One row a test function; parametrized cases are listed with it.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

TITLES = {
    "tests/hosts/test_learn2learn.py": "learn2learn",
    "tests/hosts/test_higher.py": "higher",
    "tests/hosts/test_lightning.py": "Lightning",
    "tests/metalearners/test_cavia.py": "CAVIA",
    "tests/hosts/test_task_masks.py": "Masks for each task: other hosts",
    "tests/reptile/test_task_masks.py": "Masks for each task: Reptile",
    "tests/hosts/test_metaoptnet.py": "MetaOptNet",
    "tests/hosts/test_published_loops.py": "Loops of the public CAVIA and MetaOptNet scripts",
    "tests/masking/test_masked_layer.py": "torch: copies, functional calls, layers, state dicts",
    "tests/masking/test_layers.py": "torch: what is refused, by name",
    "tests/reptile/test_distributed.py": "torch: DistributedDataParallel",
    "tests/test_examples.py": "Examples",
}
VERSIONS = ("torch", "learn2learn", "higher", "pytorch-lightning")
results: dict[str, dict[str, list[tuple[str, str]]]] = {}


def pytest_addoption(parser):
    parser.addoption("--support-table", type=Path, help="the Markdown file to write")


def pytest_runtest_logreport(report):
    if report.when != "call" and report.passed:
        return
    path, _, name = report.nodeid.partition("::")
    test, _, case = name.partition("[")
    cases = results.setdefault(path, {}).setdefault(test, [])
    cases.append((case.rstrip("]"), report.outcome))


def pytest_sessionfinish(session):
    target = session.config.getoption("--support-table")
    if target is None:
        return
    lines = ["# Support table", "", "Written by `make support` from the tests' own results, with"]
    lines[-1] += " " + ", ".join(f"{name} {metadata.version(name)}" for name in VERSIONS) + "."
    for path, title in TITLES.items():
        lines += ["", f"## {title}", "", f"`{path}`", "", "| what | cases | result |"]
        lines.append("|---|---|---|")
        for test, cases in results.get(path, {}).items():
            lines.append(row(test, cases))
    target.write_text("\n".join(lines) + "\n")


def row(test: str, cases: list[tuple[str, str]]) -> str:
    what = test.removeprefix("test_").replace("_", " ")
    names = [
        case
        for case, _ in cases
        if case and not re.search(r"lambda|<|options\d|expected\d|make\d", case)
    ]
    outcomes = [outcome for _, outcome in cases]
    counts = {o: outcomes.count(o) for o in ("passed", "failed", "skipped") if o in outcomes}
    result = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return f"| {what} | {', '.join(names) or len(cases)} | {result} |"
