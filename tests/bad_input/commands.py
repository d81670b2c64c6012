"""The command: options, files and folders; it ends with code 2, a line, and no traceback."""

from __future__ import annotations

import re
from contextlib import ExitStack
from unittest import mock

from typer.testing import CliRunner

from l2l_prune.experiments.cli import app
from tests.bad_input.case import Case

WORK = (
    "l2l_prune.experiments.demo.run_demo",
    "l2l_prune.experiments.running.compare_one_seed.compare_one_seed",
    "l2l_prune.experiments.running.compare_seeds.compare_seeds",
    "l2l_prune.experiments.running.sweep.sweep",
    "l2l_prune.fewshot.data.glyphs.render_glyphs",
)


class Refused(Exception):
    """What the command said before it ended with code 2."""


def command(*words):
    def act(scene):
        with ExitStack() as stack:
            for entry in WORK:  # a command that is not refused ends here, and not in minutes
                stack.enter_context(mock.patch(entry, side_effect=AssertionError("it started")))
            result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, list(words))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        if result.exit_code == 2:
            raise Refused(" ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split()))
        raise AssertionError(f"it ended with {result.exit_code}: {result.output}")

    return act


def file(name, content):
    def scene(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return {}

    return scene


def folder_called(name):
    def scene(folder):
        (folder / name).mkdir()
        return {}

    return scene


def told(name, words, line, scene=None):
    more = {} if scene is None else {"scene": scene}
    return Case(name, command(*line.split()), Refused, words, ours=False, **more)


def config(name, words, text):
    return told(name, words, "run --config run.toml", file("run.toml", text))


def sweep(name, words, text):
    return told(name, words, "sweep grid.toml", file("grid.toml", text))


GRID = '[base]\nalgorithm = "reptile"\n[grid]\nschedule = ["dsd"]\n'
CASES = [
    told("an unknown command", "No such command 'train'", "train"),
    told("an unknown option", "No such option.*--sparsty", "run --sparsty 0.5"),
    told("an option without its value", "--sparsity", "run --sparsity"),
    told(
        "the command's unknown algorithm", "algorithm .*reptile.*'mamml'", "run --algorithm mamml"
    ),
    told("the command's unknown schedule", "method .*dense.*'sdd'", "run --schedule sdd"),
    told("the command's unknown data", "data .*glyphs.*'cub'", "run --data cub"),
    told("--sparsity 50%", "--sparsity", "run --sparsity 50%"),
    told(
        "--sparsity 50",
        r"--sparsity.*50\.0 is not in \(0, 1\): for 50% give 0\.5",
        "run --sparsity 50",
    ),
    told("--sparsity nan", "--sparsity.*nan", "run --sparsity nan"),
    told("--sparsity of the demo", r"--sparsity.*1\.5", "demo --sparsity 1.5"),
    told(
        "--sparsity of dense runs",
        "--sparsity: dense runs do not prune: leave it out",
        "run --method dense --sparsity 0.5",
    ),
    told("--rounds of dense runs", "--rounds: dense", "run --method dense --rounds 5"),
    told("--regrow of dense runs", "--regrow: dense", "run --method dense --regrow random"),
    told(
        "--inner-batch of MAML",
        "--inner-batch: it works only with the algorithm reptile",
        "run --algorithm maml --inner-batch 5",
    ),
    told("--iterations many", "--iterations", "run --iterations many"),
    told("--iterations 3", "make the run longer", "run --iterations 3"),
    told(
        "--iterations 10 of iht",
        "method iht with iterations=10, pretrain=0.2, retrain=0.25, rounds=4: retrain, 25% of 2 "
        "iterations, would get none: make the run longer, or take fewer rounds",
        "run --method iht --iterations 10",
    ),
    told(
        "--rounds of a short cyclic",
        "method cyclic with iterations=9, pretrain=0.2, rounds=7: a ramp does not .* fewer rounds",
        "run --method cyclic --iterations 9 --rounds 7",
    ),
    told("--seeds 0", "--seeds", "run --seeds 0"),
    told("--seed -1", "--seed", "run --seed -1"),
    told("--jobs 0", "--jobs", "run --jobs 0"),
    told("--ways 1", "ways must be >= 2", "run --ways 1"),
    told("--inner-lr -1", "inner_lr .*-1", "run --inner-lr -1"),
    told("--meta-lr nan", "meta_lr .*nan", "run --meta-lr nan"),
    told("--scale 0", "scale .*0", "run --scale 0"),
    told("--select test", "select .*'test'", "run --select test"),
    told("--backbone vgg", "backbone .*'vgg'", "run --backbone vgg"),
    told("--published for anil", "published settings for", "run --published --algorithm anil"),
    told("a benchmark without --data-root", "fc100 needs .*--data-root", "run --data fc100"),
    told("--data-root that is empty", r"FC100_train\.pickle", "run --data fc100 --data-root ."),
    told("--out a file", "--out.*a.txt.*is a file", "run --out a.txt", file("a.txt", "")),
    told("--out below a file", "a.txt", "run --out a.txt/runs", file("a.txt", "")),
    told("no such --config", "--config.*: no.toml: No such file or dir", "run --config no.toml"),
    told(
        "--config a folder", "--config.*here.*directory", "run --config here", folder_called("here")
    ),
    config("config with a slip", "run.toml.*line 1", "iterations = = 3"),
    config("config not in UTF-8", "run.toml.*utf-8", b'algorithm = "r\xe9ptile"'),
    config(
        "config with an unknown key",
        "run.toml sets unknown options: lerning_rate; the options are",
        "lerning_rate = 1",
    ),
    config("config with a table", "run.toml sets unknown options: run", "[run]\nways = 5"),
    config("config with words for a number", "--iterations", 'iterations = "many"'),
    config(
        "config with a number in quotes",
        "--iterations: run.toml sets it to '20', but it must be an integer",
        'iterations = "20"',
    ),
    config(
        "config with a rate in quotes",
        "--inner-lr: run.toml sets it to '0.1', but it must be a number",
        'inner-lr = "0.1"',
    ),
    config(
        "config with yes in quotes",
        "--bf16: run.toml sets it to 'yes', but it must be true or false",
        'bf16 = "yes"',
    ),
    config("config with part of an integer", "--ways: .*5.5, but .* an integer", "ways = 5.5"),
    told(
        "study's config with a rate in quotes",
        "--rate: study.toml sets it to '0.5', but it must be a number",
        "study --config study.toml",
        file("study.toml", 'rate = [0.3, "0.5"]'),
    ),
    config("config with a list for a number", "--ways", "ways = [2, 3]"),
    config("config with half a seed", "--seeds", "seeds = 1.5"),
    config("config with a yes for a number", "ways must not be true", "ways = true"),
    config("config with a word for yes", "--transductive", 'transductive = "maybe"'),
    config("config with a number for a name", "algorithm.*5", "algorithm = 5"),
    config("config with an unknown schedule", "method .*'sdd'", 'schedule = "sdd"'),
    told("no such sweep", "l2l-prune: no.toml: No such file", "sweep no.toml"),
    told("sweep a folder", "here.*directory", "sweep here", folder_called("here")),
    sweep("sweep with a slip", "grid.toml: Expected", "[base"),
    sweep("sweep with another table", r"\[base\], \[grid\]", GRID + "[run]\n"),
    sweep("sweep of an empty file", "algorithm and method must be given", ""),
    sweep("sweep without a table", r"\[base\], \[grid\]", 'algorithm = "reptile"'),
    sweep("sweep with a base that is no table", "base .*table.*3", "base = 3"),
    sweep("sweep with no values", "sparsity .*empty", GRID + "sparsity = []"),
    sweep("sweep with listed seeds", "seeds .*seed = ", GRID + "seeds = [0, 1]"),
    sweep("sweep with words for a number", "ways .*'five'", GRID + 'ways = ["five"]'),
    told(
        "a folder without --data-root",
        "data=folder needs the folder .*--data-root",
        "run --data folder",
    ),
    told(
        "pictures of no folder",
        "there is no folder nowhere",
        "run --algorithm field --data pictures --data-root nowhere",
    ),
    told(
        "a folder without classes",
        "neither class folders nor pictures",
        "run --data folder --data-root .",
    ),
    told(
        "--image-size of a benchmark",
        "image_size .*and folder: .*fc100",
        "run --image-size 28 --data fc100",
    ),
    told("--skip-damaged of glyphs", "skip_damaged .*only with data=folder", "run --skip-damaged"),
    told(
        "--split of a benchmark",
        "split works only with glyphs, pictures and folder",
        "run --split 1 --data fc100",
    ),
    told("data of no folder", "there is no folder nowhere", "data nowhere"),
    told("data of an empty folder", "neither class folders nor pictures", "data ."),
    sweep("sweep over unknown data", "data .*'cub'", GRID + 'data = ["glyphs", "cub"]'),
    told(
        "an unknown cluster",
        "--cluster.*'cloud' is neither local nor slurm",
        "sweep grid.toml --cluster cloud",
        file("grid.toml", GRID),
    ),
    told("an unknown table of the paper", "table1.*'table9'", "paper table9"),
    told("--shots 0 of the paper", "--shots", "paper table1 --shots 0"),
    told(
        "report of an empty folder", "no finished run in here", "report here", folder_called("here")
    ),
    told("report of no folder", "no finished run in nowhere: .*no such folder", "report nowhere"),
    told("export without --out", "Missing option '--out'", "export here", folder_called("here")),
    told("export of no folder", "there is no folder nowhere", "export nowhere --out out"),
    told(
        "export of an empty folder",
        "there is no finished run in here",
        "export here --out out",
        folder_called("here"),
    ),
    told(
        "export of a file",
        "there is no folder a.txt",
        "export a.txt --out out",
        file("a.txt", ""),
    ),
    told("export to a file", "a.txt is a file", "export here --out a.txt", file("a.txt", "")),
    told("export with a rate", "No such option.*--sparsity", "export here --sparsity 0.5"),
    told(
        "the cost of adapting nothing",
        "no finished run in here",
        "report here --adaptation",
        folder_called("here"),
    ),
    told("report of a file", "a.txt is a file", "report a.txt", file("a.txt", "")),
]
