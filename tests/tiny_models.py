# SPDX-License-Identifier: Apache-2.0
"""Tiny models of each family with random weights, and batches for them; no downloads, no processors.

Flat image regions give uniform vision features, so that stage 1 merges windows; language models have uneven attention,
so that stage 2 has clear decisions. Ids from 10 on are text; `IMAGE` and `VIDEO` are placeholders.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor

PAD, IMAGE, VIDEO = 3, 4, 5
VOCABULARY = 300
PATCH = 14
LAYERS = 6

TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=8192,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=PAD,
    initializer_range=0.15,
)
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, patch_size=PATCH)


@dataclasses.dataclass(frozen=True)
class Picture:
    """Visual input of a row of a batch: a tiled image, a video, ..."""

    placeholders: list[int]  # its placeholder ids in the prompt
    inputs: dict[str, Tensor]  # of this image only, with a leading dimension of 1 or of its tiles


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A family: its model, and its images by number."""

    build: Callable[[], Any]
    picture: Callable[[Any, int], Picture]  # (config, number); the numbers differ in size
    collate: Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]
    tower: Callable[[Any], list[Any]] = lambda model: [model.model.vision_tower]


def model_of(tiny: Tiny, attention: str = "sdpa", seed: int = 0) -> Any:
    """The model in float32, without an end-of-sequence token."""
    torch.manual_seed(seed)
    model = tiny.build()
    model.set_attn_implementation(attention)
    model = model.eval()
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.mul_(2.0)
        for tower in tiny.tower(model):
            embeddings = getattr(getattr(tower, "vision_model", tower), "embeddings", None)
            if hasattr(embeddings, "position_embedding"):
                embeddings.position_embedding.weight.mul_(3.0)
                embeddings.patch_embedding.weight.mul_(2.0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def batch(tiny: Tiny, config: Any, rows: list[list[Any]]) -> dict[str, Tensor]:
    """Rows of text (a number of tokens) and images (("picture", number)), padded on the left."""
    torch.manual_seed(7)
    sequences, pictures = [], []
    for row in rows:
        ids = [1]
        for piece in row:
            if isinstance(piece, int):
                ids += torch.randint(10, VOCABULARY, (piece,)).tolist()
            else:
                pictures.append(tiny.picture(config, piece[1]))
                ids += pictures[-1].placeholders
        sequences.append(ids)
    longest = max(map(len, sequences))
    inputs = {
        "input_ids": torch.tensor([[PAD] * (longest - len(ids)) + ids for ids in sequences]),
        "attention_mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in sequences]),
    }
    if pictures:
        inputs |= tiny.collate([picture.inputs for picture in pictures])
    return inputs


def pixels(shape: tuple[int, ...], number: int) -> Tensor:
    """(..., 3, height, width) noise with a flat right part, whose width depends on ``number``."""
    generator = torch.Generator().manual_seed(number)
    values = torch.randn(shape, generator=generator)
    flat = values[..., int(shape[-1] * (0.5, 0.3, 0.6)[number % 3]) :]
    flat *= torch.linspace(0.0, 0.5, shape[-2])[:, None]
    flat += 0.5 * (number % 2)
    return values


def _cat(pictures: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = list(dict.fromkeys(name for picture in pictures for name in picture))
    return {name: torch.cat([picture[name] for picture in pictures if name in picture]) for name in names}


def _padded(pictures: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tiles (1, n, 3, H, W) of different n, padded with zeros."""
    most = max((picture["pixel_values"].shape[1] for picture in pictures if "pixel_values" in picture), default=0)
    for picture in pictures:
        if "pixel_values" in picture:
            tiles = picture["pixel_values"]
            picture["pixel_values"] = torch.cat([tiles, tiles.new_zeros(1, most - tiles.shape[1], *tiles.shape[2:])], 1)
    return _cat(pictures)


def clip(patches: int) -> Any:
    """A CLIP tower for images of patches x patches."""
    return tf.CLIPVisionConfig(image_size=patches * PATCH, **VISION)


def siglip(patches: int) -> Any:
    """A SigLIP tower for images of patches x patches."""
    return tf.SiglipVisionConfig(image_size=patches * PATCH, **VISION)


def build(name: str, tower: Any, language: Any = None, **settings: Any) -> Any:
    """A LLaVA by the name of its classes, with these configs; without ``language`` with a LLaMA."""
    language = tf.LlamaConfig(**TEXT) if language is None else language
    config = getattr(tf, f"{name}Config")(
        vision_config=tower, text_config=language, image_token_index=IMAGE, **settings
    )
    return getattr(tf, f"{name}ForConditionalGeneration")(config)


# ------------------------------------------------------------------------------------------------------- LLaVA-1.5


def _llava(strategy: str = "default", tower: Any = None) -> Any:
    tower = clip(6) if tower is None else tower
    return build("Llava", tower, vision_feature_layer=-2, vision_feature_select_strategy=strategy)


def _vip_llava() -> Any:
    return build("VipLlava", clip(6), vision_feature_layers=[-2, 2])


def _llava_picture(extra: int) -> Callable[[Any, int], Picture]:
    def picture(config: Any, number: int) -> Picture:
        side = config.vision_config.image_size
        return Picture([IMAGE] * ((side // PATCH) ** 2 + extra), {"pixel_values": pixels((1, 3, side, side), number)})

    return picture


# ------------------------------------------------------------------------------------ LLaVA-NeXT, its videos, OneVision

SIDE = 4  # patches of a tile
TILE = SIDE * PATCH
SIZES = [(60, 110), (112, 70), (56, 56), (40, 168)]
"""Height and width of images; the last one is very wide."""
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE], [TILE, 3 * TILE]]


def _next() -> Any:
    return build("LlavaNext", clip(SIDE), vision_feature_layer=-2, image_grid_pinpoints=PINPOINTS)


def _next_video() -> Any:
    video = dict(video_token_index=VIDEO, spatial_pool_stride=2, spatial_pool_mode="average")
    return build("LlavaNextVideo", clip(SIDE), vision_feature_layer=-2, image_grid_pinpoints=PINPOINTS, **video)


def _onevision(aspect: str = "anyres_max_9") -> Any:
    return build(
        "LlavaOnevision",
        tf.SiglipVisionConfig(image_size=TILE, vision_use_head=False, **VISION),
        tf.Qwen2Config(**TEXT),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=aspect,
        image_grid_pinpoints=PINPOINTS,
        video_token_index=VIDEO,
    )


def anyres_rows(config: Any, size: tuple[int, int]) -> tuple[int, range, range]:
    """Tiles in a row, and the ranges of patch rows and columns without the margins."""
    from transformers.image_processing_utils import select_best_resolution

    patch, tile = config.vision_config.patch_size, config.vision_config.image_size
    height, width = select_best_resolution(size, config.image_grid_pinpoints)
    rows, columns = height // patch, width // patch
    if size[1] / size[0] > columns / rows:
        margin = (rows - int(round(size[0] * columns / size[1], 7))) // 2
        return width // tile, range(margin, rows - margin), range(columns)
    margin = (columns - int(round(size[1] * rows / size[0], 7))) // 2
    return width // tile, range(rows), range(margin, columns - margin)


def _tiled(config: Any, number: int) -> Picture:
    size = SIZES[number % len(SIZES)]
    _, rows, columns = anyres_rows(config, size)
    from transformers.image_processing_utils import select_best_resolution

    height, width = select_best_resolution(size, config.image_grid_pinpoints)
    tiles = 1 + height * width // TILE**2
    high, wide = shrunk(config, len(rows), len(columns))
    count = SIDE**2 + high * (wide + 1)
    values = pixels((1, tiles, 3, TILE, TILE), number)
    return Picture([IMAGE] * count, {"pixel_values": values, "image_sizes": torch.tensor([size])})


def shrunk(config: Any, rows: int, columns: int) -> tuple[int, int]:
    """The size to which OneVision shrinks an image that exceeds the maximum number of tiles."""
    aspect = getattr(config, "vision_aspect_ratio", None)
    if aspect is None:
        return rows, columns
    ratio = (rows * columns / (int(aspect.removeprefix("anyres_max_")) * SIDE**2)) ** 0.5
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)


FRAMES = 3


def _video(per_frame: int, end: int, side: int) -> Callable[[Any, int], Picture]:
    def picture(config: Any, number: int) -> Picture:
        values = pixels((1, FRAMES, 3, side, side), number)
        values[:, 1, ..., : side // 2, :] = values[:, 0, ..., : side // 2, :]  # the static part
        return Picture([VIDEO] * (FRAMES * per_frame + end), {"pixel_values_videos": values})

    return picture


def _either(
    image: Callable[[Any, int], Picture], video: Callable[[Any, int], Picture]
) -> Callable[[Any, int], Picture]:
    """Numbers from 100 on are videos."""
    return lambda config, number: image(config, number) if number < 100 else video(config, number - 100)


def _video_llava() -> Any:
    lengths = dict(image_seq_length=SIDE**2, video_seq_length=SIDE**2 + 1)
    return build("VideoLlava", clip(SIDE), vision_feature_layer=-2, video_token_index=VIDEO, **lengths)


def _square(config: Any, number: int) -> Picture:
    names = inspect.signature(tf.VideoLlavaForConditionalGeneration.forward).parameters
    name = "pixel_values" if "pixel_values" in names else "pixel_values_images"
    return Picture([IMAGE] * SIDE**2, {name: pixels((1, 3, TILE, TILE), number)})


# ------------------------------------------------------------------------------------------------------------- Qwen

GRIDS = [(1, 8, 12), (1, 10, 6), (1, 4, 4), (2, 8, 8)]
"""Frames, height and width in patches; the last one is a video."""


def _qwen() -> Any:
    return tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(
            text_config={
                **TEXT,
                "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 2, 2]},
                "use_sliding_window": False,
            },
            vision_config=dict(
                depth=3,
                hidden_size=32,
                intermediate_size=64,
                num_heads=4,
                out_hidden_size=48,
                patch_size=PATCH,
                window_size=4 * PATCH,
                fullatt_block_indexes=[1],
                spatial_merge_size=2,
                temporal_patch_size=2,
            ),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=6,
            vision_end_token_id=7,
        )
    )


def _qwen_picture(config: Any, number: int) -> Picture:
    video = number >= 100
    frames, height, width = GRIDS[-1] if video else GRIDS[number % 3]
    generator = torch.Generator().manual_seed(number)
    values = torch.randn(frames, height, width, 3 * 2 * PATCH * PATCH, generator=generator)
    values[:, :, width // 2 :] = values[:1, :1, :1] + 0.3 * values[:, :, width // 2 :]
    # The tower takes patches in blocks of 2 x 2.
    values = values.view(frames, height // 2, 2, width // 2, 2, -1).transpose(2, 3).reshape(frames * height * width, -1)
    grid = torch.tensor([[frames, height, width]])
    token = VIDEO if video else IMAGE
    ids = [6] + [token] * (frames * height * width // 4) + [7]
    names = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
    return Picture(ids, dict(zip(names, (values, grid), strict=True)))


# --------------------------------------------------------------------------------------------------------- InternVL


def _internvl() -> Any:
    model = tf.InternVLForConditionalGeneration(
        tf.InternVLConfig(
            vision_config=tf.InternVLVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                patch_size=[PATCH, PATCH],
                image_size=[8 * PATCH, 8 * PATCH],
                layer_scale_init_value=0.5,
            ),
            text_config=tf.Qwen2Config(**TEXT),
            image_token_id=IMAGE,
            downsample_ratio=0.5,
            image_seq_length=16,
        )
    )
    with torch.no_grad():
        model.model.vision_tower.embeddings.position_embeddings.normal_(0, 0.5)
        model.model.vision_tower.embeddings.cls_token.normal_()
    return model


def _internvl_picture(config: Any, number: int) -> Picture:
    """One tile or two, as the processor cuts them."""
    tiles = 1 + number % 2
    return Picture([IMAGE] * (16 * tiles), {"pixel_values": pixels((tiles, 3, 8 * PATCH, 8 * PATCH), number)})


FAMILIES = {
    "llava": Tiny(_llava, _llava_picture(0), _cat),
    "llava full": Tiny(lambda: _llava("full"), _llava_picture(1), _cat),
    "llava siglip": Tiny(lambda: _llava("full", siglip(6)), _llava_picture(0), _cat),
    "vipllava": Tiny(_vip_llava, _llava_picture(0), _cat),
    "llava_next": Tiny(_next, _tiled, _padded),
    "llava_next_video": Tiny(_next_video, _either(_tiled, _video(SIDE**2 // 4, 0, TILE)), _padded),
    "llava_onevision": Tiny(_onevision, _either(_tiled, _video(SIDE**2 // 4, 1, TILE)), _padded),
    "llava_onevision shrunk": Tiny(lambda: _onevision("anyres_max_1"), _tiled, _padded),
    "video_llava": Tiny(
        _video_llava,
        _either(_square, _video(SIDE**2 + 1, 0, TILE)),
        _cat,
        lambda model: [model.model.image_tower, model.model.video_tower],
    ),
    "qwen2_5_vl": Tiny(_qwen, _qwen_picture, _cat, lambda model: []),
    "internvl": Tiny(_internvl, _internvl_picture, _cat, lambda model: []),
}
