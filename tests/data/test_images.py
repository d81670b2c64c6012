"""Data sets by name; mini-ImageNet from tiny files in learn2learn's own format."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest
import torch

from l2l_prune.data import Glyphs, load_images
from l2l_prune.data.images import check_files

SPLITS = ("train", "validation", "test")


def write_mini_imagenet(folder, classes=6, each=4):
    """The three files as learn2learn downloads them; pixels tell class and example."""
    for number, split in enumerate(SPLITS):
        labels = np.random.default_rng(number).permutation(np.repeat(np.arange(classes), each))
        images = np.zeros((len(labels), 84, 84, 3), dtype=np.uint8)
        images[..., 0] = (10 * labels)[:, None, None]
        images[..., 1] = np.arange(len(labels))[:, None, None]
        images[:, 0, 1, 2] = 255  # row 0, column 1, blue
        names = {f"n{c:08d}": np.flatnonzero(labels == c).tolist() for c in range(classes)}
        with (folder / f"mini-imagenet-cache-{split}.pkl").open("wb") as file:
            pickle.dump({"image_data": images, "class_dict": names}, file)


@pytest.fixture
def root(tmp_path):
    pytest.importorskip("learn2learn")
    write_mini_imagenet(tmp_path)
    return tmp_path


def test_mini_imagenet(root):
    for split in SPLITS:
        images, labels = load_images("mini-imagenet", split, root=root)
        assert images.dtype == torch.uint8
        assert images.shape == (24, 3, 84, 84)
        assert labels.dtype == torch.int64
        assert torch.equal(images[:, 0, 5, 5].long(), 10 * labels)
        assert torch.equal(images[:, 1, 5, 5].long(), torch.arange(24))
        assert (images[:, 2, 0, 1] == 255).all()
        assert (images[:, 2, 1, 0] == 0).all()
    check_files("mini-imagenet", root)


def test_some_classes(root):
    _, labels = load_images("mini-imagenet", "train", root=root, max_classes=2)
    assert len(labels.unique()) == 2
    assert len(labels) == 8
    for wrong in (0, 7):
        with pytest.raises(ValueError, match=r"max_classes must be in \[1, 6\]"):
            load_images("mini-imagenet", "train", root=root, max_classes=wrong)


def test_glyphs_by_name():
    images, labels = load_images("glyphs", "train", max_classes=7)
    glyphs = Glyphs("train", max_classes=7)
    assert torch.equal(images, glyphs.images)
    assert torch.equal(labels, glyphs.labels)


def test_a_missing_file_is_named(root):
    (root / "mini-imagenet-cache-validation.pkl").unlink()
    missing = re.escape(str(root / "mini-imagenet-cache-validation.pkl"))
    with pytest.raises(FileNotFoundError, match=f"{missing} is missing"):
        check_files("mini-imagenet", root)
    with pytest.raises(FileNotFoundError, match=f"{missing} is missing"):
        load_images("mini-imagenet", "validation", root=root)


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps({"image_data": 3})])
def test_a_broken_file_is_named(root, content):
    (root / "mini-imagenet-cache-test.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"mini-imagenet-cache-test\.pkl is broken"):
        load_images("mini-imagenet", "test", root=root)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("imagenet", "train"), "data must be one of glyphs, mini-imagenet"),
        (("glyphs", "val"), "split must be one of train, validation, test"),
        (("mini-imagenet", "train"), "give root"),
    ],
)
def test_bad_input(arguments, words):
    with pytest.raises(ValueError, match=words):
        load_images(*arguments)
