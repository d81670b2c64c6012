"""Render glyph images: characters of matplotlib's fonts, with jitter."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
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
_THICKER = 2  # how far thick strokes reach out on the canvas
_OVERSAMPLED = 2  # the jittered canvas is sampled on a grid that is finer by this factor
_FAMILIES = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral")
_COMPARED = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf")
_SCRIPTS = ("latin", "greek", "cyrillic", "armenian", "georgian")
_LEFT_OUT = {"MODIFIER", "COMBINING", "BOX", "QUADRANT", "SUPERSCRIPT", "SUBSCRIPT", "VULGAR"}

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Rendered:
    """All glyphs.

    Args:
        images: uint8 ``[classes, INSTANCES, size, size]``, ink 255 on 0.
        characters: The character of each class.
        scripts: Its script: ``latin``, ``greek``, ``cyrillic``, ``armenian``, ``georgian`` or
            ``symbol``.
    """

    images: Bytes
    characters: list[str]
    scripts: list[str]


def render_glyphs(seed: int = 0, size: int = SIZE) -> Rendered:
    """Draw every class, on any processor alike by the same Pillow, matplotlib and torch.

    Args:
        seed: Seed of the jitter.
        size: Side in pixels. Other sizes show the same characters, faces and jitter.

    Returns:
        About 600 classes in code-point order within each script.
    """
    fonts = _fonts()
    rich = []
    drawn: dict[str, Bytes] = {}
    faces: dict[str, list[str]] = {}
    for character, script in _candidates(fonts):
        covering = [name for name, (_, covered) in fonts.items() if ord(character) in covered]
        distinct = _distinct({name: _draw(fonts[name][0], character) for name in covering})
        if len(distinct) >= _LEAST_DISTINCT:
            drawn[character], faces[character] = np.stack(list(distinct.values())), list(distinct)
            rich.append((character, script))
    kept = _without_near_duplicates(rich, drawn)
    if size != SIZE:
        fonts = _fonts(size)
    generator = torch.Generator().manual_seed(seed)
    images = []
    for character, _ in kept:
        drawings = drawn.pop(character)
        if size != SIZE:
            drawings = np.stack([_draw(fonts[n][0], character, size) for n in faces[character]])
        instances = torch.from_numpy(drawings[np.arange(INSTANCES) % len(drawings)])
        images.append(_jitter(instances, generator, size))
    return Rendered(
        torch.stack(images).numpy(), [c for c, _ in kept], [script for _, script in kept]
    )


def font_folder() -> Path:
    """Where matplotlib keeps its fonts."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def _fonts(size: int = SIZE) -> dict[str, tuple[Any, set[int]]]:
    """The 16 faces with the code points that each covers, by file name."""
    from fontTools.ttLib import TTFont
    from PIL import ImageFont

    fonts = {}
    for path in sorted(font_folder().glob("*.ttf")):
        if path.name.startswith(_FAMILIES) and "Display" not in path.name:
            with TTFont(path) as font:
                covered = set(font.getBestCmap())
            font_size = _scaled(_FONT_SIZE, size)
            fonts[path.name] = (ImageFont.truetype(str(path), font_size), covered)
    return fonts


def _candidates(fonts: dict[str, tuple[Any, set[int]]]) -> list[tuple[str, str]]:
    """``(character, script)`` of all that enough faces cover, Latin before its look-alikes."""
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


def _scaled(length: int, size: int) -> int:
    """Scale a length that was chosen for images of ``SIZE`` to another size."""
    return round(length * size / SIZE)


def _draw(font: Any, character: str, size: int = SIZE) -> Bytes:
    """A character with its ink box centred and scaled to the canvas; all 0 if too little ink."""
    from PIL import Image, ImageDraw

    font_size, side = _scaled(_FONT_SIZE, size), _scaled(_CANVAS, size)
    page = Image.new("L", (3 * font_size, 3 * font_size))
    ImageDraw.Draw(page).text((font_size, font_size), character, fill=255, font=font)
    box = page.getbbox()
    canvas = Image.new("L", (side, side))
    if box is not None and max(box[2] - box[0], box[3] - box[1]) >= _LEAST_INK * font_size:
        ink = page.crop(box)
        scale = _scaled(_INK, size) / max(ink.size)
        width, height = (max(1, round(length * scale)) for length in ink.size)
        ink = ink.resize((width, height), Image.Resampling.BILINEAR)
        canvas.paste(ink, ((side - width) // 2, (side - height) // 2))
    return np.asarray(canvas)


def _without_near_duplicates(
    candidates: list[tuple[str, str]], drawn: dict[str, Bytes]
) -> list[tuple[str, str]]:
    """Drop characters that look like earlier ones: mean cosine over three blurred faces."""
    faces = np.stack([drawn[c][[0, 4, -1]] for c, _ in candidates])
    blurred = F.avg_pool2d(torch.from_numpy(faces).float(), 17, stride=4, padding=8)
    vectors = F.normalize(blurred.flatten(2), dim=2)
    similarity = torch.einsum("afp,bfp->ab", vectors, vectors) / vectors.shape[1]
    kept: list[int] = []
    for number in range(len(candidates)):
        if not kept or float(similarity[number, kept].max()) <= _NEAR_DUPLICATE:
            kept.append(number)
    return [candidates[number] for number in kept]


def _distinct(drawings: Mapping[str, Bytes]) -> dict[str, Bytes]:
    """Drawings with ink that differ in pixels from all others (many faces share some)."""
    by_pixels = {drawing.tobytes(): face for face, drawing in drawings.items() if drawing.any()}
    return {face: drawings[face] for face in by_pixels.values()}


def _affine_grid(matrices: Tensor, side: int) -> Tensor:
    """torch's, without its matrix product, which MKL rounds differently on each processor."""
    along = torch.linspace(-1, 1, side, device="cpu") * (side - 1) / side
    x, y = along[None, None, :], along[None, :, None]
    a, b, c = matrices[..., None, None].unbind(2)  # each [n, 2, 1, 1]
    return (x * a + y * b + c).movedim(1, -1)


def _jitter(faces: Tensor, generator: torch.Generator, size: int = SIZE) -> Tensor:
    """Rotate, shear, scale, shift, bend and sometimes thicken uint8 ``[n, canvas, canvas]``."""

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, device="cpu")

    n, sampled = len(faces), _OVERSAMPLED * size
    angle = torch.deg2rad(uniform(n, low=-12, high=12))
    shear = uniform(n, low=-0.15, high=0.15)
    scale = 1 / uniform(n, low=0.8, high=1.08)  # of the sampling grid: larger means smaller ink
    shift = uniform(n, 2, low=-0.1, high=0.1)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = [torch.stack([cosine, shear - sine, shift[:, 0]], 1)]
    rows.append(torch.stack([sine, cosine, shift[:, 1]], 1))
    grid = _affine_grid(torch.stack(rows, 1), sampled)
    mesh = 0.05 * torch.randn(n, 2, 4, 4, generator=generator, device="cpu")
    bend = F.interpolate(mesh, size=(sampled, sampled), mode="bicubic", align_corners=True)
    thick = torch.rand(n, generator=generator, device="cpu") < 0.25
    images = faces[:, None].float()
    reach = _scaled(_THICKER, size)
    images[thick] = F.max_pool2d(images[thick], 2 * reach + 1, stride=1, padding=reach)
    images = F.grid_sample(images, grid + bend.permute(0, 2, 3, 1), align_corners=False)
    small = F.avg_pool2d(images, _OVERSAMPLED)
    return small.round().clamp(0, 255).to(torch.uint8)[:, 0]
