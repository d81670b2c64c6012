"""Load the images of a few-shot data set by its name."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from l2l_prune._basics import checks
from l2l_prune.fewshot.data.benchmarks import (
    BENCHMARKS,
    check_benchmark,
    has_benchmark,
    load_benchmark,
)
from l2l_prune.fewshot.data.cache import Images
from l2l_prune.fewshot.data.folder import load_folder, load_source
from l2l_prune.fewshot.data.glyphs import Glyphs
from l2l_prune.fewshot.data.pictures import load_pictures, picture_files, shown
from l2l_prune.fewshot.data.rendering import SIZE
from l2l_prune.fewshot.data.sources import Source, find_tables
from l2l_prune.fewshot.data.splits import SPLITS, check_split, shuffled

DATA_SETS = ("glyphs", "pictures", *BENCHMARKS, "folder")
OWN_SPLITS = tuple(BENCHMARKS)
"""Data sets with fixed splits and a fixed image size."""


def load_images(
    name: str,
    split: str,
    *,
    root: str | os.PathLike[str] | None = None,
    max_classes: int | None = None,
    seed: int = 0,
    split_seed: int | None = None,
    image_size: int | None = None,
    skip_damaged: bool = False,
    download: bool = False,
    least_images: int = 1,
) -> Images:
    """Load one split.

    The first call for a folder or a benchmark decodes its images into a file in the user's cache
    folder (set ``L2L_PRUNE_CACHE`` to choose another); later calls map that file.

    Args:
        name: ``"glyphs"`` (rendered here), ``"folder"`` (your own images by class, see
            :func:`load_folder`), ``"pictures"`` (a folder of them, each a class of its own), or
            ``"mini-imagenet"``, ``"tiered-imagenet"``, ``"cifar-fs"``, ``"fc100"`` or
            ``"omniglot"`` from learn2learn's files, or from parquet or arrow files of the three
            splits.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        root: Folder of the files, as learn2learn's loaders take it, or of the pictures; for glyphs,
            folder of the cache.
        max_classes: Use only this many classes of the split, drawn by ``seed``.
        seed: Seed of that draw.
        split_seed: Seed that splits the characters of glyphs, or the classes of a folder, at
            random; for glyphs it also replaces ``seed``. By default glyphs are split by script, and
            a folder keeps its own split. Pictures are always split at random, by default with seed
            0.
        image_size: Side in pixels of glyphs (28 by default), pictures (64), or the images of a
            folder (unchanged by default).
        download: Let learn2learn download missing files.
        skip_damaged: For a folder: leave out pictures that cannot be read.
        least_images: For a folder: number of images that each class must have.

    Raises:
        TypeError: If ``max_classes`` is not an integer.
        ValueError: If a name is unknown, ``max_classes`` is not possible, or a file is broken.
        FileNotFoundError: If a file is missing; the message says which and where it comes from.
    """
    _check_name(name)
    check_split(split)
    if name == "glyphs":
        by = "script" if split_seed is None else "random"
        chosen = seed if split_seed is None else split_seed
        size = SIZE if image_size is None else image_size
        glyphs = Glyphs(
            split, split_by=by, max_classes=max_classes, size=size, root=root, seed=chosen
        )
        return Images(glyphs.images, glyphs.labels)
    folder = _folder(name, root)
    if name == "pictures":
        side = 64 if image_size is None else image_size
        images = load_pictures(folder, side, split=split, seed=split_seed or 0)
        numbers = torch.arange(len(images), device="cpu")
        return _some_classes(Images(images, numbers), max_classes, seed)
    if name == "folder":
        own = load_folder(
            folder,
            split,
            image_size=image_size,
            split_seed=split_seed,
            skip_damaged=skip_damaged,
            least_images=least_images,
        )
        return _some_classes(own, max_classes, seed)
    if split_seed is not None:
        raise ValueError(f"{name} has splits of its own: leave split_seed out")
    if image_size is not None:
        raise ValueError(f"{name} has an image size of its own: leave image_size out")
    tables = None if has_benchmark(name, split, folder) else _tables(name, folder)
    if tables is not None:
        benchmark = BENCHMARKS[name]
        data = load_source(
            tables,
            split,
            image_size=benchmark.size,
            grey=benchmark.channels == 1,
            numbered_anew=True,
        )
        if name == "omniglot":  # published as black ink on white, and used as white on black
            data = data._replace(images=255 - data.images)
    else:
        data = load_benchmark(name, split, folder, download=download)
    return _some_classes(data, max_classes, seed)


def check_files(
    name: str,
    root: str | os.PathLike[str] | None,
    *,
    split_seed: int | None = None,
    image_size: int | None = None,
    skip_damaged: bool = False,
    download: bool = False,
    held_out: str = "test",
) -> None:
    """Make sure that the files of a data set are there (glyphs are rendered if necessary).

    Args:
        name: As in :func:`load_images`.
        root: Likewise.
        download: Let learn2learn download what is missing.
        split_seed: For a folder, as in :func:`load_images`; it is decoded if necessary.
        image_size: Likewise.
        skip_damaged: Likewise.
        held_out: The split of a folder that is needed besides training.

    Raises:
        ValueError: If the name is unknown, there is no ``root``, or a folder cannot be used.
        FileNotFoundError: If a file is missing.
    """
    _check_name(name)
    if name == "glyphs":
        Glyphs("train", size=SIZE if image_size is None else image_size, root=root)
        return
    if name == "pictures":
        picture_files(_folder(name, root))
        return
    folder = _folder(name, root)
    if name == "folder":
        for split in ("train", held_out):
            load_folder(
                folder,
                split,
                image_size=image_size,
                split_seed=split_seed,
                skip_damaged=skip_damaged,
            )
        return
    for split in SPLITS:
        if not has_benchmark(name, split, folder) and _tables(name, folder) is not None:
            continue
        if download:
            load_images(name, split, root=root, download=True)
        check_benchmark(name, split, folder)


def _tables(name: str, root: Path) -> Source | None:
    """The benchmark as parquet or arrow files, if the folder or one in it of that name has them.

    Raises:
        ValueError: If they hold another number of classes than the benchmark has.
    """
    for folder in (root / name, root):
        tables = find_tables(folder) if folder.is_dir() else {}
        if not tables:
            continue
        source = Source(folder, "tables", dict(tables))
        found = {split: len(counts) for split, counts in source.survey().counts.items()}
        published = dict(zip(SPLITS, BENCHMARKS[name].classes, strict=True))
        if found != published:
            raise ValueError(
                f"the tables in {shown(folder)} are not split like {name} in few-shot papers: they "
                f"have {_in_words(found)} classes, not {_in_words(published)}; "
                "use the data set folder (--data folder) to take them as they are, or to split "
                "them by class"
            )
        return source
    return None


def _in_words(classes: dict[str, int]) -> str:
    return ", ".join(f"{count} {split or 'unsplit'}" for split, count in classes.items())


def _check_name(name: str) -> None:
    checks.one_of("data", name, DATA_SETS)


def _folder(name: str, root: str | os.PathLike[str] | None) -> Path:
    if root is None:
        raise ValueError(f"data={name} needs the folder of its files: give root (--data-root)")
    return Path(root).expanduser()


def _some_classes(data: Images, max_classes: int | None, seed: int) -> Images:
    if max_classes is None:
        return data
    classes = torch.unique(data.labels)
    checks.whole_number("max_classes", max_classes)
    if not 1 <= max_classes <= len(classes):
        raise ValueError(f"max_classes must be in [1, {len(classes)}], got {max_classes}")
    chosen = torch.isin(data.labels, classes[shuffled(len(classes), seed)[:max_classes]])
    return Images(data.images[chosen], data.labels[chosen])
