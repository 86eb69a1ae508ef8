# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs on a CPU: a graph is the forward pass that was captured, called again.

vLLM's own code dispatches steps to graphs, prepares what a graph binds, and copies its output. A replay calls what was
captured with the tensors that were captured: nothing of the step but the contents of those tensors can reach it.
"""

from __future__ import annotations

import contextlib
import dataclasses

SIZES = [1, 2, 4, 8]


@dataclasses.dataclass
class Graph:
    """A captured forward pass."""

    forward: object
    model: object
    replays: int = 0

    def replay(self):
        from vllm.config import CUDAGraphMode

        self.replays += 1
        steps, self.model._steps = self.model._steps, None  # Python does not run: the model has no way to the step
        try:
            self.forward(CUDAGraphMode.NONE)
        finally:
            self.model._steps = steps


def choose(config, mode):
    """Switches graphs on, which the platform has switched off."""
    from vllm.config import CUDAGraphMode

    config.compilation_config.cudagraph_mode = CUDAGraphMode[mode]
    config.compilation_config.cudagraph_capture_sizes = SIZES
    config.compilation_config.max_cudagraph_capture_size = SIZES[-1]


def install(patch):
    """Lets vLLM's graph manager capture on a CPU."""
    from vllm.config import CUDAGraphMode
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.gpu import cudagraph_utils

    def capture(manager, create_forward_fn, progress_bar_desc=""):
        for desc in manager._capture_descs.get(CUDAGraphMode.FULL, ()):
            create_forward_fn(desc, warmup=True)(CUDAGraphMode.NONE)
            forward = create_forward_fn(desc, warmup=False)
            manager.graphs[desc] = Graph(forward, manager.model_on_cpu)
            forward(CUDAGraphMode.NONE)
        manager._graphs_captured = True

    patch.setattr(cudagraph_utils.CudaGraphManager, "capture", capture)
    patch.setattr(CpuPlatform, "get_global_graph_pool", lambda self: None, raising=False)
    patch.setattr(CpuPlatform, "graph_pool_handle", lambda self: None, raising=False)
    patch.setattr(cudagraph_utils, "graph_capture", contextlib.nullcontext)


def capture(llm):
    """Captures an engine's graphs, as its worker does on a GPU; returns them by the number of tokens."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    manager = runner.cudagraph_manager
    manager.model_on_cpu = runner.model
    manager.capture(
        runner.model,
        runner.model_state,
        runner.input_buffers,
        runner.intermediate_tensors,
        runner.block_tables,
        runner.attn_groups,
        runner.kv_cache_config,
    )
    return {desc.num_tokens: graph for desc, graph in manager.graphs.items()}
