# SPDX-License-Identifier: Apache-2.0
"""What was merged, kept and dropped: per stage, layer and image; cache sizes; times. Everything here is on the host."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import MustDropConfig
from .placeholders import first_placeholders

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class ViewReport:
    """A grid of vision tokens: a picture, or a video. Maps have its shape, (H, W), or (T, H, W) for T frames.

    A token is named by the patch whose place it takes, counted row by row, frame after frame. A patch is what has a
    placeholder in the prompt; in some models that is several patches of the vision tower.
    """

    token_of_patch: Tensor
    """int64: the token that stands for each patch."""
    key: Tensor
    """bool: patches whose token is a key token."""
    survived: dict[int, Tensor]
    """Pruning layer -> bool: patches whose token goes on after it."""
    heat: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    """Layer -> float32: the attention that a text token pays it, mean over those that vote and over heads; nan where
    the token is gone. Empty without ``drop_tokens(..., heat_maps=True)``."""

    @property
    def grid(self) -> tuple[int, ...]:
        """H, W, or T, H, W."""
        return tuple(self.token_of_patch.shape)

    @property
    def patches(self) -> int:
        """Their number."""
        return self.token_of_patch.numel()

    @property
    def merged(self) -> Tensor:
        """bool: patches that share their token with others."""
        sizes = torch.bincount(self.token_of_patch.flatten(), minlength=self.patches)
        return sizes[self.token_of_patch] > 1

    @property
    def windows(self) -> list[tuple[int, ...]]:
        """Merged windows in raster order, in patches: (row, column, H, W), or (frame, row, column, T, H, W)."""
        windows = []
        for token in self.token_of_patch[self.merged].unique().tolist():
            places = torch.nonzero(self.token_of_patch == token)
            first, last = places.amin(0), places.amax(0)
            windows.append((*first.tolist(), *(last - first + 1).tolist()))
        return sorted(windows)

    def frame(self, number: int) -> ViewReport:
        """One frame of a video; tokens are named by their first patch in it."""
        token = self.token_of_patch[number]
        _, inverse = token.unique(return_inverse=True)
        first = first_placeholders(inverse.flatten(), token.numel())
        survived = {layer: alive[number] for layer, alive in self.survived.items()}
        heat = {layer: values[number] for layer, values in self.heat.items()}
        return ViewReport(first[inverse], self.key[number], survived, heat)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        heat = {str(layer): torch.where(v.isnan(), -1.0, v).tolist() for layer, v in self.heat.items()}
        return {
            "grid": list(self.grid),
            "windows": [list(window) for window in self.windows],
            "token_of_patch": self.token_of_patch.tolist(),
            "key": self.key.int().tolist(),
            "survived": {str(layer): alive.int().tolist() for layer, alive in self.survived.items()},
            **({"heat": heat} if heat else {}),  # -1 where the token is gone
        }


@dataclasses.dataclass(frozen=True)
class ImageReport:
    """One image or video of a prompt, with N placeholders, which are numbered from 0.

    Most images have one view. LLaVA-NeXT's have two, an overview and the picture itself; what is said of a view here
    (``grid``, ``token_of_patch``, ``key``, ``survived``, ...) is said of the last, the finest.
    """

    sequence: int
    """The row of the batch."""
    modality: str
    """"image" or "video"."""
    views: tuple[Tensor, ...]
    """Grids of placeholders, (H, W) or (T, H, W) int64."""
    token: Tensor
    """(N) int64: the placeholder whose token stands for each."""
    keys: Tensor
    """(N) bool: placeholders whose token is a key token."""
    alive: dict[int, Tensor]
    """Pruning layer -> (N) bool: placeholders whose token goes on after it."""
    kept: dict[int, int]
    """Pruning layer -> tokens that go on after it."""
    tokens: int
    """Tokens after merging."""
    key_tokens: int
    heat: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    """Layer -> (N) float32, as in ``ViewReport``."""

    @property
    def patches(self) -> int:
        """N: what plain generation would read, newline tokens and the like among them."""
        return self.token.numel()

    def view(self, number: int = -1) -> ViewReport:
        """One of its views, by default the finest."""
        places = self.views[number]
        order = torch.zeros_like(self.token)
        order[places.flatten()] = torch.arange(places.numel())
        survived = {layer: alive[places] for layer, alive in self.alive.items()}
        heat = {layer: values[places] for layer, values in self.heat.items()}
        return ViewReport(order[self.token[places]], self.keys[places], survived, heat)

    @property
    def grid(self) -> tuple[int, ...]:
        """H, W, or T, H, W."""
        return self.view().grid

    @property
    def token_of_patch(self) -> Tensor:
        """int64: the token that stands for each patch."""
        return self.view().token_of_patch

    @property
    def key(self) -> Tensor:
        """bool: patches whose token is a key token."""
        return self.view().key

    @property
    def survived(self) -> dict[int, Tensor]:
        """Pruning layer -> bool: patches whose token goes on after it."""
        return self.view().survived

    @property
    def merged(self) -> Tensor:
        """bool: patches that share their token with others."""
        return self.view().merged

    @property
    def windows(self) -> list[tuple[int, ...]]:
        """Merged windows in raster order: (row, column, height, width) in patches; in a video frames come first."""
        return self.view().windows

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "sequence": self.sequence,
            "modality": self.modality,
            "patches": self.patches,
            "tokens": self.tokens,
            "key_tokens": self.key_tokens,
            "kept": {str(layer): kept for layer, kept in self.kept.items()},
            **self.view().to_dict(),
            "other_views": [self.view(number).to_dict() for number in range(len(self.views) - 1)],
        }


@dataclasses.dataclass(frozen=True)
class CacheReport:
    """The KV cache at one moment."""

    lengths: list[int]
    """Tokens of each sequence that each layer holds, padding included."""
    bytes: int
    """Of the whole batch; 0 where no cache was used."""


@dataclasses.dataclass(frozen=True)
class PromptReport:
    """One prompt (a batch of sequences with images) that was read."""

    length: int
    """Tokens of the plain prompt, padding included."""
    text: list[int]
    """Text tokens of each sequence."""
    images: list[ImageReport]
    layer_tokens: list[int]
    """Vision tokens that each language layer processed, over the whole batch."""
    plain_cache: CacheReport
    """What plain generation would hold."""
    prefill_cache: CacheReport
    """What is held before stage 3."""
    final_cache: CacheReport
    """What decoding starts with."""
    milliseconds: dict[str, float]
    """Time that the stages themselves took, by name: "merge", "key tokens", "layer 2", ..., "evict"."""

    @property
    def caches(self) -> tuple[CacheReport, CacheReport, CacheReport]:
        """Plain, before stage 3, after it."""
        return self.plain_cache, self.prefill_cache, self.final_cache

    @property
    def mean_tokens(self) -> float:
        """Vision tokens of an image, averaged over the language layers: what methods are compared by."""
        return sum(self.layer_tokens) / (len(self.layer_tokens) * len(self.images))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        fields = dataclasses.asdict(dataclasses.replace(self, images=[]))
        return {**fields, "mean_tokens": self.mean_tokens, "images": [image.to_dict() for image in self.images]}


class Report:
    """What `drop_tokens` did, prompt by prompt. Fills up while the context is open."""

    def __init__(self, config: MustDropConfig) -> None:
        self.config = config
        self.prompts: list[PromptReport] = []

    @property
    def last(self) -> PromptReport:
        """The last prompt that had an image."""
        if not self.prompts:
            raise LookupError("no prompt with an image has been read yet")
        return self.prompts[-1]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"config": self.config.to_dict(), "prompts": [prompt.to_dict() for prompt in self.prompts]}

    def to_json(self, **settings: Any) -> str:
        """``to_dict`` as one JSON document; `settings` go to ``json.dumps``."""
        return json.dumps(self.to_dict(), allow_nan=False, **settings)

    def plot(self, image: Any, *, index: int = 0, prompt: PromptReport | None = None) -> Figure:
        """What was dropped from an image, or, as a contact sheet, from a video. Needs the extra package matplotlib.

        Args:
            image: the picture, Pillow's or (height, width, 3) uint8; a sequence of them for a video.
            index: which image of the prompt.
            prompt: by default the last one.
        """
        from .plots import draw_stages
        from .plots_sheets import as_frames, draw_video, pictures_of

        prompt = self.last if prompt is None else prompt
        frames, report = as_frames(image), prompt.images[index]
        if len(report.grid) == 3:
            return draw_video(pictures_of(report, frames), prompt, index=index)
        return draw_stages(frames[0], prompt, index=index)

    def plot_attention(self, image: Any, *, index: int = 0, prompt: PromptReport | None = None) -> Figure:
        """What the text looks at, layer by layer; the arguments are those of ``plot``.

        Raises:
            ValueError: the report was made without ``heat_maps=True``.
        """
        from .plots_sheets import as_frames, draw_attention, pictures_of

        prompt = self.last if prompt is None else prompt
        frames = pictures_of(prompt.images[index], as_frames(image))
        return draw_attention(frames, prompt, index=index)

    def rows(self, prompt: PromptReport | None = None) -> tuple[list[str], list[list[str]]]:
        """The columns and rows of ``table``, as text."""
        prompt = self.last if prompt is None else prompt
        images, times = prompt.images, prompt.milliseconds
        several = len(images) > 1
        columns = ["stage", "in", "kept", *(["kept of each"] if several else []), "ms"]
        rows: list[list[str]] = []

        def row(stage: str, before: object, after: object, time: str, each: Sequence[int] = ()) -> None:
            middle = [" ".join(map(str, each))] if several else []
            rows.append([stage, str(before), str(after), *middle, f"{times[time]:.2f}" if time in times else ""])

        def tokens(stage: str, before: int, each: list[int], time: str) -> int:
            row(stage, before, sum(each), time, each)
            return sum(each)

        patches = sum(image.patches for image in images)
        left = tokens("1 merge", patches, [image.tokens for image in images], "merge")
        tokens("1 key tokens", left, [image.key_tokens for image in images], "key tokens")
        for layer in images[0].kept:
            left = tokens(f"2 after layer {layer}", left, [image.kept[layer] for image in images], f"layer {layer}")
        plain, prefill, final = (f"{cache.bytes / 1e6:.2f}" for cache in prompt.caches)
        row("1, 2 KV cache in MB, plain and as read", plain, prefill, "")
        row("3 KV cache in MB, as read and cut", prefill, final, "evict")
        row("tokens of an image, mean over layers", f"{patches / len(images):.1f}", f"{prompt.mean_tokens:.1f}", "")
        return columns, rows

    def table(self, prompt: PromptReport | None = None) -> Table:
        """One prompt (by default the last) as a table for ``rich.print``. Needs the extra package rich."""
        from rich.table import Table

        prompt = self.last if prompt is None else prompt
        columns, rows = self.rows(prompt)
        table = Table(title=f"Vision tokens of {len(prompt.images)} image(s)")
        for column in columns:
            table.add_column(column, justify="left" if column == "stage" else "right")
        for number, cells in enumerate(rows, 1):
            table.add_row(*cells, end_section=number in (len(rows) - 3, len(rows) - 1))
        return table


class Stopwatch:
    """Times named steps; on a GPU by events, so that measuring does not wait."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._steps: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Times the block; blocks of one name add up."""
        begin = self._now()
        yield
        self._steps.append((name, begin, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Milliseconds by name since the last reading, summed; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        milliseconds: dict[str, float] = {}
        for name, begin, end in self._steps:
            step = begin.elapsed_time(end) if self._cuda else 1000 * (end - begin)
            milliseconds[name] = milliseconds.get(name, 0.0) + step
        self._steps.clear()
        return milliseconds
