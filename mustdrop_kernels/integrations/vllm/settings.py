# SPDX-License-Identifier: Apache-2.0
"""Settings in ``hf_overrides={"mustdrop": {...}}``, MUSTDROP_VLLM and requests, and their checks."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

from ...config import MustDropConfig

FIELD = "mustdrop"
VARIABLE = "MUSTDROP_VLLM"
PER_REQUEST = ("pruning_layers", "global_threshold", "individual_threshold", "budgets", "text_queries")
"""Fields that a request can set."""
_ARGUMENT = f"extra_args['{FIELD}']"


def from_environment() -> dict[str, Any] | None:
    """The value for ``hf_overrides`` from the environment variable, or None if it is not set.

    Raises:
        ValueError: the variable holds neither a preset's name nor a JSON object.
    """
    text = os.environ.get(VARIABLE, "").strip()
    return _from_text(text, VARIABLE) if text else None


def _from_text(text: str, name: str) -> dict[str, Any]:
    if not text.startswith("{"):
        return {"preset": text}
    try:
        fields: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise ValueError(f"mustdrop: {name} must hold a preset's name or a JSON object: {error}") from None
    return fields


def read(hf_config: Any) -> MustDropConfig:
    """The config in a model's configuration: fields of ``MustDropConfig``, or ``{"preset": name}`` with fields changed.

    Raises:
        ValueError: fields are missing, invalid or not supported by this plug-in.
    """
    fields = getattr(hf_config, FIELD, None)
    if not isinstance(fields, dict):
        raise ValueError(
            'mustdrop: hf_overrides must hold {"mustdrop": {...}} with the fields of MustDropConfig, or '
            f'{{"preset": name}}, got {fields!r}'
        )
    config = parse(fields)
    _check_depth(config, hf_config.text_config.num_hidden_layers)
    return dataclasses.replace(config, evict_from=0)


def parse(fields: dict[str, Any]) -> MustDropConfig:
    """A config from fields, or from ``{"preset": name}`` with fields changed.

    Raises:
        ValueError: a field is invalid or not supported by this plug-in.
    """
    fields = dict(fields)
    preset = fields.pop("preset", None)
    config = MustDropConfig.from_dict(fields) if preset is None else MustDropConfig.preset(preset, **fields)
    _check(config)
    return config


def of_request(config: MustDropConfig, extra_args: dict[str, Any] | None, layers: int) -> MustDropConfig | None:
    """The config of a request whose sampling parameters hold `extra_args`; None: it keeps all tokens.

    `config` is that of the engine, whose language model has this number of layers.

    ``extra_args["mustdrop"]`` is false (0 or "false" where an interface takes no booleans), a preset's name, or fields
    of ``MustDropConfig`` as an object or as JSON, ``"preset"`` among them for a preset with fields changed. Only the
    pruning is a request's own: stage 1 is the engine's, since requests share the features of images.

    Raises:
        ValueError: the value is invalid, changes stage 1, or prunes in a layer that does not exist.
    """
    given = (extra_args or {}).get(FIELD)
    if given is None or given is True:
        return config
    if given in (False, "false"):
        return None
    fields = _from_text(given, _ARGUMENT) if isinstance(given, str) else given
    if not isinstance(fields, dict):
        raise ValueError(f"mustdrop: {_ARGUMENT} must be false, a preset's name or an object of fields, got {given!r}")
    if others := sorted(map(str, set(fields) - {"preset", *PER_REQUEST})):
        raise ValueError(
            f"mustdrop: {_ARGUMENT} cannot set {', '.join(others)}: a request sets a preset or {', '.join(PER_REQUEST)}"
        )
    changed = dict(fields)
    preset = changed.pop("preset", None)
    base = config if preset is None else MustDropConfig.preset(preset)
    pruning = {name: getattr(base, name) for name in PER_REQUEST}
    chosen = dataclasses.replace(config, **{**pruning, **changed})
    _check_depth(chosen, layers)
    return chosen


def check_request(vllm_config: Any, params: Any) -> None:
    """Raises ``ValueError`` if the sampling parameters of a request hold invalid settings for MustDrop.

    Engines without MustDrop leave them alone.
    """
    extra_args, hf_config = getattr(params, "extra_args", None), vllm_config.model_config.hf_config
    if not extra_args or FIELD not in extra_args or not hasattr(hf_config, FIELD):
        return
    of_request(read(hf_config), extra_args, hf_config.text_config.num_hidden_layers)


def _check_depth(config: MustDropConfig, layers: int) -> None:
    """Raises ``ValueError`` if a pruning layer is beyond the `layers` of the language model."""
    if beyond := [layer for layer in config.pruning_layers if layer >= layers]:
        raise ValueError(f"mustdrop: pruning_layers: the language model has {layers} layers, there is no {beyond[0]}")


def _check(config: MustDropConfig) -> None:
    if config.merge and config.merge_at != "tower":
        raise ValueError(f"mustdrop: merge_at must be 'tower' in vLLM, got {config.merge_at!r}")
    if config.merge and config.merge_uniform:
        raise ValueError(
            "mustdrop: merge_uniform must be False in vLLM, where images share a batch with those of other requests"
        )
    if not config.evict:
        raise ValueError("mustdrop: evict must be True in vLLM, where all layers share one block table")
    if config.evict_from not in (None, 0):
        raise ValueError(
            f"mustdrop: evict_from must be 0 or left out in vLLM, where all layers share one block table; got "
            f"{config.evict_from}"
        )
    if config.positions != "original":
        raise ValueError(f"mustdrop: positions must be 'original' in vLLM, got {config.positions!r}")
