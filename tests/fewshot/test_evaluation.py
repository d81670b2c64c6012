from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from l2l_prune import DSDSchedule, PrunedReptile
from l2l_prune.fewshot.data import Episode, EpisodeSampler
from l2l_prune.fewshot.evaluation import (
    Mean,
    accuracy,
    few_shot_accuracy,
    paired_difference,
    unpaired_difference,
)


class Knower:
    """Predicts the label that is written into the image; remembers what it was given."""

    def __init__(self, module):
        self.module, self.adapted, self.sizes = module, 0, []

    def clone(self):
        return self

    def adapt(self, loss):
        assert loss.requires_grad
        self.adapted += 1

    def __call__(self, x):
        self.sizes.append(len(x))
        return nn.functional.one_hot(x[:, 0, 0, 0].long(), 3).float() * self.module


def episode(queries=(0, 1, 2, 2), labels=(0, 1, 2, 1)):
    x = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1)
    return Episode(
        x, torch.arange(3), torch.tensor(queries).float().view(-1, 1, 1, 1), torch.tensor(labels)
    )


def test_mean_and_interval_by_hand():
    values = Mean((0.5, 0.7, 0.9))
    assert values.mean == pytest.approx(0.7)
    assert values.ci95 == pytest.approx(1.96 * 0.2 / math.sqrt(3))
    assert math.isnan(Mean((0.5,)).ci95)
    assert not Mean((0.5,)).significant
    assert Mean((0.1, 0.11, 0.12)).significant
    assert not Mean((-0.1, 0.1, 0.12)).significant


def test_one_task_has_no_interval_and_no_zero_is_negative():
    of_one = few_shot_accuracy(
        Knower(nn.Parameter(torch.ones(()))), [episode()], steps=0, batch_size=3
    )
    assert str(of_one) == "75.0 (one task, no interval)"
    assert str(Mean((-0.1, 0.0999))) == "0.0 ± 19.6"


def test_interval_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = torch.rand(400, dtype=torch.float64).tolist()
    assert Mean(tuple(values)).ci95 == pytest.approx(1.96 * stats.sem(values))


def test_differences():
    a, b = Mean((0.5, 0.9)), Mean((0.4, 0.6))
    assert paired_difference(a, b).values == pytest.approx((0.1, 0.3))
    assert unpaired_difference(a, b) == pytest.approx((0.2, math.hypot(a.ci95, b.ci95)))
    with pytest.raises(ValueError, match="must have the same tasks"):
        paired_difference(a, Mean((0.1,)))


@pytest.mark.parametrize("transductive", [True, False])
def test_accuracy_counts_right_answers(transductive):
    knower = Knower(torch.ones((), requires_grad=True))
    episodes = [episode(), episode(labels=(0, 1, 2, 2))]
    result = few_shot_accuracy(knower, episodes, steps=4, batch_size=2, transductive=transductive)
    assert result.values == (0.75, 1.0)
    assert knower.adapted == 8
    scored = knower.sizes[4:9] if not transductive else knower.sizes[4:5]
    assert scored[:4] == ([4, 4, 4, 4] if not transductive else [4])


def test_no_episodes_and_no_queries():
    knower = Knower(torch.ones((), requires_grad=True))
    with pytest.raises(ValueError, match="no episodes"):
        few_shot_accuracy(knower, [], steps=1, batch_size=1)
    with pytest.raises(ValueError, match="no queries to score"):
        few_shot_accuracy(knower, [episode((), ())], steps=1, batch_size=1)


def fixed_episodes(count=3):
    sampler = EpisodeSampler(
        torch.rand(60, 1, 6, 6), torch.arange(60) // 10, ways=3, shots=2, queries=3
    )
    return [sampler.sample() for _ in range(count)]


def test_transductive_and_alone_differ_only_by_batch_statistics(net):
    reptile = PrunedReptile(net, DSDSchedule(0.5, pretrain=0, prune=1, retrain=1))
    episodes = fixed_episodes(20)
    options = {"steps": 2, "batch_size": 3}
    results = {}
    for training in (True, False):
        net.train(training)
        results[training] = [
            few_shot_accuracy(
                reptile,
                episodes,
                transductive=transductive,
                generator=torch.Generator().manual_seed(0),
                **options,
            ).values
            for transductive in (True, False)
        ]
    assert results[True][0] != results[True][1]
    assert results[False][0] == results[False][1]  # running statistics: no difference


def test_reptile_is_left_alone_and_results_repeat(net):
    reptile = PrunedReptile(net, DSDSchedule(0.5, pretrain=0, prune=1, retrain=1))
    before = str(reptile.state_dict())
    episodes = fixed_episodes()
    first, second = (
        few_shot_accuracy(
            reptile,
            episodes,
            steps=3,
            batch_size=2,
            generator=torch.Generator().manual_seed(0),
        )
        for _ in range(2)
    )
    assert first == second
    assert str(reptile.state_dict()) == before


def test_learn2learn_maml_is_an_algorithm_too(net):
    l2l = pytest.importorskip("learn2learn")
    maml = l2l.algorithms.MAML(net, lr=0.1)
    result = few_shot_accuracy(maml, fixed_episodes(), steps=1, batch_size=6)
    assert len(result.values) == 3


@pytest.mark.parametrize(
    ("value", "refused"),
    [(math.nan, True), (math.inf, True), (-math.inf, False), (1e30, False)],
)
def test_scores_that_are_not_finite_are_no_chance(value, refused):
    """NaN is the largest of all for argmax: a diverged learner would look like a guess."""
    images, labels = torch.zeros(40, 1, 4, 4), torch.arange(40) % 4
    sampler = EpisodeSampler(images, labels, ways=3, shots=1, queries=2)
    episodes = [sampler.sample() for _ in range(4)]

    def scores(episode):
        found = torch.eye(3)[episode.query_y]
        if episode is episodes[1]:
            found[0, episode.query_y[0] - 1] = value
        return found

    if refused:
        with pytest.raises(FloatingPointError, match="scores of 1 of 4 tasks are not finite"):
            accuracy(scores, episodes)
    else:
        accuracy(scores, episodes)
