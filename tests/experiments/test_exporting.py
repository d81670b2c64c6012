"""Runs for a device: the export command, and the report's part on what adapting costs."""

from __future__ import annotations

import csv
import json
import re
import shutil

import pytest
import torch
from typer.testing import CliRunner

from l2l_prune.experiments.cli import app
from l2l_prune.experiments.config import make_config
from l2l_prune.experiments.exporting import BEST, PARTS
from l2l_prune.experiments.report.finished_runs import FinishedRun, WeightsFile, read_folder
from l2l_prune.experiments.restoring import restored_network, restored_reptile
from l2l_prune.experiments.running.run_folder import run_into
from l2l_prune.experiments.search.costs import cost_of, end_network
from l2l_prune.experiments.search.halving import Candidate
from l2l_prune.fewshot import Conv4
from l2l_prune.fewshot.data import load_images
from l2l_prune.shipping import load, read_manifest

pytest.importorskip("safetensors.torch")

TASKS = {"algorithm": "reptile", "method": "task-masks", "sparsity": 0.5}
SETTINGS = {"iterations": 20, "channels": 8, "final_tasks": 4, "curve_tasks": 2, "tasks": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for method, more in (
        ("dense", {}),
        ("static", {"sparsity": 0.9}),
        ("dsd", {"sparsity": 0.5, "structured": True, "pretrain": 0.25, "retrain": 0}),
    ):
        if more.get("structured"):
            pytest.importorskip("torch_pruning")
        assert run_into(make_config("reptile", method, **(SETTINGS | more)), folder).error is None
    return folder


def command(*words):
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, list(map(str, words)))


def places(runs):
    found = read_folder(runs).runs
    small = next(run for run in found if run.config["structured"])
    masked = next(run for run in found if run.pruned and run is not small)
    return next(run for run in found if run.dense), masked, small


HOLDING = {
    "dropout": ("dense", {"dropout": 0.3}),
    "dropout for a task": ("dense", {"dropout": 0.3, "dropout_per": "task"}),
    "weights of the start": ("lottery", {"sparsity": 0.5}),
    "several ranks": ("one-shot", {"ranks": 2, "tasks": 2}),
    "sub-networks": ("dense", {"mgaug": "parameters"}),
    "compiled steps": ("rigl", {"compile": True}),
}


@pytest.mark.parametrize("what", HOLDING)
def test_what_only_training_needs_does_not_act_on_a_restored_network(what, tmp_path):
    """The run is not trained: its weights are made up, pruned as its schedule ends."""
    method, more = HOLDING[what]
    config = make_config("reptile", method, **{**SETTINGS, **more})
    net = end_network(config, (1, 28, 28))
    assert not any(isinstance(module, torch.nn.Dropout) for module in net.modules())
    torch.save(net.state_dict(), tmp_path / "net.pt")
    entry = {"config": json.loads(json.dumps(config.to_json()))}
    run = FinishedRun(entry, tmp_path, 20, weights_file=WeightsFile(tmp_path / "net.pt"))
    images = load_images("glyphs", "test")
    again, x = restored_network(run, images), torch.rand(5, 1, 28, 28)
    assert torch.equal(again(x), again(x))
    torch.testing.assert_close(again(x), net.train()(x))
    learner = restored_reptile(run, images).clone()
    assert torch.equal(learner(x), again(x))


def test_channels_that_were_cut_are_found_in_a_run_with_dropout(tmp_path):
    pytest.importorskip("torch_pruning")
    more = {"structured": True, "sparsity": 0.5, "dropout": 0.3}
    assert run_into(make_config("reptile", "one-shot", **SETTINGS, **more), tmp_path).error is None
    done = command("export", *tmp_path.iterdir(), "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    net, x = load(tmp_path / "out"), torch.rand(5, 1, 28, 28)
    assert net.features.conv1.out_channels == 4
    assert torch.equal(net(x), net(x))


def test_the_network_of_a_run_is_exported(runs, tmp_path):
    x = torch.rand(5, 1, 28, 28)
    for run in places(runs):
        done = command("export", run.folder, "--out", tmp_path / "out")
        assert done.exit_code == 0, done.output
        net, told = load(tmp_path / "out"), read_manifest(tmp_path / "out")
        state = torch.load(run.weights_file.path, weights_only=True)
        whole = Conv4(5, 8)
        whole.load_state_dict(state)
        torch.testing.assert_close(net(x), whole(x), atol=1e-4, rtol=1e-3)
        assert net.training
        assert net(x).shape == (5, 5)
        assert told["accuracy"]["mean"] == pytest.approx(run.entry["test"]["mean"])
        assert told["data"] == "glyphs"
        assert told["about"]["algorithm"] == "reptile"
        shown = int(re.search(r"the tensors take ([\d,]+) bytes", done.output)[1].replace(",", ""))
        assert shown == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert net.features.conv2.weight.shape == (4, 4, 3, 3)


def test_other_formats_and_half_precision(runs, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    small = places(runs)[2]
    done = command("export", small.folder, "--out", tmp_path, "--half", "--onnx", "--program")
    assert done.exit_code == 0, done.output
    images = load_images("glyphs", "test")
    net = restored_network(small, images)
    x = torch.rand(7, 1, 28, 28)
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = net(x).detach()
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-3)
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(x).detach(), expected, atol=1e-4, rtol=1e-3)
    done = command("export", places(runs)[0].folder, "--out", tmp_path)  # another network
    assert done.exit_code == 0, done.output
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"export.json", "model.safetensors"}


def test_masks_are_held_again(runs):
    dense, masked, _ = places(runs)
    images = load_images("glyphs", "test")
    for run, zeros in ((dense, False), (masked, True)):
        reptile = restored_reptile(run, images)
        learner = reptile.clone()
        loss = torch.nn.functional.cross_entropy(learner(torch.rand(5, 1, 28, 28)), torch.arange(5))
        learner.adapt(loss)
        state = torch.load(run.weights_file.path, weights_only=True)
        before = state["features.conv2.weight"] == 0
        assert bool(before.any()) == zeros
        assert torch.equal(learner.module.features.conv2.weight == 0, before)


def test_a_run_whose_tasks_had_channels_of_their_own_ends_whole(tmp_path):
    pytest.importorskip("torch_pruning")
    config = make_config(**TASKS, structured=True, **SETTINGS)
    outcome = run_into(config, tmp_path)
    assert outcome.error is None
    (run,) = read_folder(tmp_path).runs
    images = load_images("glyphs", "test")
    state = torch.load(run.weights_file.path, weights_only=True)
    whole = Conv4(5, 8)
    whole.load_state_dict(state)
    x = torch.rand(5, 1, 28, 28)
    torch.testing.assert_close(restored_network(run, images)(x), whole(x), atol=1e-5, rtol=1e-5)
    assert restored_reptile(run, images).clone().module.features.conv2.weight.shape == (8, 8, 3, 3)
    assert not Candidate({**SETTINGS, **TASKS, "structured": True}).ends_sparse
    assert cost_of(config, (1, 28, 28)).weights == sum(p.numel() for p in whole.parameters())


def test_runs_that_adapt_differently_have_no_common_costs(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    config = make_config("reptile", "dense", **SETTINGS, eval_steps=9)
    assert run_into(config, tmp_path / "runs").error is None
    done = command("report", tmp_path / "runs", "--adaptation")
    assert done.exit_code == 2
    assert "differ in eval_steps" in done.stderr


def test_the_report_shows_what_adapting_costs(runs):
    done = command("report", runs, "--adaptation")
    assert done.exit_code == 0, done.output
    with (runs / "adaptation.csv").open(newline="") as file:
        rows = {row["way"]: row for row in csv.DictReader(file)}
    kinds = [way.rpartition(", ")[0] for way in rows]
    assert len(rows) == 12
    assert "dense" in kinds[0]
    assert {way.rpartition(", ")[2] for way in rows} == set(PARTS) | {BEST}
    dense, masked, small = dict.fromkeys(kinds)
    first = rows[f"{dense}, all"]

    assert float(first["episode ratio"]) == 1
    macs = {way: float(row["episode MMACs"]) for way, row in rows.items()}
    by_rate = sorted({macs[f"{kind}, all"] for kind in (dense, masked, small)})
    assert len(by_rate) == 2  # masks save none
    for kind in (dense, masked, small):
        assert macs[f"{kind}, head"] < macs[f"{kind}, last block"] < macs[f"{kind}, all"]
        assert all(float(rows[f"{kind}, {part}"]["memory kB"]) > 0 for part in ("all", "head"))
        # They lie in several layers, and of these layers everything is computed.
        assert macs[f"{kind}, last block"] < macs[f"{kind}, {BEST}"] <= macs[f"{kind}, all"]
    text = (runs / "report.md").read_text()
    assert "## What adapting costs" in text
    assert "](adaptation.png)" in text


# ---- what must be refused: nothing is written ------------------------------------------------


def refused(out, *words):
    done = command(*words, "--out", out)
    assert done.exit_code == 2, done.output
    assert not out.exists()
    return " ".join(done.output.split())


def test_several_runs(runs, tmp_path):
    out = tmp_path / "out"
    assert "holds 3 runs: give the folder of one" in refused(out, "export", runs)


def copied(run, folder):
    folder.mkdir()
    for name in (run.weights_file.path.name, "results.json"):
        (folder / name).write_bytes((run.folder / name).read_bytes())
    return folder


def test_damaged_runs(runs, tmp_path):
    run, out = places(runs)[0], tmp_path / "out"
    gone = copied(run, tmp_path / "gone")
    (gone / run.weights_file.path.name).unlink()
    assert "dense.pt: No such file" in refused(out, "export", gone)
    broken = copied(run, tmp_path / "broken")
    weights = broken / run.weights_file.path.name
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "dense.pt is damaged" in refused(out, "export", broken)
    other = copied(run, tmp_path / "other")
    torch.save({"a": torch.ones(2)}, other / run.weights_file.path.name)
    assert "holds the weights of another network" in refused(out, "export", other)
    newer = copied(run, tmp_path / "newer")
    document = json.loads((newer / "results.json").read_text())
    document["runs"][0]["config"]["brightness"] = 3
    (newer / "results.json").write_text(json.dumps(document))
    assert "was written by another version" in refused(out, "export", newer)


def test_costs_of_runs_that_are_not_reptiles(tmp_path):
    pytest.importorskip("learn2learn")
    assert run_into(make_config("anil", "dense", **SETTINGS), tmp_path).error is None
    done = command("report", tmp_path, "--adaptation")
    assert done.exit_code == 2
    assert "no reptile run with its weights in" in done.output


@pytest.mark.hosts
def test_an_export_says_what_was_learned_besides_weights(tmp_path):
    pytest.importorskip("learn2learn")
    config = make_config("metasgd", "dense", **SETTINGS)
    assert run_into(config, tmp_path / "run").error is None
    done = command("export", tmp_path / "run", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "not exported" in read_manifest(tmp_path / "out")["about"]["inner_steps"]


@pytest.mark.hosts
@pytest.mark.parametrize("algorithm", ["protonet", "metaoptnet", "maml"])
def test_an_export_is_in_the_mode_that_was_scored(algorithm, tmp_path):
    pytest.importorskip("learn2learn")
    more = {"backbone": "conv4"} if algorithm == "metaoptnet" else {}
    config = make_config(algorithm, "dense", **SETTINGS, **more)
    assert run_into(config, tmp_path / "run").error is None
    done = command("export", tmp_path / "run", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    [run] = read_folder(tmp_path / "run").runs
    net = restored_network(run, load_images("glyphs", "test"))
    scored_in_training = algorithm == "maml"
    assert all(module.training == scored_in_training for module in net.modules())
    assert read_manifest(tmp_path / "out")["network"]["training"] == scored_in_training
