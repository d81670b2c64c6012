"""The ``l2l-prune`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
except ImportError as error:  # pragma: no cover - needs an environment without the extra
    raise SystemExit(
        f'l2l-prune: {error}; the command needs: pip install "l2l-prune[experiments]"'
    ) from None

import l2l_prune

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
    iterations: Annotated[int, typer.Option(min=20, help="Meta-iterations of each run.")] = 400,
    sparsity: Annotated[
        float, typer.Option(help="Fraction pruned in the sparse phases, in (0, 1).")
    ] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and tasks.")] = 0,
    eval_tasks: Annotated[int, typer.Option(min=2, help="Tasks behind each accuracy.")] = 200,
) -> None:
    """Train dense, DSD and IHT Reptile side by side on rendered characters."""
    from l2l_prune.experiments.demo import run_demo

    if not 0 < sparsity < 1:
        raise typer.BadParameter(f"{sparsity} is not in (0, 1)", param_hint="--sparsity")
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is a file, not a folder", param_hint="--out")
    console = Console()
    try:
        run_demo(
            out,
            iterations=iterations,
            sparsity=sparsity,
            seed=seed,
            eval_tasks=eval_tasks,
            console=console,
        )
    except KeyboardInterrupt:
        console.print("stopped by Ctrl-C; nothing of this run was written")
        raise typer.Exit(130) from None


def main() -> None:
    """Entry point of the console script."""
    app()
