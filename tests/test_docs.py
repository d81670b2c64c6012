"""Every Python block and every command of README and docs runs, or is at least understood."""

from __future__ import annotations

import random
import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests import support_table
from tests.conftest import needs_compiler

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
NEEDS = {
    "learn2learn": "learn2learn",
    "higher": "higher",
    "pytorch_lightning": "pytorch_lightning",
    "structured": "torch_pruning",
    "integrations.metaoptnet": "qpth",
}
TINY = ["--iterations", "20", "--eval-tasks", "2", "--channels", "4", "--jobs", "1", "--seeds", "1"]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def named(page):
    return str(page.relative_to(ROOT))


COMMANDS = [
    (named(page), line[2:])
    for page in PAGES
    for block in blocks(page, "console")
    for line in block.splitlines()
    if line.startswith("$ l2l-prune ")
]


def with_blocks():
    for page in PAGES:
        if text := "\n".join(blocks(page, "python")):
            marks = [needs_compiler, pytest.mark.slow] if "CompiledStep" in text else []
            yield pytest.param(page, marks=marks, id=named(page))


@pytest.mark.parametrize("page", with_blocks())
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch, capsys):
    text = "\n".join(blocks(page, "python"))
    for word, package in NEEDS.items():
        if re.search(rf"^\s*(import|from) \S*{re.escape(word)}", text, re.MULTILINE):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    namespace = {}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{named(page)}, block {number}", "exec"), namespace)
    for summary in re.findall(r"^whole model .*$", capsys.readouterr().out, re.MULTILINE):
        assert not summary.endswith(" 0.0%"), "a summary after the release shows nothing"


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda value: value)
@pytest.mark.slow
def test_commands_run(page, command, tmp_path, monkeypatch):
    """``run`` on a tiny scale; of longer commands the options are read."""
    pytest.importorskip("learn2learn")
    from l2l_prune.experiments.cli import app

    monkeypatch.chdir(tmp_path)
    _, verb, *words = shlex.split(command, comments=True)
    words = [word for word in words if word != "..."]
    if verb == "run" and "--data-root" not in words:
        words += [*TINY, *(["--backbone", "conv4"] if "metaoptnet" in words else [])]
        result = CliRunner().invoke(app, [verb, *words, "--out", "out"])
        assert result.exit_code == 0, result.output
        assert list(Path("out").rglob("results.json"))
    elif verb == "run":  # the data are not here, which is what it says
        result = CliRunner().invoke(app, [verb, *words])
        assert result.exit_code == 2
        assert "DIR" in result.output
    else:
        result = CliRunner().invoke(app, [verb, *words, "--help"])
        assert result.exit_code == 0, result.output


def test_grids_of_the_docs_are_grids(tmp_path):
    from l2l_prune.experiments.running.sweep import expand
    from l2l_prune.experiments.toml_files import read_toml

    found = [(p, b) for p in PAGES for b in blocks(p, "toml") if "[grid]" in b]
    assert len(found) == 1
    for _, block in found:
        (tmp_path / "grid.toml").write_text(block)
        values = read_toml(tmp_path / "grid.toml")
        assert len(expand(values["base"], [values["grid"]])) > 3


PLANS = sorted((ROOT / "docs" / "results").rglob("*.toml"))


@pytest.mark.parametrize("plan", PLANS, ids=[plan.stem for plan in PLANS])
def test_plans_can_be_run_and_judged(plan):
    """Each comparison names one run a replicate on both sides; scores are made up."""
    pytest.importorskip("statsmodels")
    from l2l_prune.experiments.report.comparisons import judge, read_comparisons
    from l2l_prune.experiments.report.finished_runs import FinishedRun
    from l2l_prune.experiments.running.storage import run_name
    from l2l_prune.experiments.running.sweep import expand
    from l2l_prune.experiments.toml_files import read_toml

    document = read_toml(plan)
    adapted = document.get("adaptation")  # of another plan's runs
    trained = read_toml(plan.parent / adapted["runs"]) if adapted else document
    configs = expand(trained["base"], trained["grid"])
    draws = random.Random(0)
    runs = []
    for config in configs:
        scores = {"mean": draws.random()}
        entry = {"config": config.to_json(), "train": scores, "test": scores}
        runs.append(FinishedRun(entry, Path(run_name(config)), config.schedule.iterations))
    tables = document.get("comparison", [])
    for side in ("treatment", "control"):
        for table in tables:
            for name in ("steps", "batch"):  # not of runs, but of scores of more_steps.py
                table[side].pop(name, None)
    judged = judge(read_comparisons(tables), runs)
    assert all(len(one.difference.values) == 8 for one in judged)
    assert judged or plan.parent.name != "study" or plan.stem.endswith("-choice")


def test_described_outputs_are_what_is_printed():
    """The table of docs/guides/schedule.md."""
    page = ROOT / "docs" / "guides" / "schedule.md"
    first = blocks(page, "python")[0].replace("print(schedule.describe())", "")
    namespace = {}
    exec(first, namespace)
    lines = [line.split() for line in namespace["schedule"].describe().splitlines()]
    assert lines == [line.split() for line in blocks(page, "text")[0].splitlines()]


def test_the_support_table_has_every_test():
    """By name alone: ``make support`` runs them, and writes the page anew."""
    page = (ROOT / "docs" / "support.md").read_text()
    sections = dict(re.findall(r"^`(tests/\S+)`\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert list(sections) == list(support_table.TITLES)
    whole = [*ROOT.glob("tests/hosts/test_*.py"), *ROOT.glob("tests/shipping/test_*.py")]
    assert {named(path) for path in whole} <= set(sections)
    for path, rows in sections.items():
        tests = re.findall(r"^def (test_\w+)\(", (ROOT / path).read_text(), re.MULTILINE)
        _, *listed = re.findall(r"^\| (.+?) \|", rows, re.MULTILINE)  # the first is the head
        assert sorted(listed) == sorted(map(support_table.what, tests)), path
    examples = re.findall(r"^\| example \| (.+?) \|", page, re.MULTILINE)[0].split(", ")
    assert sorted(examples) == sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.process
@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs")
    import subprocess

    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("index.html")}
    assert {"index.html", "guides/maml/index.html", "api/core/index.html"} <= pages
    shown = (tmp_path / "api/core/index.html").read_text()
    assert "release_state" in shown
