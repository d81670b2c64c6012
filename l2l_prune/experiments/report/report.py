"""One page from a folder of runs: tables in the paper's form, differences, and figures."""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

from markdown_it import MarkdownIt

from l2l_prune._basics.files import replace_file
from l2l_prune.experiments.report.adaptation import adaptation_section
from l2l_prune.experiments.report.comparisons import Comparison, Judged, comparison_table, judge
from l2l_prune.experiments.report.figures import (
    bounds_figure,
    hyperparameter_figure,
    overview_figure,
)
from l2l_prune.experiments.report.finished_runs import (
    FinishedRun,
    FolderRuns,
    by_method,
    grouped,
    read_folder,
)
from l2l_prune.experiments.report.opening import answer, shared_by_all, title
from l2l_prune.experiments.report.plots import curves_by_method
from l2l_prune.experiments.report.tables import difference_table, markdown_table, method_table

_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:80em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.3em .8em;border-bottom:1px solid #bbb;"
    "text-align:left}img{max-width:100%}"
)


def write_report(
    folder: Path, comparisons: Sequence[Comparison] = (), plan: Path | None = None
) -> list[Path]:
    """Write ``report.md``, ``report.html`` (one self-contained file) and the figures.

    Args:
        folder: What ``l2l-prune paper``, ``sweep`` or ``run`` filled; all runs in it count.
        comparisons: What a plan states; the report then opens with it.
        plan: The plan's file, for messages.

    Returns:
        The files.

    Raises:
        ValueError: If there is no run in the folder, a ``results.json`` is damaged, or two hold
            different results of the same settings and seed; or if the runs are not those that a
            comparison names.
    """
    found = read_folder(folder)
    try:
        judged = judge(comparisons, found.runs) if comparisons else []
    except ValueError as error:
        raise ValueError(f"{plan}: {error}" if plan else str(error)) from None
    parts, figures = ["# Runs", *_notes(found)], []
    if any(run.config.get("held_out") == "validation" for run in found.runs):
        parts.append(
            "Runs with held_out validation were scored on validation classes: these "
            "scores stand under *test*, too."
        )
    if found.runs:
        parts[:1] = [f"# {title(found.runs)}", "\n".join(answer(found.runs, judged))]
        parts += [*_stated(judged), shared_by_all(found.runs)]
    names: set[str] = set()
    for mine in grouped(found.runs, lambda run: run.problem).values():
        overview, caption = _overview(mine, folder)
        figures.append(overview)
        parts += [
            f"## {mine[0].problem_title}: {mine[0].measure}",
            f"![{caption}]({overview.name})\n\n{caption}",
            "Mean ± 95% confidence interval over seeds (the paper's: over tasks). Differences are "
            "to dense runs of the same settings, seed and length.",
            method_table(mine),
            difference_table(mine),
        ]
        for same in grouped(mine, lambda run: run.shared_settings).values():
            stem = _stem(same[0].title)
            while stem in names:
                stem += "-"
            names.add(stem)
            written = _figures(same, folder, stem)
            figures += [path for path, _ in written]
            parts.append(f"### {same[0].title}")
            parts += [f"![{title}]({path.name})\n\n{title}" for path, title in written]
    parts += adaptation_section(folder)
    markdown, page = folder / "report.md", folder / "report.html"
    text = "\n\n".join(part for part in parts if part) + "\n"
    with replace_file(markdown) as temporary:
        temporary.write_text(text, encoding="utf-8")
    with replace_file(page) as temporary:
        temporary.write_text(_page(text, folder), encoding="utf-8")
    return [markdown, page, *figures]


def _stated(judged: Sequence[Judged]) -> list[str]:
    if not judged:
        return []
    return [
        "## Stated comparisons: test accuracy in points, PSNR in dB",
        "Mean of the paired differences ± 95% confidence interval over replicates (seed and "
        "split); p-values are of the paired t-test, then corrected by Holm within a family. *Could "
        "be seen*: the true difference that as many replicates find in 80% of studies.",
        comparison_table(judged),
    ]


def _notes(found: FolderRuns) -> list[str]:
    """What the folder holds that is in no table of scores, and why."""
    notes = []
    if found.failed:
        rows = [
            {"run": name, "score": f"none, it failed: {why}"} for name, why in found.failed.items()
        ]
        notes.append(markdown_table(rows))
    if found.copies:
        listed = ", ".join(f"{copy} (of {first})" for copy, first in found.copies.items())
        notes.append(f"Copies, which count as one run with what they copy: {listed}.")
    return notes


def _overview(runs: list[FinishedRun], folder: Path) -> tuple[Path, str]:
    path = folder / f"overview-{_stem(runs[0].problem_title)}.png"
    overview_figure(runs, path)
    score = runs[0].measure.name
    line = "; the line joins dense runs by length" if len({r.iterations for r in runs}) > 1 else ""
    return path, f"Test {score} over training {score}, over time and over size{line}"


def _stem(title: str) -> str:
    """A name for files; a long title ends in its checksum, which file systems bear."""
    stem = re.sub(r"[^a-z0-9]+", "-", title.lower())
    return stem if len(stem) <= 120 else f"{stem[:110]}-{zlib.crc32(title.encode()):08x}"


def _figures(runs: list[FinishedRun], folder: Path, stem: str) -> list[tuple[Path, str]]:
    """Every figure that the runs of one setting have data for, with its caption."""
    score = runs[0].measure.name
    scores = score[0].upper() + score[1:]
    usual = [run for run in runs if run.iterations == run.usual_iterations]
    plain, others = [r for r in usual if r.plain], [r for r in usual if not r.plain]
    written = []
    if plain:
        path = folder / f"curves-{stem}.png"
        curves_by_method(_panels(plain, plain), path, runs[0].title)
        written.append((path, f"{scores} curves by pruning rate, means over seeds"))
    if others and plain:
        path = folder / f"variants-{stem}.png"
        curves_by_method(_panels(plain, others), path, runs[0].title)
        written.append((path, f"{scores} curves of ablations, controls and rivals"))
    for name, draw, caption in (
        ("phases", hyperparameter_figure, f"Test {score} by length of phases and rounds"),
        ("bounds", bounds_figure, "Measured gap, and the bounds of Section 3.3, by sparsity"),
    ):
        path = folder / f"{name}-{stem}.png"
        if draw(runs, path):
            written.append((path, caption))
    return written


def _panels(
    plain: list[FinishedRun], shown: list[FinishedRun]
) -> dict[str, dict[str, list[FinishedRun]]]:
    """A panel for each family that is shown, with dense and the plain runs of the same rates."""
    families = {run.family for run in shown} - {"dense"} or {"dense"}
    if shown is not plain and any(run.family == "dense" for run in shown):
        families.add("dense")
    panels = {}
    for family in sorted(families):
        mine = [run for run in shown if run.family == family]
        rates = {run.rate for run in mine}
        beside = [r for r in plain if r.family == family and r.rate in rates and r not in mine]
        dense = [r for r in plain if r.family == "dense" and r not in mine and r not in beside]
        panels[family] = by_method(dense + beside + mine)
    return panels


def _page(markdown: str, folder: Path) -> str:
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)

    def inline(match: re.Match[str]) -> str:
        data = base64.b64encode((folder / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'src="([^"]+\.png)"', inline, body)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>l2l_prune report</title>'
        f"<style>{_STYLE}</style>{body}</html>\n"
    )
