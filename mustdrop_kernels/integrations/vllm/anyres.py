# SPDX-License-Identifier: Apache-2.0
"""Patches shown by the placeholders of a LLaVA-NeXT image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image


def shown_patches(
    size: Sequence[int],  # height and width of the picture
    tiles: int,
    tile_size: int,
    patch_size: int,
    pinpoints: Sequence[Sequence[int]],
) -> Tensor:  # (placeholders) int64
    """The patches of all tiles, numbered tile by tile; -1 at the end of each row of the picture.

    The overview tile comes first, then the grid of the others, row by row, without the bars that the processor added
    to fill the tiles.
    """
    side = tile_size // patch_size
    patches = torch.arange(tiles * side * side, device="cpu")
    end = patches.new_full((1,), -1)
    if tiles == 1:
        return torch.cat([patches, end])
    rows, columns = get_anyres_image_grid_shape(size, pinpoints, tile_size)
    whole, grid = patches.view(tiles, side, side).split([1, tiles - 1])
    picture = grid[: rows * columns].view(rows, columns, side, side).transpose(1, 2)
    picture = unpad_image(picture.reshape(1, rows * side, columns * side), size)[0]
    return torch.cat([whole.flatten(), torch.nn.functional.pad(picture, (0, 1), value=-1).flatten()])
