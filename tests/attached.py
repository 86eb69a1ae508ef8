# SPDX-License-Identifier: Apache-2.0
"""The state of a model that a context must restore."""

from __future__ import annotations

import copy


def everything_attached(model):
    """Hooks, attributes and configs of every module, by identity."""
    state = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key.endswith("_hooks") or "_hooks_" in key:
                value = tuple(value.items()) if isinstance(value, dict) else value
            elif key in ("_modules", "_parameters", "_buffers"):
                value = tuple((name, id(item)) for name, item in value.items())
            else:
                value = id(value)
            state[name, key] = value
    configs = (model.config, model.config.text_config, model.config.vision_config, model.generation_config)
    return state, [copy.deepcopy(config.to_dict()) for config in configs], _attention(model)


def _attention(model):
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
