"""Your own images: folders, lists, what is odd in them, and the file that they are decoded into."""

from __future__ import annotations

import os
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from l2l_prune.experiments.cli import app
from l2l_prune.fewshot.data import (
    EpisodeSampler,
    folder,
    folder_classes,
    folder_tasksets,
    load_folder,
    load_images,
    pictures,
)
from l2l_prune.fewshot.data.images import check_files
from l2l_prune.fewshot.data.sources import find_source
from tests.experiments.conftest import run_here

from .picture_files import encoded, picture, write, write_classes

NAMES = [f"c{i}" for i in range(10)]
SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    place = tmp_path / "cache"
    monkeypatch.setenv("L2L_PRUNE_CACHE", str(place))
    return place


@pytest.fixture
def root(tmp_path):
    place = tmp_path / "images"
    place.mkdir()
    return place


def all_splits(root, **options):
    return {split: load_folder(root, split, **options) for split in SPLITS}


def test_class_folders_are_split_by_class(root):
    """Every picture arrives once, with the label of its class; half, a quarter, the rest."""
    write_classes(root, NAMES)
    assert folder_classes(root) == NAMES
    for _ in range(2):  # decoded, then mapped
        found = all_splits(root)
        classes = [set(labels.tolist()) for _, labels in found.values()]
        assert [len(part) for part in classes] == [5, 2, 3]
        assert set.union(*classes) == set(range(10))
        for images, labels in found.values():
            assert images.dtype == torch.uint8
            assert images.shape == (3 * len(labels.unique()), 3, 8, 8)
            assert torch.equal(images[:, 0, 5, 5].long(), 10 * labels)
            assert images[:, 1, 5, 5].view(-1, 3).tolist() == [[0, 1, 2]] * len(labels.unique())
            assert (images[:, :, 0, 0] == 255).all()
            assert (images[:, :, 1, 0] == 0).all()


def test_a_seed_divides_the_classes(root):
    write_classes(root, NAMES)
    parts = {
        seed: tuple(load_folder(root, "train", split_seed=seed).labels.unique().tolist())
        for seed in range(5)
    }
    assert len(set(parts.values())) > 1
    assert torch.equal(load_folder(root, "train").labels.unique(), torch.tensor(parts[0]))
    named = load_images("folder", "train", root=root, split_seed=3)
    assert tuple(named.labels.unique().tolist()) == parts[3]


def test_split_folders_are_taken_as_they_are(root):
    for first, short in enumerate(("train", "val", "test")):
        classes = [f"{short}{i}" for i in range(2)]
        write_classes(root / short, classes, first=2 * first)
    for first, name in enumerate(SPLITS):
        images, labels = load_folder(root, name)
        assert sorted(set((images[:, 0, 5, 5] // 10).tolist())) == [2 * first, 2 * first + 1]
        assert [folder_classes(root)[i] for i in labels.unique()] == [
            f"{('train', 'val', 'test')[first]}{i}" for i in range(2)
        ]
    anew = load_folder(root, "train", split_seed=1)
    assert len(anew.labels.unique()) == 3


def test_lists_as_the_published_ones(root):
    """In the order of the lines, whatever the folder's."""
    for label in range(6):
        for number in range(2):
            write(
                root / "images" / f"n{label}{number}.jpg", np.full((8, 8, 3), 40 * label, np.uint8)
            )
    for split, labels in {"train": (3, 0), "val": (1, 5), "test": (4, 2)}.items():
        lines = [f"n{label}{number}.jpg,n{label}" for number in range(2) for label in labels]
        (root / f"{split}.csv").write_text("\n".join(["filename,label", *lines]) + "\n")
    images, labels = load_folder(root, "train")
    assert labels.tolist() == [3, 0, 3, 0]
    assert (images[:, 0, 4, 4].int() - 40 * labels).abs().max() <= 2
    assert load_folder(root, "validation").labels.tolist() == [1, 5, 1, 5]
    (root / "images" / "n31.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.csv, line 4: there is no file .*n31\.jpg"):
        load_folder(root, "test")


def test_sizes(root, cache):
    write_classes(root, NAMES, size=(12, 20))
    assert load_folder(root, "train").images.shape[1:] == (3, 12, 20)
    cut = load_folder(root, "train", image_size=12)
    assert cut.images.shape[1:] == (3, 12, 12)
    assert torch.equal(cut.images[:, 0, 5, 5].long(), 10 * cut.labels)
    shutil.rmtree(cache)
    write(root / "c7" / "1.png", picture(7, 1, (12, 21)))
    with pytest.raises(ValueError, match=r"c7/1\.png has 21 x 12 .*0\.png has 20 x 12.*image_size"):
        load_folder(root, "train")
    assert not list(cache.glob("*.npy"))
    assert not list(cache.glob(".*"))
    assert load_folder(root, "train", image_size=8).images.shape[1:] == (3, 8, 8)


def test_grey_and_colour(root):
    write_classes(root, NAMES, grey=True)
    grey = load_folder(root, "train")
    assert grey.images.shape[1:] == (1, 8, 8)
    assert torch.equal(grey.images[:, 0, 5, 5].long(), 10 * grey.labels)
    assert load_folder(root, "train", grey=False).images.shape[1] == 3
    write(root / "c9" / "2.png", picture(9, 2))  # the last of all has colour
    for split in SPLITS:
        images, labels = load_folder(root, split)
        assert images.shape[1] == 3
        assert torch.equal(images[:, 0, 5, 5].long(), 10 * labels)
    assert load_folder(root, "train", grey=True).images.shape[1] == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_note_says(orientation, tmp_path):
    """The independent oracle: where the marked corner lies by the EXIF standard."""
    array = np.zeros((4, 6), np.uint8)
    array[0, 0] = 255  # stored first row, first column
    exif = Image.Exif()
    exif[0x0112] = orientation
    write(tmp_path / "p.png", array, exif=exif)
    corners = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0)}
    corners |= {5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    read = pictures.read_picture(tmp_path / "p.png")
    assert read.shape == ((1, 4, 6) if orientation <= 4 else (1, 6, 4))
    assert read[0][corners[orientation]] == 255
    assert read.sum() == 255
    width, height, grey = pictures.picture_facts(str(tmp_path / "p.png"), "p")
    assert (1, height, width) == read.shape
    assert grey


def test_sixteen_bits_and_transparency():
    """Pillow alone clips the one and uncovers what is hidden under the other."""
    deep = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        read = pictures.read_picture(encoded(deep, format=kind))
        assert np.array_equal(read[0], deep >> 8)
    ink = np.zeros((8, 8, 4), np.uint8)
    ink[2:4, :, 3] = 255  # black on nothing
    read = pictures.read_picture(encoded(ink))
    assert read.shape == (3, 8, 8)
    assert (read[:, 2:4] == 0).all()
    assert (read[:, 4:] == 255).all()
    with pytest.raises(ValueError, match=r"a picture cannot be read .*8 or 16 bits"):
        pictures.read_picture(encoded(np.ones((4, 4), np.float32), format="TIFF"))


@pytest.mark.parametrize("ending", ["png", "jpg", "JPEG", "webp", "tif", "bmp", "gif"])
def test_formats(ending, tmp_path):
    write(tmp_path / f"p.{ending}", np.full((8, 8, 3), 120, np.uint8))
    read = pictures.read_picture(tmp_path / f"p.{ending}")
    assert read.shape == (1 if ending == "gif" else 3, 8, 8)  # a palette without any colour
    assert np.abs(read.astype(int) - 120).max() <= 3


@pytest.mark.parametrize("ending", ["png", "gif"])
def test_a_palette_tells_grey_from_colour(ending, tmp_path):
    from PIL import Image

    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    Image.fromarray(grey).convert("P").save(tmp_path / f"grey.{ending}")
    Image.fromarray(grey).save(tmp_path / f"plain.{ending}")
    colour = np.stack([grey, grey // 2, grey], -1)
    Image.fromarray(colour).quantize(64).save(tmp_path / f"colour.{ending}")
    for name, channels in (("grey", 1), ("plain", 1), ("colour", 3)):
        path = tmp_path / f"{name}.{ending}"
        read = pictures.read_picture(path)
        assert read.shape == (channels, 8, 8)
        assert pictures.picture_facts(str(path), name)[2] == (channels == 1)
        if channels == 1:
            assert np.array_equal(read[0], grey)


def test_it_is_decoded_once_until_a_file_changes(root, cache, monkeypatch):
    write_classes(root, NAMES)
    read = []
    real = folder.read_picture
    monkeypatch.setattr(folder, "read_picture", lambda *a: read.append(a[3]) or real(*a))
    before = all_splits(root, grey=False)
    assert len(read) == 30
    all_splits(root, grey=False)
    load_folder(root, "train", split_seed=4, grey=False)  # another division reads no picture
    assert len(read) == 30
    before["train"].images[0] = 77  # memory of this process alone
    assert not torch.equal(
        load_folder(root, "train", grey=False).images[0], before["train"].images[0]
    )
    label = int(before["train"].labels[0])
    for change in (
        lambda: os.utime(root / NAMES[label] / "0.png", ns=(1, 1)),
        lambda: write(root / NAMES[label] / "0.png", picture(label, 99)),
        lambda: (root / NAMES[label] / "0.png").rename(root / NAMES[label] / "9.png"),
    ):
        read.clear()
        change()
        load_folder(root, "train", grey=False)
        assert len(read) == 30
    assert (
        load_folder(root, "train", grey=False).images[2, 1, 5, 5] == 99
    )  # the last by its new name


def test_a_broken_cache_is_made_again(root, cache):
    write_classes(root, NAMES)
    before = load_folder(root, "test")
    for file in cache.glob("*.npy"):
        file.write_bytes(file.read_bytes()[:200])
    with pytest.warns(UserWarning, match="decoding it again"):
        again = load_folder(root, "test")
    assert torch.equal(before.labels, again.labels)
    assert (again.images[:, 0, 5, 5].long() == 10 * again.labels).all()


def test_damaged_files_are_named_and_left_out_only_on_request(root, cache):
    write_classes(root, NAMES, each=4)
    whole = encoded(picture(3, 1, (64, 64)))
    (root / "c3" / "1.png").write_bytes(whole[: len(whole) // 2])
    (root / "c5" / "0.png").write_text("no picture")
    (root / "c5" / "2.png").write_bytes(b"")
    words = r"3 damaged: .*c3/1\.png cannot .*c5/0\.png cannot .*c5/2\.png cannot .*skip_damaged"
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            load_folder(root, "train", image_size=8)
        assert not list(cache.glob("*.npy"))
        assert not list(cache.glob("*.json"))
    options = {"image_size": 8, "skip_damaged": True}
    for _ in range(2):  # also when it is mapped
        with pytest.warns(UserWarning, match=r"left out: 3 damaged: .*c3/1\.png"):
            found = all_splits(root, **options)
    counts = torch.cat([labels for _, labels in found.values()]).bincount()
    assert counts.tolist() == [4, 4, 4, 3, 4, 2, 4, 4, 4, 4]
    for images, labels in found.values():
        assert torch.equal(images[:, 0, 5, 5].long(), 10 * labels)
    [split] = [split for split in SPLITS if 5 in found[split].labels]
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match=r"tasks need 3 images .* class: c5 \(2\)"),
    ):
        load_folder(root, split, least_images=3, **options)


def test_a_file_of_ten_gigabytes(root):
    """Only its head is read."""
    write_classes(root, NAMES[:4])
    with (root / "c1" / "1.png").open("rb+") as file:
        file.write(b"no picture")
        file.truncate(10_000_000_000)  # a hole: it takes no room on the disk
    with pytest.raises(ValueError, match=r"1 damaged: .*c1/1\.png"):
        load_folder(root, "train")


def test_classes_that_are_too_small_are_named(root):
    write_classes(root, NAMES[:8], each=5)
    write_classes(root, NAMES[8:], each=2)
    for seed in range(4):
        train = set(load_folder(root, "train", split_seed=seed).labels.tolist())
        few = [f"{NAMES[i]} (2)" for i in (8, 9) if i in train]
        if few:
            with pytest.raises(ValueError) as told:  # noqa: PT011 - the words come next
                load_folder(root, "train", split_seed=seed, least_images=4)
            assert all(name in str(told.value) for name in few)
            assert "c1" not in str(told.value)


def test_names_that_are_no_text(root, capsys):
    for number, raw in enumerate((b"caf\xe9", b"\xff\xfe", b"na\nive", b"\xc3\xa9t\xc3\xa9")):
        try:
            path = os.path.join(os.fsencode(root), raw)
            os.mkdir(path)
        except OSError:
            pytest.skip("this file system takes UTF-8 only")
        for i in range(2):
            with open(os.path.join(path, b"\xe9%d.png" % i), "wb") as file:
                file.write(encoded(picture(number, i)))
    write_classes(root, ["a", "b"], first=4)
    found = load_folder(root, "train")
    assert len(found.labels) == 6
    raw = [os.fsencode(name) for name in folder_classes(root)]
    assert raw == sorted(raw)
    result = CliRunner().invoke(app, ["data", str(root), "--sheet", str(root.parent / "s.png")])
    assert result.exit_code == 0, result.output
    assert r"\xff\xfe" in result.output


def test_links(root):
    """To files and folders they count; in a circle they are named."""
    write_classes(root, NAMES[:5])
    outside = root.parent / "outside"
    write_classes(outside, ["c5"], first=5)
    (root / "c5").symlink_to(outside / "c5")
    write_classes(outside, ["c6"], first=6)
    (root / "c0" / "7.png").symlink_to(next((outside / "c6").glob("*.png")))
    assert sum(len(load_folder(root, split).labels) for split in ("train", "test")) < 19
    assert find_source(root).survey().counts[""]["c0"] == 4
    (root / "loop").symlink_to(root)
    with pytest.raises(ValueError, match=r"images/loop and .*images are the same folder"):
        load_folder(root, "train")
    (root / "loop").unlink()
    (root / "c1" / "up").symlink_to(root)
    with pytest.raises(ValueError, match=r"c1/up is a folder within a class"):
        load_folder(root, "train")
    (root / "c1" / "up").unlink()
    (root / "self").symlink_to("self")
    with pytest.raises(OSError, match=r"symbolic links.*"):
        load_folder(root, "train")
    (root / "self").unlink()
    (root / "c1" / "gone.png").symlink_to(root / "nowhere.png")
    with pytest.raises(FileNotFoundError, match=r"c1/gone\.png"):
        load_folder(root, "train")


@pytest.mark.parametrize("kind", ["link", "hard link", "two lists", "one list", "blanks"])
def test_no_picture_counts_twice(kind, root):
    """In two splits of folders or lists, or in one class."""
    write_classes(root, NAMES[:4])
    first = sorted((root / NAMES[0]).glob("*.png"))[0]
    where = root
    if kind in ("link", "hard link"):
        twin = root / NAMES[3] / "twin.png"
        twin.symlink_to(first) if kind == "link" else twin.hardlink_to(first)
    else:
        where = root.parent
        name = first.relative_to(root)
        (where / "train.csv").write_text(f"filename,label\n{name},a\n")
        again = {"two lists": f"{name},b", "blanks": f" {name} ,a ", "one list": f"./{name},a"}
        lines = again[kind] if kind != "one list" else f"{again[kind]}\n{name},a"
        (where / "test.csv").write_text(f"filename,label\n{lines}\n")
    with pytest.raises(ValueError, match=r"was met before, in .*: keep one of them"):
        load_folder(where, "train", split_seed=0)


def test_data_shows_what_it_found_before_it_says_what_is_wrong(root):
    write_classes(root / "train", NAMES[:4])
    write_classes(root / "test", NAMES[2:6], first=7)
    result = CliRunner().invoke(app, ["data", str(root), "--sheet", str(root.parent / "s.png")])
    assert result.exit_code == 2
    assert "24 pictures" in result.stdout
    assert NAMES[2] in result.stderr


def test_the_listing_is_a_stream(root, monkeypatch):
    """No more than a few batches of pictures are alive, however many there are."""
    write_classes(root, NAMES[:4], each=200)
    alive, most, lock = [0], [0], threading.Lock()
    real = folder.read_picture

    def counting(*arguments):
        with lock:
            alive[0] += 1
            most[0] = max(most[0], alive[0])
        return real(*arguments)

    class Counted:
        def __init__(self, place, images):
            def passing():
                for image in images:
                    with lock:
                        alive[0] -= 1
                    yield image

            write_images(place, passing())

    write_images = folder.write_images
    monkeypatch.setattr(folder, "read_picture", counting)
    monkeypatch.setattr(folder, "write_images", Counted)
    monkeypatch.setattr(folder, "usable_cores", lambda: 2)
    folder._decode(
        source := find_source(root), source.survey(), root.parent / "out", None, False, False
    )
    assert most[0] <= 16 * 7  # two threads: four batches wait, two are read, one is taken


def test_tasksets(root):
    pytest.importorskip("learn2learn")
    write_classes(root, NAMES, each=4)
    tasks = folder_tasksets(root, 3, 4, 2, 3)
    for taskset, ways, samples in zip(tasks, (3, 2, 2), (4, 3, 3), strict=True):
        images, labels = taskset.sample()
        assert images.shape == (ways * samples, 3, 8, 8)
        assert labels.bincount().tolist() == [samples] * ways
        red = (255 * images[:, 0, 5, 5]).round()
        assert all(len(red[labels == way].unique()) == 1 for way in range(ways))
    shutil.rmtree(root)
    write_classes(root, NAMES[:6], each=10)
    with pytest.raises(ValueError, match=r"5 ways, but train .* 3 classes"):
        folder_tasksets(root)


def test_episodes(root):
    write_classes(root, NAMES)
    sampler = EpisodeSampler(*load_folder(root, "train"), ways=3, shots=2, queries=1)
    episode = sampler.sample()
    red = (255 * episode.support_x[:, 0, 5, 5]).round() / 10
    assert red.view(3, 2).unique(dim=1).shape == (3, 1)


def test_the_command_shows_what_is_there(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_classes(root, NAMES, size=(12, 20))
    write(root / "c4" / "x.jpg", picture(4, 4, (30, 10)))
    (root / "c4" / "y.png").write_text("no picture")
    result = CliRunner().invoke(app, ["data", str(root), "--split", "3"])
    assert result.exit_code == 0, result.output
    for words in (
        "class folders, 10 classes, 32 pictures",
        "pictures per class: 3 (c0) to 5",
        "pixels: 10 x 12 to 20 x 30: give --image-size; colour",
        "1 damaged",
        "c4/y.png",
        "train classes (5): ",
        "test classes (3): ",
        "contact-sheet.png",
    ):
        assert words in result.output
    sheet = np.asarray(Image.open(tmp_path / "contact-sheet.png"))
    assert sheet.shape == (10 * 64, 140 + 8 * 64, 3)
    tile = sheet[7 * 64 + 32, 140 + 64 + 32]
    assert tile.tolist() == [70, 1, 0]  # the eighth class, its second picture


def test_a_run_on_a_folder(root, tmp_path, monkeypatch):
    write_classes(root, NAMES, each=6, size=(12, 12))
    out = tmp_path / "run"
    words = "run --data folder --image-size 10 --ways 2 --split 1 --iterations 4 --channels 4"
    words += " --train-shots 5 --queries 2 --eval-tasks 2 --tasks 1 --method dsd --jobs 1"
    arguments = [*words.split(), "--data-root", str(root), "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    run_here(monkeypatch)
    arguments[arguments.index("5")] = "7"
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "other")])
    assert result.exit_code != 0
    assert "tasks need 7 images" in result.output.replace("\n", " ")


def test_a_run_scored_on_validation_needs_no_test_split(tmp_path):
    for split in ("train", "val"):
        write_classes(tmp_path / "mine" / split, [f"{split}{i}" for i in range(3)])
    check_files("folder", tmp_path / "mine", held_out="validation")
    with pytest.raises(ValueError, match="has no test split"):
        check_files("folder", tmp_path / "mine")
