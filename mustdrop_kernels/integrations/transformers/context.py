# SPDX-License-Identifier: Apache-2.0
"""drop_tokens: everything that is attached to a model while MustDrop is on, and taken off afterwards."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...config import MustDropConfig
from ...report import Report, Stopwatch
from .attention import watched_config
from .cache import DropCache, Lifetime
from .compat import CACHE, OLD_CACHE, features_of, hidden_of, with_hidden
from .decode import Decode
from .families import Family, family_of
from .patching import patch
from .prefill import Prefill
from .prompt import repeated
from .undo import UndoneForward, undone_on_error
from .vision import VisionStage

FirstStage = Callable[[Family, MustDropConfig, Stopwatch], VisionStage]
"""Makes stage 1 for a model: ``VisionStage``, or a subclass that leaves other tokens of its images."""

_active: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextlib.contextmanager
def drop_tokens(
    model: nn.Module,
    config: MustDropConfig | None = None,
    *,
    heat_maps: bool = False,
    vision_stage: FirstStage = VisionStage,
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
        model: LLaVA-1.5, -NeXT, -NeXT-Video, -OneVision, Video-LLaVA, Qwen2.5-VL, InternVL (``families``).
        config: by default ``MustDropConfig()``.
        heat_maps: record what the text looks at in every layer, for pictures; costs time and memory.
        vision_stage: makes stage 1, where another one than MustDrop's is to be compared with it.

    Yields:
        A report that fills up with each prompt.

    Raises:
        TypeError: a model of another class.
        ValueError: the config asks for what the model cannot do: layers that it does not have, merging in a vision
            tower that needs all its patches, a language model with sliding windows.
        RuntimeError: the model is in such a context already.
    """
    config = MustDropConfig() if config is None else config
    if model in _active:
        raise RuntimeError("drop_tokens is active on this model already")
    family = family_of(model)
    family.check(config)
    session = _Session(family, config, heat_maps, vision_stage)
    with contextlib.ExitStack() as stack:
        _active.add(model)
        stack.callback(_active.discard, model)
        session.install(stack)
        yield session.report


class _Session:
    """The hooks. What a forward pass needs to know travels with it, as the keyword `mustdrop`."""

    def __init__(self, family: Family, config: MustDropConfig, heat_maps: bool, vision_stage: FirstStage) -> None:
        self.family = family
        self.config = config
        self.heat_maps = heat_maps
        self.watched = tuple(range(len(family.layers))) if heat_maps else config.pruning_layers
        """The layers whose queries and keys are looked at."""
        self.report = Report(config)
        self.lifetime = Lifetime()
        self.stopwatch = Stopwatch(next(family.model.parameters()).device)
        self.vision = vision_stage(family, config, self.stopwatch)
        self._input_ids: Tensor | None = None  # of the pass that is running
        self._prompt_length: int | None = None  # of what generate() was given
        self._guesses: dict[str, Any] | None = None  # of an assistant, behind the prompt that is read
        self._layer_hooks = contextlib.ExitStack()
        self._attached = False  # the hooks in the layers

    def install(self, stack: contextlib.ExitStack) -> None:
        """Attaches everything; the stack takes it off, in reverse, whatever happens."""
        model, body, language = self.family.model, self.family.body, self.family.language_model
        stack.callback(setattr, self.lifetime, "open", False)
        UndoneForward().install(stack, model)
        self.vision.install(stack)
        patch(stack, model, "generate", self._wrap_generate(model.generate))
        stack.callback(model.register_forward_pre_hook(_refuse_labels, with_kwargs=True).remove)
        stack.callback(body.register_forward_pre_hook(self._before_body, with_kwargs=True).remove)
        stack.callback(language.register_forward_pre_hook(self._before_language, with_kwargs=True).remove)
        stack.callback(language.register_forward_hook(self._after_language, with_kwargs=True).remove)
        stack.enter_context(self._layer_hooks)

    def _attach_layers(self) -> None:
        """Hooks in the language layers, only while there is something to do there: text alone runs at plain speed."""
        if self._attached:
            return
        with contextlib.ExitStack() as stack:
            for i, layer in enumerate(self.family.layers):
                before = functools.partial(self._before_layer, i)
                stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
            for i in self.config.pruning_layers:
                # Before transformers' own hook, which records hidden states.
                after = functools.partial(self._after_layer, i)
                hook = self.family.layers[i].register_forward_hook(after, with_kwargs=True, prepend=True)
                stack.callback(hook.remove)
            for i in self.watched:
                attention = self.family.layers[i].self_attn
                patch(stack, attention, "config", watched_config(attention.config))
            self._layer_hooks.enter_context(stack.pop_all())
        self._attached = True

    def _detach_layers(self) -> None:
        self._layer_hooks.close()
        self._attached = False

    # generate

    def _wrap_generate(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(generate)
        def wrapped(inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
            settings = self.family.model.generation_config if generation_config is None else generation_config
            _refuse_generation(lambda name: kwargs.get(name, getattr(settings, name, None)))
            cache = kwargs.setdefault(CACHE, kwargs.pop(OLD_CACHE, None))
            if cache is None:
                kwargs[CACHE] = self._new_cache()
            elif not isinstance(cache, DropCache):
                raise TypeError(
                    f"{CACHE} is a {type(cache).__name__}; inside drop_tokens pass none, "
                    "or one that generate returned inside drop_tokens"
                )
            self.stopwatch.read()  # begins anew, whatever became of the last prompt
            given = kwargs.get("input_ids") if inputs is None else inputs
            before, self._prompt_length = self._prompt_length, None if given is None else given.shape[1]
            self.vision.encoded = {}
            try:
                with contextlib.ExitStack() as during:
                    during.enter_context(undone_on_error(kwargs[CACHE]))
                    during.enter_context(_without_implementation(self.family.model.generation_config))
                    during.enter_context(_without_implementation(settings))
                    return generate(inputs, generation_config, **kwargs)
            finally:
                self._prompt_length = before

        return wrapped

    def _new_cache(self) -> DropCache:
        return DropCache(self.family.language_model.config)

    # The body, which takes input_ids and pictures: one forward pass.

    def _before_body(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._input_ids = args[0] if args else kwargs.get("input_ids")
        before, self.vision.encoded = self.vision.encoded, {}
        encoded = kwargs.get("mm_encoder_outputs")  # generate() in transformers 5 runs the tower by itself
        for modality, output in (encoded or {}).items():
            if output is not None:
                images = getattr(output, "mustdrop", None)
                if images is None and self._prompt_length is not None:  # what accelerate copies loses its attributes
                    images = before.get(modality)
                if images is None:
                    raise ValueError("image features must be computed inside drop_tokens: pass pixel_values")
                if self._input_ids is not None:
                    places = self._input_ids == self.family.token_id(modality)
                    images = repeated(images, places, sum(map(len, features_of(output))))
                self.vision.encoded[modality] = images

    # The language model, which takes embeddings: pictures are in place, and nothing is gone yet.

    def _before_language(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get(CACHE)
        if isinstance(cache, DropCache):
            cache.lifetime = self.lifetime
        step: Prefill | Decode
        if self.vision.encoded:
            _refuse_checkpointing(self.family)
            kwargs[CACHE] = self._cache_for_prompt(cache, kwargs.get("use_cache"))
            images, self.vision.encoded = self.vision.encoded, {}
            kwargs, self._guesses = self._without_guesses(kwargs)
            step = Prefill(
                self.family,
                self.config,
                self.stopwatch,
                images,
                self._input_ids,
                kwargs,
                kwargs[CACHE],
                heat_maps=self.heat_maps,
            )
        elif isinstance(cache, DropCache) and cache.shortened:
            step = Decode(self.family, cache, kwargs)
        else:
            self._detach_layers()
            return None
        self._attach_layers()
        return args, {**step.model_inputs(kwargs), "mustdrop": step}

    def _without_guesses(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The language model's inputs in two: the prompt, and an assistant's guesses of what comes after it.

        generate() puts them behind the prompt. They must not vote, nor see what stage 3 takes away, so they get a pass
        of their own.
        """
        cache: DropCache | None = kwargs[CACHE]
        if self._prompt_length is None or self._input_ids is None or cache is None:
            return kwargs, None
        past = cache.get_seq_length()
        if self._prompt_length < past:  # a turn was given by itself, without what is cached
            past = 0
        count = past + self._input_ids.shape[1] - self._prompt_length
        if count <= 0:
            return kwargs, None
        prompt, guesses = dict(kwargs), dict(kwargs)
        for name, dim in (("inputs_embeds", 1), ("position_ids", -1), ("cache_position", 0)):
            if kwargs.get(name) is not None:
                length = kwargs[name].shape[dim] - count
                prompt[name] = kwargs[name].narrow(dim, 0, length)
                guesses[name] = kwargs[name].narrow(dim, length, count)
        if kwargs.get("attention_mask") is not None:
            prompt["attention_mask"] = kwargs["attention_mask"][:, :-count]
        self._input_ids = self._input_ids[:, :-count]
        return prompt, guesses

    def _cache_for_prompt(self, given: Any, use_cache: bool | None) -> DropCache | None:
        if given is None:
            wanted = self.family.language_model.config.use_cache if use_cache is None else use_cache
            return self._new_cache() if wanted else None
        if not isinstance(given, DropCache):
            raise TypeError(f"{CACHE} is a {type(given).__name__}; inside drop_tokens pass none")
        if given.get_seq_length() > 0 and self.config.positions == "published":
            raise ValueError(
                "positions='published' renumbers a prompt, which cannot be done to an image behind cached tokens; "
                "begin a new prompt, or use positions='original'"
            )
        return given

    def _after_language(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        step = kwargs.get("mustdrop")
        if isinstance(step, Prefill):
            self.report.prompts.append(step.finish(kwargs[CACHE]))
            guesses, self._guesses = self._guesses, None
            if guesses is not None:
                behind = module(**guesses).last_hidden_state
                output.last_hidden_state = torch.cat([output.last_hidden_state, behind], dim=1)

    # The decoder layers.

    def _before_layer(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        step = kwargs.pop("mustdrop", None)
        if step is None:
            return None
        kwargs = step.layer_inputs(index, kwargs, args[0])
        if isinstance(step, Prefill) and index in self.watched:
            kwargs["mustdrop"] = step  # goes on to the attention function
        return args, kwargs

    def _after_layer(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        step = kwargs.get("mustdrop")
        if step is None:
            return None
        return with_hidden(output, step.shorten(index, hidden_of(output)))


@contextlib.contextmanager
def _without_implementation(settings: Any) -> Iterator[None]:
    """No name of a cache beside ours; assisted generation in transformers 4 leaves "dynamic_full" behind."""
    before = getattr(settings, "cache_implementation", None)
    settings.cache_implementation = None
    try:
        yield
    finally:
        settings.cache_implementation = before


def _refuse_labels(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("labels") is not None:
        raise ValueError("drop_tokens cannot compute a loss: labels no longer line up with the tokens that are left")


def _refuse_checkpointing(family: Family) -> None:
    if any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in family.layers):
        raise ValueError(
            "gradient checkpointing runs layers a second time, when the tokens that they read are gone; "
            "model.gradient_checkpointing_disable(), or model.eval()"
        )


def _refuse_generation(setting: Callable[[str], Any]) -> None:
    """Says so where a way of generating cannot work, instead of generating something else."""
    if setting("prefill_chunk_size") is not None:
        raise ValueError(
            "prefill_chunk_size: drop_tokens reads a prompt in one piece, since the text that says which image tokens "
            "matter comes after them"
        )
    if setting("cache_implementation") not in (None, "dynamic", "dynamic_full"):
        raise ValueError(
            f"cache_implementation={setting('cache_implementation')!r}: drop_tokens brings its own cache, whose layers "
            "shrink"
        )
    if setting("use_cache") is False:
        raise ValueError("use_cache=False: every step would read the prompt, and drop tokens, anew")
