# SPDX-License-Identifier: Apache-2.0
"""Random requests through the plug-in in a real vLLM, whose pool is too small for those in flight."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

# Before vLLM is imported: the engine core in this process, whose memory is sampled.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from soak_transformers import draw_pictures, draw_prompt
from vllm import LLM, SamplingParams
from vllm.version import __version__ as vllm_version

from mustdrop_kernels.bench.vllm_engine import overrides

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "integrations" / "vllm_plugin"))
import checkpoint

PLAN = {"preset": "64", "pruning_layers": [1, 3, 5]}  # all stages, by thresholds
IN_FLIGHT = 8
BLOCKS = 24  # of 32 tokens; a prompt with three pictures takes 15 of them, and returns most of them


class Soak:
    """An engine, and counts of the outcomes of requests; `plain`: without the plug-in."""

    def __init__(self, seed: int, *, plain: bool = False) -> None:
        self.name = f"vLLM {vllm_version}{' without the plug-in' if plain else ''}"
        self.rng = random.Random(seed)
        self.kinds: Counter[str] = Counter()
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(Path(folder))
            self.llm = LLM(
                model=folder,
                dtype="float32",
                enforce_eager=True,
                max_model_len=640,
                max_num_batched_tokens=1280,
                max_num_seqs=IN_FLIGHT,
                num_gpu_blocks_override=BLOCKS,
                block_size=32,
                limit_mm_per_prompt={"image": 3},
                seed=seed,
                **overrides(None if plain else PLAN),
            )
        self.core = self.llm.llm_engine
        self.scheduler = self.core.engine_core.engine_core.scheduler
        self.drop_record = (
            None if plain else self.core.model_executor.driver_worker.worker.model_runner.model.drop_record
        )
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.free, self.sent = self.pool.get_num_free_blocks(), 0
        self._count_preemptions()

    def _count_preemptions(self) -> None:
        preempt = self.scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> None:
            self.kinds["preempted"] += 1
            preempt(*args, **kwargs)

        self.scheduler._preempt_request = counted

    def round(self, requests: int) -> None:
        """Run requests concurrently to the end, after which the pool and the worker's records must be as before."""
        running: set[str] = set()
        for _ in range(requests):
            while len(running) >= self.rng.randrange(1, IN_FLIGHT + 3):
                self._step(running)
            running.add(self._send(*self._draw()))
        while running:
            self._step(running)
        # A step that informs the worker of all ended requests.
        self._send("car?", [], SamplingParams(max_tokens=1))
        while self.core.has_unfinished_requests():
            self.core.step()
        assert self.pool.get_num_free_blocks() == self.free, "blocks are lost"
        kept = None if self.drop_record is None else self.drop_record.dropped
        assert not kept, f"the worker still keeps {kept}"

    def _draw(self) -> tuple[str, list[Any], SamplingParams]:
        rng, text = self.rng, draw_prompt(self.rng)
        pictures = draw_pictures(rng, text)
        temperature = rng.choice((0, 0, 1))
        sampling = SamplingParams(
            max_tokens=rng.choice((1, 2, 5, 11, 60)),
            temperature=temperature,
            n=rng.choice((1, 2)) if temperature else 1,
            prompt_logprobs=rng.choice((None,) * 19 + (1,)),  # prompts with pictures keep all tokens
            ignore_eos=True,
        )
        self.kinds[f"pictures: {len(pictures)}"] += 1
        self.kinds["sampled" if temperature else "greedy"] += 1
        return text, pictures, sampling

    def _send(self, text: str, pictures: list[Any], sampling: SamplingParams) -> str:
        name, self.sent = str(self.sent), self.sent + 1
        data = {"multi_modal_data": {"image": pictures}} if pictures else {}
        self.core.add_request(name, {"prompt": text, **data}, sampling)
        return name

    def _step(self, running: set[str]) -> None:
        for output in self.core.step():
            if output.finished:
                running.discard(output.request_id)
                self.kinds[f"ended: {output.outputs[0].finish_reason}"] += 1
        left = [name for name in sorted(running) if self.rng.random() < 0.01]
        if left:
            self.core.abort_request(left)
            running.difference_update(left)
            self.kinds["aborted"] += len(left)
