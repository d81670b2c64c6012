from __future__ import annotations

import json

import pytest

from l2l_prune import DSDSchedule, IHTSchedule
from l2l_prune.experiments.config import RunConfig, file_name, make_config
from l2l_prune.experiments.defaults import DEFAULTS, PUBLISHED
from l2l_prune.experiments.methods import METHODS, make_schedule


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
    glyphs = make_config("metaoptnet", "dsd", published=True)
    assert glyphs.train_shots + glyphs.train_queries == 20  # all that there are of a class
    metaoptnet = make_config("metaoptnet", "dsd", published=True, data="mini-imagenet")
    assert (metaoptnet.train_shots, metaoptnet.train_queries, metaoptnet.tasks) == (15, 6, 8)
    with pytest.raises(
        ValueError,
        match="no published settings for maml, only for reptile, cavia, metaoptnet, field",
    ):
        make_config("maml", "dsd", published=True)


def test_published_reptile_has_the_phases_and_rates_of_the_paper():
    config = make_config("reptile", "dsd", published=True, data="tiered-imagenet", channels=256)
    assert config.schedule == DSDSchedule(0.2, pretrain=30_000, prune=50_000, retrain=20_000)
    config = make_config("reptile", "dsd", published=True, data="mini-imagenet", scale=0.01)
    assert config.schedule == DSDSchedule(0.3, pretrain=300, prune=600, retrain=100)
    config = make_config("reptile", "iht", published=True, data="mini-imagenet", channels=128)
    assert config.schedule == IHTSchedule.paper("mini-imagenet", channels=128)
    config = make_config("reptile", "dsd", published=True, data="mini-imagenet", sparsity=0.7)
    assert config.schedule.sparsity == 0.7
    config = make_config("reptile", "dsd", published=True)  # not a data set of the paper
    assert config.schedule == DSDSchedule(0.5, pretrain=30_000, prune=60_000, retrain=10_000)


def test_phases_of_the_ablations():
    dsd = make_schedule("dsd", 1000, 0.4, retrain=0.0)
    assert dsd == DSDSchedule(0.4, pretrain=300, prune=700, retrain=0)
    dsd = make_schedule("dsd", 1000, 0.4, pretrain=0.0)
    assert dsd == DSDSchedule(0.4, pretrain=0, prune=900, retrain=100)
    iht = make_schedule("iht", 1000, 0.4, retrain=0.0)
    assert iht == IHTSchedule(0.4, pretrain=200, prune=200, retrain=0, rounds=4)
    iht = make_schedule("iht", 1000, 0.4, pretrain=0.0, retrain=0.5, rounds=2)
    assert iht == IHTSchedule(0.4, pretrain=0, prune=250, retrain=250, rounds=2)
    for kind in ("dsd", "iht"):
        assert make_schedule(kind, 1000) == {"dsd": DSDSchedule, "iht": IHTSchedule}[
            kind
        ].from_fractions(0.5, 1000)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("iterations", [20, 137, 1000])
def test_every_method_fills_the_run_and_ends_as_it_should(kind, iterations):
    schedule = make_schedule(kind, iterations, 0.4)
    assert schedule.iterations == iterations
    last = schedule.segments[schedule.index(iterations - 1)]
    assert last.sparse == (kind not in ("dense", "dsd", "iht", "recommended"))
    if last.sparse:
        assert last.sparsity == 0.4
    rates = [segment.sparsity for segment in schedule.segments if segment.sparse]
    assert max(rates, default=0) == (0.4 if kind != "dense" else 0)


def test_names_tell_methods_apart():
    def name(schedule="dsd", **options):
        return make_config("reptile", schedule, iterations=1000, **options).name

    assert name() == "DSD"
    assert name(retrain=0.0, criterion="random") == "DSD, no retrain, random"
    assert name("iht", pretrain=0.1, rounds=8) == "IHT, pretrain 10%, 8 rounds"
    assert name("rigl") == "RigL"
    assert name("recommended") == "DSD, recommended"
    assert name("task-masks", retrain=0.2) == "task masks, retrain 20%"
    assert name("task-masks", task_share=0.5) == "task masks, 50% of tasks"
    assert name("task-masks", structured=True) == "task masks, channels"
    assert name("rigl", criterion="magnitude", allocation="erk") == "RigL, magnitude, erk"
    assert name("dense", retrain=0.0, criterion="random") == "dense"  # nothing is pruned
    assert name("dense", dropout=0.1, weight_decay=2.0) == "dense, dropout 0.1, decay 2"
    assert name("dense", dropout=0.1, dropout_per="task") == "dense, dropout 0.1 per task"
    assert name(drop_grad=0.1) == "DSD, DropGrad 0.1"
    noise = "bernoulli"
    assert name("dense", drop_grad=0.1, drop_grad_noise=noise) == "dense, DropGrad 0.1 bernoulli"
    assert name("dense", mgaug="width", mgaug_rate=0.1) == "dense, MGAug width 10%"
    assert (
        name("dense", mgaug="catfish", mgaug_networks=1)
        == "dense, MGAug catfish 20%, 1 sub-network"
    )
    assert file_name(make_config("reptile", "dsd", dropout=0.1).name) == "dsd-dropout-0.1"


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
        (lambda: make_config("maml", "sdd"), "method must be one of dense, dsd, iht"),
        (lambda: make_config("maml", "dsd", sparsity=0.0), "sparsity"),
        (lambda: make_config("maml", "dsd", sparsity=1.0), "sparsity"),
        (lambda: make_config("maml", "dsd", backbone="resnet12"), "only with .* metaoptnet"),
        (lambda: make_config("metaoptnet", "dsd", backbone="vgg"), "backbone must be"),
        (lambda: make_config("maml", "dsd", iterations=2), "make the run longer"),
        (lambda: make_config("reptile", "dsd", criterion="worst"), "criterion must be"),
        (lambda: make_config("reptile", "dsd", dropout=1.0), "dropout must be in"),
        (lambda: make_config("reptile", "dsd", weight_decay=-1.0), "weight_decay must be"),
        (lambda: make_config("maml", "dsd", dropout=0.1), "only with the algorithm reptile"),
        (lambda: make_config("reptile", "dsd", task_share=0.5), "takes no task_share"),
        (lambda: make_config("reptile", "task-masks", task_share=2.0), "share must be in"),
        (lambda: make_config("reptile", "task-masks", criterion="random"), "masks are random"),
        (lambda: make_config("reptile", "task-masks", regrow="random"), "masks are random"),
        (lambda: make_config("maml", "dsd", structured=True), "only with the algorithm reptile"),
        (
            lambda: make_config("maml", "dsd", pattern="2/4"),
            "2:4, ROWSxCOLUMNS such as 4x1 .*'2/4'",
        ),
        (lambda: make_config("maml", "dsd", pattern="4:4"), "n must be below m = 4, got 4"),
        (lambda: make_config("maml", "dsd", pattern="2:4", sparsity=0.8), "2:4 prunes 0.5 .* 0.8"),
        (lambda: make_config("maml", "cubic", pattern="2:4"), "2:4 prunes 0.5 .*: set sparsity"),
        (lambda: make_config("maml", "rigl", pattern="2:4"), "combined with allocation global or"),
        (
            lambda: make_config("maml", "metasparse", pattern="rows"),
            "combined with allocation global or regrow",
        ),
        (
            lambda: make_config("reptile", "dsd", structured=True, pattern="rows"),
            "structured cannot be combined with criterion, pattern",
        ),
        (lambda: make_config("maml", "dsd", ramp=0.5), "method dsd takes no ramp"),
        (lambda: make_config("maml", "cubic", ramp=1.0), "ramp must be in"),
        (lambda: make_config("maml", "cubic", ramp=0.0), "does not fit into 0% of 320 iterations"),
        (lambda: make_config("cavia", "dsd", compile=True), "only with the algorithm reptile"),
        (lambda: make_config("anil", "dsd", bf16=True), "only with the algorithm reptile"),
        (
            lambda: make_config("reptile", "dsd", structured=True, criterion="random"),
            "structured cannot be combined with criterion",
        ),
        (
            lambda: make_config("reptile", "set", structured=True),
            "structured cannot be combined with criterion",
        ),
        (lambda: make_config("reptile", "set", allocation="global"), "with allocation global"),
        (lambda: make_config("reptile", "dsd", regrow="all"), "one of random, gradient, got 'all'"),
        (lambda: make_config("reptile", "dsd", rewind=-1), "rewind must be >= 0"),
        (
            lambda: make_config("maml", "dsd", criterion="grasp"),
            "grasp cannot be combined with maml",
        ),
        (lambda: make_config("maml", "rigl", retrain=0.1), "method rigl takes no retrain"),
        (lambda: make_config("maml", "one-shot", rounds=2), "method one-shot takes no rounds"),
        (
            lambda: make_config("maml", "cubic", iterations=4),
            "ramp does not fit into 50% of 3 iter",
        ),
        (lambda: make_config("maml", "lottery", pretrain=1.0), "leaves none of 400 iterations"),
        (lambda: make_config("maml", "lottery", pretrain=0.001), "of 400 iterations is none"),
        (lambda: make_config("maml", "dsd", pretrain=0.7, retrain=0.3), "none of the run for pru"),
        (lambda: make_config("maml", "iht", retrain=1.0), "leave none of the run for pruning"),
        (lambda: make_config("maml", "task-masks", pretrain=1.0), "none of the run for pruning"),
        (lambda: make_config("maml", "iht", rounds=0), "rounds must be >= 1"),
        (
            lambda: make_config("maml", "dsd", pretrain=0.9, retrain=0.2),
            "pretrain=0.9 and retrain=0.2",
        ),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_name_of_ones_own():
    config = make_config("reptile", "dsd", name="mine", dropout=0.1)
    assert (config.name, config.title) == ("mine", "mine seed 0")
    assert make_config("reptile", "dsd", name=None).name == "DSD"


def test_a_pattern_of_n_in_m_sets_the_rate():
    def rate(method="dsd", **settings):
        schedule = make_config("reptile", method, **settings).schedule
        return max(segment.sparsity for segment in schedule.segments)

    assert rate(pattern="1:4") == 0.75
    assert rate(pattern="1:3") == 1 - 1 / 3
    assert rate(pattern="2:4", sparsity=0.5) == rate(pattern="4x1") == 0.5
    assert rate(pattern="rows", sparsity=0.25) == 0.25
    assert rate("dense", pattern="1:4") == 0
    with pytest.raises(TypeError, match="pattern must be a string, got 24"):
        make_config("reptile", "dsd", pattern=24)


def test_a_ramp_takes_its_share_of_what_follows_the_dense_start():
    def rising(**settings):
        segments = make_config("maml", "cubic", iterations=1000, pretrain=0.2, **settings).schedule
        return sum(segment.iterations for segment in segments.segments[1:-1])

    assert rising() == 10 * 40
    assert rising(ramp=0.9) == 10 * 72
    assert make_config("maml", "cubic", ramp=0.9).name == "cubic, ramp 90%"


def test_the_recommended_method_is_the_studys_arm():
    """All but the name, as family A's grid in docs/results/study/first.toml has it."""
    arm = {"sparsity": 0.8, "pretrain": 0.2, "retrain": 0.3, "criterion": "random"}
    ours = make_config("reptile", "recommended", iterations=3000)
    assert ours == make_config("reptile", "dsd", iterations=3000, name=ours.name, **arm)
    assert make_config("maml", "recommended", sparsity=0.5).schedule.sparsity == 0.5
