# SPDX-License-Identifier: Apache-2.0
"""``mustdrop demo``: one image through a LLaVA, plainly and with MustDrop, side by side, and a picture of it."""

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
from ..config import MustDropConfig
from ..errors import Refusal
from ..evaluation.checkpoint import (
    SMALL,
    Subject,
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
    from ..report import PromptReport, Report

PICTURE = "mustdrop_demo.png"
REPORT = "mustdrop_report.json"
PRESET, SMALL_PRESET = "192", "small-64"
PROMPT = "What is in the image?"
_WARM_UP_TOKENS = 2
_REPEATS = 3
_LONG_S = 30.0  # a model whose warm-up takes longer than this is measured once


@dataclass(frozen=True)
class Wish:
    """The command line."""

    image: Path | None = None
    prompt: str | None = None
    model: str | None = None
    preset: str | None = None
    backend: str | None = None
    out: Path = Path("out")
    max_new_tokens: int = 24
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What the demo found."""

    wish: Wish
    subject: Subject
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
        decode = self.subject.processor.tokenizer.decode
        plain, dropped = (decode(run.tokens, skip_special_tokens=True) for run in (self.plain, self.dropped))
        return plain.strip(), dropped.strip()

    @property
    def same_tokens(self) -> int:
        """How many tokens the two answers begin with in common."""
        pairs = list(zip(self.plain.tokens, self.dropped.tokens, strict=False))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def run(wish: Wish, step: Callable[[str], None]) -> Outcome:
    """The demo. `step` is told what comes next.

    Raises:
        Refusal: something that was asked for cannot be done.
    """
    config = _config(wish)
    require_extras()
    image, credit, question, truth = _question(wish)
    device = _device(config)
    _make_folder(wish.out)

    step("loading transformers")
    from ..integrations.transformers import drop_tokens

    quiet_transformers()
    step(f"loading {wish.model or SMALL}")
    subject = load_model(wish.model, device)
    layers = subject.model.config.text_config.num_hidden_layers
    config = config.for_depth(layers)
    inputs = subject.inputs(image, question)
    try:
        with drop_tokens(subject.model, config):
            pass
    except (TypeError, ValueError) as error:
        raise Refusal(f"{subject.name}: {error}") from None

    plain, dropped, report, repeats = _measure(subject, inputs, config, wish.max_new_tokens, step)
    step("drawing")
    picture, maps = wish.out / PICTURE, wish.out / REPORT
    outcome = Outcome(
        wish, subject, credit, question, truth, _preset(wish), report, plain, dropped, repeats, picture, maps
    )
    _draw(outcome, subject.seen(inputs["pixel_values"]))
    write_text(outcome.report_file, json.dumps(report.to_dict()) + "\n")
    return outcome


def _question(wish: Wish) -> tuple[Image, str, str, str | None]:
    """Picture, what to call it, question, right answer where it is known."""
    if wish.model is None and wish.image is None:
        image, credit, question, truth = made_question(wish.seed)
        return image, credit, wish.prompt or question, truth if wish.prompt is None else None
    return *load_image(wish.image), wish.prompt or PROMPT, None


def _preset(wish: Wish) -> str:
    return wish.preset or (PRESET if wish.model else SMALL_PRESET)


def _config(wish: Wish) -> MustDropConfig:
    names = list(MustDropConfig.presets())
    if _preset(wish) not in names:
        raise Refusal(f"--preset: there is no {wish.preset!r}; there are {', '.join(names)}")
    if wish.backend is not None and wish.backend not in backends.registered():
        raise Refusal(f"--backend: there is no {wish.backend!r}; there are {', '.join(backends.registered())}")
    return MustDropConfig.preset(_preset(wish), backend=wish.backend)


def _device(config: MustDropConfig) -> str:
    """The GPU where a backend serves it, else the CPU."""
    import torch

    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    reasons = {}
    for device in devices:
        refused = next(filter(None, (_refused(op, device, config.backend) for op in backends.OPS)), None)
        if refused is None:
            return device
        reasons[device] = refused
    told = "; ".join(f"on {device} {reason}" for device, reason in reasons.items())
    hint = "" if config.backend else "; --backend reference runs without the library"
    raise Refusal(f"{told}{hint}")


def _refused(op: str, device: str, backend: str | None) -> str | None:
    """Why an operator does not run on a device, None where it does."""
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
    subject: Subject, inputs: Any, config: MustDropConfig, max_new_tokens: int, step: Callable[[str], None]
) -> tuple[Runs, Runs, Report, int]:
    """Both ways in turn, after a warm-up of each, so that a busy machine slows both alike."""
    from ..bench import generation
    from ..integrations.transformers import drop_tokens

    def with_mustdrop(tokens: int) -> tuple[generation.Run, Report]:
        with drop_tokens(subject.model, config) as report:
            return generation.generate(subject.model, inputs, tokens), report

    step("warming up")
    begin = time.perf_counter()
    generation.generate(subject.model, inputs, _WARM_UP_TOKENS)
    repeats = 1 if time.perf_counter() - begin > _LONG_S else _REPEATS
    with_mustdrop(_WARM_UP_TOKENS)
    plain, dropped = [], []
    for turn in range(1, repeats + 1):
        step(f"plain generation, run {turn} of {repeats}")
        plain.append(generation.generate(subject.model, inputs, max_new_tokens))
        step(f"generation with MustDrop, run {turn} of {repeats}")
        found, report = with_mustdrop(max_new_tokens)
        dropped.append(found)
    return generation.Runs.of(plain), generation.Runs.of(dropped), report, repeats


def _draw(outcome: Outcome, image: Any) -> None:
    from ..report.plots import draw_stages, save

    first = outcome.prompt.images[0]
    left = list(first.kept.values())[-1] if first.kept else first.tokens
    plain, final = outcome.prompt.plain_cache.bytes, outcome.prompt.final_cache.bytes
    title = f"MustDrop: {first.patches} image tokens become {left}, the KV cache shrinks {plain / final:.1f} times"
    plain_answer, answer = outcome.answers
    note = f"{outcome.question} With all tokens: {plain_answer!r}. With MustDrop: {answer!r}."
    note += "" if outcome.truth is None else f" Right: {outcome.truth!r}."
    note += f"\nPreset {outcome.preset}. Image: {outcome.image}. Model: {outcome.subject.description}."
    save(draw_stages(image, outcome.prompt, title=title, footnote=note), outcome.picture)


# --------------------------------------------------------------------------------------------------------- results


def to_dict(outcome: Outcome) -> dict[str, Any]:
    """Plain JSON types. The maps of the picture are in the report's file."""
    from ..bench.generation import WHAT

    prompt = outcome.prompt
    image = prompt.images[0]
    caches = {"plain": prompt.plain_cache, "before_stage_3": prompt.prefill_cache, "after_stage_3": prompt.final_cache}
    plain, dropped = outcome.answers
    return {
        "model": {
            "name": outcome.subject.name,
            "description": outcome.subject.description,
        },
        "image": outcome.image,
        "prompt": outcome.question,
        "preset": outcome.preset,
        "config": outcome.report.config.to_dict(),
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
            "what": f"{WHAT}; milliseconds, of {outcome.repeats} run(s) after a warm-up",
            "runs": outcome.repeats,
            "plain": _times(outcome.plain),
            "mustdrop": _times(outcome.dropped),
            "stages_ms": prompt.milliseconds,
        },
        "answers": {
            "right": outcome.truth,
            "plain": plain,
            "mustdrop": dropped,
            "same_tokens": outcome.same_tokens,
        },
        "files": {"picture": str(outcome.picture), "report": str(outcome.report_file)},
    }


def _times(runs: Runs) -> dict[str, Any]:
    decode = None if runs.decode is None else dataclasses.asdict(runs.decode)
    return {"prefill_ms": dataclasses.asdict(runs.prefill), "decode_ms_per_token": decode}


def show(outcome: Outcome, console: Console) -> None:
    """The tables."""
    console.print(f"\n[bold]MustDrop[/], preset {outcome.preset}, on {escape(outcome.image)}")
    console.print(f"Model: {escape(outcome.subject.description)}", highlight=False)
    right = "" if outcome.truth is None else f"    Right answer: [bold]{escape(outcome.truth)}[/]"
    console.print(f"Question: [bold]{escape(outcome.question)}[/]{right}", highlight=False)
    console.print(Group("", outcome.report.table(outcome.prompt), "", _comparison(outcome)))
    console.print(f"\nPicture: [bold]{outcome.picture}[/]    maps and counts: {outcome.report_file}", soft_wrap=True)


def _comparison(outcome: Outcome) -> Table:
    from ..bench.generation import WHAT

    caption = f"{WHAT}. Fastest of {outcome.repeats} run(s) after a warm-up."  # what a busy machine disturbs least
    table = Table(title="Plain generation and MustDrop", caption=caption, caption_justify="left")
    table.add_column("")
    table.add_column("plain", overflow="fold")
    table.add_column("MustDrop", overflow="fold")

    def row(name: str, plain: float, dropped: float, unit: str) -> None:
        table.add_row(name, f"{plain:.1f} {unit}", f"{dropped:.1f} {unit}, {_ratio(plain, dropped)}")

    row("KV cache", outcome.prompt.plain_cache.bytes / 1e6, outcome.prompt.final_cache.bytes / 1e6, "MB")
    row("prefill", outcome.plain.prefill.least, outcome.dropped.prefill.least, "ms")
    if outcome.plain.decode is not None and outcome.dropped.decode is not None:
        row("decode, per token", outcome.plain.decode.least, outcome.dropped.decode.least, "ms")
    table.add_section()
    plain, dropped = outcome.answers
    table.add_row("answer", escape(plain), escape(dropped))
    table.add_row("", "", f"[dim]{_agreement(outcome)}[/]")
    return table


def _ratio(plain: float, dropped: float) -> str:
    if max(plain, dropped) < 1.05 * min(plain, dropped):
        return "about the same"
    return f"{plain / dropped:.1f} times less" if plain > dropped else f"{dropped / plain:.1f} times more"


def _agreement(outcome: Outcome) -> str:
    same, tokens = outcome.same_tokens, max(len(outcome.plain.tokens), len(outcome.dropped.tokens))
    return "the same" if same == tokens else f"the first {same} of {tokens} tokens are the same"
