# SPDX-License-Identifier: Apache-2.0
"""Cost of ``drop_tokens`` in a decode step: milliseconds and bytes of the cache, with and without it.

Four prompts: text alone (the cost of the context itself), an image that keeps all tokens, an image that loses most
tokens, and a batch of two of the latter, one of them padded, so that every step has masks. Two models with the same
weights decode alternately, token by token, so that drift of the machine affects both; ratios are those of neighboring
tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..config import MustDropConfig
from ..files import read_document
from ..integrations.transformers import drop_tokens
from . import machine
from .documents import Document, Sheet, Tell, note
from .random_llava import GRID, PATCH, Sizes, Transformer
from .units import size

FORMAT = "mustdrop-decode/1"
TEXT = 60  # tokens after the image
Prompt = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of ``mustdrop bench decode``: LLaVA-1.5's depth and prompt, less width."""

    layers: int = 32
    width: int = 1024
    tokens: int = 96
    turns: int = 7  # measured generations of each prompt
    threads: int = 2

    @property
    def sizes(self) -> Sizes:
        """Sizes of the model."""
        language = Transformer(self.width, 2 * self.width, self.width // 64, self.layers)
        return Sizes(Transformer(128, 256, 4, 4), language, 1000)

    @property
    def cases(self) -> dict[str, tuple[Prompt, MustDropConfig]]:
        """Name -> prompt and configuration."""
        keep_all, budget = (MustDropConfig.preset(name).for_depth(self.layers) for name in ("keep-all", "budget-64"))
        image = self.sizes.words - 1
        return {
            "text alone": (inputs(None), budget),
            "image, all kept": (inputs(image), keep_all),
            "image, budget-64": (inputs(image), budget),
            "two images, one padded, budget-64": (padded(image), budget),
        }


def inputs(image: int | None) -> Prompt:
    """60 tokens of text, with or without the 576 placeholders `image` of a picture before them."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(10, 999, (1, TEXT), generator=generator)
    if image is None:
        return {"input_ids": text, "attention_mask": torch.ones_like(text)}
    ids = torch.cat([torch.full((1, GRID**2), image), text], 1)
    pixels = torch.randn(1, 3, GRID * PATCH, GRID * PATCH, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def padded(image: int) -> Prompt:
    """Two prompts with an image; the second has 20 tokens of text fewer and padding on the left."""
    whole = inputs(image)
    ids = torch.cat([whole["input_ids"], whole["input_ids"].roll(20, 1)])
    ids[1, :20] = 0
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": whole["pixel_values"].repeat(2, 1, 1, 1),
    }


class Turns:
    """Two generations in threads that alternate after every token."""

    def __init__(self) -> None:
        self.seconds: tuple[list[float], list[float]] = ([], [])  # of each token; the first is the prompt's
        self._turn, self._done = 0, [False, False]
        self._changed = threading.Condition()

    def take(self, side: int) -> None:
        """Block until it is this side's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._turn == side or self._done[1 - side])

    def hand_over(self, side: int, done: bool = False) -> None:
        """Let the other side run."""
        with self._changed:
            self._turn, self._done[side] = 1 - side, done
            self._changed.notify_all()


class Side:
    """Streamer of transformers: receives the prompt, then every token."""

    def __init__(self, turns: Turns, side: int) -> None:
        self.turns, self.side, self.since = turns, side, 0.0

    def put(self, tokens: torch.Tensor) -> None:
        """Record the time of a token and let the other side run."""
        if self.since:
            self.turns.seconds[self.side].append(time.perf_counter() - self.since)
            self.turns.hand_over(self.side)
        self.turns.take(self.side)
        self.since = time.perf_counter()

    def end(self) -> None:
        """Called after the last token."""


def in_turns(models: Sequence[Any], prompt: Prompt, tokens: int) -> list[list[float]]:
    """Milliseconds of each token after the first, for both models."""
    turns = Turns()

    def run(side: int) -> None:
        try:
            with torch.inference_mode():
                models[side].generate(**prompt, max_new_tokens=tokens, do_sample=False, streamer=Side(turns, side))
        finally:
            turns.hand_over(side, done=True)

    with ThreadPoolExecutor(2) as pool:
        for one in [pool.submit(run, side) for side in (0, 1)]:
            one.result()
    return [[1000 * seconds for seconds in side[1:]] for side in turns.seconds]


def compare(
    models: Sequence[Any],
    prompt: Prompt,
    config: MustDropConfig,
    options: Options,
    done: Callable[[], None],
) -> dict[str, Any]:
    """Milliseconds per decoded token of a plain model and of one inside ``drop_tokens``, and their ratio by pairs.

    Calls `done` after each of options.turns + 1 generations.
    """
    times: tuple[list[float], list[float]] = ([], [])
    with drop_tokens(models[1], config) as report:
        for turn in range(options.turns + 1):
            found = in_turns(models, prompt, options.tokens)
            if turn:  # the first warms up
                for side, more in zip(times, found, strict=True):
                    side.extend(more)
            done()
    cache = None
    if report.prompts:
        cache = {"plain": report.last.plain_cache.bytes, "drop_tokens": report.last.final_cache.bytes}
    ratios = [ours / plain for plain, ours in zip(*times, strict=True)]
    return {
        "decode_ms": {"plain": statistics.median(times[0]), "drop_tokens": statistics.median(times[1])},
        "pairs": len(ratios),
        "ratio": statistics.median(ratios),
        "ratio_interval": median_interval(ratios),
        "cache_bytes": cache,
    }


def median_interval(values: list[float]) -> tuple[float, float]:
    """95% confidence interval of the median by order statistics, without assumptions on the distribution."""
    values, count = sorted(values), len(values)
    tail, rank = 0.0, 0  # P(rank or fewer of the values lie below the median) = tail
    while rank < count // 2 and tail + math.comb(count, rank) / 2**count <= 0.025:
        tail += math.comb(count, rank) / 2**count
        rank += 1
    rank = max(rank - 1, 0)
    return values[rank], values[count - 1 - rank]


def plan_lines(options: Options) -> Iterator[str]:
    """Lines of a dry run."""
    weights, cases = options.sizes.weights(), options.cases
    yield f"a LLaVA-1.5 with {options.layers} layers of width {options.width}: {size(4 * weights)} of float32 weights"
    for name, (prompt, _) in cases.items():
        cache = 2 * 2 * 4 * options.layers * options.width * prompt["input_ids"].numel()
        yield f"{name}: {options.turns} pairs of generations and a warm-up, two caches of {size(cache / 2)}"
    count = len(cases) * 2 * (options.turns + 1) * options.tokens
    yield f"{count} tokens are generated; a step of this model takes as long as this machine reads its weights"


def run(options: Options, command: Sequence[str] = (), tell: Tell = lambda what, share: None) -> Document:
    """Measure every case; the document."""
    torch.set_num_threads(options.threads)
    model, cases = options.sizes.build(), options.cases
    twin = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    rows: dict[str, Any] = {}
    total, finished = len(cases) * (options.turns + 1), iter(range(1, 1 << 30))
    for name, (prompt, config) in cases.items():
        tell(name, len(rows) / len(cases))
        rows[name] = compare(
            (twin, model),
            prompt,
            config,
            options,
            lambda name=name: tell(name, next(finished) / total),  # type: ignore[misc]
        )
    return {
        "format": FORMAT,
        "command": list(command),
        "settings": dataclasses.asdict(options),
        "machine": machine.describe(torch.device("cpu"), options.threads),
        "rows": rows,
    }


def read(path: Path) -> Document:
    """Read a document; the first version wrote no format.

    Raises:
        ValueError: the file is no such document.
    """
    document = json.loads(path.read_text())
    if isinstance(document, dict) and "format" not in document and "settings" in document:
        return {"format": FORMAT, **document}
    return read_document(path, FORMAT, "mustdrop bench decode")


def sheet(document: Document) -> Sheet:
    """Milliseconds of each prompt, and their difference with its interval."""
    rows = []
    for name, row in document["rows"].items():
        plain, ours = row["decode_ms"].values()
        rows.append([name, f"{plain:.2f} ms", f"{ours:.2f} ms", _change(row)])
    about = note(document, "per decoded token", "95% intervals", document["machine"]["name"])
    return Sheet(["prompt", "plain", "with `drop_tokens`", "difference"], rows, about)


def _change(row: dict[str, Any]) -> str:
    middle, low, high = (100 * (value - 1) for value in (row["ratio"], *row["ratio_interval"]))
    return f"{middle:+.2f}% ({low:+.2f} to {high:+.2f})"
