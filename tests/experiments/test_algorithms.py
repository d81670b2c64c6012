"""Every meta-learner of the command: it learns, it prunes, and evaluation leaves no trace."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from l2l_prune.experiments.algorithms import build
from l2l_prune.experiments.config import make_config
from l2l_prune.experiments.defaults import DEFAULTS
from l2l_prune.fewshot.data import EpisodeSampler
from tests.conftest import without_compiler

pytest.importorskip("learn2learn")
pytestmark = pytest.mark.filterwarnings("ignore:finalize")  # in the middle of a schedule


def sampler(size=28, seed=0, pictures=False):
    """Noise: what is learnt of it is learnt by heart; ``pictures``: tasks of one picture."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(8).repeat_interleave(12)
    images = torch.rand(len(labels), 1, size, size, generator=generator)
    ways, shots, queries = (1, 1, 0) if pictures else (3, 2, 4)
    return EpisodeSampler(images, labels, ways=ways, shots=shots, queries=queries, seed=seed)


def small(algorithm, schedule="dsd", **options):
    settings = {"channels": 8, "ways": 3, "tasks": 2, "eval_steps": 3, **options}
    if algorithm == "metaoptnet":
        settings.setdefault("backbone", "conv4")
    if algorithm == "field":
        del settings["ways"]
        settings["meta_lr"] = 0.01
    return make_config(algorithm, schedule, iterations=20, sparsity=0.4, **settings)


def start(config, size=28):
    torch.manual_seed(config.seed)
    return build(config, (1, size, size))


@pytest.mark.parametrize("algorithm", DEFAULTS)
def test_trains_and_prunes(algorithm):
    config = small(algorithm)
    learner, tasks = start(config), sampler(pictures=config.picture_tasks)
    episodes = [tasks.sample() for _ in range(config.tasks)]
    if algorithm == "reptile":  # it trains on no queries
        episodes = [e._replace(query_x=e.support_x, query_y=e.support_y) for e in episodes]
    before = learner.evaluate(episodes).mean
    sparsities = []
    for _ in range(config.schedule.iterations):
        learner.train(episodes)
        sparsities.append(round(learner.pruner.sparsity, 2))
        for name, mask in learner.pruner.masks.items():
            weight = learner.pruner.model.get_submodule(name.rpartition(".")[0]).weight
            assert (weight[~mask] == 0).all()
    assert sparsities == [0.0] * 5 + [0.4] * 12 + [0.0] * 3
    after = learner.evaluate(episodes).mean
    assert after > before + 0.1, (before, after)
    net = learner.finalize()
    assert not any("_orig" in key or "_mask" in key for key in net.state_dict())


@pytest.mark.parametrize("algorithm", DEFAULTS)
def test_evaluation_changes_nothing(algorithm):
    """Two learners in step, one of them evaluated all the time, stay equal bit for bit."""
    ends = []
    for evaluates in (True, False):
        config = small(algorithm)
        pictures = config.picture_tasks
        learner, tasks = start(config), sampler(pictures=pictures)
        others = [sampler(seed=9, pictures=pictures).sample() for _ in range(2)]
        for _ in range(8):
            if evaluates:
                before = copy.deepcopy(learner.pruner.model.state_dict())
                learner.evaluate(others)
                after = learner.pruner.model.state_dict()
                assert all(torch.equal(before[key], after[key]) for key in before)
            learner.train([tasks.sample() for _ in range(config.tasks)])
        ends.append(learner.finalize().state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.parametrize("algorithm", ["reptile", "maml", "cavia", "protonet"])
def test_large_colour_images(algorithm):
    config = small(algorithm, channels=4)
    torch.manual_seed(0)
    learner = build(config, (3, 84, 84))
    source = sampler(84)
    episodes = [source.sample() for _ in range(2)]
    colour = [
        e._replace(support_x=e.support_x.repeat(1, 3, 1, 1), query_x=e.query_x.repeat(1, 3, 1, 1))
        for e in episodes
    ]
    learner.train(colour)
    assert len(learner.evaluate(colour).values) == 2


def test_resnet12_pads_small_images_and_draws_its_blocks_by_the_seed():
    """DropBlock draws from torch's global generator; the run must not depend on it, nor move it."""
    ends = []
    for noise in (1, 2):
        config = small("metaoptnet", "dense", backbone="resnet12", tasks=1)
        assert config.with_drop_block
        learner = start(config)
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        source = sampler()
        learner.train([source.sample()])
        assert torch.equal(torch.get_rng_state(), state)
        ends.append(learner.finalize().state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_anil_prunes_its_features_alone():
    learner = start(small("anil"))
    assert all("conv" in name for name in learner.pruner.masks)
    assert isinstance(learner.finalize().classifier, nn.Linear)


@pytest.mark.parametrize("algorithm", [*DEFAULTS, "resnet12"])
def test_resumes_bit_for_bit(algorithm, tmp_path):
    """Saved in a sparse phase through a file, loaded into a fresh learner."""
    if algorithm == "resnet12":
        config = small("metaoptnet", "dense", backbone="resnet12", tasks=1)
        before, after = 1, 1
    else:
        config, before, after = small(algorithm), 8, 6
    batches = []
    source = sampler(pictures=config.picture_tasks)
    for _ in range(before + after):
        batches.append([source.sample() for _ in range(config.tasks)])

    whole = start(config)
    for tasks in batches[:before]:
        whole.train(tasks)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    for tasks in batches[before:]:
        whole.train(tasks)

    torch.manual_seed(77)
    resumed = build(config, (1, 28, 28))
    resumed.evaluate(batches[0])  # a learner that was in use already
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for tasks in batches[before:]:
        resumed.train(tasks)
    a, b = whole.finalize().state_dict(), resumed.finalize().state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("algorithm", ["reptile", "maml", "cavia", "anil"])
def test_queries_scored_alone_do_not_see_each_other(algorithm):
    """Without transduction, the score of a query does not depend on the other queries."""
    config = small(algorithm, transductive=False)
    learner = start(config)
    episode = sampler().sample()
    fewer = episode._replace(query_x=episode.query_x[:1], query_y=episode.query_y[:1])
    changed = episode._replace(query_x=torch.cat([episode.query_x[:1], 9 * episode.query_x[1:]]))
    hits = [learner.evaluate([e]).values[0] for e in (episode, changed, fewer)]
    first = [round(hits[0] * 12), round(hits[1] * 12), round(hits[2])]
    assert first[2] in (0, 1)
    if algorithm != "reptile":  # those that give their scores
        scores = [learner.scores(e)[0] for e in (episode, changed, fewer)]
        assert torch.allclose(scores[0], scores[1], atol=1e-5)
        assert torch.allclose(scores[0], scores[2], atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.3},
        {"weight_decay": 5.0},
        {"structured": True},
        {"bf16": True},
        {"structured": True, "schedule": "task-masks"},
        *({"criterion": name} for name in ("random", "snip", "grasp", "movement")),
        {"allocation": "erk"},
        {"allocation": "global"},
        *({"schedule": kind} for kind in ("cubic", "cyclic", "lottery", "set", "rigl")),
    ],
    ids=lambda options: next(iter(options.values())),
)
def test_controls_and_rivals_act_and_resume_exactly(options):
    if "structured" in options:
        pytest.importorskip("torch_pruning")
    config, plain = small("reptile", inner_steps=2, **options), small("reptile", inner_steps=2)
    assert (config.name == plain.name) == ("bf16" in options)  # how it computes is no method
    ours, resumed = weights_after_twelve_iterations(config)
    other, _ = plain_weights_after_twelve_iterations()
    assert torch.equal(ours, resumed)
    assert not torch.equal(ours, other)
    if "structured" in options and "schedule" not in options:
        assert len(ours) < 0.6 * len(other)
    if "weight_decay" in options:
        assert ours.norm() < other.norm()


def weights_after_twelve_iterations(config):
    """Of a learner, and of one that took its state over twice."""
    learner, twin = start(config), start(config)
    episodes = [sampler().sample() for _ in range(2)]
    for iteration in range(12):
        if iteration in (4, 9):  # before the mask is made, and while it holds
            twin.load_state_dict(copy.deepcopy(learner.state_dict()))
        for one in (learner, *([twin] if iteration >= 4 else [])):
            torch.manual_seed(99)  # nothing may depend on the global generator
            one.train(episodes)
            one.evaluate(episodes)
    return [
        torch.cat([p.detach().flatten() for p in one.pruner.model.parameters()])
        for one in (learner, twin)
    ]


RIVALS = [
    *(("reptile", {"mgaug": way}, {}) for way in ("width", "parameters", "catfish")),
    ("reptile", {"mgaug": "catfish", "prune_head": False, "layers": "all"}, {}),
    ("reptile", {"mgaug": "width", "prune_head": False}, {}),
    ("reptile", {"mgaug": "parameters", "mgaug_networks": 1, "mgaug_rate": 0.5}, {}),
    ("reptile", {"drop_grad": 0.2}, {}),
    ("reptile", {"drop_grad": 0.2, "drop_grad_noise": "bernoulli"}, {"drop_grad": 0.2}),
    ("reptile", {"dropout": 0.3, "dropout_per": "task"}, {"dropout": 0.3}),
    *(
        (algorithm, {"mgaug": way}, {})
        for algorithm in ("maml", "fomaml", "anil", "metasgd", "protonet")
        for way in ("width", "catfish")
    ),
]


@pytest.mark.parametrize(("algorithm", "options", "without"), RIVALS)
def test_rivals_of_task_masks_act_and_resume_exactly(algorithm, options, without):
    config, plain = (small(algorithm, "dense", **o) for o in (options, without))
    assert config.name != plain.name
    learner, other, twin = start(config), start(plain), start(config)
    episodes = [sampler().sample() for _ in range(2)]
    for iteration in range(5):
        if iteration == 2:
            twin.load_state_dict(copy.deepcopy(learner.state_dict()))
        for one in (learner, other, *([twin] if iteration >= 2 else [])):
            torch.manual_seed(99)  # nothing may depend on the global generator
            one.train(episodes)
            scored = one.evaluate(episodes)
            assert one.evaluate(episodes).values == scored.values
    weights = [
        torch.cat([p.flatten() for p in one.pruner.model.parameters()])
        for one in (learner, other, twin)
    ]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])
    assert bool((weights[0] != 0).all()) or bool((weights[1] == 0).any())  # the model stays dense


@functools.cache
def plain_weights_after_twelve_iterations():
    return weights_after_twelve_iterations(small("reptile", inner_steps=2))


def test_compiled_runs_are_plain_runs_and_resume_exactly():
    config = small("reptile", compile=True)
    learner, plain, twin = start(config), start(small("reptile")), start(config)
    episodes = [sampler().sample() for _ in range(2)]
    with without_compiler():  # tests/reptile/test_compiled.py compiles
        for iteration in range(8):
            if iteration == 5:
                twin.load_state_dict(copy.deepcopy(learner.state_dict()))
            for one in (learner, plain, *([twin] if iteration >= 5 else [])):
                one.train(episodes)
                one.evaluate(episodes)
    weights = [
        torch.cat([p.flatten() for p in one.pruner.model.parameters()])
        for one in (learner, plain, twin)
    ]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])  # the bias before normalisation is noise
    assert (weights[0] - weights[1]).norm() < 0.02 * weights[1].norm()


@pytest.mark.parametrize("schedule", ["lottery", "set", "rigl"])
@pytest.mark.parametrize("criterion", [None, "grasp", "movement"])
def test_rivals_with_an_outer_optimizer_resume_exactly(schedule, criterion):
    if criterion and schedule != "lottery":
        pytest.skip("they begin sparse: there is no gradient yet")
    config = small("fomaml" if criterion == "grasp" else "maml", schedule, criterion=criterion)
    learner, twin = start(config), start(config)
    episodes = [sampler().sample() for _ in range(2)]
    for iteration in range(16):
        if iteration in (4, 13):
            twin.load_state_dict(copy.deepcopy(learner.state_dict()))
        for one in (learner, *([twin] if iteration >= 4 else [])):
            one.train(episodes)
    pairs = zip(learner.pruner.model.parameters(), twin.pruner.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert learner.pruner.sparsity == pytest.approx(0.4, abs=0.01)


def test_a_lottery_ticket_of_a_run_starts_from_the_first_weights():
    learner = start(small("reptile", "lottery"))
    first = {n: p.detach().clone() for n, p in learner.pruner.model.named_parameters()}
    episodes = [sampler().sample() for _ in range(2)]
    for _ in range(10):  # half of the run
        learner.train(episodes)
    for name, weight in learner.pruner.weights.items():
        assert torch.equal(weight, first[f"{name}_orig"] * learner.pruner.masks[name])


@pytest.mark.parametrize("schedule", ["set", "rigl"])
def test_masks_of_a_run_move(schedule):
    learner = start(small("reptile", schedule))
    episodes = [sampler().sample() for _ in range(2)]
    seen = set()
    for _ in range(10):
        seen.add(tuple(learner.pruner.masks["classifier.weight"].flatten().tolist()))
        learner.train(episodes)
    assert len(seen) > 3


@pytest.mark.parametrize("method", ["dsd", "task-masks"])
def test_masks_of_a_run_follow_its_pattern(method):
    """2:4 by counting: two of four neighbouring inputs at each output and kernel position."""
    config = make_config(
        "reptile", method, iterations=8, channels=8, ways=3, pattern="2:4", pretrain=0.0
    )
    learner, episodes = start(config), [sampler().sample() for _ in range(2)]
    learner.train(episodes)
    assert config.name.endswith("2:4")
    with learner.pruner.task_masks() as masks:  # the model's own, where tasks have none
        assert len(masks) == 4
        for mask in masks.values():
            assert (mask.movedim(1, -1).reshape(-1, 4).sum(1) == 2).all()


def test_dropout_is_off_at_evaluation():
    learner = start(small("reptile", dropout=0.5))
    episodes = [sampler().sample()]
    torch.manual_seed(1)
    first = learner.evaluate(episodes * 5)
    torch.manual_seed(2)
    assert learner.evaluate(episodes * 5).values == first.values
    assert all(m.training for m in learner.pruner.model.modules())


def test_images_must_be_square():
    for algorithm in ("reptile", "cavia", "sparsemaml"):
        with pytest.raises(ValueError, match="must be square, not 30 x 40 pixels: image_size"):
            build(make_config(algorithm, "dense", iterations=20, channels=4), (3, 30, 40))


@pytest.mark.parametrize("method", ["rigl", "grasp"])
def test_gradients_of_the_model_need_no_dropout_mask_of_a_task(method):
    more = {"criterion": "grasp"} if method == "grasp" else {}
    kind = "one-shot" if method == "grasp" else method
    config = small("reptile", kind, dropout=0.3, dropout_per="task", **more)
    algorithm, tasks = start(config), sampler()
    for _ in range(config.schedule.iterations):
        algorithm.train([tasks.sample() for _ in range(2)])
    assert algorithm.pruner.sparsity == pytest.approx(0.4, abs=0.01)
