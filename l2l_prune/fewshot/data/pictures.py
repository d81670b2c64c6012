"""A folder of pictures as one tensor."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from l2l_prune._basics import checks
from l2l_prune.fewshot.data.glyphs import RANDOM_SPLITS, random_split

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def picture_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The files under a folder that end like pictures, in the order of their names.

    Raises:
        FileNotFoundError: If there is no such folder, or no picture in it.
    """
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in _ENDINGS)
    if not paths:
        raise FileNotFoundError(f"there are no pictures ({', '.join(_ENDINGS)}) under {folder}")
    return paths


def load_pictures(
    folder: str | os.PathLike[str],
    size: int = 64,
    *,
    grey: bool = False,
    split: str | None = None,
    seed: int = 0,
) -> Tensor:
    """All pictures of a folder and its folders, cut to squares about their centres.

    Args:
        folder: Where they are; files that do not end like pictures are passed over.
        size: Pixels of a side, >= 1; larger and smaller pictures are resampled.
        grey: One channel instead of three.
        split: Only the pictures to train on (``"train"``, 60%), for ``"validation"`` (15%) or
            ``"test"`` (25%), drawn by ``seed``; all by default.
        seed: Seed of that draw.

    Returns:
        uint8 ``[n, C, size, size]``, in the order of the files' names.

    Raises:
        FileNotFoundError: If there is no such folder, or no picture in it.
        ImportError: If Pillow is missing.
        ValueError: If a picture cannot be read, and the file is named; if ``split`` is unknown, or
            has no picture of so few.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError(f'{error}; pictures need: pip install "l2l-prune[experiments]"') from None
    checks.whole_number("size", size, least=1)
    checks.true_or_false("grey", grey)
    if split is not None and split not in RANDOM_SPLITS:
        raise ValueError(f"split must be one of {', '.join(RANDOM_SPLITS)}, got {split!r}")
    paths = picture_files(folder)
    if split is not None:
        chosen = random_split(len(paths), split, seed)
        if not chosen:
            raise ValueError(f"{len(paths)} pictures under {folder} leave none for {split}")
        paths = [paths[number] for number in chosen]
    pictures = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                upright = ImageOps.exif_transpose(picture).convert("L" if grey else "RGB")
                square = ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC)
        except OSError as error:
            raise ValueError(f"{path} cannot be read as a picture: {error}") from error
        raw = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
        pictures.append(raw.view(size, size, -1).permute(2, 0, 1))
    return torch.stack(pictures)
