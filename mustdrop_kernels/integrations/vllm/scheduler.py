# SPDX-License-Identifier: Apache-2.0
"""Schedulers: read a prompt with images in one step, into private blocks, and free the blocks that drops emptied."""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from ...config import MustDropConfig
from . import images, settings
from .beams import prompt_tokens
from .blocks import keep_out_of_prefix_cache, never_share, release_leading_blocks, shares_blocks
from .reports import dropped_tokens
from .requests import Reading, reading, set_reading

logger = init_logger("vllm.mustdrop")

_NO_LOADS: tuple[list[int], list[int]] = ([], [])  # external loads and their duplicates


def scheduler(*, vllm_config: Any, **kwargs: Any) -> Scheduler:
    """The scheduler of an engine, with asynchronous scheduling or without."""
    is_async = vllm_config.scheduler_config.async_scheduling
    return (MustDropAsyncScheduler if is_async else MustDropScheduler)(vllm_config=vllm_config, **kwargs)


class _Rules(Scheduler):
    """Rules for prompts with images.

    A step planned ahead, while another one runs, needs no number of dropped tokens: requests keep their plain lengths
    here, and blocks are freed when the output of the step that emptied them arrives. Later steps neither read nor write
    those blocks.
    """

    max_num_active_reqs: int  # vLLM's limit of requests that run

    def __init__(self, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        super().__init__(*args, vllm_config=vllm_config, **kwargs)
        hf_config = vllm_config.model_config.hf_config
        self._drop_config, self._layers = settings.read(hf_config), hf_config.text_config.num_hidden_layers
        self._step_config: MustDropConfig | None = None
        self._step_is_plain = False
        self.released_blocks = 0
        """Number of blocks that running requests have freed."""
        self.plain_prompts = 0
        """Number of prompts with images that were read plainly, since they do not fit a step."""
        keep_out_of_prefix_cache(self.kv_cache_manager, private=reading)

    # How a request is read.

    def add_request(self, request: Any) -> None:
        """Decides how a request is read, and keeps blocks of prompts that lose tokens private."""
        if request.request_id not in self.requests and (found := images.features(request)):
            chosen = self._reading(request, found)
            if chosen is not None:
                set_reading(request, chosen)
                never_share(request)  # the contents of its blocks depend on the whole prompt
            elif self._drop_config.needs_vision_stage:
                request.mm_features = [_encoded_plainly(feature) for feature in request.mm_features]
        super().add_request(request)

    def _reading(self, request: Any, found: list[Any]) -> Reading | None:
        sampling = request.sampling_params
        try:
            config = settings.of_request(self._drop_config, sampling.extra_args, self._layers)
        except ValueError as error:  # it came by a front end that has not loaded the plug-in
            logger.warning("%s; the request %s keeps every token", error, request.request_id)
            return None
        # The log probabilities of a prompt need all of its tokens, and a prompt that comes in parts has no end yet.
        if config is None or sampling.prompt_logprobs is not None or request.resumable:
            return None
        tokens = prompt_tokens(request)
        if self._longest_step(found) < tokens:
            self.plain_prompts += 1
            if self.plain_prompts == 1:
                logger.warning(
                    "mustdrop: a prompt with images keeps every token if it does not fit a step beside max_num_seqs - "
                    "1 decoding requests; %s has %d tokens: raise max_num_batched_tokens or lower max_num_seqs. Later "
                    "prompts are counted only",
                    request.request_id, tokens,
                )  # fmt: skip
            return None
        return Reading(tokens, config)

    def _longest_step(self, found: list[Any]) -> int:
        """Number of tokens that a step can read of a prompt with these images, while all other requests decode."""
        of_images = {feature.identifier: feature.mm_position.get_num_embeds() for feature in found}
        if sum(of_images.values()) > min(self.max_num_encoder_input_tokens, self.encoder_cache_manager.cache_size):
            return 0
        threshold = self.scheduler_config.long_prefill_token_threshold or self.max_num_scheduled_tokens
        decoding = (self.max_num_running_reqs - 1) * (1 + self.num_spec_tokens)
        return min(self.max_num_scheduled_tokens - decoding, threshold)

    # Steps.

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Plans a step; raises ``RuntimeError`` if blocks that the worker will compact are shared."""
        self._step_config, self._step_is_plain = None, False
        active = self.max_num_active_reqs
        try:
            plan = super().schedule(*args, **kwargs)
        finally:
            self.max_num_active_reqs = active
        plan.mustdrop_preemptions = {}  # of each prompt that is read in this step, so far
        if self._step_config is not None:
            for request_id, count in plan.num_scheduled_tokens.items():
                request = self.requests[request_id]
                if request.num_computed_tokens == count and reading(request) is not None:
                    if shares_blocks(self.kv_cache_manager, request_id):
                        raise RuntimeError(
                            f"mustdrop: request {request_id} has blocks of another, which cannot be compacted"
                        )
                    plan.mustdrop_preemptions[request_id] = request.num_preemptions
        return plan

    def _try_schedule_encoder_inputs(
        self,
        request: Any,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> Any:
        """Schedules the whole prompt of a request that loses tokens and nothing after it, or nothing in this step.

        A preempted request, or one of beam search, reads its generated tokens again, in a later step: they must neither
        be text queries nor attend to image tokens that were dropped before they were generated.

        Prompts that begin in a step share one config, and images that are encoded in a step pass through stage 1 or
        not: other requests begin in a later step.
        """
        plan = super()._try_schedule_encoder_inputs
        nothing: Any = [], 0, encoder_compute_budget, *_NO_LOADS
        found = reading(request)
        if found is None or found.tokens <= num_computed_tokens:
            planned = plan(request, num_computed_tokens, num_new_tokens, encoder_compute_budget, shift_computed_tokens)
            if planned[0] and self._drop_config.needs_vision_stage:
                if self._step_config is not None:
                    self.max_num_active_reqs = 0
                    return nothing
                self._step_is_plain = True
            return planned
        fits = num_new_tokens >= found.tokens and not self._step_is_plain
        if fits and self._step_config in (None, found.config):
            planned = plan(request, 0, found.tokens, encoder_compute_budget, shift_computed_tokens)
            if planned[1] == found.tokens:
                self._step_config = found.config
                return planned
        self.max_num_active_reqs = 0  # no request overtakes this one, so that the next steps have room for it
        return nothing

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Frees the blocks that drops have emptied, for requests that are still running and have not begun again."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request_id, dropped in dropped_tokens(model_runner_output).items():
            request = self.requests.get(request_id)
            if (
                request is not None
                and request.status == RequestStatus.RUNNING
                and request.num_preemptions == scheduler_output.mustdrop_preemptions[request_id]
            ):
                self.released_blocks += release_leading_blocks(self.kv_cache_manager, request_id, dropped)
        return outputs


class MustDropScheduler(_Rules):
    """vLLM's scheduler with rules for prompts with images."""


class MustDropAsyncScheduler(_Rules, AsyncScheduler):
    """vLLM's asynchronous scheduler with rules for prompts with images."""


def _encoded_plainly(feature: Any) -> Any:
    """A feature under a name of its own in the encoder cache, which holds others after stage 1."""
    if feature.modality != "image":
        return feature
    return dataclasses.replace(feature, identifier=f"{feature.identifier}-plain")
