"""``l2l-prune run`` as a person runs it."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import typer
from scipy import stats
from typer.testing import CliRunner

from l2l_prune.experiments.cli import app
from l2l_prune.experiments.config import make_config
from l2l_prune.experiments.report.results import conclusions
from l2l_prune.experiments.run_result import RunResult
from l2l_prune.experiments.running.compare_seeds import OverSeeds
from l2l_prune.fewshot.evaluation import Mean
from l2l_prune.fewshot.models import Conv4
from tests.fewshot.data.benchmark_files import write_mini_imagenet

pytest.importorskip("learn2learn")


def command(*arguments, folder):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "l2l_prune", "run", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "COLUMNS": "100"},
    )


def entry_of(folder, name):
    """The one run below the folder whose own folder's name holds these words."""
    (file,) = folder.glob(f"*{name}*/results.json")
    (run,) = json.loads(file.read_text())["runs"]
    return run


@pytest.mark.slow
@pytest.mark.process
def test_one_seed_gives_the_demos_files_and_is_not_trained_twice(tmp_path):
    arguments = (
        *("--algorithm", "fomaml", "--schedule", "iht", "--schedule", "dense"),
        *("--iterations", "20", "--eval-tasks", "5", "--channels", "8", "--tasks", "1"),
    )
    done = command(*arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fomaml on glyphs: 5-way 1-shot" in done.stdout
    assert "IHT - dense on test tasks" in done.stdout
    out = tmp_path / "runs" / "fomaml-iht-dense"
    folders = {kind: next(out.glob(f"fomaml-{kind}-*")) for kind in ("dense", "iht")}
    assert {path.name for path in out.iterdir()} - {"logs"} == {  # gym greets when imported
        *(".lock", "curves.csv", "curves.png"),
        *(place.name for place in folders.values()),
    }
    for kind, place in folders.items():
        names = sorted(path.name for path in place.iterdir() if path.name != ".lock")
        assert names == ["curves.csv", "curves.png", f"{kind}.pt", "results.json"]
    with (out / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["iteration"]) for row in rows[9:11]] == [
        ("dense", "20"),
        ("IHT", "2"),
    ]
    assert entry_of(out, "dense")["config"]["algorithm"] == "fomaml"
    weights = torch.load(folders["iht"] / "iht.pt", weights_only=True)
    Conv4(5, channels=8).load_state_dict(weights)

    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("results.json")}
    before = (out / "curves.csv").read_bytes()
    again = command(*arguments, folder=tmp_path)
    assert "2 of 2 runs had finished before" in again.stdout
    assert table_of(again.stdout) == table_of(done.stdout)
    assert (out / "curves.csv").read_bytes() == before
    other = command(*arguments, "--inner-lr", "0.1", folder=tmp_path)
    assert other.returncode == 0, other.stderr
    assert len(list(out.rglob("results.json"))) == 4
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())


def table_of(text):
    return [line for line in text.splitlines() if "│" in line or " - dense on " in line]


@pytest.mark.process
@pytest.mark.slow
def test_several_seeds_give_a_table_and_are_taken_up_again(tmp_path):
    arguments = (
        *("--algorithm", "protonet", "--schedule", "dsd", "--schedule", "dense"),
        *("--iterations", "20", "--eval-tasks", "4", "--channels", "4", "--tasks", "1"),
        *("--out", "out", "--seeds", "2"),
    )
    first = command(*arguments, folder=tmp_path)
    assert first.returncode == 0, first.stderr
    out = tmp_path / "out"
    table = (out / "table.md").read_text()
    assert table.strip() in first.stdout
    runs = {}
    for name in ("dense", "dsd"):
        for seed in (0, 1):
            runs[name, seed] = entry_of(out, f"{name}-*-seed{seed}")["test"]["mean"]
    # By hand: the paired difference over two seeds and its t interval.
    differences = [runs["dsd", seed] - runs["dense", seed] for seed in (0, 1)]
    mean = sum(differences) / 2
    width = stats.t.ppf(0.975, 1) * abs(differences[0] - differences[1]) / 2
    assert f"DSD - dense, test: {100 * mean:+.1f} ± {100 * width:.1f}" in table

    (lost,) = out.glob("*-dsd-*-seed1-*/results.json")
    lost.unlink()
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("*-dense-*/results.json")}
    assert len(stamps) == 2
    second = command(*arguments, folder=tmp_path)
    assert second.returncode == 0, second.stderr
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())
    assert lost.exists()


@pytest.mark.process
@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path):
    """Also while the worker of the killed one is still at its meta-iteration."""
    arguments = ("--schedule", "dsd", "--channels", "8", "--tasks", "1", "--eval-tasks", "2")
    arguments += ("--iterations", "300", "--out", "out")
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "l2l_prune", "run", *arguments],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("out/*/checkpoint.pt")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGSTOP)  # else it may end before the next one is refused
    refused = command(*arguments, folder=tmp_path)
    assert refused.returncode == 2
    assert "another l2l-prune is writing to out" in refused.stderr
    process.kill()  # alone: its worker finds itself without a parent
    process.wait()
    os.killpg(process.pid, signal.SIGCONT)
    assert not list(tmp_path.glob("out/*/results.json"))

    resumed = command(*arguments, folder=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    whole = command(*arguments[:-1], "whole", folder=tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert not list(tmp_path.rglob("checkpoint.pt*"))
    runs = [entry_of(tmp_path / out, "dsd") for out in ("out", "whole")]
    for run in runs:
        run.pop("seconds")
    assert runs[0] == runs[1]
    files = [next((tmp_path / out).glob("*/dsd.pt")) for out in ("out", "whole")]
    a, b = (torch.load(file, weights_only=True) for file in files)
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
@pytest.mark.process
def test_settings_from_a_file(tmp_path):
    (tmp_path / "run.toml").write_text(
        'algorithm = "protonet"\nschedule = ["dense"]\niterations = 40\nscale = 0.5\n'
        'channels = 4\ntasks = 1\neval-tasks = 2\nout = "from-file"\n'
    )
    done = command("--config", "run.toml", "--channels", "3", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    run = entry_of(tmp_path / "from-file", "dense")
    assert run["config"]["algorithm"] == "protonet"
    assert run["config"]["channels"] == 3  # the command line wins
    assert run["curve"][-1]["iteration"] == 20
    (tmp_path / "run.toml").write_text("chanels = 4\n")
    done = command("--config", "run.toml", folder=tmp_path)
    assert done.returncode == 2
    assert "chanels" in done.stderr


@pytest.mark.process
@pytest.mark.slow
def test_mini_imagenet_files(tmp_path):
    write_mini_imagenet(tmp_path, classes=5, each=8)
    done = command(
        *("--algorithm", "cavia", "--schedule", "dsd", "--data", "mini-imagenet"),
        *("--data-root", str(tmp_path), "--iterations", "20", "--channels", "2"),
        *("--tasks", "1", "--eval-tasks", "2", "--out", "out"),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    config = entry_of(tmp_path / "out", "dsd")["config"]
    assert config["data"] == "mini-imagenet"
    assert config["train_classes"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--algorithm", "mamal"), "algorithm must be one of"),
        (("--schedule", "sdd"), "method must be one of"),
        (("--data", "imagenet"), "data must be one of"),
        (("--data", "mini-imagenet"), "--data-root"),
        (("--data", "mini-imagenet", "--data-root", "nowhere"), "not in nowhere"),
        (("--algorithm", "maml", "--published"), "published settings"),
        (("--algorithm", "maml", "--backbone", "resnet12"), "the algorithm metaoptnet"),
        (("--select", "first"), "select must be"),
        (("--scale", "0"), "scale must be"),
        (("--config", "nowhere.toml"), "nowhere.toml"),
        (("--sparsity", "1"), "--sparsity"),
        (("--data-root", "images"), "data=folder"),
        (("--ways", "31"), "the train split is too small: ways=31, but there are only 30 classes"),
        (("--train-shots", "30"), "the train split is too small: shots + queries = 30"),
        (("--shots", "30"), "the train split is too small: shots + queries = 35, but class 0 has"),
        (
            ("--ways", "100", "--train-classes", "100", "--select", "best"),
            "the validation split is too small: ways=100, but there are only 77 classes",
        ),
        (("--ways", "130", "--train-classes", "200"), "the test split is too small: ways=130"),
    ],
)
def test_bad_input_is_told_in_a_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["run", *arguments, "--out", "out"])
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--method", "dense", "--config", "run.toml"),
        ("--method", "dense", "--method", "iht", "--rounds", "2"),
    ],
)
def test_settings_of_pruning_may_be_shared_with_dense_runs(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text("sparsity = 0.5\nrounds = 2\n")
    result = CliRunner().invoke(app, ["run", *arguments, "--ways", "1"])
    assert "ways must be" in result.stderr  # the first thing that is wrong


def test_a_name_that_is_too_long_is_told_in_a_line():
    result = CliRunner().invoke(app, ["run", "--out", "x" * 300])
    assert result.exit_code == 2
    assert "too long" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--inner-lr", "-1"), "inner_lr"),
        (("--tasks", "1000000000"), "more than the machine has"),
    ],
)
def test_what_a_run_refuses_is_told_in_a_line(
    tmp_path, monkeypatch, in_this_process, arguments, words
):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["run", *arguments, "--iterations", "20", "--out", "out"])
    assert_told_in_a_line(words, result.exit_code, result.stderr, tmp_path / "out")


@pytest.mark.process
def test_what_a_process_of_its_own_refuses_is_told_too(tmp_path):
    done = command("--tasks", "1000000000", "--iterations", "20", "--out", "out", folder=tmp_path)
    words = "more than the machine has"
    assert_told_in_a_line(words, done.returncode, done.stderr, tmp_path / "out")
    assert list(tmp_path.glob("out/*/error.txt"))


def assert_told_in_a_line(words, code, stderr, out):
    assert code == 2
    assert words in stderr
    assert "Traceback" not in stderr
    assert {path.name for path in out.glob("*/*")} <= {".lock", "error.txt"}
    assert all(words in file.read_text() for file in out.glob("*/error.txt"))


def test_help_says_the_defaults_that_hold():
    """Of the criterion and the allocation they go by the method, not by the algorithm."""
    from l2l_prune.experiments.methods import METHODS

    others = {n: m.settings["criterion"] for n, m in METHODS.items() if "criterion" in m.settings}
    assert others == dict.fromkeys(("static", "set", "rigl", "recommended"), "random")
    shares = {n: m.settings["allocation"] for n, m in METHODS.items() if "allocation" in m.settings}
    assert shares == {"metasparse": "global"}
    parameters = {p.name: p for p in typer.main.get_command(app).commands["run"].params}
    shown = "magnitude; random for static, set, rigl and recommended"
    assert parameters["criterion"].show_default == shown
    assert parameters["allocation"].show_default == "layerwise; global for metasparse"


def test_estimates():
    estimate = OverSeeds((0.1, 0.2, 0.3))
    assert estimate.mean == pytest.approx(0.2)
    assert estimate.ci95 == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
    words = ("better", "worse")
    assert estimate.verdict(*words) == "not significant"
    assert OverSeeds((0.1, 0.11, 0.12)).verdict(*words) == "better"
    assert OverSeeds((-0.1, -0.11, -0.12)).verdict(*words) == "worse"
    assert OverSeeds((0.5,)).verdict(*words) == "one seed"


def test_no_verdict_without_a_baseline():
    result = RunResult("DSD", Mean((0.5, 0.6)), Mean((0.5, 0.6)), 1.0)
    assert conclusions([result]) == []
    dense = RunResult("dense, dropout 0.1", Mean((0.5, 0.6)), Mean((0.4, 0.6)), 1.0)
    assert conclusions([dense, result])[0].startswith("DSD - dense, dropout 0.1 on test tasks")
    assert make_config("reptile", "dsd").title == "DSD seed 0"
