# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs on a CPU: a graph is the call that was captured, made again.

vLLM's own code dispatches steps to graphs, prepares what a graph binds, and copies its output. A replay of a whole step
calls what was captured with the tensors that were captured: nothing of the step but the contents of those tensors can
reach it. A piece of a compiled model requires the tensors that were captured, and writes to its captured output.
"""

from __future__ import annotations

import contextlib
import dataclasses

SIZES = [1, 2, 4, 8]
LONG_SIZES = [160, 320]  # of pieces; prompts with images fit these


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


class Piece:
    """A piece of a compiled model between two attention layers, in place of vLLM's CUDAGraphWrapper."""

    capturing = False
    replays = 0  # of all pieces

    def __init__(self, runnable, vllm_config, runtime_mode, **unused):
        self._runnable, self._mode, self._captured = runnable, runtime_mode, {}

    def __call__(self, *args):
        from vllm.forward_context import get_forward_context

        context = get_forward_context()
        if context.cudagraph_runtime_mode != self._mode:
            return self._runnable(*args)
        output, addresses = self._runnable(*args), [x.data_ptr() for x in _tensors(args)]
        if Piece.capturing:
            self._captured[context.batch_descriptor] = addresses, output
            return output
        bound, captured = self._captured[context.batch_descriptor]
        assert addresses == bound, "a replay with other tensors than were captured"
        for old, new in zip(_tensors(captured), _tensors(output), strict=True):
            old.copy_(new)
        Piece.replays += 1
        return captured


def _tensors(values):
    import torch

    return [x for x in (values if isinstance(values, (tuple, list)) else [values]) if isinstance(x, torch.Tensor)]


def choose(config, mode):
    """Switches graphs on, and the compiler where a mode has pieces; the platform has switched them off."""
    from vllm.config import CompilationMode, CUDAGraphMode

    compilation = config.compilation_config
    compilation.cudagraph_mode = CUDAGraphMode[mode]
    has_pieces = compilation.mode != CompilationMode.NONE
    if has_pieces:
        compilation.mode, compilation.backend, compilation.compile_sizes = CompilationMode.VLLM_COMPILE, "eager", []
    compilation.cudagraph_capture_sizes = [*SIZES, *(LONG_SIZES if has_pieces else [])]
    compilation.max_cudagraph_capture_size = compilation.cudagraph_capture_sizes[-1]


def install(patch):
    """Lets vLLM's graph manager capture on a CPU."""
    from vllm.config import CUDAGraphMode
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.gpu import cudagraph_utils

    def capture(manager, create_forward_fn, progress_bar_desc=""):
        for desc in manager._capture_descs.get(CUDAGraphMode.PIECEWISE, ()):
            forward = create_forward_fn(desc, warmup=True)
            for mode in (CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE):
                forward(mode)
        for desc in manager._capture_descs.get(CUDAGraphMode.FULL, ()):
            create_forward_fn(desc, warmup=True)(CUDAGraphMode.NONE)
            forward = create_forward_fn(desc, warmup=False)
            manager.graphs[desc] = Graph(forward, manager.model_on_cpu)
            forward(CUDAGraphMode.NONE)
        manager._graphs_captured = True

    patch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    patch.setattr(cudagraph_utils.CudaGraphManager, "capture", capture)
    patch.setattr(CpuPlatform, "get_static_graph_wrapper_cls", lambda self: f"{Piece.__module__}.{Piece.__qualname__}")
    patch.setattr(CpuPlatform, "get_global_graph_pool", lambda self: None, raising=False)
    patch.setattr(CpuPlatform, "graph_pool_handle", lambda self: None, raising=False)
    patch.setattr(cudagraph_utils, "graph_capture", contextlib.nullcontext)


def capture(llm):
    """Captures an engine's graphs, as its worker does on a GPU; returns those of whole steps by number of tokens."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    manager = runner.cudagraph_manager
    manager.model_on_cpu = runner.model
    Piece.capturing, Piece.replays = True, 0
    try:
        manager.capture(
            runner.model,
            runner.model_state,
            runner.input_buffers,
            runner.intermediate_tensors,
            runner.block_tables,
            runner.attn_groups,
            runner.kv_cache_config,
        )
    finally:
        Piece.capturing = False
    return {desc.num_tokens: graph for desc, graph in manager.graphs.items()}
