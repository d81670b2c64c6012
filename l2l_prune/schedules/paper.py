"""The paper's schedules: dense-sparse-dense and iterative hard thresholding (Algorithm 1)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field

from l2l_prune._basics.checks import (
    Counts,
    Sparsity,
    apportion,
    check_fractions,
    check_whole,
    fraction,
    frozen_counts,
    frozen_sparsity,
    one_of,
    set_field,
    whole_number,
)
from l2l_prune.schedules.schedule import Schedule, Segment

__all__ = ["DSDSchedule", "IHTSchedule", "Schedule", "Segment"]

# Tables 1 and 2 of the paper: the pruning rates that it reports, by data set and channels.
_PAPER_DSD_SPARSITY = {
    "mini-imagenet": {32: 0.4, 64: 0.3, 128: 0.5, 256: 0.6},
    "tiered-imagenet": {32: 0.1, 64: 0.1, 128: 0.1, 256: 0.2},
}
_PAPER_IHT_SPARSITY = {
    "mini-imagenet": {32: 0.2, 64: 0.4, 128: 0.4, 256: 0.6},
    "tiered-imagenet": {32: 0.1, 64: 0.2, 128: 0.1, 256: 0.1},
}


@dataclass(frozen=True)
class DSDSchedule(Schedule):
    """Dense-sparse-dense: pre-training, one pruning phase, retraining (Section 4.2).

    Args:
        sparsity: Fraction of each selected tensor to prune, in [0, 1), or a mapping (see
            :class:`Segment`).
        pretrain: Dense meta-iterations before pruning, >= 0.
        prune: Sparse meta-iterations, >= 0.
        retrain: Dense meta-iterations after pruning, >= 0. The pruned weights restart from 0.
        keep: Explicit counts ``k_l`` by layer name or pattern; overrides ``sparsity``.

    Raises:
        TypeError: If a number of iterations is not an integer, or there is neither ``sparsity`` nor
            ``keep``.
        ValueError: If a value is out of range, or there are no iterations at all.

    Examples:
        >>> DSDSchedule(sparsity=0.3, pretrain=30_000, prune=60_000, retrain=10_000).iterations
        100000
    """

    segments: tuple[Segment, ...] = field(init=False, repr=False, compare=False)
    sparsity: Sparsity = None  # type: ignore[assignment] # may be left out for keep
    _: KW_ONLY
    pretrain: int
    prune: int
    retrain: int
    keep: Counts | None = None

    def __post_init__(self) -> None:
        _freeze_fields(self, "pretrain", "prune", "retrain")
        segments = (
            Segment(self.pretrain, phase="pretrain"),
            Segment(self.prune, sparse=True, sparsity=self.sparsity, keep=self.keep, phase="prune"),
            Segment(self.retrain, phase="retrain"),
        )
        set_field(self, "segments", segments)
        super().__post_init__()

    @classmethod
    def paper(
        cls, dataset: str, *, channels: int = 64, sparsity: Sparsity | None = None
    ) -> DSDSchedule:
        """The paper's iteration numbers (Section 5.1), 100,000 in all.

        Args:
            dataset: ``"mini-imagenet"`` or ``"tiered-imagenet"``.
            channels: Channels per convolution: 32, 64, 128 or 256.
            sparsity: The rate of Table 1 or 2 for these channels by default.

        Raises:
            ValueError: If the paper has no such setting.
        """
        rate = _paper_sparsity(_PAPER_DSD_SPARSITY, dataset, channels)
        wide = dataset == "mini-imagenet" and channels > 32
        return cls(
            rate if sparsity is None else sparsity,
            pretrain=30_000,
            prune=60_000 if wide else 50_000,
            retrain=10_000 if wide else 20_000,
        )

    @classmethod
    def from_fractions(
        cls,
        sparsity: Sparsity,
        total: int,
        *,
        pretrain: float = 0.3,
        prune: float = 0.6,
        retrain: float = 0.1,
        keep: Counts | None = None,
    ) -> DSDSchedule:
        """A run of ``total`` meta-iterations split by fractions that sum to 1.

        Args:
            sparsity: As in the constructor.
            total: Meta-iterations in all, >= 1.
            pretrain: Fraction of the run in [0, 1], by default 0.3 as in the paper.
            prune: Fraction of the run in [0, 1], by default 0.6.
            retrain: Fraction of the run in [0, 1], by default 0.1.
            keep: As in the constructor.

        Raises:
            ValueError: If the fractions do not sum to 1, or a phase with a positive fraction
                would get no iteration.

        Examples:
            >>> DSDSchedule.from_fractions(0.5, 1000).prune
            600
        """
        total = whole_number("total", total, least=1)
        fractions = {"pretrain": pretrain, "prune": prune, "retrain": retrain}
        check_fractions(fractions)
        check_whole(fractions, sum(fractions.values()))
        parts = apportion(total, fractions)
        return cls(sparsity, keep=keep, **parts)

    @classmethod
    def recommended(cls, total: int, sparsity: Sparsity = 0.8) -> DSDSchedule:
        """What this project's study confirmed for Reptile: 80%, split 20 / 50 / 30%.

        Against dense training on glyphs (5-way 1-shot, conv4 with 64 channels, 3,000
        meta-iterations, eight seeds and splits) test accuracy rises by 0.9 points with masks by
        magnitude, and by 1.7 with ``criterion=l2l_prune.masking.random(generator)``; the first
        convolution stayed dense (``layers="authors"``). Tuned weight decay gained 1.2 points, and
        random masks 1.2 more on top of it. These are 30 training characters: with 8, random masks
        gain 2.0 points, and with 120 they cost 1.1. With 5 shots and with 20 ways they gain 2.4 and
        9.7 points if each adaptation step learns from the whole support set with a fresh optimizer,
        and cost 9.0 and 4.2 with steps of 5 images and the state of training. With MAML and
        ProtoNet no gain was shown. Other data and lengths have not been studied: ``l2l-prune
        study`` does it on yours.
        Source: ``docs/results/study.md``.

        Args:
            total: Meta-iterations in all, >= 3.
            sparsity: As in the constructor; the study confirmed 0.8 alone.

        Raises:
            ValueError: If ``total`` is too small for three phases.

        Examples:
            >>> schedule = DSDSchedule.recommended(3000)
            >>> schedule.pretrain, schedule.prune, schedule.retrain
            (600, 1500, 900)
        """
        return cls.from_fractions(sparsity, total, pretrain=0.2, prune=0.5, retrain=0.3)

    def scaled(self, total: int) -> DSDSchedule:
        """The same shape stretched or shrunk to ``total`` meta-iterations, >= 1.

        Raises:
            TypeError: If ``total`` is not a whole number.
            ValueError: If it is too small for the phases.
        """
        phases = {"pretrain": self.pretrain, "prune": self.prune, "retrain": self.retrain}
        shares = {phase: count / self.iterations for phase, count in phases.items()}
        return self.from_fractions(self.sparsity, total, keep=self.keep, **shares)


@dataclass(frozen=True)
class IHTSchedule(Schedule):
    """Iterative hard thresholding: pre-training, then rounds of pruning and retraining.

    Args:
        sparsity: Fraction of each selected tensor to prune, in [0, 1), or a mapping (see
            :class:`Segment`).
        pretrain: Dense meta-iterations before the first round, >= 0.
        prune: Sparse meta-iterations in each round, >= 0.
        retrain: Dense meta-iterations in each round, >= 0.
        rounds: Number of rounds, >= 1 (``t`` in Algorithm 1).
        initial_sparsity: If given, the sparsity of the first round, at most ``sparsity``: it grows
            linearly over the rounds to ``sparsity`` in the last, as the authors' program does (it
            starts at 0.1). By default every round prunes ``sparsity`` (the paper's ``k_l``).
        keep: Explicit counts ``k_l`` by layer name or pattern; overrides ``sparsity``.

    Raises:
        TypeError: If a number of iterations is not an integer, there is neither ``sparsity`` nor
            ``keep``, or ``initial_sparsity`` comes with a per-layer mapping.
        ValueError: If a value is out of range, or there are no iterations at all.

    Examples:
        >>> ramp = IHTSchedule(0.4, pretrain=2, prune=3, retrain=1, rounds=4, initial_sparsity=0.1)
        >>> [round(s.sparsity, 3) for s in ramp.segments if s.sparse]
        [0.1, 0.2, 0.3, 0.4]
    """

    segments: tuple[Segment, ...] = field(init=False, repr=False, compare=False)
    sparsity: Sparsity = None  # type: ignore[assignment] # may be left out for keep
    _: KW_ONLY
    pretrain: int
    prune: int
    retrain: int
    rounds: int
    initial_sparsity: float | None = None
    keep: Counts | None = None

    def __post_init__(self) -> None:
        _freeze_fields(self, "pretrain", "prune", "retrain", "rounds")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        segments = [Segment(self.pretrain, phase="pretrain")]
        for number, rate in enumerate(self._rates(), start=1):
            segments.append(
                Segment(
                    self.prune,
                    sparse=True,
                    sparsity=rate,
                    keep=self.keep,
                    phase="prune",
                    round=number,
                )
            )
            segments.append(Segment(self.retrain, phase="retrain", round=number))
        set_field(self, "segments", tuple(segments))
        super().__post_init__()

    def _rates(self) -> list[Sparsity]:
        if self.initial_sparsity is None:
            return [self.sparsity] * self.rounds
        if isinstance(self.sparsity, tuple):
            raise TypeError("initial_sparsity needs one sparsity for all layers, not a mapping")
        first = fraction("initial_sparsity", self.initial_sparsity)
        last = float(self.sparsity)  # type: ignore[arg-type]
        if first > last:
            raise ValueError(f"initial_sparsity={first} is more than sparsity={last}")
        steps = max(self.rounds - 1, 1)
        rates = [first + (last - first) * number / steps for number in range(self.rounds)]
        return [*rates[:-1], last]

    @classmethod
    def paper(
        cls,
        dataset: str,
        *,
        channels: int = 64,
        sparsity: Sparsity | None = None,
        initial_sparsity: float | None = None,
    ) -> IHTSchedule:
        """The paper's iteration numbers (Section 5.1): 20,000, then 4 x (15,000 + 5,000).

        Args:
            dataset: ``"mini-imagenet"`` or ``"tiered-imagenet"``.
            channels: Channels per convolution: 32, 64, 128 or 256.
            sparsity: The rate of Table 1 or 2 for these channels by default.
            initial_sparsity: As in the constructor (0.1 in the authors' program).

        Raises:
            ValueError: If the paper has no such setting.
        """
        rate = _paper_sparsity(_PAPER_IHT_SPARSITY, dataset, channels)
        return cls(
            rate if sparsity is None else sparsity,
            pretrain=20_000,
            prune=15_000,
            retrain=5_000,
            rounds=4,
            initial_sparsity=initial_sparsity,
        )

    @classmethod
    def from_fractions(
        cls,
        sparsity: Sparsity,
        total: int,
        *,
        pretrain: float = 0.2,
        prune: float = 0.15,
        retrain: float = 0.05,
        rounds: int = 4,
        initial_sparsity: float | None = None,
        keep: Counts | None = None,
    ) -> IHTSchedule:
        """A run of ``total`` meta-iterations split by fractions of the whole.

        ``pretrain + rounds * (prune + retrain)`` must be 1. All rounds have the same length;
        what rounding leaves over goes to pre-training.

        Args:
            sparsity: As in the constructor.
            total: Meta-iterations in all, >= 1.
            pretrain: Fraction of the run in [0, 1], by default 0.2.
            prune: Fraction of the run in **one** round's sparse phase, by default 0.15.
            retrain: Fraction of the run in **one** round's dense phase, by default 0.05.
            rounds: Number of rounds, >= 1.
            initial_sparsity: As in the constructor.
            keep: As in the constructor.

        Raises:
            ValueError: If the fractions do not sum to 1, or do not fit into ``total``.

        Examples:
            >>> IHTSchedule.from_fractions(0.4, 1000).prune
            150
        """
        total, rounds = (
            whole_number("total", total, least=1),
            whole_number("rounds", rounds, least=1),
        )
        fractions = {"pretrain": pretrain, "prune": prune, "retrain": retrain}
        check_fractions(fractions)
        check_whole(fractions, pretrain + rounds * (prune + retrain))
        in_rounds = round(total * (1 - pretrain)) if pretrain else total
        if not pretrain and total % rounds:
            raise ValueError(f"total={total} does not divide into rounds={rounds} of equal length")
        length = in_rounds // rounds
        whole = (prune + retrain) or 1  # rounds may be empty
        if pretrain and rounds * length == total:
            raise ValueError(f"pretrain={pretrain:.2g} of total={total} is no iteration")
        parts = apportion(length, {"prune": prune / whole, "retrain": retrain / whole})
        return cls(
            sparsity,
            pretrain=total - rounds * length,
            rounds=rounds,
            initial_sparsity=initial_sparsity,
            keep=keep,
            **parts,
        )

    def scaled(self, total: int) -> IHTSchedule:
        """The same shape stretched or shrunk to ``total`` meta-iterations, >= 1.

        Raises:
            TypeError: If ``total`` is not a whole number.
            ValueError: If it is too small for the phases.
        """
        return self.from_fractions(
            self.sparsity,
            total,
            pretrain=self.pretrain / self.iterations,
            prune=self.prune / self.iterations,
            retrain=self.retrain / self.iterations,
            rounds=self.rounds,
            initial_sparsity=self.initial_sparsity,
            keep=self.keep,
        )


def _freeze_fields(schedule: DSDSchedule | IHTSchedule, *counts: str) -> None:
    for name in counts:
        set_field(schedule, name, whole_number(name, getattr(schedule, name)))
    if schedule.sparsity is None:
        if schedule.keep is None:
            raise TypeError("sparsity must be a number in [0, 1), or give keep= instead; got None")
        set_field(schedule, "sparsity", 0.0)
    set_field(schedule, "sparsity", frozen_sparsity("sparsity", schedule.sparsity))
    set_field(schedule, "keep", frozen_counts("keep", schedule.keep))


def _paper_sparsity(table: dict[str, dict[int, float]], dataset: str, channels: int) -> float:
    one_of("dataset", dataset, sorted(table))
    one_of("channels", channels, sorted(table[dataset]))
    return table[dataset][channels]
