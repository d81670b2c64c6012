"""Episodes, data sets, minibatches and evaluation."""

from __future__ import annotations

import torch
from torch import nn

from l2l_prune import PrunedReptile
from l2l_prune.fewshot.data import (
    EpisodeSampler,
    Glyphs,
    SineTasks,
    load_images,
    minibatches,
)
from l2l_prune.fewshot.evaluation import Mean, accuracy, few_shot_accuracy, paired_difference
from tests.bad_input.attaching import NOW
from tests.bad_input.case import Case
from tests.conftest import SmallNet

IMAGES = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 6, 6)
LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2])


def sampler(images=IMAGES, labels=LABELS, **changes):
    return EpisodeSampler(images, labels, **{"ways": 3, "shots": 1, "queries": 1, **changes})


def drawing(folder):
    reptile = PrunedReptile(SmallNet(), NOW)
    return {"sampler": sampler(), "reptile": reptile, "drawn": [sampler().sample()]}


def draws(name, words, error=ValueError, **changes):
    return Case(name, lambda s: sampler(**changes), error, words)


EPISODES = [
    draws("more ways than classes", "ways=5.*3 classes", ways=5),
    draws("more shots than examples", r"shots \+ queries = 3.*class 0 .*2", shots=2),
    draws("no shots", "shots .*0", shots=0),
    draws("queries below 0", "queries .*-1", queries=-1),
    draws("ways in words", "ways .*'3'", TypeError, ways="3"),
    draws("half a shot", "shots .*0.5", TypeError, shots=0.5),
    draws("a seed in words", "seed .*'a'", TypeError, seed="a"),
    draws("images as an array", "images .*ndarray", TypeError, images=IMAGES.numpy()),
    draws("labels as a list", "labels .*tensor, got", TypeError, labels=LABELS.tolist()),
    draws("labels as floats for episodes", "labels .*float32", TypeError, labels=LABELS.float()),
    draws("one-hot labels", r"labels .*\[8, 3\]", labels=nn.functional.one_hot(LABELS)),
    draws("labels of fewer images", "labels .*8, 7", images=IMAGES[:7]),
    Case(
        "draws from nowhere",
        lambda s: s.sampler.load_state_dict({}),
        ValueError,
        "not a state dict of an EpisodeSampler",
        drawing,
    ),
    Case(
        "draws from any tensor",
        lambda s: s.sampler.load_state_dict({"generator": torch.ones(3)}),
        ValueError,
        "not a state dict of an EpisodeSampler",
        drawing,
    ),
    Case("sine without points", lambda s: SineTasks(shots=0), ValueError, "shots .*0"),
    Case("sine in words", lambda s: SineTasks(queries="5"), TypeError, "queries .*'5'"),
    Case(
        "no batch",
        lambda s: list(minibatches(IMAGES, LABELS, batch_size=0, steps=1)),
        ValueError,
        "batch_size .*0",
    ),
    Case(
        "steps in words",
        lambda s: list(minibatches(IMAGES, LABELS, batch_size=2, steps="5")),
        TypeError,
        "steps .*'5'",
    ),
    Case(
        "another number of labels",
        lambda s: list(minibatches(IMAGES, LABELS[:2], batch_size=2, steps=1)),
        ValueError,
        "x and y .*8 and 2",
    ),
]

SETS = [
    Case(
        "an unknown data set",
        lambda s: load_images("imagenet", "train"),
        ValueError,
        "glyphs.*'imagenet'",
    ),
    Case("an unknown split", lambda s: load_images("fc100", "val"), ValueError, "split .*'val'"),
    Case(
        "a benchmark without its folder",
        lambda s: load_images("fc100", "train"),
        ValueError,
        "fc100 needs .*root",
    ),
    Case(
        "a benchmark in an empty folder",
        lambda s: load_images("fc100", "test", root="."),
        FileNotFoundError,
        r"FC100_test\.pickle",
    ),
    Case("a split of glyphs", lambda s: Glyphs("val"), ValueError, "split .*'val'"),
    Case(
        "glyphs split by nothing",
        lambda s: Glyphs(split_by="font"),
        ValueError,
        "split_by .*'font'",
    ),
]


def scored(
    name,
    words,
    error=ValueError,
    choose=lambda s: s.drawn,
    algorithm=lambda s: s.reptile,
    **changes,
):
    return Case(
        name,
        lambda s: few_shot_accuracy(
            algorithm(s),
            choose(s),
            generator=torch.Generator(),
            **{"steps": 1, "batch_size": 2, **changes},
        ),
        error,
        words,
        drawing,
    )


EVALUATION = [
    scored("no tasks", "no episodes", choose=lambda s: []),
    scored(
        "a stream without end", "EpisodeSampler .*sample", TypeError, choose=lambda s: s.sampler
    ),
    scored("one bare episode", "episodes .*Episode", TypeError, choose=lambda s: s.drawn[0]),
    scored(
        "a model that does not clone",
        r"clone\(\).*SmallNet",
        TypeError,
        algorithm=lambda s: s.reptile.module,
    ),
    scored("evaluation in half steps", "steps .*0.5", TypeError, steps=0.5),
    scored("evaluation without a batch", "batch_size .*0", batch_size=0),
    scored(
        "an episode without queries",
        "without queries",
        choose=lambda s: [s.drawn[0]._replace(query_x=IMAGES[:0], query_y=LABELS[:0])],
    ),
    scored(
        "a class that the net does not have",
        "label lies 1 beyond the classes",
        choose=lambda s: [s.drawn[0]._replace(query_y=torch.tensor([0, 1, 3]))],
    ),
    Case(
        "scores of other queries",
        lambda s: accuracy(lambda episode: torch.ones(1, 3), s.drawn),
        ValueError,
        r"\[3, classes\].*\(1, 3\)",
        drawing,
    ),
    Case(
        "labels for scores",
        lambda s: accuracy(lambda episode: episode.query_y, s.drawn),
        ValueError,
        r"\[3, classes\].*\(3,\)",
        drawing,
    ),
    Case(
        "means over other tasks",
        lambda s: paired_difference(Mean((0.5, 0.4)), Mean((0.5,))),
        ValueError,
        "not the same tasks: 2 and 1",
    ),
]

CASES = EPISODES + SETS + EVALUATION
