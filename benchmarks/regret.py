"""The regret of ``tune``: its choice against the best of all its candidates, trained in full.

By validation tasks. Takes hours, and resumes: ``python -m benchmarks.regret runs/regret``.
"""

from pathlib import Path

import typer
from rich.console import Console

from l2l_prune.experiments.search.choice import Budget, Space, tune
from l2l_prune.experiments.search.halving import Candidate, Runs, Standing
from l2l_prune.experiments.search.sensitivity import Sensitivity


def main(
    out: Path, methods: str = "dsd,rigl,cubic", rates: str = "0.5,0.8,0.9", iterations: int = 1000
) -> None:
    base = {"algorithm": "reptile", "channels": 32, "iterations": iterations, "final_tasks": 300}
    kinds, shares = methods.split(","), [float(rate) for rate in rates.split(",")]
    tuned = tune(base, out, Console(), methods=kinds, rates=shares)
    space = Space(base, kinds, shares, (1, 28, 28), Budget(), out / "milliseconds.json")
    space.add_layer_rates(Sensitivity.read(out / "sensitivity.json"))
    grid = [Candidate({**base, "method": "dense"}), *space.candidates()]
    # In the folder of the search: what it has trained in full is not trained again.
    runs = Runs(out / "runs", Console(), jobs=2, hours=None, clock=out / "grid.json")
    entries = runs.finish([candidate.whole for candidate in grid])
    ends = [Standing(c, iterations, e) for c, e in zip(grid, entries, strict=True) if e]
    best = max(ends, key=lambda end: end.score.mean)
    print(f"{len(ends)} of {len(grid)} candidates finished; dense: {ends[0].score}")
    print(f"chosen: {tuned.title}, {tuned.validation}; best: {best.candidate.title}, {best.score}")
    print(f"regret: {100 * (best.score.mean - tuned.validation.mean):.1f} points")


if __name__ == "__main__":
    typer.run(main)
