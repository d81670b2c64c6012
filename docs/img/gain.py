"""Draw the start page's picture from docs/results/glyphs.csv: ``python docs/img/gain.py``."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt

from l2l_prune.experiments.report.plots import TEST, TRAIN

HERE = Path(__file__).parent
METHODS = ("dense", "DSD 50%", "IHT 50%", "DSD 80%", "IHT 80%")


def main() -> None:
    with (HERE.parent / "results" / "glyphs.csv").open() as file:
        rows = [
            r for r in csv.DictReader(file) if (r["channels"], r["iterations"]) == ("64", "400")
        ]
    fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for place, method in enumerate(METHODS):
        train, test = (
            100 * mean(float(r[which]) for r in rows if r["method"] == method)
            for which in ("train", "test")
        )
        ax.plot([place, place], [test, train], color="0.6", lw=6, solid_capstyle="round", zorder=1)
        ax.plot(place, train, "o", ms=10, color=TRAIN, label=None if place else "training tasks")
        ax.plot(place, test, "s", ms=10, color=TEST, label=None if place else "test tasks")
        ax.text(place + 0.1, (train + test) / 2, f"gap {train - test:.1f}", va="center")
    ax.set_xticks(range(len(METHODS)), METHODS)
    ax.set(ylabel="accuracy [%]", xlim=(-0.4, len(METHODS) - 0.3))
    ax.legend(frameon=False, ncols=2, loc="upper right")
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(HERE / "gain.png", dpi=150)


if __name__ == "__main__":
    main()
