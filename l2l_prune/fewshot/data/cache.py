"""The cache of decoded images, which one process at a time writes."""

from __future__ import annotations

import os
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

try:
    import numpy as np
    import numpy.typing as npt
except ImportError as error:
    raise ImportError(
        f'{error}; l2l_prune.fewshot.data needs: pip install "l2l-prune[experiments]"'
    ) from None

from l2l_prune._basics.files import remove_unfinished, replace_file


class Images(NamedTuple):
    """Labelled images.

    Attributes:
        images: uint8 ``[n, C, H, W]``; files are mapped, so that only what is read takes memory.
        labels: int64 ``[n]``.
    """

    images: Tensor
    labels: Tensor


def cache_folder(root: str | os.PathLike[str] | None = None) -> Path:
    """``root``, else ``L2L_PRUNE_CACHE``, else the user's cache folder; created if missing.

    Raises:
        OSError: If it cannot be created.
    """
    import platformdirs

    chosen = root or os.environ.get("L2L_PRUNE_CACHE") or platformdirs.user_cache_dir("l2l_prune")
    folder = Path(chosen)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold ``<path>.lock``, so that two processes do not make the same file."""
    import filelock

    with filelock.FileLock(f"{path}.lock"):
        remove_unfinished(path.parent, path.name)
        yield


def mapped_images(
    place: Path,
    write: Callable[[], None],
    *,
    shape: tuple[int, ...] | None = None,
    complete: Callable[[], bool] = lambda: True,
) -> Images:
    """Map the files that :func:`write_images` wrote, or write them first; one process at a time.

    Args:
        place: Path of the files without their suffixes.
        write: Writes them, if they are missing or damaged.
        shape: ``(C, H, W)`` that the images must have, if it is known.
        complete: Whether what belongs to them is there too; else all is written again.

    Raises:
        ValueError: If they cannot be read back.
    """
    with locked(place):
        images = _map(place, shape) if complete() else None
        if images is None:
            write()
            images = _map(place, shape) if complete() else None
    if images is None:
        raise ValueError(f"{place}.npy cannot be read back: is the disk in order?")
    return images


def write_images(place: Path, images: Iterable[tuple[npt.NDArray[np.uint8], int]]) -> None:
    """Write images and labels one after the other; the files appear complete or not at all.

    Args:
        place: Path of the files without their suffixes.
        images: Images ``[C, H, W]``, all of one shape, each with its label.

    Raises:
        ValueError: If there are none, or an image has another shape than the first.
    """
    labels, shape = array("q"), None
    # Not through a mapped file: a full disk would kill the process with a signal.
    with replace_file(place.with_suffix(".npy")) as temporary, temporary.open("wb") as file:
        for pixels, label in images:
            if shape is None:
                shape = pixels.shape
                start = _write_header(file, (0, *shape))
            if pixels.shape != shape or pixels.dtype != np.uint8:
                raise ValueError(f"an image is {pixels.shape}, not {shape}")
            file.write(pixels.tobytes())
            labels.append(label)
        if shape is None:
            raise ValueError("there are no images")
        file.seek(0)
        if _write_header(file, (len(labels), *shape)) != start:
            raise ValueError("numpy left no room for the number of images: please update it")
    with replace_file(place.with_suffix(".labels.npy")) as temporary, temporary.open("wb") as file:
        np.save(file, np.frombuffer(labels, dtype=np.int64))


def _write_header(file: IO[bytes], shape: tuple[int, ...]) -> int:
    """Return its length, which does not change: numpy leaves room for the first number to grow."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call]
    return file.tell()


def _map(place: Path, shape: tuple[int, ...] | None) -> Images | None:
    """What :func:`write_images` wrote, or ``None`` if it is missing or damaged."""
    files = place.with_suffix(".npy"), place.with_suffix(".labels.npy")
    if not all(file.exists() for file in files):
        return None
    try:
        # Copy-on-write: torch wants writable memory, but the file must not change.
        images = np.load(files[0], mmap_mode="c")
        labels = np.array(np.load(files[1], mmap_mode="r"))
    except (ValueError, EOFError) as error:
        warnings.warn(f"{place}.npy is damaged ({error}); decoding it again", stacklevel=5)
        return None
    expected = (len(labels), *(images.shape[1:] if shape is None else shape))
    right = images.shape == expected and images.ndim == 4
    if not right or images.dtype != np.uint8 or labels.dtype != np.int64:
        warnings.warn(f"{place}.npy has unexpected content; decoding it again", stacklevel=5)
        return None
    return Images(torch.from_numpy(images), torch.from_numpy(labels))
