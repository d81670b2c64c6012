"""Sparse phases taught by the dense meta-model, against a run written by hand in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from l2l_prune.experiments.algorithms import build
from l2l_prune.experiments.config import make_config
from l2l_prune.experiments.running.streams import stream
from l2l_prune.experiments.search.costs import cost_of
from l2l_prune.fewshot.data import EpisodeSampler
from l2l_prune.fewshot.data.minibatches import minibatches

SHAPE = (1, 28, 28)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def settings(method="dsd", **options):
    usual = {"iterations": 6, "pretrain": 1 / 3, "retrain": 0.0, "channels": 3, "ways": 3}
    usual |= {"tasks": 2, "inner_steps": 3, "inner_batch": 4, "inner_lr": 0.01, "sparsity": 0.5}
    return make_config("reptile", method, **{**usual, "distil": 0.7, **options})


def start(config):
    torch.manual_seed(0)
    return build(config, SHAPE)


def tasks():
    images = torch.rand(36, *SHAPE, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(36) // 12
    sampler = EpisodeSampler(images, labels, ways=3, shots=4, queries=0, seed=2)
    return [sampler.sample() for _ in range(2)]


class ByHand:
    """Reptile with Adam whose second moments carry over; no code of the package but the network."""

    def __init__(self, config, net):
        self.config, self.net = config, net
        self.meta = {n: p.detach().clone() for n, p in net.named_parameters()}
        self.state = {n: (torch.zeros_like(p), 0) for n, p in self.meta.items()}
        self.masks = {}

    def scores(self, weights, x):
        return functional_call(self.net, weights, (x,))

    def step(self, weights, state, loss):
        gradients = torch.autograd.grad(loss, list(weights.values()))
        with torch.no_grad():
            for (name, weight), g in zip(list(weights.items()), gradients, strict=True):
                v, count = state[name]
                v, count = 0.999 * v + 0.001 * g * g, count + 1
                root = (v / (1 - 0.999**count)).sqrt() + 1e-8
                state[name] = v, count
                moved = weight - self.config.inner_lr * g / root
                weights[name] = (moved * self.masks.get(name, 1)).requires_grad_()

    def learner(self, meta):
        return {n: (p * self.masks.get(n, 1)).requires_grad_() for n, p in meta.items()}

    def iteration(self, drawn, meta_lr, teacher=None):
        ends = []
        a, t = self.config.distil, self.config.distil_temperature
        for batches in drawn:
            soft = [None] * len(batches)
            if teacher:
                weights = {n: p.clone().requires_grad_() for n, p in teacher.meta.items()}
                state = dict(teacher.state)
                for x, y in batches:
                    teacher.step(weights, state, F.cross_entropy(self.scores(weights, x), y))
                soft = [self.scores(weights, x).detach() for x, _ in batches]
            weights = self.learner(self.meta)
            for (x, y), wanted in zip(batches, soft, strict=True):
                found = self.scores(weights, x)
                loss = F.cross_entropy(found, y)
                if wanted is not None:
                    p, q = (wanted / t).softmax(1), (found / t).softmax(1)
                    kl = (p * (p.log() - q.log())).sum() / len(x)
                    loss = (1 - a) * loss + a * t * t * kl
                self.step(weights, self.state, loss)
            ends.append(weights)
        for name, value in self.meta.items():
            mean = sum(w[name].detach() for w in ends) / len(ends)
            self.meta[name] = (value + meta_lr * (mean - value)) * self.masks.get(name, 1)


@pytest.mark.parametrize("temperature", [4.0, 1.5])
def test_a_run_equals_one_written_by_hand(float64, temperature):
    config = settings(distil_temperature=temperature)
    episodes = [task._replace(support_x=task.support_x.double()) for task in tasks()]
    learner = start(config)
    hand = ByHand(config, start(settings("dense", distil=0.0)).finalize())
    generator, teacher = stream(config.seed, "training minibatches"), None
    for number in range(6):
        drawn = [
            list(minibatches(x, y, batch_size=4, steps=3, generator=generator))
            for x, y, *_ in episodes
        ]
        hand.iteration(drawn, 1 - number / 6, teacher)
        learner.train(episodes)
        if number == 1:  # the end of the dense phase
            assert learner.pruner.sparse
            teacher = copy.deepcopy(hand)
            hand.masks = {n: m.double() for n, m in learner.pruner.masks.items()}
            hand.meta = {n: p * hand.masks.get(n, 1) for n, p in hand.meta.items()}
    final = dict(learner.finalize().named_parameters())
    for name, value in hand.meta.items():
        if ".conv" in name and name.endswith("bias"):
            continue  # before normalisation: all of its gradient is rounding
        torch.testing.assert_close(final[name], value, rtol=1e-8, atol=1e-10)


def test_each_sparse_phase_has_the_dense_model_before_it_as_its_teacher():
    config = settings("iht", iterations=12, pretrain=1 / 4, retrain=1 / 3, rounds=2)
    learner, episodes, seen = start(config), tasks(), []
    for number in range(12):
        was = learner.pruner.segment.sparse
        learner.train(episodes)
        if learner.pruner.segment.sparse and not was:
            state = learner.state_dict()["teacher"]
            values = {n.removeprefix("module.").removesuffix("_orig"): v for n, v in state.items()}
            for name, parameter in learner.pruner.model.named_parameters():
                plain = name.removesuffix("_orig")
                mask = learner.pruner.masks.get(plain, torch.ones_like(parameter)).bool()
                assert torch.equal(values[plain][mask], parameter[mask])
                assert bool(values[plain][~mask].all())
            seen.append(number)
    assert len(seen) == 2


@pytest.mark.parametrize("structured", [False, True])
def test_a_run_stopped_in_a_sparse_phase_goes_on_exactly(structured):
    if structured:
        pytest.importorskip("torch_pruning")
    config, episodes = settings(structured=structured, channels=4), tasks()
    learner, again = start(config), start(config)
    for number in range(6):
        if number == 4:
            assert learner.pruner.segment.sparse
            again.load_state_dict(copy.deepcopy(learner.state_dict()))
        for one in (learner, again)[: 1 + (number >= 4)]:
            one.train(episodes)
    ends = (learner.pruner.model.parameters(), again.pruner.model.parameters())
    assert all(map(torch.equal, *ends))


def test_only_sparse_phases_are_taught():
    config, plain = settings(pretrain=1 / 3, retrain=1 / 3), settings(distil=0.0, retrain=1 / 3)
    learner, other, episodes = start(config), start(plain), tasks()
    equal = []
    for _ in range(6):
        learner.train(episodes)
        other.train(episodes)
        equal.append(
            all(
                map(
                    torch.equal,
                    learner.pruner.model.parameters(),
                    other.pruner.model.parameters(),
                )
            )
        )
    assert equal == [True] * 2 + [False] * 4
    # From here on they learn alike again: the same start gives the same step.
    other.load_state_dict({**learner.state_dict(), "teacher": None})
    learner.train(episodes)
    other.train(episodes)
    ends = (learner.pruner.model.parameters(), other.pruner.model.parameters())
    assert all(map(torch.equal, *ends))


def test_what_cannot_be_distilled():
    for method in ("rigl", "static", "task-masks"):
        with pytest.raises(ValueError, match="distil needs a dense phase before the first sparse"):
            make_config("reptile", method, distil=0.5, iterations=40)
    with pytest.raises(ValueError, match="distil needs a dense phase"):
        settings(pretrain=0.0)
    with pytest.raises(ValueError, match="distil works only with the algorithm reptile"):
        make_config("maml", "dsd", distil=0.5)
    with pytest.raises(ValueError, match=r"distil must be in \[0, 1\), got 4"):
        settings(distil=4.0)
    with pytest.raises(ValueError, match="distil_temperature must be a number > 0"):
        settings(distil_temperature=0.0)
    with pytest.raises(ValueError, match="distil_temperature does nothing without distil"):
        settings(distil=0.0, distil_temperature=2.0)


def test_names_and_costs():
    assert settings().name == "DSD, pretrain 33.3333%, no retrain, distil 0.7"
    assert settings(distil_temperature=2.0).name.endswith("distil 0.7, temperature 2")
    assert settings("dense").name == "dense"
    taught = settings(distil_temperature=2.0)
    assert cost_of(taught, SHAPE) == cost_of(settings(distil=0.0), SHAPE)
