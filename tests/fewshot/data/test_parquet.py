"""Tables of pictures as the hubs keep them, written here by pyarrow itself."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from l2l_prune.fewshot.data import folder_classes, load_folder, load_images
from l2l_prune.fewshot.data.benchmarks import BENCHMARKS
from l2l_prune.fewshot.data.images import check_files

from .picture_files import encoded, picture

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("L2L_PRUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    place = tmp_path / "tables"
    place.mkdir()
    return place


def table(classes, each=2, form="bytes", label=int, names=None):
    rows = [(c, n) for c in classes for n in range(each)]
    images = [encoded(picture(c % 25, n)) for c, n in rows]
    if form == "struct":
        images = [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)]
    columns = {"image": images, "label": [label(c) for c, _ in rows], "id": list(range(len(rows)))}
    made = pa.table(columns)
    if names:
        about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        made = made.replace_schema_metadata({"huggingface": json.dumps(about)})
    return made


def write_parquet(made, path):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(made, path, row_group_size=3)


def write_file(made, path):
    path.parent.mkdir(exist_ok=True)
    with pa.ipc.new_file(path, made.schema) as writer:
        writer.write_table(made, max_chunksize=3)


def write_stream(made, path):
    path.parent.mkdir(exist_ok=True)
    with pa.ipc.new_stream(path, made.schema) as writer:
        writer.write_table(made, max_chunksize=3)


def red(images):
    return images[:, 0, 5, 5].long() // 10


@pytest.mark.parametrize("form", ["bytes", "struct"])
@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_parquet, "data/{}-00000-of-00001.parquet"),
        (write_parquet, "mini_{}.parquet"),
        (write_file, "{}.arrow"),
        (write_stream, "{}/data-00000-of-00001.arrow"),
    ],
)
def test_split_files(root, form, write, name):
    for first, split in zip((0, 4, 8), ("train", "val", "test"), strict=True):
        write(table(range(first, first + 3), form=form), root / name.format(split))
    assert folder_classes(root) == ["0", "1", "2", "4", "5", "6", "8", "9", "10"]  # by number
    for first, split in zip((0, 4, 8), SPLITS, strict=True):
        images, labels = load_folder(root, split)
        assert images.shape == (6, 3, 8, 8)
        names = [int(folder_classes(root)[label]) for label in labels]
        assert names == red(images).tolist() == [c for c in range(first, first + 3) for _ in "ab"]
        assert images[:, 1, 5, 5].tolist() == [0, 1] * 3


def test_several_files_of_a_split_and_many_rows(root):
    for shard in range(3):
        write_parquet(table([shard], each=300), root / f"train-{shard:05d}-of-00003.parquet")
    images, labels = load_folder(root, "train")
    assert labels.bincount().tolist() == [300] * 3
    assert torch.equal(red(images), labels)


def test_a_table_without_splits_is_split_by_class(root):
    write_parquet(table(range(8), label=lambda c: f"class {c}"), root / "all.parquet")
    found = [load_folder(root, split, split_seed=2) for split in SPLITS]
    assert [len(labels.unique()) for _, labels in found] == [4, 2, 2]
    assert all(torch.equal(red(images), labels) for images, labels in found)


def test_names_of_labels(root):
    names = [f"bird {i}" for i in range(4)]
    write_parquet(table([0, 1], names=names), root / "train.parquet")
    write_parquet(table([2, 3], names=names), root / "test.parquet")
    assert folder_classes(root) == names
    assert load_folder(root, "test").labels.tolist() == [2, 2, 3, 3]


def test_pictures_beside_the_table(root):
    (root / "a.png").write_bytes(encoded(picture(1, 0)))
    images = [{"bytes": None, "path": "a.png"}, {"bytes": encoded(picture(2, 0)), "path": None}]
    write_parquet(pa.table({"image": images, "label": ["x", "y"]}), root / "train.parquet")
    assert red(load_folder(root, "train").images).tolist() == [1, 2]


def test_splits_that_share_classes_are_refused(root):
    """The hubs keep data sets for ordinary classification so: as few-shot data they would leak."""
    for split in ("train", "test"):
        write_parquet(table(range(6)), root / f"{split}.parquet")
    with pytest.raises(ValueError, match=r"train and test of .* share 6 classes: 0, 1, .*--split"):
        load_folder(root, "train")
    images, labels = load_folder(root, "train", split_seed=0)
    assert [(labels == label).sum() for label in labels.unique()] == [4] * 3
    assert torch.equal(red(images), labels)


@pytest.mark.parametrize("name", ["mini-imagenet", "tiered-imagenet"])
@pytest.mark.parametrize("anew", [False, True], ids=["numbered through", "each split from 0"])
@pytest.mark.parametrize("below", ["", "{}"])
def test_benchmarks_by_name(root, name, anew, below):
    first, place = 0, root / below.format(name)
    place.mkdir(exist_ok=True)
    for split, classes in zip(SPLITS, BENCHMARKS[name].classes, strict=True):
        start = 0 if anew else first
        write_parquet(table(range(start, start + classes), each=1), place / f"{split}.parquet")
        first += classes
    check_files(name, root)
    for split, classes in zip(SPLITS, BENCHMARKS[name].classes, strict=True):
        images, labels = load_images(name, split, root=root)
        assert images.shape == (classes, 3, 84, 84)
        assert len(labels.unique()) == classes
    assert len(load_images(name, "train", root=root, max_classes=5).labels) == 5
    (place / "test.parquet").unlink()
    with pytest.raises(ValueError, match=rf"not split like {name} in few-shot papers"):
        load_images(name, "train", root=root)


def test_omniglot_is_white_ink_on_black_as_from_its_own_files(root):
    for split, classes in zip(SPLITS, BENCHMARKS["omniglot"].classes, strict=True):
        images = [encoded(np.full((105, 105), 250, np.uint8)) for _ in range(classes)]
        made = pa.table({"image": images, "label": list(range(classes))})
        write_parquet(made, root / f"{split}.parquet")
    images, _ = load_images("omniglot", "validation", root=root)
    assert images.shape == (BENCHMARKS["omniglot"].classes[1], 1, 28, 28)
    assert (images == 5).all()


def test_what_to_get_is_told(root):
    with pytest.raises(FileNotFoundError, match=r"Or put .*train\*\.parquet.*image and label"):
        load_images("mini-imagenet", "train", root=root)


BYTES = [encoded(picture(0, 0)), encoded(picture(1, 0))]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            {"img": BYTES, "label": [0, 1]},
            "must have exactly one column image, but it has img, label",
        ),
        (
            {"image": BYTES, "fine": [0, 1]},
            "must have exactly one column label, but it has image, fine",
        ),
        ({"image": ["a", "b"], "label": [0, 1]}, "column image must hold bytes.*not string"),
        ({"image": BYTES, "label": [0.5, 1.0]}, "column label must hold whole .*not double"),
        ({"image": BYTES, "label": [0, None]}, "column label has missing values"),
        ({"image": [BYTES[0], None], "label": [0, 1]}, "row 1 has no image"),
        ({"image": [BYTES[0], b"text"], "label": [0, 1]}, r"row 1 cannot be read as a picture"),
        ({"image": BYTES, "label": [1, 1]}, "has 1 of its 1 classes"),
    ],
)
@pytest.mark.parametrize("write", [write_parquet, write_file])
def test_what_a_table_lacks_is_named(root, columns, words, write):
    suffix = "parquet" if write is write_parquet else "arrow"
    write(pa.table(columns), root / f"train.{suffix}")
    with pytest.raises(ValueError, match=words) as told:
        load_folder(root, "train")
    assert "tables" in str(told.value)
    assert not list((root.parent / "cache").glob("*.npy"))


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_damaged_tables(root, suffix):
    path = root / f"train.{suffix}"
    (write_parquet if suffix == "parquet" else write_file)(table(range(4), each=50), path)
    whole = path.read_bytes()
    for content in (b"", b"no table at all", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"train\.{suffix} cannot be used as a table"):
            load_folder(root, "train")


def test_files_beside_splits(root):
    write_parquet(table([0, 1]), root / "train.parquet")
    write_parquet(table([2, 3]), root / "more.parquet")
    with pytest.raises(ValueError, match=r"more\.parquet names no split"):
        load_folder(root, "train")
    (root / "more.parquet").rename(root / "train-test.parquet")
    with pytest.raises(ValueError, match=r"train-test\.parquet names more than one split"):
        load_folder(root, "train")


def test_without_pyarrow(root, monkeypatch):
    write_parquet(table([0, 1]), root / "train.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install \"l2l-prune\[parquet\]\""):
        load_folder(root, "train")


@pytest.mark.parametrize("write", [write_parquet, write_file])
def test_pictures_that_a_table_only_names_are_read_again_when_they_change(write, root):
    rows = [(c, n) for c in range(8) for n in range(2)]
    names = [f"{c}-{n}.png" for c, n in rows]
    for name, (c, n) in zip(names, rows, strict=True):
        (root / name).write_bytes(encoded(picture(c, n)))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": name} for name in names], kind)
    ending = "parquet" if write is write_parquet else "arrow"
    write(pa.table({"image": images, "label": [c for c, _ in rows]}), root / f"all.{ending}")
    before = load_folder(root, "train")
    for name, (c, n) in zip(names, rows, strict=True):
        (root / name).write_bytes(encoded(picture(c + 10, n)))
    after = load_folder(root, "train")
    assert torch.equal(red(after.images), red(before.images) + 10)


def test_what_a_hub_computed_from_a_table_is_not_read_as_data(root):
    for split, start in zip(SPLITS, (0, 4, 8), strict=True):
        made = table(range(start, start + 2))
        write_stream(made, root / split / "data-00000-of-00001.arrow")
        write_stream(made, root / split / "cache-1a2b3c.arrow")
    assert len(load_folder(root, "train").labels) == 4
