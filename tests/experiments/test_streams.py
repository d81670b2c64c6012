"""What a run draws: streams that have nothing to do with each other."""

from __future__ import annotations

import itertools

import pytest
import torch

from l2l_prune.experiments.config import make_config
from l2l_prune.experiments.running import run as run_module
from l2l_prune.experiments.running.run import run
from l2l_prune.experiments.streams import PURPOSES, stream
from l2l_prune.fewshot.data import EpisodeSampler


def recorded(monkeypatch, **settings):
    """A run's episodes, by sampler: the training tasks come first."""
    samplers = []

    class Recorder(EpisodeSampler):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.drawn = []
            samplers.append(self.drawn)

        def sample(self):
            episode = super().sample()
            self.drawn.append(tuple(part.numpy().tobytes() for part in episode))
            return episode

    monkeypatch.setattr(run_module, "EpisodeSampler", Recorder)
    config = make_config(
        "reptile",
        settings.pop("schedule", "dense"),
        iterations=10,
        channels=2,
        tasks=2,
        shots=1,
        queries=5,
        train_shots=1,  # the size of the scored tasks, so that they could be the same
        train_queries=5,
        inner_steps=1,
        eval_steps=1,
        curve_tasks=8,
        final_tasks=8,
        **settings,
    )
    list(run(config))
    return samplers


@pytest.mark.parametrize("seed", range(4))
def test_no_task_is_scored_that_was_trained_on(seed, monkeypatch):
    training, *scored = recorded(monkeypatch, seed=seed, select="best")
    assert len(training) == 20
    assert [len(drawn) for drawn in scored] == [8] * 5  # three curves, two accuracies at the end
    for one, other in itertools.combinations([training, *scored], 2):
        assert not set(one) & set(other)


def test_methods_of_a_seed_see_the_same_tasks_and_seeds_do_not(monkeypatch):
    dense, pruned = (recorded(monkeypatch, seed=1, schedule=name) for name in ("dense", "dsd"))
    assert dense == pruned
    other = recorded(monkeypatch, seed=2)
    assert not any(set(a) & set(b) for a, b in itertools.product(dense, other))


def test_every_purpose_has_a_stream_of_its_own():
    assert len(set(PURPOSES.values())) == len(PURPOSES)
    names = [(seed, p, *i) for seed in range(20) for p in PURPOSES for i in ((), (0,), (1,))]
    draws = {torch.rand(4, generator=stream(*name)).numpy().tobytes() for name in names}
    assert len(draws) == len(names)
    with pytest.raises(KeyError, match="wieghts"):
        stream(0, "wieghts")


def test_streams_stay_as_they_are():
    """numpy promises SeedSequence's words, and torch's generator has been the same for years."""
    assert stream(0, "weights").initial_seed() == 3757552657
    assert stream(3, "final tasks", 2).initial_seed() == 487379023
