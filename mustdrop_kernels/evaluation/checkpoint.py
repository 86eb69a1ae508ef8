# SPDX-License-Identifier: Apache-2.0
"""Model and image of the demo and the evaluation: from the command line's options, or the defaults."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import backends
from ..config import MustDropConfig
from ..errors import Refusal, first_line

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

# Shipped in scikit-image's wheel; SpaceX put it into the public domain.
_PHOTOGRAPH = "rocket.jpg"
_CREDIT = "rocket.jpg of scikit-image (photograph: SpaceX, public domain)"
SMALL_MODEL = Path(__file__).resolve().parent / "model"
"""Trained by training/train.py."""
DEMO_SEED = 2026
DEMO_PROMPT = "What is in the image?"
SMALL = "the small LLaVA of mustdrop_kernels"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model and its processor."""

    model: Any
    processor: Any
    name: str

    @property
    def description(self) -> str:
        """One phrase with name, size, dtype and device."""
        millions = sum(weight.numel() for weight in self.model.parameters()) / 1e6
        size = f"{millions:,.0f}" if millions > 10 else f"{millions:.1f}"
        where = f"{size} million weights, {self.model.dtype}, {self.model.device}"
        return f"{self.name} ({where})".replace("torch.", "")

    def inputs(self, images: Sequence[Image], prompt: str) -> Any:
        """The processor's tensors for some images and a question about them."""
        return self._tensors(images, [prompt_text(self.processor, prompt, len(images))])

    def batch(self, images: Sequence[Image], prompts: Sequence[str]) -> Any:
        """The processor's tensors for questions about one image each, shorter ones padded on the left."""
        return self._tensors(images, [prompt_text(self.processor, prompt) for prompt in prompts])

    def _tensors(self, images: Sequence[Image], texts: list[str]) -> Any:
        batch = self.processor(images=list(images), text=texts, return_tensors="pt", padding=len(texts) > 1)
        batch["pixel_values"] = batch["pixel_values"].to(self.model.dtype)
        return batch.to(self.model.device)

    def seen(self, pixel_values: Any) -> np.ndarray:  # (height, width, 3) uint8
        """The input of the vision tower as an image: resized and cropped, with the normalization undone."""
        processor = self.processor.image_processor
        pixels = pixel_values[0].float().cpu().permute(1, 2, 0)
        mean, deviation = pixels.new_tensor(processor.image_mean), pixels.new_tensor(processor.image_std)
        return ((pixels * deviation + mean).clamp(0, 1) * 255).round().byte().numpy()


def prompt_text(processor: Any, question: str, images: int = 1) -> str:
    """The prompt for a question about some images, by the chat template of the processor or LLaVA-1.5's."""
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    if template:
        parts = [*[{"type": "image"}] * images, {"type": "text", "text": question}]
        return str(processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True))
    places = " ".join([getattr(processor, "image_token", "<image>")] * images)
    return f"USER: {places}\n{question} ASSISTANT:"


def require_packages(user: str, extra: str, **packages: str) -> None:
    """Raise ``Refusal`` if one of these packages, given by module names, is missing."""
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise Refusal(f"{user} needs {' and '.join(missing)}: pip install 'mustdrop_kernels[{extra}]'")


def require_extras() -> None:
    """Raise ``Refusal`` if a package that the demo requires is missing."""
    require_packages("the demo", "demo", transformers="transformers", PIL="pillow", matplotlib="matplotlib")


def chosen_config(model: str | None, preset: str | None, backend: str | None, **settings: Any) -> MustDropConfig:
    """The configuration of a preset, by default the one for the model, with changes by `settings`."""
    name = preset or default_preset(model)
    if name not in MustDropConfig.presets():
        raise Refusal(f"--preset: there is no {name!r}; there are {', '.join(MustDropConfig.presets())}")
    if backend is not None and backend not in backends.registered():
        raise Refusal(f"--backend: there is no {backend!r}; there are {', '.join(backends.registered())}")
    try:
        return MustDropConfig.preset(name, backend=backend, **settings)
    except (TypeError, ValueError) as error:
        raise Refusal(f"--set: {error}") from None


def default_preset(model: str | None) -> str:
    """The preset for a checkpoint, or without one for the small model."""
    return "192" if model else "small-64"


def made_question(number: int) -> tuple[Image, str, str, str]:
    """A picture that was not used in training, its name, a question about it, and the right answer."""
    missing = [name for name in ("sklearn", "skimage") if importlib.util.find_spec(name) is None]
    if missing:
        raise Refusal("pictures are made from scikit-learn and scikit-image: pip install them, or give --image")
    from .questions import items

    item = items("test", DEMO_SEED, number + 1)[-1]
    seen = item.scene()
    credit = f"digits of scikit-learn on {seen.photograph}, none of it used in training"
    return seen.image, credit, item.question.text, item.question.answer


def load_image(path: Path | None) -> tuple[Image, str]:
    """The image and its name."""
    from PIL import Image, UnidentifiedImageError

    credit = _CREDIT if path is None else path.name
    if path is None:
        path = _default_photograph()
    try:
        with Image.open(path) as image:
            return image.convert("RGB"), credit
    except FileNotFoundError:
        raise Refusal(f"--image: there is no file {path}") from None
    except UnidentifiedImageError:
        raise Refusal(f"--image: {path} is not an image that Pillow can read") from None
    except OSError as error:
        raise Refusal(f"--image: {path} cannot be read: {error}") from None


def _default_photograph() -> Path:
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise Refusal("the default photograph comes with scikit-image: pip install scikit-image, or give --image")
    path = Path(package.origin).parent / "data" / _PHOTOGRAPH
    if not path.is_file():
        raise Refusal(f"this scikit-image does not ship {_PHOTOGRAPH}: give --image")
    return path


def quiet_transformers() -> None:
    """Disable the advice and progress bars of transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_model(name: str | None, device: str) -> Checkpoint:
    """The checkpoint of this name or in this folder; by default the small model of the package."""
    from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration

    model: Any
    where, dtype = (name, "auto") if name is not None else (str(SMALL_MODEL), "float32")
    try:
        kind = AutoConfig.from_pretrained(where).model_type
        if kind == "llava":
            model = LlavaForConditionalGeneration.from_pretrained(where, dtype=dtype, use_safetensors=True).eval()
            processor = AutoProcessor.from_pretrained(where)
            processor.tokenizer.padding_side = "left"
    except Exception as error:  # a broken checkpoint may raise anything
        raise Refusal(f"--model: {where} cannot be loaded: {first_line(error)}") from error
    if kind != "llava":
        raise Refusal(f"--model: {where} is a {kind!r} model; it must be a LLaVA (LlavaForConditionalGeneration)")
    return Checkpoint(model.to(device), processor, name or SMALL)
