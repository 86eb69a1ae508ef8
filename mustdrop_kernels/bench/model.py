# SPDX-License-Identifier: Apache-2.0
"""A whole LLaVA with and without dropping: time to first token, decode rate, memory, and where the time goes.

The model has the true configuration and random weights, so nothing is downloaded and times and bytes are real; what it
says is not. Random weights make the thresholds meaningless: the schedules have fixed budgets.

    python bench/e2e.py                                      # a narrow LLaVA-1.5 on a CPU: all layers, less width
    python bench/e2e.py --device cuda --model llava-1.5-7b --batch 1,32 --json bench/results/h200/e2e.json
    python bench/e2e.py --device cuda --model llava-1.5-7b --cache static --json bench/results/h200/e2e-static.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mustdrop_kernels.bench import machine, memory
from mustdrop_kernels.bench.generation import generate
from mustdrop_kernels.bench.timing import quartiles
from mustdrop_kernels.bench.units import duration, size
from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.files import write_text
from mustdrop_kernels.integrations.transformers import drop_tokens

TEXT_BEFORE, TEXT_AFTER = 35, 60
# width, MLP, heads and layers of the vision tower; the same of the language model; words
MODELS = {
    "llava-1.5-7b": ((1024, 4096, 16, 24), (4096, 11008, 32, 32), 32064),
    "llava-1.5-13b": ((1024, 4096, 16, 24), (5120, 13824, 40, 40), 32064),
    "llava-1.5-narrow": ((256, 1024, 4, 8), (512, 1376, 8, 32), 2048),
    "tiny": ((64, 128, 4, 4), (64, 128, 4, 16), 256),
}
SETTINGS = ("full", "192", "128", "64")


def build(name: str, dtype: torch.dtype, device: torch.device) -> LlavaForConditionalGeneration:
    """Random weights, 336 x 336 pixels in patches of 14: 576 of them."""
    tower, language, words = MODELS[name]
    patch = 14
    vision = CLIPVisionConfig(
        hidden_size=tower[0], intermediate_size=tower[1], num_attention_heads=tower[2], num_hidden_layers=tower[3],
        image_size=24 * patch, patch_size=patch, projection_dim=tower[0],
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=language[0], intermediate_size=language[1], num_attention_heads=language[2],
        num_key_value_heads=language[2], num_hidden_layers=language[3], vocab_size=words, max_position_embeddings=4096,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=words - 1, image_seq_length=576)
    torch.manual_seed(0)
    with torch.device(device):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = LlavaForConditionalGeneration(config).eval()
        finally:
            torch.set_default_dtype(previous)
    model.generation_config.eos_token_id = None  # every answer has the same length
    model.generation_config.pad_token_id = 0
    return model


def prompt(model: LlavaForConditionalGeneration, batch: int) -> dict[str, torch.Tensor]:
    """One picture and text around it, for each sequence."""
    config, parameter = model.config, next(model.parameters())
    g = torch.Generator().manual_seed(0)
    image = config.image_token_id if hasattr(config, "image_token_id") else config.image_token_index
    words = torch.randint(1, image - 1, (batch, TEXT_BEFORE + TEXT_AFTER), generator=g)
    places = torch.full((batch, 576), image)
    ids = torch.cat([words[:, :TEXT_BEFORE], places, words[:, TEXT_BEFORE:]], 1).to(parameter.device)
    edge = config.vision_config.image_size
    pixels = torch.randn(batch, 3, edge, edge, generator=g).to(parameter.device, parameter.dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def dropping(model: nn.Module, setting: str, depth: int) -> contextlib.AbstractContextManager[Any]:
    """The context of a setting; it yields the report, or None for "full"."""
    if setting == "full":
        return contextlib.nullcontext()
    return drop_tokens(model, MustDropConfig.preset(f"budget-{setting}").for_depth(depth))


@contextlib.contextmanager
def clocked(model: LlavaForConditionalGeneration) -> Iterator[dict[str, float]]:
    """Seconds in each part of the model while it is on. Waits for the device, so it is a run of its own."""
    body = model.model
    layers = body.language_model.layers
    parts: list[tuple[str, nn.Module]] = [
        ("vision tower", body.vision_tower),
        ("projector", body.multi_modal_projector),
    ]
    parts += [(f"language layers {i // 4 * 4}-{i // 4 * 4 + 3}", layer) for i, layer in enumerate(layers)]
    parts.append(("language head", model.lm_head))
    spent: dict[str, float] = {}
    begun: dict[nn.Module, float] = {}
    cuda = next(model.parameters()).is_cuda

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def before(module: nn.Module, args: Any) -> None:
        begun[module] = now()

    with contextlib.ExitStack() as stack:
        for name, module in parts:

            def after(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                spent[name] = spent.get(name, 0.0) + now() - begun[module]

            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after).remove)
        start = now()
        yield spent
        spent["everything else"] = now() - start - sum(spent.values())


def stages(model: Any, inputs: dict[str, torch.Tensor], setting: str, depth: int) -> dict[str, float]:
    """Milliseconds of reading the prompt, part by part. What dropping adds is named with a plus."""
    with dropping(model, setting, depth) as report, torch.inference_mode():
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        with clocked(model) as spent:
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
    found = {name: 1e3 * seconds for name, seconds in spent.items()}
    if report is not None:
        found |= {f"+ {name}": ms for name, ms in report.last.milliseconds.items()}
    return found


def measure(model: Any, batch: int, settings: list[str], new_tokens: int, repeats: int) -> list[dict[str, Any]]:
    """All settings in turn, again and again, so that drift of the machine hits each of them.

    Ctrl-C ends the rounds; what was measured counts where each setting was.
    """
    depth = model.config.text_config.num_hidden_layers
    device = next(model.parameters()).device
    inputs = prompt(model, batch)
    runs: dict[str, list[Any]] = {setting: [] for setting in settings}
    rows = {setting: {"setting": setting, "batch": batch} for setting in settings}
    for setting in settings:
        with dropping(model, setting, depth) as report:
            generate(model, inputs, 2)
            extra = memory.peak_extra(lambda: generate(model, inputs, new_tokens), device)
        rows[setting]["peak_extra_bytes"] = extra
        plain = _cache_bytes(model, batch, inputs["input_ids"].shape[1])
        rows[setting]["kv_bytes"] = plain if report is None else report.last.final_cache.bytes
        rows[setting]["mean_vision_tokens"] = 576.0 if report is None else report.last.mean_tokens
        rows[setting]["stages_ms"] = stages(model, inputs, setting, depth)
    try:
        for _ in range(repeats):
            for setting in settings:
                with dropping(model, setting, depth):
                    runs[setting].append(generate(model, inputs, new_tokens))
    except KeyboardInterrupt:
        if not all(runs.values()):
            raise
    for setting in settings:
        row, done = rows[setting], runs[setting]
        first = quartiles([run.prefill_ms for run in done])
        row |= {"first_token_ms": first[1], "first_token_q1_ms": first[0], "first_token_q3_ms": first[2]}
        row["decode_ms"] = statistics.median(run.decode_ms for run in done)
        row["decode_tokens_per_second"] = 1e3 * batch / row["decode_ms"]
        row["repeats"] = len(done)
    return list(rows.values())


def _cache_bytes(model: Any, batch: int, length: int) -> int:
    text = model.config.text_config
    return 2 * text.num_hidden_layers * batch * length * text.hidden_size * next(model.parameters()).element_size()


def show(document: dict[str, Any], console: Console) -> None:
    """Tables on the console."""
    about = document["machine"]
    for batch in dict.fromkeys(row["batch"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["batch"] == batch]
        table = Table(title=f"{document['model']}, random weights, {document['dtype']}, batch {batch}")
        names = ("kept", "mean tokens", "first token", "", "tokens/s", "", "KV cache", "peak memory")
        for name in names:
            table.add_column(name, justify="right")
        base = rows[0]
        for row in rows:
            table.add_row(
                row["setting"], f"{row['mean_vision_tokens']:.0f}", duration(1e3 * row["first_token_ms"]),
                f"{base['first_token_ms'] / row['first_token_ms']:.2f}x", f"{row['decode_tokens_per_second']:.1f}",
                f"{row['decode_tokens_per_second'] / base['decode_tokens_per_second']:.2f}x",
                size(row["kv_bytes"]), size(row["peak_extra_bytes"]),
            )  # fmt: skip
        console.print(table)
        console.print(_stage_table(rows))
    console.print(
        f"{about['name']}, {about['threads']} threads, torch {about['torch']}; {' '.join(document['command'])}"
    )
    console.print(
        "Random weights: times and bytes are real, the answers are not, so budgets are fixed. Peak memory: on top of "
        "the weights. Lines with a plus are what dropping adds; the lines above contain them."
    )


def markdown(document: dict[str, Any]) -> str:
    """What `show` shows of the whole model, for a README."""
    about = document["machine"]
    lines = [
        "| batch | vision tokens, mean over layers | first token | tokens/s | KV cache | peak beyond the weights |",
        "|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        base = next(one for one in document["rows"] if one["batch"] == row["batch"])
        first = base["first_token_ms"] / row["first_token_ms"]
        rate = row["decode_tokens_per_second"] / base["decode_tokens_per_second"]
        cells = [
            str(row["batch"]), f"{row['mean_vision_tokens']:.0f}",
            f"{duration(1e3 * row['first_token_ms'])} ({first:.2f}x)",
            f"{row['decode_tokens_per_second']:.1f} ({rate:.2f}x)",
            size(row["kv_bytes"]), size(row["peak_extra_bytes"]),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    where = f"{document['model']}, random weights, {document['dtype']}, {about['name']}, {about['threads']} threads"
    return "\n".join([*lines, "", f"*{where}, torch {about['torch']}; `{' '.join(document['command'])}`*"])


def _stage_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="reading the prompt, ms (a run of its own)")
    table.add_column("part")
    for row in rows:
        table.add_column(row["setting"], justify="right")
    for name in dict.fromkeys(name for row in rows for name in row["stages_ms"]):
        cells = [row["stages_ms"].get(name) for row in rows]
        table.add_row(name, *("" if ms is None else f"{ms:.2f}" for ms in cells))
    return table


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", choices=tuple(MODELS), help="default: narrow on a CPU, 7b on a GPU")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32, bfloat16 on a GPU"
    )
    parser.add_argument("--batch", default="1", help="such as 1,32")
    parser.add_argument("--tokens", default=",".join(SETTINGS), help="mean vision tokens: full, 192, 128, 64")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--cache", default="dynamic", choices=("dynamic", "static"),
        help="static: buffers of a fixed size; on a GPU transformers then compiles a decode step into a CUDA graph",
    )  # fmt: skip
    parser.add_argument("--json", type=Path)
    parser.add_argument("--load", type=Path, help="show this document instead of measuring anything")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    wish = parser.parse_args()
    settings = wish.tokens.split(",")
    if unknown := [setting for setting in settings if setting not in SETTINGS]:
        parser.error(f"--tokens: {', '.join(unknown)} unknown; there are {', '.join(SETTINGS)}")
    document = json.loads(wish.load.read_text()) if wish.load else run(wish, settings)
    if wish.json:
        write_text(wish.json, json.dumps(document, indent=1) + "\n")
    if wish.markdown:
        print(markdown(document))
    else:
        show(document, Console())


def run(wish: argparse.Namespace, settings: list[str]) -> dict[str, Any]:
    """Measures what the command line asks for; the document is written after each batch size."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit ends it as Ctrl-C does
    if wish.threads:
        torch.set_num_threads(wish.threads)
    device = torch.device(wish.device)
    name = wish.model or ("llava-1.5-narrow" if wish.device == "cpu" else "llava-1.5-7b")
    dtype = wish.dtype or ("float32" if wish.device == "cpu" else "bfloat16")
    about = machine.describe(device, torch.get_num_threads())
    model = build(name, getattr(torch, dtype), device)
    if wish.cache == "static":
        model.generation_config.cache_implementation = "static"
    document: dict[str, Any] = {
        "format": "mustdrop-e2e/1", "command": ["python", "bench/e2e.py", *sys.argv[1:]], "machine": about,
        "model": name, "dtype": dtype, "cache": wish.cache, "text_tokens": TEXT_BEFORE + TEXT_AFTER,
        "new_tokens": wish.new_tokens, "rows": [],
    }  # fmt: skip
    for batch in (int(text) for text in wish.batch.split(",")):
        document["rows"] += measure(model, batch, settings, wish.new_tokens, wish.repeats)
        if wish.json:
            write_text(wish.json, json.dumps(document, indent=1) + "\n")
    return document


if __name__ == "__main__":
    main()
