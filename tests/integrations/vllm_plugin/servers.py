# SPDX-License-Identifier: Apache-2.0
"""The asynchronous engine, which vLLM's servers run, with its core and workers in processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import signal

import engines
import gpu_backends
import psutil
import pytest

from mustdrop_kernels.integrations import vllm as plugin
from mustdrop_kernels.integrations.vllm.plugin import ARCHITECTURES
from mustdrop_kernels.integrations.vllm.settings import VARIABLE


@contextlib.contextmanager
def switched_on(plan):
    """By the environment variable, as if vLLM's plug-ins were loaded only now."""
    from vllm import ModelRegistry
    from vllm.model_executor.model_loader.utils import _MODEL_ARCH_BY_HASH
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    plain = {name: ModelRegistry.models[name] for name in ARCHITECTURES.values()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, plan)
        plugin.register()
        _MODEL_ARCH_BY_HASH.clear()  # classes that vLLM has found before, by the name of the architecture
        try:
            yield
        finally:
            _MODEL_ARCH_BY_HASH.clear()
            ModelRegistry.models.update(plain)
            for name in plain:
                del MODELS_CONFIG_MAP[name]


def joined(pieces):
    return list(itertools.chain.from_iterable(pieces))


class Server:
    """An engine and the event loop that it lives in."""

    def __init__(self, checkpoint, plan, ranks=1, **settings):
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        gc.unfreeze()
        gc.collect()  # a process that inherits an old TCPStore would free it, and join a thread that it does not have
        self.loop = asyncio.new_event_loop()
        cores = sorted(os.sched_getaffinity(0), reverse=os.environ.get("PYTEST_XDIST_WORKER") == "gw1")
        processes = ranks * settings.get("data_parallel_size", 1)
        if len(cores) < processes:
            pytest.skip("each rank needs a core")
        with gpu_backends.default_platform(forked=True), pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
            patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, cores[:processes])))
            arguments = engines.arguments(checkpoint, plan, tensor_parallel_size=ranks, **settings)
            self.engine = self.run(self._start(AsyncLLM, AsyncEngineArgs(disable_log_stats=True, **arguments)))

    async def _start(self, kind, arguments):
        return kind.from_engine_args(arguments)

    def run(self, coroutine):
        return self.loop.run_until_complete(coroutine)

    async def stream(self, ask, tokens, name, pieces, leave_after=None):
        """Fills in the pieces in which a request's tokens come; leaves early, as a client that hangs up."""
        from vllm.sampling_params import RequestOutputKind

        sampling = engines.sampling(tokens)
        sampling.output_kind = RequestOutputKind.DELTA
        stream = self.engine.generate(ask.for_vllm(), sampling, name)
        async for output in stream:
            pieces.append(list(output.outputs[0].token_ids))
            if leave_after is not None and sum(map(len, pieces)) >= leave_after:
                await stream.aclose()
                break

    def streams(self, asks, tokens, leave_after=None):
        """All at once."""
        pieces = [[] for _ in asks]

        async def gather():
            leave = leave_after or {}
            await asyncio.gather(
                *(self.stream(ask, tokens, f"ask-{i}", pieces[i], leave.get(i)) for i, ask in enumerate(asks))
            )

        self.run(gather())
        return pieces

    def tokens(self, asks, tokens):
        return [joined(pieces) for pieces in self.streams(asks, tokens)]

    def in_parts(self, asks, tokens):
        """How a session ends whose prompt is sent piece by piece, and its tokens."""
        return self.run(self._in_parts(asks, tokens))

    async def _in_parts(self, asks, tokens):
        from vllm.engine.protocol import StreamingInput
        from vllm.sampling_params import RequestOutputKind

        async def parts():
            for ask in asks:
                yield StreamingInput(prompt=ask.for_vllm())

        sampling = engines.sampling(tokens)
        sampling.output_kind = RequestOutputKind.DELTA
        pieces = [output.outputs[0] async for output in self.engine.generate(parts(), sampling, "parts")]
        reasons = [piece.finish_reason for piece in pieces if piece.finish_reason is not None]
        return reasons[-1], joined(piece.token_ids for piece in pieces)

    def pool_is_free(self):
        """vLLM clears its prefix cache only if no request holds a block."""
        return self.run(self.engine.reset_prefix_cache())

    def kill_at_work(self, asks, tokens):
        """Kills the core, as the system does when memory is short, while it answers.

        Returns how the requests ended, and processes that have outlived it.
        """
        return self.run(self._kill_at_work(asks, tokens))

    async def _kill_at_work(self, asks, tokens):
        pieces = [[] for _ in asks]
        requests = [asyncio.create_task(self.stream(ask, tokens, f"work-{i}", pieces[i])) for i, ask in enumerate(asks)]
        while not all(pieces):
            await asyncio.sleep(0.01)
        (core,) = self.engine.engine_core.resources.engine_manager.processes
        workers = psutil.Process(core.pid).children(recursive=True)
        os.kill(core.pid, signal.SIGKILL)
        ended = await asyncio.gather(*requests, return_exceptions=True)
        return ended, (await asyncio.to_thread(psutil.wait_procs, workers, timeout=60))[1]

    def stop(self):
        self.engine.shutdown()
        self.run(asyncio.sleep(0))
        self.loop.close()
        del self.engine
        gc.collect()
