# SPDX-License-Identifier: Apache-2.0
"""Benchmark shapes: model, pictures, text, kept tokens."""

from __future__ import annotations

import dataclasses
from math import prod


@dataclasses.dataclass(frozen=True)
class Shape:
    """One prompt of one model: text, then vision tokens, then the text queries."""

    name: str
    batch: int = 1
    images: int = 1  # of a sequence
    grid: tuple[int, int] = (24, 24)  # patches of an image
    window: tuple[int, int] = (3, 3)  # merged in stage 1
    channels: int = 1024  # of the vision tower
    vision_heads: int = 16
    text_before: int = 35
    queries: int = 60  # text query rows
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    hidden: int = 4096
    layers: int = 32
    keep: int = 64  # vision tokens that stay

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return prod(self.grid)

    @property
    def vision(self) -> int:
        """Vision tokens of a sequence."""
        return self.images * self.patches

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.text_before + self.vision + self.queries

    @property
    def kept(self) -> int:
        """Tokens of a sequence that stay, text included."""
        return self.text_before + self.keep + self.queries

    @property
    def label(self) -> str:
        """Its name, with the batch where it is not 1; ``parse_shapes`` reads it back."""
        return self.name if self.batch == 1 else f"{self.name}:{self.batch}"


_VIDEO = Shape("video-mha", images=32, text_before=1468, queries=100, keep=1843)

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("llava-1.5"),
        Shape("llava-next", images=5, text_before=20, queries=100, keep=640),
        _VIDEO,
        dataclasses.replace(_VIDEO, name="video-gqa", heads=28, kv_heads=4, hidden=3584, layers=28),
        Shape(
            "tiny", grid=(6, 6), channels=32, vision_heads=2, text_before=3, queries=5, heads=4, kv_heads=2,
            head_dim=16, hidden=32, layers=2, keep=8,
        ),
    )
}  # fmt: skip

DEFAULT = ("llava-1.5", "llava-next")
# One to sixteen pictures, for plots of time over tokens.
SWEEP = tuple(f"images-{n}" for n in (1, 2, 4, 8, 16))


def parse_shape(text: str) -> Shape:
    """A shape from its name: "llava-1.5", "llava-1.5:8" (batch 8), "images-4" (four pictures for LLaVA-1.5).

    Raises:
        ValueError: there is no such shape.
    """
    name, _, batch = text.partition(":")
    if batch and not (batch.isdigit() and int(batch) > 0):
        raise ValueError(f"{text!r}: the batch must be a positive number, as in {name}:8")
    size = int(batch) if batch else 1
    if name in SHAPES:
        return dataclasses.replace(SHAPES[name], batch=size)
    images = name.removeprefix("images-")
    if images != name and images.isdigit() and int(images) > 0:
        return Shape(name, batch=size, images=int(images), keep=64 * int(images))
    raise ValueError(f"there is no shape {name!r}; there are {', '.join(SHAPES)}, images-N, sweep; :B for batch B")


def parse_shapes(text: str) -> list[Shape]:
    """Shapes from comma-separated names; "sweep" stands for one to sixteen pictures."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    wanted = [shape for name in names for shape in (SWEEP if name == "sweep" else (name,))]
    return [parse_shape(name) for name in dict.fromkeys(wanted)]
