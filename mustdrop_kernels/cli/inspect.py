# SPDX-License-Identifier: Apache-2.0
"""``mustdrop inspect``: merged and dropped tokens of a prompt's pictures, as one self-contained page of HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import backends
from ..config import MustDropConfig
from ..errors import Refusal
from ..evaluation.checkpoint import load_image, load_model, made_question, require_extras
from ..files import write_text
from ..report.html import Page

if TYPE_CHECKING:
    import numpy as np

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


PRESET, SMALL_PRESET = "192", "small-64"
PROMPT = "What is in the image?"


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
    config = _config(options)
    pictures, question = _question(options)
    progress("loading the model")
    model, processor, name = _load(options)
    config = config.for_depth(model.config.text_config.num_hidden_layers)
    inputs = _inputs(model, processor, question, [image for image, _ in pictures])

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
    before, after = (processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in (plain, dropped))
    result = InspectResult(name, question, report.last, config, (before, after), options.out)
    _write(result, options, [credit for _, credit in pictures], _seen(model, processor, inputs, pictures), report)
    return result


def _question(options: InspectOptions) -> tuple[list[tuple[Any, str]], str]:
    """Pictures with their names, and the question; by default those made for the small model."""
    if options.model is None and not options.images:
        image, credit, question, _ = made_question(options.seed)
        return [(image, credit)], options.prompt or question
    asked: list[Path | None] = [*options.images] or [None]
    return [load_image(path) for path in asked], options.prompt or PROMPT


def _config(options: InspectOptions) -> MustDropConfig:
    name = options.preset or (PRESET if options.model else SMALL_PRESET)
    if name not in MustDropConfig.presets():
        raise Refusal(f"--preset: there is no {name!r}; there are {', '.join(MustDropConfig.presets())}")
    if options.backend is not None and options.backend not in backends.registered():
        raise Refusal(f"--backend: there is no {options.backend!r}; there are {', '.join(backends.registered())}")
    try:
        return MustDropConfig.preset(name, backend=options.backend, **options.settings)
    except (TypeError, ValueError) as error:
        raise Refusal(f"--set: {error}") from None


def _load(options: InspectOptions) -> tuple[Any, Any, str]:
    """Model, processor and name; without a name the small model of the package."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.model is None:
        subject = load_model(None, device)
        return subject.model, subject.processor, subject.description
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto", use_safetensors=True).eval()
        processor = AutoProcessor.from_pretrained(options.model)
    except Exception as error:  # what a broken checkpoint raises depends on what is broken in it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Refusal(f"--model: {options.model} cannot be loaded: {reason}") from error
    return model.to(device), processor, options.model


def _inputs(model: Any, processor: Any, prompt: str, images: list[Any]) -> Any:
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
    if getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None):
        text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    else:
        token = getattr(processor, "image_token", "<image>")
        text = f"USER: {' '.join([token] * len(images))}\n{prompt} ASSISTANT:"
    batch = processor(images=images, text=text, return_tensors="pt")
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    return batch.to(model.device)


def _generate(model: Any, inputs: Any, max_new_tokens: int) -> list[int]:
    import torch

    with torch.inference_mode():
        sequences = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    ids: list[int] = sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return ids


def _seen(model: Any, processor: Any, inputs: Any, pictures: list[tuple[Any, str]]) -> list[np.ndarray]:
    """Each picture as the model gets it: cropped for LLaVA-1.5, whole for the others."""
    import numpy as np

    if model.config.model_type != "llava":
        return [np.asarray(image) for image, _ in pictures]
    pixels = inputs["pixel_values"].float().cpu()
    mean, deviation = (pixels.new_tensor(getattr(processor.image_processor, f"image_{x}")) for x in ("mean", "std"))
    visible = pixels.permute(0, 2, 3, 1) * deviation + mean
    return list((visible.clamp(0, 1) * 255).round().byte().numpy())


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
        # InternVL's tiles are images of their own: the page shows the picture that they come from.
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
