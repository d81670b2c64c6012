"""The opening of a report: what was run, the results in words, and what all runs share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from statistics import fmean

from l2l_prune.experiments.config import RunConfig
from l2l_prune.experiments.defaults import DEFAULTS
from l2l_prune.experiments.report import same_settings
from l2l_prune.experiments.report.comparisons import Judged
from l2l_prune.experiments.report.finished_runs import (
    FinishedRun,
    Replicate,
    by_method,
    grouped,
    mean_weights,
    over_seeds,
)
from l2l_prune.experiments.report.seed_statistics import WORDS, OverSeeds, amount
from l2l_prune.experiments.report.tables import dense_partner
from l2l_prune.fewshot.evaluation import paired_difference

_NEAR = 0.01
"""How far below dense a smaller or faster method may score and still be named (fraction, or dB)."""

_SMALLER, _FASTER = 0.7, 0.9
"""Largest share of dense's weights or seconds at which a method counts as smaller or faster."""

_ALIKE = 1.25
"""Largest ratio of weights at which two networks count as equally large."""


def title(runs: Sequence[FinishedRun]) -> str:
    """``"reptile on glyphs, 5-way: dense, DSD 50%, IHT 50%"``; of many methods their number."""
    problems = list(dict.fromkeys(run.problem_title for run in runs))
    methods = list(by_method(runs))
    between = "; " if any(", " in method for method in methods) else ", "
    named = between.join(methods) if len(methods) <= 4 else f"{len(methods)} methods"
    return f"{problems[0] if len(problems) == 1 else f'{len(problems)} problems'}: {named}"


def shared_by_all(runs: Sequence[FinishedRun]) -> str:
    """What all runs have in common, in a sentence."""
    settings = [same_settings.identity(run.config) for run in runs]
    varying = {*same_settings.varying(settings), "name", "schedule", *same_settings.MASKS}
    lengths = sorted({run.iterations for run in runs})
    parts = []
    if len(lengths) == 1:
        parts.append(f"{lengths[0]:,} meta-iterations")
    defaults = {name: field.default for name, field in RunConfig.__dataclass_fields__.items()}
    defaults |= DEFAULTS[str(runs[0].config["algorithm"])]
    for name, value in settings[0].items():
        unset = value is None or value == defaults.get(name, ...)
        if name not in varying and (name in ("backbone", "channels") or not unset):
            parts.append(same_settings.in_words(name, value))
    seeds, replicates = ({getattr(run, by) for run in runs} for by in ("seed", "replicate"))
    parts.append(f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {next(iter(seeds))}")
    if len(replicates) > len(seeds):
        parts.append(f"{len(replicates)} replicates with splits of their own")
    return f"All runs: {', '.join(parts)}."


def answer(runs: Sequence[FinishedRun], judged: Sequence[Judged]) -> list[str]:
    """Whether pruning paid, in sentences.

    Args:
        runs: All runs.
        judged: The stated comparisons. Without any, the sentences are derived from the runs, and
            say that they are exploration.
    """
    return _stated(judged) if judged else _explored(runs)


def _stated(judged: Sequence[Judged]) -> list[str]:
    dense = [  # a margin asks for no gain
        one
        for one in judged
        if one.comparison.control.get("name") == "dense" and not one.comparison.margin
    ]
    better = [one for one in dense if one.verdict == "better"]
    head = (
        f"**{len(better)} of {len(dense)} stated gains over dense networks are confirmed.**"
        if better
        else "**No stated gain over dense networks is confirmed.**"
    )
    return [head] * bool(dense) + [
        f"- {one.comparison.title}: {amount(one.difference)} over "
        f"{len(one.difference.values)} replicates: {one.verdict}."
        for one in judged
    ]


def _explored(runs: Sequence[FinishedRun]) -> list[str]:
    lines = []
    problems = grouped(runs, lambda run: run.shared_settings)
    compared = 0
    for same in problems.values():
        of_replicate = grouped(same, lambda run: run.replicate)
        rivals = [_Rival(m, mine, of_replicate) for m, mine in by_method(same).items()]
        rivals = [rival for rival in rivals if rival.pairs and not rival.runs[0].baseline]
        if not rivals:
            continue
        compared += len(rivals)
        where = f"In {same[0].title}, of" if len(problems) > 1 else "Of"
        methods = "1 method" if len(rivals) == 1 else f"{len(rivals)} methods"
        best = max(rivals, key=lambda rival: rival.difference.mean)
        over = "over" if best.difference.mean >= 0 else "against"
        lines.append(
            f"- {where} {methods} compared with dense, **{best.method}** does best: "
            f"{amount(best.difference)} {over} dense ({best.verdict})."
        )
        near = [r for r in rivals if r.difference.mean >= -_NEAR]
        smaller = [r for r in near if r.size is not None and r.size <= _SMALLER]
        if smaller:
            least = min(smaller, key=lambda rival: rival.size or 0.0)
            lines.append(
                f"- The smallest that loses no more than {_read(least.difference, _NEAR)} is "
                f"**{least.method}**: {100 * (least.size or 0):.0f}% of dense's weights, "
                f"{least.in_words}."
            )
        faster = [r for r in near if r.time <= _FASTER]
        if faster:
            least = min(faster, key=lambda rival: rival.time)
            lines.append(
                f"- The fastest that loses no more than {_read(least.difference, _NEAR)} is "
                f"**{least.method}**: {100 * least.time:.0f}% of dense's seconds, {least.in_words}."
            )
    lines += _at_equal_size(runs)
    if not lines:
        return []
    words = "comparisons were" if compared > 1 else "comparison was"
    return [
        *lines,
        f"- The {words} not stated beforehand, and nothing is corrected for how many there are "
        f"({compared}): take this as exploration.",
    ]


class _Rival:
    """A method beside the dense runs of its setting."""

    def __init__(
        self,
        method: str,
        runs: list[FinishedRun],
        of_replicate: Mapping[Replicate, list[FinishedRun]],
    ) -> None:
        self.method, self.runs = method, runs
        self.pairs = [(r, d) for r in runs if (d := dense_partner(r, of_replicate[r.replicate]))]

    @property
    def difference(self) -> OverSeeds:
        ours, theirs = zip(*self.pairs, strict=True)
        return paired_difference(over_seeds(ours, "test"), over_seeds(theirs, "test"))

    @property
    def verdict(self) -> str:
        return self.difference.verdict(*WORDS["test"])

    @property
    def in_words(self) -> str:
        return f"{amount(self.difference)} ({self.verdict})"

    @property
    def size(self) -> float | None:
        """Weights that are not 0, as a share of dense's."""
        ours, theirs = (mean_weights(side) for side in zip(*self.pairs, strict=True))
        return ours / theirs if ours and theirs else None

    @property
    def time(self) -> float:
        ours, theirs = (
            fmean(run.entry["seconds"] for run in side) for side in zip(*self.pairs, strict=True)
        )
        return ours / theirs


def _at_equal_size(runs: Sequence[FinishedRun]) -> list[str]:
    """Sparse networks minus dense ones of other widths with as many weights."""
    lines = []

    def but_width(run: FinishedRun) -> object:
        settings = same_settings.shared_settings(run.config)
        return same_settings.frozen({k: v for k, v in settings.items() if k != "channels"})

    for same in grouped(runs, but_width).values():
        dense = grouped((r for r in same if r.baseline), lambda run: run.config["channels"])
        ranked = by_method(run for run in same if run.pruned)
        sparse = {
            (method, width): of_width
            for method, mine in ranked.items()
            for width, of_width in grouped(mine, lambda run: run.config["channels"]).items()
        }
        for ((method, width), ours), (narrow, theirs) in product(sparse.items(), dense.items()):
            weights, other = mean_weights(ours), mean_weights(theirs)
            replicates = {run.replicate: run for run in theirs}
            pairs = [
                (run, replicates[run.replicate]) for run in ours if run.replicate in replicates
            ]
            if narrow >= width or not weights or not other or not pairs:
                continue
            if max(weights / other, other / weights) > _ALIKE:
                continue
            left, right = zip(*pairs, strict=True)
            found = paired_difference(over_seeds(left, "test"), over_seeds(right, "test"))
            lines.append(
                f"- With as many weights: **{method}** ({weights:,.0f}) minus dense with "
                f"{narrow} channels ({other:,.0f}): {amount(found)} "
                f"({found.verdict(*WORDS['test'])})."
            )
    return lines


def _read(difference: OverSeeds, value: float) -> str:
    measure = difference.measure
    return measure.difference(f"{measure.read(value):g}")
