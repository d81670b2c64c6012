"""How glyph images are made: characters of matplotlib's fonts, each face jittered."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

INSTANCES = 20
SIZE = 28
_CANVAS = 4 * SIZE  # supersampled
_INK = 80  # longer side of a glyph's ink box on the canvas
_FONT_SIZE = 72
_LEAST_FACES = 12
_LEAST_INK = 0.3  # of the font size: drops blanks, dots, commas and accents
_LEAST_DISTINCT = 10  # faces that differ in pixels: rarer symbols have few
_NEAR_DUPLICATE = 0.93
_SAMPLED = 2 * SIZE  # grid on which the jittered canvas is sampled
_FAMILIES = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral")
_COMPARED = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf")
_SCRIPTS = ("latin", "greek", "cyrillic", "armenian", "georgian")
_LEFT_OUT = {"MODIFIER", "COMBINING", "BOX", "QUADRANT", "SUPERSCRIPT", "SUBSCRIPT", "VULGAR"}

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Rendered:
    """All glyphs.

    Args:
        images: uint8 ``[classes, INSTANCES, SIZE, SIZE]``, ink 255 on 0.
        characters: The character of each class.
        scripts: Its script: ``latin``, ``greek``, ``cyrillic``, ``armenian``, ``georgian`` or
            ``symbol``.
    """

    images: Bytes
    characters: list[str]
    scripts: list[str]


def render_glyphs(seed: int = 0) -> Rendered:
    """Draw every class; the same versions of Pillow, matplotlib and torch give the same bytes.

    Args:
        seed: Seed of the jitter.

    Returns:
        About 600 classes in code-point order within each script.
    """
    fonts = _fonts()
    rich = []
    drawn: dict[str, Bytes] = {}
    for character, script in _candidates(fonts):
        faces = [font for font, covered in fonts.values() if ord(character) in covered]
        distinct = _distinct(_draw(font, character) for font in faces)
        if len(distinct) >= _LEAST_DISTINCT:
            drawn[character] = np.stack(distinct)
            rich.append((character, script))
    kept = _without_near_duplicates(rich, drawn)
    generator = torch.Generator().manual_seed(seed)
    images = []
    for character, _ in kept:
        faces_of_instances = np.arange(INSTANCES) % len(drawn[character])
        images.append(_jitter(torch.from_numpy(drawn[character][faces_of_instances]), generator))
    return Rendered(
        torch.stack(images).numpy(), [c for c, _ in kept], [script for _, script in kept]
    )


def font_folder() -> Path:
    """Where matplotlib keeps its fonts."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def _fonts() -> dict[str, tuple[Any, set[int]]]:
    """The 16 faces with the code points that each covers, by file name."""
    from fontTools.ttLib import TTFont
    from PIL import ImageFont

    fonts = {}
    for path in sorted(font_folder().glob("*.ttf")):
        if path.name.startswith(_FAMILIES) and "Display" not in path.name:
            with TTFont(path) as font:
                covered = set(font.getBestCmap())
            fonts[path.name] = (ImageFont.truetype(str(path), _FONT_SIZE), covered)
    return fonts


def _candidates(fonts: dict[str, tuple[Any, set[int]]]) -> list[tuple[str, str]]:
    """``(character, script)`` of all that enough faces draw, Latin before its look-alikes."""
    found: list[tuple[str, str]] = []
    compared = [fonts[face][1] for face in _COMPARED]
    for point in sorted(set.intersection(*compared)):
        character = chr(point)
        if sum(point in covered for _, covered in fonts.values()) < _LEAST_FACES:
            continue
        first = unicodedata.name(character, "?").split()[0]
        category = unicodedata.category(character)
        if first.lower() in _SCRIPTS and category in ("Lu", "Ll", "Lo"):
            found.append((character, first.lower()))
        elif category in ("Nd", "Sm", "So", "Sc") and first not in _LEFT_OUT:
            found.append((character, "symbol"))
    order = (*_SCRIPTS, "symbol")
    return sorted(found, key=lambda entry: order.index(entry[1]))


def _draw(font: Any, character: str) -> Bytes:
    """A character with its ink box centred and scaled to the canvas; all 0 if too little ink."""
    from PIL import Image, ImageDraw

    page = Image.new("L", (3 * _FONT_SIZE, 3 * _FONT_SIZE))
    ImageDraw.Draw(page).text((_FONT_SIZE, _FONT_SIZE), character, fill=255, font=font)
    box = page.getbbox()
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    if box is not None and max(box[2] - box[0], box[3] - box[1]) >= _LEAST_INK * _FONT_SIZE:
        ink = page.crop(box)
        scale = _INK / max(ink.size)
        width, height = (max(1, round(side * scale)) for side in ink.size)
        ink = ink.resize((width, height), Image.Resampling.BILINEAR)
        canvas.paste(ink, ((_CANVAS - width) // 2, (_CANVAS - height) // 2))
    return np.asarray(canvas)


def _without_near_duplicates(
    candidates: list[tuple[str, str]], drawn: dict[str, Bytes]
) -> list[tuple[str, str]]:
    """Drop what looks like an earlier character: blurred faces, mean cosine over three of them."""
    faces = np.stack([drawn[c][[0, 4, -1]] for c, _ in candidates])
    blurred = F.avg_pool2d(torch.from_numpy(faces).float(), 17, stride=4, padding=8)
    vectors = F.normalize(blurred.flatten(2), dim=2)
    similarity = torch.einsum("afp,bfp->ab", vectors, vectors) / vectors.shape[1]
    kept: list[int] = []
    for number in range(len(candidates)):
        if not kept or float(similarity[number, kept].max()) <= _NEAR_DUPLICATE:
            kept.append(number)
    return [candidates[number] for number in kept]


def _distinct(drawings: Iterable[Bytes]) -> list[Bytes]:
    """Drawings with ink that differ in pixels from all earlier ones (many faces share some)."""
    by_pixels = {drawing.tobytes(): drawing for drawing in drawings if drawing.any()}
    return list(by_pixels.values())


def _jitter(faces: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, shear, scale, shift, bend and sometimes thicken uint8 ``[n, canvas, canvas]``."""

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    n = len(faces)
    angle = torch.deg2rad(uniform(n, low=-12, high=12))
    shear = uniform(n, low=-0.15, high=0.15)
    scale = 1 / uniform(n, low=0.8, high=1.08)  # of the sampling grid: larger means smaller ink
    shift = uniform(n, 2, low=-0.1, high=0.1)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = [torch.stack([cosine, shear - sine, shift[:, 0]], 1)]
    rows.append(torch.stack([sine, cosine, shift[:, 1]], 1))
    grid = F.affine_grid(torch.stack(rows, 1), [n, 1, _SAMPLED, _SAMPLED], align_corners=False)
    mesh = 0.05 * torch.randn(n, 2, 4, 4, generator=generator)
    bend = F.interpolate(mesh, size=(_SAMPLED, _SAMPLED), mode="bicubic", align_corners=True)
    thick = torch.rand(n, generator=generator) < 0.25
    images = faces[:, None].float()
    images[thick] = F.max_pool2d(images[thick], 5, stride=1, padding=2)
    images = F.grid_sample(images, grid + bend.permute(0, 2, 3, 1), align_corners=False)
    small = F.avg_pool2d(images, _SAMPLED // SIZE)
    return small.round().clamp(0, 255).to(torch.uint8)[:, 0]
