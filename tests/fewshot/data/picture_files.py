"""Small folders of pictures whose pixels say which they are."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture(label: int, number: int, size=(8, 8), grey: bool = False) -> np.ndarray:
    """Red says the class, green the picture; the upper left corner is white, below is black."""
    height, width = size
    array = np.zeros((height, width, 3), np.uint8)
    array[..., 0], array[..., 1] = 10 * label, number % 256
    array[0, 0], array[1, 0] = 255, 0
    return array[..., 0] if grey else array


def encoded(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, **{"format": "PNG", **options})
    return buffer.getvalue()


def write(path: Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def write_classes(root: Path, names, each: int = 3, first: int = 0, **options) -> None:
    """``root/name/number.png`` for each name; the labels count from ``first``."""
    for label, name in enumerate(names, first):
        for number in range(each):
            write(root / name / f"{number}.png", picture(label, number, **options))
