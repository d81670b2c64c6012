"""Pictures as arrays: the one place where image files are decoded."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from l2l_prune._basics import checks
from l2l_prune.fewshot.data.glyphs import RANDOM_SPLITS, random_split

if TYPE_CHECKING:
    from PIL import Image as PILImage

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_MOST_PIXELS = 100_000_000  # decoded, a colour picture of that many takes 300 MB
_GREY = ("1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N")


class Picture(NamedTuple):
    """A picture before it is read.

    Attributes:
        name: Where it is, for messages.
        label: Its class.
        content: Its path, or the bytes of its file.
    """

    name: str
    label: str
    content: str | bytes


class DamagedPicture(ValueError):
    """A file that is no picture, or not all of one; the message names it."""


def is_picture(name: str) -> bool:
    """Whether a file is called like a picture."""
    return os.path.splitext(name)[1].lower() in ENDINGS


def read_picture(
    content: str | os.PathLike[str] | bytes,
    size: int | None = None,
    grey: bool | None = None,
    name: str | None = None,
) -> npt.NDArray[np.uint8]:
    """Decode one picture: turned as its EXIF note says, transparency on white, the first frame.

    Args:
        content: A path, or the bytes of a file.
        size: Cut it to a square about its centre and resample that to so many pixels a side; as it
            is without it.
        grey: One channel, or three; without it one for pictures without colour.
        name: What messages call it; the path by default.

    Returns:
        uint8 ``[C, H, W]``.

    Raises:
        DamagedPicture: If it cannot be decoded; names it.
        OSError: If the file cannot be opened.
        ImportError: If Pillow is missing.
    """
    from PIL import Image, ImageOps

    called = shown(content if isinstance(content, (str, os.PathLike)) else "a picture")
    called = called if name is None else name
    with _opened(content, called) as picture:
        plain = _eight_bits(ImageOps.exif_transpose(picture))
        one = plain.mode in _GREY if grey is None else grey
        plain = plain.convert("L" if one else "RGB")
        if size is not None:
            plain = ImageOps.fit(plain, (size, size), Image.Resampling.BICUBIC)
        pixels = np.asarray(plain, dtype=np.uint8)
    return pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)


def picture_facts(content: str | bytes, name: str) -> tuple[int, int, bool]:
    """Width, height and whether it is grey, from the head of the file.

    Raises:
        DamagedPicture: If it has none; names it.
        OSError: If the file cannot be opened.
    """
    with _opened(content, name) as picture:
        width, height = picture.size
        if picture.getexif().get(0x0112, 1) >= 5:  # turned by a quarter
            width, height = height, width
        return width, height, picture.mode in _GREY


@contextmanager
def _opened(content: str | os.PathLike[str] | bytes, called: str) -> Iterator[PILImage.Image]:
    """The picture, not decoded yet; every error within is told by its name."""
    from PIL import Image, UnidentifiedImageError

    with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
        try:
            picture = Image.open(file)
            if picture.width * picture.height > _MOST_PIXELS:
                raise ValueError(
                    f"{picture.width} x {picture.height} pixels are more than {_MOST_PIXELS:,}"
                )
            yield picture
        except MemoryError:
            raise
        except UnidentifiedImageError as error:
            raise DamagedPicture(
                f"{called} cannot be read as a picture: no known format"
            ) from error
        except Exception as error:  # decoders raise what they like
            raise DamagedPicture(f"{called} cannot be read as a picture: {error}") from error


def _eight_bits(picture: PILImage.Image) -> PILImage.Image:
    """Of 16 bits the upper eight (Pillow would clip), and no transparency."""
    from PIL import Image

    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
        return Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError("its values are not of 8 or 16 bits")
    if picture.has_transparency_data:
        kind = "LA" if picture.mode in _GREY else "RGBA"
        ground = Image.new(kind, picture.size, "white")
        return Image.alpha_composite(ground.convert("RGBA"), picture.convert("RGBA")).convert(
            kind[:-1]
        )
    return picture


def shown(name: str | os.PathLike[str]) -> str:
    """A path as text that any terminal takes; bytes that are no UTF-8 as backslash and number."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def picture_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The files under a folder that end like pictures, in the order of their names.

    Raises:
        FileNotFoundError: If there is no such folder, or no picture in it.
    """
    paths = sorted(path for path in Path(folder).rglob("*") if is_picture(path.name))
    if not paths:
        raise FileNotFoundError(f"there are no pictures ({', '.join(ENDINGS)}) under {folder}")
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
    need_pillow()
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
    return torch.stack([torch.from_numpy(_owned(read_picture(p, size, grey))) for p in paths])


def _owned(pixels: npt.NDArray[np.uint8]) -> Any:
    return np.array(pixels)  # torch warns of memory that it must not write


def need_pillow() -> None:
    """Say what to install.

    Raises:
        ImportError: If Pillow is missing.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{error}; pictures need: pip install "l2l-prune[experiments]"') from None
