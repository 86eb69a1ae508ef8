# SPDX-License-Identifier: Apache-2.0
"""One engine of ``mustdrop bench serving`` in a process of its own: times of requests, and blocks of its pool."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from typing import Any

PROMPT = "USER: <image>\nWhat is in the image? ASSISTANT:"
SIDE = 336  # pixels of a picture; the model's processor resizes it


def run_engine(arguments: dict[str, Any], connection: Any) -> None:
    """Start an engine and send its facts; then take measurements with the arguments that come, until None."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler and its pool are in this process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    llm = LLM(**arguments)
    meter = Meter(llm)
    connection.send(facts(llm))
    while (work := connection.recv()) is not None:
        connection.send(meter.serve(*work))
    llm.llm_engine.engine_core.shutdown()


def facts(llm: Any) -> dict[str, Any]:
    """What vLLM has chosen for this engine."""
    config = llm.llm_engine.vllm_config
    return {
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "pool_blocks": config.cache_config.num_gpu_blocks,
        "block_size": config.cache_config.block_size,
        "cuda_graphs": config.compilation_config.cudagraph_mode.name,
        "async_scheduling": config.scheduler_config.async_scheduling,
    }


class Meter:
    """Requests to an engine, and counts of the blocks that they use."""

    def __init__(self, llm: Any) -> None:
        self.core = llm.llm_engine
        self.render = llm.renderer.render_cmpl
        self.scheduler = self.core.engine_core.engine_core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.numbers = itertools.count()
        """Of all requests: each has its own picture, so that no cache holds it."""
        self.peak = 0
        """Blocks in use while a step runs, at most."""
        plan = self.scheduler.schedule

        def schedule(*args: Any, **kwargs: Any) -> Any:
            planned = plan(*args, **kwargs)
            self.peak = max(self.peak, self.used())
            return planned

        self.scheduler.schedule = schedule

    def used(self) -> int:
        """Blocks in use, without the one that vLLM reserves."""
        return self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks()

    def decodes(self) -> bool:
        """Whether there are running requests, and all have read their prompts."""
        running = self.scheduler.running
        return bool(running) and all(request.num_output_tokens for request in running)

    def serve(self, concurrency: int, count: int, new_tokens: int) -> dict[str, float | None]:
        """One measurement: `count` requests, `concurrency` of them in flight.

        Pictures are processed before it begins, as a server does in another process.
        """
        from vllm import SamplingParams

        numbers = list(itertools.islice(self.numbers, count))
        prompts = self.render([{"prompt": PROMPT, "multi_modal_data": {"image": picture(i)}} for i in numbers])
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        waiting = list(zip(map(str, numbers), prompts, strict=True))[::-1]
        arrived: dict[str, float] = {}
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        held, done, self.peak = None, 0, 0
        begin = time.perf_counter()
        while done < count:
            while waiting and len(arrived) - done < concurrency:
                name, prompt = waiting.pop()
                arrived[name] = time.perf_counter()
                self.core.add_request(name, prompt, sampling)
            outputs, now = self.core.step(), time.perf_counter()
            for output in outputs:
                first.setdefault(output.request_id, now)
                last[output.request_id] = now
                done += output.finished
            if self.decodes():
                held = max(held or 0, self.used())
        seconds = time.perf_counter() - begin
        return {
            "requests": count,
            "prompt_tokens": len(prompts[0]["prompt_token_ids"]),
            "seconds": seconds,
            "requests_per_s": count / seconds,
            "tokens_per_s": count * new_tokens / seconds,
            "first_token_s": statistics.median(first[name] - arrived[name] for name in arrived),
            "between_tokens_s": statistics.median(last[name] - first[name] for name in arrived) / (new_tokens - 1),
            "peak_blocks": self.peak,
            "held_blocks": held,
        }


def picture(seed: int) -> Any:
    """A picture of noise."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (SIDE, SIDE, 3)).astype("uint8"))
