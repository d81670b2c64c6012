"""The pruning methods that runs compare: for each name, a schedule and how masks are chosen."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from l2l_prune._basics import checks
from l2l_prune.schedules.common import cubic, cyclic, metasparse, one_shot
from l2l_prune.schedules.paper import DSDSchedule, IHTSchedule, Schedule, Segment


@dataclass(frozen=True)
class Method:
    """A row of the comparison.

    Attributes:
        title: Its name for people.
        make: Makes its schedule from iterations, sparsity and the phases that it takes.
        takes: The arguments of :func:`make_schedule` that apply to it.
        settings: What else it sets in :class:`~l2l_prune.experiments.config.RunConfig`.
        sparsity: Its default sparsity.
    """

    title: str
    make: Callable[..., Schedule]
    takes: tuple[str, ...] = ("pretrain",)
    settings: dict[str, Any] = field(default_factory=dict)
    sparsity: float = 0.5


def _dense(iterations: int, sparsity: float) -> Schedule:
    return Schedule((Segment(iterations),))


def _dsd(
    iterations: int, sparsity: float, pretrain: float = 0.3, retrain: float = 0.1
) -> DSDSchedule:
    prune = round(1 - pretrain - retrain, 12)  # 0.6 and not 0.6000000000000001
    if prune <= 0:
        raise ValueError(
            f"pretrain={pretrain} and retrain={retrain} leave none of the run for pruning: they "
            "must add up to less than 1"
        )
    return DSDSchedule.from_fractions(
        sparsity, iterations, pretrain=pretrain, prune=prune, retrain=retrain
    )


def _iht(
    iterations: int, sparsity: float, pretrain: float = 0.2, retrain: float = 0.25, rounds: int = 4
) -> IHTSchedule:
    checks.whole_number("rounds", rounds)
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if pretrain >= 1 or retrain >= 1:
        raise ValueError(
            f"pretrain={pretrain} and retrain={retrain} leave none of the run for pruning: each "
            "must be less than 1"
        )
    round_share = (1 - pretrain) / rounds
    return IHTSchedule.from_fractions(
        sparsity,
        iterations,
        pretrain=pretrain,
        prune=round_share * (1 - retrain),
        retrain=round_share * retrain,
        rounds=rounds,
    )


def _one_shot(iterations: int, sparsity: float, pretrain: float = 0.3) -> Schedule:
    dense = _dense_start(iterations, pretrain)
    return one_shot(sparsity, pretrain=dense, prune=iterations - dense)


def _sparse(iterations: int, sparsity: float, pretrain: float = 0.0) -> Schedule:
    return _one_shot(iterations, sparsity, pretrain)


def _cubic(iterations: int, sparsity: float, pretrain: float = 0.2, ramp: float = 0.5) -> Schedule:
    """The ramp takes the first half, or another share, of what follows, in up to 10 steps."""
    dense = _dense_start(iterations, pretrain)
    return cubic(sparsity, pretrain=dense, **_ramp_lengths(iterations - dense, 10, ramp))


def _cyclic(iterations: int, sparsity: float, pretrain: float = 0.2, rounds: int = 4) -> Schedule:
    """Each cycle is a ramp of up to 5 steps, and then equally long at the full sparsity."""
    cycles = checks.whole_number("rounds", rounds, least=1)
    length = (iterations - _dense_start(iterations, pretrain)) // cycles
    return cyclic(
        sparsity, pretrain=iterations - cycles * length, cycles=cycles, **_ramp_lengths(length, 5)
    )


def _metasparse(iterations: int, sparsity: float, pretrain: float | None = None) -> Schedule:
    """Each round prunes a fifth of what is left; the dense start is as long as five rounds."""
    rounds = len(metasparse(sparsity, pretrain=0, interval=1).segments) - 1
    dense = _dense_start(iterations, 5 / (5 + rounds) if pretrain is None else pretrain)
    interval = (iterations - dense) // rounds
    if interval < 1:
        raise ValueError(
            f"{iterations} iterations are too few for the {rounds} rounds down to "
            f"{100 * (1 - sparsity):g}% of the weights: make the run longer"
        )
    return metasparse(sparsity, pretrain=iterations - rounds * interval, interval=interval)


def _dense_start(iterations: int, pretrain: float) -> int:
    dense = round(pretrain * iterations)
    if dense >= iterations:
        raise ValueError(f"pretrain={pretrain} leaves none of {iterations} iterations for pruning")
    if pretrain and not dense:
        raise ValueError(f"pretrain={pretrain} of {iterations} iterations is none: make it longer")
    return dense


def _ramp_lengths(iterations: int, most_steps: int, share: float = 0.5) -> dict[str, int]:
    length = int(share * iterations)
    if length < 2:
        raise ValueError(
            f"a ramp does not fit into {100 * share:g}% of {iterations} iterations: make the run "
            "longer"
        )
    steps = min(most_steps, length)
    interval = length // steps
    return {"steps": steps, "interval": interval, "hold": iterations - steps * interval}


def _task_masks(
    iterations: int,
    sparsity: float,
    pretrain: float = 0.0,
    retrain: float = 0.0,
    task_share: float = 1.0,
) -> Schedule:
    return _dsd(iterations, sparsity, pretrain, retrain).per_task(task_share)


METHODS: dict[str, Method] = {
    "dense": Method("dense", _dense, ()),
    "dsd": Method("DSD", _dsd, ("pretrain", "retrain")),
    "iht": Method("IHT", _iht, ("pretrain", "retrain", "rounds")),
    "one-shot": Method("one-shot", _one_shot),
    "cubic": Method("cubic", _cubic, ("pretrain", "ramp")),
    "cyclic": Method("cyclic", _cyclic, ("pretrain", "rounds")),
    "lottery": Method("lottery", partial(_one_shot, pretrain=0.5), settings={"rewind": 0}),
    "static": Method("static", _sparse, settings={"criterion": "random"}),
    "set": Method("SET", _sparse, settings={"criterion": "random", "regrow": "random"}),
    "rigl": Method("RigL", _sparse, settings={"criterion": "random", "regrow": "gradient"}),
    "task-masks": Method("task masks", _task_masks, ("pretrain", "retrain", "task_share")),
    "recommended": Method(
        "DSD, recommended",
        DSDSchedule.recommended,
        (),
        settings={"criterion": "random"},
        sparsity=0.8,
    ),
    "metasparse": Method(
        "Meta-SparseINR", _metasparse, settings={"allocation": "global"}, sparsity=0.95
    ),
}
"""The paper's three come first; docs/methods.md explains the others."""


CANDIDATES = ("dsd", "iht", "rigl", "cubic")
"""What ``tune`` tries by default, and ``study`` beside the recommended schedule."""
STUDY_METHODS = (*CANDIDATES, "recommended")
"""What ``study`` tries by default."""
TUNE_RATES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
"""Sparsities that ``tune`` tries by default."""
STUDY_RATES = (0.5, 0.8, 0.9)
"""Sparsities that ``study`` tries by default."""
STUDY_CHOOSES = ("method", "sparsity", "layer_rates", "held_out", "name")
"""Settings that ``study`` chooses itself."""
TUNE_CHOOSES = (*STUDY_CHOOSES, "pretrain", "retrain", "rounds", "allocation", "structured")
"""Settings that ``tune`` chooses itself."""

_RAMPS = ("cubic", "cyclic", "metasparse")


def read_layer_rates(text: str) -> dict[str, float]:
    """Read rates by layer as settings write them.

    Raises:
        ValueError: If the text has another form, or a rate is not in [0, 1).

    Examples:
        >>> read_layer_rates("conv4.weight=0.9, fc.*=0.25")
        {'conv4.weight': 0.9, 'fc.*': 0.25}
    """
    rates = {}
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        try:
            rates[name] = checks.fraction(name, float(number))
        except ValueError:
            raise ValueError(
                f"layer_rates must be NAME=RATE,NAME=RATE with rates in [0, 1), got {part!r}"
            ) from None
    return rates


def make_schedule(
    method: str,
    iterations: int,
    sparsity: float | dict[str, float] | None = None,
    *,
    pretrain: float | None = None,
    retrain: float | None = None,
    rounds: int | None = None,
    ramp: float | None = None,
    task_share: float | None = None,
) -> Schedule:
    """A schedule of ``iterations``, with the method's usual fractions where none are given.

    Args:
        method: A key of :data:`METHODS`.
        iterations: Total number of meta-iterations, >= 1.
        sparsity: Fraction pruned in the sparse phases (metasparse: in the last), in (0, 1); by
            default 0.5, 0.8 for recommended, or 0.95 for metasparse. Or fractions by layer, for
            methods whose sparsity does not grow during the run.
        pretrain: Pre-training as a fraction of the run: 0.3 (DSD, one-shot), 0.2 (IHT, cubic,
            cyclic), 0.5 (lottery), 0 (static, SET, RigL, task masks) or the length of five
            rounds (metasparse) by default.
        retrain: Retraining as a fraction of the run (DSD, default 0.1) or of each round (IHT,
            default 0.25; task masks, default 0); what is left over is sparse.
        rounds: Rounds of IHT, or cycles of cyclic, >= 1, 4 by default.
        ramp: Share of what follows pre-training in which cubic's rate rises, in (0, 1), 0.5 by
            default.
        task_share: Share of the tasks that task masks prune, in (0, 1], 1 by default.

    Raises:
        ValueError: If ``method`` is not in :data:`METHODS`, a number is out of range, or the method
            does not take it (dense ignores all numbers but ``iterations``).
    """
    checks.one_of("method", method, METHODS)
    row = METHODS[method]
    if method == "dense":
        return row.make(iterations, 0.0)
    sparsity = row.sparsity if sparsity is None else sparsity
    if isinstance(sparsity, dict):
        if method in _RAMPS:
            raise ValueError(
                f"method {method} takes one sparsity for all layers, because its sparsity grows"
            )
    elif checks.fraction("sparsity", sparsity) == 0:
        raise ValueError(f"sparsity must be in (0, 1), got {sparsity}")
    given = {
        "pretrain": pretrain,
        "retrain": retrain,
        "rounds": rounds,
        "ramp": ramp,
        "task_share": task_share,
    }
    phases = {name: value for name, value in given.items() if value is not None}
    if unknown := sorted(phases.keys() - set(row.takes)):
        raise ValueError(f"method {method} takes no {', '.join(unknown)}: leave it out")
    shares = {name: phases[name] for name in phases if name in ("pretrain", "retrain", "ramp")}
    checks.check_fractions(shares)
    try:
        return row.make(iterations, sparsity, **phases)
    except ValueError as error:
        usual = {name: inspect.signature(row.make).parameters[name].default for name in row.takes}
        used = {"iterations": iterations, **usual, **phases}
        words = ", ".join(f"{name}={value}" for name, value in used.items() if value is not None)
        short = str(error).endswith("make the run longer")
        fewer = ", or take fewer rounds" if short and "rounds" in used else ""
        raise ValueError(f"method {method} with {words}: {error}{fewer}") from None


def published_phases(method: str, data: str, channels: int) -> dict[str, Any]:
    """Arguments of :func:`make_schedule` as in Section 5.1; empty where the paper has none."""
    if method == "dense":
        return {}
    recipe = IHTSchedule if method == "iht" else DSDSchedule
    try:
        paper = recipe.paper(data, channels=channels)
    except ValueError:  # not one of the paper's data sets or widths
        return {}
    phases: dict[str, Any] = {"sparsity": paper.sparsity}
    if method == "dsd":
        phases["pretrain"] = paper.pretrain / paper.iterations
        phases["retrain"] = paper.retrain / paper.iterations
    return phases
