"""The embedded data set: characters rendered from the fonts inside the matplotlib wheel."""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from l2l_prune._basics import checks
from l2l_prune._basics.files import replace_file
from l2l_prune.fewshot.data.cache import cache_folder, locked
from l2l_prune.fewshot.data.rendering import INSTANCES, SIZE, Rendered, render_glyphs
from l2l_prune.fewshot.data.splits import check_split, most_for_training, random_split, shuffled

_FORMAT = 2  # a larger one whenever a class is drawn otherwise
_SEED = 0
_LARGEST = 100_000_000  # bytes at 28x28, ten times what all characters take
_BY_SCRIPT = {
    "train": ("latin", "symbol"),
    "validation": ("greek",),
    "test": ("cyrillic", "armenian", "georgian"),
}


class Glyphs(Dataset[tuple[Tensor, int]]):
    """Few-shot character images: 565 characters with 20 instances each, 28x28 grey, ink 1 on 0.

    They are rendered once, in about 15 s, and kept in the user's cache folder (set
    ``L2L_PRUNE_CACHE`` or ``root`` to choose another).

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``; characters are disjoint.
        split_by: ``"script"``: train Latin and symbols, validation Greek, test Cyrillic,
            Armenian and Georgian. ``"random"``: 60 / 15 / 25% of all characters.
        max_classes: Use only this many characters of the split, drawn by ``seed``.
        size: Side in pixels, 16 to 128. Sizes other than 28 show the same drawings at that
            resolution and have a cached file of their own (64 takes a minute to render).
        root: Folder of the cached file.
        seed: Seed of the random split and of ``max_classes``.
        transform: Applied to each image ``[1, size, size]`` in [0, 1].
        target_transform: Applied to each label.

    Attributes:
        images: uint8 ``[n, 1, size, size]``.
        labels: int64 ``[n]``, in 0 .. number of classes - 1.
        classes: The character of each label.
        scripts: The script of each label.

    Raises:
        TypeError: If ``size`` is not an integer.
        ValueError: If ``split``, ``split_by``, ``max_classes`` or ``size`` is not possible.
        ImportError: If the packages of the ``experiments`` extra are missing.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        split_by: str = "script",
        max_classes: int | None = None,
        size: int = SIZE,
        root: str | os.PathLike[str] | None = None,
        seed: int = 0,
        transform: Callable[[Tensor], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
    ) -> None:
        check_split(split)
        if split_by not in ("script", "random"):
            raise ValueError(f'split_by must be "script" or "random", got {split_by!r}')
        if checks.whole_number("size", size, least=16) > 128:
            raise ValueError(f"size must be in [16, 128], got {size}")
        glyphs = _load(root, size)
        chosen = _split(glyphs, split, split_by, seed)
        if max_classes is not None:
            if not 1 <= checks.whole_number("max_classes", max_classes) <= len(chosen):
                raise ValueError(
                    f"max_classes must be in [1, {len(chosen)}] for this split, got {max_classes}"
                )
            order = shuffled(len(chosen), seed)
            chosen = sorted(chosen[int(i)] for i in order[:max_classes])
        self.classes = [glyphs.characters[i] for i in chosen]
        self.scripts = [glyphs.scripts[i] for i in chosen]
        self.images = torch.from_numpy(glyphs.images[chosen]).reshape(-1, 1, size, size)
        self.labels = torch.arange(len(chosen), device="cpu").repeat_interleave(INSTANCES)
        self.transform = transform
        self.target_transform = target_transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """The image in [0, 1] and its label, transformed."""
        image: Any = self.images[index].float() / 255
        label: Any = int(self.labels[index])
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            label = self.target_transform(label)
        return image, label


def contact_sheet(data: Glyphs, path: str | os.PathLike[str], classes: int = 24) -> None:
    """Write a PNG overview: one row for each character, with its instances side by side.

    Args:
        data: The glyphs.
        path: The PNG file.
        classes: Number of characters, evenly spread over the split.
    """
    from PIL import Image

    count = min(classes, len(data.classes))
    rows = torch.linspace(0, len(data.classes) - 1, count, device="cpu").long()
    side = data.images.shape[-1]
    images = data.images.view(-1, INSTANCES, side, side)[rows]
    sheet = images.permute(0, 2, 1, 3).reshape(len(rows) * side, INSTANCES * side)
    picture = Image.fromarray(255 - sheet.numpy())
    picture.resize((2 * picture.width, 2 * picture.height)).save(path, format="PNG")


def _split(glyphs: Rendered, split: str, split_by: str, seed: int) -> list[int]:
    if split_by == "script":
        wanted = _BY_SCRIPT[split]
        return [i for i, script in enumerate(glyphs.scripts) if script in wanted]
    count = len(glyphs.characters)
    return random_split(count, split, seed, *most_for_training(count))


def _load(root: str | os.PathLike[str] | None, size: int = SIZE) -> Rendered:
    """Read the cached file, or render and cache it; one process at a time."""
    try:
        import filelock  # noqa: F401 - of cache.py
        import fontTools
        import matplotlib
        import PIL
        import platformdirs  # noqa: F401 - of cache.py
        from PIL import features
    except ImportError as error:
        raise ImportError(f'{error}; glyphs need: pip install "l2l-prune[experiments]"') from None
    versions = {
        "format": _FORMAT,
        "seed": _SEED,
        "matplotlib": matplotlib.__version__,
        "pillow": PIL.__version__,
        "freetype": str(features.version("freetype2")),
        "fonttools": fontTools.version,
    }
    if size != SIZE:
        versions["size"] = size
    name = "-".join(str(value) for value in versions.values())
    try:
        path = cache_folder(root) / f"glyphs-{name}.npz"
        with locked(path):
            cached = _read(path, versions, size)
            if cached is None:
                cached = render_glyphs(_SEED, size)
                _write(path, cached, versions)
            return cached
    except OSError as error:
        warnings.warn(
            f"glyphs cannot be cached ({error}); rendering them only for this process",
            stacklevel=3,
        )
        return render_glyphs(_SEED, size)


def _read(path: Path, versions: dict[str, Any], size: int) -> Rendered | None:
    """The cached glyphs, or None if there are none that can be trusted."""
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(part.file_size for part in archive.infolist()) > _LARGEST * (size / SIZE) ** 2:
                raise ValueError("it would take too much memory")
        with np.load(path, allow_pickle=False) as file:
            images = file["images"]
            characters, scripts = file["characters"].tolist(), file["scripts"].tolist()
            made_with = json.loads(str(file["versions"]))
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        warnings.warn(f"{path} is damaged ({error}); rendering it again", stacklevel=4)
        return None
    expected = (len(characters), INSTANCES, size, size)
    known = set().union(*_BY_SCRIPT.values())
    if (
        images.dtype != np.uint8
        or images.shape != expected
        or len(scripts) != len(characters)
        or not set(scripts) <= known
        or made_with != versions
    ):
        warnings.warn(f"{path} has unexpected content; rendering it again", stacklevel=4)
        return None
    return Rendered(images, characters, scripts)


def _write(path: Path, glyphs: Rendered, versions: dict[str, Any]) -> None:
    """Write the file completely or not at all."""
    with replace_file(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            images=glyphs.images,
            characters=np.array(glyphs.characters),
            scripts=np.array(glyphs.scripts),
            versions=np.array(json.dumps(versions)),
        )
