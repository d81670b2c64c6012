"""Options that several commands share, and how errors are shown to the user."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, get_args

import typer

from l2l_prune._basics import checks
from l2l_prune.experiments.defaults import DEFAULTS
from l2l_prune.experiments.methods import METHODS
from l2l_prune.experiments.running.loggers import LOGGERS, check_logger
from l2l_prune.experiments.toml_files import read_toml, with_new_names
from l2l_prune.fewshot.data import DATA_SETS

AlgorithmOption = Annotated[
    str, typer.Option(help=f"One of {', '.join(DEFAULTS)}.", rich_help_panel="What")
]
MethodOption = Annotated[
    list[str],
    typer.Option(
        "--method",
        "--schedule",
        help=f"One of {', '.join(METHODS)}; repeat the option to compare.",
        rich_help_panel="What",
    ),
]
CandidatesOption = Annotated[
    list[str],
    typer.Option(
        "--method",
        help=f"Candidate methods: {', '.join(name for name in METHODS if name != 'dense')}; "
        "repeat the option.",
        rich_help_panel="What",
    ),
]
RatesOption = Annotated[
    list[float],
    typer.Option(
        "--rate",
        help="Candidate fraction to prune; repeat the option.",
        rich_help_panel="What",
    ),
]
HoursOption = Annotated[
    float | None,
    typer.Option(help="Time limit in hours, restarts included.", show_default="none"),
]
DataOption = Annotated[
    str, typer.Option(help=f"One of {', '.join(DATA_SETS)}.", rich_help_panel="What")
]
RootOption = Annotated[
    Path | None, typer.Option(help="Folder with the data set's files.", rich_help_panel="What")
]
DownloadOption = Annotated[
    bool,
    typer.Option(
        "--download",
        help="Let learn2learn download missing files to --data-root.",
        rich_help_panel="What",
    ),
]
JobsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Runs at once, one thread each.",
        show_default="one for each free core; all on slurm",
    ),
]


def _check_cluster(cluster: str | None) -> str | None:
    if cluster not in (None, "local", "slurm"):
        raise typer.BadParameter(f"{cluster!r} is neither local nor slurm")
    return cluster


ClusterOption = Annotated[
    str | None,
    typer.Option(help="Hand the runs to submitit: local or slurm.", callback=_check_cluster),
]


def _check_logger(name: str | None) -> str | None:
    try:
        return None if name is None else check_logger(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


LoggerOption = Annotated[
    str | None,
    typer.Option(
        help=f"Also log the curves to local files of {', '.join(LOGGERS)}.",
        callback=_check_logger,
    ),
]
TensorboardOption = Annotated[
    bool, typer.Option("--tensorboard", help="The same as --logger tensorboard.")
]


def chosen_logger(logger: str | None, tensorboard: bool) -> str | None:
    """The logger that the two options together name.

    Raises:
        typer.BadParameter: If they name two different ones.
    """
    if tensorboard and logger not in (None, "tensorboard"):
        raise typer.BadParameter(f"give --logger {logger} or --tensorboard, not both")
    return "tensorboard" if tensorboard else logger


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take defaults of the options from a TOML file; the command line overrides them."""
    if path is None:
        return None
    try:
        values = {key.replace("-", "_"): value for key, value in read_toml(path).items()}
        values = with_new_names(values)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    known = {parameter.name for parameter in context.command.params} - {"config", "help"}
    if unknown := sorted(values.keys() - known):
        raise typer.BadParameter(
            f"{path} sets unknown options: {', '.join(unknown)}; the options are "
            f"{', '.join(sorted(map(str, known)))}"
        )
    flags = {p.name for p in context.command.params if getattr(p, "is_flag", False)}
    for key, value in values.items():
        if isinstance(value, bool) and key not in flags:  # which counts as 1
            raise typer.BadParameter(f"{path}: {key} must not be {str(value).lower()}")
        _check_type(context, path, key, value)
    several = {p.name for p in context.command.params if getattr(p, "multiple", False)}
    context.default_map = {
        key: [value] if key in several and isinstance(value, str) else value
        for key, value in values.items()
    }
    return path


_TYPES: dict[type, tuple[tuple[type, ...], str]] = {
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
}


def _check_type(context: typer.Context, path: Path, key: str, value: object) -> None:
    """Refuse text for a number, such as "20", which the command line would convert."""
    if context.command.callback is None:
        return
    annotation = inspect.signature(context.command.callback).parameters[key].annotation
    kind, *_ = get_args(annotation)  # of Annotated
    kinds = {part for each in (kind, *get_args(kind)) for part in (each, *get_args(each))}
    for wanted, (types, words) in _TYPES.items():
        values = value if isinstance(value, list) else [value]
        if wanted in kinds and (wrong := [v for v in values if not isinstance(v, types)]):
            option = "--" + key.replace("_", "-")
            raise typer.BadParameter(
                f"{path} sets it to {checks.describe(wrong[0])}, but it must be {words}",
                param_hint=option,
            )


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        help="TOML file of options (underscores or dashes); the command line overrides it.",
        callback=_read_config,
        is_eager=True,
        rich_help_panel="Settings",
    ),
]


@contextmanager
def plain_errors(out: Path, hint: str = "--out") -> Iterator[None]:
    """Show errors that a user can fix in one line, without a traceback; exit quietly on Ctrl-C.

    Args:
        out: The folder that the command works in.
        hint: The option or argument that names it.
    """
    from l2l_prune.experiments.running.processes import RunFailed
    from l2l_prune.experiments.running.storage import in_words

    try:
        for place in (out, *out.parents):
            if place.exists() and not place.is_dir():
                raise typer.BadParameter(f"{place} is a file, not a folder", param_hint=hint)
        yield
    except (ValueError, OSError, ImportError, MemoryError, RunFailed) as error:
        typer.echo(f"l2l-prune: {in_words(error)}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo(
            "stopped by Ctrl-C; repeat the command to go on, from checkpoints where it trains"
        )
        raise typer.Exit(130) from None


def baseline_first(method: str) -> int:
    """Sort key: dense before the pruned ones."""
    return list(METHODS).index(method) if method in METHODS else -1  # refused by make_config


def check_sparsity(sparsity: float | None) -> None:
    """Refuse a sparsity outside (0, 1)."""
    if sparsity is not None and not 0 < sparsity < 1:
        percent = f": for {sparsity:g}% give {sparsity / 100:g}" if 1 < sparsity < 100 else ""
        raise typer.BadParameter(f"{sparsity} is not in (0, 1){percent}", param_hint="--sparsity")


_OF_PRUNING = (
    *("sparsity", "pretrain", "retrain", "rounds", "ramp", "task_share", "layer_rates"),
    *("criterion", "pattern", "allocation", "rewind", "regrow"),
)
_OF_REPTILE = ("inner_batch", "eval_batch")


def check_used(context: typer.Context, algorithm: str, methods: Iterable[str]) -> None:
    """Refuse options on the command line that none of its runs would use.

    Settings of a file may be shared with other runs, so that these may have no effect.
    """
    for names, idle, why in (
        (_OF_PRUNING, set(methods) == {"dense"}, "dense runs do not prune"),
        (_OF_REPTILE, algorithm != "reptile", "it works only with the algorithm reptile"),
    ):
        for name in names:
            source = context.get_parameter_source(name)
            if idle and source is not None and source.name == "COMMANDLINE":
                option = "--" + name.replace("_", "-")
                raise typer.BadParameter(f"{why}: leave it out", param_hint=option)
