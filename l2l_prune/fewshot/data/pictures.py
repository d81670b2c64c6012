"""Pictures as arrays: the only place where image files are decoded."""

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
from l2l_prune.fewshot.data.splits import check_split, most_for_training, random_split

if TYPE_CHECKING:
    from PIL import Image as PILImage

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_MOST_PIXELS = 100_000_000  # 300 MB, when decoded in colour
_GREY = ("1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N")


class Picture(NamedTuple):
    """A picture that has not been read yet.

    Attributes:
        name: Its location, for messages.
        label: Its class.
        content: Its path, or the bytes of its file.
    """

    name: str
    label: str
    content: str | bytes


class DamagedPicture(ValueError):
    """A file that is not a picture, or an incomplete one; the message names it."""


def is_picture(name: str) -> bool:
    """Whether a file name ends like a picture's, and is not hidden."""
    return os.path.splitext(name)[1].lower() in ENDINGS and not name.startswith(".")


def read_picture(
    content: str | os.PathLike[str] | bytes,
    size: int | None = None,
    grey: bool | None = None,
    name: str | None = None,
) -> npt.NDArray[np.uint8]:
    """Decode one picture: the first frame, rotated by its EXIF orientation, on a white background.

    Args:
        content: A path, or the bytes of a file.
        size: Crop it to a centred square and resample that to this many pixels a side; unchanged by
            default.
        grey: Whether to read one channel or three; by default one if the picture has no colour.
        name: Its name in messages; the path by default.

    Returns:
        uint8 ``[C, H, W]``.

    Raises:
        DamagedPicture: If it cannot be decoded; the message names it.
        OSError: If the file cannot be opened.
        ImportError: If Pillow is missing.
    """
    from PIL import Image, ImageOps

    called = shown(content if isinstance(content, (str, os.PathLike)) else "a picture")
    called = called if name is None else name
    with _opened(content, called) as picture:
        plain = _eight_bits(ImageOps.exif_transpose(picture), picture.format)
        one = _is_grey(plain) if grey is None else grey
        plain = plain.convert("L" if one else "RGB")
        if size is not None:
            plain = ImageOps.fit(plain, (size, size), Image.Resampling.BICUBIC)
        pixels = np.asarray(plain, dtype=np.uint8)
    return pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)


def picture_facts(content: str | bytes, name: str) -> tuple[int, int, bool]:
    """Width, height and whether it is grey, from the header of the file.

    Raises:
        DamagedPicture: If it has none; the message names the file.
        OSError: If the file cannot be opened.
    """
    with _opened(content, name) as picture:
        width, height = picture.size
        if picture.getexif().get(0x0112, 1) >= 5:  # rotated by 90 degrees
            width, height = height, width
        return width, height, _is_grey(picture)


def _is_grey(picture: PILImage.Image) -> bool:
    """Whether it has no colour, by its mode or by its palette."""
    if picture.mode in ("P", "PA"):
        colours = np.reshape(picture.getpalette("RGB") or [], (-1, 3))
        return bool((colours == colours[:, :1]).all())
    return picture.mode in _GREY


@contextmanager
def _opened(content: str | os.PathLike[str] | bytes, called: str) -> Iterator[PILImage.Image]:
    """The picture, not decoded yet; every error inside names it."""
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
            raise DamagedPicture(f"{called} cannot be read as a picture: unknown format") from error
        except Exception as error:  # decoders raise errors of many kinds
            raise DamagedPicture(f"{called} cannot be read as a picture: {error}") from error


def _eight_bits(picture: PILImage.Image, made_as: str | None) -> PILImage.Image:
    """Keep the upper eight of 16 bits (Pillow would clip), and remove transparency."""
    from PIL import Image

    if picture.mode.startswith("I;16") or (picture.mode == "I" and made_as == "PNG"):
        return Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError("its values do not have 8 or 16 bits")
    if picture.has_transparency_data:
        kind = "LA" if _is_grey(picture) else "RGBA"
        ground = Image.new(kind, picture.size, "white")
        return Image.alpha_composite(ground.convert("RGBA"), picture.convert("RGBA")).convert(
            kind[:-1]
        )
    return picture


def shown(name: str | os.PathLike[str]) -> str:
    """A path as text for any terminal; bytes that are not UTF-8 become backslash escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def note_file(digest: Any, path: str | os.PathLike[str], name: str) -> tuple[int, int]:
    """Update a hash with a file's name, size and time, by which a change is noticed.

    Returns:
        What tells the file from all others, whatever links lead to it: device and inode.
    """
    state = os.stat(path)
    digest.update(os.fsencode(name) + f"\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return state.st_dev, state.st_ino


def picture_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The picture files under a folder, by their suffixes, in the order of their names.

    Hidden files and folders are left out: thumbnails would be the same pictures again.

    Raises:
        FileNotFoundError: If the folder does not exist, or has no pictures.
    """
    paths = sorted(
        path
        for path in Path(folder).rglob("*")
        if is_picture(path.name)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not path.is_dir()
    )
    if not Path(folder).exists():
        raise FileNotFoundError(f"there is no folder {folder}")
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
    """All pictures of a folder and its subfolders, cropped to centred squares.

    Args:
        folder: The folder; files without a picture's suffix are ignored.
        size: Side in pixels, >= 1; larger and smaller pictures are resampled.
        grey: Read one channel instead of three.
        split: Only the pictures of ``"train"`` (60%), ``"validation"`` (15%) or ``"test"`` (25%),
            drawn by ``seed``; all by default.
        seed: Seed of that draw.

    Returns:
        uint8 ``[n, C, size, size]``, in the order of the files' names.

    Raises:
        FileNotFoundError: If the folder does not exist, or has no pictures.
        ImportError: If Pillow is missing.
        ValueError: If a picture cannot be read (the message names the file), ``split`` is unknown,
            or there are too few pictures for it.
    """
    need_pillow()
    checks.whole_number("size", size, least=1)
    checks.true_or_false("grey", grey)
    if split is not None:
        check_split(split)
    paths = picture_files(folder)
    if split is not None:
        chosen = random_split(len(paths), split, seed, *most_for_training(len(paths)))
        if not chosen:
            raise ValueError(
                f"{len(paths)} pictures under {folder} leave none for {split}: add more pictures"
            )
        paths = [paths[number] for number in chosen]
    return torch.stack([torch.from_numpy(_owned(read_picture(p, size, grey))) for p in paths])


def _owned(pixels: npt.NDArray[np.uint8]) -> Any:
    return np.array(pixels)  # a copy: torch warns about read-only memory


def need_pillow() -> None:
    """Check that Pillow is installed.

    Raises:
        ImportError: If it is missing; the message says what to install.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{error}; pictures need: pip install "l2l-prune[experiments]"') from None
