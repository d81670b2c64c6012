"""Standard benchmarks, read by learn2learn's own loaders and decoded once into mapped files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from l2l_prune.fewshot.data.cache import Images, cache_folder, locked, mapped_images, write_images
from l2l_prune.fewshot.data.safe_pickle import safe_loaders
from l2l_prune.fewshot.data.splits import SPLITS

_FORMAT = 1


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: which files it needs, and how learn2learn reads them.

    Args:
        size: Height and width of the images, in pixels.
        channels: 1 or 3.
        files: Files or folders of a split, relative to the root; all must exist.
        loader: Name of its class in ``learn2learn.vision.datasets``.
        source: Where the files come from, for error messages.
        classes: Numbers of classes in train, validation and test.
        select: Chooses the examples of a split by their labels, if the files hold all splits.
    """

    size: int
    channels: int
    files: Callable[[str], tuple[str, ...]]
    loader: str
    source: str
    classes: tuple[int, int, int]
    select: Callable[[npt.NDArray[np.int64], str], npt.NDArray[np.bool_]] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of an image, ``(C, H, W)``."""
        return self.channels, self.size, self.size


def _short(split: str) -> str:
    return "val" if split == "validation" else split


def _random_characters(labels: npt.NDArray[np.int64], split: str) -> npt.NDArray[np.bool_]:
    """learn2learn's 1100, 100 and 423 of the 1623 characters, drawn once and for all."""
    classes = np.random.default_rng(0).permutation(np.unique(labels))
    first, second = round(len(classes) * 1100 / 1623), round(len(classes) * 1200 / 1623)
    parts = dict(zip(SPLITS, np.split(classes, [first, second]), strict=True))
    return np.isin(labels, parts[split])


class _SortedOmniglot:
    """FullOmniglot sorted by name: torchvision lists it in the order of the file system."""

    def __init__(self, full: Any) -> None:
        names = [
            f"{part.target_folder}/{part._characters[character]}/{file}"
            for part in full.dataset.datasets
            for file, character in part._flat_character_images
        ]
        self._full = full
        self._order = np.argsort(names)
        characters = [str(Path(name).parent) for name in names]
        _, inverse = np.unique(characters, return_inverse=True)
        self.labels = inverse[self._order]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Any:
        return self._full[int(self._order[index])]


def _open(name: str, split: str, root: Path, download: bool) -> Any:
    """learn2learn's data set of ``(image, label)``."""
    from learn2learn.vision import datasets
    from torchvision import transforms

    loader = getattr(datasets, BENCHMARKS[name].loader)
    if name != "omniglot":
        with safe_loaders():
            return loader(str(root), mode=split, download=download)
    steps = [transforms.Resize(28, interpolation=transforms.InterpolationMode.LANCZOS)]
    ink = transforms.Compose([*steps, transforms.PILToTensor(), lambda image: 255 - image])
    return _SortedOmniglot(loader(str(root), transform=ink, download=download))


_ZENODO = "Zenodo record 7978538, which learn2learn downloads"

BENCHMARKS = {
    "mini-imagenet": Benchmark(
        size=84,
        channels=3,
        files=lambda split: (f"mini-imagenet-cache-{split}.pkl",),
        loader="MiniImagenet",
        source=_ZENODO,
        classes=(64, 16, 20),
    ),
    "tiered-imagenet": Benchmark(
        size=84,
        channels=3,
        files=lambda split: (
            f"tiered-imagenet/{_short(split)}_images_png.pkl",
            f"tiered-imagenet/{_short(split)}_labels.pkl",
        ),
        loader="TieredImagenet",
        source=_ZENODO,
        classes=(351, 97, 160),
    ),
    "cifar-fs": Benchmark(
        size=32,
        channels=3,
        files=lambda split: (
            "cifarfs/cifar100/data",
            f"cifarfs/cifar100/splits/bertinetto/{_short(split)}.txt",
        ),
        loader="CIFARFS",
        source=_ZENODO,
        classes=(64, 16, 20),
    ),
    "fc100": Benchmark(
        size=32,
        channels=3,
        files=lambda split: (f"FC100_{_short(split)}.pickle",),
        loader="FC100",
        source=_ZENODO,
        classes=(60, 20, 20),
    ),
    "omniglot": Benchmark(
        size=28,
        channels=1,
        files=lambda split: (
            "omniglot-py/images_background.zip",
            "omniglot-py/images_background",
            "omniglot-py/images_evaluation.zip",
            "omniglot-py/images_evaluation",
        ),
        loader="FullOmniglot",
        source="github.com/brendenlake/omniglot, which torchvision downloads",
        classes=(1100, 100, 423),
        select=_random_characters,
    ),
}


def check_benchmark(name: str, split: str, root: Path) -> None:
    """Make sure that the files of a split are there.

    Raises:
        FileNotFoundError: If one is missing; the message names it, its folder and its source.
        ValueError: If learn2learn left an incomplete copy behind, which it would use.
    """
    for file in _missing(name, split, root):
        raise FileNotFoundError(
            f"{name} needs {file}, which is not in {root}; it comes from "
            f"{BENCHMARKS[name].source} (--download, or download=True, fetches it). Or put the "
            f"splits there, or in its folder {name}, as train*.parquet, validation*.parquet and "
            "test*.parquet (or .arrow) with the columns image and label"
        )
    if name == "cifar-fs":
        _check_cifar_copy(root, split)


def has_benchmark(name: str, split: str, root: Path) -> bool:
    """Whether learn2learn's files of a split are all there."""
    return not _missing(name, split, root)


def _missing(name: str, split: str, root: Path) -> list[str]:
    return [file for file in BENCHMARKS[name].files(split) if not (root / file).exists()]


def load_benchmark(name: str, split: str, root: Path, *, download: bool = False) -> Images:
    """Load a split through learn2learn, or from the mapped file that an earlier call made.

    Args:
        name: A key of :data:`BENCHMARKS`.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        root: Folder of the files, as learn2learn's loaders take it.
        download: Let learn2learn download what is missing.

    Raises:
        FileNotFoundError: If a file is missing, even after the download.
        ValueError: If a file is broken.
        ImportError: If learn2learn is missing.
    """
    data = _downloaded(name, split, root) if download else None
    check_benchmark(name, split, root)
    key = _fingerprint(name, split, root)  # of the files as they are now
    place = cache_folder() / f"{name}-{split}-{key}"
    return mapped_images(
        place, lambda: _decode(name, split, root, place, data), shape=BENCHMARKS[name].shape
    )


def _downloaded(name: str, split: str, root: Path) -> Any:
    """learn2learn's data set, if it had to fetch files for it; else ``None``."""
    folder = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    with locked(cache_folder() / f"{name}-download-{folder}"):
        if not _missing(name, split, root):
            return None
        with _telling(name, split, root):
            data = _open(name, split, root, download=True)
        for file in _missing(name, split, root):
            raise FileNotFoundError(
                f"the download did not bring {file} to {root}: delete the files of {name} there "
                f"and try again, or fetch it from {BENCHMARKS[name].source}"
            )
    return data


def _decode(name: str, split: str, root: Path, place: Path, data: Any) -> None:
    """Write the mapped files of a split, from learn2learn's data set if it is already open."""
    benchmark = BENCHMARKS[name]
    with _telling(name, split, root):
        if data is None:
            data = _open(name, split, root, download=False)
        labels = np.asarray([int(label) for label in _labels(data)], dtype=np.int64)
        if benchmark.select is not None:
            chosen = np.flatnonzero(benchmark.select(labels, split))
        else:
            chosen = np.arange(len(labels))
        with safe_loaders():
            write_images(
                place,
                (
                    (_pixels(data[index][0], benchmark.shape), int(labels[index]))
                    for index in chosen.tolist()
                ),
            )


@contextmanager
def _telling(name: str, split: str, root: Path) -> Iterator[None]:
    """Inside, errors of reading name the files and say where to fetch them again."""
    benchmark = BENCHMARKS[name]
    files = ", ".join(str(root / file) for file in benchmark.files(split))
    try:
        yield
    except ImportError as error:
        raise ImportError(f'{error}; {name} needs: pip install "l2l-prune[learn2learn]"') from None
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk, not the content
            raise
        raise ValueError(
            f"{name} cannot be read from {files}: {type(error).__name__}: {error}; fetch it again "
            f"from {benchmark.source}"
        ) from error


def _labels(data: Any) -> Any:
    """The labels, which every loader holds, without decoding the images."""
    name = next(name for name in ("y", "labels", "targets") if hasattr(data, name))
    labels, images = getattr(data, name), getattr(data, "images", data)
    if not len(labels) == len(images) == len(data) > 0:
        raise ValueError(f"{len(labels)} labels for {len(images)} images")
    return labels


def _pixels(image: Any, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """uint8 ``[C, H, W]`` of a PIL image or of a tensor in 0 .. 255."""
    if isinstance(image, Tensor):
        pixels = np.asarray(image.to(torch.uint8))
    else:
        pixels = np.asarray(image.convert("RGB"), dtype=np.uint8).transpose(2, 0, 1)
    if pixels.shape != shape:
        raise ValueError(f"an image is {pixels.shape}, not {shape}")
    return pixels


def _fingerprint(name: str, split: str, root: Path) -> str:
    """Changes when a source file does."""
    digest = hashlib.sha256(f"{_FORMAT} {root.resolve()}".encode())
    for file in BENCHMARKS[name].files(split):
        path = root / file
        below = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for part in below:
            if part.exists():
                state = part.stat()
                digest.update(f"{part} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _check_cifar_copy(root: Path, split: str) -> None:
    """learn2learn copies the classes of each split once, and later uses whatever it finds."""
    copy = root / "cifarfs" / "processed"
    if not copy.exists():
        return
    listed = root / f"cifarfs/cifar100/splits/bertinetto/{_short(split)}.txt"
    for name in listed.read_text().split():
        source = root / "cifarfs" / "cifar100" / "data" / name
        target = copy / _short(split) / name
        if not target.is_dir() or len(list(target.iterdir())) != len(list(source.iterdir())):
            raise ValueError(
                f"{copy} is an incomplete copy ({_short(split)}/{name} lacks files): delete it: "
                "learn2learn will make it again"
            )
