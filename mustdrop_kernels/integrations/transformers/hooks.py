# SPDX-License-Identifier: Apache-2.0
"""Hooks in a model: installed while a prompt can come, removed while tokens are decoded and after the context."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from transformers.cache_utils import Cache

from .attention import hooked_config
from .caches import as_drop_cache
from .compat import CACHE, hidden_of, with_hidden
from .decode import replace_inputs
from .eager import EagerSwitch
from .patching import patch
from .prefill import DropStep, Prefill
from .rollback import ForwardRollback
from .session import ALL_LAYERS, Layers, Session, has_pictures
from .shortened_cache import ShortenedCache

Choice = TypeVar("Choice")


class HookSet(Generic[Choice]):
    """A set of hooks of which one choice at a time is installed; the choice `off` is none."""

    def __init__(self, off: Choice, install: Callable[[contextlib.ExitStack, Choice], None]) -> None:
        self.choice = self._off = off
        self._install = install
        self._stack = contextlib.ExitStack()
        self.close = self._stack.close
        """Removes the hooks."""

    def set(self, choice: Choice) -> None:
        """Replaces the installed hooks by those of `choice`; none are left if that raises."""
        if choice == self.choice:
            return
        self.close()
        with contextlib.ExitStack() as stack:
            self._install(stack, choice)
            stack.callback(setattr, self, "choice", self._off)
            self._stack.enter_context(stack.pop_all())
        self.choice = choice


class Hooks:
    """The hooks of a context, which pass inputs and outputs of the model's modules to the session."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.family, self.config = session.family, session.config
        self.eager = EagerSwitch()
        layers = tuple(range(len(self.family.layers)))
        self._attention_layers = layers if session.heat_maps else self.config.pruning_layers
        self._rollback = ForwardRollback()
        self._forward = HookSet(False, self._install_forward)
        self._layers: HookSet[Layers] = HookSet((), self._install_layers)

    def install(self, stack: contextlib.ExitStack, wrappers: list[Any]) -> None:
        """Installs everything, in the wrappers by ``torch.compile`` too; the stack removes it, in reverse order."""
        model = self.family.model
        stack.callback(self.session.lifetime.end)
        stack.callback(self.eager.set, False)
        self.session.vision.install(stack)
        stack.callback(self._forward.close)
        stack.callback(self._layers.close)
        self.enable()
        for module in wrappers:
            stack.callback(module.register_forward_pre_hook(self._before_model, with_kwargs=True).remove)
        compiled = getattr(model, "_compiled_call_impl", None)  # by model.compile()
        if compiled is not None:

            def call(*args: Any, **kwargs: Any) -> Any:
                self._before_model(model, args, kwargs)
                return compiled(*args, **kwargs)

            patch(stack, model, "_compiled_call_impl", call)

    @contextlib.contextmanager
    def generation(self, prompt_length: int | None, pictures: bool) -> Iterator[None]:
        """A call of generate() with a prompt of this length."""
        with self.session.generation(prompt_length):
            self.eager.set(pictures)
            try:
                yield
            finally:
                self.eager.set(False)
                self._layers.set(())
                self.enable()

    def enable(self, mask: Any = None) -> None:
        """Installs the hooks of a forward pass; `mask` (B, L) is the mask before generate() converts it."""
        self.session.mask = mask
        self._forward.set(True)

    def disable(self, layer_inputs: dict[int, Any]) -> None:
        """Removes the hooks of a forward pass; the given layers still take their inputs from the cache."""
        self.eager.set(False)
        self._forward.set(False)
        self._layers.set(tuple(layer_inputs))

    def _install_forward(self, stack: contextlib.ExitStack, on: bool) -> None:
        if not on:
            return
        model, body, language = self.family.model, self.family.body, self.family.language_model
        stack.callback(model.register_forward_pre_hook(self._before_model, with_kwargs=True).remove)
        self._rollback.install(stack, model, self._after_model)
        stack.callback(model.register_forward_pre_hook(_check_labels, with_kwargs=True).remove)
        stack.callback(body.register_forward_pre_hook(self._before_body, with_kwargs=True).remove)
        stack.callback(language.register_forward_pre_hook(self._before_language, with_kwargs=True).remove)
        stack.callback(language.register_forward_hook(self._after_language, with_kwargs=True).remove)

    def _install_layers(self, stack: contextlib.ExitStack, layers: Layers) -> None:
        """Hooks of the layers that need them: none for text alone, which runs at plain speed."""
        if layers != ALL_LAYERS:
            for i in layers:
                hook = functools.partial(replace_inputs, i)
                stack.callback(self.family.layers[i].register_forward_pre_hook(hook, with_kwargs=True).remove)
            return
        for i, layer in enumerate(self.family.layers):
            before = functools.partial(self._before_layer, i)
            stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
        for i in self.config.pruning_layers:
            # Runs before transformers' own hook, which records hidden states.
            hook = self.family.layers[i].register_forward_hook(_after_layer, with_kwargs=True, prepend=True)
            stack.callback(hook.remove)
        for i in self._attention_layers:
            attention = self.family.layers[i].self_attn
            patch(stack, attention, "config", hooked_config(attention.config))

    # The model, its body with input_ids and pictures, and the language model with embeddings.

    def _before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            caches = [as_drop_cache(value) for value in kwargs.values() if isinstance(value, Cache)]
            shortened = any(isinstance(cache, ShortenedCache) and cache.shortened for cache in caches)
            self.eager.set(shortened or has_pictures(kwargs))

    def _after_model(self, succeeded: bool) -> None:
        self.eager.set(False)
        if not succeeded:
            self._layers.set(())

    def _before_body(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            _check_compiling(has_pictures(kwargs))
            return
        self.session.read_inputs(args[0] if args else kwargs.get("input_ids"), kwargs.get("mm_encoder_outputs"))

    def _before_language(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            cache = kwargs.get(CACHE)
            _check_compiling(isinstance(cache, ShortenedCache) and cache.shortened)
            return None
        kwargs, layers = self.session.language_inputs(kwargs)
        self._layers.set(layers)
        return args, kwargs

    def _after_language(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        prefill = kwargs.get("drop_prefill")
        if isinstance(prefill, Prefill):
            self.session.report.prompts.append(prefill.finish(kwargs[CACHE]))
            self._layers.set(())
            self.session.read_candidates(module, output)

    # The decoder layers, while a prompt is read.

    def _before_layer(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        prefill = kwargs.pop("drop_prefill", None)
        if prefill is None:
            return None
        kwargs = prefill.layer_inputs(index, kwargs, args[0])
        if index in self._attention_layers:
            kwargs["drop_step"] = DropStep(prefill, index)  # an argument of the attention function
        return args, kwargs


def _after_layer(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    drop_step = kwargs.get("drop_step")
    if drop_step is None:
        return None
    return with_hidden(output, drop_step.drop_rows(hidden_of(output)))


def _check_compiling(needed: bool) -> None:
    if needed:
        raise RuntimeError(
            "drop_tokens reads prompts with images, and goes on after them, outside of compiled code: do not call the "
            "model inside a compiled function; generate(cache_implementation='static') compiles decoding"
        )


def _check_labels(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("labels") is not None:
        raise ValueError("drop_tokens cannot compute a loss: labels no longer line up with the tokens that are left")
