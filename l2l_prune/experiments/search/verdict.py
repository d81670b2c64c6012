"""Does pruning help here? Races on validation tasks, a plan, its runs, and a written verdict."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from l2l_prune._basics import checks
from l2l_prune._basics.files import replace_file
from l2l_prune.experiments.methods import STUDY_CHOOSES, STUDY_METHODS, STUDY_RATES
from l2l_prune.experiments.report import same_settings
from l2l_prune.experiments.report.comparisons import (
    Comparison,
    Judged,
    check_statsmodels,
    judge,
    matching,
    read_comparisons,
)
from l2l_prune.experiments.report.finished_runs import FinishedRun, mean_weights, read_folder
from l2l_prune.experiments.report.report import write_report
from l2l_prune.experiments.report.seed_statistics import amount
from l2l_prune.experiments.report.tables import markdown_table
from l2l_prune.experiments.running.run import check_splits, load_split
from l2l_prune.experiments.running.storage import locked_folder, run_name
from l2l_prune.experiments.running.sweep import FIRST_REPLICATE, expand
from l2l_prune.experiments.search.costs import cost_of, dense_width
from l2l_prune.experiments.search.halving import (
    Candidate,
    Runs,
    Standing,
    base_settings,
    check_search,
    race,
    record_search,
    rungs,
    toml_lines,
)
from l2l_prune.experiments.toml_files import read_toml
from l2l_prune.fewshot.data.folder import has_own_splits
from l2l_prune.fewshot.data.images import OWN_SPLITS
from l2l_prune.fewshot.evaluation import tenths

RACING = 0.4
"""Share of the time limit for the races; the rest is for the replicates."""

LOSS = 0.01
"""How much a smaller network may lose and still count as equally good (fraction, or dB)."""

_ALIKE = 0.1
"""Largest relative difference in seconds that needs no control of the same time."""

_FAMILY = "study"


def study(
    base: Mapping[str, Any],
    out: Path,
    console: Console,
    *,
    methods: Sequence[str] = STUDY_METHODS,
    rates: Sequence[float] = STUDY_RATES,
    widths: Sequence[int] = (),
    lengths: Sequence[int] = (),
    classes: Sequence[int] = (),
    replicates: int = 8,
    hours: float | None = None,
    jobs: int = 2,
    fixed_split: bool = False,
) -> str:
    """Find the methods and rates that do best, repeat them, and judge them against dense networks.

    For each combination of width, length and classes, the methods that end dense and those that end
    sparse race separately on validation tasks. The best of each, a dense network, one with as many
    weights and one with as many seconds of training are then written down as a plan, trained with
    other seeds and splits, and compared on test tasks, with Holm's correction over all comparisons.

    Args:
        base: Settings of ``run``, ``algorithm`` among them.
        out: The folder; a stopped study resumes from it.
        console: Where progress is shown.
        methods: Candidate methods, keys of :data:`~l2l_prune.experiments.methods.METHODS`.
        rates: Fractions to prune.
        widths: Numbers of channels; by default the one in ``base``.
        lengths: Numbers of meta-iterations; likewise.
        classes: Numbers of training classes; likewise.
        replicates: Number of replicates, each with its own seed and split, >= 2.
        hours: Time limit of the whole study, over all restarts. The races stop after 40% of it at
            the latest, and replicates are trained one after the other.
        jobs: Runs at once, one thread each.
        fixed_split: Replicates differ only in their seed.

    Returns:
        The verdict as Markdown, which is also in ``verdict.md``; the plan is in ``plan.toml``, and
        the report of the replicates in ``confirmation/``.

    Raises:
        ImportError: If statsmodels is missing.
        TypeError: If a value has the wrong type.
        ValueError: If settings are not possible, the folder belongs to another study, or another
            process writes to it.
    """
    check_statsmodels()  # before hours of runs that could not be judged
    shared = base_settings(base, STUDY_CHOOSES)
    checks.whole_number("replicates", replicates, least=2)
    for name in ("seed", "split"):
        if shared.get(name, 0) >= FIRST_REPLICATE:
            raise ValueError(f"{name} must be below {FIRST_REPLICATE}: replicates use the rest")
    settings = [
        shared | {name: value for name, value in zip(_AXES, values, strict=True) if value}
        for values in itertools.product(*(axis or [0] for axis in (widths, lengths, classes)))
    ]
    candidates = [_candidates(own, methods, rates) for own in settings]
    whole = [one.whole for each in candidates for one in each]  # impossible settings fail here
    own_split = whole[0].data in OWN_SPLITS
    if whole[0].data == "folder" and whole[0].split is None:
        own_split = has_own_splits(str(whole[0].data_root))
    vary_split = not own_split and not fixed_split
    with locked_folder(out):
        about = {
            **shared,
            "methods": list(methods),
            "rates": list(rates),
            **{name: list(v) for name, v in zip(_AXES, (widths, lengths, classes), strict=True)},
            "replicates": replicates,
            "split": "varies" if vary_split else "fixed",
            **({"split of the races": shared["split"]} if "split" in shared else {}),
        }
        check_search(out / "study.json", about)
        check_splits(whole, "test")
        record_search(out / "study.json", about)
        plan = out / "plan.toml"
        options: dict[str, Any] = {"jobs": jobs, "hours": hours, "clock": out / "clock.json"}
        if not plan.exists():
            racing = Runs(out / "races", console, **options)
            each_share = RACING / len(candidates)
            raced = [
                _race(each, racing, place * each_share, (place + 1) * each_share)
                for place, each in enumerate(candidates)
            ]
            for title, standings in raced:
                console.print(title, markup=False)
                console.print(_race_table(standings), markup=False)
            text = _plan([standings for _, standings in raced], replicates, vary_split)
            races = "\n\n".join(f"{title}\n\n{_race_table(rows)}" for title, rows in raced)
            with replace_file(out / "races.md") as path:
                path.write_text(f"# Races on validation tasks\n\n{races}\n", encoding="utf-8")
            with replace_file(plan) as path:
                path.write_text(text, encoding="utf-8")
            console.print(f"wrote {plan}: it states the comparisons before any training")
        document = read_toml(plan)
        configs = expand({}, document["grid"])
        comparisons = read_comparisons(document["comparison"])
        confirming = Runs(out / "confirmation", console, **options)
        confirming.finish(configs)
        verdict = _verdict(comparisons, confirming, replicates)
        with replace_file(out / "verdict.md") as path:
            path.write_text(verdict, encoding="utf-8")
    return verdict


_AXES = ("channels", "iterations", "train_classes")


def _candidates(
    shared: Mapping[str, Any], methods: Sequence[str], rates: Sequence[float]
) -> list[Candidate]:
    """The dense network first."""
    if "dense" in methods:
        raise ValueError("dense is always included: leave it out of the methods")
    if not methods or not rates:
        raise ValueError("a study needs at least one method and one rate")
    pruned = [
        Candidate({**shared, "method": method, "sparsity": rate})
        for method in methods
        for rate in rates
    ]
    return [Candidate({**shared, "method": "dense"}), *pruned]


def _race(
    candidates: Sequence[Candidate], runs: Runs, before: float, share: float
) -> tuple[str, list[Standing]]:
    """The title of one setting, and the results of its candidates.

    The races take the hours from ``before`` to ``share``, and the dense network is trained to the
    length that they reached.
    """
    dense, *others = candidates
    config = dense.whole
    lengths = rungs(candidates, config.schedule.iterations)
    kinds = [[one for one in others if one.ends_sparse == sparse] for sparse in (False, True)]
    groups = [group for group in kinds if group]
    found, lengths_reached = [], []
    for place, group in enumerate(groups, start=1):
        mine = race(group, lengths, runs, before + (share - before) * place / len(groups))
        if not mine:
            names = [run_name(one.config(lengths[0])) for one in group]
            why = next(
                (runs.failed[name] for name in names if name in runs.failed),
                "its hours are used up; repeat the command with more hours",
            )
            raise ValueError(f"the race of {group[0].title} did not finish its first rung: {why}")
        found += mine
        lengths_reached.append(mine[0].iterations)
    reached = max(lengths_reached)
    entry = runs.finish_one(dense.config(reached), "the dense run of the races")
    classes = "all" if config.train_classes is None else config.train_classes
    title = (
        f"{config.channels} channels, {config.schedule.iterations} meta-iterations, {classes} "
        "training classes:"
    )
    if min(lengths_reached) < config.schedule.iterations:
        title = title[:-1] + f" (the hours ended at runs of {min(lengths_reached)}):"
    return title, [Standing(dense, reached, entry), *found]


def _race_table(standings: Sequence[Standing]) -> str:
    return markdown_table(
        [
            {
                "method": standing.candidate.title,
                "ends": "sparse" if standing.candidate.ends_sparse else "dense",
                "meta-iterations": str(standing.iterations),
                "validation": str(standing.score),
                "seconds": f"{standing.entry['seconds']:.0f}",
            }
            for standing in standings
        ]
    )


def _plan(raced: Sequence[Sequence[Standing]], replicates: int, vary_split: bool) -> str:
    """The arms of each setting with their replicates, and the comparisons, as a sweep's file."""
    arms: list[dict[str, Any]] = []
    compared: list[tuple[dict[str, Any], dict[str, Any], float]] = []
    for dense, *others in raced:
        usual = dict(dense.candidate.settings)
        config = dense.candidate.whole
        length = config.schedule.iterations
        best = _first(others)
        arms += [usual, dict(best.candidate.settings)]
        compared.append((dict(best.candidate.settings), usual, 0.0))
        ratio = best.entry["seconds"] / dense.entry["seconds"]
        if abs(ratio - 1) > _ALIKE:
            timely = usual | {"iterations": max(1, round(length * ratio)), "scale": None}
            timely = {name: value for name, value in timely.items() if value is not None}
            arms.append(timely)
            compared.append((dict(best.candidate.settings), timely, 0.0))
        smaller = [one for one in others if one.candidate.ends_sparse]
        if smaller:
            small = _first(smaller).candidate
            arms.append(dict(small.settings))
            compared.append((dict(small.settings), usual, -LOSS))
            if config.backbone != "resnet12":  # whose width is given
                shape = load_split(config, "train").images.shape[1:]
                width = dense_width(config, shape, cost_of(small.whole, shape).weights)
                narrow = usual | {"channels": width}
                arms.append(narrow)
                compared.append((dict(small.settings), narrow, 0.0))
    unique = [arm for place, arm in enumerate(arms) if arm not in arms[:place]]
    lines = ["# Written by l2l-prune study before any of these runs; l2l-prune sweep takes it."]
    for arm in unique:
        if vary_split:
            own = {name: value for name, value in arm.items() if name not in ("seed", "split")}
            own["replicates"] = replicates
        else:
            own = {**arm, "seed": list(range(FIRST_REPLICATE, FIRST_REPLICATE + replicates))}
        lines += ["", "[[grid]]", *toml_lines(own)]
    varying = same_settings.varying(map(_known_by, unique))
    for treatment, control, margin in compared:
        lines += ["", "[[comparison]]", *toml_lines({"family": _FAMILY, "margin": margin})]
        for side, arm in (("treatment", treatment), ("control", control)):
            lines += [f"[comparison.{side}]", *toml_lines(_known_by(arm, varying))]
    return "\n".join(lines) + "\n"


def _first(standings: Sequence[Standing]) -> Standing:
    """The one that went furthest; among several, the best on validation tasks."""
    return min(standings, key=lambda one: (-one.iterations, -one.score.mean))


def _known_by(arm: Mapping[str, Any], varying: Sequence[str] | None = None) -> dict[str, Any]:
    """The varying settings that tell an arm's runs from the others of the study."""
    config = Candidate(arm).whole
    rates = [float(s.sparsity) for s in config.schedule.segments if s.sparse]  # type: ignore[arg-type]
    known: dict[str, Any] = {"name": config.name}
    if rates:
        known["sparsity"] = max(rates)
    known["iterations"] = config.schedule.iterations
    if config.backbone != "resnet12":
        known["channels"] = config.channels
    if config.train_classes is not None:
        known["train_classes"] = config.train_classes
    if varying is None:
        return known
    always = ("name", "sparsity")
    return {name: value for name, value in known.items() if name in always or name in varying}


def _verdict(comparisons: Sequence[Comparison], runs: Runs, replicates: int) -> str:
    head = ["# Does pruning help here?", ""]
    failed = [f"- A run failed: {name}: {why}" for name, why in runs.failed.items()]
    found = read_folder(runs.folder).runs if any(runs.folder.glob("*/results.json")) else []
    able = []
    for stated in comparisons:
        one = dataclasses.replace(stated, family_size=len(comparisons))
        try:
            judge([one], found)
        except ValueError as error:
            failed.append(f"- Not judged: {error}.")
        else:
            able.append(one)
    if not able:
        why = (
            "**No verdict yet.** Repeat the command to go on, with more hours if they are used up."
        )
        return "\n".join([*head, why, "", *failed, ""])
    judged = judge(able, found)
    write_report(runs.folder, able)
    done = min(len(one.difference.values) for one in judged)
    lines = [*head, f"**{_answer(judged)}**", ""]
    lines += [f"- {_in_words(one, found)}" for one in judged]
    if done < replicates:
        why = "runs failed" if runs.failed else "the hours are used up"
        how = "" if runs.failed else " with more hours"
        lines.append(
            f"- {done} of {replicates} replicates are complete: {why}. Repeat the command{how} to "
            "go on; judging again after more replicates makes errors more frequent than 5%."
        )
    lines += [
        *failed,
        "",
        "Intervals and p-values are over replicates, and corrected by Holm for the "
        f"{len(comparisons)} comparisons that plan.toml stated before the runs. Methods and rates "
        "were chosen on validation tasks of another seed; the report is confirmation/report.html.",
        "",
    ]
    return "\n".join(lines)


def _answer(judged: Sequence[Judged]) -> str:
    """The first sentence: the strongest result that was shown."""
    shown = [one for one in judged if one.verdict not in ("not shown", "worse")]
    gains = [one for one in shown if not one.comparison.margin and not _differs(one, "channels")]
    alike = [one for one in gains if not _differs(one, "iterations")]
    if alike:
        best = max(alike, key=lambda one: one.difference.mean)
        gain = f"{_title(best)} is {amount(best.difference)}, and that is significant"
        for one in judged:
            same = one.comparison.treatment == best.comparison.treatment
            if same and _differs(one, "iterations") and one not in gains:
                timely = f"{_title(one)} is {amount(one.difference)}, {one.verdict}"
                return f"At the same length, not in the same time. {gain}; {timely}."
        return f"Yes: {gain}."
    if gains:  # the control is as long in seconds, and has another number of meta-iterations
        best = max(gains, key=lambda one: one.difference.mean)
        return (
            f"In the same time, not at the same length. {_title(best)} is "
            f"{amount(best.difference)}, and that is significant."
        )
    small = [one for one in shown if one.comparison.margin or _differs(one, "channels")]
    if small:
        best = small[0]
        words = f"{_title(best)}: {amount(best.difference)}, {best.verdict}"
        return f"For size, not for accuracy. {words}."
    harm = [one for one in judged if one.verdict == "worse"]
    if len(harm) == len(judged):
        return "No: pruning is worse in every comparison."
    return "Not shown: no gain of pruning is significant over these replicates."


def _title(judged: Judged) -> str:
    """The comparison in words; what both sides share comes last, once."""
    sides = (judged.comparison.treatment, judged.comparison.control)
    both = {name: value for name, value in sides[0].items() if sides[1].get(name) == value}
    alone = [{k: v for k, v in side.items() if k not in both or k == "name"} for side in sides]
    where = ", ".join(f"{name} {value}" for name, value in both.items() if name != "name")
    shorter = dataclasses.replace(judged.comparison, treatment=alone[0], control=alone[1])
    return f"{shorter.title} ({where})" if where else shorter.title


def _differs(judged: Judged, setting: str) -> bool:
    """Whether the two sides have different values of a setting."""
    treatment, control = judged.comparison.treatment, judged.comparison.control
    return bool(treatment.get(setting) != control.get(setting))


def _in_words(judged: Judged, runs: Sequence[FinishedRun]) -> str:
    """A comparison with its certainty and its costs."""
    measure = judged.difference.measure
    text = (
        f"{_title(judged)}: {amount(judged.difference)} over {len(judged.difference.values)} "
        f"replicates, **{judged.verdict}** (p = {judged.corrected:.2g})"
    )
    least = measure.read(judged.detectable)
    if judged.verdict == "not shown" and math.isfinite(least):
        if judged.comparison.margin:
            seen = f"a true difference of {measure.difference(tenths(least, '+'))} or more"
        else:
            seen = measure.difference(tenths(least))
        text += f"; {seen} could have been seen"
    sides = [
        list(matching(side, runs).values())
        for side in (judged.comparison.treatment, judged.comparison.control)
    ]
    times, sizes = (
        [fmean(run.entry["seconds"] for run in side) for side in sides],
        [mean_weights(side) for side in sides],
    )
    name = judged.comparison.control.get("name", "the control")
    text += f". Training took {_length(times[0] / times[1])} {name}"
    if sizes[0] and sizes[1]:
        text += f", and the network has {100 * sizes[0] / sizes[1]:.0f}% as many weights"
    return text + "."


def _length(ratio: float) -> str:
    """``"7% longer than"`` and the like, of a time over another."""
    percent = round(100 * (ratio - 1))
    if percent == 0:
        return "as long as"
    if ratio >= 2:
        return f"{ratio:.1f} times as long as"
    return f"{percent}% longer than" if percent > 0 else f"{-percent}% less time than"
