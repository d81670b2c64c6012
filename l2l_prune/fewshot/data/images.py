"""The images of a few-shot data set by its name."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from l2l_prune._basics import checks
from l2l_prune.fewshot.data.benchmarks import (
    BENCHMARKS,
    SPLITS,
    Images,
    check_benchmark,
    load_benchmark,
)
from l2l_prune.fewshot.data.glyphs import Glyphs
from l2l_prune.fewshot.data.pictures import load_pictures, picture_files
from l2l_prune.fewshot.data.rendering import SIZE

DATA_SETS = ("glyphs", "pictures", *BENCHMARKS)


def load_images(
    name: str,
    split: str,
    *,
    root: str | os.PathLike[str] | None = None,
    max_classes: int | None = None,
    seed: int = 0,
    split_seed: int | None = None,
    image_size: int | None = None,
    download: bool = False,
) -> Images:
    """Load one split.

    The first call for a benchmark decodes its images through learn2learn's loader into a file in
    the user's cache folder (``L2L_PRUNE_CACHE`` to choose another); later ones map that file.

    Args:
        name: ``"glyphs"`` (rendered here), ``"pictures"`` (a folder of them, each a class of its
            own), or ``"mini-imagenet"``, ``"tiered-imagenet"``, ``"cifar-fs"``, ``"fc100"`` or
            ``"omniglot"`` from learn2learn's files.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        root: Folder of the files, as learn2learn's loaders take it; of the pictures; for glyphs, of
            the cache.
        max_classes: Use only so many classes of the split, drawn by ``seed``.
        seed: Seed of that draw.
        split_seed: Split the characters of glyphs at random by this seed, which then is also that
            of the draw; by script without it. Pictures are always split at random, by 0 without it.
        image_size: Pixels of a side of glyphs (28 by default) or pictures (64).
        download: Let learn2learn download missing files.

    Raises:
        TypeError: If ``max_classes`` is no integer.
        ValueError: If a name is unknown, ``max_classes`` is not possible, or a file is broken.
        FileNotFoundError: If a file is missing; the message says which and where it comes from.
    """
    _check_name(name)
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if name == "glyphs":
        by = "script" if split_seed is None else "random"
        chosen = seed if split_seed is None else split_seed
        size = SIZE if image_size is None else image_size
        glyphs = Glyphs(
            split, split_by=by, max_classes=max_classes, size=size, root=root, seed=chosen
        )
        return Images(glyphs.images, glyphs.labels)
    if name == "pictures":
        images = load_pictures(
            _folder(name, root),
            64 if image_size is None else image_size,
            split=split,
            seed=split_seed or 0,
        )
        return _some_classes(Images(images, torch.arange(len(images))), max_classes, seed)
    if split_seed is not None:
        raise ValueError(f"{name} has splits of its own: give no split_seed")
    if image_size is not None:
        raise ValueError(f"{name} has a size of its own: give no image_size")
    data = load_benchmark(name, split, _folder(name, root), download=download)
    return _some_classes(data, max_classes, seed)


def check_files(
    name: str,
    root: str | os.PathLike[str] | None,
    *,
    image_size: int | None = None,
    download: bool = False,
) -> None:
    """Make sure that the files of a data set are there (glyphs are rendered if need be).

    Args:
        name: As in :func:`load_images`.
        root: Likewise.
        image_size: Likewise, of glyphs.
        download: Let learn2learn download what is missing.

    Raises:
        ValueError: If the name is unknown, or there is no ``root``.
        FileNotFoundError: If a file is missing.
    """
    _check_name(name)
    if name == "glyphs":
        Glyphs("train", size=SIZE if image_size is None else image_size, root=root)
        return
    if name == "pictures":
        picture_files(_folder(name, root))
        return
    for split in SPLITS:
        if download:
            load_images(name, split, root=root, download=True)
        check_benchmark(name, split, _folder(name, root))


def _check_name(name: str) -> None:
    if name not in DATA_SETS:
        raise ValueError(f"data must be one of {', '.join(DATA_SETS)}, got {name!r}")


def _folder(name: str, root: str | os.PathLike[str] | None) -> Path:
    if root is None:
        raise ValueError(f"{name} needs the folder of its files: give root (--data-root)")
    return Path(root).expanduser()


def _some_classes(data: Images, max_classes: int | None, seed: int) -> Images:
    if max_classes is None:
        return data
    classes = torch.unique(data.labels)
    checks.whole_number("max_classes", max_classes)
    if not 1 <= max_classes <= len(classes):
        raise ValueError(f"max_classes must be in [1, {len(classes)}], got {max_classes}")
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    chosen = torch.isin(data.labels, classes[order[:max_classes]])
    return Images(data.images[chosen], data.labels[chosen])
