"""The field's benchmarks through learn2learn's own loaders, decoded once into mapped files."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import numpy as np
    import numpy.typing as npt
except ImportError as error:
    raise ImportError(
        f'{error}; l2l_prune.fewshot.data needs: pip install "l2l-prune[experiments]"'
    ) from None

from l2l_prune._basics.files import replace_file
from l2l_prune.fewshot.data.cache import cache_folder, locked
from l2l_prune.fewshot.data.safe_pickle import safe_loaders

SPLITS = ("train", "validation", "test")
_FORMAT = 1


class Images(NamedTuple):
    """Labelled images.

    Attributes:
        images: uint8 ``[n, C, H, W]``; of benchmarks, mapped from a file: only what is read
            takes memory.
        labels: int64 ``[n]``.
    """

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: which files it needs, and how learn2learn reads them.

    Args:
        size: Height and width of the images, in pixels.
        channels: 1 or 3.
        files: Files or folders of a split, relative to the root, of which all must be there.
        loader: Name of its class in ``learn2learn.vision.datasets``.
        source: Where the files come from, for error messages.
        select: Chooses the examples of a split by their labels, where the files hold all splits.
    """

    size: int
    channels: int
    files: Callable[[str], tuple[str, ...]]
    loader: str
    source: str
    select: Callable[[npt.NDArray[np.int64], str], npt.NDArray[np.bool_]] | None = None


def _short(split: str) -> str:
    return "val" if split == "validation" else split


def _random_characters(labels: npt.NDArray[np.int64], split: str) -> npt.NDArray[np.bool_]:
    """learn2learn's 1100, 100 and 423 of the 1623 characters, drawn once and for all."""
    classes = np.random.default_rng(0).permutation(np.unique(labels))
    first, second = round(len(classes) * 1100 / 1623), round(len(classes) * 1200 / 1623)
    parts = dict(zip(SPLITS, np.split(classes, [first, second]), strict=True))
    return np.isin(labels, parts[split])


class _SortedOmniglot:
    """FullOmniglot in the order of its names: torchvision's is the file system's."""

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
    ),
    "fc100": Benchmark(
        size=32,
        channels=3,
        files=lambda split: (f"FC100_{_short(split)}.pickle",),
        loader="FC100",
        source=_ZENODO,
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
        select=_random_characters,
    ),
}


def check_benchmark(name: str, split: str, root: Path) -> None:
    """Make sure that the files of a split are there.

    Raises:
        FileNotFoundError: If one is missing; says which, where it was sought and its source.
        ValueError: If learn2learn left half a copy behind that it would trust.
    """
    for file in _missing(name, split, root):
        raise FileNotFoundError(
            f"{name} needs {file}, which is not in {root}; it comes from "
            f"{BENCHMARKS[name].source} (--download, or download=True, fetches it)"
        )
    if name == "cifar-fs":
        _check_cifar_copy(root, split)


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
        FileNotFoundError: If a file is missing, also after the download.
        ValueError: If a file is broken.
        ImportError: If learn2learn is missing.
    """
    data = _downloaded(name, split, root) if download else None
    check_benchmark(name, split, root)
    key = _fingerprint(name, split, root)  # of the files that are there now
    place = cache_folder() / f"{name}-{split}-{key}"
    with locked(place):
        decoded = _mapped(name, place)
        if decoded is None:
            _decode(name, split, root, place, data)
            decoded = _mapped(name, place)
    if decoded is None:
        raise ValueError(f"{place}.npy cannot be read back: is the disk in order?")
    return decoded


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
                f"the download did not bring {file} to {root}: delete what is there of {name} "
                f"and try again, or fetch it from {BENCHMARKS[name].source}"
            )
    return data


def _mapped(name: str, place: Path) -> Images | None:
    """What an earlier call decoded, or ``None`` if it is not there or not whole."""
    files = place.with_suffix(".npy"), place.with_suffix(".labels.npy")
    if not all(file.exists() for file in files):
        return None
    try:
        # Copy-on-write: torch wants writable memory, the file must not change.
        images = np.load(files[0], mmap_mode="c")
        labels = np.array(np.load(files[1], mmap_mode="r"))
    except (ValueError, EOFError) as error:
        warnings.warn(f"{place}.npy is damaged ({error}); decoding it again", stacklevel=4)
        return None
    benchmark = BENCHMARKS[name]
    shape = (len(labels), benchmark.channels, benchmark.size, benchmark.size)
    if images.shape != shape or images.dtype != np.uint8 or labels.dtype != np.int64:
        warnings.warn(f"{place}.npy is not what it should be; decoding it again", stacklevel=4)
        return None
    return Images(torch.from_numpy(images), torch.from_numpy(labels))


def _decode(name: str, split: str, root: Path, place: Path, data: Any) -> None:
    """Write the mapped files of a split, from learn2learn's data set if it is open already."""
    benchmark = BENCHMARKS[name]
    with _telling(name, split, root):
        if data is None:
            data = _open(name, split, root, download=False)
        labels = np.asarray([int(label) for label in _labels(data)], dtype=np.int64)
        if benchmark.select is not None:
            chosen = np.flatnonzero(benchmark.select(labels, split))
        else:
            chosen = np.arange(len(labels))
        shape = (len(chosen), benchmark.channels, benchmark.size, benchmark.size)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        # Not through a mapped file: a full disk would end the process by a signal.
        with replace_file(place.with_suffix(".npy")) as temporary, temporary.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call]
            with safe_loaders():
                for index in chosen.tolist():
                    file.write(_pixels(data[index][0], shape[1:]))
    with replace_file(place.with_suffix(".labels.npy")) as temporary:
        with temporary.open("wb") as file:
            np.save(file, labels[chosen])


@contextmanager
def _telling(name: str, split: str, root: Path) -> Iterator[None]:
    """Errors of reading in it name the files and say where to fetch them again."""
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
    """Labels without decoding the images: every loader holds them."""
    name = next(name for name in ("y", "labels", "targets") if hasattr(data, name))
    labels, images = getattr(data, name), getattr(data, "images", data)
    if not len(labels) == len(images) == len(data) > 0:
        raise ValueError(f"{len(labels)} labels for {len(images)} images")
    return labels


def _pixels(image: Any, shape: tuple[int, ...]) -> bytes:
    """uint8 ``[C, H, W]`` of a PIL image or of a tensor in 0 .. 255."""
    if isinstance(image, Tensor):
        pixels = np.asarray(image.to(torch.uint8))
    else:
        pixels = np.asarray(image.convert("RGB"), dtype=np.uint8).transpose(2, 0, 1)
    if pixels.shape != shape:
        raise ValueError(f"an image is {pixels.shape}, not {shape}")
    return pixels.tobytes()


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
    """learn2learn copies the classes of each split once and trusts what it finds later."""
    copy = root / "cifarfs" / "processed"
    if not copy.exists():
        return
    listed = root / f"cifarfs/cifar100/splits/bertinetto/{_short(split)}.txt"
    for name in listed.read_text().split():
        source = root / "cifarfs" / "cifar100" / "data" / name
        target = copy / _short(split) / name
        if not target.is_dir() or len(list(target.iterdir())) != len(list(source.iterdir())):
            raise ValueError(
                f"{copy} is half a copy (its {_short(split)}/{name} is not complete): delete "
                f"{copy}, learn2learn will make it again"
            )
