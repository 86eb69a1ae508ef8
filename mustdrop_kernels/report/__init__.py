# SPDX-License-Identifier: Apache-2.0
"""Report of ``drop_tokens``: records of each prompt, as a table, as JSON and as pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..config import MustDropConfig
from .records import CacheReport, ImageReport, PromptReport, ViewReport
from .stopwatch import Stopwatch

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

__all__ = ["CacheReport", "ImageReport", "PromptReport", "Report", "Stopwatch", "ViewReport"]


class Report:
    """Report of ``drop_tokens``, prompt by prompt; it grows while the context is open."""

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
        """Draw the dropped tokens of an image or, as a contact sheet, of a video. Requires matplotlib.

        Args:
            image: the picture, Pillow's or (height, width, 3) uint8; a sequence of them for a video.
            index: of the image in the prompt.
            prompt: by default the last one.
        """
        from .contact_sheets import as_frames, draw_video, pictures_of
        from .plots import draw_stages

        prompt = self.last if prompt is None else prompt
        frames, report = as_frames(image), prompt.images[index]
        if len(report.grid) == 3:
            return draw_video(pictures_of(report, frames), prompt, index=index)
        return draw_stages(frames[0], prompt, index=index)

    def plot_attention(self, image: Any, *, index: int = 0, prompt: PromptReport | None = None) -> Figure:
        """Draw the attention from text to vision, layer by layer; the arguments are those of ``plot``.

        Raises:
            ValueError: the report was made without ``heat_maps=True``.
        """
        from .contact_sheets import as_frames, draw_attention, pictures_of

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
        """One prompt (by default the last) as a table for ``rich.print``. Requires the package rich."""
        from rich.table import Table

        prompt = self.last if prompt is None else prompt
        columns, rows = self.rows(prompt)
        table = Table(title=f"Vision tokens of {len(prompt.images)} image(s)")
        for column in columns:
            table.add_column(column, justify="left" if column == "stage" else "right")
        for number, cells in enumerate(rows, 1):
            table.add_row(*cells, end_section=number in (len(rows) - 3, len(rows) - 1))
        return table
