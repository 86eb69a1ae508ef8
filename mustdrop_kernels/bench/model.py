# SPDX-License-Identifier: Apache-2.0
"""A whole LLaVA with and without dropping: time to the first token, decode rate, memory, and the parts of the prefill.

The model has the real configuration and random weights: nothing is downloaded, times and bytes are real, answers are
not. Thresholds are meaningless with random weights, so the schedules have fixed budgets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config import MustDropConfig
from ..integrations.transformers import drop_tokens
from . import machine, memory
from .documents import Document, Keep, Sheet, Tell, note, reader
from .generation import generate
from .random_llava import GRID, MODELS
from .timing import quartiles
from .units import duration, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FORMAT = "mustdrop-e2e/1"
read = reader(FORMAT, "mustdrop bench model")
TEXT_BEFORE, TEXT_AFTER = 35, 60
PATCHES = GRID**2
SETTINGS = ("full", "192", "128", "64")
CACHES = ("dynamic", "static")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of ``mustdrop bench model``."""

    device: torch.device
    model: str  # a name of MODELS
    dtype: str
    batches: tuple[int, ...]
    settings: tuple[str, ...]  # of SETTINGS
    new_tokens: int
    repeats: int
    cache: str  # of CACHES; static: buffers of a fixed size, and on a GPU compiled decode steps

    def __post_init__(self) -> None:
        choices = {
            "model": ([self.model], MODELS),
            "tokens": (self.settings, SETTINGS),
            "cache": ([self.cache], CACHES),
        }
        for name, (values, there) in choices.items():
            if unknown := [value for value in values if value not in there]:
                raise ValueError(f"--{name}: there is no {unknown[0]!r}; there are {', '.join(there)}")


def prompt(model: Any, batch: int) -> dict[str, torch.Tensor]:
    """One picture and text around it, for each sequence."""
    config, parameter = model.config, next(model.parameters())
    g = torch.Generator().manual_seed(0)
    image = getattr(config, "image_token_id", None) or config.image_token_index
    words = torch.randint(1, image - 1, (batch, TEXT_BEFORE + TEXT_AFTER), generator=g)
    places = torch.full((batch, PATCHES), image)
    ids = torch.cat([words[:, :TEXT_BEFORE], places, words[:, TEXT_BEFORE:]], 1).to(parameter.device)
    edge = config.vision_config.image_size
    pixels = torch.randn(batch, 3, edge, edge, generator=g).to(parameter.device, parameter.dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def dropping(model: nn.Module, setting: str, depth: int) -> contextlib.AbstractContextManager[Any]:
    """The context of a setting, which yields the report, or None for "full"."""
    if setting == "full":
        return contextlib.nullcontext()
    return drop_tokens(model, MustDropConfig.preset(f"budget-{setting}").for_depth(depth))


@contextlib.contextmanager
def clocked(model: Any) -> Iterator[dict[str, float]]:
    """Seconds in each part of the model while the context is open. Synchronizes, so it needs a run of its own."""
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
    """Milliseconds of each part of the prefill; names of what dropping adds begin with a plus."""
    with dropping(model, setting, depth) as report, torch.inference_mode():
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        with clocked(model) as spent:
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
    found = {name: 1e3 * seconds for name, seconds in spent.items()}
    if report is not None:
        found |= {f"+ {name}": ms for name, ms in report.last.milliseconds.items()}
    return found


def measure(model: Any, batch: int, options: Options, tell: Tell) -> list[dict[str, Any]]:
    """Rows of all settings, measured alternately, so that drift of the machine affects all.

    Ctrl-C ends the rounds; the rows are those of the rounds before, if each setting has one.
    """
    depth = model.config.text_config.num_hidden_layers
    device = next(model.parameters()).device
    inputs = prompt(model, batch)
    settings, new_tokens = options.settings, options.new_tokens
    runs: dict[str, list[Any]] = {setting: [] for setting in settings}
    rows: dict[str, dict[str, Any]] = {setting: {"setting": setting, "batch": batch} for setting in settings}
    for setting in settings:
        tell(f"batch {batch}, {setting}: warm-up, memory, parts", 0.0)
        with dropping(model, setting, depth) as report:
            generate(model, inputs, 2)
            extra = memory.peak_extra(lambda: generate(model, inputs, new_tokens), device)
        rows[setting]["peak_extra_bytes"] = extra
        plain = _cache_bytes(model, batch, inputs["input_ids"].shape[1])
        rows[setting]["kv_bytes"] = plain if report is None else report.last.final_cache.bytes
        rows[setting]["mean_vision_tokens"] = float(PATCHES) if report is None else report.last.mean_tokens
        rows[setting]["stages_ms"] = stages(model, inputs, setting, depth)
    try:
        for number in range(options.repeats):
            tell(f"batch {batch}, round {number + 1} of {options.repeats}", number / options.repeats)
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


def plan_lines(options: Options) -> Iterator[str]:
    """Lines of a dry run."""
    sizes, dtype = MODELS[options.model], getattr(torch, options.dtype)
    weights = sizes.weights()
    yield f"{options.model}: {weights / 1e9:.2f} billion weights, {size(weights * dtype.itemsize)} in {options.dtype}"
    tokens = TEXT_BEFORE + PATCHES + TEXT_AFTER + options.new_tokens
    for batch in options.batches:
        cache = 2 * sizes.language.layers * sizes.language.width * dtype.itemsize * tokens * batch
        yield f"batch {batch}: a KV cache of {size(cache)} without dropping"
    generations = len(options.batches) * len(options.settings) * (options.repeats + 3)
    yield (
        f"{', '.join(options.settings)}: {options.repeats} rounds, a warm-up, a run for memory, one for the parts; "
        f"{generations} generations of {options.new_tokens} tokens"
    )


def run(
    options: Options,
    command: Sequence[str] = (),
    tell: Tell = lambda what, share: None,
    keep: Keep = lambda document: None,
) -> Document:
    """Measure every batch size; `keep` takes the document after each."""
    about = machine.describe(options.device, torch.get_num_threads())
    tell(f"making {options.model}", 0.0)
    model = MODELS[options.model].build(getattr(torch, options.dtype), options.device)
    if options.cache == "static":
        model.generation_config.cache_implementation = "static"
    document: Document = {
        "format": FORMAT, "command": list(command), "machine": about, "model": options.model, "dtype": options.dtype,
        "cache": options.cache, "text_tokens": TEXT_BEFORE + TEXT_AFTER, "new_tokens": options.new_tokens, "rows": [],
    }  # fmt: skip
    count = len(options.batches)
    for i, batch in enumerate(options.batches):
        document["rows"] += measure(
            model,
            batch,
            options,
            lambda what, share, i=i: tell(what, (i + share) / count),  # type: ignore[misc]
        )
        keep(document)
    return document


def show(document: Document, console: Console) -> None:
    """Print a table of the whole model and one of its parts for each batch size."""
    for batch in dict.fromkeys(row["batch"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["batch"] == batch]
        console.print(_table(document, rows))
        console.print(_stage_table(rows))
    threads = f"{document['machine']['threads']} threads"
    console.print(note(document, document["machine"]["name"], threads), markup=False, highlight=False)
    console.print(
        "Random weights: times and bytes are real, the answers are not, so budgets are fixed. Peak memory: on top of "
        "the weights. Lines with a plus are what dropping adds; the lines above contain them."
    )


def _table(document: Document, rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(title=f"{document['model']}, random weights, {document['dtype']}, batch {rows[0]['batch']}")
    for name in ("kept", "mean tokens", "first token", "", "tokens/s", "", "KV cache", "peak memory"):
        table.add_column(name, justify="right")
    for row in rows:
        first, rate = _factors(row, rows[0])
        table.add_row(
            row["setting"], f"{row['mean_vision_tokens']:.0f}", duration(1e3 * row["first_token_ms"]), first,
            f"{row['decode_tokens_per_second']:.1f}", rate, size(row["kv_bytes"]), size(row["peak_extra_bytes"]),
        )  # fmt: skip
    return table


def _factors(row: dict[str, Any], base: dict[str, Any]) -> tuple[str, str]:
    """Speed-up over another row: to the first token, and in decoding."""
    first = base["first_token_ms"] / row["first_token_ms"]
    return f"{first:.2f}x", f"{row['decode_tokens_per_second'] / base['decode_tokens_per_second']:.2f}x"


def sheet(document: Document) -> Sheet:
    """The whole model, a row for each setting and batch size."""
    rows = []
    for row in document["rows"]:
        first, rate = _factors(row, next(one for one in document["rows"] if one["batch"] == row["batch"]))
        rows.append([
            str(row["batch"]), f"{row['mean_vision_tokens']:.0f}",
            f"{duration(1e3 * row['first_token_ms'])} ({first})", f"{row['decode_tokens_per_second']:.1f} ({rate})",
            size(row["kv_bytes"]), size(row["peak_extra_bytes"]),
        ])  # fmt: skip
    columns = ["batch", "vision tokens, mean over layers", "first token", "tokens/s", "KV cache"]
    about = document["machine"]
    facts = document["model"], "random weights", document["dtype"], about["name"], f"{about['threads']} threads"
    return Sheet([*columns, "peak beyond the weights"], rows, note(document, *facts))


def _stage_table(rows: list[dict[str, Any]]) -> Table:
    lines = []
    for name in dict.fromkeys(name for row in rows for name in row["stages_ms"]):
        cells = [row["stages_ms"].get(name) for row in rows]
        lines.append([name, *("" if ms is None else f"{ms:.2f}" for ms in cells)])
    sheet = Sheet(["part", *(row["setting"] for row in rows)], lines, "")
    return sheet.table("prefill by parts, ms (a run of its own)")
