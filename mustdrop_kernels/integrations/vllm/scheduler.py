# SPDX-License-Identifier: Apache-2.0
"""Scheduler: reads a prompt with images in one step, into private blocks, and frees the blocks that drops emptied."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from . import images
from .beams import prompt_tokens
from .blocks import keep_out_of_prefix_cache, never_share, release_leading_blocks, shares_blocks

logger = init_logger("vllm.mustdrop")

_NO_LOADS: tuple[list[int], list[int]] = ([], [])  # external loads and their duplicates


class MustDropScheduler(Scheduler):
    """vLLM's scheduler with rules for prompts with images."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.released_blocks = 0
        """Number of blocks that running requests have freed."""
        keep_out_of_prefix_cache(self.kv_cache_manager, private=images.features)

    def add_request(self, request: Any) -> None:
        """Keeps blocks of prompts with images private, since their contents depend on the whole prompt."""
        if images.features(request):
            never_share(request)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Plans a step; raises ``RuntimeError`` if blocks that the worker will compact are shared."""
        plan = super().schedule(*args, **kwargs)
        for request_id, count in plan.num_scheduled_tokens.items():
            request = self.requests[request_id]
            begins = request.num_computed_tokens == count and images.features(request)
            if begins and shares_blocks(self.kv_cache_manager, request_id):
                raise RuntimeError(f"mustdrop: request {request_id} has blocks of another, which cannot be compacted")
        return plan

    def _try_schedule_encoder_inputs(
        self,
        request: Any,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> Any:
        """Schedules the whole prompt of a request with images and nothing after it, or nothing in this step.

        A preempted request, or one of beam search, reads its generated tokens again, in a later step: they must neither
        be text queries nor attend to image tokens that were dropped before they were generated.
        """
        plan = super()._try_schedule_encoder_inputs
        found = images.features(request)
        if not found or images.end(found) <= num_computed_tokens:
            return plan(request, num_computed_tokens, num_new_tokens, encoder_compute_budget, shift_computed_tokens)
        if problem := _cannot_serve(request):
            logger.warning("mustdrop: request %s is refused: %s", request.request_id, problem)
            self.encoder_cache_mismatch_reqs.add(request.request_id)  # vLLM ends these with an error
            return [], 0, encoder_compute_budget, *_NO_LOADS
        prompt = prompt_tokens(request)
        if num_new_tokens >= prompt:
            planned = plan(request, 0, prompt, encoder_compute_budget, shift_computed_tokens)
            if planned[1] == prompt:
                return planned
        return [], 0, encoder_compute_budget, *_NO_LOADS

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Frees the blocks that drops have emptied, for requests that are still running."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request_id, dropped in getattr(model_runner_output, "mustdrop_dropped", {}).items():
            request = self.requests.get(request_id)
            if request is not None and request.status == RequestStatus.RUNNING:
                self.released_blocks += release_leading_blocks(self.kv_cache_manager, request_id, dropped)
        return outputs


def _cannot_serve(request: Any) -> str | None:
    """The reason why a request with images cannot be served, or None."""
    sampling = request.sampling_params
    if sampling is not None and sampling.prompt_logprobs is not None:
        return "prompt_logprobs are not known of tokens that were dropped"
    if request.resumable:
        return "a prompt with images is read in one piece, so it cannot come in parts"
    return None
