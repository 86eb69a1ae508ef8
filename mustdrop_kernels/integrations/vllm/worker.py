# SPDX-License-Identifier: Apache-2.0
"""The worker: tells the model whose rows a step holds, and sends what was dropped along with the step's output."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker


class MustDropCPUWorker(CPUWorker):
    """vLLM's CPU worker around a model of this plug-in."""

    def load_model(self, **kwargs: Any) -> None:
        """Connects the model with the runner's batch."""
        super().load_model(**kwargs)
        runner = self.model_runner
        self.ledger = runner.model.ledger
        self.ledger.requests = lambda: runner.input_batch.req_ids

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Makes the cache, and refuses one that the model cannot work on."""
        super().initialize_from_config(kv_cache_config)
        self.model_runner.model.check_cache()

    def execute_model(self, scheduler_output: Any) -> Any:
        """Forgets requests that have ended, then runs the step."""
        self.ledger.forget(scheduler_output.finished_req_ids)
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """The step's output, with the number of tokens that each of its prompts lost."""
        output = super().sample_tokens(grammar_output)
        if output is not None and (dropped := self.ledger.take_news()):
            output.mustdrop_dropped = dropped
        return output
