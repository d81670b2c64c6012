"""Settings of runs and sweeps, and the files that runs leave."""

from __future__ import annotations

import json

from l2l_prune.experiments.config import RunConfig, make_config
from l2l_prune.experiments.methods import make_schedule
from l2l_prune.experiments.paper import experiment
from l2l_prune.experiments.report.report import write_report
from l2l_prune.experiments.running.storage import finished_run
from l2l_prune.experiments.running.sweep import expand
from l2l_prune.schedules.paper import Schedule, Segment
from tests.bad_input.case import Case


def made(name, words, error=ValueError, algorithm="reptile", schedule="dsd", **settings):
    return Case(name, lambda s: make_config(algorithm, schedule, **settings), error, words)


HELD = {"dropout": 0.1, "dropout_per": "task"}
MGAUG = {"schedule": "dense", "mgaug": "catfish"}

CONFIG = [
    made("an unknown algorithm", "algorithm .*reptile.*'mamml'", algorithm="mamml"),
    made("an unknown schedule", "method .*dense.*'sdd'", schedule="sdd"),
    made("a setting that is none", "there is no setting wayz", wayz=5),
    made("a percentage of a run", r"sparsity .*50", sparsity=50),
    made("a rate in words", "sparsity .*'0.5'", TypeError, sparsity="0.5"),
    made("a run in words", "iterations .*'400'", TypeError, iterations="400"),
    made("a run of nothing", "iterations .*0", iterations=0),
    made("a scale in words", "scale .*'1%'", TypeError, scale="1%"),
    made("a scale that leaves nothing", "scale=1e-06 .*400", scale=1e-6),
    made("a run too short for its phases", "longer", iterations=2),
    made("phases longer than the run", "pretrain=0.8 and retrain=0.5", pretrain=0.8, retrain=0.5),
    made("no published settings", "published settings for", algorithm="anil", published=True),
    made("a device that is none", "device .*cpu or cuda.*'gpu'", device="gpu"),
    made("a device without numbers", "device .*'meta'", device="meta"),
    made("a device in numbers", "device .*0", TypeError, device=0),
    made("ranks on a GPU", "ranks .*device=cuda", device="cuda", ranks=5),
    made("one way", "ways .*1", ways=1),
    made("ways of a run in words", "ways .*'5'", TypeError, ways="5"),
    made("half a channel", "channels .*0.5", TypeError, channels=0.5),
    made("no shots of a run", "shots .*0", shots=0),
    made("a seed below 0", "seed .*-1", seed=-1),
    made("no tasks of a run", "tasks .*0", tasks=0),
    made("one task at the end", "final_tasks .*1", final_tasks=1),
    made("an inner rate of a run NaN", "inner_lr .*nan", inner_lr=float("nan")),
    made("a meta rate of a run below 0", "meta_lr .*-0.1", meta_lr=-0.1),
    made("transductive in words", "transductive .*'no'", TypeError, transductive="no"),
    made("dropout of everything", "dropout .*1", dropout=1),
    made("dropout elsewhere", "dropout.* only .*reptile", algorithm="maml", dropout=0.1),
    made("held dropout without a rate", "dropout_per .*set dropout", dropout_per="task"),
    made("a dropout of nobody", "dropout_per .*step, task.*'run'", dropout_per="run"),
    made("DropGrad of everything", r"drop_grad .*\[0, 1\)", drop_grad=1),
    made("noise without DropGrad", "drop_grad_noise .*set drop_grad", drop_grad_noise="bernoulli"),
    made("DropGrad elsewhere", "drop_grad.* only .*reptile", algorithm="maml", drop_grad=0.1),
    made("DropGrad compiled", "compile .*drop_grad", drop_grad=0.1, compile=True),
    made("DropGrad on ranks", "drop_grad.*leave ranks out", drop_grad=0.1, ranks=5),
    made("held dropout compiled", "compile .*task", compile=True, **HELD),
    made("held dropout with channels", "structured .*task", structured=True, **HELD),
    made("MGAug of nobody", "mgaug .*catfish.*'all'", schedule="dense", mgaug="all"),
    made("MGAug of a sparse model", "mgaug .*method dense", mgaug="catfish"),
    made("MGAug with task masks", "mgaug .*method dense", schedule="task-masks", mgaug="width"),
    made("MGAug without a way", "set mgaug", schedule="dense", mgaug_rate=0.1),
    made("MGAug of nothing", r"mgaug_rate .*\(0, 1\)", **{**MGAUG, "mgaug_rate": 0.0}),
    made("MGAug without networks", "mgaug_networks .*1", **{**MGAUG, "mgaug_networks": 0}),
    made("MGAug with held dropout", "mgaug .*dropout_per", **MGAUG, **HELD),
    made("MGAug with channels", "mgaug .*structured", **MGAUG, structured=True),
    made("MGAug of contexts", "mgaug works only .*protonet", algorithm="cavia", **MGAUG),
    made("layers of nobody", "layers .*'first'", layers="first"),
    made("an unknown data set of a run", "data .*glyphs.*'cub'", data="cub"),
    made("resnet12 in Reptile", "resnet12 works only with .*metaoptnet", backbone="resnet12"),
    made("a criterion of nobody", "criterion .*'worst'", criterion="worst"),
    made("an allocation of nobody", "allocation .*'fair'", allocation="fair"),
    made("regrowth of nobody", "regrow .*'all'", regrow="all"),
    made("the best on test tasks", "select .*'test'", select="test"),
    Case("a config at a rate", lambda s: RunConfig("x", 0.5), TypeError, "schedule .*0.5"),
    Case(
        "a config without a name",
        lambda s: RunConfig("", Schedule([Segment(1)])),
        ValueError,
        "name",
    ),
    Case(
        "a fraction of a phase in words",
        lambda s: make_schedule("dsd", 100, pretrain="0.3"),
        TypeError,
        "pretrain .*'0.3'",
    ),
    Case(
        "half a round", lambda s: make_schedule("iht", 100, rounds=2.5), TypeError, "rounds .*2.5"
    ),
    Case(
        "a table that is not in the paper",
        lambda s: experiment("table9"),
        ValueError,
        "table1.*'table9'",
    ),
]

BASE = {"algorithm": "reptile", "schedule": "dsd"}


def swept(name, words, grid, base=BASE, error=ValueError):
    return Case(name, lambda s: expand(base, grid), error, words)


SWEEP = [
    swept("a sweep of nothing", "algorithm and method must be given", {}, {}),
    swept("a sweep over an unknown setting", "there is no setting wayz", {"wayz": [5]}),
    swept("a sweep of no values", "sparsity .*empty", {"sparsity": []}),
    swept(
        "seeds listed",
        r"seeds must be an integer, got \[0, 1, 2\].*seed = ",
        {"seeds": [0, 1, 2]},
        error=TypeError,
    ),
    swept("seeds in words", "seeds .*'3'", {"seeds": "3"}, error=TypeError),
    swept("no seeds", "seeds .*0", {"seeds": 0}),
    swept("seeds twice", "seeds or seed", {"seeds": 2, "seed": [4, 5]}),
    swept("a base that is no table", "base .*table.*3", {}, base=3, error=TypeError),
    swept("a grid that is no table", "grid .*table.*'dsd'", "dsd", error=TypeError),
    swept("a list of no grids", "grid .*table.*4", [4], error=TypeError),
    swept("one bad value of many", "ways .*'x'", {"ways": [5, "x"]}, error=TypeError),
]

RUN = {
    "config": json.loads(json.dumps(make_config("reptile", "dense").to_json())),
    "train": {"mean": 0.9, "ci95": 0.1, "per_task": [0.9]},
    "test": {"mean": 0.8, "ci95": 0.1, "per_task": [0.8]},
    "seconds": 1.0,
    "curve": [],
}


def results(text):
    def scene(folder):
        (folder / "one").mkdir()
        (folder / "one" / "results.json").write_text(text, encoding="utf-8")
        return {"folder": folder}

    return scene


def damaged(name, text):
    words = r"one.results\.json is damaged"
    return [
        Case(
            f"{name} for a report",
            lambda s: write_report(s.folder),
            ValueError,
            words,
            results(text),
        ),
        Case(
            f"{name} to go on from",
            lambda s: finished_run(s.folder / "one", make_config("reptile", "dense")),
            ValueError,
            words,
            results(text),
        ),
    ]


def run_without(key):
    return json.dumps({"runs": [{k: v for k, v in RUN.items() if k != key}]})


FILES = [
    *damaged("results cut short", '{"runs": [{"config"'),
    *damaged("results of nothing", ""),
    *damaged("results that are a list", "[1, 2]"),
    *damaged("results without runs", "{}"),
    *damaged("results of no run", '{"runs": [3]}'),
    *damaged("results without settings", run_without("config")),
    *damaged("results without an accuracy", run_without("test")),
    *damaged("results in words", json.dumps({"runs": [{**RUN, "train": {"mean": "high"}}]})),
    Case(
        "a report of nothing",
        lambda s: write_report(s.folder),
        ValueError,
        "no finished run in",
        lambda folder: {"folder": folder / "nowhere"},
    ),
    Case(
        "results of another run",
        lambda s: finished_run(s.folder / "one", make_config("reptile", "iht")),
        ValueError,
        r"results\.json .*other settings",
        results(json.dumps({"runs": [RUN]})),
    ),
]

CASES = CONFIG + SWEEP + FILES
