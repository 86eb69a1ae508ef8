# SPDX-License-Identifier: Apache-2.0
"""``mustdrop inspect``: merged and dropped tokens of a prompt's pictures, as one self-contained page of HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Refusal, first_line
from ..evaluation.checkpoint import (
    DEMO_PROMPT,
    Checkpoint,
    chosen_config,
    load_image,
    load_model,
    made_question,
    require_extras,
)
from ..files import write_text
from ..report.html import Page

if TYPE_CHECKING:
    import numpy as np

    from ..config import MustDropConfig
    from ..report import PromptReport


@dataclass(frozen=True)
class InspectOptions:
    """Options of the command line."""

    images: Sequence[Path] = ()
    prompt: str | None = None
    model: str | None = None
    preset: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    backend: str | None = None
    out: Path = Path("page.html")
    max_new_tokens: int = 24
    seed: int = 0


@dataclass(frozen=True)
class InspectResult:
    """Contents of the page."""

    model: str
    question: str
    prompt: PromptReport
    config: MustDropConfig
    answers: tuple[str, str]
    page: Path


def run(options: InspectOptions, progress: Callable[[str], None]) -> InspectResult:
    """Generate with and without dropping and write the page; `progress` is called with each step.

    Raises:
        Refusal: the options cannot be served.
    """
    require_extras()
    config = chosen_config(options.model, options.preset, options.backend, **options.settings)
    pictures, question = _question(options)
    progress("loading the model")
    subject = _load(options)
    model, name = subject.model, subject.name
    config = config.for_depth(model.config.text_config.num_hidden_layers)
    inputs = subject.inputs([image for image, _ in pictures], question)

    from ..integrations.transformers import drop_tokens

    progress("plain generation")
    plain = _generate(model, inputs, options.max_new_tokens)
    progress("generation with MustDrop")
    try:
        with drop_tokens(model, config, heat_maps=True) as report:
            dropped = _generate(model, inputs, options.max_new_tokens)
    except (TypeError, ValueError) as error:
        raise Refusal(f"{name}: {error}") from None

    progress("drawing")
    before, after = (
        subject.processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in (plain, dropped)
    )
    result = InspectResult(name, question, report.last, config, (before, after), options.out)
    _write(result, options, [credit for _, credit in pictures], _seen(subject, inputs, pictures), report)
    return result


def _question(options: InspectOptions) -> tuple[list[tuple[Any, str]], str]:
    """Pictures with their names, and the question; by default generated ones for the small model."""
    if options.model is None and not options.images:
        image, credit, question, _ = made_question(options.seed)
        return [(image, credit)], options.prompt or question
    paths: list[Path | None] = [*options.images] or [None]
    return [load_image(path) for path in paths], options.prompt or DEMO_PROMPT


def _load(options: InspectOptions) -> Checkpoint:
    """A checkpoint of any model; by default the small one of the package, named by its description."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.model is None:
        subject = load_model(None, device)
        return replace(subject, name=subject.description)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto", use_safetensors=True).eval()
        processor = AutoProcessor.from_pretrained(options.model)
    except Exception as error:  # a broken checkpoint may raise anything
        raise Refusal(f"--model: {options.model} cannot be loaded: {first_line(error)}") from error
    return Checkpoint(model.to(device), processor, options.model)


def _generate(model: Any, inputs: Any, max_new_tokens: int) -> list[int]:
    import torch

    with torch.inference_mode():
        sequences = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    ids: list[int] = sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return ids


def _seen(subject: Checkpoint, inputs: Any, pictures: list[tuple[Any, str]]) -> list[np.ndarray]:
    """The pictures as inputs of the model: cropped for LLaVA-1.5, whole for other models."""
    import numpy as np

    if subject.model.config.model_type != "llava":
        return [np.asarray(image) for image, _ in pictures]
    return [subject.seen(pixels[None]) for pixels in inputs["pixel_values"]]


def _write(
    result: InspectResult, options: InspectOptions, credits: list[str], pictures: list[np.ndarray], report: Any
) -> None:
    """Write the page: question, answers, the table, and for each image its tokens and its attention."""
    prompt, config = result.prompt, result.config
    page = Page("MustDrop: what became of this prompt")
    page.facts(
        {
            "model": result.model,
            "images": ", ".join(credits),
            "prompt": result.question,
            "answer, plain": result.answers[0],
            "answer, with MustDrop": result.answers[1],
        }
    )
    plain, final = prompt.plain_cache.bytes, prompt.final_cache.bytes
    page.heading("What was saved")
    page.facts(
        {
            "vision tokens of an image, mean over layers": f"{prompt.mean_tokens:.1f}",
            "KV cache": f"{plain / 1e6:.2f} MB became {final / 1e6:.2f} MB",
        }
    )
    page.table(*report.rows())
    for number, image in enumerate(prompt.images):
        # InternVL's tiles are separate images: the page shows their picture.
        picture = pictures[min(number * len(pictures) // len(prompt.images), len(pictures) - 1)]
        page.heading(f"{image.modality.capitalize()} {number + 1}")
        page.figure(report.plot(picture, index=number), f"what was dropped from {image.modality} {number + 1}")
        page.figure(report.plot_attention(picture, index=number), f"attention to {image.modality} {number + 1}")
    page.heading("Settings")
    page.facts({name: str(value) for name, value in config.to_dict().items()})
    try:
        write_text(options.out, page.html())
    except OSError as error:
        raise Refusal(f"--out: {options.out} cannot be written: {error.strerror}") from None
