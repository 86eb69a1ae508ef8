# SPDX-License-Identifier: Apache-2.0
"""What ``drop_tokens`` costs a decode step: milliseconds and bytes of the cache, with it and without.

Four prompts: text alone inside the context against plain generation (what is attached and nothing else), an image that
keeps all its tokens, one that loses most of them, and two of those in a batch, one of which is padded, so that every
step has masks. Two models with the same weights decode in turn, a token each, so that a machine that slows down slows
neighbours alike; what is compared is each pair of them.

    python bench/overhead.py --threads 2 --json bench/results/cpu/overhead.json
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mustdrop_kernels.bench import machine
from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.files import write_text
from mustdrop_kernels.integrations.transformers import drop_tokens

IMAGE = 5
SIDE = 24


def build(layers: int, width: int) -> LlavaForConditionalGeneration:
    """LLaVA-1.5's depth and prompt, less width; random weights."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=4096,
        eos_token_id=None,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def inputs(image: bool) -> dict[str, torch.Tensor]:
    """60 tokens of text, and 576 of an image before them or not."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(10, 1000, (1, 60), generator=generator)
    if not image:
        return {"input_ids": text, "attention_mask": torch.ones_like(text)}
    ids = torch.cat([torch.full((1, SIDE * SIDE), IMAGE), text], 1)
    pixels = torch.randn(1, 3, 336, 336, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def padded() -> dict[str, torch.Tensor]:
    """Two prompts with an image; the second has 20 tokens of text less, and padding on its left."""
    whole = inputs(image=True)
    ids = torch.cat([whole["input_ids"], whole["input_ids"].roll(20, 1)])
    ids[1, :20] = 0
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": whole["pixel_values"].repeat(2, 1, 1, 1),
    }


class Turns:
    """Two generations, each in a thread, of which one runs at a time: they hand over after every token."""

    def __init__(self) -> None:
        self.seconds: tuple[list[float], list[float]] = ([], [])  # of each token; the first is the prompt's
        self._turn, self._done = 0, [False, False]
        self._changed = threading.Condition()

    def take(self, side: int) -> None:
        """Waits until it is this side's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._turn == side or self._done[1 - side])

    def hand_over(self, side: int, done: bool = False) -> None:
        """Lets the other side run."""
        with self._changed:
            self._turn, self._done[side] = 1 - side, done
            self._changed.notify_all()


class Side:
    """A streamer of transformers: hears of the prompt first, then of every token."""

    def __init__(self, turns: Turns, side: int) -> None:
        self.turns, self.side, self.since = turns, side, 0.0

    def put(self, tokens: torch.Tensor) -> None:
        """A token is there."""
        if self.since:
            self.turns.seconds[self.side].append(time.perf_counter() - self.since)
            self.turns.hand_over(self.side)
        self.turns.take(self.side)
        self.since = time.perf_counter()

    def end(self) -> None:
        """No other will come."""


def in_turns(models: Sequence[LlavaForConditionalGeneration], prompt: dict, tokens: int) -> list[list[float]]:
    """Milliseconds of each token after the first, of both models."""
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
    models: Sequence[LlavaForConditionalGeneration],
    prompt: dict,
    config: MustDropConfig,
    tokens: int,
    turns: int,
    step: Callable[[], None],
) -> dict:
    """Milliseconds per decoded token of a plain model and of one inside ``drop_tokens``, and their ratio by pairs.

    Calls `step` after each of turns + 1 generations.
    """
    times: tuple[list[float], list[float]] = ([], [])
    with drop_tokens(models[1], config) as report:
        for turn in range(turns + 1):
            found = in_turns(models, prompt, tokens)
            if turn:  # the first warms up
                for side, more in zip(times, found, strict=True):
                    side.extend(more)
            step()
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
    """Values between which the median lies with a confidence of 95%: order statistics, no shape assumed."""
    values, count = sorted(values), len(values)
    tail, rank = 0.0, 0  # P(rank or fewer of the values lie below the median) = tail
    while rank < count // 2 and tail + math.comb(count, rank) / 2**count <= 0.025:
        tail += math.comb(count, rank) / 2**count
        rank += 1
    rank = max(rank - 1, 0)
    return values[rank], values[count - 1 - rank]


def markdown(document: dict) -> str:
    """The rows as a table."""
    lines = ["| prompt | plain | with `drop_tokens` | difference |", "|---|---|---|---|"]
    for name, row in document["rows"].items():
        plain, ours = row["decode_ms"].values()
        lines.append(f"| {name} | {plain:.2f} ms | {ours:.2f} ms | {_change(row)} |")
    about = document["machine"]
    command = document["command"]
    lines += ["", f"*per decoded token, 95% intervals, {about['name']}, torch {about['torch']}; `{command}`*"]
    return "\n".join(lines)


def _change(row: dict) -> str:
    middle, low, high = (100 * (value - 1) for value in (row["ratio"], *row["ratio_interval"]))
    return f"{middle:+.2f}% ({low:+.2f} to {high:+.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--load", type=Path, help="measure nothing; print the table of such a file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--turns", type=int, default=7, help="generations of each prompt")
    options = parser.parse_args()
    if options.load:
        print(markdown(json.loads(options.load.read_text())))
        return
    torch.set_num_threads(options.threads)
    model = build(options.layers, options.width)
    twin = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    keep_all = MustDropConfig.preset("keep-all").for_depth(options.layers)
    budget = MustDropConfig.preset("budget-64").for_depth(options.layers)
    cases = {
        "text alone": (inputs(image=False), budget),
        "image, all kept": (inputs(image=True), keep_all),
        "image, budget-64": (inputs(image=True), budget),
        "two images, one padded, budget-64": (padded(), budget),
    }
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    rows = {}
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(cases) * (options.turns + 1))
        for name, case in cases.items():
            progress.update(task, description=name)
            rows[name] = compare((twin, model), *case, options.tokens, options.turns, lambda: progress.advance(task))
    settings = {key: value for key, value in vars(options).items() if key not in ("json", "load")}
    document = {
        "command": shlex.join(["python", *sys.argv]),
        "settings": settings,
        "machine": machine.describe(torch.device("cpu"), options.threads),
        "rows": rows,
    }
    print(markdown(document))
    if options.json:
        write_text(options.json, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
