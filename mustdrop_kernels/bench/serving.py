# SPDX-License-Identifier: Apache-2.0
"""Throughput of vLLM, with every token and with dropping: requests/s, time to the first token, blocks.

Two engines in separate processes run alternately, for each round and number of requests in flight, so that drift of
the machine affects both. A measurement keeps that number of requests in flight, each with its own picture, and lasts
from the first arrival to the last completion. A table shows medians over the rounds, half the interquartile range, and
the ratio of the two within a round.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import Refusal
from . import machine
from .documents import Document, Sheet, Tell, note, reader
from .timing import quartiles
from .units import duration
from .vllm_engine import overrides

FORMAT = "mustdrop-serving/1"
read = reader(FORMAT, "mustdrop bench serving")
ARMS = ("full", "dropped")
# Merging leaves 256 of 576 tokens, pruning 80: 137 on average over the layers.
NARROW_PLAN = {"merge_budget": 40, "pruning_layers": [1, 3, 5], "budgets": [200, 128, 80]}
SETTINGS = {"max_model_len": 1024, "max_num_batched_tokens": 4096, "block_size": 32, "seed": 0}
PROMPT = "USER: <image>\nWhat is in the image? ASSISTANT:"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of ``mustdrop bench serving``."""

    model: str | None  # a folder; None: the narrow model
    plan: dict[str, Any] | None  # fields of MustDropConfig; None: those for the model
    dtype: str = "auto"  # vLLM's
    concurrency: tuple[int, ...] = (1, 8, 32)
    requests: int = 2  # for each request in flight; four at least
    new_tokens: int = 32
    rounds: int = 3
    blocks: int | None = None  # of the pool; None: vLLM's choice

    @property
    def name(self) -> str:
        """Name of the model."""
        return "llava-1.5-narrow, random weights" if self.model is None else Path(self.model).name

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of MustDropConfig."""
        return self.plan or (NARROW_PLAN if self.model is None else {"preset": "budget-128"})

    def count(self, concurrency: int) -> int:
        """Requests of a measurement."""
        return max(4, concurrency * self.requests)


def settings(options: Options, arm: str, model: str | None) -> dict[str, Any]:
    """Arguments of one engine. The arms differ only in dropping."""
    found = {**SETTINGS, "model": model, "max_num_seqs": max(options.concurrency), "enforce_eager": True}
    found["enable_prefix_caching"] = False
    found["dtype"] = options.dtype
    if options.blocks:
        found["num_gpu_blocks_override"] = options.blocks
    return found | overrides(options.fields if arm == "dropped" else None)


# ------------------------------------------------------------------------------------------- in the engine's process


def run_engine(options: Options, arm: str, model: str, connection: Any) -> None:
    """Measure each number of requests in flight that the connection sends, until it sends None."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the pool is in this process
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    llm = LLM(**settings(options, arm, model))
    meter = Meter(llm)
    meter.serve(1, 2, options.new_tokens)  # warm-up
    connection.send(str(llm.llm_engine.vllm_config.model_config.dtype).removeprefix("torch."))
    while (concurrency := connection.recv()) is not None:
        connection.send(meter.serve(concurrency, options.count(concurrency), options.new_tokens))
    llm.llm_engine.engine_core.shutdown()


class Meter:
    """An engine, and a count of the blocks that it uses."""

    def __init__(self, llm: Any) -> None:
        self.core = llm.llm_engine
        self.side = llm.model_config.hf_config.vision_config.image_size
        scheduler = self.core.engine_core.engine_core.scheduler
        self.pool = scheduler.kv_cache_manager.block_pool
        self.most = 0
        """Blocks in use while a step ran, at most."""
        plan = scheduler.schedule

        def schedule(*args: Any, **kwargs: Any) -> Any:
            planned = plan(*args, **kwargs)
            self.most = max(self.most, self.used())
            return planned

        scheduler.schedule = schedule

    def used(self) -> int:
        """Blocks in use, without the one that vLLM reserves."""
        return self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks()

    def serve(self, concurrency: int, count: int, new_tokens: int) -> dict[str, float]:
        """One measurement: `count` requests, `concurrency` of them in flight."""
        from vllm import SamplingParams

        prompts = [{"prompt": PROMPT, "multi_modal_data": {"image": picture(seed, self.side)}} for seed in range(count)]
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        arrived: dict[str, float] = {}
        first: dict[str, float] = {}
        done = sent = between = self.most = 0
        begin = time.perf_counter()
        while done < count:
            while sent < count and sent - done < concurrency:
                arrived[str(sent)] = time.perf_counter()
                self.core.add_request(str(sent), prompts[sent], sampling)
                sent += 1
            for output in self.core.step():
                first.setdefault(output.request_id, time.perf_counter())
                done += output.finished
            between = max(between, self.used())
        seconds = time.perf_counter() - begin
        return {
            "requests": count,
            "seconds": seconds,
            "requests_per_s": count / seconds,
            "first_token_s": statistics.median(first[name] - arrived[name] for name in arrived),
            "peak_blocks": self.most,
            "held_blocks": between,
        }


def picture(seed: int, side: int) -> Any:
    """Different pictures for all requests, so that no cache holds them."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (side, side, 3)).astype("uint8"))


# ------------------------------------------------------------------------------------------------------ around it


@contextmanager
def engines(options: Options, model: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Connections to both engines, and the model's dtype."""
    context = multiprocessing.get_context("spawn")
    pipes = {arm: context.Pipe() for arm in ARMS}
    processes = [context.Process(target=run_engine, args=(options, arm, model, pipes[arm][1])) for arm in ARMS]
    try:
        for process, (near, far) in zip(processes, pipes.values(), strict=True):
            process.start()
            far.close()  # recv raises when the engine dies
            dtype = near.recv()
        yield {arm: near for arm, (near, _) in pipes.items()}, dtype
        for near, _ in pipes.values():
            near.send(None)
        for process in processes:
            process.join()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()


def measure(options: Options, model: str, tell: Tell) -> tuple[list[dict[str, Any]], str]:
    """Rows of all rounds, and the model's dtype. The order of the arms alternates."""
    rows = []
    with engines(options, model) as (connections, dtype):
        for number in range(options.rounds):
            for concurrency in options.concurrency:
                tell(f"round {number + 1}, {concurrency} in flight", number / options.rounds)
                for arm in ARMS[:: -1 if number % 2 else 1]:
                    connections[arm].send(concurrency)
                    found = connections[arm].recv()
                    rows.append({"round": number, "arm": arm, "concurrency": concurrency, **found})
    return rows, dtype


def write_narrow(folder: Path) -> None:
    """Write the checkpoint of a LLaVA-1.5 with 576 patches, less width, and random weights.

    It is large enough that a prompt takes longer than the engine's overhead.
    """
    from transformers import LlavaForConditionalGeneration

    from .random_llava import Sizes, Transformer, processor, save

    sizes = Sizes(Transformer(128, 320, 4, 4), Transformer(384, 1024, 12, 12), 512)
    processed = processor()
    image = processed.tokenizer.convert_tokens_to_ids("<image>")
    config = sizes.config(image, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration._from_config(config).eval()
    model.generation_config.pad_token_id = 3
    save(folder, model, processed)


def plan_lines(options: Options) -> Iterator[str]:
    """Lines of a dry run: the arguments of both engines, then the rounds."""
    for arm in ARMS:
        yield f"{arm} {json.dumps(settings(options, arm, options.model or options.name))}"
    requests = len(ARMS) * options.rounds * sum(map(options.count, options.concurrency))
    yield f"{options.rounds} rounds of {list(options.concurrency)} requests in flight: {requests} requests"


def run(options: Options, command: Sequence[str] = (), tell: Tell = lambda what, share: None) -> Document:
    """Measure; the document.

    Raises:
        Refusal: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise Refusal("serving needs vLLM: run it in an environment with vllm and mustdrop_kernels (docs/engines.md)")
    import transformers
    from vllm.version import __version__ as vllm_version

    about = machine.describe(torch.device("cpu"), len(os.sched_getaffinity(0)))
    about |= {"vllm": vllm_version, "transformers": transformers.__version__}
    with tempfile.TemporaryDirectory() as name:
        model = options.model or str(Path(name) / "narrow")
        if options.model is None:
            tell("writing the narrow model", 0.0)
            write_narrow(Path(model))
        tell("starting two engines", 0.0)
        rows, dtype = measure(options, model, tell)
    return {
        "format": FORMAT, "command": list(command), "machine": about, "model": options.name, "dtype": dtype,
        "plan": options.fields, "new_tokens": options.new_tokens, "settings": SETTINGS, "blocks": options.blocks,
        "load_after": list(os.getloadavg()), "rows": rows,
    }  # fmt: skip


def sheet(document: Document) -> Sheet:
    """Medians and spreads of both arms, for each number of requests in flight."""
    lines = []
    for concurrency in dict.fromkeys(row["concurrency"] for row in document["rows"]):
        own = {arm: [r for r in document["rows"] if (r["concurrency"], r["arm"]) == (concurrency, arm)] for arm in ARMS}
        for arm, rows in own.items():
            rate = cell(rows, "requests_per_s", "{:.2f}".format)
            wait = cell(rows, "first_token_s", lambda seconds: duration(1e6 * seconds))
            if arm == "dropped":
                rate += f" ({ratio(rows, own['full'], 'requests_per_s'):.2f}x)"
                wait += f" ({ratio(own['full'], rows, 'first_token_s'):.2f}x)"
            peak, held = (max(row[name] for row in rows) for name in ("peak_blocks", "held_blocks"))
            lines.append(
                [str(concurrency), "all" if arm == "full" else "dropped", rate, wait, f"{peak:.0f}", f"{held:.0f}"]
            )
    about = document["machine"]
    facts = document["model"], document["dtype"], about["name"], f"{about['threads']} threads", f"vLLM {about['vllm']}"
    columns = ["in flight", "image tokens", "requests/s", "first token", "blocks at most", "between steps"]
    return Sheet(columns, lines, note(document, *facts))


def cell(rows: list[dict[str, Any]], name: str, show: Any) -> str:
    """Median and half the distance between the quartiles."""
    first, median, third = quartiles([row[name] for row in rows])
    return f"{show(median)} ±{100 * (third - first) / 2 / median:.0f}%"


def ratio(rows: list[dict[str, Any]], base: list[dict[str, Any]], name: str) -> float:
    """Median over the rounds of a ratio within a round."""
    of_base = {row["round"]: row[name] for row in base}
    return statistics.median(row[name] / of_base[row["round"]] for row in rows)
