# SPDX-License-Identifier: Apache-2.0
"""vLLM's model runner V2: the state that a model of this plug-in brings along.

``prepare_attn`` precedes each step outside of any CUDA graph, also before a graph is captured. Requests that have lost
tokens become shorter requests there, for every attention backend and graph mode: a replayed graph reads the lengths,
block tables and slots that were written here, and the model's ``forward`` does not run.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from . import images
from .layout import slot_mapping, without_lost
from .reports import ReportingIds
from .requests import reading
from .step import Step, StepRequest, beginning


class MustDropModelState(DefaultModelState):
    """vLLM's model state around a model of this plug-in."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._record = self.model.drop_record
        self._requests: dict[str, StepRequest] = {}
        self._step: Step | None = None
        # Lengths without dropped tokens. Graphs bind this buffer; vLLM's own one tells the sampler how long a request
        # is, and so remains as it is.
        self._seq_lens = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=self.device)
        self.model.connect(self)

    # Requests.

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Stores how the request is read; one that begins again has lost nothing."""
        name, lora = new_req_data.req_id, new_req_data.lora_request
        self._record.remove([name])
        found, features = reading(new_req_data), images.features(new_req_data)
        self._requests[name] = StepRequest(name, found, features, 0 if lora is None else lora.lora_int_id)
        super().add_request(req_index, new_req_data)

    def remove_request(self, req_id: str) -> None:
        """Removes a request that has ended or been preempted."""
        self._record.remove([req_id])
        self._requests.pop(req_id, None)
        super().remove_request(req_id)

    # Set-up.

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        """Raises ``ValueError`` if the allocated cache cannot be compacted."""
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self.model.check_cache(kv_cache_config)

    def get_additional_cg_support(self) -> tuple[AttentionCGSupport, str | None]:
        """Graphs hold uniform decode steps, or pieces of a step: one in which tokens are dropped runs ``forward``."""
        return AttentionCGSupport.UNIFORM_BATCH, "MustDrop"

    # Steps.

    def prepare_inputs_embeds(self, scheduled_encoder_inputs: dict[str, list[int]], *args: Any, **kwargs: Any) -> Any:
        """Encodes images, without stage 1 for plain requests; the scheduler does not mix them with others in a step."""
        plain = all(self._requests[name].reading is None for name in scheduled_encoder_inputs)
        self.model.encode_plainly(plain)
        return super().prepare_inputs_embeds(scheduled_encoder_inputs, *args, **kwargs)

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: Any,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: list[list[Any]],
        kv_cache_config: Any,
        for_capture: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Attention metadata of a step, in which requests hold only the tokens that are left."""
        shorter = self._without_lost(input_batch, block_tables[0], slot_mappings[0])
        self._step = self._begin(input_batch, shorter, block_tables[0], attn_groups[0])
        args = cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config, for_capture
        return super().prepare_attn(shorter, *args, **kwargs)

    def _without_lost(self, batch: Any, block_table: Tensor, slots: Tensor) -> Any:
        """The batch with its remaining lengths. Block table and slot mapping, gathered for this step, change in place.

        Nothing synchronizes with the device.
        """
        count, seq_lens = batch.num_reqs, self._seq_lens[: len(batch.seq_lens)]
        seq_lens.copy_(batch.seq_lens)
        lost = np.array(self._record.of(batch.req_ids), dtype=np.int32)
        upper = batch.seq_lens_cpu_upper_bound
        if lost.any():
            on_device = async_tensor_h2d(lost, device=self.device)
            size, begins, rows = self.model.block_size, batch.query_start_loc[: count + 1], slots[: batch.num_tokens]
            used = block_table[:count, : -(-int(upper[:count].max()) // size)]
            table, lengths = without_lost(used, seq_lens[:count], on_device, size)
            used.copy_(table)
            seq_lens[:count] = lengths
            rows.copy_(slot_mapping(table, lengths, begins, len(rows), size))
            upper = upper.clone()
            upper[:count] -= torch.from_numpy(lost)
        return dataclasses.replace(batch, seq_lens=seq_lens, seq_lens_cpu_upper_bound=upper)

    def _begin(self, batch: Any, shorter: Any, block_table: Tensor, groups: list[Any]) -> Step | None:
        """The step for the model's ``forward``, if prompts with images begin in it."""
        if not batch.has_prefill:
            return None
        requests = [self._requests[name] for name in batch.req_ids]
        if not (first := beginning(requests, batch.num_computed_tokens_np[: batch.num_reqs])):
            return None
        batch.req_ids = ReportingIds(batch.req_ids)
        return Step(
            requests=requests,
            beginning=first,
            new=np.diff(batch.query_start_loc_np[: batch.num_reqs + 1]).tolist(),
            lengths=shorter.seq_lens_cpu_upper_bound[: batch.num_reqs].tolist(),
            seq_lens=shorter.seq_lens[: batch.num_reqs],
            block_table=block_table[: batch.num_reqs],
            groups=groups,
            report=batch.req_ids.dropped.__setitem__,
        )

    @contextlib.contextmanager
    def step(self, context: Any) -> Iterator[Step | None]:
        """See ``StepSource.step``; its metadata are already those of the remaining tokens."""
        step, self._step = self._step, None
        yield step
