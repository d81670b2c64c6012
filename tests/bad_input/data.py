"""Episodes, data sets, minibatches and evaluation."""

from __future__ import annotations

import zlib

import torch
from PIL import Image
from torch import nn

from l2l_prune import PrunedReptile
from l2l_prune.fewshot.data import (
    EpisodeSampler,
    Glyphs,
    SineTasks,
    load_folder,
    load_images,
    minibatches,
)
from l2l_prune.fewshot.evaluation import Mean, accuracy, few_shot_accuracy, paired_difference
from tests.bad_input.attaching import NOW
from tests.bad_input.case import Case
from tests.conftest import SmallNet
from tests.fewshot.data.picture_files import picture, write, write_classes

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
    draws("labels of fewer images", "labels .*8 and 7", images=IMAGES[:7]),
    Case(
        "draws from nowhere",
        lambda s: s.sampler.load_state_dict({}),
        ValueError,
        "not an EpisodeSampler state dict",
        drawing,
    ),
    Case(
        "draws from any tensor",
        lambda s: s.sampler.load_state_dict({"generator": torch.ones(3)}),
        ValueError,
        "not an EpisodeSampler state dict",
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


def classes(number=4, **options):
    def scene(folder):
        write_classes(folder / "own", [f"c{i}" for i in range(number)], **options)
        return {"root": folder / "own"}

    return scene


def also(make, after):
    """A good folder, and what spoils it."""

    def scene(folder):
        made = make(folder)
        after(made["root"])
        return made

    return scene


def of_texts(folder):
    for name in ("a", "b"):
        (folder / "own" / name).mkdir(parents=True)
        (folder / "own" / name / "read.txt").write_text("words")
    return {"root": folder / "own"}


def empty(folder):
    (folder / "own").mkdir()
    return {"root": folder / "own"}


def one_file(folder):
    (folder / "own").write_text("words")
    return {"root": folder / "own"}


def loose(folder):
    write(folder / "own" / "a.png", picture(0, 0))
    return {"root": folder / "own"}


def listed(text):
    def scene(folder):
        write(folder / "own" / "images" / "a.png", picture(0, 0))
        (folder / "own" / "train.csv").write_bytes(text)
        return {"root": folder / "own"}

    return scene


def a_huge_picture(root):
    """Its head says 100,000 x 100,000 pixels: 10 GB and more."""
    Image.new("1", (100_000, 1)).save(root / "c0" / "0.png")
    content = bytearray((root / "c0" / "0.png").read_bytes())
    content[20:24] = (100_000).to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (root / "c0" / "0.png").write_bytes(content)


def own(name, words, scene, error=ValueError, split="train", **options):
    return Case(name, lambda s: load_folder(s.root, split, **options), error, words, scene)


FOLDERS = [
    own("no folder", "there is no folder", lambda f: {"root": f / "gone"}, FileNotFoundError),
    own("a file for a folder", "is a file, not a folder", one_file, NotADirectoryError),
    own("an empty folder", "neither class folders nor pictures.*class/picture", empty),
    own("pictures without classes", "pictures, but no class folders.*class/picture", loose),
    own("a folder of text files", r"own/a is no picture among its 1 files.*\.png", of_texts),
    own(
        "an empty class",
        "class folder .*own/c9 is empty",
        also(classes(), lambda root: (root / "c9").mkdir()),
    ),
    own("one class", "train .*has 0 of its 1 classes, .*at least 2", classes(1)),
    own("two classes for three splits", "train .*has 1 of its 2 classes", classes(2)),
    own("an unknown split of a folder", "split .*'val'", classes(), split="val"),
    own("an image size of 0", "image_size .*0", classes(), image_size=0),
    own("an image size in words", "image_size .*'28'", classes(), TypeError, image_size="28"),
    own("a split seed below 0", "split_seed .*-1", classes(), split_seed=-1),
    own(
        "too few images", r"tasks need 9 .*2 classes: c. \(3\), c. \(3\)", classes(), least_images=9
    ),
    own(
        "mixed sizes",
        r"c0/9\.png has 9 x 8 pixels, .*8 x 8: give image_size",
        also(classes(), lambda root: write(root / "c0" / "9.png", picture(0, 0, (8, 9)))),
    ),
    own(
        "a folder that is linked in a circle",
        "own/c9 and .*own are the same folder",
        also(classes(), lambda root: (root / "c9").symlink_to(root)),
    ),
    own(
        "folders within a class",
        "c0/more is a folder within a class",
        also(classes(), lambda root: (root / "c0" / "more").mkdir()),
    ),
    own(
        "a damaged picture",
        r"1 damaged: .*c1/0\.png .*unknown format.*skip_damaged",
        also(classes(), lambda root: (root / "c1" / "0.png").write_bytes(b"\x89PNG")),
    ),
    own(
        "a picture of 10 GB",
        r"c0/0\.png cannot .*100000 x 100000|exceeds limit of",
        also(classes(), a_huge_picture),
    ),
    own("a list without its heads", r"train\.csv: its first line", listed(b"a.png,c0\n")),
    own(
        "a list of a file that is not there",
        r"train\.csv, line 2: there is no file .*b\.png",
        listed(b"filename,label\nb.png,c0\n"),
        FileNotFoundError,
    ),
    own(
        "a list with a gap",
        r"train\.csv: line 2 has no file name or no label",
        listed(b"filename,label\na.png\n"),
    ),
    own("an empty list", "has no train pictures", listed(b"filename,label\n")),
    own(
        "a picture twice in a list",
        r"train\.csv, line 3: \./a\.png was met before, in .*train\.csv, line 2",
        listed(b"filename,label\na.png,c0\n./a.png,c0\n"),
    ),
    own("a list of bytes", r"train\.csv: ", listed(b"\x00\xff\n")),
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
        "no queries to score",
        choose=lambda s: [s.drawn[0]._replace(query_x=IMAGES[:0], query_y=LABELS[:0])],
    ),
    scored(
        "a class that the net does not have",
        "label 1 above the largest class",
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
        "same tasks, got 2 and 1",
    ),
]

CASES = EPISODES + SETS + FOLDERS + EVALUATION
