# SPDX-License-Identifier: Apache-2.0
"""Training of the vision tower: every patch predicts its digit, color and cell, the CLS token the image's contents.

Curriculum: windows of a few patches, then mosaics of more and more windows at their positions, then the whole image.
Attention to a box's other patches is learned from few tokens at low cost.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F
from loop import Stage
from model import tower
from torch import nn

from mustdrop_kernels.evaluation.pictures import CELLS, COLOURS, DIGITS, GRID, PATCH, Scene, scene

NONE = 10  # label of a patch without a box, for digits and colors
IGNORED = -100
_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
_DEVIATION = torch.tensor([0.26862954, 0.26130258, 0.27577711])
_CELL = GRID // CELLS  # patches
_COVERED = 0.4  # minimum coverage of a patch by a box; patches with less are ignored


@dataclass(frozen=True)
class Windows(Stage):
    """Stage in which a sample consists of windows into `group` cells of an image."""

    group: int = 16
    window: int = 6  # patches along an edge; 6 is the whole cell
    boxes: tuple[int, int] = (10, 16)
    tilt: float = 0.0  # degrees


RECIPE = [
    Windows("single windows", 1100, 8, 2e-3, group=1, window=4, final=0.5),
    Windows("pairs", 350, 8, 1.5e-3, group=2, window=4, final=0.5),
    Windows("fours", 350, 8, 1.2e-3, group=4, window=4, final=0.5),
    Windows("quarters", 250, 5, 1e-3, group=4, window=6, final=0.5),
    Windows("sixteens", 500, 6, 1.5e-3, window=4, final=0.5, tilt=10.0),
    Windows("pictures", 262, 4, 1e-3, final=0.75, boxes=(6, 16), tilt=10.0),
    Windows("pairs again", 1200, 8, 1.5e-3, group=2, window=4, final=0.1, tilt=10.0),
    Windows("pictures again", 400, 4, 8e-4, final=0.02, boxes=(6, 16), tilt=10.0),
]


def patches(pixels: np.ndarray) -> torch.Tensor:  # (336, 336, 3) uint8 -> (576, 588) float32
    """Inputs of the patch embedding's convolution, a row per patch, normalized as in CLIP's processor."""
    x = torch.from_numpy(pixels).float().div_(255).sub_(_MEAN).div_(_DEVIATION)
    return x.view(GRID, PATCH, GRID, PATCH, 3).permute(0, 2, 4, 1, 3).reshape(GRID * GRID, -1)


def labels(seen: Scene) -> torch.Tensor:  # (3, 576) int64
    """Digit, color and cell of every patch."""
    found = np.full((3, GRID, GRID), NONE)
    for box in seen.boxes:
        share = box.coverage()
        for kind, value in enumerate((DIGITS.index(box.digit), list(COLOURS).index(box.colour))):
            found[kind][share > 0] = IGNORED
            found[kind][share >= _COVERED] = value
    place = np.arange(GRID) // _CELL
    found[2] = place[:, None] * CELLS + place
    return torch.from_numpy(found.reshape(3, -1))


def encode(vision: nn.Module, x: torch.Tensor, at: torch.Tensor, last: bool = True) -> list[torch.Tensor]:
    """All hidden states [samples, 1 + T, width] of some of an image's patches.

    Args:
        vision: the CLIP tower.
        x: patches, [samples, T, 588].
        at: their indices in the image, [samples, T].
        last: whether to run the last layer.
    """
    embed = vision.embeddings
    hidden = F.linear(x, embed.patch_embedding.weight.flatten(1)) + embed.position_embedding.weight[1 + at]
    first = embed.class_embedding + embed.position_embedding.weight[0]
    hidden = torch.cat([first.expand(len(x), 1, -1), hidden], dim=1)
    states = [vision.pre_layrnorm(hidden)]
    for layer in vision.encoder.layers[: None if last else -1]:
        states.append(layer(states[-1], attention_mask=None))
    return states


class Heads(nn.Module):
    """Linear probes, discarded after training."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.patch = nn.Linear(width, 2 * (NONE + 1) + CELLS * CELLS)
        self.cls = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 20)) for _ in range(2))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits of digit, color, cell."""
        return self.patch(self.norm(hidden)).split([NONE + 1, NONE + 1, CELLS * CELLS], dim=-1)


class TowerTask:
    """Training task of the vision tower."""

    name = "tower"

    def __init__(self, model: nn.Module, seed: int, stages: list[Windows], validation: int = 24):
        self.vision, self.seed, self.stages = tower(model), seed, stages
        self.module = nn.ModuleDict({"tower": self.vision, "heads": Heads(self.vision.config.hidden_size)})
        self.validation = [scene("validation", seed, i) for i in range(validation)]

    def trained(self) -> Iterable[nn.Parameter]:
        """All parameters."""
        return self.module.parameters()

    def loss(self, stage: Windows, first: int, done: float) -> torch.Tensor:
        """Cross entropy of the patches, and of the contents that CLS predicts."""
        seen = [scene("train", self.seed, first + i, stage.boxes, stage.tilt) for i in range(stage.pictures)]
        draw = np.random.default_rng((self.seed, first, 2))
        x, at, y = sample(seen, stage.group, stage.window, draw)
        states = encode(self.vision, x, at)
        return self._patches(states[-2][:, 1:], y) + 0.5 * self._present(states, y)

    def _patches(self, hidden: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        terms = zip(self.module["heads"](hidden), y.unbind(1), (1.0, 1.0, 0.3), strict=True)
        total = hidden.new_zeros(())
        for logits, label, weight in terms:
            on_box = y[:, 0] < NONE
            # Most patches are background: boxes and background get equal weight.
            each = F.cross_entropy(logits.transpose(1, 2), label, ignore_index=IGNORED, reduction="none")
            asked = label != IGNORED
            for group in (on_box & asked, ~on_box & asked):
                total = total + weight * (each * group).sum() / group.sum().clamp(min=1) * 0.5
        return total

    def _present(self, states: list[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
        there = torch.cat([(y[:, kind, :, None] == torch.arange(10)).any(1) for kind in (0, 1)], dim=1).float()
        heads = self.module["heads"].cls
        losses = [F.binary_cross_entropy_with_logits(heads[i](states[i - 2][:, 0]), there) for i in (0, 1)]
        return losses[0] + losses[1]

    def validate(self) -> dict[str, float]:
        """Accuracies over the patches of whole images."""
        right = torch.zeros(5)
        asked = torch.zeros(5)
        for seen in self.validation:
            x, at, y = sample([seen], CELLS * CELLS, _CELL, np.random.default_rng(0))
            logits = self.module["heads"](encode(self.vision, x, at, last=False)[-1][:, 1:])
            found = [each.argmax(-1) for each in logits]
            on_box = (y[:, 0] < NONE) & (y[:, 0] != IGNORED)
            off_box = y[:, 0] == NONE
            for i, (kind, where) in enumerate(((0, on_box), (1, on_box), (2, on_box), (0, off_box))):
                right[i] += (found[kind] == y[:, kind])[where].sum()
                asked[i] += where.sum()
            for box in seen.boxes:  # a box's digit by majority vote of its patches
                mine = torch.from_numpy(box.coverage().reshape(-1) >= _COVERED)[at[0]]
                right[4] += logits[0][0, mine, :NONE].sum(0).argmax() == DIGITS.index(box.digit)
                asked[4] += 1
        names = ("digit", "colour", "cell", "background", "box_digit")
        return dict(zip(names, (right / asked).tolist(), strict=True))


def sample(
    scenes: list[Scene], group: int, window: int, draw: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Patches [S, T, 588], their places [S, T], their labels [S, 3, T], with T = group * window ** 2."""
    chosen = []
    for number, seen in zip(count(), scenes):
        places = np.stack([_window(seen, cell, window, draw) for cell in draw.permutation(CELLS * CELLS)])
        chosen.append(np.sort(places.reshape(CELLS * CELLS // group, -1), axis=1) + number * GRID * GRID)
    at = torch.from_numpy(np.concatenate(chosen))
    x = torch.stack([patches(seen.pixels) for seen in scenes]).flatten(0, 1)[at]
    y = torch.stack([labels(seen) for seen in scenes]).transpose(1, 2).flatten(0, 1)[at].transpose(1, 2)
    return x, at % (GRID * GRID), y


def _window(seen: Scene, cell: int, window: int, draw: np.random.Generator) -> np.ndarray:
    """Patch indices of a window in this cell, which contains the whole box of the cell if it fits."""
    row, column = divmod(int(cell), CELLS)
    room = _CELL - window
    offsets = draw.integers(0, room + 1, 2)
    for box in seen.boxes:
        if (box.row, box.column) == (row, column):
            for axis, (at, place) in enumerate(((box.y, row), (box.x, column))):
                begin, end = at // PATCH - place * _CELL, (at + box.size - 1) // PATCH - place * _CELL
                offsets[axis] = draw.integers(max(0, end - window + 1), max(0, min(room, begin)) + 1) if room else 0
    rows, columns = (np.arange(window) + offset for offset in offsets)
    return ((row * _CELL + rows)[:, None] * GRID + column * _CELL + columns).reshape(-1)
