"""Your own images: decoded once into a mapped file, split by class."""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from l2l_prune._basics import checks
from l2l_prune._basics.cores import usable_cores
from l2l_prune._basics.files import replace_file
from l2l_prune.fewshot.data.cache import Images, cache_folder, mapped_images, write_images
from l2l_prune.fewshot.data.pictures import (
    DamagedPicture,
    Picture,
    need_pillow,
    read_picture,
    shown,
)
from l2l_prune.fewshot.data.sources import WHOLE, Source, Survey, find_source
from l2l_prune.fewshot.data.splits import check_split, random_split

_FORMAT = 1
_BATCH = 16  # pictures that a thread takes at once
_NAMED = 10  # files or classes that a message names


def load_folder(
    root: str | os.PathLike[str],
    split: str,
    *,
    image_size: int | None = None,
    grey: bool | None = None,
    split_seed: int | None = None,
    skip_damaged: bool = False,
    least_images: int = 1,
) -> Images:
    """One split of your own images.

    The folder holds one of these: class folders with pictures; ``train``, ``val`` and ``test`` with
    class folders in them; ``train.csv``, ``val.csv`` and ``test.csv`` with lines ``filename,label``
    next to a folder ``images``; or parquet or arrow files with the columns ``image`` and ``label``.
    The first call decodes all pictures into a file in the user's cache folder (set
    ``L2L_PRUNE_CACHE`` to choose another); later calls map that file, until a name, size or time of
    the pictures changes.

    Args:
        root: The folder.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        image_size: Side in pixels: pictures are cropped to centred squares and resampled. Without
            it, all pictures must have the same size, which is kept.
        grey: Whether to read one channel or three; by default one if no picture has colour.
        split_seed: Seed that splits the classes at random: half to train, a quarter to validation,
            the rest to test. By default the folder's own split, or seed 0 if it has none.
        skip_damaged: Leave out pictures that cannot be read, with a warning.
        least_images: Pictures that each class of the split must have, >= 1.

    Returns:
        Images and labels; a label is the place of its class in :func:`folder_classes`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the folder is not as above, pictures are damaged or of several sizes, splits
            share a class, or a class or split is too small; the message names the culprits.
        OSError: If a file cannot be read.
        ImportError: If Pillow, or for tables pyarrow, is missing.
    """
    return load_source(
        find_source(root),
        split,
        image_size=image_size,
        grey=grey,
        split_seed=split_seed,
        skip_damaged=skip_damaged,
        least_images=least_images,
    )


def has_own_splits(root: str | os.PathLike[str]) -> bool:
    """Whether a folder says which of its classes are for training and which for test.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If it holds nothing usable.
    """
    return WHOLE not in find_source(root).parts


def folder_classes(root: str | os.PathLike[str]) -> list[str]:
    """The names of all classes of a folder, in numerical order if all are numbers, else by name.

    Raises:
        ValueError: If the folder is not one that :func:`load_folder` can read.
        OSError: If it cannot be read.
    """
    return find_source(root).survey().classes


def load_source(
    source: Source,
    split: str,
    *,
    image_size: int | None = None,
    grey: bool | None = None,
    split_seed: int | None = None,
    skip_damaged: bool = False,
    least_images: int = 1,
    numbered_anew: bool = False,
) -> Images:
    """:func:`load_folder` for a source that has already been found.

    ``numbered_anew`` says that each split counts its classes from 0, so that splits may share
    numbers.
    """
    need_pillow()
    check_split(split)
    if image_size is not None:
        checks.whole_number("image_size", image_size, least=1)
    if split_seed is not None:
        checks.whole_number("split_seed", split_seed)
    checks.whole_number("least_images", least_images, least=1)
    checks.true_or_false("skip_damaged", skip_damaged)
    if grey is not None:
        checks.true_or_false("grey", grey)
    survey = source.survey()
    chosen = split_classes(source, survey, split, split_seed, numbered_anew)
    _check_counts(source, survey, split, chosen, least_images)
    options = (_FORMAT, str(source.root.resolve()), survey.key, image_size, grey, skip_damaged)
    key = hashlib.sha256(os.fsencode(repr(options))).hexdigest()[:16]
    place = cache_folder() / f"folder-{key}"
    everything = mapped_images(
        place,
        lambda: _decode(source, survey, place, image_size, grey, skip_damaged),
        complete=lambda: _about(place) is not None,
    )
    about = _about(place)
    assert about is not None  # it is complete
    if about["damaged"]:
        warnings.warn(f"left out: {about['damaged']}", stacklevel=3)
        _check_left(source, survey, everything.labels, chosen, least_images)
    if split_seed is None and WHOLE not in source.parts:
        start, stop = about["rows"][split]
        return Images(everything.images[start:stop], everything.labels[start:stop])
    return _some_rows(everything, survey, chosen, f"split{split_seed or 0}-{split}-{key}")


def split_classes(
    source: Source, survey: Survey, split: str, seed: int | None, numbered_anew: bool = False
) -> list[str]:
    """The classes of a split.

    Args:
        source: The folder.
        survey: What is in it.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        seed: Splits the classes at random; by default the folder's own split, or seed 0.
        numbered_anew: Whether splits may share numbers, which mean different classes in each.

    Raises:
        ValueError: If there is no such split, or splits share a class.
    """
    if seed is None and WHOLE not in source.parts:
        if not (numbered_anew and all(name.isdecimal() for name in survey.classes)):
            _check_apart(source, survey)
        if split not in survey.counts:
            raise ValueError(
                f"{shown(source.root)} has no {split} split, only {', '.join(survey.counts)}: give "
                "a split seed (--split) to split all of its classes at random"
            )
        return sorted(survey.counts[split], key=survey.classes.index)
    classes = survey.classes
    count = len(classes)
    return [classes[i] for i in random_split(count, split, seed or 0, count // 2, count // 4)]


def _check_apart(source: Source, survey: Survey) -> None:
    for one, other in itertools.combinations(survey.counts, 2):
        if both := [name for name in survey.counts[one] if name in survey.counts[other]]:
            raise ValueError(
                f"{one} and {other} of {shown(source.root)} share {_some(both, 'class')}: few-shot "
                "splits must not share classes; if equal names mean equal classes, give a split "
                "seed (--split) to split all classes at random"
            )


def _check_counts(
    source: Source, survey: Survey, split: str, chosen: list[str], least: int
) -> None:
    if len(chosen) < 2:
        raise ValueError(
            f"{split} of {shown(source.root)} has {len(chosen)} of its {len(survey.classes)} "
            "classes, but a task needs at least 2"
        )
    counts = sum(survey.counts.values(), collections.Counter())
    _check_sizes(source, {name: counts[name] for name in chosen}, least)


def _check_left(
    source: Source, survey: Survey, labels: Tensor, chosen: list[str], least: int
) -> None:
    left = labels.bincount(minlength=len(survey.classes)).tolist()
    counts = dict(zip(survey.classes, left, strict=True))
    _check_sizes(source, {name: counts[name] for name in chosen}, least)


def _check_sizes(source: Source, counts: dict[str, int], least: int) -> None:
    if few := [f"{name} ({count})" for name, count in counts.items() if count < least]:
        raise ValueError(
            f"tasks need {least} images per class, but {shown(source.root)} has fewer for "
            f"{_some(few, 'class')}: remove them, or ask for fewer shots or queries"
        )


def _some(names: list[str], kind: str) -> str:
    plural = {"class": "classes"}.get(kind, f"{kind}s")
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    what = kind if len(names) == 1 else f"{len(names)} {plural}"
    return f"{what}: {', '.join(shown(name[:80]) for name in names[:_NAMED])}{more}"


def _about(place: Path) -> dict[str, Any] | None:
    """What :func:`_decode` wrote beside the images, if it is there."""
    try:
        return cast(dict[str, Any], json.loads(place.with_suffix(".json").read_text()))
    except (FileNotFoundError, ValueError):
        return None


def _some_rows(everything: Images, survey: Survey, chosen: list[str], name: str) -> Images:
    """The images of some classes, also in a mapped file, since they might not fit in memory."""
    place = cache_folder() / f"folder-{name}"

    def write() -> None:
        numbers = {name: number for number, name in enumerate(survey.classes)}
        wanted = torch.tensor([numbers[name] for name in chosen], device="cpu")
        rows = torch.isin(everything.labels, wanted).nonzero().flatten().tolist()
        pixels, labels = everything.images.numpy(), everything.labels.numpy()
        write_images(place, ((pixels[row], int(labels[row])) for row in rows))

    return mapped_images(place, write)


class _Colour(Exception):
    """The first picture with colour was found."""


def _decode(
    source: Source, survey: Survey, place: Path, size: int | None, grey: bool | None, skip: bool
) -> None:
    for channels in (grey, False):  # again, in colour, if not all pictures are grey
        decoding = _Decoding(source, survey, size, channels, skip)
        try:
            write_images(place, decoding.images())
        except _Colour:
            continue
        break
    about = {"rows": decoding.rows, "damaged": decoding.told()}
    with replace_file(place.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(about))


@dataclass
class _Decoding:
    """One pass over the pictures of a source."""

    source: Source
    survey: Survey
    size: int | None
    grey: bool | None
    skip: bool
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)  # the first few
    damages: int = 0

    def images(self) -> Iterator[tuple[npt.NDArray[np.uint8], int]]:
        """Pixels and labels of all pictures, split after split.

        Raises:
            ValueError: If a picture is damaged or of another size; the message names some of the
                damaged ones.
        """
        index = {name: i for i, name in enumerate(self.survey.classes)}
        total = sum(counts.total() for counts in self.survey.counts.values())
        first, written = None, 0
        with Bar(total) as bar:
            for split, part in self.source.parts.items():
                start = written
                for picture, pixels in _in_threads(part.pictures(), self.size, self.grey):
                    bar.advance()
                    if picture.label not in index:
                        raise ValueError(f"{shown(self.source.root)} changed while it was read")
                    if isinstance(pixels, DamagedPicture):
                        self.damages += 1
                        if len(self.damaged) < _NAMED:
                            self.damaged.append(str(pixels))
                        continue
                    if self.grey is None and len(pixels) == 3:
                        raise _Colour
                    if self.damages and not self.skip:
                        continue  # the rest is read only to name what else is damaged
                    if first is None:
                        first = pixels.shape, picture.name
                    if pixels.shape != first[0]:
                        raise ValueError(
                            f"{picture.name} has {_by(pixels)} pixels, but {first[1]} has "
                            f"{first[0][2]} x {first[0][1]}: give image_size (--image-size)"
                        )
                    written += 1
                    yield pixels, index[picture.label]
                self.rows[split] = (start, written)
        if self.damages and not (self.skip and written):
            raise ValueError(
                f"{self.told()}; repair or remove them, or leave them out with skip_damaged "
                "(--skip-damaged)"
            )
        if written + self.damages != total:
            raise ValueError(f"{shown(self.source.root)} changed while it was read")

    def told(self) -> str:
        """A description of the damaged pictures; empty if there are none."""
        more = self.damages - len(self.damaged)
        named = "; ".join(self.damaged) + (f"; and {more} more" if more else "")
        return f"{self.damages} damaged: {named}" if self.damages else ""


def _by(pixels: npt.NDArray[np.uint8]) -> str:
    return f"{pixels.shape[2]} x {pixels.shape[1]}"


_Result = tuple[Picture, "npt.NDArray[np.uint8] | DamagedPicture"]


def _in_threads(
    pictures: Iterable[Picture], size: int | None, grey: bool | None
) -> Iterator[_Result]:
    """Decode in order, a few batches ahead: Pillow lets other threads run in the meantime."""
    threads = usable_cores()
    pictures = iter(pictures)
    waiting: collections.deque[Future[list[_Result]]] = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                batch = list(itertools.islice(pictures, _BATCH))
                if batch:
                    waiting.append(pool.submit(_read, batch, size, grey))
                if not waiting:
                    return
                if not batch or len(waiting) > 2 * threads:
                    yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _read(batch: list[Picture], size: int | None, grey: bool | None) -> list[_Result]:
    results: list[_Result] = []
    for picture in batch:
        try:
            pixels = read_picture(picture.content, size, grey, picture.name)
            results.append((picture, pixels))
        except DamagedPicture as error:
            results.append((picture, error))
    return results


class Bar:
    """A progress bar from rich, shown only on a terminal.

    Args:
        total: Number of steps.
        words: What the steps do.
    """

    def __init__(self, total: int, words: str = "decoding pictures") -> None:
        from rich.console import Console
        from rich.progress import Progress

        terminal = sys.stderr.isatty()
        self._progress = Progress(
            console=Console(stderr=True), transient=True, disable=not terminal
        )
        self._task = self._progress.add_task(words, total=total)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def advance(self) -> None:
        """One step is done."""
        self._progress.advance(self._task)
