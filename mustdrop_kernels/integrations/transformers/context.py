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
from transformers.cache_utils import Cache

from ...config import MustDropConfig
from ...report import Report, Stopwatch
from . import generating
from .attention import watched_config
from .cache import DropCache
from .compat import CACHE, features_of, hidden_of, with_hidden
from .decode import Decode, check_mask, own_inputs
from .eager import Uncompiled, modules_of
from .families import Family, family_of
from .patching import patch
from .prefill import Prefill
from .prompt import repeated
from .rollback import UndoneForward
from .shortened_cache import Lifetime, Shortened
from .static_cache import DropStaticCache, books_of
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

    With ``cache_implementation="static"``, or a ``StaticCache`` as the cache, survivors move to the front of its
    buffers, and decoding can be compiled into one graph. A prompt with images is read outside of compiled code: what
    was compiled of the model, or all of it, runs uncompiled then.

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
        RuntimeError: the model is in such a context already, or is called inside a compiled function.
    """
    config = MustDropConfig() if config is None else config
    *around, model = modules_of(model)
    if model in _active:
        raise RuntimeError("drop_tokens is active on this model already")
    family = family_of(model)
    family.check(config)
    session = _Session(family, config, heat_maps, vision_stage)
    with contextlib.ExitStack() as stack:
        _active.add(model)
        stack.callback(_active.discard, model)
        session.install(stack)
        session.install_around(stack, around)
        yield session.report


class _Session:
    """The hooks. What a pass over a prompt needs to know travels with it, as the keyword `mustdrop`."""

    def __init__(self, family: Family, config: MustDropConfig, heat_maps: bool, vision_stage: FirstStage) -> None:
        self.family = family
        self.config = config
        self.heat_maps = heat_maps
        self.watched = tuple(range(len(family.layers))) if heat_maps else config.pruning_layers
        """The layers whose queries and keys are looked at."""
        self.report = Report(config)
        self.lifetime = Lifetime()
        self.uncompiled = Uncompiled()
        self.stopwatch = Stopwatch(next(family.model.parameters()).device)
        self.vision = vision_stage(family, config, self.stopwatch)
        self._undone = UndoneForward()
        self._input_ids: Tensor | None = None  # of the pass that is running
        self._mask: Tensor | None = None  # (B, L) of the pass that comes
        self._prompt_length: int | None = None  # of what generate() was given
        self._guesses: dict[str, Any] | None = None  # of an assistant, behind the prompt that is read
        self._forward_hooks = contextlib.ExitStack()
        self._listening = False  # they are on
        self._layer_hooks = contextlib.ExitStack()
        self._layers: tuple[int, ...] | None = ()  # that have hooks: those with inputs of their own; None: a prompt's

    def install(self, stack: contextlib.ExitStack) -> None:
        """Attaches everything; the stack takes it off, in reverse, whatever happens."""
        stack.callback(self.lifetime.end)
        stack.callback(self.uncompiled.set, False)
        self.vision.install(stack)
        generating.install(stack, self)
        stack.callback(self._forward_hooks.close)
        stack.callback(self._layer_hooks.close)
        self.listen()

    def install_around(self, stack: contextlib.ExitStack, modules: list[Any]) -> None:
        """The same in what ``torch.compile(model)`` and ``model.compile()`` have made of it."""
        model = self.family.model
        for module in modules:
            stack.callback(module.register_forward_pre_hook(self._before_model, with_kwargs=True).remove)
        compiled = getattr(model, "_compiled_call_impl", None)
        if compiled is not None:

            def call(*args: Any, **kwargs: Any) -> Any:
                self._before_model(model, args, kwargs)
                return compiled(*args, **kwargs)

            patch(stack, model, "_compiled_call_impl", call)

    # While prompts are read

    @contextlib.contextmanager
    def begin(self, prompt_length: int | None, pictures: bool) -> Iterator[None]:
        """generate() is called with a prompt of this length; afterwards everything is as before."""
        self.stopwatch.read()  # begins anew, whatever became of the last prompt
        before, self._prompt_length = self._prompt_length, prompt_length
        self.vision.encoded = {}
        self.uncompiled.set(pictures)
        try:
            yield
        finally:
            self._prompt_length = before
            self.uncompiled.set(False)
            self._hook_layers(())
            self.listen()

    def listen(self, mask: Any = None) -> None:
        """Puts the hooks of a forward pass on; `mask` (B, L) is what generate() makes another of for a static cache."""
        self._mask = mask
        if self._listening:
            return
        model, body, language = self.family.model, self.family.body, self.family.language_model
        with contextlib.ExitStack() as stack:
            stack.callback(model.register_forward_pre_hook(self._before_model, with_kwargs=True).remove)
            self._undone.install(stack, model, self._after_model)
            stack.callback(model.register_forward_pre_hook(_refuse_labels, with_kwargs=True).remove)
            stack.callback(body.register_forward_pre_hook(self._before_body, with_kwargs=True).remove)
            stack.callback(language.register_forward_pre_hook(self._before_language, with_kwargs=True).remove)
            stack.callback(language.register_forward_hook(self._after_language, with_kwargs=True).remove)
            stack.callback(setattr, self, "_listening", False)
            self._forward_hooks.enter_context(stack.pop_all())
        self._listening = True

    def rest(self, own: dict[int, Any]) -> None:
        """Takes them off; layers in `own` go on finding their inputs in the cache."""
        self.uncompiled.set(False)
        if self._listening:
            self._forward_hooks.close()
        self._hook_layers(tuple(own))

    def _before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            caches = [books_of(value) for value in kwargs.values() if isinstance(value, Cache)]
            shortened = any(isinstance(cache, Shortened) and cache.shortened for cache in caches)
            self.uncompiled.set(shortened or generating.pictures_in(kwargs))

    def _after_model(self, well: bool) -> None:
        self.uncompiled.set(False)
        if not well:
            self._hook_layers(())

    def _hook_layers(self, layers: tuple[int, ...] | None) -> None:
        """Hooks in the layers that have something to do: none for text alone, which runs at plain speed."""
        if layers == self._layers:
            return
        self._layer_hooks.close()
        with contextlib.ExitStack() as stack:
            for i in layers or ():
                hook = functools.partial(own_inputs, i)
                stack.callback(self.family.layers[i].register_forward_pre_hook(hook, with_kwargs=True).remove)
            if layers is None:
                self._hook_prompt(stack)
            stack.callback(setattr, self, "_layers", ())
            self._layer_hooks.enter_context(stack.pop_all())
        self._layers = layers

    def _hook_prompt(self, stack: contextlib.ExitStack) -> None:
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

    # The body, which takes input_ids and pictures: one forward pass.

    def _before_body(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            _refuse_compiling(generating.pictures_in(kwargs))
            return
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
        if torch.compiler.is_compiling():
            _refuse_compiling(isinstance(cache, Shortened) and cache.shortened)
            return None
        cache = books_of(cache)
        if isinstance(cache, Shortened):
            cache.books.enter(self.lifetime)
        if self.vision.encoded:
            return args, self._prompt_inputs(kwargs, cache)
        if isinstance(cache, Shortened) and cache.shortened:
            hidden, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
            check_mask(cache, mask, hidden.shape[1])
            step = Decode(self.family, cache, hidden, mask)
            kwargs = {**kwargs, CACHE: cache, **step.inputs()}
            self._hook_layers(tuple(cache.own))
            return args, kwargs
        self._hook_layers(())
        return None

    def _prompt_inputs(self, kwargs: dict[str, Any], given: Any) -> dict[str, Any]:
        _refuse_checkpointing(self.family)
        kwargs[CACHE] = self._cache_for_prompt(given, kwargs.get("use_cache"))
        images, self.vision.encoded = self.vision.encoded, {}
        kwargs, self._guesses = self._without_guesses(kwargs)
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            mask = self._mask  # generate() has made another of it, for a static cache
        step = Prefill(
            self.family,
            self.config,
            self.stopwatch,
            images,
            self._input_ids,
            {**kwargs, "attention_mask": mask},
            kwargs[CACHE],
            heat_maps=self.heat_maps,
        )
        self._hook_layers(None)
        return {**step.model_inputs(kwargs), "mustdrop": step}

    def _without_guesses(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The language model's inputs in two: the prompt, and an assistant's guesses of what comes after it.

        generate() puts them behind the prompt. They must not vote, nor see what stage 3 takes away, so they get a pass
        of their own.
        """
        cache: DropCache | DropStaticCache | None = kwargs[CACHE]
        if self._prompt_length is None or self._input_ids is None or cache is None:
            return kwargs, None
        past = cache.seen
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

    def _cache_for_prompt(self, given: Any, use_cache: bool | None) -> DropCache | DropStaticCache | None:
        if given is None:
            wanted = self.family.language_model.config.use_cache if use_cache is None else use_cache
            if not wanted:
                return None
        cache: DropCache | DropStaticCache = generating.cache_for(self.family, given)
        cache.books.enter(self.lifetime)
        if self.config.positions == "published" and cache.seen > 0:
            raise ValueError(
                "positions='published' renumbers a prompt, which cannot be done to an image behind cached tokens; "
                "begin a new prompt, or use positions='original'"
            )
        return cache

    def _after_language(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        step = kwargs.get("mustdrop")
        if isinstance(step, Prefill):
            self.report.prompts.append(step.finish(kwargs[CACHE]))
            self._hook_layers(())
            guesses, self._guesses = self._guesses, None
            if guesses is not None:
                behind = module(**guesses).last_hidden_state
                output.last_hidden_state = torch.cat([output.last_hidden_state, behind], dim=1)

    # The decoder layers, while a prompt is read.

    def _before_layer(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        step = kwargs.pop("mustdrop", None)
        if step is None:
            return None
        kwargs = step.layer_inputs(index, kwargs, args[0])
        if index in self.watched:
            kwargs["mustdrop"] = step  # goes on to the attention function
        return args, kwargs

    def _after_layer(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        step = kwargs.get("mustdrop")
        if step is None:
            return None
        return with_hidden(output, step.shorten(index, hidden_of(output)))


def _refuse_compiling(needed: bool) -> None:
    if needed:
        raise RuntimeError(
            "drop_tokens reads prompts with images, and goes on after them, outside of compiled code: do not call the "
            "model inside a compiled function; generate(cache_implementation='static') compiles decoding"
        )


def _refuse_labels(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("labels") is not None:
        raise ValueError("drop_tokens cannot compute a loss: labels no longer line up with the tokens that are left")


def _refuse_checkpointing(family: Family) -> None:
    if any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in family.layers):
        raise ValueError(
            "gradient checkpointing runs layers a second time, when the tokens that they read are gone; "
            "model.gradient_checkpointing_disable(), or model.eval()"
        )
