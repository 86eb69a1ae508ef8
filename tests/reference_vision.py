# SPDX-License-Identifier: Apache-2.0
"""Stage 1 for each family in loops, independent of the package: the content of every placeholder of an image.

Where patches merge inside the tower, the tower is run here, layer by layer; elsewhere its features are the model's own.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from typing import Any

import tiny_models
import torch
from torch import Tensor

from mustdrop_kernels.config import MustDropConfig


class Margin:
    """Decisions, and the smallest relative distance of one of them from the opposite one."""

    def __init__(self) -> None:
        self.smallest = math.inf

    def reaches(self, value: float, threshold: float) -> bool:
        """Whether a value is at least the threshold."""
        self._distance(value, threshold)
        return value >= threshold

    def best(self, values: list[float], count: int) -> list[int]:
        """The places of the largest values, of the first ones among equals."""
        order = sorted(range(len(values)), key=lambda i: -values[i])
        if 0 < count < len(values):
            self._distance(values[order[count - 1]], values[order[count]])
        return order[:count]

    def _distance(self, a: float, b: float) -> None:
        self.smallest = min(self.smallest, abs(a - b) / max(abs(a), abs(b), 1e-30))


@dataclasses.dataclass
class Reference:
    """An image or a video with N placeholders."""

    token_id: int
    features: Tensor  # (N, C)
    owner: list[int]  # the placeholder whose token each one shares; -1: hidden
    keys: set[int]


@dataclasses.dataclass
class Placeholder:
    """Content of one placeholder."""

    feature: Tensor  # (C)
    owner: Any  # patches of one token have one owner; None: not shared
    importance: float | None  # None: no patch


def encode(
    model: Any, config: MustDropConfig, inputs: dict[str, Tensor], hidden: dict[int, list[bool]], margin: Margin
) -> list[Reference]:
    """All images, then all videos, each in the order of the prompt; ``hidden``: placeholders by their id."""
    kind = {
        "llava": Llava,
        "vipllava": Vip,
        "llava_next": Next,
        "llava_next_video": NextVideo,
        "llava_onevision": Onevision,
        "video_llava": VideoLlava,
        "qwen2_5_vl": Qwen,
        "internvl": InternVL,
    }[model.config.model_type]
    found = []
    for modality in ("image", "video"):
        names = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}[modality]
        if any(name in inputs for name in names):
            token = getattr(model.config, f"{modality}_token_id")
            rest = list(hidden[token])
            for placeholders, grids in kind(model, config, inputs, margin).images(modality):
                own, rest = rest[: len(placeholders)], rest[len(placeholders) :]
                found.append(_finish(placeholders, grids, token, config, own, margin))
    return found


def _finish(
    placeholders: list[Placeholder],
    grids: list[Tensor],
    token_id: int,
    config: MustDropConfig,
    hidden: list[bool],
    margin: Margin,
) -> Reference:
    """Merging after the tower, and key tokens. The first visible placeholder of a token holds it."""
    features = torch.stack([place.feature for place in placeholders]).clone()
    importance = [place.importance for place in placeholders]
    group: list[Any] = [i if p.owner is None else ("token", p.owner) for i, p in enumerate(placeholders)]
    if config.merge and config.merge_at == "features":
        for grid in grids:
            for window in _merging(features, grid, config, margin):
                features[window] = features[window].mean(0)
                mean = sum(importance[i] for i in window) / len(window)
                for i in window:
                    group[i], importance[i] = ("window", window[0]), mean
    first: dict[Any, int] = {}
    owner = [-1 if hidden[i] else first.setdefault(own, i) for i, own in enumerate(group)]
    tokens = [i for i, own in enumerate(owner) if own == i and importance[i] is not None]
    keys = margin.best([importance[i] for i in tokens], math.ceil(config.key_rate * len(tokens)))
    return Reference(token_id, features, owner, {tokens[i] for i in keys})


def _merging(features: Tensor, grid: Tensor, config: MustDropConfig, margin: Margin) -> list[list[int]]:
    """The windows of features, at the places of a grid (H, W) or (T, H, W), that merge."""
    window = (1, *config.window)[-3:] if grid.dim() == 3 else (1, *config.window[-2:])
    windows = _windows(grid if grid.dim() == 3 else grid[None], window)
    if config.merge_budget is None:
        return [places for places in windows if margin.reaches(_similarity(features[places]), config.merge_threshold)]
    whole = [places for places in windows if len(places) == math.prod(window)]
    best = margin.best([_similarity(features[places]) for places in whole], _budget(config, len(whole)))
    return [whole[i] for i in best]


def _windows(grid: Tensor, size: tuple[int, ...]) -> list[list[int]]:  # grid: (T, H, W)
    begins = [range(0, length, step) for length, step in zip(grid.shape, size, strict=True)]
    parts = [
        grid[t : t + size[0], y : y + size[1], x : x + size[2]] for t in begins[0] for y in begins[1] for x in begins[2]
    ]
    return [part.flatten().tolist() for part in parts if part.numel() > 1]


def _budget(config: MustDropConfig, windows: int) -> int:
    """Windows of an image that merge by a budget, of those that the grid does not cut."""
    budget = config.merge_budget
    return round(budget * windows) if isinstance(budget, float) else budget


def _similarity(x: Tensor) -> float:
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    pairs = unit @ unit.T
    return float((pairs.sum() - pairs.trace()) / (len(x) * (len(x) - 1)))


class Llava:
    """An image is one tile of a CLIP or SigLIP tower."""

    def __init__(self, model: Any, config: MustDropConfig, inputs: dict[str, Tensor], margin: Margin) -> None:
        self.model, self.body, self.config, self.inputs, self.margin = model, model.model, config, inputs, margin
        self._numbers = itertools.count()

    def images(self, modality: str) -> list[tuple[list[Placeholder], list[Tensor]]]:
        return [self._tile(pixels) for pixels in self.inputs["pixel_values"]]

    def _tile(self, pixels: Tensor) -> tuple[list[Placeholder], list[Tensor]]:
        placeholders = self.tile(pixels, self.body.vision_tower)
        lead = sum(place.importance is None for place in placeholders)
        side = math.isqrt(len(placeholders) - lead)
        return placeholders, [lead + torch.arange(side * side).view(side, side)]

    def tile(self, pixels: Tensor, tower: Any, cut: int | None = None) -> list[Placeholder]:
        """The tower's features of a tile (3, H, W); patches of one token have the same."""
        hidden, assignment, weights, prefix = self._run(pixels, tower)
        strategy = getattr(self.model.config, "vision_feature_select_strategy", "default")
        cut = int(strategy == "default") if cut is None else cut
        features = self.body.multi_modal_projector(self._features_of(hidden))
        asked = weights[0] if prefix else weights.mean(0)  # (S) what CLS looks at, or what is received
        placeholders = [Placeholder(features[i], None, None) for i in range(cut, prefix)]
        number = next(self._numbers)
        for token in assignment:
            placeholders.append(Placeholder(features[prefix + token], (number, token), float(asked[prefix + token])))
        return placeholders[max(cut - prefix, 0) :]  # without CLS a model that cuts takes a patch away

    def _features_of(self, hidden: list[Tensor]) -> Tensor:
        layers = self.model.config.vision_feature_layer
        return hidden[layers] if isinstance(layers, int) else torch.cat([hidden[layer] for layer in layers], -1)

    def _run(self, pixels: Tensor, tower: Any) -> tuple[list[Tensor], list[int], Tensor, int]:
        """Hidden states (S, C), each patch's token, the last layer's attention (S, S), tokens before the patches."""
        tower = getattr(tower, "vision_model", tower)
        prefix = int(hasattr(tower, "pre_layrnorm"))
        x = tower.embeddings(pixels[None])
        x = (tower.pre_layrnorm(x) if prefix else x)[0]
        assignment = list(range(x.shape[0] - prefix))
        hidden = [x]
        for number, layer in enumerate(tower.encoder.layers):
            attention = layer.self_attn
            y = layer.layer_norm1(x)
            projections = (attention.q_proj(y), attention.k_proj(y), attention.v_proj(y))
            q, k, v = (z.unflatten(-1, (-1, attention.head_dim)).transpose(0, 1) for z in projections)
            weights = (q @ k.transpose(1, 2) * attention.scale).softmax(-1)
            x = x + attention.out_proj((weights @ v).transpose(0, 1).flatten(1))
            x = x + layer.mlp(layer.layer_norm2(x))
            if self.config.merge and self.config.merge_at == "tower" and number == self.config.merge_layer:
                x, assignment = self._merge(x, prefix)
            hidden.append(x)
        return hidden, assignment, weights.mean(0), prefix

    def _merge(self, x: Tensor, prefix: int) -> tuple[Tensor, list[int]]:
        side, patches = math.isqrt(x.shape[0] - prefix), x[prefix:]
        grid = torch.arange(side * side).view(side, side)
        own = list(range(side * side))
        tokens = dict(enumerate(patches))
        for window in _merging(patches, grid, self.config, self.margin):
            tokens[window[0]] = patches[window].mean(0)
            for patch in window[1:]:
                del tokens[patch]
                own[patch] = window[0]
        order = sorted(tokens)
        return torch.stack([*x[:prefix], *(tokens[patch] for patch in order)]), [order.index(patch) for patch in own]


class Vip(Llava):
    """Features of several layers, side by side."""

    def _features_of(self, hidden: list[Tensor]) -> Tensor:
        return torch.cat([hidden[layer] for layer in self.model.config.vision_feature_layers], -1)


class Next(Llava):
    """An overview, then rows of patches over all tiles, each ended by a newline."""

    def images(self, modality: str) -> list[tuple[list[Placeholder], list[Tensor]]]:
        return [
            self._picture(tiles, tuple(size.tolist()))
            for tiles, size in zip(self.inputs["pixel_values"], self.inputs["image_sizes"], strict=True)
        ]

    def _picture(self, tiles: Tensor, size: tuple[int, int]) -> tuple[list[Placeholder], list[Tensor]]:
        config, vision = self.model.config, self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        across, rows, columns = tiny_models.anyres_rows(config, size)
        encoded = {}

        def patch(row: int, column: int) -> Placeholder:
            tile = 1 + row // side * across + column // side
            if tile not in encoded:
                encoded[tile] = self.tile(tiles[tile], self.body.vision_tower)
            return encoded[tile][row % side * side + column % side]

        newline = Placeholder(self.body.image_newline, None, None)
        picture = self._shrink([[patch(row, column) for column in columns] for row in rows])
        placeholders = self.tile(tiles[0], self.body.vision_tower)
        begin = len(placeholders)
        for row in picture:
            placeholders += [*row, newline]
        places = begin + torch.arange(len(placeholders) - begin).view(len(picture), -1)[:, :-1]
        return placeholders, [torch.arange(begin).view(side, side), places]

    def _shrink(self, picture: list[list[Placeholder]]) -> list[list[Placeholder]]:
        return picture


class NextVideo(Next):
    """Frames are pooled 2 x 2."""

    def images(self, modality: str) -> list[tuple[list[Placeholder], list[Tensor]]]:
        if modality == "image":
            return super().images(modality)
        return [self._video(frames) for frames in self.inputs["pixel_values_videos"]]

    def _video(self, frames: Tensor) -> tuple[list[Placeholder], list[Tensor]]:
        features = self._features(frames)
        side = math.isqrt(len(features) // len(frames))
        places = torch.arange(len(frames) * side * side).view(-1, side, side)
        importance = torch.stack([self._pool(self._asked(frame)) for frame in frames]).flatten().tolist()
        rows = zip(features, importance, strict=False)  # OneVision's newline has no importance
        placeholders = [Placeholder(feature, None, value) for feature, value in rows]
        placeholders += [Placeholder(feature, None, None) for feature in features[places.numel() :]]
        return placeholders, [places]

    def _features(self, frames: Tensor) -> Tensor:  # (N, C)
        names = inspect.signature(self.body.get_video_features).parameters
        name = "pixel_values_videos" if "pixel_values_videos" in names else "pixel_values"
        layer, strategy = (getattr(self.model.config, f"vision_feature_{x}") for x in ("layer", "select_strategy"))
        output = self.body.get_video_features(
            **{name: frames[None]}, vision_feature_layer=layer, vision_feature_select_strategy=strategy
        )
        output = getattr(output, "pooler_output", output)
        return torch.cat([piece.flatten(0, -2) for piece in output])

    def _asked(self, frame: Tensor) -> Tensor:  # (H, W)
        values = torch.tensor([place.importance for place in self.tile(frame, self.body.vision_tower)])
        return values.view(tiny_models.SIDE, tiny_models.SIDE)

    def _pool(self, x: Tensor) -> Tensor:
        return torch.tensor([[float(x[i : i + 2, j : j + 2].mean()) for j in range(0, 4, 2)] for i in range(0, 4, 2)])


class Onevision(NextVideo):
    """SigLIP; large pictures are interpolated, a newline ends a video."""

    def _features(self, frames: Tensor) -> Tensor:
        features = super()._features(frames)
        if len(features) % len(frames):
            return features
        return torch.cat([features, self.body.image_newline[None]])  # which earlier versions do later

    def _pool(self, x: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(x[None, None], size=(2, 2), mode="bilinear")[0, 0]

    def _shrink(self, picture: list[list[Placeholder]]) -> list[list[Placeholder]]:
        size = tiny_models.shrunk(self.model.config, len(picture), len(picture[0]))
        if size == (len(picture), len(picture[0])):
            return picture
        stacked = torch.stack(
            [torch.stack([torch.cat([p.feature, torch.tensor([p.importance])]) for p in row]) for row in picture]
        )
        small = torch.nn.functional.interpolate(stacked.permute(2, 0, 1)[None], size=size, mode="bilinear")[0]
        return [[Placeholder(x[:-1], None, float(x[-1])) for x in row] for row in small.permute(1, 2, 0)]


class VideoLlava(Llava):
    """A video is its frames, each with its CLS token."""

    def images(self, modality: str) -> list[tuple[list[Placeholder], list[Tensor]]]:
        if modality == "image":
            images = self.inputs.get("pixel_values", self.inputs.get("pixel_values_images"))
            return [self._square(pixels) for pixels in images]
        return [self._video(frames) for frames in self.inputs["pixel_values_videos"]]

    def _square(self, pixels: Tensor) -> tuple[list[Placeholder], list[Tensor]]:
        side = tiny_models.SIDE
        return self.tile(pixels, self.body.image_tower), [torch.arange(side * side).view(side, side)]

    def _video(self, frames: Tensor) -> tuple[list[Placeholder], list[Tensor]]:
        placeholders, places, side = [], [], tiny_models.SIDE
        for frame in frames:
            places.append(len(placeholders) + 1 + torch.arange(side * side).view(side, side))
            placeholders += self.tile(frame, self.body.video_tower, cut=0)
        return placeholders, [torch.stack(places)]


class Qwen:
    """Features are the model's; the attention of its full layer is computed here."""

    def __init__(self, model: Any, config: MustDropConfig, inputs: dict[str, Tensor], margin: Margin) -> None:
        self.body, self.inputs = model.model, inputs

    def images(self, modality: str) -> list[tuple[list[Placeholder], list[Tensor]]]:
        pixels = self.inputs["pixel_values" if modality == "image" else "pixel_values_videos"]
        grids = self.inputs[f"{modality}_grid_thw"]
        found, begin = [], 0
        for grid in grids:  # one by one: they do not see each other
            end = begin + int(grid.prod())
            found.append(self._image(modality, pixels[begin:end], grid))
            begin = end
        return found

    def _image(self, modality: str, pixels: Tensor, grid: Tensor) -> tuple[list[Placeholder], list[Tensor]]:
        visual = self.body.visual
        attention = visual.blocks[max(visual.config.fullatt_block_indexes)].attn
        seen = {}

        def watch(module, args, kwargs):
            seen.update(kwargs, x=args[0])

        handle = attention.register_forward_pre_hook(watch, with_kwargs=True)
        features = getattr(self.body, f"get_{modality}_features")(pixels, grid[None])
        handle.remove()
        features = getattr(features, "pooler_output", features)[0]
        frames, height, width = grid[0].item(), grid[1].item() // 2, grid[2].item() // 2
        received = self._received(attention, seen["x"], seen["position_embeddings"], frames)
        by_token = received.view(-1, 4).mean(1).tolist()  # in the order of the windows
        order = self._window_order(frames, height, width, window=2)
        importance = dict(zip(order, by_token, strict=True))
        placeholders = [Placeholder(feature, None, importance[i]) for i, feature in enumerate(features)]
        places = torch.arange(len(features)).view(frames, height, width)
        return placeholders, [places if frames > 1 else places[0]]

    def _received(self, attention: Any, x: Tensor, rotary: Any, frames: int) -> Tensor:
        cos, sin = (table[:, None] for table in rotary)
        q, k, _ = attention.qkv(x).view(len(x), 3, attention.num_heads, -1).unbind(1)  # (n, H, D)

        def turn(z: Tensor) -> Tensor:
            half = z.shape[-1] // 2
            return z * cos + torch.cat([-z[..., half:], z[..., :half]], -1) * sin

        q, k = (turn(z).view(frames, -1, *z.shape[1:]).transpose(1, 2) for z in (q, k))  # frames are apart
        weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
        return weights.mean((1, 2)).flatten()

    def _window_order(self, frames: int, height: int, width: int, window: int) -> list[int]:
        order = []
        for t in range(frames):
            for top in range(0, height, window):
                for left in range(0, width, window):
                    for y in range(top, min(top + window, height)):
                        order += [(t * height + y) * width + x for x in range(left, min(left + window, width))]
        return order


class InternVL:
    """Features are the model's; the attention of its last layer is computed here."""

    def __init__(self, model: Any, config: MustDropConfig, inputs: dict[str, Tensor], margin: Margin) -> None:
        self.body, self.inputs = model.model, inputs
        self.settings = model.config

    def images(self, modality: str) -> list[tuple[list[Placeholder], list[Tensor]]]:
        attention = self.body.vision_tower.encoder.layer[-1].attention
        seen = []
        handle = attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        settings = self.settings
        output = self.body.get_image_features(
            self.inputs["pixel_values"],
            vision_feature_layer=settings.vision_feature_layer,
            vision_feature_select_strategy=settings.vision_feature_select_strategy,
        )
        handle.remove()
        found = []
        for features, x in zip(getattr(output, "pooler_output", output), seen[0], strict=True):
            q, k = (
                part(x).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
                for part in (attention.q_proj, attention.k_proj)
            )
            weights = (q[:, :1] @ k.transpose(1, 2) * attention.scale).softmax(-1).mean(0)[0, 1:].view(8, 8)
            joined = [float(weights[i : i + 2, j : j + 2].mean()) for i in range(0, 8, 2) for j in range(0, 8, 2)]
            placeholders = [Placeholder(feature, None, value) for feature, value in zip(features, joined, strict=True)]
            found.append((placeholders, [torch.arange(16).view(4, 4)]))
        return found
