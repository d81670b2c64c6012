"""The algorithm field in the command: a task is one picture, and its measure is PSNR."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.func import functional_call
from typer.testing import CliRunner

from l2l_prune.experiments.algorithms import build
from l2l_prune.experiments.algorithms.field import Field
from l2l_prune.experiments.cli import app
from l2l_prune.experiments.config import make_config
from l2l_prune.experiments.methods import METHODS, make_schedule
from l2l_prune.experiments.report.comparisons import Comparison, comparison_table, judge
from l2l_prune.experiments.report.finished_runs import read_folder
from l2l_prune.experiments.report.report import write_report
from l2l_prune.experiments.run_result import RunResult
from l2l_prune.experiments.running.compare_seeds import compare_seeds
from l2l_prune.experiments.running.run import run
from l2l_prune.fewshot.data import EpisodeSampler
from l2l_prune.fewshot.evaluation import PSNR, Mean, paired_difference
from l2l_prune.metalearners.fields import Siren, coordinates
from l2l_prune.schedules.common import metasparse
from tests.experiments.conftest import whole_run

TINY = {"channels": 6, "tasks": 2, "train_classes": 5, "final_tasks": 4}


def tiny(method="dsd", iterations=24, **settings):
    return make_config("field", method, iterations=iterations, **{**TINY, **settings})


def finished(config, **options):
    *_, result = run(config, **options)
    assert isinstance(result, RunResult)
    return result


def tasks(count=4, channels=1, low=0.0, high=1.0):
    generator = torch.Generator().manual_seed(1)
    images = low + (high - low) * torch.rand(8, channels, 6, 5, generator=generator)
    sampler = EpisodeSampler(images, torch.arange(8), ways=1, shots=1, queries=0, seed=3)
    return [sampler.sample() for _ in range(count)]


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_its_score_is_the_psnr_after_inner_steps(channels, steps):
    """By hand, a picture at a time."""
    torch.manual_seed(0)
    learner = build(tiny(eval_steps=steps), (channels, 6, 5))
    net, x = learner.network, coordinates(6, 5)
    expected = []
    for task in tasks(channels=channels):
        y = task.support_x[0].permute(1, 2, 0).reshape(30, channels)
        weights = {name: p.detach().clone() for name, p in net.named_parameters()}
        for _ in range(steps):
            for weight in weights.values():
                weight.requires_grad_()
            error = (functional_call(net, weights, (x,)) - y).square().mean()
            slopes = torch.autograd.grad(error, weights.values())
            pairs = zip(weights.items(), slopes, strict=True)
            weights = {name: (w - 0.01 * g).detach() for (name, w), g in pairs}
        error = (functional_call(net, weights, (x,)) - y).square().mean()
        expected.append(-10 * math.log10(error))
    found = learner.evaluate(tasks(channels=channels))
    assert found.measure == PSNR
    assert found.values == pytest.approx(expected, abs=1e-4)


def test_pictures_are_measured_in_groups_as_one_by_one():
    learner = build(tiny(), (1, 6, 5))
    together = learner.evaluate(tasks(40))
    alone = [learner.evaluate([task]).values[0] for task in tasks(40)]
    assert together.values == pytest.approx(alone, abs=1e-4)


def test_values_beyond_0_and_1_and_divergence_are_refused():
    learner = build(tiny(), (1, 6, 5))
    with pytest.raises(ValueError, match=r"real numbers in \[0, 1\]"):
        learner.train(tasks(high=2.0))
    with torch.no_grad():
        learner.network.layers[0].bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="PSNR of 4 of 4 pictures is not finite"):
        learner.evaluate(tasks())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backbone", ["siren", "fourier"])
def test_runs_under_every_method(method, backbone):
    result = whole_run(tiny(method, backbone=backbone, sparsity=0.5))
    assert result.test.measure == PSNR
    assert 0 < result.test.mean < 40
    assert len(result.test.values) == 4


@pytest.mark.parametrize("method", [*METHODS, "criteria"])
def test_resumes_bit_for_bit(method, tmp_path):
    """Stopped in a sparse phase, taken up from the file."""
    options = {"criterion": "movement", "allocation": "erk"} if method == "criteria" else {}
    config = tiny("dsd" if method == "criteria" else method, sparsity=0.5, **options)
    whole = whole_run(config)
    file = tmp_path / "checkpoint.pt"
    for message in run(config, checkpoint=file, checkpoint_every=5):
        if message.iteration == 17:
            break
    resumed = finished(config, checkpoint=file, checkpoint_every=5)
    assert resumed.test == whole.test
    assert [point.test for point in resumed.curve] == [point.test for point in whole.curve]
    assert whole.weights.keys() == resumed.weights.keys()
    assert all(torch.equal(whole.weights[name], resumed.weights[name]) for name in whole.weights)


@pytest.mark.parametrize("criterion", ["random", "snip", "taylor", "grasp", "movement"])
@pytest.mark.parametrize("allocation", ["layerwise", "erk", "global"])
def test_prunes_by_every_criterion(criterion, allocation):
    config = tiny(
        "one-shot", sparsity=0.5, criterion=criterion, allocation=allocation, iterations=6
    )
    weights = finished(config).weights
    matrices = [tensor for tensor in weights.values() if tensor.dim() == 2]
    total = sum(tensor.numel() for tensor in matrices)
    assert abs(sum(int((t == 0).sum()) for t in matrices) - total / 2) <= len(matrices)


def test_the_metasparse_method_is_the_published_protocol():
    published = make_config("field", "metasparse", published=True)
    assert published.schedule == metasparse(0.95)
    assert published.allocation == "global"
    assert published.name == "Meta-SparseINR"
    numbers = {"channels": 256, "depth": 4, "omega": 200.0, "tasks": 3, "inner_steps": 2}
    numbers |= {"inner_lr": 0.01, "meta_lr": 1e-5}
    assert {name: getattr(published, name) for name in numbers} == numbers
    short = make_schedule("metasparse", 190)
    assert short == metasparse(0.95, pretrain=50, interval=10)
    assert make_schedule("metasparse", 190, 0.6, pretrain=0.3).segments[-1].sparsity == 0.6
    with pytest.raises(ValueError, match="too few for the 14 rounds"):
        make_schedule("metasparse", 10)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ways": 5}, "one picture: leave ways out"),
        ({"shots": 5}, "one picture: leave shots, train_shots out"),
        ({"queries": 5}, "leave queries out"),
        ({"train_queries": 5}, "leave train_queries out"),
        ({"backbone": "conv4"}, "needs one of the backbones siren, fourier"),
        ({"backbone": "fourier", "omega": 10.0}, "omega works only with the backbone siren"),
        ({"label_noise": 0.1}, "has no labels"),
        ({"structured": True}, "work only with the algorithm reptile"),
        (
            {"data": "omniglot", "image_size": 32},
            "image_size works only with glyphs, pictures and folder",
        ),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        make_config("field", "dsd", **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ways": 1}, "ways must be >= 2"),
        ({"queries": 0}, "queries must be >= 1"),
        ({"backbone": "siren"}, "backbone siren works only with the algorithm field"),
        ({"depth": 2}, "depth and omega work only with the algorithm field"),
        ({"data": "pictures"}, "pictures have no classes for maml to learn"),
    ],
)
def test_other_algorithms_take_no_settings_of_fields(settings, words):
    with pytest.raises(ValueError, match=words):
        make_config("maml", "dsd", **settings)


def lines(*arguments):
    return CliRunner().invoke(app, ["run", "--algorithm", "field", *map(str, arguments)])


@pytest.mark.slow
@pytest.mark.process
def test_the_command_says_psnr_in_db_everywhere(tmp_path):
    options = [part for name, v in TINY.items() for part in (f"--{name.replace('_', '-')}", v)]
    methods = ("--method", "dense", "--method", "metasparse", "--iterations", 24, "--jobs", 1)
    done = lines(*methods, *options, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "field on glyphs: one picture, siren of 6 neurons a layer" in done.output
    assert "PSNR [dB], mean ± 95% CI over 4 tasks" in done.output
    assert " dB" in done.output.split("2/2 Meta-SparseINR")[1].splitlines()[0]
    assert "accuracy" not in done.output
    (file,) = tmp_path.glob("*meta-sparseinr*/results.json")
    (entry,) = json.loads(file.read_text())["runs"]
    assert f"{entry['test']['mean']:.1f} ± {entry['test']['ci95']:.1f}" in done.output
    Siren(width=6).load_state_dict(torch.load(file.parent / "meta-sparseinr.pt", weights_only=True))
    kept = [t for t in torch.load(file.parent / "meta-sparseinr.pt").values() if t.dim() == 2]
    assert sum(int((t != 0).sum()) for t in kept) == round(0.05 * sum(t.numel() for t in kept))

    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "## field on glyphs: PSNR [dB]" in text
    assert "SIREN 6" in text
    assert f"{entry['test']['mean']:.1f}" in text
    assert not any(word in text for word in ("accuracy", "Accuracy", "-way", "-shot", "shots"))


@pytest.mark.slow
def test_seeds_are_compared_in_db(tmp_path):
    configs = [
        tiny(method, iterations=8, seed=seed, sparsity=0.5)
        for seed in (0, 1)
        for method in ("dense", "dsd")
    ]
    text = compare_seeds(configs, tmp_path, Console(file=io.StringIO()), jobs=1)
    assert text.startswith("PSNR [dB] of field on glyphs, 8 meta-iterations: mean ± 95% CI over 2")
    means = [r.entry["test"]["mean"] for r in read_folder(tmp_path).runs if r.family == "dense"]
    assert f" {sum(means) / 2:.1f} ± " in text
    stated = [Comparison("1", {"name": "DSD"}, {"name": "dense"}, margin=-30.0)]
    judged = judge(stated, read_folder(tmp_path).runs)
    assert judged[0].difference.measure == PSNR
    assert judged[0].verdict == "not worse by more than 30 dB"
    pruned = [r.entry["test"]["mean"] for r in read_folder(tmp_path).runs if r.family == "DSD"]
    assert f"{(sum(pruned) - sum(means)) / 2:+.1f} ± " in comparison_table(judged)


def test_measures_do_not_mix():
    with pytest.raises(ValueError, match=r"accuracy \[%\] and PSNR \[dB\]"):
        paired_difference(Mean((0.5, 0.6)), Mean((20.0, 21.0), PSNR))
    apart = paired_difference(Mean((22.0, 23.0), PSNR), Mean((20.0, 20.0), PSNR))
    assert str(apart) == "2.5 ± 1.0"


def test_the_best_weights_are_chosen_where_all_psnr_are_below_0(monkeypatch):
    monkeypatch.setattr(Field, "evaluate", lambda self, episodes: Mean((-30.0, -30.0), PSNR))
    first, last = (finished(tiny("dense", select=which)).weights for which in ("best", "last"))
    assert any(not torch.equal(first[name], last[name]) for name in first)


@pytest.mark.slow
def test_finer_glyphs_and_a_folder_of_pictures_in_colour(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (8, 12, 16, 3), dtype=np.uint8)
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    config = tiny("dense", 4, data="pictures", data_root=str(tmp_path), image_size=9)
    assert config.train_classes == 5
    small = finished(tiny("dense", 4, data="pictures", data_root=str(tmp_path), train_classes=3))
    assert small.weights["layers.3.weight"].shape == (3, 6)
    with pytest.raises(ValueError, match=r"max_classes must be in \[1, 5\]"):
        finished(tiny("dense", 4, data="pictures", data_root=str(tmp_path), train_classes=6))
    assert finished(config).weights["layers.3.weight"].shape == (3, 6)
    assert lines("--data", "pictures").exit_code == 2
    fine = finished(tiny("dense", 2, image_size=32, channels=4))
    assert len(fine.test.values) == 4
