"""A folder of pictures as one tensor."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from l2l_prune._basics import checks

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def load_pictures(folder: str | os.PathLike[str], size: int = 64, *, grey: bool = False) -> Tensor:
    """All pictures of a folder and its folders, cut to squares about their centres.

    Args:
        folder: Where they are; files that do not end like pictures are passed over.
        size: Pixels of a side, >= 1; larger and smaller pictures are resampled.
        grey: One channel instead of three.

    Returns:
        uint8 ``[n, C, size, size]``, in the order of the files' names.

    Raises:
        FileNotFoundError: If there is no such folder, or no picture in it.
        ImportError: If Pillow is missing.
        ValueError: If a picture cannot be read; the file is named.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError(f'{error}; pictures need: pip install "l2l-prune[experiments]"') from None
    checks.whole_number("size", size, least=1)
    checks.true_or_false("grey", grey)
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in _ENDINGS)
    if not paths:
        raise FileNotFoundError(f"there are no pictures ({', '.join(_ENDINGS)}) under {folder}")
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
