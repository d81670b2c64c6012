"""Runs that are killed with SIGKILL and started again end bit for bit as if they never were.

``python -m tests.experiments.kills --kills 200 --seed 7`` tries other moments. Each run is forked
from a process that has imported everything, and kills itself at the n-th call of any function in
Python or C: at a moment that a seed repeats. The moments are spread over training, mask
generation, checkpoints, evaluation, results and the report. A killed run is started again by what
a person would repeat; further kills hit that too, until it ends.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from l2l_prune.channels.pruner import ChannelPruner
from l2l_prune.experiments.algorithms.outer_optimizer import Classifier, WithOuterOptimizer
from l2l_prune.experiments.algorithms.reptile import Reptile
from l2l_prune.experiments.config import make_config
from l2l_prune.experiments.report.report import write_report
from l2l_prune.experiments.report.results import write_results
from l2l_prune.experiments.running import run as run_module
from l2l_prune.experiments.running import run_folder
from l2l_prune.experiments.running.checkpoint import save_checkpoint
from l2l_prune.fewshot.data import Glyphs
from l2l_prune.pruner import Pruner
from tests.forks import Calls, ended

PHASES = {
    "training": (Reptile.train, WithOuterOptimizer.train),
    "masks": (
        *(Pruner._new_masks, Pruner._put_masks),
        *(ChannelPruner._choose, ChannelPruner._shrink, ChannelPruner._grow),
    ),
    "checkpoint": (save_checkpoint,),
    "evaluation": (Reptile.evaluate, Classifier.evaluate),
    "results": (write_results,),
    "report": (write_report,),
}
CASES = {
    f"{algorithm}-{schedule}": (algorithm, schedule, {})
    for algorithm in ("reptile", "maml", "metasgd", "cavia")
    for schedule in ("dense", "dsd", "iht")
}
CASES["reptile-channels"] = ("reptile", "dsd", {"structured": True})
CASES["reptile-best"] = ("reptile", "iht", {"select": "best", "dropout": 0.2})


def repeated_command(config, folder):
    """What ``l2l-prune paper`` does with a run: train it or go on, write results and report."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = run_folder.run_into(config, folder)
        assert outcome.error is None, outcome
        write_report(folder)


def attempt(config, folder, kill_at=None, count=True):
    """One start in a forked process; the calls' number and windows, or None if it was killed."""
    note = folder / "calls.json"
    calls = Calls(kill_at, PHASES)

    def work():
        random.seed(0)  # a fork of Python has another state, which no run may depend on
        repeated_command(config, folder)
        sys.setprofile(None)
        note.write_text(json.dumps([calls.count, calls.windows]))

    return json.loads(note.read_text()) if ended(work, calls if count else None) else None


def build_that_tells_its_end(build):
    """The state of everything at the end of training goes to a file: no result holds it all."""

    @functools.wraps(build)
    def wrapped(config, shape):
        algorithm = build(config, shape)
        finalize = algorithm.finalize

        def tell_and_finalize():
            state = {
                "algorithm": algorithm.state_dict(),
                "torch": torch.get_rng_state(),
                "numpy": np.random.get_state()[1].tolist(),
                "python": random.getstate()[1],
            }
            (END / "end.pt").unlink(missing_ok=True)
            torch.save(state, END / "end.pt")
            return finalize()

        algorithm.finalize = tell_and_finalize
        return algorithm

    return wrapped


END = Path()


def bits(value):
    """A value in which every bit counts, also those of NaN and -0."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(part) for part in value]
    return value.hex() if isinstance(value, float) else value


def differences(a, b, path=""):
    """Where two nested values are not the same."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from differences(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for number, parts in enumerate(zip(a, b, strict=True)):
            yield from differences(*parts, f"{path}[{number}]")
    elif a != b:
        yield path


def ends(folder):
    """All that a run leaves but the seconds it took."""
    (place,) = (path for path in folder.iterdir() if path.is_dir())
    results = json.loads((place / "results.json").read_text())
    for entry in results["runs"]:
        del entry["seconds"]
    (weights,) = set(place.glob("*.pt"))
    return {
        "results": bits(results),
        "curves": (place / "curves.csv").read_bytes(),
        "plot": (place / "curves.png").read_bytes(),
        "weights": bits(torch.load(weights, weights_only=True)),
        "state": bits(torch.load(folder / "end.pt", weights_only=True)),
        # Seconds are the last column of the table of scores.
        "report": re.sub(r"[^|\n]*\|$", "", (folder / "report.md").read_text(), flags=re.M),
        "files": sorted(path.name for path in place.iterdir()),
    }


def small_config(algorithm, schedule, options):
    small = {"channels": 4, "tasks": 1, "final_tasks": 2, "curve_tasks": 2, "inner_steps": 1}
    return make_config(algorithm, schedule, iterations=20, **{**small, **options})


def kill_and_compare(name, kills, seed, folder):
    """Run a case to its end, then killed ``kills`` times; the number of kills by phase."""
    global END
    config = small_config(*CASES[name])
    END = whole = folder / f"{name}-whole"
    whole.mkdir()
    total, windows = attempt(config, whole)
    assert all(windows[phase] for phase in PHASES if phase != "masks"), windows
    expected = ends(whole)
    draw = random.Random(f"{name} {seed}")
    phases = [phase for phase in windows if windows[phase]]
    number = list(CASES).index(name)
    start = (number + number // 3) % len(phases)  # the cases together meet every phase
    turns = itertools.cycle(phases[start:] + phases[:start])
    done = Counter()
    while done.total() < kills:
        END = victim = folder / f"{name}-{done.total()}"
        victim.mkdir()
        phase = next(turns)
        moment = draw.randint(*draw.choice(windows[phase]))
        assert attempt(config, victim, moment) is None
        done[phase] += 1
        # Later starts are shorter: one of them may end before its kill.
        while done.total() < kills and attempt(config, victim, draw.randint(1, total // 2)) is None:
            done["a later start"] += 1
        attempt(config, victim, count=False)
        found = ends(victim)
        wrong = list(differences(expected, found))
        assert not wrong, f"{name}, killed in {phase} at call {moment}: {wrong[:5]}"
        shutil.rmtree(victim)
    return done


def main():
    global END
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=56, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", choices=CASES, action="append")
    arguments = parser.parse_args()
    cases = arguments.case or list(CASES)
    torch.set_num_threads(1)
    Glyphs("train")
    run_folder.run = functools.partial(run_module.run, checkpoint_every=3)
    run_module.build = build_that_tells_its_end(run_module.build)
    done = Counter()
    with tempfile.TemporaryDirectory() as folder:
        END = Path(folder) / "imports"  # what is imported late is imported now, for all forks
        END.mkdir()
        for name in {CASES[case][0]: case for case in cases}.values():
            repeated_command(small_config(*CASES[name]), END)
        for number, name in enumerate(cases):
            share = (arguments.kills + number) // len(cases)
            done += kill_and_compare(name, share, arguments.seed, Path(folder))
            print(name, "ends the same", flush=True)
    print(json.dumps(done))


if __name__ == "__main__":
    main()
