# SPDX-License-Identifier: Apache-2.0
"""Placeholders of stage 1."""

from __future__ import annotations

import types

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import engines  # noqa: F401 - sets vLLM's environment
import torch
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.vllm.anyres import shown_patches
from mustdrop_kernels.integrations.vllm.vision import (
    EMPTY,
    KEY_TOKEN,
    TOKEN,
    PlaceholderFlags,
    VisionStage,
    place_tokens,
    split_contents,
)

NO_KEYS = MustDropConfig(merge_budget=1, window=(2, 2), key_rate=0.0)


def merged_tile(patches):
    """A tile of 2 x 4 patches whose most similar window of 2 x 2 has merged: the right one, to token 2."""
    layer = torch.nn.Identity()
    stage = VisionStage([layer], (2, 4), NO_KEYS)
    (tile,) = stage.encode(lambda pixels: layer(pixels)[:, 1:], patches[None])
    assert tile.assignment.tolist() == [0, 1, 2, 2, 3, 4, 2, 2]
    return tile


@pytest.fixture
def patches():
    """CLS and 2 x 4 patches; those of the right half are equal."""
    x = torch.eye(9, 16)
    x[[3, 4, 7, 8]] = 1.0
    return x


def test_merged_tokens_stand_at_their_first_patch(patches):
    features, contents = split_contents([place_tokens([merged_tile(patches)], NO_KEYS)], 16)
    assert contents.tolist() == [TOKEN, TOKEN, TOKEN, EMPTY, TOKEN, TOKEN, EMPTY, EMPTY]
    assert torch.equal(features[0][[0, 1, 4, 5]], patches[[1, 2, 5, 6]])
    assert torch.equal(features[0][2], torch.ones(16))
    assert torch.equal(features[0][[3, 6, 7]], torch.ones(3, 16))  # the last one remains if it ends the prompt


SHOWN = torch.tensor([5, 6, 7, -1, 13, 14, 15, -1])
"""Two tiles above each other; the picture has lost its left column and the first row of each tile."""


def test_merged_tokens_stand_at_the_first_patch_that_is_shown(patches):
    tile, end = merged_tile(patches), torch.full((16,), 5.0)
    tiles = [tile, tile._replace(features=2 * tile.features)]
    features, contents = split_contents([place_tokens(tiles, NO_KEYS, SHOWN, end)], 16)
    assert contents.tolist() == [TOKEN, TOKEN, EMPTY, TOKEN, TOKEN, TOKEN, EMPTY, TOKEN]
    assert torch.equal(features[0][:2], torch.stack([patches[6], torch.ones(16)]))
    assert torch.equal(features[0][4:6], torch.stack([2 * patches[6], torch.full((16,), 2.0)]))
    assert torch.equal(features[0][[3, 7]], torch.full((2, 16), 5.0))
    left_out = place_tokens([tile], NO_KEYS, torch.tensor([0, 1, 4, 5, -1]), end)  # a window that nothing shows
    assert left_out[:, 16].tolist() == [TOKEN] * 5


@pytest.mark.parametrize(
    ("rate", "key"),
    [(0.01, [4]), (0.5, [4, 5]), (0.51, [1, 4, 5]), (1.0, [0, 1, 4, 5])],  # of 4 tokens
)
def test_key_tokens_are_the_images(patches, rate, key):
    """Not the tiles'. What is not shown and the ends of rows are neither counted nor chosen."""
    tile, config = merged_tile(patches), MustDropConfig(window=(2, 2), key_rate=rate)
    sky = tile._replace(importance=torch.tensor([0.9, 0.9, 0.2, 0.9, 0.1]))  # tokens 2 and 4 of each are shown
    text = tile._replace(importance=torch.tensor([0.9, 0.9, 0.3, 0.9, 0.4]))
    _, contents = split_contents([place_tokens([sky, text], config, SHOWN, torch.zeros(16))], 16)
    assert (contents == KEY_TOKEN).nonzero()[:, 0].tolist() == key
    assert (contents == EMPTY).nonzero()[:, 0].tolist() == [2, 6]


def test_anyres_pictures_are_shown_as_vllm_shows_them():
    """The patches' numbers in place of their features, through vLLM's own arrangement."""
    pinpoints = [[84, 168], [168, 84], [168, 168]]
    model = types.SimpleNamespace(
        config=types.SimpleNamespace(
            vision_config=types.SimpleNamespace(image_size=84, patch_size=14), image_grid_pinpoints=pinpoints
        ),
        image_newline=torch.tensor([-1]),
    )
    arrange = LlavaNextForConditionalGeneration._merge_image_patch_embeddings
    for size, tiles in (((84, 168), 3), ((153, 84), 3), ((168, 148), 5), ((100, 168), 5), ((84, 84), 1)):
        numbers = torch.arange(tiles * 36).view(tiles, 36, 1)
        expected = arrange(model, torch.tensor(size), numbers, strategy="spatial_unpad")[:, 0]
        assert torch.equal(shown_patches(size, tiles, 84, 14, pinpoints), expected)
        assert (expected < 0).any()


def test_features_that_were_given_are_all_there():
    features, contents = split_contents([torch.ones(3, 4)], 4)
    assert features[0].shape == (3, 4)
    assert contents.tolist() == [TOKEN] * 3


def test_flags_of_all_rows():
    rows = torch.tensor([False, True, True, False, True])
    flags = PlaceholderFlags.of(torch.tensor([KEY_TOKEN, EMPTY, TOKEN]), rows)
    assert flags.is_key_token.tolist() == [False, True, False, False, False]
    assert flags.empty.tolist() == [False, False, True, False, False]
