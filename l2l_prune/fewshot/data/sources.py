"""The contents of a folder of images: class folders, CSV lists or tables, listed as a stream.

A folder may hold millions of files: all that is kept of one is its place on the disk, so that no
picture counts twice, in whatever splits and classes and by whatever links.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from l2l_prune.fewshot.data.pictures import ENDINGS, Picture, is_picture, note_file, shown
from l2l_prune.fewshot.data.tables import TABLES, Table

WHOLE = ""
"""The part of a source that has no splits of its own."""

_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
_IN_NAME = re.compile(rf"(?<![a-z0-9])({'|'.join(_SPLITS)})(?![a-z0-9])")
_LAYOUTS = (
    "class/picture.png, train/class/picture.png (val, test), train.csv (val, test) with "
    "filename,label next to a folder images, or train-*.parquet (val, test) with the columns image "
    "and label"
)


Seen = dict[tuple[int, int], str]
"""Where each file was met first, by device and inode."""


class Part(Protocol):
    """A split, or the whole of a source without splits."""

    def survey(self, digest: Any, seen: Seen) -> Counter[str]:
        """Number of pictures in each class; names, sizes and times update ``digest``.

        Raises:
            ValueError: If a file is in ``seen``, to which all are added, or cannot be used.
        """

    def pictures(self) -> Iterator[Picture]:
        """All pictures, always in the same order."""


@dataclass
class Survey:
    """What was found, without reading the pictures.

    Attributes:
        counts: By part, the number of pictures of each class.
        key: Changes with names, sizes and times of the files.
    """

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    key: str = ""

    @property
    def classes(self) -> list[str]:
        """Names of all classes, in the order of :func:`sort_classes`."""
        return sort_classes(name for counts in self.counts.values() for name in counts)


def sort_classes(names: Iterable[str]) -> list[str]:
    """Each name once, in numerical order if all are numbers, else by name."""
    found = set(names)
    if all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in found):
        return sorted(found, key=lambda name: (int(name), name))
    return sorted(found, key=os.fsencode)


@dataclass(frozen=True)
class Source:
    """A folder of images.

    Attributes:
        root: The folder.
        layout: What it holds, in words.
        parts: By the name of the split, or :data:`WHOLE` alone.
    """

    root: Path
    layout: str
    parts: dict[str, Part]

    def survey(self) -> Survey:
        """List its pictures.

        Raises:
            ValueError: If there is nothing usable; the message says what is wrong and where.
            OSError: If a file cannot be accessed.
        """
        survey, digest = Survey(), sha256()
        seen: Seen = {}
        for split, part in self.parts.items():
            digest.update(f"{split}\0".encode())
            counts = part.survey(digest, seen)
            if not counts:
                kind = f"{split} pictures" if split else "pictures"
                raise ValueError(f"{shown(self.root)} has no {kind}")
            survey.counts[split] = counts
        survey.key = digest.hexdigest()[:16]
        return survey


def find_source(root: str | os.PathLike[str]) -> Source:
    """Find out how a folder is laid out.

    Args:
        root: The folder.

    Raises:
        FileNotFoundError: If it does not exist.
        NotADirectoryError: If it is a file.
        ValueError: If it holds nothing usable; the message shows the possible layouts.
    """
    folder = Path(root).expanduser()
    if not folder.exists():
        raise FileNotFoundError(f"there is no folder {shown(folder)}")
    if not folder.is_dir():
        raise NotADirectoryError(f"{shown(folder)} is a file, not a folder of images")
    lists = [path for name in _SPLITS if (path := folder / f"{name}.csv").is_file()]
    if lists:
        images = folder / "images" if (folder / "images").is_dir() else folder
        return Source(
            folder, "CSV lists", {split: _List(path, images) for split, path in _each(lists)}
        )
    if tables := find_tables(folder):
        return Source(folder, "tables", dict(tables))
    folders = _folders(folder)
    if folders and all(path.name in _SPLITS for path in folders):
        return Source(
            folder, "split folders", {split: _ClassFolders(path) for split, path in _each(folders)}
        )
    if folders:
        return Source(folder, "class folders", {WHOLE: _ClassFolders(folder)})
    names, _ = _pictures_in(folder)
    what = "pictures, but no class folders" if names else "neither class folders nor pictures"
    raise ValueError(f"{shown(folder)} holds {what}; possible layouts are {_LAYOUTS}")


def _each(paths: list[Path]) -> Iterator[tuple[str, Path]]:
    """The split of each path, train first, no split twice."""
    seen: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: list(_SPLITS).index(path.stem)):
        split = _SPLITS[path.stem]
        if seen.setdefault(split, path) is not path:
            raise ValueError(
                f"{shown(path)} and {shown(seen[split])} are both for {split}: keep one of them"
            )
        yield split, path


def find_tables(folder: Path) -> dict[str, Table]:
    """Parquet and arrow files in a folder, in its folder ``data`` or in split folders.

    Raises:
        ValueError: If only some of the files name a split.
    """
    for place in (folder, folder / "data"):
        found: dict[str, list[Path]] = {}
        below = [place / name for name in _SPLITS if (place / name).is_dir()]
        for path in sorted(p for f in (place, *below) if f.is_dir() for p in _tables_in(f)):
            text = path.stem if path.parent == place else path.parent.name
            names = {_SPLITS[name] for name in _IN_NAME.findall(text.lower().replace("_", "-"))}
            if len(names) > 1:
                raise ValueError(f"{shown(path)} names more than one split")
            found.setdefault(names.pop() if names else WHOLE, []).append(path)
        if len(found) > 1 and WHOLE in found:
            raise ValueError(
                f"{shown(found[WHOLE][0])} names no split (train, val, test), but other files "
                "there do: rename or remove it"
            )
        if found:
            ordered = (split for split in (WHOLE, *_SPLITS) if split in found)
            return {split: Table(tuple(found[split]), folder) for split in ordered}
    return {}


def _tables_in(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            # Hubs' programs keep what they computed from a table beside it, as cache-*.arrow.
            if entry.name.lower().endswith(TABLES) and not entry.name.startswith((".", "cache-")):
                yield folder / entry.name


@dataclass(frozen=True)
class _ClassFolders:
    """``class/picture``."""

    root: Path

    def survey(self, digest: Any, seen: Seen) -> Counter[str]:
        counts: Counter[str] = Counter()
        for folder in _folders(self.root):
            names, others = _pictures_in(folder)
            if not names:
                what = f"no picture among its {others} files" if others else "empty"
                raise ValueError(
                    f"the class folder {shown(folder)} is {what} (pictures end in "
                    f"{', '.join(ENDINGS)}): remove it"
                )
            digest.update(os.fsencode(folder.name) + b"\0")
            where = shown(folder)
            for name in names:
                path = os.path.join(folder, name)
                _note(note_file(digest, path, name), seen, where, shown(path))
            counts[folder.name] = len(names)
        return counts

    def pictures(self) -> Iterator[Picture]:
        for folder in _folders(self.root):
            for name in _pictures_in(folder)[0]:
                path = os.path.join(folder, name)
                yield Picture(shown(path), folder.name, path)


@dataclass(frozen=True)
class _List:
    """Lines ``filename,label`` of a CSV file."""

    file: Path
    images: Path

    def survey(self, digest: Any, seen: Seen) -> Counter[str]:
        counts: Counter[str] = Counter()
        for line, name, label in self._lines():
            path, where = os.path.join(self.images, name), f"{shown(self.file)}, line {line}"
            if not os.path.isfile(path):
                raise FileNotFoundError(f"{where}: there is no file {shown(path)}")
            _note(note_file(digest, path, f"{name}\0{label}"), seen, where, f"{where}: {name}")
            counts[label] += 1
        return counts

    def pictures(self) -> Iterator[Picture]:
        for _, name, label in self._lines():
            path = os.path.join(self.images, name)
            yield Picture(shown(path), label, path)

    def _lines(self) -> Iterator[tuple[int, str, str]]:
        with self.file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file)
            try:
                if not {"filename", "label"} <= set(reader.fieldnames or ()):
                    raise ValueError("its first line must be filename,label")
                for row in reader:
                    name, label = ((row[column] or "").strip() for column in ("filename", "label"))
                    if not name or not label:
                        raise ValueError(f"line {reader.line_num} has no file name or no label")
                    yield reader.line_num, name, label
            except (csv.Error, ValueError) as error:
                raise ValueError(f"{shown(self.file)}: {error}") from None


def _note(place: tuple[int, int], seen: Seen, where: str, what: str) -> None:
    """Add a file that is met at ``where``; refuse one that was met before."""
    if place in seen:
        raise ValueError(
            f"{what} was met before, in {seen[place]}, so that it could be in training and test, "
            "or in the support set and a query, at once: keep one of them"
        )
    seen[place] = where


def _folders(root: Path) -> list[Path]:
    """The folders in a folder, by name; a link back to one of them is refused."""
    with os.scandir(root) as entries:
        names = [e.name for e in entries if not e.name.startswith(".") and e.is_dir()]
    folders = [root / name for name in sorted(names, key=os.fsencode)]
    seen = {_place(root): root}
    for folder in folders:
        other = seen.setdefault(_place(folder), folder)
        if other is not folder:
            raise ValueError(
                f"{shown(folder)} and {shown(other)} are the same folder: remove the link"
            )
    return folders


def _place(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_dev, state.st_ino


def _pictures_in(folder: Path) -> tuple[list[str], int]:
    """Sorted names of the pictures, and how many other files there are."""
    names, others = [], 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if is_picture(entry.name):
                names.append(entry.name)
            elif entry.is_dir():
                raise ValueError(
                    f"{shown(entry.path)} is a folder within a class: pictures must be directly in "
                    f"the folder of their class; possible layouts are {_LAYOUTS}"
                )
            else:
                others += 1
    names.sort(key=os.fsencode)
    return names, others
