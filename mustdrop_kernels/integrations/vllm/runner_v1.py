# SPDX-License-Identifier: Apache-2.0
"""vLLM's model runner V1: workers that connect it with the model, and its steps.

The runner calls the model's ``forward`` in every step, since it uses no graph for whole steps, so requests that have
lost tokens become shorter ones there.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from vllm.platforms import current_platform

from . import images
from .layout import common_metadata, metadata_swap, without_lost
from .reports import ReportingIds
from .requests import reading
from .step import Step, StepRequest, beginning

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


class RunnerV1:
    """The steps of a model runner."""

    def __init__(self, runner: Any) -> None:  # vLLM's GPUModelRunner
        self._runner, self._record = runner, runner.model.drop_record
        self._requests: dict[str, StepRequest] = {}
        self.dropped: dict[str, int] = {}
        """Number of dropped tokens of each prompt of the last step."""

    def remove(self, names: set[str]) -> None:
        """Removes requests that have ended."""
        self._record.remove(names)
        for name in names:
            self._requests.pop(name, None)

    @contextlib.contextmanager
    def step(self, context: Any) -> Iterator[Step | None]:
        """See ``StepSource.step``."""
        self.dropped = {}
        model, batch = self._runner.model, self._runner.input_batch
        found = context.attn_metadata  # None in profiling and warm-up runs
        if not found or model.attention_names[0] not in found:
            yield None
            return
        names = batch.req_ids[: batch.num_reqs]
        computed = batch.num_computed_tokens_cpu[: batch.num_reqs].tolist()
        requests = [self._request(name, tokens) for name, tokens in zip(names, computed, strict=True)]
        first, lost = beginning(requests, computed), self._record.of(names)
        if not first and not any(lost):
            yield None
            return
        ends = self._runner.query_start_loc.np[: batch.num_reqs + 1].tolist()
        new = [b - a for a, b in itertools.pairwise(ends)]
        lengths = [a + b - c for a, b, c in zip(computed, new, lost, strict=True)]
        table = batch.block_table[0].get_device_tensor(batch.num_reqs)
        seq_lens = self._runner.seq_lens[: batch.num_reqs]
        with metadata_swap(context, model.attention_names) as swap:
            if any(lost):
                size, on_device = model.block_size, torch.tensor(lost, device=table.device)
                table, seq_lens = without_lost(table, seq_lens, on_device, size)
                common = common_metadata(new, torch.tensor(new, device=table.device), lengths, seq_lens, table, size)
                swap.use(model.attention.build(self._runner.attn_groups[0], common), common.slot_mapping)
            yield (
                Step(
                    requests=requests,
                    beginning=first,
                    new=new,
                    lengths=lengths,
                    seq_lens=seq_lens,
                    block_table=table,
                    groups=self._runner.attn_groups[0],
                    report=self.dropped.__setitem__,
                )
                if first
                else None
            )

    def _request(self, name: str, computed: int) -> StepRequest:
        """A request of the runner. One that begins, first or after preemption, has lost nothing."""
        if computed == 0 or name not in self._requests:
            state, index = self._runner.requests[name], self._runner.input_batch.req_id_to_index[name]
            adapter = int(self._runner.input_batch.request_lora_mapping[index])
            self._requests[name] = StepRequest(name, reading(state), images.features(state), adapter)
            self._record.remove([name])
        return self._requests[name]


class MustDropWorker(Worker):
    """vLLM's worker of the platform around a model of this plug-in."""

    def load_model(self, **kwargs: Any) -> None:
        """Loads the model and connects it with the runner."""
        super().load_model(**kwargs)
        self.steps = RunnerV1(self.model_runner)
        self.model_runner.model.connect(self.steps)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Allocates the cache; raises ``ValueError`` if it cannot be compacted."""
        super().initialize_from_config(kv_cache_config)
        self.model_runner.model.check_cache(kv_cache_config)

    def execute_model(self, scheduler_output: Any) -> Any:
        """Runs a step. Images of plain requests are encoded without stage 1; a step holds no others beside them."""
        self.steps.remove(scheduler_output.finished_req_ids)
        readings = {new.req_id: reading(new) for new in scheduler_output.scheduled_new_reqs}
        known = self.model_runner.requests
        encoded = scheduler_output.scheduled_encoder_inputs
        plain = all((readings[name] if name in readings else reading(known[name])) is None for name in encoded)
        self.model_runner.model.encode_plainly(plain)
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """The step's output, with the number of dropped tokens of each of its prompts."""
        output = super().sample_tokens(grammar_output)
        if output is not None and self.steps.dropped:
            output.req_ids = ids = ReportingIds(output.req_ids)
            ids.dropped = self.steps.dropped
        return output
