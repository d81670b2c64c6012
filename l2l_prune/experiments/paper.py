"""The paper's tables and figures: the grid of runs behind each."""

from __future__ import annotations

from typing import Any

from l2l_prune._basics import checks
from l2l_prune.schedules.paper import DSDSchedule, IHTSchedule

Grid = dict[str, Any]

WIDTHS = (32, 64, 128, 256)
DENSE: Grid = {"method": "dense"}
BOTH: Grid = {"method": ["dsd", "iht"]}


def _widths(data: str) -> list[Grid]:
    """Each width dense, and at the rates that the paper found best for it."""
    grids: list[Grid] = []
    for width in WIDTHS:
        dsd = DSDSchedule.paper(data, channels=width).sparsity
        iht = IHTSchedule.paper(data, channels=width).sparsity
        grids += [
            {**DENSE, "channels": width},
            {"method": "dsd", "channels": width, "sparsity": dsd},
            {"method": "iht", "channels": width, "sparsity": iht},
        ]
    return grids


def _ablations() -> list[Grid]:
    grids: list[Grid] = []
    for width, rate in ((64, 0.4), (128, 0.6)):
        pruned = {**BOTH, "channels": width, "sparsity": rate}
        grids += [{**DENSE, "channels": width}, pruned]
        grids += [{**pruned, "retrain": 0.0}, {**pruned, "pretrain": 0.0}]
    return grids


EXPERIMENTS: dict[str, tuple[str, list[Grid]]] = {
    "table1": ("mini-imagenet", _widths("mini-imagenet")),
    "table2": ("tiered-imagenet", _widths("tiered-imagenet")),
    "table3": ("mini-imagenet", _ablations()),
    "table4": (
        "mini-imagenet",
        [
            {**DENSE, "algorithm": "metaoptnet"},
            {"algorithm": "metaoptnet", "method": "dsd", "sparsity": 0.2},
            {**DENSE, "algorithm": "cavia"},
            {**BOTH, "algorithm": "cavia", "sparsity": 0.1},
        ],
    ),
    "figure1": ("mini-imagenet", [DENSE, {**BOTH, "sparsity": [0.1, 0.2, 0.3, 0.4]}]),
    "figure2": (
        "mini-imagenet",
        [DENSE, {**BOTH, "sparsity": 0.4}, {**BOTH, "sparsity": 0.4, "retrain": 0.0}],
    ),
    "figure3": (
        "mini-imagenet",
        [
            DENSE,
            {"method": "dsd", "sparsity": 0.3},
            {"method": "dsd", "sparsity": 0.3, "pretrain": [0.1, 0.2, 0.4, 0.5]},
            {"method": "dsd", "sparsity": 0.3, "retrain": [0.0, 0.05, 0.2, 0.3, 0.4]},
        ],
    ),
    "figure4": (
        "mini-imagenet",
        [
            DENSE,
            {"method": "iht", "sparsity": 0.4},
            {"method": "iht", "sparsity": 0.4, "retrain": [0.1, 0.5, 0.75]},
            {"method": "iht", "sparsity": 0.4, "rounds": [2, 8, 16]},
        ],
    ),
}
"""Data set of the paper and grids of :func:`~l2l_prune.experiments.running.sweep.expand`, by table
or figure. Where the paper does not print the values that a figure varies, ours span the range in
its text (Section 5.2)."""


def experiment(name: str, data: str | None = None) -> tuple[Grid, list[Grid]]:
    """Base and grids of a table or figure in the published settings.

    Args:
        name: A key of :data:`EXPERIMENTS`.
        data: Data set; the paper's by default.

    Raises:
        ValueError: If there is no such table or figure.
    """
    checks.one_of("name", name, EXPERIMENTS)
    own_data, grids = EXPERIMENTS[name]
    base = {"algorithm": "reptile", "published": True, "data": data or own_data}
    return base, grids
