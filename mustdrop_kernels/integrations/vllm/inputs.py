# SPDX-License-Identifier: Apache-2.0
"""Requests on their way into an engine: their own settings are checked, those of beam search are marked."""

from __future__ import annotations

import functools
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from . import beams, settings


def install() -> None:
    """Wraps vLLM's processing of requests; repeated calls change nothing."""
    beams.install()
    if not hasattr(InputProcessor.process_inputs, "__wrapped__"):
        InputProcessor.process_inputs = _wrapped(InputProcessor.process_inputs)


def _wrapped(process_inputs: Any) -> Any:
    @functools.wraps(process_inputs)
    def wrapped(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            settings.check_request(self.vllm_config, params)
        except ValueError as error:
            _forget_images(self.renderer.mm_processor_cache, prompt)
            raise VLLMValidationError(str(error), parameter="extra_args") from error  # 400 over HTTP
        request = process_inputs(self, request_id, prompt, params, *args, **kwargs)
        if isinstance(prompt, dict) and beams.FIELD in prompt:
            sampling = request.sampling_params  # the request's own copy
            sampling.extra_args = {**(sampling.extra_args or {}), beams.FIELD: prompt[beams.FIELD]}
        return request

    return wrapped


def _forget_images(cache: Any, prompt: Any) -> None:
    """Removes the images of a request that ends here from the front end's cache: the engine does not receive them."""
    if cache is not None and isinstance(prompt, dict):
        for hashes in prompt.get("mm_hashes", {}).values():
            for mm_hash in hashes:
                cache.invalidate(mm_hash)
