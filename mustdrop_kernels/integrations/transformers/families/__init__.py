# SPDX-License-Identifier: Apache-2.0
"""Supported models: one class per family, found by the name of the model's class.

``register_family("MyModelForConditionalGeneration", MyFamily)`` adds one; docs/extending.md describes it step by step.
"""

from __future__ import annotations

from typing import Any

from .base import Family, Tower
from .internvl import InternVL
from .llava import Llava
from .llava_next import LlavaNext, LlavaNextVideo, LlavaOnevision
from .qwen import Qwen2_5VL
from .video_llava import VideoLlava
from .vip_llava import VipLlava

__all__ = ["Family", "Tower", "family_of", "register_family"]

_FAMILIES: dict[str, type[Family]] = {
    "LlavaForConditionalGeneration": Llava,
    "VipLlavaForConditionalGeneration": VipLlava,
    "LlavaNextForConditionalGeneration": LlavaNext,
    "LlavaNextVideoForConditionalGeneration": LlavaNextVideo,
    "LlavaOnevisionForConditionalGeneration": LlavaOnevision,
    "VideoLlavaForConditionalGeneration": VideoLlava,
    "Qwen2_5_VLForConditionalGeneration": Qwen2_5VL,
    "InternVLForConditionalGeneration": InternVL,
}


def register_family(class_name: str, family: type[Family]) -> None:
    """Registers `family` for models of the class of this name and of its subclasses."""
    _FAMILIES[class_name] = family


def family_of(model: Any) -> Family:
    """The family of a model.

    Raises:
        TypeError: no family is registered for the model.
        ValueError: its language model is not supported.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in _FAMILIES:
            return _FAMILIES[cls.__name__](model)
    raise TypeError(
        f"drop_tokens serves {', '.join(_FAMILIES)}; got {type(model).__name__}, which register_family can add "
        "(docs/extending.md)"
    )
