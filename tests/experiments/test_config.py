from __future__ import annotations

import json

import pytest

from l2l_prune import DSDSchedule
from l2l_prune.experiments.config import DEFAULTS, PUBLISHED, RunConfig, make_config, make_schedule


@pytest.mark.parametrize("algorithm", DEFAULTS)
@pytest.mark.parametrize("schedule", ["dense", "dsd", "iht"])
def test_every_pair_has_settings(algorithm, schedule):
    config = make_config(algorithm, schedule, iterations=100)
    assert config.schedule.iterations == 100
    assert any(s.sparse for s in config.schedule.segments) == (schedule != "dense")
    json.dumps(config.to_json())


def test_none_keeps_the_default_and_other_values_win():
    config = make_config("cavia", "dsd", channels=None, tasks=7)
    assert config.channels == 128
    assert config.tasks == 7
    assert config.schedule == DSDSchedule.from_fractions(0.5, 400)


def test_training_shots_follow_the_shots_of_the_evaluation():
    assert make_config("maml", "dsd", shots=5).train_shots == 5
    assert make_config("maml", "dsd", shots=5, train_shots=2).train_shots == 2
    assert make_config("metaoptnet", "dsd", shots=5).train_shots == 2  # one training for all shots
    assert make_config("reptile", "dsd", shots=5).train_shots == 10


def test_published_settings():
    for algorithm in PUBLISHED:
        config = make_config(algorithm, "dsd", sparsity=0.1, published=True)
        assert config.train_classes is None
        assert config.schedule.iterations == PUBLISHED[algorithm]["iterations"]
    cavia = make_config("cavia", "dsd", published=True)
    assert (cavia.inner_lr, cavia.meta_lr, cavia.inner_steps, cavia.tasks) == (1.0, 1e-3, 2, 16)
    metaoptnet = make_config("metaoptnet", "dsd", published=True)
    assert (metaoptnet.train_shots, metaoptnet.train_queries, metaoptnet.tasks) == (15, 6, 8)
    with pytest.raises(ValueError, match="published settings for reptile, cavia, metaoptnet only"):
        make_config("maml", "dsd", published=True)


def test_pruning_replaces_drop_block():
    assert make_config("metaoptnet", "dense").with_drop_block
    assert not make_config("metaoptnet", "dsd").with_drop_block
    assert make_config("metaoptnet", "dsd", drop_block=True).with_drop_block


def test_all_classes_are_trained_on_outside_glyphs():
    assert make_config("maml", "dsd").train_classes == 30
    assert make_config("maml", "dsd", data="mini-imagenet").train_classes is None
    assert make_config("maml", "dsd", data="mini-imagenet", train_classes=9).train_classes == 9


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_config("mamal", "dsd"), "algorithm must be one of"),
        (lambda: RunConfig("x", make_schedule("dense", 9, 0.5), algorithm="x"), "algorithm must"),
        (lambda: make_config("maml", "sdd"), "schedule must be one of dense, dsd, iht"),
        (lambda: make_config("maml", "dsd", sparsity=0.0), "sparsity"),
        (lambda: make_config("maml", "dsd", sparsity=1.0), "sparsity"),
        (lambda: make_config("maml", "dsd", backbone="resnet12"), "metaoptnet only"),
        (lambda: make_config("metaoptnet", "dsd", backbone="vgg"), "backbone must be"),
        (lambda: make_config("maml", "dsd", iterations=0), "make the run longer"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()
