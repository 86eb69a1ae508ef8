# SPDX-License-Identifier: Apache-2.0
"""``mustdrop demo``: a question about an image to a LLaVA, with and without MustDrop, and a picture of the tokens."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from .. import backends
from ..errors import Refusal
from ..evaluation.checkpoint import (
    DEMO_PROMPT,
    SMALL,
    Checkpoint,
    chosen_config,
    default_preset,
    load_image,
    load_model,
    made_question,
    quiet_transformers,
    require_extras,
)
from ..files import write_text

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..bench.generation import Runs
    from ..config import MustDropConfig
    from ..report import PromptReport, Report

PICTURE = "mustdrop_demo.png"
REPORT = "mustdrop_report.json"
_WARM_UP_TOKENS = 2
_REPEATS = 3
_LONG_S = 30.0  # a model whose warm-up takes longer than this is measured once


@dataclass(frozen=True)
class DemoOptions:
    """Options of the command line."""

    image: Path | None = None
    prompt: str | None = None
    model: str | None = None
    preset: str | None = None
    backend: str | None = None
    out: Path = Path("out")
    max_new_tokens: int = 24
    seed: int = 0


@dataclass(frozen=True)
class DemoResult:
    """Answers, times and the report of both generations."""

    options: DemoOptions
    checkpoint: Checkpoint
    image: str
    question: str
    truth: str | None
    preset: str
    report: Report
    plain: Runs
    dropped: Runs
    repeats: int
    picture: Path
    report_file: Path

    @property
    def prompt(self) -> PromptReport:
        """The measured prompt."""
        return self.report.last

    @property
    def answers(self) -> tuple[str, str]:
        """Plain, with MustDrop."""
        decode = self.checkpoint.processor.tokenizer.decode
        plain, dropped = (decode(run.tokens, skip_special_tokens=True) for run in (self.plain, self.dropped))
        return plain.strip(), dropped.strip()

    @property
    def same_tokens(self) -> int:
        """Length of the common prefix of the two answers, in tokens."""
        pairs = list(zip(self.plain.tokens, self.dropped.tokens, strict=False))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def run(options: DemoOptions, progress: Callable[[str], None]) -> DemoResult:
    """Run the demo; `progress` is called with each step.

    Raises:
        Refusal: the options cannot be served.
    """
    config = chosen_config(options.model, options.preset, options.backend)
    require_extras()
    image, credit, question, truth = _question(options)
    device = _device(config)
    _make_folder(options.out)

    progress("loading transformers")
    from ..integrations.transformers import drop_tokens

    quiet_transformers()
    progress(f"loading {options.model or SMALL}")
    checkpoint = load_model(options.model, device)
    layers = checkpoint.model.config.text_config.num_hidden_layers
    config = config.for_depth(layers)
    inputs = checkpoint.inputs([image], question)
    try:
        with drop_tokens(checkpoint.model, config):
            pass
    except (TypeError, ValueError) as error:
        raise Refusal(f"{checkpoint.name}: {error}") from None

    plain, dropped, report, repeats = _measure(checkpoint, inputs, config, options.max_new_tokens, progress)
    progress("drawing")
    picture, maps = options.out / PICTURE, options.out / REPORT
    preset = options.preset or default_preset(options.model)
    result = DemoResult(
        options, checkpoint, credit, question, truth, preset, report, plain, dropped, repeats, picture, maps
    )
    _draw(result, checkpoint.seen(inputs["pixel_values"]))
    write_text(result.report_file, json.dumps(report.to_dict()) + "\n")
    return result


def _question(options: DemoOptions) -> tuple[Image, str, str, str | None]:
    """Picture, its name, question, right answer if known."""
    if options.model is None and options.image is None:
        image, credit, question, truth = made_question(options.seed)
        return image, credit, options.prompt or question, truth if options.prompt is None else None
    return *load_image(options.image), options.prompt or DEMO_PROMPT, None


def _device(config: MustDropConfig) -> str:
    """The GPU if a backend serves it, else the CPU."""
    import torch

    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    reasons = {}
    for device in devices:
        refused = next(filter(None, (_refused(op, device, config.backend) for op in backends.OPS)), None)
        if refused is None:
            return device
        reasons[device] = refused
    reason = "; ".join(f"on {device} {reason}" for device, reason in reasons.items())
    hint = "" if config.backend else "; --backend reference runs without the library"
    raise Refusal(f"{reason}{hint}")


def _refused(op: str, device: str, backend: str | None) -> str | None:
    """The reason why an operator does not run on a device; None if it does."""
    name = backend or backends.serving(op, device)
    if name is None:
        return f"no backend serves {op} (`mustdrop doctor` gives the reasons)"
    reason = backends.get(name).why_not(op, device)
    return f"{name}: {reason}" if reason else None


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f"--out: {folder} cannot be made: {error.strerror}") from None


def _measure(
    checkpoint: Checkpoint, inputs: Any, config: MustDropConfig, max_new_tokens: int, progress: Callable[[str], None]
) -> tuple[Runs, Runs, Report, int]:
    """Generates plainly and with MustDrop alternately, after a warm-up of each, so that drift affects both."""
    from ..bench import generation
    from ..integrations.transformers import drop_tokens

    def with_mustdrop(tokens: int) -> tuple[generation.Run, Report]:
        with drop_tokens(checkpoint.model, config) as report:
            return generation.generate(checkpoint.model, inputs, tokens), report

    progress("warming up")
    begin = time.perf_counter()
    generation.generate(checkpoint.model, inputs, _WARM_UP_TOKENS)
    repeats = 1 if time.perf_counter() - begin > _LONG_S else _REPEATS
    with_mustdrop(_WARM_UP_TOKENS)
    plain, dropped = [], []
    for turn in range(1, repeats + 1):
        progress(f"plain generation, run {turn} of {repeats}")
        plain.append(generation.generate(checkpoint.model, inputs, max_new_tokens))
        progress(f"generation with MustDrop, run {turn} of {repeats}")
        found, report = with_mustdrop(max_new_tokens)
        dropped.append(found)
    return generation.Runs.of(plain), generation.Runs.of(dropped), report, repeats


def _draw(result: DemoResult, image: Any) -> None:
    from ..report.plots import draw_stages, save

    first = result.prompt.images[0]
    left = list(first.kept.values())[-1] if first.kept else first.tokens
    plain, final = result.prompt.plain_cache.bytes, result.prompt.final_cache.bytes
    title = f"MustDrop: {first.patches} image tokens become {left}, the KV cache shrinks {plain / final:.1f} times"
    plain_answer, answer = result.answers
    note = f"{result.question} With all tokens: {plain_answer!r}. With MustDrop: {answer!r}."
    note += "" if result.truth is None else f" Right: {result.truth!r}."
    note += f"\nPreset {result.preset}. Image: {result.image}.\nModel: {result.checkpoint.description}."
    save(draw_stages(image, result.prompt, title=title, footnote=note), result.picture)


# --------------------------------------------------------------------------------------------------------- results


def to_dict(result: DemoResult) -> dict[str, Any]:
    """Plain JSON types. The maps of the picture are in the report's file."""
    from ..bench.generation import WHAT

    prompt = result.prompt
    image = prompt.images[0]
    caches = {"plain": prompt.plain_cache, "before_stage_3": prompt.prefill_cache, "after_stage_3": prompt.final_cache}
    plain, dropped = result.answers
    return {
        "model": {
            "name": result.checkpoint.name,
            "description": result.checkpoint.description,
        },
        "image": result.image,
        "prompt": result.question,
        "preset": result.preset,
        "config": result.report.config.to_dict(),
        "tokens": {
            "patches": image.patches,
            "merged_windows": len(image.windows),
            "after_merge": image.tokens,
            "key_tokens": image.key_tokens,
            "after_layer": {str(layer): kept for layer, kept in image.kept.items()},
            "mean_per_layer": prompt.mean_tokens,
        },
        "kv_cache": {name: {"bytes": cache.bytes, "lengths": cache.lengths} for name, cache in caches.items()},
        "timing": {
            "what": f"{WHAT}; milliseconds, of {result.repeats} run(s) after a warm-up",
            "runs": result.repeats,
            "plain": _times(result.plain),
            "mustdrop": _times(result.dropped),
            "stages_ms": prompt.milliseconds,
        },
        "answers": {
            "right": result.truth,
            "plain": plain,
            "mustdrop": dropped,
            "same_tokens": result.same_tokens,
        },
        "files": {"picture": str(result.picture), "report": str(result.report_file)},
    }


def _times(runs: Runs) -> dict[str, Any]:
    decode = None if runs.decode is None else dataclasses.asdict(runs.decode)
    return {"prefill_ms": dataclasses.asdict(runs.prefill), "decode_ms_per_token": decode}


def show(result: DemoResult, console: Console) -> None:
    """The tables."""
    console.print(f"\n[bold]MustDrop[/], preset {result.preset}, on {escape(result.image)}")
    console.print(f"Model: {escape(result.checkpoint.description)}", highlight=False)
    right = "" if result.truth is None else f"    Right answer: [bold]{escape(result.truth)}[/]"
    console.print(f"Question: [bold]{escape(result.question)}[/]{right}", highlight=False)
    console.print(Group("", result.report.table(result.prompt), "", _comparison(result)))
    console.print(f"\nPicture: [bold]{result.picture}[/]    maps and counts: {result.report_file}", soft_wrap=True)


def _comparison(result: DemoResult) -> Table:
    from ..bench.generation import WHAT

    caption = f"{WHAT}. Fastest of {result.repeats} run(s) after a warm-up."  # the least disturbed run
    table = Table(title="Plain generation and MustDrop", caption=caption, caption_justify="left")
    table.add_column("")
    table.add_column("plain", overflow="fold")
    table.add_column("MustDrop", overflow="fold")

    def row(name: str, plain: float, dropped: float, unit: str) -> None:
        table.add_row(name, f"{plain:.1f} {unit}", f"{dropped:.1f} {unit}, {_ratio(plain, dropped)}")

    row("KV cache", result.prompt.plain_cache.bytes / 1e6, result.prompt.final_cache.bytes / 1e6, "MB")
    row("prefill", result.plain.prefill.least, result.dropped.prefill.least, "ms")
    if result.plain.decode is not None and result.dropped.decode is not None:
        row("decode, per token", result.plain.decode.least, result.dropped.decode.least, "ms")
    table.add_section()
    plain, dropped = result.answers
    table.add_row("answer", escape(plain), escape(dropped))
    table.add_row("", "", f"[dim]{_agreement(result)}[/]")
    return table


def _ratio(plain: float, dropped: float) -> str:
    if max(plain, dropped) < 1.05 * min(plain, dropped):
        return "about the same"
    return f"{plain / dropped:.1f} times less" if plain > dropped else f"{dropped / plain:.1f} times more"


def _agreement(result: DemoResult) -> str:
    same, tokens = result.same_tokens, max(len(result.plain.tokens), len(result.dropped.tokens))
    return "the same" if same == tokens else f"the first {same} of {tokens} tokens are the same"
