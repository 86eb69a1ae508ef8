# SPDX-License-Identifier: Apache-2.0
"""Forward passes within a context: ``forward`` of the model, of its body and of its language model are replaced.

A pass begins where one of them is called from outside, and each pass is served for itself: one inside a generate(),
or from another thread, does not depend on what runs around it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ...placeholders import EncodedImage
from .cache import DropCache
from .caches import as_drop_cache, cache_for_prompt
from .calls import Step
from .compat import CACHE, features_of
from .decode import Decode, check_mask
from .eager import EagerSwitch
from .layers import ALL_LAYERS, LayerHooks
from .masks import mask_of
from .outputs import Outputs
from .patching import Patches
from .prefill import Prefill
from .prompt import repeated
from .rollback import rollback_on_error
from .session import Session
from .shortened_cache import ShortenedCache
from .static_cache import DropStaticCache

Forward = Callable[..., Any]
Inputs = dict[str, Any]


class Passes:
    """The passes of a model within a context, one at a time: the model's lock is held during each."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.calls = session.calls
        self.layers = LayerHooks(session.family, session.config, session.heat_maps)
        self.eager = EagerSwitch()
        self.current: Pass | None = None
        """The running pass, in the thread that holds the lock."""
        self.plain_is_prepared = False
        """generate() has prepared a pass of the model's own code: compiled code that holds our ``forward`` may run."""
        self.forwards, self.methods = Patches(), Patches()
        """What is replaced in the modules: ``forward``, and other methods."""

    def install(self, wrappers: list[Any]) -> None:
        """Replaces ``forward``, and what ``torch.compile`` has made of it."""
        family, replace = self.session.family, self.forwards.set
        replace(family.model, "forward", self._entry(family.model.forward, Pass.run_model, outermost=True))
        replace(family.body, "forward", self._entry(family.body.forward, Pass.run_body))
        replace(family.language_model, "forward", self._entry(family.language_model.forward, Pass.run_language))
        replace = self.methods.set
        for modality in family.modalities:
            name = f"get_{modality}_features"
            replace(family.body, name, self._features(modality, getattr(family.body, name)))
        for module in wrappers:
            if hasattr(module, "_orig_mod"):
                replace(module, "forward", self._eager(module.forward))
        for module in (*wrappers, family.model):
            if getattr(module, "_compiled_call_impl", None) is not None:  # by module.compile()
                replace(module, "_compiled_call_impl", self._eager(module._compiled_call_impl))
        if hasattr(family.model, "get_compiled_call"):
            replace(family.model, "get_compiled_call", self._compiled(family.model.get_compiled_call))
        replace(family.model, "__deepcopy__", self._copy)

    def close(self) -> None:
        """Leaves the modules as they were."""
        self.eager.set(False)
        self.layers.set(())
        self.methods.restore()
        self.forwards.restore()

    def keep_images(self, modality: str, images: list[EncodedImage]) -> None:
        """Keeps the images that the running pass encodes, or generate() before its first pass."""
        if self.current is not None and not self.current.plain:
            self.current.encoded[modality] = images
        elif (generation := self.calls.thread.generation) is not None:
            generation.encoded[modality] = images

    def _copy(self, memo: dict[int, Any]) -> Any:
        """A copy of the model that is in no context."""
        with self.calls.lock:
            choice = self.layers.choice
            self.layers.set(())
            with self.methods.suspended(), self.forwards.suspended():
                twin = copy.deepcopy(self.session.family.model, memo)
            self.layers.set(choice)
        return twin

    def _entry(self, plain: Forward, run: Callable[..., Any], *, outermost: bool = False) -> Forward:
        """`run` in the current pass, or in a new one where none runs; `plain` is the module's own forward."""
        signature, thread = inspect.signature(plain), self.calls.thread

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                if self.current is not PLAIN and not self.plain_is_prepared:
                    _check_compiling(kwargs)
                return plain(*args, **kwargs)
            if thread.plain and not outermost:
                return plain(*args, **kwargs)
            with self.calls.lock:
                step = None
                if outermost and thread.generation is not None:
                    step, thread.generation.step = thread.generation.step, None
                    if step is not None and step.tokens is not _tokens(args, kwargs):
                        step = None  # a call inside of generate()
                if step is not None and step.runs_plain:
                    return self._run_plain(plain, args, kwargs, step.layers)
                if not self.session.serves:
                    return self._run_plain(plain, args, kwargs)
                inputs = kwargs if not args else _by_name(signature, args, kwargs)
                if self.current is not None and not outermost:
                    return run(self.current, plain, inputs)
                if not needs_dropping(inputs):
                    return self._run_plain(plain, args, kwargs)
                with self._begin(step, inputs) as current:
                    return run(current, plain, inputs)

        forward.__signature__ = signature  # type: ignore[attr-defined]  # transformers 4 reads it in each step
        return forward

    def _features(self, modality: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        """``get_..._features`` with stage 1, eagerly."""
        encode = self.session.vision.features_getter(modality, plain)

        @functools.wraps(plain)
        def features(*args: Any, **kwargs: Any) -> Any:
            with self.calls.lock:
                if not self.session.serves or self.current is PLAIN:
                    return plain(*args, **kwargs)
                before = self.eager.on
                self.eager.set(True)
                try:
                    output, images = encode(*args, **kwargs)
                finally:
                    self.eager.set(before)
                self.keep_images(modality, images)
                return output

        return features

    def _run_plain(self, plain: Forward, args: tuple[Any, ...], kwargs: Inputs, layers: tuple[int, ...] = ()) -> Any:
        """The module's own pass, with inputs of their own for some layers."""
        thread, outer, choice = self.calls.thread, self.current, self.layers.choice
        before, thread.plain, self.current = thread.plain, True, PLAIN
        try:
            if choice != layers:
                self.layers.set(layers)
            return plain(*args, **kwargs)
        finally:
            thread.plain, self.current = before, outer
            if outer is not None:
                self.layers.set(choice)

    @contextlib.contextmanager
    def _begin(self, step: Step | None, inputs: Inputs) -> Iterator[Pass]:
        thread, outer, choice = self.calls.thread, self.current, self.layers.choice
        if step is None:
            self.session.stopwatch.read()  # discards what an unfinished prompt has left
        cache = as_drop_cache(next((value for value in inputs.values() if isinstance(value, Cache)), None))
        self.current = Pass(self, step, has_pictures(inputs))
        before, thread.plain = thread.plain, False
        self.eager.set(True)
        self.plain_is_prepared = False
        try:
            with rollback_on_error(cache):
                yield self.current
        finally:
            thread.plain, self.current = before, outer
            self.eager.set(outer is not None and not outer.plain)
            self.layers.set(() if outer is None else choice)

    def _eager(self, compiled: Forward) -> Forward:
        """A compiled function that runs eagerly for prompts with images and on shortened caches."""

        @functools.wraps(compiled)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.calls.lock:
                generation = self.calls.thread.generation
                step = None if generation is None else generation.step
                if step is not None and step.runs_plain and step.tokens is _tokens(args, kwargs):
                    assert generation is not None
                    generation.step = None
                    return self._run_plain(compiled, args, kwargs, step.layers)
                if not self.session.serves or not needs_dropping(kwargs):
                    return self._run_plain(compiled, args, kwargs)
                self.eager.set(True)
                try:
                    return compiled(*args, **kwargs)
                finally:
                    self.eager.set(False)

        return call

    def _compiled(self, get_compiled_call: Callable[..., Forward]) -> Callable[..., Forward]:
        """generate() compiles steps that need nothing of a context: they run, and are traced, as without one."""

        @functools.wraps(get_compiled_call)
        def get(*args: Any, **kwargs: Any) -> Forward:
            compiled = get_compiled_call(*args, **kwargs)

            def call(*args: Any, **kwargs: Any) -> Any:
                with self.calls.lock:
                    generation = self.calls.thread.generation
                    step = None if generation is None else generation.step
                    if not self.session.serves or step is None:
                        return compiled(*args, **kwargs)
                    if not step.runs_plain:
                        return self.session.family.model(*args, **kwargs)
                    assert generation is not None
                    generation.step = None
                    with self.forwards.suspended():
                        return self._run_plain(compiled, args, kwargs, step.layers)

            return call

        return get


class Pass:
    """One forward pass."""

    plain = False
    """Whether the model runs as without a context."""

    def __init__(self, passes: Passes, step: Step | None, pictures: bool) -> None:
        self.passes, self.session = passes, passes.session
        self.family, self.config = self.session.family, self.session.config
        self.step = step
        self.pictures = pictures
        self.encoded: dict[str, list[EncodedImage]] = {}
        """By modality: the images of the pass."""
        self.outputs: Outputs | None = None
        self.input_ids: Tensor | None = None  # (B, L)

    # The model, its body with input_ids and pictures, and the language model with embeddings.

    def run_model(self, plain: Forward, inputs: Inputs) -> Any:
        """Takes ``logits_to_keep`` and ``labels``."""
        if self.pictures:
            inputs = dict(inputs)
            self.outputs = Outputs(inputs)
        return plain(**inputs)

    def run_body(self, plain: Forward, inputs: Inputs) -> Any:
        """Takes ids, and the images of encoder outputs that generate() or the caller has computed."""
        if self.pictures:
            ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
            self.input_ids = self.family.placeholder_ids(embeds) if ids is None and embeds is not None else ids
            for modality, output in (inputs.get("mm_encoder_outputs") or {}).items():
                if output is not None:
                    self.encoded[modality] = self._images_of(modality, output)
        return plain(**inputs)

    def run_language(self, plain: Forward, inputs: Inputs) -> Any:
        """Reads a prompt with images, or goes on behind a shortened cache."""
        cache = as_drop_cache(inputs.get(CACHE))
        if isinstance(cache, ShortenedCache):
            cache.state.bind(self.session.lifetime)
        prefill = None
        if any(self.encoded.values()):
            output, prefill = self._read_prompt(plain, inputs, cache)
        else:
            output = self._continue(plain, inputs, cache)
        if self.outputs is not None:
            output.last_hidden_state = self.outputs.select(output.last_hidden_state, prefill)
        return output

    def _continue(self, plain: Forward, inputs: Inputs, cache: Any) -> Any:
        """A pass over text, or over what follows a shortened prompt."""
        if not isinstance(cache, ShortenedCache) or not cache.shortened:
            self.passes.layers.set(())
            return plain(**inputs)
        hidden, mask = inputs.get("inputs_embeds"), inputs.get("attention_mask")
        if hidden is None:
            hidden = self.family.language_model.get_input_embeddings()(inputs["input_ids"])
        check_mask(cache, mask, hidden.shape[1])
        step = Decode(self.family, cache, hidden, mask)
        inputs = {**inputs, CACHE: cache, **step.inputs()}
        self.passes.layers.set(tuple(cache.layer_inputs))
        return plain(**inputs)

    def _images_of(self, modality: str, output: Any) -> list[EncodedImage]:
        images = getattr(output, "mustdrop", None)
        if images is None and self.step is not None:  # copies by accelerate lose attributes
            generation = self.session.calls.thread.generation
            images = None if generation is None else generation.encoded.get(modality)
        if images is None:
            if self.config.drops_nothing:
                return []
            raise ValueError("image features must be computed inside drop_tokens: pass pixel_values")
        if self.input_ids is None:
            return list(images)
        places = self.input_ids == self.family.token_id(modality)
        return repeated(images, places, sum(map(len, features_of(output))))

    def _read_prompt(self, plain: Forward, inputs: Inputs, given: Any) -> tuple[Any, Prefill | None]:
        try:
            prompt, later, cache = self._split(inputs, given)
            prefill = self._prefill(prompt, cache)
        except (TypeError, ValueError):
            if not self.config.drops_nothing:
                raise
            return plain(**inputs), None  # with what cannot be cut, such as a cache of the caller's own kind
        self.passes.layers.set(ALL_LAYERS)
        output = plain(**prefill.model_inputs(prompt), drop_prefill=prefill)
        report = prefill.finish(cache)
        generation = self.session.calls.thread.generation if self.step is not None else None
        if generation is None or not (generation.reported and given is None):
            self.session.report.prompts.append(report)  # use_cache=False reads the prompt again in each step
        if generation is not None:
            generation.reported = True
        self.passes.layers.set(())
        if later is not None:
            hidden = self._continue(plain, later, cache).last_hidden_state
            output.last_hidden_state = torch.cat([output.last_hidden_state, hidden], dim=1)
        if given is None and prompt.get("use_cache") is False:
            output[CACHE] = None  # the cache for the tokens after the prompt is this pass's alone
        return output, prefill

    def _split(self, inputs: Inputs, given: Any) -> tuple[Inputs, Inputs | None, DropCache | DropStaticCache | None]:
        """The prompt's inputs, those of the tokens after it, and the cache.

        generate() appends an assistant's candidate tokens to the prompt, and with ``use_cache=False`` all that it has
        generated. They get a pass of their own, since they must neither be text queries nor attend to tokens that
        stage 3 drops.
        """
        _check_checkpointing(self.family.layers)
        config = self.family.language_model.config
        enabled = config.use_cache if inputs.get("use_cache") is None else inputs["use_cache"]
        cache = None if given is None and not enabled else cache_for_prompt(config, given)
        seen = 0 if cache is None else cache.seen
        if self.config.positions == "published" and seen > 0:
            raise ValueError(
                "positions='published' renumbers a prompt, which cannot be done to an image behind cached tokens; "
                "begin a new prompt, or use positions='original'"
            )
        generation = self.session.calls.thread.generation if self.step is not None else None
        length = None if generation is None else generation.prompt_length
        count = 0
        if length is not None and self.input_ids is not None and not self.config.drops_nothing:
            past = 0 if length < seen else seen  # 0: a turn was given alone, without the cached tokens
            count = max(past + self.input_ids.shape[1] - length, 0)
        if count and cache is None:
            cache = DropCache(config)
        if cache is not None:
            cache.state.bind(self.session.lifetime)
        prompt = {**inputs, CACHE: cache}
        if not count:
            return prompt, None, cache
        later = dict(prompt)
        for name, dim in (("inputs_embeds", 1), ("position_ids", -1), ("cache_position", 0)):
            if inputs.get(name) is not None:
                rest = inputs[name].shape[dim] - count
                prompt[name] = inputs[name].narrow(dim, 0, rest)
                later[name] = inputs[name].narrow(dim, rest, count)
        if inputs.get("attention_mask") is not None:
            prompt["attention_mask"] = inputs["attention_mask"][:, :-count]
        assert self.input_ids is not None
        self.input_ids = self.input_ids[:, :-count]
        return prompt, later, cache

    def _prefill(self, inputs: Inputs, cache: DropCache | DropStaticCache | None) -> Prefill:
        converted = None if self.step is None else self.step.mask
        return Prefill(
            self.family,
            self.config,
            self.session.stopwatch,
            self.encoded,
            self.input_ids,
            inputs,
            mask_of(inputs.get("attention_mask"), converted),
            cache,
            heat_maps=self.session.heat_maps,
        )


class _PlainPass:
    """A pass of the model's own code."""

    plain = True


PLAIN: Any = _PlainPass()


def has_pictures(inputs: Inputs) -> bool:
    """Whether a model's inputs hold an image or a video, or encoder outputs of one."""
    if "mm_encoder_outputs" not in inputs and "pixel_values" not in " ".join(inputs):
        return False
    for name, value in inputs.items():
        if value is not None and (name.startswith("pixel_values") or (name == "mm_encoder_outputs" and value)):
            return True
    return False


def needs_dropping(inputs: Inputs) -> bool:
    """Whether a pass reads a prompt with images, or goes on behind a shortened cache."""
    caches = (as_drop_cache(value) for value in inputs.values() if isinstance(value, Cache))
    return has_pictures(inputs) or any(isinstance(cache, ShortenedCache) and cache.shortened for cache in caches)


def _tokens(args: tuple[Any, ...], kwargs: Inputs) -> Any:
    """The ids or embeddings of a call of the model."""
    ids = args[0] if args else kwargs.get("input_ids")
    return kwargs.get("inputs_embeds") if ids is None else ids


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Inputs) -> Inputs:
    given = dict(signature.bind(*args, **kwargs).arguments)
    return {**given, **given.pop("kwargs", {})}


def _check_compiling(inputs: Inputs) -> None:
    if has_pictures(inputs) or any(isinstance(c, ShortenedCache) and c.shortened for c in inputs.values()):
        raise RuntimeError(
            "drop_tokens reads prompts with images, and goes on after them, outside of compiled code: do not call the "
            "model inside a compiled function; generate(cache_implementation='static') compiles decoding"
        )


def _check_checkpointing(layers: Any) -> None:
    if any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in layers):
        raise ValueError(
            "gradient checkpointing runs layers a second time, when the tokens that they read are gone; "
            "model.gradient_checkpointing_disable(), or model.eval()"
        )
