# SPDX-License-Identifier: Apache-2.0
"""The worker: passes the requests of a step to the model, and dropped token counts on with the step's output."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from . import images
from .batch import StepRequest


class MustDropCPUWorker(CPUWorker):
    """vLLM's CPU worker around a model of this plug-in."""

    def load_model(self, **kwargs: Any) -> None:
        """Loads the model and connects its drop record with the runner's batch."""
        super().load_model(**kwargs)
        runner = self.model_runner
        self.drop_record = runner.model.drop_record
        self.drop_record.requests = lambda: _step_requests(runner)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Allocates the cache; raises ``ValueError`` if the model cannot use it."""
        super().initialize_from_config(kv_cache_config)
        self.model_runner.model.check_cache()

    def execute_model(self, scheduler_output: Any) -> Any:
        """Removes requests that have ended from the drop record, then runs the step."""
        self.drop_record.remove(scheduler_output.finished_req_ids)
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """The step's output, with the number of dropped tokens of each of its prompts."""
        output = super().sample_tokens(grammar_output)
        if output is not None and (dropped := self.drop_record.pop_updates()):
            output.mustdrop_dropped = dropped
        return output


def _step_requests(runner: Any) -> list[StepRequest]:
    batch = runner.input_batch
    pairs = zip(batch.req_ids, batch.request_lora_mapping.tolist(), strict=False)
    return [StepRequest(name, images.features(runner.requests[name]), adapter) for name, adapter in pairs]
