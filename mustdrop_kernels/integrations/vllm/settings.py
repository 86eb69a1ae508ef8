# SPDX-License-Identifier: Apache-2.0
"""Settings in ``hf_overrides={"mustdrop": {...}}`` or MUSTDROP_VLLM, and their checks."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

from ...config import MustDropConfig

FIELD = "mustdrop"
VARIABLE = "MUSTDROP_VLLM"


def from_environment() -> dict[str, Any] | None:
    """The value for ``hf_overrides`` from the environment variable, or None if it is not set.

    Raises:
        ValueError: the variable holds neither a preset's name nor a JSON object.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    if not text.startswith("{"):
        return {"preset": text}
    try:
        fields: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise ValueError(f"mustdrop: {VARIABLE} must hold a preset's name or a JSON object: {error}") from None
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
    depth = hf_config.text_config.num_hidden_layers
    if beyond := [layer for layer in config.pruning_layers if layer >= depth]:
        raise ValueError(f"mustdrop: pruning_layers: the language model has {depth} layers, there is no {beyond[0]}")
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
