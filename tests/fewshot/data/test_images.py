"""Data sets by name: glyphs, and each benchmark from tiny files through learn2learn's loaders."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pickle
import re
import resource
import shutil
import socket
from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image

from l2l_prune.fewshot.data import EpisodeSampler, Glyphs, benchmarks, load_images
from l2l_prune.fewshot.data.benchmarks import BENCHMARKS
from l2l_prune.fewshot.data.images import check_files
from l2l_prune.fewshot.data.safe_pickle import SafeUnpickler

from . import benchmark_files as files
from .benchmark_files import SPLITS

COLOUR = {
    "mini-imagenet": files.write_mini_imagenet,
    "tiered-imagenet": files.write_tiered_imagenet,
    "fc100": files.write_fc100,
    "cifar-fs": files.write_cifar_fs,
}


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    """A cache of this test's own, and no network."""
    pytest.importorskip("learn2learn")
    monkeypatch.setenv("L2L_PRUNE_CACHE", str(tmp_path / "cache"))

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("name", COLOUR)
def test_colour_benchmarks(name, root):
    """Every pixel, label and axis arrives; twice, decoded and then mapped."""
    COLOUR[name](root)
    size = BENCHMARKS[name].size
    for _ in range(2):
        for split in SPLITS:
            images, labels = load_images(name, split, root=root)
            assert images.dtype == torch.uint8
            assert images.shape == (24, 3, size, size)
            assert labels.dtype == torch.int64
            assert labels.bincount().tolist() == [4] * 6
            assert torch.equal(images[:, 0, 5, 7].long(), 10 * labels)
            assert images[:, 1, 5, 7].sort().values.tolist() == list(range(24))
            assert (images[:, 2, 0, 1] == 255).all()
            assert (images[:, 2, 1, 0] == 0).all()
    check_files(name, root)


def test_the_second_load_reads_no_source(root, monkeypatch):
    files.write_fc100(root)
    first = load_images("fc100", "train", root=root)
    monkeypatch.setattr(pickle, "_Unpickler", None)
    assert torch.equal(load_images("fc100", "train", root=root).images, first.images)
    first.images[0] = 77  # memory of this process alone
    assert not torch.equal(load_images("fc100", "train", root=root).images[0], first.images[0])


def test_changed_files_are_decoded_again(root):
    files.write_fc100(root)
    before = load_images("fc100", "train", root=root)
    files.write_fc100(root, classes=4, each=6)
    os.utime(root / "FC100_train.pickle", ns=(1, 1))
    after = load_images("fc100", "train", root=root)
    assert after.labels.max() == 3
    assert before.labels.max() == 5


def test_what_is_downloaded_is_decoded_and_kept_once(root, tmp_path, monkeypatch):
    """And is fetched again after it was deleted, though its decoded copy is still there."""
    opened, fetched = [], []

    def opening(name, split, root, download):
        opened.append(split)
        if download and not (root / "FC100_train.pickle").exists():
            fetched.append(split)
            files.write_fc100(root)
        return real(name, split, root, False)

    real = benchmarks._open
    monkeypatch.setattr(benchmarks, "_open", opening)
    first = load_images("fc100", "train", root=root, download=True)
    for download in (False, True):
        again = load_images("fc100", "train", root=root, download=download)
        assert torch.equal(again.images, first.images)
    assert opened == fetched == ["train"]
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2  # images and labels
    for file in root.iterdir():
        file.unlink()
    check_files("fc100", root, download=True)
    assert fetched == ["train", "train"]


def test_a_download_that_brings_too_little_is_told(root, monkeypatch):
    """The advice to download would not help."""
    files.write_fc100(root)
    (root / "FC100_test.pickle").unlink()
    monkeypatch.setattr(benchmarks, "_open", lambda *arguments, **options: None)
    with pytest.raises(FileNotFoundError, match=r"did not bring FC100_test\.pickle to .*delete"):
        load_images("fc100", "test", root=root, download=True)


def test_omniglot(root, monkeypatch):
    files.write_omniglot(root, monkeypatch)
    loaded = {split: load_images("omniglot", split, root=root) for split in SPLITS}
    characters = [set(loaded[split].labels.tolist()) for split in SPLITS]
    assert [len(part) for part in characters] == [20, 2, 8]  # 1100, 100 and 423 of 1623, scaled
    assert set.union(*characters) == set(range(30))
    for images, labels in loaded.values():
        assert images.shape == (len(labels), 1, 28, 28)
        # Ink is 255 on 0, upright: a bar of 15 (c + 1) of 105 rows on the left.
        rows = (images[:, 0, :, 2] > 127).sum(1).float()
        expected = 28 * 15 * (labels % 5 + 1) / 105
        assert (rows - expected).abs().max() <= 1
        corner = images[:, 0, 3, 25] > 127
        assert torch.equal(corner, labels // 5 % 3 % 2 == 0)


def test_episodes_from_a_mapped_file(root):
    files.write_cifar_fs(root)
    images, labels = load_images("cifar-fs", "test", root=root)
    sampler = EpisodeSampler(images, labels, ways=3, shots=2, queries=2)
    episode = sampler.sample()
    red = (255 * episode.support_x[:, 0, 5, 7]).round() / 10
    assert red.view(3, 2).unique(dim=1).shape == (3, 1)  # one class a way


def test_some_classes(root):
    files.write_fc100(root)
    _, labels = load_images("fc100", "train", root=root, max_classes=2)
    assert len(labels.unique()) == 2
    assert len(labels) == 8
    for wrong in (0, 7):
        with pytest.raises(ValueError, match=r"max_classes must be in \[1, 6\]"):
            load_images("fc100", "train", root=root, max_classes=wrong)


def test_glyphs_by_name(glyph_cache, monkeypatch):
    monkeypatch.setenv("L2L_PRUNE_CACHE", str(glyph_cache))
    images, labels = load_images("glyphs", "train", max_classes=7)
    glyphs = Glyphs("train", max_classes=7)
    assert torch.equal(images, glyphs.images)
    assert torch.equal(labels, glyphs.labels)


@pytest.mark.parametrize("name", [*COLOUR, "omniglot"])
def test_a_missing_file_is_named_with_its_place_and_source(name, root, monkeypatch):
    if name == "omniglot":
        files.write_omniglot(root, monkeypatch)
    else:
        COLOUR[name](root)
    for file in BENCHMARKS[name].files("test"):
        kept = root / "kept"
        (root / file).rename(kept)
        words = re.escape(f"{name} needs {file}, which is not in {root}; it comes from ")
        for ask in (lambda: check_files(name, root), lambda: load_images(name, "test", root=root)):
            with pytest.raises(FileNotFoundError, match=words):
                ask()
        kept.rename(root / file)
    load_images(name, "test", root=root)


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps({"image_data": 3})])
def test_a_broken_file_is_named_and_leaves_nothing_behind(root, tmp_path, content):
    files.write_mini_imagenet(root)
    (root / "mini-imagenet-cache-test.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read from .*mini-imagenet-cache-test\.pkl"):
        load_images("mini-imagenet", "test", root=root)
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_labels_that_do_not_fit_are_refused(root):
    files.write_tiered_imagenet(root)
    with (root / "tiered-imagenet" / "val_labels.pkl").open("wb") as file:
        pickle.dump({"label_specific": [0, 1]}, file)
    with pytest.raises(ValueError, match=r"cannot be read from .*val_labels\.pkl.*"):
        load_images("tiered-imagenet", "validation", root=root)


def test_half_a_copy_of_cifar_fs_is_refused(root):
    files.write_cifar_fs(root)
    load_images("cifar-fs", "train", root=root)
    shutil.rmtree(root / "cifarfs" / "processed" / "test" / "test_3")
    with pytest.raises(ValueError, match="incomplete copy"):
        load_images("cifar-fs", "test", root=root)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("imagenet", "train"), "data must be one of glyphs, pictures, mini-imagenet"),
        (("glyphs", "val"), "split must be one of train, validation, test"),
        (("mini-imagenet", "train"), "give root"),
    ],
)
def test_bad_input(arguments, words):
    with pytest.raises(ValueError, match=words):
        load_images(*arguments)


class Exploding:
    """Unpickled by pickle itself, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mini-imagenet", "mini-imagenet-cache-train.pkl"),
        ("fc100", "FC100_train.pickle"),
        ("tiered-imagenet", "tiered-imagenet/train_images_png.pkl"),
        ("tiered-imagenet", "tiered-imagenet/train_labels.pkl"),
    ],
)
def test_a_hostile_pickle_runs_no_code(name, file, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    COLOUR[name](root)
    (root / file).write_bytes(pickle.dumps({"image_data": Exploding()}))
    with pytest.raises(ValueError, match=r"asks for posix\.mkdir, which is no data"):
        load_images(name, "train", root=root)
    assert not (tmp_path / "exploded").exists()
    # The file is as bad as it looks, and learn2learn has its own pickle again.
    with (root / file).open("rb") as opened:
        importlib.import_module("learn2learn.vision.datasets.fc100").pickle.load(opened)
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", COLOUR)
def test_bookkeeping_files_are_not_read(name, root, tmp_path, monkeypatch):
    """learn2learn's MetaDataset would unpickle whatever lies there; nothing of ours asks it to."""
    monkeypatch.chdir(tmp_path)
    COLOUR[name](root)
    for stem in (f"{name}-bookkeeping-train", "cifarfs-train-bookkeeping"):
        (root / f"{stem}.pkl").write_bytes(pickle.dumps(Exploding()))
    load_images(name, "train", root=root)
    assert not (tmp_path / "exploded").exists()


VALUES = {
    "image_data": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "fortran": np.asfortranarray(np.eye(3)),
    "texts": np.array(["ab", "c"]),
    "bytes of one length": np.array([b"ab", b"c"]),
    "other order": np.arange(3, dtype=">i4"),
    "complex": np.array([1 + 2j], dtype="<c8"),
    "empty": np.zeros((0, 3)),
    "numbers": [np.float32(3), np.int64(4), np.bool_(True)],
    "bytes": [b"\xff\x00", b""],
    "ordered": OrderedDict(a=1),
}


@pytest.mark.parametrize("protocol", range(6))
def test_the_safe_unpickler_reads_what_pickle_reads(protocol):
    content = pickle.dumps(VALUES, protocol)
    expected, found = pickle.loads(content), SafeUnpickler(io.BytesIO(content)).load()
    for key, value in expected.items():
        assert repr(found[key]) == repr(value)
        assert type(found[key]) is type(value)
        if isinstance(value, np.ndarray):
            assert found[key].dtype == value.dtype
            assert found[key].flags.f_contiguous == value.flags.f_contiguous


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02cnumpy\nndarray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
        b"\x80\x02c__builtin__\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
        b"\x80\x02c__builtin__\nbytes\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85U\x01b\x87R.",
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # the two billionth entry of its memo
    ],
    ids=["array", "bytearray", "bytes", "reconstruct", "memo"],
)
def test_small_pickles_take_little_memory(content):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(pickle.UnpicklingError, TypeError):
        assert SafeUnpickler(io.BytesIO(content)).load() is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize(("size", "words"), [((20_000, 20_000), "bomb"), ((3, 84), "an image is")])
def test_images_of_another_size_are_refused(size, words, root):
    """Also the one that would unpack to 1.2 GB."""
    files.write_tiered_imagenet(root)
    buffer = io.BytesIO()
    Image.new("1", size).save(buffer, "png")
    with (root / "tiered-imagenet" / "train_images_png.pkl").open("wb") as file:
        pickle.dump([buffer.getvalue()] * 24, file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=words):
        load_images("tiered-imagenet", "train", root=root)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("damage", ["truncated", "header", "labels"])
def test_a_damaged_copy_is_decoded_again(damage, root, tmp_path):
    files.write_fc100(root)
    before = load_images("fc100", "train", root=root)
    (labels,) = (tmp_path / "cache").glob("*.labels.npy")
    (images,) = set((tmp_path / "cache").glob("*.npy")) - {labels}
    if damage == "truncated":
        images.write_bytes(images.read_bytes()[:-1])
    elif damage == "header":
        images.write_bytes(images.read_bytes().replace(b"(24, 3,", b"(99, 3,"))
    else:
        np.save(labels, np.zeros(3, dtype=np.int64))
    with pytest.warns(UserWarning, match="decoding it again"):
        after = load_images("fc100", "train", root=root)
    assert torch.equal(before.images, after.images)
    assert torch.equal(before.labels, after.labels)
