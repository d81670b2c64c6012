"""A run whose tasks are shared by processes that it starts itself."""

from __future__ import annotations

import functools
import itertools
import multiprocessing

import pytest
import torch
from torch.nn import functional as F

from l2l_prune import PrunedReptile
from l2l_prune.experiments.algorithms.base import conv4
from l2l_prune.experiments.config import make_config
from l2l_prune.experiments.run_result import RunResult
from l2l_prune.experiments.running import run as run_module
from l2l_prune.experiments.running import run_folder
from l2l_prune.experiments.running.run import run
from l2l_prune.experiments.running.run_folder import run_into
from l2l_prune.experiments.running.storage import run_name
from l2l_prune.experiments.streams import stream
from l2l_prune.fewshot.data.minibatches import minibatches

TINY = {
    "iterations": 6,
    "channels": 4,
    "tasks": 4,
    "inner_steps": 2,
    "train_shots": 2,
    "train_classes": 6,
    "final_tasks": 2,
    "eval_every": 3,
    "pretrain": 1 / 6,
    "retrain": 1 / 3,
}


def settings(**options):
    return make_config("reptile", "dsd", **{**TINY, **options})


def merged(first, second):
    """Two PrunedReptiles that know of no ranks: both go on from the sum of what they collected."""
    first._collected = [a + b for a, b in zip(first._collected, second._collected, strict=True)]
    first._tasks += second._tasks
    for mine, other in zip(first._inner_state, second._inner_state, strict=True):
        mine["exp_avg_sq"] = (mine["exp_avg_sq"] + other["exp_avg_sq"]) / 2
    first.step()
    second.load_state_dict(first.state_dict())


def by_hand(config):
    data = run_module.load_split(config, "train")
    tasks = run_module._training_tasks(data, config)
    batches = stream(config.seed, "training minibatches")
    reptiles = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(stream(config.seed, "weights").get_state())
            net = conv4(config, data.images.shape[1:])
        reptiles.append(
            PrunedReptile(
                net,
                config.schedule,
                inner_lr=config.inner_lr,
                meta_lr=config.meta_lr,
                layers=config.layers,
            )
        )
    for _ in range(config.schedule.iterations):
        drawn = [tasks.sample() for _ in range(config.tasks)]
        for number, task in enumerate(drawn):
            reptile = reptiles[number % 2]
            learner = reptile.clone()
            for x, y in minibatches(
                task.support_x,
                task.support_y,
                batch_size=config.inner_batch,
                steps=config.inner_steps,
                generator=batches,
            ):
                learner.adapt(F.cross_entropy(learner(x), y))
            reptile.collect(learner)
        merged(*reptiles)
    return reptiles[0].finalize().state_dict()


@pytest.mark.slow
@pytest.mark.process
def test_two_ranks_give_what_two_learners_merged_by_hand_give(tmp_path):
    config = settings(ranks=2)
    expected = by_hand(config)
    *_, result = run(config)
    assert isinstance(result, RunResult)
    for name, tensor in expected.items():
        torch.testing.assert_close(result.weights[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert multiprocessing.active_children() == []
    assert not torch.distributed.is_initialized()
    # stopped and taken up again: the same bits
    stopped = run(config, tmp_path / "c.pt", checkpoint_every=2)
    list(itertools.islice(stopped, 5))
    stopped.close()
    *_, resumed = run(config, tmp_path / "c.pt", checkpoint_every=2)
    assert all(torch.equal(result.weights[n], resumed.weights[n]) for n in expected)
    assert resumed.test == result.test


@pytest.mark.slow
@pytest.mark.process
def test_where_a_rank_dies_the_run_fails_and_goes_on_later(tmp_path, monkeypatch):
    config = settings(ranks=2)

    def kill_it(progress):
        if progress.iteration == 4:
            for process in multiprocessing.active_children():
                process.kill()

    every_other = functools.partial(run, checkpoint_every=2)
    monkeypatch.setattr(run_folder, "run", every_other)
    outcome = run_into(config, tmp_path, tell=kill_it)
    assert outcome.error
    assert (tmp_path / run_name(config) / "error.txt").exists()
    assert (tmp_path / run_name(config) / "checkpoint.pt").exists()
    assert run_into(config, tmp_path).error is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tasks": 5}, "multiple of ranks"),
        ({"dropout": 0.1}, "leave ranks out"),
        ({"criterion": "grasp"}, "leave ranks out"),
    ],
)
def test_what_ranks_cannot_share_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        settings(ranks=2, **options)
    with pytest.raises(ValueError, match="only with the algorithm reptile"):
        make_config("maml", "dsd", ranks=2)
