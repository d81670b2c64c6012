"""The ``l2l-prune`` command."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

try:
    import typer
    from rich.console import Console
except ImportError as error:  # pragma: no cover - needs an environment without the extra
    raise SystemExit(
        f'l2l-prune: {error}; the command needs: pip install "l2l-prune[experiments]"'
    ) from None

import l2l_prune
from l2l_prune.data import DATA_SETS
from l2l_prune.data.images import check_files
from l2l_prune.experiments.config import DEFAULTS, SCHEDULES, make_config

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


AlgorithmOption = Annotated[
    str, typer.Option(help=f"One of {', '.join(DEFAULTS)}.", rich_help_panel="What")
]
ScheduleOption = Annotated[
    list[str],
    typer.Option(
        help=f"One of {', '.join(SCHEDULES)}; repeat the option to compare.",
        rich_help_panel="What",
    ),
]
DataOption = Annotated[
    str, typer.Option(help=f"One of {', '.join(DATA_SETS)}.", rich_help_panel="What")
]
RootOption = Annotated[
    Path | None, typer.Option(help="Folder of the data set's files.", rich_help_panel="What")
]
SparsityOption = Annotated[
    float,
    typer.Option(help="Fraction pruned in the sparse phases, in (0, 1).", rich_help_panel="What"),
]
PublishedOption = Annotated[
    bool,
    typer.Option(
        "--published",
        help="Start from the published settings (reptile, cavia, metaoptnet).",
        rich_help_panel="Settings",
    ),
]


def _setting(help_text: str, least: int | None = 1) -> Any:
    return typer.Option(
        min=least,
        help=help_text,
        show_default="by algorithm",
        rich_help_panel="Settings",
    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text())
        return values
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Options from a TOML file, as defaults: what is given on the command line wins."""
    if path is None:
        return None
    try:
        values = _read_toml(path)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    known = {parameter.name for parameter in context.command.params} - {"config", "help"}
    values = {key.replace("-", "_"): value for key, value in values.items()}
    if unknown := sorted(values.keys() - known):
        raise typer.BadParameter(
            f"{path} sets {', '.join(unknown)}; there are {', '.join(sorted(map(str, known)))}"
        )
    context.default_map = values
    return path


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        help="TOML file of options (underscores or dashes); the command line wins.",
        callback=_read_config,
        is_eager=True,
        rich_help_panel="Settings",
    ),
]


@contextmanager
def _plain_errors(out: Path) -> Iterator[None]:
    """What a user can mend is told in a line; Ctrl-C leaves quietly."""
    from l2l_prune.experiments.side_by_side import RunFailed

    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is a file, not a folder", param_hint="--out")
    try:
        yield
    except (ValueError, FileNotFoundError, ImportError, RunFailed) as error:
        typer.echo(f"l2l-prune: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo(
            "stopped by Ctrl-C; nothing of this run was written, but its checkpoints, if any"
        )
        raise typer.Exit(130) from None


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results, curves and weights.")] = Path(
        "runs/demo"
    ),
    iterations: Annotated[int, typer.Option(min=20, help="Meta-iterations of each run.")] = 400,
    sparsity: SparsityOption = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and tasks.")] = 0,
    eval_tasks: Annotated[int, typer.Option(min=2, help="Tasks behind each accuracy.")] = 200,
) -> None:
    """Train dense, DSD and IHT Reptile side by side on rendered characters."""
    from l2l_prune.experiments.demo import run_demo

    _check_sparsity(sparsity)
    with _plain_errors(out):
        run_demo(
            out,
            iterations=iterations,
            sparsity=sparsity,
            seed=seed,
            eval_tasks=eval_tasks,
            console=Console(),
        )


@app.command()
def run(
    algorithm: AlgorithmOption = "reptile",
    schedule: ScheduleOption = ["dsd"],  # noqa: B006 - typer copies it
    data: DataOption = "glyphs",
    data_root: RootOption = None,
    download: Annotated[
        bool,
        typer.Option(
            "--download",
            help="Let learn2learn download missing files to --data-root.",
            rich_help_panel="What",
        ),
    ] = False,
    sparsity: SparsityOption = 0.5,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of weights and tasks, or the first of --seeds.")
    ] = 0,
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of seeds; with more than one, a table over them.")
    ] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, one thread each.")] = 2,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results.", show_default="runs/ALGORITHM-SCHEDULES"),
    ] = None,
    config: ConfigOption = None,
    published: PublishedOption = False,
    scale: Annotated[
        float, typer.Option(help="Factor on the meta-iterations.", rich_help_panel="Settings")
    ] = 1.0,
    transductive: Annotated[
        bool,
        typer.Option(
            help="Let batch statistics see all queries of a task together.",
            rich_help_panel="Settings",
        ),
    ] = True,
    select: Annotated[
        str,
        typer.Option(
            help="Weights to score at the end: last, or best on validation tasks.",
            rich_help_panel="Settings",
        ),
    ] = "last",
    iterations: Annotated[int | None, _setting("Meta-iterations.", 20)] = None,
    ways: Annotated[int | None, _setting("Classes of a task.", 2)] = None,
    shots: Annotated[int | None, _setting("Support examples of a class at evaluation.")] = None,
    train_shots: Annotated[int | None, _setting("Support examples of a class in training.")] = None,
    train_classes: Annotated[int | None, _setting("Classes to train on.")] = None,
    channels: Annotated[int | None, _setting("Channels of conv4.")] = None,
    tasks: Annotated[int | None, _setting("Tasks in a meta-iteration.")] = None,
    inner_steps: Annotated[int | None, _setting("Inner steps in training.")] = None,
    inner_lr: Annotated[float | None, _setting("Learning rate of the inner steps.", None)] = None,
    meta_lr: Annotated[float | None, _setting("Meta step, or outer learning rate.", None)] = None,
    eval_tasks: Annotated[int | None, _setting("Tasks behind each accuracy.", 2)] = None,
    backbone: Annotated[str | None, _setting("conv4 or resnet12 (metaoptnet).", None)] = None,
    drop_block: Annotated[
        bool | None,
        typer.Option(
            help="DropBlock in resnet12.",
            show_default="in dense runs only",
            rich_help_panel="Settings",
        ),
    ] = None,
) -> None:
    """Train any meta-learner under any pruning schedules, over one seed or several.

    A stopped command can be repeated: runs go on from their checkpoints, finished ones are kept.
    """
    from l2l_prune.experiments.compare import compare
    from l2l_prune.experiments.demo import run_and_report
    from l2l_prune.experiments.storage import locked_folder

    _check_sparsity(sparsity)
    out = out or Path("runs") / "-".join((algorithm, *schedule))
    settings: dict[str, Any] = {
        "iterations": iterations,
        "sparsity": sparsity,
        "published": published,
        "scale": scale,
        "transductive": transductive,
        "select": select,
        "data": data,
        "data_root": str(data_root) if data_root else None,
        "ways": ways,
        "shots": shots,
        "train_shots": train_shots,
        "train_classes": train_classes,
        "channels": channels,
        "tasks": tasks,
        "inner_steps": inner_steps,
        "inner_lr": inner_lr,
        "meta_lr": meta_lr,
        "final_tasks": eval_tasks,
        "backbone": backbone,
        "drop_block": drop_block,
    }
    with _plain_errors(out):
        configs = [
            make_config(algorithm, kind, seed=number, **settings)
            for number in range(seed, seed + seeds)
            for kind in sorted(set(schedule), key=_baseline_first)
        ]
        check_files(data, data_root, download=download)
        with locked_folder(out):
            if seeds == 1:
                run_and_report(configs, out, Console(), jobs, out / "checkpoints")
            else:
                typer.echo(compare(configs, out, Console(), jobs))


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="TOML file with the tables [base] and [grid].")],
    out: Annotated[Path, typer.Option(help="Folder; each run gets one in it.")] = Path(
        "runs/sweep"
    ),
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, one thread each.")] = 2,
    cluster: Annotated[
        str | None, typer.Option(help="Hand the runs to submitit: local or slurm.")
    ] = None,
) -> None:
    """Run a grid of settings: [base] as of `run`, [grid] with lists of values, and seeds = N.

    A stopped sweep can be repeated; a failed run does not stop the others.
    """
    from l2l_prune.experiments.sweep import expand
    from l2l_prune.experiments.sweep import sweep as run_all

    with _plain_errors(out):
        document = _read_toml(file)
        if not document.keys() <= {"base", "grid"}:
            raise ValueError(f"{file} must hold the tables [base] and [grid], and nothing else")
        configs = expand(document.get("base", {}), document.get("grid", {}))
        check_files(configs[0].data, configs[0].data_root)
        outcomes = run_all(configs, out, Console(), jobs=jobs, cluster=cluster)
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed:
        typer.echo(f"{len(failed)} of {len(outcomes)} runs failed: see error.txt in their folders")
        raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a sweep, or of run --seeds.")],
) -> None:
    """Write report.md and report.html: tables, curves and differences over seeds."""
    from l2l_prune.experiments.report import write_report

    with _plain_errors(folder):
        for path in write_report(folder):
            typer.echo(f"wrote {path}")


def _baseline_first(schedule: str) -> int:
    return SCHEDULES.index(schedule) if schedule in SCHEDULES else -1  # refused by make_config


def _check_sparsity(sparsity: float) -> None:
    if not 0 < sparsity < 1:
        raise typer.BadParameter(f"{sparsity} is not in (0, 1)", param_hint="--sparsity")


def main() -> None:
    """Entry point of the console script."""
    app()
