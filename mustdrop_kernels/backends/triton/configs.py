# SPDX-License-Identifier: Apache-2.0
"""Shipped tile sizes of every kernel, by architecture and shape class. Nothing is tuned at run time by default.

``DEFAULT`` serves every architecture, ``SPECIAL`` replaces some of its entries. ``make check-triton`` compiles all of
them for every architecture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Config:
    """Tile sizes of one launch."""

    tiles: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2

    def __getattr__(self, name: str) -> int:
        for tile, size in self.tiles:
            if tile == name:
                return size
        raise AttributeError(name)


def _tiles(num_warps: int = 4, num_stages: int = 2, **tiles: int) -> Config:
    return Config(tuple(tiles.items()), num_warps, num_stages)


DEFAULT: dict[str, dict[str, Config]] = {
    # Copies: 16 bytes per thread and load, several loads in flight.
    "gather": {
        "column": _tiles(ROWS=512, COLUMNS=1),
        "narrow": _tiles(ROWS=32, COLUMNS=64),
        "wide": _tiles(ROWS=4, COLUMNS=1024),
    },
    # One program per stream; a tile is loaded before it is stored.
    "compact": {
        "column": _tiles(ROWS=256, COLUMNS=1),
        "narrow": _tiles(ROWS=64, COLUMNS=64),
        "wide": _tiles(ROWS=64, COLUMNS=128),
    },
    # One program per window: members by channels.
    "merge_rows": {"any": _tiles(ELEMENTS=16384, num_warps=8)},
    "merge_rank": {"any": _tiles(BLOCK=64)},
    # One program per image.
    "merge_plan": {
        "256": _tiles(BLOCK=256, num_warps=2),
        "1024": _tiles(BLOCK=1024),
        "4096": _tiles(BLOCK=1024),
        "long": _tiles(BLOCK=2048, num_warps=8),
    },
    # One program per tile of keys of one head; or of all heads.
    "cls_scores": {"any": _tiles(ROWS=64, COLUMNS=128)},
    "cls_mean": {"any": _tiles(ROWS=128)},
    # Keys by rows of the head mean; COLUMNS is the share of head_dim that a matrix product takes at a time.
    "scores": {
        "half": _tiles(KEYS=64, ROWS=32, COLUMNS=128),
        "float": _tiles(KEYS=32, ROWS=32, COLUMNS=64),
    },
    "scores_lse": {
        "half": _tiles(KEYS=64, ROWS=64, COLUMNS=128),
        "float": _tiles(KEYS=32, ROWS=32, COLUMNS=64),
    },
    "scores_reduce": {"any": _tiles(KEYS=32, ROWS=32)},
    "scores_rows": {
        "256": _tiles(BLOCK=256, num_warps=2),
        "1024": _tiles(BLOCK=1024),
        "4096": _tiles(BLOCK=2048, num_warps=8),
        "long": _tiles(BLOCK=2048, num_warps=8),
    },
    # One program per sequence.
    "select": {
        "256": _tiles(BLOCK=256, num_warps=2),
        "1024": _tiles(BLOCK=1024),
        "4096": _tiles(BLOCK=4096, num_warps=8),
        "long": _tiles(BLOCK=4096, num_warps=16),
    },
}

Key = tuple[str, str, str]  # architecture, kernel, shape class

# Half of head_dim at a time where a tile of the table above exceeds the registers (`make check-triton` reports it).
# RDNA 3 has no matrix instruction for float32: smaller tiles still, and no prefetch.
SPECIAL: dict[Key, Config] = {
    ("sm80", "scores", "half"): _tiles(KEYS=32, ROWS=32, COLUMNS=64),
    ("sm80", "scores_lse", "half"): _tiles(KEYS=64, ROWS=64, COLUMNS=64),
    ("sm100", "scores", "half"): _tiles(KEYS=64, ROWS=32, COLUMNS=64),
    ("sm120", "scores", "half"): _tiles(KEYS=32, ROWS=32, COLUMNS=64),
    ("gfx1100", "scores", "half"): _tiles(KEYS=64, ROWS=32, COLUMNS=64),
    ("gfx1100", "scores", "float"): _tiles(KEYS=16, ROWS=16, COLUMNS=32, num_stages=1),
    ("gfx1100", "scores_lse", "half"): _tiles(KEYS=64, ROWS=32, COLUMNS=64),
    ("gfx1100", "scores_lse", "float"): _tiles(KEYS=16, ROWS=16, COLUMNS=32, num_stages=1),
}

# Candidates of MUSTDROP_AUTOTUNE=1 besides the shipped entry, and its results.
CANDIDATES: dict[str, tuple[Config, ...]] = {
    "gather": tuple(_tiles(ROWS=r, COLUMNS=c) for r, c in ((1, 1024), (2, 2048), (8, 512), (16, 256))),
    "select": tuple(_tiles(BLOCK=b, num_warps=w) for b, w in ((512, 4), (2048, 8), (4096, 16), (16384, 16))),
    "cls_scores": tuple(_tiles(ROWS=r, COLUMNS=128, num_warps=w) for r, w in ((32, 4), (128, 4), (128, 8))),
    "merge_rows": tuple(_tiles(ELEMENTS=e, num_warps=w) for e, w in ((4096, 4), (8192, 4), (8192, 8))),
    "scores": tuple(
        _tiles(KEYS=k, ROWS=r, COLUMNS=c, num_warps=w, num_stages=s)
        for k, r, c, w in ((32, 32, 128, 4), (64, 16, 128, 4), (64, 32, 64, 4), (64, 64, 128, 8), (128, 32, 128, 8))
        for s in (2, 3)
    ),
    "scores_lse": tuple(
        _tiles(KEYS=k, ROWS=r, COLUMNS=128, num_warps=w, num_stages=s)
        for k, r, w in ((64, 32, 4), (128, 16, 4), (128, 64, 8))
        for s in (2, 3)
    ),
}
TUNED: dict[Key, Config] = {}
SEEN: set[Key] = set()  # every entry that was looked up


def width_class(width: int) -> str:
    """Shape class of kernels that copy rows of ``width`` elements."""
    return "column" if width == 1 else "narrow" if width <= 64 else "wide"


def length_class(length: int) -> str:
    """Shape class of kernels that process a whole sequence in one program."""
    for most in (256, 1024, 4096):
        if length <= most:
            return str(most)
    return "long"


def head_class(dtype: torch.dtype, dim: int) -> str:
    """Shape class of kernels that multiply matrices."""
    return "float" if dtype == torch.float32 else "half"


@lru_cache(None)
def processors(device: torch.device) -> int:
    """Number of programs that fill the device."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache(None)
def architecture(device: torch.device) -> str:
    """Architecture name: "sm90", "gfx942"; "cpu" in the interpreter."""
    if device.type != "cuda":
        return device.type
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm{properties.major}{properties.minor}"


def shipped(key: Key) -> Config:
    """Entry of the shipped tables."""
    return SPECIAL.get(key) or DEFAULT[key[1]][key[2]]


def config(kernel: str, shape_class: str, device: torch.device) -> Config:
    """The configuration to use: the tuned one for this device, else the shipped one."""
    key = (architecture(device), kernel, shape_class)
    SEEN.add(key)
    return TUNED.get(key) or shipped(key)
