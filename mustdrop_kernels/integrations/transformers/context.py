# SPDX-License-Identifier: Apache-2.0
"""drop_tokens: everything that is attached to a model while MustDrop is on, and taken off afterwards."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ...config import MustDropConfig
from ...report import Report, Stopwatch
from .attention import scoring_config
from .cache import DropCache, Lifetime
from .decode import Decode
from .llava import Llava, hidden_of, with_hidden
from .prefill import Prefill
from .vision import EncodedImage, VisionStage

_active: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextlib.contextmanager
def drop_tokens(
    model: nn.Module,
    config: MustDropConfig | None = None,
    *,
    vision_stage: Callable[[Llava, MustDropConfig, Stopwatch], VisionStage] = VisionStage,
) -> Iterator[Report]:
    """Within the context, prompts with images lose vision tokens as `config` says; the model is not changed for good.

    ``model.generate(**inputs)`` and ``model(**inputs)`` are called as ever, on the processor's plain inputs. What
    ``generate`` returns begins with the ``input_ids`` that were given, all placeholders included, so slicing by the
    prompt's length and decoding work as without dropping. ``model(**inputs)`` returns logits of the tokens that are
    left, padded on the left; the last one is the prompt's last token. Prompts without an image, and everything after
    the context, run as if it had never been there.

    The cache that ``generate(return_dict_in_generate=True)`` returns can be continued inside a context with more text,
    by a whole turn as by one token. One prompt is read at a time: do not share the model between threads.

    Args:
        model: a ``LlavaForConditionalGeneration``.
        config: by default ``MustDropConfig()``.
        vision_stage: makes stage 1, where another one than MustDrop's is to be compared with it.

    Yields:
        A report that fills up with each prompt.

    Raises:
        TypeError: a model of another class.
        ValueError: the config asks for layers that the model does not have.
        RuntimeError: the model is in such a context already.
    """
    config = MustDropConfig() if config is None else config
    if model in _active:
        raise RuntimeError("drop_tokens is active on this model already")
    session = _Session(Llava(model, config), config, vision_stage)
    with contextlib.ExitStack() as stack:
        _active.add(model)
        stack.callback(_active.discard, model)
        session.install(stack)
        yield session.report


class _Session:
    """The hooks. What a forward pass needs to know travels with it, as the keyword `mustdrop`."""

    def __init__(self, llava: Llava, config: MustDropConfig, vision_stage: Callable[..., VisionStage]) -> None:
        self.llava = llava
        self.config = config
        self.report = Report(config)
        self.lifetime = Lifetime()
        self.stopwatch = Stopwatch(next(llava.model.parameters()).device)
        self.vision = vision_stage(llava, config, self.stopwatch)

    def install(self, stack: contextlib.ExitStack) -> None:
        """Attaches everything; the stack takes it off, in reverse, whatever happens."""
        llava, body = self.llava, self.llava.body
        stack.callback(setattr, self.lifetime, "open", False)
        self.vision.install(stack)
        _patch(stack, body, "get_image_features", self.vision.wrap(body.get_image_features))
        _patch(stack, llava.model, "generate", self._wrap_generate(llava.model.generate))
        stack.callback(llava.model.register_forward_pre_hook(_refuse_labels, with_kwargs=True).remove)
        stack.callback(body.register_forward_pre_hook(self._before_body, with_kwargs=True).remove)
        stack.callback(body.register_forward_hook(self._after_body, with_kwargs=True).remove)
        for i, layer in enumerate(llava.layers):
            before = functools.partial(self._before_layer, i)
            stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
        for i in self.config.pruning_layers:
            layer = llava.layers[i]
            # Before transformers' own hook, which records hidden states.
            after = functools.partial(self._after_layer, i)
            stack.callback(layer.register_forward_hook(after, with_kwargs=True, prepend=True).remove)
            _patch(stack, layer.self_attn, "config", scoring_config(layer.self_attn.config))

    # generate

    def _wrap_generate(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(generate)
        def wrapped(inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
            settings = self.llava.model.generation_config if generation_config is None else generation_config
            _refuse_generation(lambda name: kwargs.get(name, getattr(settings, name, None)))
            cache = kwargs.get("past_key_values")
            if cache is None:
                kwargs["past_key_values"] = self._new_cache()
            elif not isinstance(cache, DropCache):
                raise TypeError(
                    f"past_key_values is a {type(cache).__name__}; inside drop_tokens pass none, "
                    "or one that generate returned inside drop_tokens"
                )
            return generate(inputs, generation_config, **kwargs)

        return wrapped

    def _new_cache(self) -> DropCache:
        return DropCache(self.llava.language_model.config)

    # The LLaVA body: one forward pass.

    def _before_body(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, DropCache):
            cache.lifetime = self.lifetime
        step: Prefill | Decode
        if kwargs.get("pixel_values") is not None or (kwargs.get("mm_encoder_outputs") or {}).get("image") is not None:
            kwargs["past_key_values"] = self._cache_for_prompt(cache, kwargs.get("use_cache"))
            features, images = self._take_images(kwargs)
            step = Prefill(self.llava, self.config, self.stopwatch, features, images, kwargs)
        elif isinstance(cache, DropCache) and cache.shortened:
            step = Decode(self.llava, cache, kwargs)
        else:
            return None
        return args, {**step.model_inputs(kwargs), "mustdrop": step}

    def _cache_for_prompt(self, given: Any, use_cache: bool | None) -> DropCache | None:
        if given is None:
            wanted = self.llava.language_model.config.use_cache if use_cache is None else use_cache
            return self._new_cache() if wanted else None
        if not isinstance(given, DropCache):
            raise TypeError(f"past_key_values is a {type(given).__name__}; inside drop_tokens pass none")
        if given.get_seq_length() > 0:
            raise ValueError("an image that comes after cached tokens cannot be dropped from; begin a new prompt")
        return given

    def _take_images(self, kwargs: dict[str, Any]) -> tuple[list[Tensor], list[EncodedImage]]:
        """Features (N, C) of each image, and what stage 1 made of it. Takes what belongs to images out of `kwargs`."""
        names = ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy", "image_sizes")
        inputs = {name: value for name in names if (value := kwargs.pop(name, None)) is not None}
        output = (kwargs.pop("mm_encoder_outputs", None) or {}).get("image")  # transformers 5 may have them already
        if output is None:
            output = self.llava.body.get_image_features(**inputs)
        features = list(getattr(output, "pooler_output", output))
        if any(feature not in self.vision.encoded for feature in features):
            raise ValueError("image features must be computed inside drop_tokens: pass pixel_values")
        return features, [self.vision.encoded[feature] for feature in features]

    def _after_body(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        step = kwargs.get("mustdrop")
        if isinstance(step, Prefill):
            self.report.prompts.append(step.finish(kwargs["past_key_values"]))

    # The decoder layers.

    def _before_layer(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        step = kwargs.pop("mustdrop", None)
        if step is None:
            return None
        kwargs = step.layer_inputs(index, kwargs, args[0])
        if isinstance(step, Prefill) and index in self.config.pruning_layers:
            kwargs["mustdrop"] = step  # goes on to the attention function
        return args, kwargs

    def _after_layer(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        step = kwargs.get("mustdrop")
        if step is None:
            return None
        return with_hidden(output, step.shorten(index, hidden_of(output)))


def _patch(stack: contextlib.ExitStack, target: Any, name: str, value: Any) -> None:
    """Sets an attribute of an object; the stack puts back what the object itself had, or nothing."""
    own = vars(target)
    if name in own:
        stack.callback(setattr, target, name, own[name])
    else:
        stack.callback(delattr, target, name)
    setattr(target, name, value)


def _refuse_labels(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("labels") is not None:
        raise ValueError("drop_tokens cannot compute a loss: labels no longer line up with the tokens that are left")


def _refuse_generation(setting: Callable[[str], Any]) -> None:
    """Says so where a way of generating cannot work, instead of generating something else."""
    if setting("prefill_chunk_size") is not None:
        raise ValueError(
            "prefill_chunk_size: drop_tokens reads a prompt in one piece, since the text that says which image tokens "
            "matter comes after them"
        )
    if setting("cache_implementation") not in (None, "dynamic"):
        raise ValueError(
            f"cache_implementation={setting('cache_implementation')!r}: drop_tokens brings its own cache, whose layers "
            "shrink"
        )
    if setting("use_cache") is False:
        raise ValueError("use_cache=False: every step would read the prompt, and drop tokens, anew")
    if setting("assistant_model") is not None or setting("prompt_lookup_num_tokens") is not None:
        raise ValueError("assisted generation: a cache that drop_tokens has shortened cannot be rolled back")
