"""One page from a folder of runs: tables in the paper's form, curves, differences over seeds."""

from __future__ import annotations

import base64
import html
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from l2l_prune._files import replace_file
from l2l_prune.evaluation import paired_difference
from l2l_prune.experiments.compare import WORDS, OverSeeds
from l2l_prune.experiments.plots import curves_by_rate
from l2l_prune.experiments.results import signed

Key = tuple[str, ...]


def write_report(folder: Path) -> list[Path]:
    """Write ``report.md``, ``report.html`` (one self-contained file) and the figures.

    Args:
        folder: What ``l2l-prune sweep`` or ``run --seeds`` filled; all runs in it count.

    Returns:
        The files.

    Raises:
        ValueError: If there is no finished run in the folder, or a ``results.json`` is damaged.
    """
    runs = collect(folder)
    figures = []
    for setting, mine in _grouped(runs, _setting).items():
        path = folder / f"curves-{'-'.join(setting).replace(' ', '')}.png"
        curves_by_rate(_grouped(mine, lambda run: (_method(run),)), path, title=_title(mine[0]))
        figures.append((path, _title(mine[0])))
    sections = [_section(mine) for mine in _grouped(runs, _data_key).values()]
    markdown = folder / "report.md"
    with replace_file(markdown) as temporary:
        pictures = "\n".join(f"![{title}]({path.name})\n" for path, title in figures)
        parts = [
            f"## {title}\n\nMean ± 95% confidence interval over seeds.\n\n"
            f"{_table(rows, 'github')}\n\n{notes}\n"
            for title, rows, notes in sections
        ]
        temporary.write_text("\n".join(["# Runs\n", *parts, pictures]))
    page = folder / "report.html"
    with replace_file(page) as temporary:
        temporary.write_text(_page(sections, figures), encoding="utf-8")
    return [markdown, page, *(path for path, _ in figures)]


def collect(folder: Path) -> list[dict[str, Any]]:
    """The finished runs below a folder, in the order of their names."""
    runs: list[dict[str, Any]] = []
    for file in sorted(folder.glob("*/results.json")):
        try:
            runs += json.loads(file.read_text())["runs"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error!r}): run it again") from None
    if not runs:
        raise ValueError(f"there is no finished run in {folder}")
    return runs


def _section(runs: list[dict[str, Any]]) -> tuple[str, list[dict[str, str]], str]:
    """Title, rows and notes of the runs on one data set with one algorithm."""
    rows, notes = [], []
    for (size, method), mine in _grouped(runs, lambda r: (_size(r), _method(r))).items():
        row = {"method": method, "backbone": size}
        for (shots,), same in sorted(_grouped(mine, lambda r: (str(_config(r)["shots"]),)).items()):
            baseline = [
                r
                for r in runs
                if _method(r) == "dense" and _size(r) == size and str(_config(r)["shots"]) == shots
            ]
            values = {part: _over_seeds(same, part) for part in ("train", "test")}
            gap = paired_difference(values["train"], values["test"])
            head = f"{shots}-shot"
            row |= {
                f"{head} train": str(values["train"]),
                f"{head} test": str(values["test"]),
                f"{head} gap": str(gap),
                "seeds": str(len(same)),
            }
            if method != "dense":
                notes.append(_note(f"{method}, {size}, {head}", same, baseline))
        rows.append(row)
    first = _config(runs[0])
    title = f"{first['algorithm']} on {first['data']}, {first['ways']}-way: accuracy [%]"
    return title, rows, "\n".join(f"- {note}" for note in notes)


def _note(what: str, runs: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> str:
    """The paired difference to the dense runs of the same seeds and tasks."""
    dense = {_config(r)["seed"]: r for r in baseline}
    pairs = [(r, dense[_config(r)["seed"]]) for r in runs if _config(r)["seed"] in dense]
    if not pairs:
        return f"{what}: no dense run of the same seeds to compare with"
    mine, theirs = zip(*pairs, strict=True)
    told = []
    for part in ("train", "test"):
        found = paired_difference(_over_seeds(mine, part), _over_seeds(theirs, part))
        told.append(f"{part} {signed(found)} ({found.verdict(*WORDS[part])})")
    return f"{what}, minus dense, paired over {len(pairs)} seeds: {', '.join(told)}"


def _page(sections: Iterable[Any], figures: Iterable[tuple[Path, str]]) -> str:
    body = []
    for title, rows, notes in sections:
        items = "".join(f"<li>{html.escape(note[2:])}</li>" for note in notes.splitlines())
        body.append(
            f"<h2>{html.escape(title)}</h2><p>Mean ± 95% confidence interval over seeds.</p>"
            f"{_table(rows, 'html')}<ul>{items}</ul>"
        )
    for path, title in figures:
        data = base64.b64encode(path.read_bytes()).decode()
        body.append(f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">')
    style = (
        "body{font:16px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse}td,th{padding:.3em .8em;border-bottom:1px solid #bbb;"
        "text-align:left}img{max-width:100%}"
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>l2l_prune report</title>'
        f"<style>{style}</style><h1>Runs</h1>{''.join(body)}</html>\n"
    )


def _table(rows: list[dict[str, str]], form: str) -> str:
    return tabulate(rows, headers="keys", tablefmt=form, disable_numparse=True, missingval="-")


def _over_seeds(runs: Iterable[dict[str, Any]], part: str) -> OverSeeds:
    return OverSeeds(tuple(run[part]["mean"] for run in runs))


def _config(run: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = run["config"]
    return config


def _method(run: dict[str, Any]) -> str:
    segments = _config(run)["schedule"]["segments"]
    rates = [segment["sparsity"] for segment in segments if segment["sparse"]]
    name = str(_config(run)["name"])
    if not rates:
        return name
    per_layer = any(isinstance(rate, list) for rate in rates)
    return f"{name} per layer" if per_layer else f"{name} {100 * max(rates):.0f}%"


def _size(run: dict[str, Any]) -> str:
    config = _config(run)
    return "-".join([str(config["channels"])] * 4) if config["backbone"] == "conv4" else "ResNet-12"


def _data_key(run: dict[str, Any]) -> Key:
    return str(_config(run)["algorithm"]), str(_config(run)["data"]), str(_config(run)["ways"])


def _setting(run: dict[str, Any]) -> Key:
    return (*_data_key(run), _size(run), f"{_config(run)['shots']}-shot")


def _title(run: dict[str, Any]) -> str:
    algorithm, data, ways, size, shots = _setting(run)
    return f"{algorithm} on {data}, {ways}-way {shots}, {size}"


def _grouped(runs: Iterable[dict[str, Any]], key: Any) -> dict[Key, list[dict[str, Any]]]:
    groups: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return dict(groups)
