"""Describe the contents of a folder of images, in words and as a contact sheet."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from l2l_prune._basics.files import replace_file
from l2l_prune.fewshot.data.folder import Bar, split_classes
from l2l_prune.fewshot.data.pictures import (
    DamagedPicture,
    need_pillow,
    picture_facts,
    read_picture,
    shown,
)
from l2l_prune.fewshot.data.sources import WHOLE, Source, find_source
from l2l_prune.fewshot.data.splits import SPLITS

_NAMED = 10
_ROWS, _COLUMNS, _TILE, _MARGIN = 40, 8, 64, 140


@dataclass
class Overview:
    """What was found.

    Attributes:
        source: The folder and its layout.
        counts: By split, or by ``""`` without splits, the number of pictures of each class.
        least: Smallest width and height.
        most: Largest width and height.
        grey: Number of grey pictures.
        damaged: Descriptions of some pictures whose header cannot be read.
        damages: The number of all such pictures.
    """

    source: Source
    counts: dict[str, Counter[str]]
    least: tuple[int, int] = (1 << 62, 1 << 62)
    most: tuple[int, int] = (0, 0)
    grey: int = 0
    damaged: list[str] = field(default_factory=list)
    damages: int = 0

    @property
    def one_size(self) -> bool:
        """Whether all pictures have one size."""
        return self.least == self.most

    @property
    def total(self) -> int:
        """Number of pictures, damaged ones included."""
        return sum(counts.total() for counts in self.counts.values())

    def lines(self) -> list[str]:
        """A description, line by line."""
        sizes = [count for counts in self.counts.values() for count in counts.values()]
        smallest = min(
            ((count, name) for counts in self.counts.values() for name, count in counts.items()),
        )
        classes = len({name for counts in self.counts.values() for name in counts})
        found = [
            f"{shown(self.source.root)}: {self.source.layout}, {classes} classes, "
            f"{self.total:,} pictures",
            f"pictures per class: {min(sizes):,} ({shown(smallest[1])}) to {max(sizes):,}",
        ]
        if WHOLE not in self.counts:
            found += [
                f"{split}: {len(counts)} classes, {counts.total():,} pictures"
                for split, counts in self.counts.items()
            ]
        else:
            found.append("no splits: classes are split at random (--split)")
        if self.most != (0, 0):
            size = "{} x {}".format(*self.least)
            if not self.one_size:
                size += " to {} x {}: give --image-size".format(*self.most)
            whole = self.total - self.damages
            kind = {0: "colour", whole: "grey"}.get(self.grey, f"colour, {self.grey:,} grey")
            found.append(f"pixels: {size}; {kind}")
        if self.damages:
            found.append(f"{self.damages} damaged (--skip-damaged leaves them out):")
            found += [f"  {words}" for words in self.damaged]
        return found


def look(root: Path) -> Overview:
    """List a folder, and read the headers of its pictures.

    Args:
        root: A folder that :func:`~l2l_prune.fewshot.data.load_folder` can read.

    Raises:
        ValueError: If it is not such a folder; the message says why.
        OSError: If a file cannot be read.
    """
    need_pillow()
    source = find_source(root)
    survey = source.survey()
    found = Overview(source, survey.counts)
    with Bar(found.total, "looking at pictures") as bar:
        for picture in itertools.chain.from_iterable(p.pictures() for p in source.parts.values()):
            bar.advance()
            try:
                width, height, grey = picture_facts(picture.content, picture.name)
            except DamagedPicture as error:
                found.damages += 1
                if len(found.damaged) < _NAMED:
                    found.damaged.append(str(error))
                continue
            found.least = min(found.least[0], width), min(found.least[1], height)
            found.most = max(found.most[0], width), max(found.most[1], height)
            found.grey += grey
    return found


def contact_sheet(root: Path, path: Path) -> int:
    """Draw the first pictures of each class as a PNG.

    Args:
        root: A folder that :func:`~l2l_prune.fewshot.data.load_folder` can read.
        path: The file to write.

    Returns:
        The number of classes drawn, at most the first 40.

    Raises:
        ValueError: If the folder cannot be used.
        OSError: If a file cannot be read or written.
    """
    from PIL import Image, ImageDraw

    source = find_source(root)
    rows = {name: row for row, name in enumerate(source.survey().classes[:_ROWS])}
    sheet = Image.new("RGB", (_MARGIN + _COLUMNS * _TILE, len(rows) * _TILE), "white")
    draw = ImageDraw.Draw(sheet)
    for name, row in rows.items():
        plain = shown(name).encode("ascii", "replace").decode()  # characters in every font
        draw.text((4, row * _TILE + _TILE // 2 - 6), plain[:20], fill="black")
    drawn: Counter[str] = Counter()
    for picture in itertools.chain.from_iterable(p.pictures() for p in source.parts.values()):
        column = drawn[picture.label]
        if picture.label not in rows or column == _COLUMNS:
            continue
        try:
            pixels = read_picture(picture.content, _TILE - 2, False, picture.name)
        except DamagedPicture:
            continue
        tile = Image.fromarray(pixels.transpose(1, 2, 0))
        sheet.paste(tile, (_MARGIN + column * _TILE + 1, rows[picture.label] * _TILE + 1))
        drawn[picture.label] += 1
        if drawn.total() == len(rows) * _COLUMNS:
            break
    with replace_file(path) as temporary:
        sheet.save(temporary, format="PNG")
    return len(rows)


def split_lines(source: Source, seed: int | None) -> list[str]:
    """The classes of each split, line by line.

    Args:
        source: The folder.
        seed: As ``split_seed`` of :func:`~l2l_prune.fewshot.data.load_folder`.

    Raises:
        ValueError: If splits share a class.
    """
    survey = source.survey()
    given = seed is None and WHOLE not in survey.counts
    names = list(survey.counts) if given else list(SPLITS)
    lines = []
    for split in names:
        classes = [shown(name) for name in split_classes(source, survey, split, seed)]
        more = f" and {len(classes) - _NAMED} more" if len(classes) > _NAMED else ""
        lines.append(f"{split} classes ({len(classes)}): {', '.join(classes[:_NAMED])}{more}")
    return lines
