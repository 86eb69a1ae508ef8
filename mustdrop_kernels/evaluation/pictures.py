# SPDX-License-Identifier: Apache-2.0
"""Pictures of the questions: framed handwritten digits on photographs, from files in the wheels of scikit-learn and
scikit-image. Nothing is downloaded.

A picture has 4x4 cells. Some hold a box: a colored frame, pale inside, around a digit. Digits and photographs of
the three splits are disjoint. (The digits' writers are not: scikit-learn does not say who wrote which.)
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

SIZE, PATCH, CELLS = 336, 14, 4
CELL = SIZE // CELLS  # pixels
GRID = SIZE // PATCH  # patches
BOXES = (6, 12)  # per picture, both included
_BOX = (30, 40)  # pixels, both included
_FRAME = 5
_BILINEAR = Image.Resampling.BILINEAR
_CONTRAST = (0.25, 0.7)

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 225),
    "yellow": (245, 225, 40),
    "orange": (250, 140, 20),
    "purple": (130, 40, 170),
    "pink": (250, 130, 195),
    "cyan": (40, 210, 225),
    "brown": (120, 70, 30),
    "black": (15, 15, 15),
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_PHOTOGRAPHS: dict[Split, tuple[str, ...]] = {
    "train": (
        "skimage/data/astronaut.png",
        "skimage/data/brick.png",
        "skimage/data/camera.png",
        "skimage/data/clock_motion.png",
        "skimage/data/coins.png",
        "skimage/data/grass.png",
        "skimage/data/hubble_deep_field.jpg",
        "skimage/data/ihc.png",
        "skimage/data/moon.png",
        "skimage/data/motorcycle_left.png",
        "skimage/data/retina.jpg",
        "sklearn/datasets/images/china.jpg",
    ),
    "validation": ("skimage/data/cell.png", "skimage/data/chelsea.png", "skimage/data/gravel.png"),
    "test": ("skimage/data/coffee.png", "skimage/data/rocket.jpg", "sklearn/datasets/images/flower.jpg"),
}
_HELD_OUT = {"validation": 180, "test": 360}  # digits; the other 1257 are for training


@dataclass(frozen=True)
class Box:
    """A framed digit."""

    row: int  # of cells, from 0
    column: int
    x: int  # left edge, pixels
    y: int  # upper edge, pixels
    size: int  # edge length, pixels
    colour: str
    digit: str

    def coverage(self) -> np.ndarray:  # (24, 24) float64
        """The fraction of every patch that the box covers."""
        along = [np.clip(np.minimum(_EDGES + PATCH, at + self.size) - np.maximum(_EDGES, at), 0, None) / PATCH
                 for at in (self.y, self.x)]  # fmt: skip
        return np.outer(*along)

    def patches(self) -> np.ndarray:
        """Indices, in raster order, of the patches that the box overlaps."""
        return np.flatnonzero(self.coverage() > 0)


_EDGES = np.arange(GRID) * PATCH


@dataclass(frozen=True)
class Scene:
    """A picture and its contents."""

    pixels: np.ndarray  # (336, 336, 3) uint8
    boxes: tuple[Box, ...]
    photograph: str

    @property
    def image(self) -> Image.Image:
        """The picture for a processor."""
        return Image.fromarray(self.pixels)


def scene(split: Split, seed: int, index: int, boxes: tuple[int, int] = BOXES, tilt: float = 0.0) -> Scene:
    """The picture with this number, which depends on the arguments only.

    Args:
        split: of the digits and photographs.
        seed: of the whole series.
        index: number in the series.
        boxes: least and greatest number of boxes.
        tilt: greatest rotation of the digits in degrees, for variety in training.
    """
    draw = np.random.default_rng((SPLITS.index(split), seed, index))
    pixels, photograph = _background(split, draw)
    count = int(draw.integers(boxes[0], boxes[1] + 1))
    cells = np.sort(draw.permutation(CELLS * CELLS)[:count])
    colours = draw.permutation(len(COLOURS))
    # The first ten frames differ, so that most colours name one box.
    names = [list(COLOURS)[i] for i in (*colours, *draw.integers(0, len(COLOURS), count))][:count]
    placed = []
    for cell, colour in zip(cells.tolist(), names, strict=True):
        size = int(draw.integers(_BOX[0], _BOX[1] + 1))
        row, column = divmod(cell, CELLS)
        x, y = (int(at * CELL + draw.integers(2, CELL - size - 1)) for at in (column, row))
        digit = int(draw.integers(10))
        glyphs = _glyphs(split)[digit]
        box = Box(row, column, x, y, size, colour, DIGITS[digit])
        glyph = glyphs[draw.integers(len(glyphs))]
        if tilt:
            glyph = glyph.resize((32, 32), Image.Resampling.BICUBIC).rotate(draw.uniform(-tilt, tilt), _BILINEAR)
        _paint(pixels, box, glyph, draw)
        placed.append(box)
    return Scene(pixels.round().clip(0, 255).astype(np.uint8), tuple(placed), photograph)


def _background(split: Split, draw: np.random.Generator) -> tuple[np.ndarray, str]:
    name = _PHOTOGRAPHS[split][draw.integers(len(_PHOTOGRAPHS[split]))]
    photograph = _photograph(name)
    side = draw.uniform(0.5, 1.0) * min(photograph.size)
    left, upper = (draw.uniform(0, extent - side) for extent in photograph.size)
    cut = photograph.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(left, upper, left + side, upper + side))
    pixels = np.asarray(cut, dtype=np.float32)
    if draw.random() < 0.5:
        pixels = pixels[:, ::-1]
    level = draw.uniform(90, 165)
    return (pixels - pixels.mean()) * np.float32(draw.uniform(*_CONTRAST)) + np.float32(level), Path(name).name


def _paint(pixels: np.ndarray, box: Box, glyph: Image.Image, draw: np.random.Generator) -> None:
    shade = np.asarray(COLOURS[box.colour]) + draw.integers(-15, 16, 3)
    pixels[box.y : box.y + box.size, box.x : box.x + box.size] = shade
    inner = box.size - 2 * _FRAME
    ink = np.asarray(glyph.resize((inner, inner), Image.Resampling.BICUBIC), dtype=np.float32)[..., None] / 255
    paper, dark = draw.uniform(220, 250), draw.uniform(0.8, 0.95)
    y, x = box.y + _FRAME, box.x + _FRAME
    pixels[y : y + inner, x : x + inner] = paper * (1 - dark * ink)


@cache
def _photograph(name: str) -> Image.Image:
    package, path = name.split("/", 1)
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed: pip install 'mustdrop_kernels[eval]'")
    with Image.open(Path(found.origin).parent / path) as image:
        return image.convert("RGB")


@cache
def _glyphs(split: Split) -> list[list[Image.Image]]:
    """Images of 8x8 pixels, by digit."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    test, validation = _HELD_OUT["test"], _HELD_OUT["validation"]
    chosen = {"test": order[:test], "validation": order[test : test + validation], "train": order[test + validation :]}
    return [
        [Image.fromarray((data.images[i] * (255 / 16)).astype(np.uint8)) for i in chosen[split] if data.target[i] == d]
        for d in range(10)
    ]
