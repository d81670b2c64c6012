"""The images of a few-shot data set by its name, in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from l2l_prune.data.glyphs import Glyphs

DATA_SETS = ("glyphs", "mini-imagenet")
SPLITS = ("train", "validation", "test")


class Images(NamedTuple):
    """Labelled images.

    Attributes:
        images: uint8 ``[n, C, H, W]``.
        labels: int64 ``[n]``.
    """

    images: Tensor
    labels: Tensor


def load_images(
    name: str,
    split: str,
    *,
    root: str | os.PathLike[str] | None = None,
    max_classes: int | None = None,
    seed: int = 0,
) -> Images:
    """Load one split.

    Args:
        name: ``"glyphs"`` (rendered here), or ``"mini-imagenet"`` from learn2learn's files.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        root: Folder of the files; for glyphs, of the cache.
        max_classes: Use only so many classes of the split, drawn by ``seed``.
        seed: Seed of that draw.

    Raises:
        ValueError: If a name is unknown, ``max_classes`` is not possible, or a file is broken.
        FileNotFoundError: If a file is missing; the message says which and where it comes from.
    """
    if name not in DATA_SETS:
        raise ValueError(f"data must be one of {', '.join(DATA_SETS)}, got {name!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if name == "glyphs":
        glyphs = Glyphs(split, max_classes=max_classes, root=root, seed=seed)
        return Images(glyphs.images, glyphs.labels)
    return _some_classes(_mini_imagenet(split, root), max_classes, seed)


def check_files(name: str, root: str | os.PathLike[str] | None) -> None:
    """Make sure that the files of a data set are there (glyphs are rendered if need be).

    Raises:
        ValueError: If the name is unknown, or there is no ``root``.
        FileNotFoundError: If a file is missing.
    """
    if name == "mini-imagenet":
        for split in SPLITS:
            _mini_imagenet_file(split, root)
    else:
        load_images(name, "train", root=root)


def _mini_imagenet_file(split: str, root: str | os.PathLike[str] | None) -> Path:
    if root is None:
        raise ValueError("mini-imagenet needs the folder of its files: give root (--data-root)")
    file = Path(root).expanduser() / f"mini-imagenet-cache-{split}.pkl"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing; learn2learn's MiniImagenet downloads it (download=True), and its "
            "documentation names the sources of the three files"
        )
    return file


def _mini_imagenet(split: str, root: str | os.PathLike[str] | None) -> Images:
    file = _mini_imagenet_file(split, root)
    try:
        from learn2learn.vision.datasets import MiniImagenet
    except ImportError as error:
        raise ImportError(
            f'{error}; mini-imagenet needs: pip install "l2l-prune[learn2learn]"'
        ) from None
    try:
        data = MiniImagenet(str(file.parent), mode=split)
    except Exception as error:
        raise ValueError(f"{file} is broken, fetch it again: {error!r}") from error
    return Images(data.x.to(torch.uint8), torch.as_tensor(data.y).long())


def _some_classes(data: Images, max_classes: int | None, seed: int) -> Images:
    if max_classes is None:
        return data
    classes = torch.unique(data.labels)
    if not 1 <= max_classes <= len(classes):
        raise ValueError(f"max_classes must be in [1, {len(classes)}], got {max_classes}")
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    chosen = torch.isin(data.labels, classes[order[:max_classes]])
    return Images(data.images[chosen], data.labels[chosen])
