"""Most benchmarks by one command: ``python -m benchmarks [--rounds N] [--device cuda] [PART ...]``.

On an idle machine; about 20 minutes on 2 cores.
"""

from __future__ import annotations

import importlib
from typing import Annotated

import torch
import typer

from benchmarks import workload

PARTS = (
    "meta_iteration",
    "overhead",
    "growth",
    "sampling",
    "evaluation",
    "torch_func",
    "ranks",
    "parts",
    "memory",
)
LONG = ("whole_runs",)
"""Hours: only where they are named."""


def main(
    parts: Annotated[
        list[str] | None,
        typer.Argument(help=f"Of {', '.join(PARTS)} (all by default), {', '.join(LONG)}."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Timed rounds of each variant.")] = 15,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; ranks are on the CPU.")] = "cpu",
) -> None:
    """Time the library side by side with its peers and with pure forward and backward passes."""
    for part in parts or PARTS:
        if part not in PARTS + LONG:
            raise typer.BadParameter(f"{part!r} is none of {', '.join(PARTS + LONG)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} cores, {rounds} rounds")
    workload.run_on(device)
    if workload.device().type == "cuda":
        print(f"on {torch.cuda.get_device_name(device)}")
    torch.set_num_threads(1)
    for part in parts or PARTS:
        torch.manual_seed(0)
        importlib.import_module(f"benchmarks.{part}").main(rounds)


if __name__ == "__main__":
    typer.run(main)
