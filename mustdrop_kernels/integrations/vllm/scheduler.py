# SPDX-License-Identifier: Apache-2.0
"""Scheduling: a prompt with an image is read in one step, into blocks of its own, and those that it emptied go back."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from .blocks import keep_out_of_prefix_cache, never_share, release_leading_blocks, shares_blocks

logger = init_logger("vllm.mustdrop")

_NOT_NOW: tuple[list[int], list[int]] = ([], [])  # nothing to load, nothing loaded twice


class MustDropScheduler(Scheduler):
    """vLLM's scheduler with three rules more."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.released_blocks = 0
        """Blocks that running requests have given back."""
        keep_out_of_prefix_cache(self.kv_cache_manager, private=lambda request: request.has_encoder_inputs)

    def add_request(self, request: Any) -> None:
        """What the blocks of a prompt with images hold depends on all of it, so it shares none, as text does."""
        if request.has_encoder_inputs:
            never_share(request)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Plans a step; the worker compacts the prompts with images that begin in it."""
        plan = super().schedule(*args, **kwargs)
        begin = [new.req_id for new in plan.scheduled_new_reqs] + list(plan.scheduled_cached_reqs.resumed_req_ids)
        for request_id in begin:
            if self.requests[request_id].has_encoder_inputs and shares_blocks(self.kv_cache_manager, request_id):
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
        """The whole prompt of a request with images, and nothing after it, or nothing in this step.

        Nothing after it: a preempted request reads again what it had generated, and those tokens must neither vote nor
        see image tokens that were gone when they were generated.
        """
        plan = super()._try_schedule_encoder_inputs
        if num_computed_tokens > 0:
            return plan(request, num_computed_tokens, num_new_tokens, encoder_compute_budget, shift_computed_tokens)
        if problem := _cannot_serve(request):
            logger.warning("mustdrop: request %s is refused: %s", request.request_id, problem)
            self.encoder_cache_mismatch_reqs.add(request.request_id)  # vLLM ends these with an error
            return [], 0, encoder_compute_budget, *_NOT_NOW
        prompt = request.num_prompt_tokens
        if num_new_tokens >= prompt:
            planned = plan(request, 0, prompt, encoder_compute_budget, shift_computed_tokens)
            if planned[1] == prompt:
                return planned
        return [], 0, encoder_compute_budget, *_NOT_NOW

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Frees the blocks that the step's prompts have emptied, where their requests go on."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request_id, dropped in getattr(model_runner_output, "mustdrop_dropped", {}).items():
            request = self.requests.get(request_id)
            if request is not None and request.status == RequestStatus.RUNNING:
                self.released_blocks += release_leading_blocks(self.kv_cache_manager, request_id, dropped)
        return outputs


def _cannot_serve(request: Any) -> str | None:
    """What a request with images asks for that it cannot have."""
    sampling = request.sampling_params
    if sampling is not None and sampling.prompt_logprobs is not None:
        return "prompt_logprobs are not known of tokens that were dropped"
    if request.resumable:
        return "a prompt with images is read in one piece, so it cannot come in parts"
    return None
