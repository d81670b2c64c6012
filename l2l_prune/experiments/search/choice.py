"""Choose method, rate and phases for a network: layer sensitivity, races and a Pareto front."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from l2l_prune._basics import checks
from l2l_prune._basics.files import replace_file
from l2l_prune._basics.tensor_files import load_tensors
from l2l_prune.experiments.config import RunConfig, file_name
from l2l_prune.experiments.defaults import LEARN_MORE
from l2l_prune.experiments.methods import CANDIDATES, METHODS, TUNE_CHOOSES, TUNE_RATES
from l2l_prune.experiments.report.pareto import front_places
from l2l_prune.experiments.report.seed_statistics import amount, signed
from l2l_prune.experiments.report.tables import markdown_table
from l2l_prune.experiments.running.run import check_splits, load_split
from l2l_prune.experiments.running.storage import locked_folder, run_name
from l2l_prune.experiments.search.costs import Budget, Cost, cost_of, end_network, timed
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
from l2l_prune.experiments.search.pictures import front_picture, heat_map
from l2l_prune.experiments.search.sensitivity import MOST_RATE, Sensitivity, measure
from l2l_prune.fewshot.evaluation import Mean, paired_difference

PHASES: dict[str, tuple[dict[str, Any], ...]] = {
    "dsd": ({}, {"pretrain": 0.2, "retrain": 0.3}, {"pretrain": 0.1, "retrain": 0.5}),
    "iht": ({}, {"rounds": 2}),
    "one-shot": ({}, {"pretrain": 0.5}),
    "cubic": ({}, {"pretrain": 0.4}),
}
"""The phases that are tried for each method; an empty dict is its defaults."""

SHARES = ("layerwise", "erk", "global", "by layer", "channels")
"""How pruning is distributed over layers: an allocation, rates by sensitivity, or channels."""

SEARCHING = 0.8
"""Share of the hours for the search; the rest is for the choice on test tasks."""

BRACKET = 9
"""Candidates in a race."""


@dataclass(frozen=True)
class Tuned:
    """The result of a search.

    Attributes:
        settings: The winner, as arguments of :func:`~l2l_prune.experiments.config.make_config`.
        title: Its name.
        validation: Its scores on validation tasks, by which it was chosen.
        dense: The dense network's scores on these.
        cost: What the winner costs.
        test: Its scores on test tasks; ``None`` if the time ran out before.
        front: The names on the Pareto front of size and score.
        words: A summary in sentences.
    """

    settings: dict[str, Any]
    title: str
    validation: Mean
    dense: Mean
    cost: Cost
    test: Mean | None
    front: tuple[str, ...]
    words: str


def tune(
    base: Mapping[str, Any],
    out: Path,
    console: Console,
    *,
    methods: Sequence[str] = CANDIDATES,
    rates: Sequence[float] = TUNE_RATES,
    races: int = 3,
    budget: Budget | None = None,
    hours: float | None = None,
    jobs: int = 2,
    sensitivity_tasks: int = 50,
) -> Tuned:
    """Choose how to prune a network, on validation tasks, within a budget.

    The dense network is trained, and each of its layers is pruned alone. Races of nine candidates
    follow, by successive halving: candidates of the first are drawn at random, later ones by
    Optuna's tree-structured Parzen estimator from earlier results, or at random where it repeats
    itself. Candidates that end dense and those that end sparse race separately, so that the front
    holds both. The best of all that were trained to the full length is chosen, trained again with
    the same seed, and scored once on test tasks.

    Args:
        base: Settings of ``run``, ``algorithm`` among them.
        out: The folder; a stopped search resumes from it. It gets ``chosen.toml`` for
            ``run --config``, ``tune.md``, ``front.png``, ``sensitivity.png`` and ``.json``, and
            Optuna's journal.
        console: Where progress is shown.
        methods: Candidate methods, keys of :data:`~l2l_prune.experiments.methods.METHODS`.
        rates: Candidate fractions to prune.
        races: Number of races, >= 1; with ``hours``, the largest number.
        budget: What the final network may cost.
        hours: Time limit of the whole search, over all restarts.
        jobs: Runs at once, one thread each.
        sensitivity_tasks: Validation tasks behind each cell of the heat map.

    Raises:
        ImportError: If Optuna is missing.
        TypeError: If a value has the wrong type.
        ValueError: If nothing meets the budget (the nearest is named), settings are not possible,
            the folder belongs to another search, or another process writes to it.
    """
    _optuna()
    budget = budget or Budget()
    checks.whole_number("races", races, least=1)
    shared = base_settings(base, TUNE_CHOOSES)
    if unknown := sorted(set(methods) - (METHODS.keys() - {"dense"})):
        others = ", ".join(name for name in METHODS if name != "dense")
        raise ValueError(f"methods must be from {others}, got {unknown[0]!r}")
    dense = Candidate({**shared, "method": "dense"})
    config = dense.whole
    length = config.schedule.iterations
    with locked_folder(out):
        about = {**shared, "methods": list(methods), "rates": list(rates), **budget.given}
        check_search(out / "tune.json", about)
        check_splits([config], "test")
        shape = load_split(config, "train").images.shape[1:]
        space = Space(shared, methods, rates, shape, budget, out / "milliseconds.json")
        space.check()  # before anything is trained
        record_search(out / "tune.json", about)
        runs = Runs(out / "runs", console, jobs=jobs, hours=hours, clock=out / "clock.json")
        entry = runs.finish_one(config, "the dense run", SEARCHING)
        found = _sensitivity(config, runs.folder, out, rates, sensitivity_tasks, console)
        space.add_layer_rates(found)
        standings = [Standing(dense, length, entry)]
        standings += _search(space, runs, out, length, races, config.seed)
        return _choose(standings, space, runs, out, length, console)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError(f'{error}; tune needs: pip install "l2l-prune[tune]"') from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class Space:
    """The candidates that meet the budget, as a tree: method, rate, share, phases."""

    def __init__(
        self,
        shared: Mapping[str, Any],
        methods: Sequence[str],
        rates: Sequence[float],
        image_shape: Sequence[int],
        budget: Budget,
        times: Path,
    ) -> None:
        for rate in rates:
            checks.fraction("rate", rate)
        self._shared, self._methods, self._rates = shared, methods, rates
        self._shape, self.budget = image_shape, budget
        self._costs: dict[str, Cost] = {}
        self._times = times
        self._spent: dict[str, float] = json.loads(times.read_text()) if times.exists() else {}
        self._layer_rates: dict[float, str] = {}
        self._nearest: tuple[float, str, Cost] | None = None
        self.tree = self._grow()

    def cost(self, candidate: Candidate) -> Cost:
        """What a candidate costs; candidates whose final networks are alike share the work."""
        config, ends = candidate.whole, self._ends(candidate)
        if ends not in self._costs:
            cost = cost_of(config, self._shape)
            if self.budget.milliseconds is not None:
                cost = self._timed([candidate], [cost])[0]
            self._costs[ends] = cost
        return self._costs[ends]

    def timed_costs(self, candidates: Sequence[Candidate]) -> list[Cost]:
        """What they cost, with the time of a forward pass."""
        return self._timed(candidates, [self.cost(candidate) for candidate in candidates])

    def _ends(self, candidate: Candidate) -> str:
        """A name for the kind of the final network, on which all costs depend."""
        config = candidate.whole
        last = config.schedule.last
        if not last.held:
            return "dense"
        kind = "channels" if config.structured else config.allocation
        return f"{kind} {last.sparsity}"

    def _timed(self, candidates: Sequence[Candidate], costs: Sequence[Cost]) -> list[Cost]:
        """The same with times; masks save none, so a masked network counts as long as dense.

        Times are kept in a file, so that after a restart the same candidates meet the budget.
        """
        keys = [e if e.startswith("channels") else "dense" for e in map(self._ends, candidates)]
        missing = {
            key: candidate
            for key, candidate in zip(keys, candidates, strict=True)
            if key not in self._spent
        }
        if missing:
            self._spent |= timed(
                {key: end_network(one.whole, self._shape) for key, one in missing.items()},
                self._shape,
            )
            with replace_file(self._times) as path:
                path.write_text(json.dumps(self._spent))
        return [
            dataclasses.replace(cost, milliseconds=self._spent[key])
            for key, cost in zip(keys, costs, strict=True)
        ]

    def check(self) -> None:
        """Refuse a budget that nothing meets.

        Raises:
            ValueError: It names what comes nearest.
        """
        if self.tree:
            return
        if self._nearest is None:
            raise ValueError(
                "none of the methods and rates can be combined with these settings: choose others"
            )
        _, title, cost = self._nearest
        costs = ", ".join(
            f"{getattr(cost, name):,.4g} {name}"
            if name == "milliseconds"
            else f"{getattr(cost, name):,} {name}"
            for name in self.budget.given
        )
        raise ValueError(f"nothing meets the budget: the nearest is {title} with {costs}")

    def add_layer_rates(self, found: Sensitivity | None) -> None:
        """Add rates by layer to the shares."""
        if found is not None:
            for rate in (rate for rate in self._rates if rate < MOST_RATE):
                listed = [f"{name}={own}" for name, own in found.layer_rates(rate).items()]
                self._layer_rates[rate] = ",".join(listed)
            self.tree = self._grow()

    @property
    def by_layer(self) -> bool:
        """Whether rates by layer may be chosen."""
        return bool(self._layer_rates)

    def draw(self, suggest: Callable[[str, Sequence[Any]], Any]) -> Candidate:
        """A candidate, from a function that chooses by a parameter's name among its values."""
        method = suggest("method", list(self.tree))
        rate = suggest(f"rate of {method}", list(self.tree[method]))
        shares = self.tree[method][rate]
        share = suggest(f"share of {method} {rate}", shares)
        phases = suggest(f"phases of {method}", list(range(len(self._phases(method)))))
        return self._candidate(method, rate, share, self._phases(method)[phases])

    def candidates(self) -> list[Candidate]:
        """All of them."""
        return [
            self._candidate(method, rate, share, phases)
            for method, found in self.tree.items()
            for rate, shares in found.items()
            for share in shares
            for phases in self._phases(method)
        ]

    def _grow(self) -> dict[str, dict[float, list[str]]]:
        tree: dict[str, dict[float, list[str]]] = {}
        for method in self._methods:
            for rate in self._rates:
                for share in SHARES:
                    if share == "by layer" and rate not in self._layer_rates:
                        continue
                    if self._possible(method, rate, share):
                        tree.setdefault(method, {}).setdefault(rate, []).append(share)
        return tree

    def _possible(self, method: str, rate: float, share: str) -> bool:
        if share == "global" and METHODS[method].settings.get("criterion") == "random":
            return False  # a global choice among random scores is the same as layer by layer
        try:
            candidate = self._candidate(method, rate, share, {})
            title, cost = candidate.title, self.cost(candidate)
        except ValueError:  # not for this method or algorithm, or a layer would lose all weights
            return False
        except ImportError:  # cutting channels needs an extra
            if share != "channels":
                raise
            return False
        excess = self.budget.excess(cost)
        if self._nearest is None or excess < self._nearest[0]:
            self._nearest = (excess, title, cost)
        return excess <= 1

    @staticmethod
    def _phases(method: str) -> tuple[dict[str, Any], ...]:
        return PHASES.get(method, ({},))

    def _candidate(
        self, method: str, rate: float, share: str, phases: Mapping[str, Any]
    ) -> Candidate:
        settings = {**self._shared, "method": method, "sparsity": rate, **phases}
        if share == "channels":
            settings["structured"] = True
        elif share == "by layer":
            settings["layer_rates"] = self._layer_rates[rate]
        elif share != "layerwise":
            settings["allocation"] = share
        return Candidate(settings)


def _sensitivity(
    config: RunConfig,
    folder: Path,
    out: Path,
    rates: Sequence[float],
    tasks: int,
    console: Console,
) -> Sensitivity | None:
    """Measure the sensitivity once, and draw it."""
    if config.algorithm in LEARN_MORE:
        console.print(f"no sensitivity by layer: {config.algorithm} learns more than weights")
        return None
    file = out / "sensitivity.json"
    if not file.exists():
        console.print("pruning each layer of the dense network alone")
        weights = load_tensors(folder / run_name(config) / f"{file_name(config.name)}.pt")
        with torch.random.fork_rng(devices=[]):
            measure(config, weights, sorted(rates), tasks).save(file)
    found = Sensitivity.read(file)
    heat_map(found, config.measure, out / "sensitivity.png")
    return found


def _search(
    space: Space, runs: Runs, out: Path, length: int, races: int, seed: int
) -> list[Standing]:
    """Run the races; Optuna's journal records each one's candidates and results.

    A race that was interrupted stays open there, and goes on from its runs.
    """
    optuna = _optuna()
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    file = out / "optuna.journal"
    try:
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(file)))
        journal = optuna.create_study(
            storage=storage, study_name="tune", direction="maximize", load_if_exists=True
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged ({error}): delete it, and candidates are drawn anew; runs that "
            "have finished are kept"
        ) from None
    seen: dict[str, Standing] = {}
    tried: set[str] = set()  # those whose run failed among them
    for number in range(races):
        new = not runs.over(SEARCHING)
        drawn = _taking_part(journal, space, number, tried, seed + number, new)
        tried |= drawn.keys()
        if not drawn:
            break  # everything has been tried, or the hours are used up
        candidates = [candidate for _, candidate in drawn.values()]
        lengths = rungs(candidates, length)
        # Separately: else the front would have no small networks where these lose accuracy.
        groups = [[c for c in candidates if c.ends_sparse == sparse] for sparse in (False, True)]
        found = {
            run_name(standing.candidate.whole): standing
            for group in groups
            for standing in race(group, lengths, runs, SEARCHING)
        }
        seen |= found
        if runs.over(SEARCHING):
            continue  # races that have ended count, and one that was interrupted stays open
        for name, (trial, _) in drawn.items():
            if name not in found:  # its run failed
                journal.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
                continue
            score, reached = found[name].score.mean, found[name].iterations
            if not journal.trials[trial.number].state.is_finished():
                trial.report(score, reached)
            if reached < length:
                journal.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
            else:
                journal.tell(trial, score, skip_if_finished=True)
    return [standing for standing in seen.values() if standing.iterations == length]


def _taking_part(
    journal: Any, space: Space, number: int, tried: Set[str], seed: int, new: bool
) -> dict[str, tuple[Any, Candidate]]:
    """A race's trials and candidates by the name of their runs: in the journal, or drawn now.

    Args:
        journal: Optuna's study.
        space: What may be chosen.
        number: Number of the race.
        tried: Names of candidates in earlier races.
        seed: Seed of the draws.
        new: Whether to draw candidates that the journal does not hold.
    """
    from optuna.samplers import RandomSampler, TPESampler
    from optuna.trial import Trial, TrialState

    drawn: dict[str, tuple[Any, Candidate]] = {}
    for frozen in journal.get_trials(deepcopy=False):
        if frozen.user_attrs.get("race") == number and "copy" not in frozen.user_attrs:
            candidate = space.draw(_as_in(frozen.params))
            trial = Trial(journal, frozen._trial_id)
            drawn[run_name(candidate.whole)] = (trial, candidate)
        elif "race" not in frozen.user_attrs:  # the search was killed while drawing it
            journal.tell(frozen.number, state=TrialState.FAIL, skip_if_finished=True)
    journal.sampler = TPESampler(seed=seed, n_startup_trials=BRACKET, constant_liar=True)
    for asked in range(10 * BRACKET if new else 0):
        if len(drawn) == BRACKET:
            break
        if asked == 2 * BRACKET:  # it repeats itself: values are few, and the good ones are tried
            journal.sampler = RandomSampler(seed=seed)
        trial = journal.ask()
        candidate = space.draw(trial.suggest_categorical)
        name = run_name(candidate.whole)
        if name in drawn or name in tried:
            trial.set_user_attr("copy", True)
            trial.set_user_attr("race", number)
            journal.tell(trial, state=TrialState.FAIL)
            continue
        trial.set_user_attr("race", number)
        drawn[name] = (trial, candidate)
    return drawn


def _as_in(parameters: Mapping[str, Any]) -> Callable[[str, Sequence[Any]], Any]:
    """Choose what was chosen before."""
    return lambda name, values: parameters[name]


def _choose(
    standings: Sequence[Standing],
    space: Space,
    runs: Runs,
    out: Path,
    length: int,
    console: Console,
) -> Tuned:
    """Take the best within the budget: write its files, score it on test tasks, describe it."""
    dense = standings[0]
    titles = _titles(standings)
    costs = space.timed_costs([standing.candidate for standing in standings])
    within = [i for i, cost in enumerate(costs) if space.budget.excess(cost) <= 1]
    if not within:
        raise ValueError(
            "no run of full length has finished within the budget yet: repeat the command, with "
            "more hours if these are used up"
        )
    best = max(within, key=lambda i: standings[i].score.mean)
    points = [(cost.bytes, s.score.mean) for cost, s in zip(costs, standings, strict=True)]
    front = front_places(points)
    choice = standings[best].candidate
    front_picture(
        [
            (title, cost.bytes / 1000, standing.score)
            for title, cost, standing in zip(titles, costs, standings, strict=True)
        ],
        front,
        0,
        best,
        out / "front.png",
    )
    lines = [f"# {titles[best]}: chosen by l2l-prune tune on validation tasks"]
    with replace_file(out / "chosen.toml") as path:
        text = "\n".join([*lines, *toml_lines(choice.settings)]) + "\n"
        path.write_text(text, encoding="utf-8")
    final = runs.beside(out / "chosen")
    entries = final.finish([c.config(length, "test") for c in (choice, dense.candidate)])
    scores = [
        None if entry is None else Mean(tuple(entry["test"]["per_task"]), choice.whole.measure)
        for entry in entries
    ]
    failed = next(iter(final.failed.values()), None)
    words = _words(titles, standings, costs, best, within, scores, failed)
    table = _table(titles, standings, costs, front, best)
    with replace_file(out / "tune.md") as path:
        path.write_text(
            f"# Chosen: {titles[best]}\n\n{words}\n\n{table}\n\n![Pareto front](front.png)\n"
            + ("\n![Sensitivity](sensitivity.png)\n" if space.by_layer else ""),
            encoding="utf-8",
        )
    console.print(table, markup=False, soft_wrap=True)
    console.print(words, markup=False, soft_wrap=True)
    # Not wrapped, so that the line can be copied.
    console.print(
        f"wrote {out}/chosen.toml: l2l-prune run --config {out}/chosen.toml",
        markup=False,
        soft_wrap=True,
    )
    return Tuned(
        dict(choice.settings),
        titles[best],
        standings[best].score,
        dense.score,
        costs[best],
        scores[0],
        tuple(titles[i] for i in front),
        words,
    )


def _titles(standings: Sequence[Standing]) -> list[str]:
    """Distinct names: those with rates by layer also give the overall rate."""
    found = []
    for standing in standings:
        settings, title = standing.candidate.settings, standing.candidate.title
        if "layer_rates" in settings:
            title += f" {100 * settings['sparsity']:g}%"
        found.append(title)
    return found


def _table(
    titles: Sequence[str],
    standings: Sequence[Standing],
    costs: Sequence[Cost],
    front: Sequence[int],
    best: int,
) -> str:
    order = sorted(range(len(titles)), key=lambda i: -standings[i].score.mean)
    return markdown_table(
        [
            {
                "network": titles[i],
                "validation": str(standings[i].score),
                "weights": f"{costs[i].weights:,}",
                "KB": f"{costs[i].bytes / 1000:,.1f}",
                "MACs": f"{costs[i].macs:,}",
                "ms": f"{costs[i].milliseconds:.2f}",
                "seconds to train": f"{standings[i].entry['seconds']:,.0f}",
                "": " ".join(
                    word for word, said in (("chosen", i == best), ("front", i in front)) if said
                ),
            }
            for i in order
        ]
    )


def _words(
    titles: Sequence[str],
    standings: Sequence[Standing],
    costs: Sequence[Cost],
    best: int,
    within: Sequence[int],
    test: Sequence[Mean | None],
    failed: str | None,
) -> str:
    """The choice compared with dense, in sentences."""
    dense, *pruned = standings
    if not pruned:
        return "No pruned run of full length ended within the hours: dense is what there is."
    rival = max((i for i in within if i), key=lambda i: standings[i].score.mean, default=0)
    said = []
    if rival == 0:
        said.append("No pruned network of full length is within the budget.")
    else:
        difference = paired_difference(standings[rival].score, dense.score)
        gain = f"{amount(difference)} against dense on validation tasks"
        if difference.mean <= 0:
            said.append(f"Nothing beats dense: the best pruned network, {titles[rival]}, {gain}.")
        elif not difference.significant:
            said.append(
                f"Nothing beats dense for sure: {titles[rival]}, {gain}, is not significant."
            )
        else:
            said.append(f"{titles[rival]} beats dense: {gain}.")
        said.append(
            f"It takes {100 * costs[rival].bytes / costs[0].bytes:.0f}% of dense's bytes and "
            f"{100 * costs[rival].macs / costs[0].macs:.0f}% of its multiply-accumulate operations."
        )
    if 0 not in within:
        said.append("Dense does not meet the budget.")
    own, theirs = test
    if failed is not None:
        said.append(f"A run on test tasks failed: {failed}.")
    elif own is None:
        said.append("The hours ended before the choice was scored on test tasks.")
    if own is not None and best == 0:
        said.append(f"On test tasks, scored once: dense {own}.")
    elif own is not None and theirs is not None:
        difference = paired_difference(own, theirs)
        said.append(
            f"On test tasks, scored once: {titles[best]} {own}, dense {theirs}, difference "
            f"{signed(difference)}."
        )
    said.append(
        "All of one seed, with intervals over tasks, and the best of several is flattered: "
        "l2l-prune study repeats it over seeds and splits."
    )
    return " ".join(said)
