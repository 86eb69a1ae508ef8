# SPDX-License-Identifier: Apache-2.0
"""Hooks of the decoder layers: installed during a prompt, and in layers whose cache requires inputs of their own."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Literal

from torch import nn

from ...config import MustDropConfig
from .attention import hooked_config
from .compat import hidden_of, with_hidden
from .decode import replace_inputs
from .families import Family
from .patching import patch
from .prefill import DropStep

ALL_LAYERS: Literal["all"] = "all"
Layers = tuple[int, ...] | Literal["all"]
"""The layers that need hooks in a pass: all for a prompt, else those with inputs of their own."""


class LayerHooks:
    """The hooks of one choice of layers at a time; none for text alone, which runs at plain speed."""

    def __init__(self, family: Family, config: MustDropConfig, heat_maps: bool) -> None:
        self.family, self.config = family, config
        self.choice: Layers = ()
        depth = len(family.layers)
        self._attention_layers = tuple(range(depth)) if heat_maps else config.pruning_layers
        self._replace = [functools.partial(replace_inputs, i) for i in range(depth)]  # the same ones for compiled code
        self._stack = contextlib.ExitStack()

    def set(self, choice: Layers) -> None:
        """Replaces the installed hooks by those of `choice`; none are left if that raises."""
        if choice == self.choice:
            return
        self.choice = ()
        self._stack.close()
        with contextlib.ExitStack() as stack:
            self._install(stack, choice)
            self._stack = stack.pop_all()
        self.choice = choice

    def _install(self, stack: contextlib.ExitStack, choice: Layers) -> None:
        if choice != ALL_LAYERS:
            for i in choice:
                hook = self.family.layers[i].register_forward_pre_hook(self._replace[i], with_kwargs=True)
                stack.callback(hook.remove)
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
