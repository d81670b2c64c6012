"""Runs that stop and go on, and checkpoints that are not what they should be."""

from __future__ import annotations

import itertools
import json
import weakref

import pytest
import torch

from l2l_prune.experiments import algorithms
from l2l_prune.experiments.config import make_config
from l2l_prune.experiments.run_result import Progress
from l2l_prune.experiments.running import run as run_module
from l2l_prune.experiments.running.checkpoint import load_checkpoint, save_checkpoint
from l2l_prune.experiments.running.run import run
from l2l_prune.fewshot.data import EpisodeSampler
from l2l_prune.fewshot.evaluation import Mean
from tests.experiments.conftest import settings, whole_run


@pytest.mark.parametrize("select", ["last", "best"])
@pytest.mark.parametrize("stop", [1, 9, 20])
def test_a_stopped_run_goes_on_bit_for_bit(stop, select, tmp_path):
    config = settings(select=select)
    whole = whole_run(config)
    file = tmp_path / "run.pt"
    for message in itertools.islice(run(config, file, checkpoint_every=3), stop):
        assert isinstance(message, Progress)
    *progress, resumed = run(config, file, checkpoint_every=3)
    done = 3 * ((stop - 1) // 3)  # the generator stopped before it could save the last
    assert [p.iteration for p in progress] in (
        list(range(done + 1, 21)),
        list(range(done + 4, 21)),
    )
    assert whole.train == resumed.train
    assert whole.test == resumed.test
    assert whole.curve == resumed.curve
    assert all(torch.equal(whole.weights[k], resumed.weights[k]) for k in whole.weights)


def test_the_best_weights_are_those_of_the_best_point(monkeypatch, tmp_path):
    """With accuracies that peak at meta-iteration 10, the weights are the ones of then."""

    def peak(self, episodes):
        return Mean((1 - abs(self.pruner.iteration - 10) / 100,) * 2)

    monkeypatch.setattr(algorithms.Reptile, "evaluate", peak)
    file = tmp_path / "run.pt"
    for message in run(settings(select="best"), file, checkpoint_every=10):
        if isinstance(message, Progress) and message.iteration == 11:
            then = torch.load(file, weights_only=True)["state"]["algorithm"]["reptile"]
    assert then["_extra_state"]["pruner"]["iteration"] == 10
    model = {k.removeprefix("module."): v for k, v in then.items() if k != "_extra_state"}
    masks = {k.removesuffix("_mask"): v for k, v in model.items() if k.endswith("_mask")}
    assert masks
    for name, weight in message.weights.items():
        expected = model[f"{name}_orig"] * masks[name] if name in masks else model[name]
        assert torch.equal(weight, expected), name


def test_the_best_weights_of_a_run_that_ends_sparse_are_sparse(monkeypatch):
    """Scores peak in the dense phase, whose weights the run's name would not describe."""

    def falling(self, episodes):
        return Mean((1 - self.pruner.iteration / 100,) * 2)

    monkeypatch.setattr(algorithms.Reptile, "evaluate", falling)
    config = make_config(
        "reptile", "one-shot", iterations=20, pretrain=0.6, sparsity=0.5, channels=4, tasks=1,
        final_tasks=2, select="best", eval_every=5,
    )  # fmt: skip
    *_, result = run(config)
    weight = result.weights["features.conv2.weight"]
    assert int((weight == 0).sum()) == weight.numel() // 2
    first_sparse = next(p for p in result.curve if p.sparsity > 0)
    assert first_sparse.iteration == 15


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    file = tmp_path / "run.pt"
    save_checkpoint(file, settings(), {"done": 3})
    assert load_checkpoint(file, settings()) == {"done": 3}
    with pytest.raises(ValueError, match="other settings"):
        load_checkpoint(file, settings(seed=1))
    assert load_checkpoint(tmp_path / "none.pt", settings()) is None


def test_a_checkpoint_from_before_a_setting_existed_goes_on(tmp_path):
    file = tmp_path / "run.pt"
    save_checkpoint(file, settings(), {"done": 3})
    saved = torch.load(file, weights_only=True)
    known = json.loads(saved["config"])
    del known["pattern"]
    torch.save({**saved, "config": json.dumps(known)}, file)
    assert load_checkpoint(file, settings()) == {"done": 3}
    with pytest.raises(ValueError, match="other settings"):
        load_checkpoint(file, settings(pattern="2:4"))


@pytest.mark.parametrize("damage", ["truncated", "text", "code", "empty"])
def test_a_damaged_checkpoint_is_refused_and_runs_no_code(damage, tmp_path):
    file = tmp_path / "run.pt"
    save_checkpoint(file, settings(), {"done": 3})
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "text":
        file.write_text("no checkpoint")
    elif damage == "code":
        torch.save({"version": 1, "config": print, "state": Bomb()}, file)
    else:
        file.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"run\.pt is damaged or was not written by this .*delete it"
    ):
        load_checkpoint(file, settings())
    assert not Bomb.exploded


class Bomb:
    exploded = False

    def __reduce__(self):
        return explode, ()


def explode():
    Bomb.exploded = True


def test_evaluation_tasks_are_drawn_as_they_are_used(monkeypatch):
    """The paper's 10,000 tasks on mini-ImageNet would fill 25 GB at once."""
    alive, most = weakref.WeakSet(), 0

    class Watched(EpisodeSampler):
        def sample(self):
            nonlocal most
            episode = super().sample()
            alive.add(episode.support_x)
            most = max(most, len(alive))
            return episode

    monkeypatch.setattr(run_module, "EpisodeSampler", Watched)
    *_, result = run(settings(final_tasks=200))
    assert len(result.test.values) == 200
    # The curves' tasks, one of training, and the 20 that are adapted at once, twice in passing.
    assert most <= 2 * 2 + 1 + 2 * 20
