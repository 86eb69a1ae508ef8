# SPDX-License-Identifier: Apache-2.0
"""One pass over a prompt: its pictures, its cache, and the inputs of the language model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...config import MustDropConfig
from ...report import Report, Stopwatch
from .cache import DropCache
from .caches import as_drop_cache, cache_for_prompt
from .compat import CACHE, features_of
from .decode import Decode, check_mask
from .families import Family
from .prefill import Prefill
from .prompt import repeated
from .shortened_cache import ContextLifetime, ShortenedCache
from .static_cache import DropStaticCache
from .vision import VisionStage

FirstStage = Callable[[Family, MustDropConfig, Stopwatch], VisionStage]
"""Makes stage 1 for a model: ``VisionStage``, or a subclass that keeps other tokens of its images."""
ALL_LAYERS: Literal["all"] = "all"
Layers = tuple[int, ...] | Literal["all"]
"""The layers that need hooks in a pass: all for a prompt, else those with inputs of their own."""


class Session:
    """State of a context and of the pass that is running. It handles the model's inputs; `Hooks` installs hooks."""

    def __init__(self, family: Family, config: MustDropConfig, heat_maps: bool, vision_stage: FirstStage) -> None:
        self.family = family
        self.config = config
        self.heat_maps = heat_maps
        self.report = Report(config)
        self.lifetime = ContextLifetime()
        self.stopwatch = Stopwatch(next(family.model.parameters()).device)
        self.vision = vision_stage(family, config, self.stopwatch)
        self.mask: Tensor | None = None
        """(B, L) mask of the next pass, before generate() converts it for a static cache."""
        self._input_ids: Tensor | None = None  # of the current pass
        self._prompt_length: int | None = None  # of the prompt that generate() was given
        self._candidates: dict[str, Any] | None = None  # inputs of an assistant's candidate tokens after the prompt

    @contextlib.contextmanager
    def generation(self, prompt_length: int | None) -> Iterator[None]:
        """A call of generate() with a prompt of this length."""
        self.stopwatch.read()  # discards what an unfinished prompt has left
        before, self._prompt_length = self._prompt_length, prompt_length
        self.vision.encoded = {}
        try:
            yield
        finally:
            self._prompt_length = before

    def read_inputs(self, input_ids: Tensor | None, outputs: dict[str, Any] | None) -> None:
        """Keeps the ids of a pass, and the images of encoder outputs that generate() has computed by itself."""
        self._input_ids = input_ids
        before, self.vision.encoded = self.vision.encoded, {}
        for modality, output in (outputs or {}).items():
            if output is not None:
                images = getattr(output, "mustdrop", None)
                if images is None and self._prompt_length is not None:  # copies by accelerate lose attributes
                    images = before.get(modality)
                if images is None:
                    raise ValueError("image features must be computed inside drop_tokens: pass pixel_values")
                if input_ids is not None:
                    places = input_ids == self.family.token_id(modality)
                    images = repeated(images, places, sum(map(len, features_of(output))))
                self.vision.encoded[modality] = images

    def language_inputs(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Layers]:
        """The language model's inputs for a prompt with images, a shortened cache or text, and the layers to hook.

        The images are in inputs_embeds, and nothing is dropped yet.
        """
        cache = as_drop_cache(kwargs.get(CACHE))
        if isinstance(cache, ShortenedCache):
            cache.state.bind(self.lifetime)
        if self.vision.encoded:
            return self._prompt_inputs(kwargs, cache), ALL_LAYERS
        if isinstance(cache, ShortenedCache) and cache.shortened:
            hidden, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
            check_mask(cache, mask, hidden.shape[1])
            step = Decode(self.family, cache, hidden, mask)
            return {**kwargs, CACHE: cache, **step.inputs()}, tuple(cache.layer_inputs)
        return kwargs, ()

    def _prompt_inputs(self, kwargs: dict[str, Any], given: Any) -> dict[str, Any]:
        _check_checkpointing(self.family)
        kwargs[CACHE] = self._prompt_cache(given, kwargs.get("use_cache"))
        images, self.vision.encoded = self.vision.encoded, {}
        kwargs, self._candidates = self._split_candidates(kwargs)
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            mask = self.mask  # generate() has converted it for a static cache
        prefill = Prefill(
            self.family,
            self.config,
            self.stopwatch,
            images,
            self._input_ids,
            {**kwargs, "attention_mask": mask},
            kwargs[CACHE],
            heat_maps=self.heat_maps,
        )
        return {**prefill.model_inputs(kwargs), "drop_prefill": prefill}

    def _split_candidates(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The language model's inputs split into the prompt and an assistant's candidate tokens.

        generate() appends the candidates to the prompt. They get a pass of their own, since they must neither be text
        queries nor attend to tokens that stage 3 drops.
        """
        cache: DropCache | DropStaticCache | None = kwargs[CACHE]
        if self._prompt_length is None or self._input_ids is None or cache is None:
            return kwargs, None
        past = cache.seen
        if self._prompt_length < past:  # a turn was given alone, without the cached tokens
            past = 0
        count = past + self._input_ids.shape[1] - self._prompt_length
        if count <= 0:
            return kwargs, None
        prompt, candidates = dict(kwargs), dict(kwargs)
        for name, dim in (("inputs_embeds", 1), ("position_ids", -1), ("cache_position", 0)):
            if kwargs.get(name) is not None:
                length = kwargs[name].shape[dim] - count
                prompt[name] = kwargs[name].narrow(dim, 0, length)
                candidates[name] = kwargs[name].narrow(dim, length, count)
        if kwargs.get("attention_mask") is not None:
            prompt["attention_mask"] = kwargs["attention_mask"][:, :-count]
        self._input_ids = self._input_ids[:, :-count]
        return prompt, candidates

    def _prompt_cache(self, given: Any, use_cache: bool | None) -> DropCache | DropStaticCache | None:
        if given is None:
            enabled = self.family.language_model.config.use_cache if use_cache is None else use_cache
            if not enabled:
                return None
        cache: DropCache | DropStaticCache = cache_for_prompt(self.family.language_model.config, given)
        cache.state.bind(self.lifetime)
        if self.config.positions == "published" and cache.seen > 0:
            raise ValueError(
                "positions='published' renumbers a prompt, which cannot be done to an image behind cached tokens; "
                "begin a new prompt, or use positions='original'"
            )
        return cache

    def read_candidates(self, module: nn.Module, output: Any) -> None:
        """Runs the language model on an assistant's candidate tokens after the prompt, and appends their states."""
        candidates, self._candidates = self._candidates, None
        if candidates is not None:
            hidden = module(**candidates).last_hidden_state
            output.last_hidden_state = torch.cat([output.last_hidden_state, hidden], dim=1)


def has_pictures(inputs: dict[str, Any]) -> bool:
    """Whether a model's inputs hold an image or a video, or encoder outputs of one."""
    named = (name for name, value in inputs.items() if value is not None)
    return any(name.startswith("pixel_values") or name == "mm_encoder_outputs" for name in named)


def _check_checkpointing(family: Family) -> None:
    if any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in family.layers):
        raise ValueError(
            "gradient checkpointing runs layers a second time, when the tokens that they read are gone; "
            "model.gradient_checkpointing_disable(), or model.eval()"
        )
