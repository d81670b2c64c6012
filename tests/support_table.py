"""Pytest plugin: writes docs/support.md from the results, so that the table cannot lie.

Use: ``make support``. One row a test function; parametrized cases are listed with it.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
TITLES = {
    "tests/hosts/test_learn2learn.py": "learn2learn",
    "tests/hosts/test_higher.py": "higher",
    "tests/hosts/test_torch_func.py": "torch.func",
    "tests/hosts/test_torchopt.py": "TorchOpt",
    "tests/hosts/test_easyfsl.py": "easyfsl",
    "tests/hosts/test_timm.py": "timm",
    "tests/hosts/test_lightning.py": "Lightning",
    "tests/metalearners/test_cavia.py": "CAVIA",
    "tests/hosts/test_task_masks.py": "Masks for each task: other hosts",
    "tests/reptile/test_task_masks.py": "Masks for each task: Reptile",
    "tests/hosts/test_metaoptnet.py": "MetaOptNet",
    "tests/hosts/test_published_loops.py": "Loops of the public CAVIA and MetaOptNet scripts",
    "tests/masking/test_masked_layer.py": "torch: copies, functional calls, layers, state dicts",
    "tests/masking/test_layers.py": "torch: what is refused, by name",
    "tests/reptile/test_distributed.py": "torch: DistributedDataParallel",
    "tests/shipping/test_folder.py": "Devices: folders that load without code",
    "tests/shipping/test_formats.py": "Devices: ONNX Runtime, torch.export, 2:4 patterns",
    "tests/shipping/test_costs.py": "Devices: the cost of adapting",
    "tests/test_examples.py": "Examples",
}
GUIDES = {"cavia": "CAVIA", "metaoptnet": "MetaOptNet", "libfewshot": "LibFewShot"}
"""Those with diffs of public programs, which ``tests/peers/published.py`` runs."""
HOSTS = {
    "learn2learn": ("learn2learn", "maml"),
    "higher": ("higher", "higher_maml"),
    "torch.func": ("torch", "torch_func_maml"),
    "TorchOpt": ("torchopt", "torchopt_maml"),
    "easyfsl": ("easyfsl", "easyfsl_protonet"),
    "timm": ("timm", "timm_vit"),
    "Lightning": ("pytorch-lightning", "lightning_maml"),
}
"""Package and example of a host."""
VERSIONS = ("torch", "learn2learn", "higher", "pytorch-lightning", "onnxruntime")
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
    lines += hosts()
    for path, title in TITLES.items():
        lines += ["", f"## {title}", "", f"`{path}`", "", "| what | cases | result |"]
        lines.append("|---|---|---|")
        for test, cases in results.get(path, {}).items():
            lines.append(row(test, cases))
    target.write_text("\n".join(lines) + "\n")


def hosts() -> list[str]:
    """What pruning adds to each host's own loop, counted in the examples and the guides' diffs."""
    lines = ["", "## Hosts and added lines", "", "| host | version | added lines | where |"]
    lines.append("|---|---|---|---|")
    for host, (package, example) in HOSTS.items():
        path = ROOT / "examples" / f"{example}.py"
        added = path.read_text().count("# l2l_prune")
        lines.append(f"| {host} | {metadata.version(package)} | {added} | `examples/{path.name}` |")
    for guide, host in GUIDES.items():
        text = (ROOT / "docs" / "guides" / f"{guide}.md").read_text()
        for block in re.findall(r"```diff\n(.*?)```", text, re.DOTALL):
            file = re.findall(r"^\+\+\+ b/(.*)$", block, re.MULTILINE)[0]
            added = len(re.findall(r"^\+(?!\+\+)", block, re.MULTILINE))
            lines.append(f"| {host}, public program | checkout | {added} | `{file}` |")
    return lines


def what(test: str) -> str:
    return test.removeprefix("test_").replace("_", " ")


def row(test: str, cases: list[tuple[str, str]]) -> str:
    names = [
        case
        for case, _ in cases
        if case and not re.search(r"lambda|<|options\d|expected\d|make\d", case)
    ]
    outcomes = [outcome for _, outcome in cases]
    counts = {o: outcomes.count(o) for o in ("passed", "failed", "skipped") if o in outcomes}
    result = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return f"| {what(test)} | {', '.join(names) or len(cases)} | {result} |"
