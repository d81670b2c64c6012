"""The ``l2l-prune`` command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

try:
    import typer
    from rich.console import Console
except ImportError as error:  # pragma: no cover - needs an environment without the extra
    raise SystemExit(
        f'l2l-prune: {error}; the command needs: pip install "l2l-prune[experiments]"'
    ) from None

import l2l_prune
from l2l_prune.experiments.config import Phases, RunConfig, make_config
from l2l_prune.experiments.methods import (
    CANDIDATES,
    STUDY_CHOOSES,
    STUDY_METHODS,
    STUDY_RATES,
    TUNE_CHOOSES,
    TUNE_RATES,
)
from l2l_prune.experiments.options import (
    AlgorithmOption,
    CandidatesOption,
    ClusterOption,
    ConfigOption,
    DataOption,
    DownloadOption,
    HoursOption,
    JobsOption,
    LoggerOption,
    MethodOption,
    RatesOption,
    RootOption,
    TensorboardOption,
    baseline_first,
    check_sparsity,
    check_used,
    chosen_logger,
    plain_errors,
)
from l2l_prune.experiments.paper import EXPERIMENTS, experiment
from l2l_prune.experiments.settings import takes_settings
from l2l_prune.experiments.toml_files import read_toml
from l2l_prune.fewshot.data import DATA_SETS
from l2l_prune.fewshot.data.images import check_files

if TYPE_CHECKING:
    from l2l_prune.experiments.report.comparisons import Comparison

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Network pruning for meta-learning.",
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Network pruning for meta-learning (DSD and IHT for Reptile and other meta-learners)."""
    if version:
        typer.echo(f"l2l-prune {l2l_prune.__version__}")
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results, curves and weights.")] = Path(
        "runs/demo"
    ),
    iterations: Annotated[int, typer.Option(min=20, help="Meta-iterations of each run.")] = 300,
    sparsity: Annotated[float, typer.Option(help="Fraction that DSD prunes.")] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and tasks.")] = 0,
    eval_tasks: Annotated[int, typer.Option(min=2, help="Tasks behind each score.")] = 60,
) -> None:
    """Train Reptile on rendered characters: dense, with DSD, sparse from the start, and small."""
    from l2l_prune.experiments.demo import run_demo

    check_sparsity(sparsity)
    with plain_errors(out):
        run_demo(
            out,
            iterations=iterations,
            sparsity=sparsity,
            seed=seed,
            eval_tasks=eval_tasks,
            console=Console(),
        )


@app.command()
@takes_settings(Phases, RunConfig, own={"final_tasks": "--eval-tasks"})
def run(
    context: typer.Context,
    algorithm: AlgorithmOption = "reptile",
    method: MethodOption = ["dsd"],  # noqa: B006 - typer copies it
    data: DataOption = "glyphs",
    data_root: RootOption = None,
    download: DownloadOption = False,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of weights and tasks, or the first of --seeds.")
    ] = 0,
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of seeds; with several, the table shows means.")
    ] = 1,
    jobs: JobsOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results.", show_default="runs/ALGORITHM-METHODS"),
    ] = None,
    logger: LoggerOption = None,
    tensorboard: TensorboardOption = False,
    config: ConfigOption = None,
    **settings: Any,
) -> None:
    """Train a meta-learner with one or more pruning methods, over one seed or several.

    Repeat a stopped command to resume it: runs go on from their checkpoints, finished ones stay.
    """
    from l2l_prune.experiments.running.compare_one_seed import compare_one_seed
    from l2l_prune.experiments.running.compare_seeds import compare_seeds
    from l2l_prune.experiments.running.run import check_splits

    check_sparsity(settings["sparsity"])
    check_used(context, algorithm, method)
    logger = chosen_logger(logger, tensorboard)
    out = out or Path("runs") / "-".join((algorithm, *method))
    settings |= {"data": data, "data_root": str(data_root) if data_root else None}
    with plain_errors(out):
        configs = [
            make_config(algorithm, kind, seed=number, **settings)
            for number in range(seed, seed + seeds)
            for kind in sorted(set(method), key=baseline_first)
        ]
        check_files(
            data, held_out=configs[0].held_out, **configs[0].data_options, download=download
        )
        check_splits(configs)
        jobs = _jobs(jobs, configs[0].ranks)
        if seeds == 1:
            compare_one_seed(configs, out, Console(), jobs, logger)
        else:
            typer.echo(compare_seeds(configs, out, Console(), jobs, logger))


@app.command()
def sweep(
    file: Annotated[
        Path,
        typer.Argument(help=r"TOML file with the tables \[base], \[grid] and \[\[comparison]]."),
    ],
    out: Annotated[Path, typer.Option(help="Folder; each run gets a folder in it.")] = Path(
        "runs/sweep"
    ),
    jobs: JobsOption = None,
    cluster: ClusterOption = None,
    logger: LoggerOption = None,
    tensorboard: TensorboardOption = False,
) -> None:
    """Run every combination of the settings in a TOML file.

    The file's table base holds the settings of `run` that all runs share. Its grid tables hold
    lists of values, and may hold seeds = N, or replicates = N for seeds with a split of the classes
    each. Its comparison tables state what `report --plan` is to judge.
    Repeat a stopped sweep to resume it; a failed run does not stop the others.
    """
    from l2l_prune.experiments.running.sweep import check_arms, expand

    logger = chosen_logger(logger, tensorboard)
    with plain_errors(out):
        document = read_toml(file)
        stated = _comparisons(file, document)
        try:
            configs = expand(document.get("base", {}), document.get("grid", {}))
            unknown = check_arms(configs, stated)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from None
        if unknown:
            typer.echo(
                f"{file}: comparisons name {', '.join(unknown)}, which no run has as a setting: "
                "report --plan cannot judge them",
                err=True,
            )
        check_files(configs[0].data, held_out=configs[0].held_out, **configs[0].data_options)
        _run_all(configs, out, jobs, cluster, logger)


@app.command()
@takes_settings(Phases, RunConfig, own={"final_tasks": "--eval-tasks"}, hidden=TUNE_CHOOSES)
def tune(
    algorithm: AlgorithmOption = "reptile",
    method: CandidatesOption = list(CANDIDATES),  # noqa: B006 - typer copies it
    rate: RatesOption = list(TUNE_RATES),  # noqa: B006
    data: DataOption = "glyphs",
    data_root: RootOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and tasks.")] = 0,
    max_size: Annotated[
        str | None, typer.Option(help="Largest stored size, such as 100KB.", show_default="none")
    ] = None,
    max_macs: Annotated[
        str | None,
        typer.Option(help="Most multiply-adds per image, such as 2.5M.", show_default="none"),
    ] = None,
    max_ms: Annotated[
        float | None,
        typer.Option(
            help="Longest forward pass of one image, in ms on one thread.", show_default="none"
        ),
    ] = None,
    races: Annotated[int, typer.Option(min=1, help="Races, of nine candidates each.")] = 3,
    hours: HoursOption = None,
    jobs: JobsOption = None,
    out: Annotated[Path, typer.Option(help="Folder of the search, which resumes from it.")] = Path(
        "runs/tune"
    ),
    config: ConfigOption = None,
    **settings: Any,
) -> None:
    """Choose the method, rate and phases that do best within a budget of size or time.

    It takes the settings of `run` that it does not choose itself, any meta-learner and any data.
    Choices are made on validation tasks; only the winner is scored on test tasks, once. Repeat a
    stopped search to resume it.
    """
    from l2l_prune.experiments.search.choice import tune as search
    from l2l_prune.experiments.search.costs import Budget, quantity

    with plain_errors(out):
        size, macs = (None if text is None else quantity(text) for text in (max_size, max_macs))
        base = _base(algorithm, data, data_root, settings) | {"seed": seed}
        search(
            base,
            out,
            Console(),
            methods=method,
            rates=rate,
            races=races,
            budget=Budget(size, macs, max_ms),
            hours=hours,
            jobs=_jobs(jobs, settings.get("ranks") or 1),
        )


@app.command()
@takes_settings(Phases, RunConfig, own={"final_tasks": "--eval-tasks"}, hidden=STUDY_CHOOSES)
def study(
    algorithm: AlgorithmOption = "reptile",
    method: CandidatesOption = list(STUDY_METHODS),  # noqa: B006 - typer copies it
    rate: RatesOption = list(STUDY_RATES),  # noqa: B006
    width: Annotated[
        list[int] | None, typer.Option(min=1, help="Channels to study; repeat the option.")
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(min=1, help="Meta-iterations to study; repeat the option.")
    ] = None,
    classes: Annotated[
        list[int] | None, typer.Option(min=1, help="Training classes to study; repeat the option.")
    ] = None,
    data: DataOption = "glyphs",
    data_root: RootOption = None,
    seed: Annotated[
        int,
        typer.Option(min=0, help="Seed of the races, below 100; replicates use 100, 101, ..."),
    ] = 0,
    replicates: Annotated[
        int, typer.Option(min=2, help="Number of seeds, each with its own split of the classes.")
    ] = 8,
    fixed_split: Annotated[
        bool, typer.Option("--fixed-split", help="Use one split of the classes for all replicates.")
    ] = False,
    hours: HoursOption = None,
    jobs: JobsOption = None,
    out: Annotated[Path, typer.Option(help="Folder of the study, which resumes from it.")] = Path(
        "runs/study"
    ),
    config: ConfigOption = None,
    **settings: Any,
) -> None:
    """Find out whether pruning helps on your data, by how much, and how sure that is.

    Methods and rates race on validation tasks; the best are repeated over seeds and splits, next to
    dense networks of the full size, the same size and the same time. Repeat a stopped study to
    resume it.
    """
    from l2l_prune.experiments.search.verdict import study as find_out

    with plain_errors(out):
        base = _base(algorithm, data, data_root, settings) | {"seed": seed}
        verdict = find_out(
            base,
            out,
            Console(),
            methods=method,
            rates=rate,
            widths=width or (),
            lengths=length or (),
            classes=classes or (),
            replicates=replicates,
            hours=hours,
            jobs=_jobs(jobs, settings.get("ranks") or 1),
            fixed_split=fixed_split,
        )
        typer.echo(verdict)


def _base(
    algorithm: str, data: str, data_root: Path | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """The given arguments of ``make_config``, after a check that the data files are there."""
    base = {"algorithm": algorithm, "data": data, **settings}
    base["data_root"] = str(data_root) if data_root else None
    base = {name: value for name, value in base.items() if value is not None}
    check_files(data, **make_config(method="dense", **base).data_options)
    return base


@app.command()
def paper(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(EXPERIMENTS)}.")],
    data: Annotated[
        str | None,
        typer.Option(
            help=f"One of {', '.join(DATA_SETS)}.",
            show_default="the paper's with --data-root, else glyphs",
            rich_help_panel="What",
        ),
    ] = None,
    data_root: RootOption = None,
    download: DownloadOption = False,
    scale: Annotated[
        float, typer.Option(help="Factor on the meta-iterations, and so on every phase.")
    ] = 1.0,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 1,
    shots: Annotated[
        list[int], typer.Option(min=1, help="Support examples per class; repeat the option.")
    ] = [1, 5],  # noqa: B006 - typer copies it
    train_classes: Annotated[int | None, typer.Option(min=2, help="Classes to train on.")] = None,
    eval_tasks: Annotated[
        int | None,
        typer.Option(min=2, help="Tasks behind each score.", show_default="by algorithm"),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where to train and evaluate: cpu, cuda, or cuda:1.")
    ] = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="Folder for runs and report.", show_default="runs/NAME")
    ] = None,
    jobs: JobsOption = None,
    cluster: ClusterOption = None,
    logger: LoggerOption = None,
    tensorboard: TensorboardOption = False,
) -> None:
    """Run everything behind a table or figure of the paper, and write the report.

    The published settings take days; --scale 0.01 is shorter and keeps the shape of the schedules.
    Repeat a stopped command to resume it.
    """
    from l2l_prune.experiments.report.report import write_report
    from l2l_prune.experiments.running.sweep import expand

    logger = chosen_logger(logger, tensorboard)
    out = out or Path("runs") / name
    with plain_errors(out):
        base, grids = experiment(name, data or (None if data_root or download else "glyphs"))
        base |= {"scale": scale, "train_classes": train_classes, "final_tasks": eval_tasks}
        base |= {"data_root": str(data_root) if data_root else None, "device": device}
        configs = expand(base, [{**grid, "shots": shots, "seeds": seeds} for grid in grids])
        check_files(configs[0].data, **configs[0].data_options, download=download)
        _run_all(configs, out, jobs, cluster, logger)
        for path in write_report(out):
            typer.echo(f"wrote {path}")


def _jobs(jobs: int | None, ranks: int = 1) -> int:
    """The given number of runs at once, by default as many as the free cores have room for."""
    from l2l_prune.experiments.running.cores import free_cores

    return jobs or max(1, free_cores() // ranks)


def _comparisons(file: Path, document: dict[str, Any]) -> list[Comparison]:
    """The comparisons that a sweep's file, or a plan, states."""
    if not document.keys() <= {"base", "grid", "comparison"}:
        raise ValueError(f"{file} may hold only the tables [base], [grid] and [[comparison]]")
    if "comparison" not in document:
        return []
    from l2l_prune.experiments.report.comparisons import read_comparisons

    try:
        return read_comparisons(document["comparison"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None


def _run_all(
    configs: list[RunConfig], out: Path, jobs: int | None, cluster: str | None, logger: str | None
) -> None:
    """A sweep; where runs failed, it says so and ends the command."""
    from l2l_prune.experiments.running.run import check_splits
    from l2l_prune.experiments.running.sweep import sweep as run_all

    check_splits(configs)
    if jobs is None and cluster != "slurm":
        jobs = _jobs(jobs, max(config.ranks for config in configs))
    outcomes = run_all(configs, out, Console(), jobs=jobs, cluster=cluster, logger=logger)
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed:
        typer.echo(f"{len(failed)} of {len(outcomes)} runs failed: see error.txt in their folders")
        raise typer.Exit(1)


@app.command()
def data(
    folder: Annotated[Path, typer.Argument(help="Folder of your images.")],
    split: Annotated[
        int | None,
        typer.Option(
            min=0, help="Seed that splits the classes.", show_default="the folder's own split, or 0"
        ),
    ] = None,
    sheet: Annotated[Path, typer.Option(help="The contact sheet, a PNG file.")] = Path(
        "contact-sheet.png"
    ),
) -> None:
    """Show what `--data folder` finds: classes, counts, sizes, splits, and a contact sheet.

    Only the headers of the files are read: a truncated file is found when it is decoded.
    """
    from l2l_prune.fewshot.data.overview import contact_sheet, look, split_lines

    with plain_errors(sheet.absolute().parent, hint="--sheet"):
        found = look(folder)
        typer.echo("\n".join(found.lines()))  # also of splits that cannot be used
        typer.echo("\n".join(split_lines(found.source, split)))
        drawn = contact_sheet(folder, sheet)
        typer.echo(f"wrote {sheet}: the first pictures of {drawn} classes")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a sweep, or of run --seeds.")],
    plan: Annotated[
        Path | None,
        typer.Option(
            help=r"TOML file with \[\[comparison]] tables to judge; it may be the sweep's own."
        ),
    ] = None,
    adaptation: Annotated[
        bool,
        typer.Option(
            "--adaptation",
            help="Also measure what adapting costs the reptile runs, which takes minutes.",
        ),
    ] = False,
) -> None:
    """Write report.md and report.html: tables, curves and differences over seeds."""
    from l2l_prune.experiments.report.report import write_report

    with plain_errors(folder, hint="FOLDER"):
        stated = _comparisons(plan, read_toml(plan)) if plan else []
        if plan and not stated:
            raise ValueError(f"{plan} states no [[comparison]]")
        if adaptation:
            from l2l_prune.experiments.exporting import measure_adaptation

            measure_adaptation(folder)
        for path in write_report(folder, stated, plan):
            typer.echo(f"wrote {path}")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option(help="Folder for model.safetensors and export.json.")],
    half: Annotated[bool, typer.Option("--half", help="Write half precision.")] = False,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Also write model.onnx, checked in ONNX Runtime.")
    ] = False,
    program: Annotated[
        bool, typer.Option("--program", help="Also write model.pt2, for torch.export.load.")
    ] = False,
) -> None:
    """Write the network of a run for a device: packed tensors and JSON, without code.

    Nothing is written unless everything can be.
    """
    from l2l_prune.experiments.exporting import export_run

    with plain_errors(out):
        for line in export_run(folder, out, half=half, onnx=onnx, program=program):
            typer.echo(line)


def main() -> None:
    """Entry point of the console script.

    This process and its children use one thread each, unless ``OMP_NUM_THREADS`` says otherwise: on
    a busy machine threads wait for each other, which makes a run many times slower.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    app()
