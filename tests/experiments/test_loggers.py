"""The curves in each logger's files, read back without our code."""

from __future__ import annotations

import json
import struct
import sys

import pytest
from typer.testing import CliRunner

from l2l_prune.experiments.cli import app
from l2l_prune.experiments.config import make_config
from l2l_prune.experiments.run_result import RunResult
from l2l_prune.experiments.running.loggers import LOGGERS
from l2l_prune.experiments.running.run import run

SETTINGS = {"iterations": 20, "channels": 4, "tasks": 1, "final_tasks": 2}


def read(logger, folder):
    return {"tensorboard": scalars, "wandb": wandb_points, "mlflow": mlflow_points}[logger](folder)


def wandb_points(folder):
    """The offline files: records in the format of LevelDB's log, each a protocol buffer."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    points = {}
    for file in sorted(folder.rglob("offline-run-*/*.wandb")):
        data, place = file.read_bytes(), 7
        assert len(data) < 32768  # one block
        while place < len(data):
            _, length, kind = struct.unpack_from("<IHB", data, place)
            assert kind == 1  # a whole record
            record = messages.Record()
            record.ParseFromString(data[place + 7 : place + 7 + length])
            place += 7 + length
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
                step = int(items["_step"])
                for name in items.keys() - {"_step", "_runtime", "_timestamp"}:  # first wins
                    points.setdefault(name, {}).setdefault(step, round(float(items[name]), 5))
    return {name: list(values.items()) for name, values in points.items()}


def mlflow_points(folder):
    client = pytest.importorskip("mlflow.tracking").MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'l2l-prune'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["algorithm"] == "reptile"
    history = {
        name: client.get_metric_history(found.info.run_id, name) for name in found.data.metrics
    }
    return {
        name: [(m.step, round(m.value, 5)) for m in sorted(metrics, key=lambda m: m.step)]
        for name, metrics in history.items()
    }


def scalars(folder):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(folder))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(e.step, round(e.value, 5)) for e in accumulator.Scalars(tag)] for tag in tags}


def expected(curve):
    return {
        "accuracy/train": [(p.iteration, round(p.train.mean, 5)) for p in curve],
        "accuracy/test": [(p.iteration, round(p.test.mean, 5)) for p in curve],
        "accuracy/gap": [(p.iteration, round(p.train.mean - p.test.mean, 5)) for p in curve],
        "sparsity": [(p.iteration, round(p.sparsity, 5)) for p in curve],
    }


@pytest.fixture(autouse=True)
def nothing_is_sent(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("logger", LOGGERS)
def test_a_stopped_and_resumed_run_logs_its_curve_once(tmp_path, logger):
    pytest.importorskip(logger)
    events = tmp_path / "run" / "events"
    config = make_config("reptile", "dsd", **SETTINGS)
    stopped = run(config, tmp_path / "c.pt", checkpoint_every=7, events=events, logger=logger)
    for _ in range(12):  # points at 8, 10 and 12 came after the checkpoint
        next(stopped)
    stopped.close()
    *_, result = run(config, tmp_path / "c.pt", checkpoint_every=7, events=events, logger=logger)
    assert isinstance(result, RunResult)
    assert [p.iteration for p in result.curve] == list(range(2, 21, 2))
    assert read(logger, events) == expected(result.curve)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "sweep"])
@pytest.mark.parametrize("option", ["--tensorboard", *(f"--logger={name}" for name in LOGGERS)])
def test_the_commands_write_them(tmp_path, command, option):
    logger = option.removeprefix("--").removeprefix("logger=")
    pytest.importorskip(logger)
    out = tmp_path / "out"
    if command == "run":
        arguments = ["run", "--schedule", "dense", "--iterations", "20", "--channels", "4"]
        arguments += ["--tasks", "1", "--eval-tasks", "2"]
    else:
        grid = 'schedule = "dense"\nalgorithm = "reptile"\n'
        grid += "".join(f"{key} = {value}\n" for key, value in SETTINGS.items())
        (tmp_path / "grid.toml").write_text(f"[base]\n{grid}")
        arguments = ["sweep", str(tmp_path / "grid.toml")]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out), option])
    assert result.exit_code == 0, result.output
    (file,) = out.rglob("results.json")
    curve = json.loads(file.read_text())["runs"][0]["curve"]
    found = read(logger, file.parent / logger)["accuracy/test"]
    assert found == [(p["iteration"], round(p["test"], 5)) for p in curve]


@pytest.mark.parametrize(
    ("logger", "module"),
    [
        ("tensorboard", "torch.utils.tensorboard"),
        ("wandb", "wandb"),
        ("mlflow", "mlflow.tracking"),
    ],
)
def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path, logger, module):
    monkeypatch.setitem(sys.modules, module, None)
    config = make_config("reptile", "dense", **SETTINGS)
    with pytest.raises(ImportError, match=rf"l2l-prune\[{logger}\]"):
        next(run(config, events=tmp_path, logger=logger))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--logger", "comet"], "logger must be one of"),
        (["--logger", "wandb", "--tensorboard"], "not both"),
    ],
)
def test_bad_options_write_nothing(tmp_path, options, message):
    result = CliRunner().invoke(app, ["run", "--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []
