"""Stated comparisons over replicates: paired differences, corrected for how many were stated.

A replicate is a seed together with a split of the classes. Intervals and tests are over replicates:
tasks drawn with replacement from one pool would make them too narrow (arXiv 2409.02850).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from scipy import stats

from l2l_prune._basics import checks
from l2l_prune.experiments.report.finished_runs import FinishedRun, Replicate
from l2l_prune.experiments.report.seed_statistics import OverSeeds, signed
from l2l_prune.experiments.report.tables import markdown_table
from l2l_prune.fewshot.evaluation import tenths


@dataclass(frozen=True)
class Comparison:
    """What is to be compared, as a plan states it before the runs.

    Args:
        family: The comparisons that are corrected together.
        treatment: Settings that identify the runs of one side, ``name`` among them.
        control: The same for the other side.
        margin: The difference that the hypothesis sets, in fractions of accuracy (fields: in dB): 0
            asks whether the two differ; -0.02, whether the treatment is at most 2 points worse
            (one-sided).
        family_size: How many comparisons the plan states in this family, where some have not run:
            the correction counts these too, as the least certain. 0: those that are here.
    """

    family: str
    treatment: Mapping[str, Any]
    control: Mapping[str, Any]
    margin: float = 0.0
    family_size: int = 0

    @property
    def title(self) -> str:
        """``"RigL, channels 64 minus dense, channels 20"``."""
        minus = f"{_in_words(self.treatment)} minus {_in_words(self.control)}"
        return f"{minus}, margin {self.margin:g}" if self.margin else minus


@dataclass(frozen=True)
class Judged:
    """The result of a comparison.

    Attributes:
        comparison: The comparison.
        difference: Treatment minus control, one value per replicate.
        p: The p-value of the paired t-test, before the correction.
        corrected: The p-value after Holm's correction over the family.
        detectable: The smallest true difference that as many replicates find in 80% of studies,
            at the strictest of the family's levels; with a margin, the smallest from which they
            find that it is above the margin. NaN if the replicates do not differ.
    """

    comparison: Comparison
    difference: OverSeeds
    p: float
    corrected: float
    detectable: float

    @property
    def verdict(self) -> str:
        """``"better"``, ``"worse"``, ``"not worse by more than 2 points"`` or ``"not shown"``."""
        if not self.corrected < 0.05:
            return "not shown"
        if self.comparison.margin:
            measure = self.difference.measure
            most = measure.difference(f"{measure.read(-self.comparison.margin):g}")
            return f"not worse by more than {most}"
        return "better" if self.difference.mean > 0 else "worse"


def read_comparisons(tables: Any) -> list[Comparison]:
    """The ``[[comparison]]`` tables of a plan.

    Raises:
        TypeError: If an entry has the wrong type.
        ValueError: If an entry is missing or unknown.
    """
    found, known = [], {field.name for field in fields(Comparison)}
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise TypeError("comparisons must be tables that begin with [[comparison]]")
    for table in tables:
        if unknown := sorted(table.keys() - known):
            raise ValueError(f"a comparison has no {', '.join(unknown)}")
        if missing := sorted({"family", "treatment", "control"} - table.keys()):
            raise ValueError(f"a comparison needs {', '.join(missing)}")
        for side in ("treatment", "control"):
            checks.of_type(side, table[side], dict, "a table of settings")
        checks.of_type("family", table["family"], str, "a name")
        margin = table.get("margin", 0.0)
        if not isinstance(margin, (int, float)) or not -math.inf < margin <= 0:
            raise ValueError(f"margin must be a number <= 0, got {margin!r}")
        checks.whole_number("family_size", table.get("family_size", 0), least=0)
        sides = {side: _in_todays_words(table[side]) for side in ("treatment", "control")}
        found.append(Comparison(**{**table, **sides}))
    return found


def _in_todays_words(side: dict[str, Any]) -> dict[str, Any]:
    """Plans of older versions call the sparsity ``rate``."""
    return {"sparsity" if name == "rate" else name: value for name, value in side.items()}


def judge(
    comparisons: Sequence[Comparison], runs: Sequence[FinishedRun], part: str = "test"
) -> list[Judged]:
    """Paired differences over replicates, with Holm's correction within each family.

    Args:
        comparisons: As the plan states them.
        runs: The finished runs.
        part: ``"test"`` or ``"train"`` score.

    Raises:
        ImportError: If statsmodels is missing.
        ValueError: If a side has no run or two of one replicate, or both share fewer than two
            replicates.
    """
    return judge_differences(
        comparisons, [_differences(comparison, runs, part) for comparison in comparisons]
    )


def judge_differences(
    comparisons: Sequence[Comparison], differences: Sequence[OverSeeds]
) -> list[Judged]:
    """:func:`judge` where the differences are known, one for each comparison.

    Raises:
        ImportError: If statsmodels is missing.
    """
    check_statsmodels()
    from statsmodels.stats.multitest import multipletests

    raw = [_p_value(d, c.margin) for d, c in zip(differences, comparisons, strict=True)]
    corrected = list(raw)
    sizes = [0] * len(raw)
    for family in dict.fromkeys(comparison.family for comparison in comparisons):
        places = [i for i, comparison in enumerate(comparisons) if comparison.family == family]
        size = max(len(places), *(comparisons[i].family_size for i in places))
        not_run = [1.0] * (size - len(places))
        adjusted = multipletests([raw[i] for i in places] + not_run, method="holm")[1]
        for place, value in zip(places, adjusted, strict=False):
            corrected[place], sizes[place] = float(value), size
    return [
        Judged(c, d, p, q, _detectable(d, size, c.margin))
        for c, d, p, q, size in zip(comparisons, differences, raw, corrected, sizes, strict=True)
    ]


def check_statsmodels() -> None:
    """Make sure that comparisons can be judged.

    Raises:
        ImportError: If statsmodels is missing; the message names the extra.
    """
    try:
        import statsmodels.stats.multitest  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{error}; this needs: pip install "l2l-prune[study]"') from None


def comparison_table(judged: Iterable[Judged]) -> str:
    """The judged comparisons as Markdown."""
    return markdown_table(
        [
            {
                "family": one.comparison.family,
                "comparison": one.comparison.title,
                "replicates": str(len(one.difference.values)),
                "difference": signed(one.difference),
                "p": f"{one.p:.2g}",
                "p (Holm)": f"{one.corrected:.2g}",
                "verdict": one.verdict,
                "could be seen": _seen(one),
            }
            for one in judged
        ]
    )


def _differences(comparison: Comparison, runs: Sequence[FinishedRun], part: str) -> OverSeeds:
    treated, control = both_sides(comparison, runs)
    shared = sorted(treated.keys() & control.keys(), key=str)
    if len(shared) < 2:
        raise ValueError(f"{comparison.title} needs two replicates or more, got {len(shared)}")
    return OverSeeds(
        tuple(
            treated[one].entry[part]["mean"] - control[one].entry[part]["mean"] for one in shared
        ),
        treated[shared[0]].measure,
    )


def both_sides(
    comparison: Comparison, runs: Sequence[FinishedRun]
) -> tuple[dict[Replicate, FinishedRun], dict[Replicate, FinishedRun]]:
    """The runs of the treatment and of the control, by replicate.

    Raises:
        ValueError: If a side has no run, or two of one replicate; the message names the comparison.
    """
    try:
        return matching(comparison.treatment, runs), matching(comparison.control, runs)
    except ValueError as error:
        raise ValueError(f"comparison {comparison.title}: {error}") from None


def matching(
    wanted: Mapping[str, Any], runs: Sequence[FinishedRun]
) -> dict[Replicate, FinishedRun]:
    """The runs that have these settings, by replicate.

    Raises:
        ValueError: If there is none, or two are of one replicate.
    """
    found: dict[Replicate, FinishedRun] = {}
    known: set[str] = set()
    arms: dict[str, None] = {}
    for run in runs:
        config = nameable(run)
        known |= config.keys()
        arms[_in_words({name: config[name] for name in wanted if name in config})] = None
        if any(config.get(name, ...) != value for name, value in wanted.items()):
            continue
        if run.replicate in found:
            raise ValueError(
                f"{_in_words(wanted)} means both {found[run.replicate].folder} and {run.folder}: "
                "name more settings"
            )
        found[run.replicate] = run
    if not found:
        unknown = sorted(wanted.keys() - known)
        why = f": runs have no setting {', '.join(unknown)}" if unknown and runs else ""
        there = f"; the runs are: {'; '.join(arms)}" if any(arms) else ""
        raise ValueError(f"no run is {_in_words(wanted)}{why}{there}")
    return found


def nameable(run: FinishedRun) -> dict[str, Any]:
    """All settings by which a comparison can name a run."""
    return run.identity | {
        "seed": run.seed,
        "name": run.config["name"],
        "sparsity": run.rate,
        "iterations": run.iterations,
    }


def _seen(judged: Judged) -> str:
    """``"0.6"``; with a margin ``"from -0.1 on"``."""
    least = judged.difference.measure.read(judged.detectable)
    if not math.isfinite(least):
        return "-"
    return f"from {tenths(least, '+')} on" if judged.comparison.margin else tenths(least)


def _p_value(difference: OverSeeds, margin: float) -> float:
    values = difference.values
    if len(set(values)) == 1:  # no spread: the t-test is not defined, but the sign test is
        sign = 0.5 ** len(values)
        if margin:
            return sign if difference.mean > margin else 1.0
        return 1.0 if difference.mean == 0 else 2 * sign
    alternative = "greater" if margin else "two-sided"
    return float(stats.ttest_1samp(values, margin, alternative=alternative).pvalue)


def _detectable(difference: OverSeeds, family: int, margin: float = 0.0) -> float:
    from statsmodels.stats.power import TTestPower

    if len(set(difference.values)) == 1:
        return math.nan
    spread = float(stats.tstd(difference.values))
    # Its solver for two sides fails in small samples; the other side hardly adds any power.
    effect = TTestPower().solve_power(
        nobs=len(difference.values),
        alpha=0.05 / family / (1 if margin else 2),
        power=0.8,
        alternative="larger",
    )
    return float(effect) * spread + margin


def _in_words(settings: Mapping[str, Any]) -> str:
    rest = [f"{name} {value}" for name, value in settings.items() if name != "name"]
    return ", ".join(([str(settings["name"])] if "name" in settings else []) + rest)
