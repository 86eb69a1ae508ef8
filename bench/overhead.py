# SPDX-License-Identifier: Apache-2.0
"""What ``drop_tokens`` costs a decode step: milliseconds and bytes of the cache, with it and without.

Four prompts: text alone inside the context against plain generation (what is attached and nothing else), an image that
keeps all its tokens, one that loses most of them, and two of those in a batch, one of which is padded, so that every
step has masks. Both sides run in turn, so that a busy machine slows both alike.

    python bench/overhead.py --threads 2 --json bench/results/cpu/overhead.json
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mustdrop_kernels.bench import machine
from mustdrop_kernels.cli import measure
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


def compare(
    model: LlavaForConditionalGeneration,
    prompt: dict,
    config: MustDropConfig,
    tokens: int,
    turns: int,
    step: Callable[[], None],
) -> dict:
    """Milliseconds per decoded token, and their ratio in neighbouring runs, which a busy machine slows alike.

    Calls `step` after each run, 2 * (turns + 1) times.
    """
    times: dict[str, list[float]] = {"plain": [], "drop_tokens": []}
    cache = None
    for turn in range(turns + 1):
        for side in ("plain", "drop_tokens") if turn % 2 else ("drop_tokens", "plain"):
            with contextlib.ExitStack() as stack:
                report = stack.enter_context(drop_tokens(model, config)) if side == "drop_tokens" else None
                decode_ms = statistics.median(step_ms(model, prompt, tokens))
            if turn:  # the first warms up
                times[side].append(decode_ms)
            step()
            if report is not None and report.prompts:
                cache = {"plain": report.last.plain_cache.bytes, "drop_tokens": report.last.final_cache.bytes}
    ratios = [ours / plain for plain, ours in zip(times["plain"], times["drop_tokens"], strict=True)]
    return {
        "decode_ms": {side: statistics.median(values) for side, values in times.items()},
        "ratio": statistics.median(ratios),
        "ratio_interval": median_interval(ratios),
        "cache_bytes": cache,
    }


def step_ms(model: LlavaForConditionalGeneration, prompt: dict, tokens: int) -> list[float]:
    """Of each token after the first; their median does not see the step in which something else ran."""
    clock = measure.Clock()
    with torch.inference_mode():
        model.generate(**prompt, max_new_tokens=tokens, do_sample=False, streamer=clock)
    return [1000 * (after - before) for before, after in itertools.pairwise(clock.times)]


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
    lines += ["", f"*per decoded token, 95% intervals, {about['name']}, {document['settings']['threads']} threads*"]
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
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--turns", type=int, default=31)
    options = parser.parse_args()
    if options.load:
        print(markdown(json.loads(options.load.read_text())))
        return
    torch.set_num_threads(options.threads)
    model = build(options.layers, options.width)
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
        task = progress.add_task("", total=len(cases) * 2 * (options.turns + 1))
        for name, case in cases.items():
            progress.update(task, description=name)
            rows[name] = compare(model, *case, options.tokens, options.turns, lambda: progress.advance(task))
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
