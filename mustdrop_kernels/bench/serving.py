# SPDX-License-Identifier: Apache-2.0
"""Throughput of a real vLLM, with every token and with dropping: requests/s, time to the first token, blocks.

    .venv-vllm/bin/python bench/serving.py                    a narrow LLaVA-1.5 with random weights, on a CPU
    .venv-vllm/bin/python bench/serving.py --model FOLDER     a LLaVA-1.5 checkpoint
    python bench/serving.py --dry-run                         what would run; needs no vLLM
    python bench/serving.py --load FILE                       what ran, as a table; needs no vLLM

Two engines, each in a process of its own, are at work in turn: in each round and for each number of requests in flight
first one, then the other, so that drift of the machine hits both alike. A measurement keeps that number of requests in
flight, each with its own picture, and counts from the first one's arrival to the last one's end. A table shows medians
over the rounds, half the distance between the quartiles, and the ratio of the two within a round.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mustdrop_kernels.bench import machine
from mustdrop_kernels.bench.timing import quartiles
from mustdrop_kernels.bench.units import duration
from mustdrop_kernels.bench.vllm_engine import overrides
from mustdrop_kernels.files import write_text

TESTS = Path(__file__).resolve().parents[1] / "tests"
PROMPT = "USER: <image>\nWhat is in the image? ASSISTANT:"
ARMS = ("full", "dropped")
# LLaVA-1.5's 576 patches, and enough arithmetic that a prompt takes longer than the engine's own work.
NARROW = {"grid": 24, "layers": 12, "vision_layers": 4, "head_dim": 32, "width": 384, "vision_width": 128}
# Merging leaves 256 of 576 tokens, pruning 80: 137 on average over the layers.
NARROW_PLAN = {"merge_budget": 40, "pruning_layers": [1, 3, 5], "budgets": [200, 128, 80]}
SETTINGS = {"max_model_len": 1024, "max_num_batched_tokens": 4096, "block_size": 32, "seed": 0}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; default: the narrow model, written to a temporary one")
    parser.add_argument(
        "--plan", type=json.loads, help="fields of MustDropConfig as JSON; default: one for the narrow model"
    )
    parser.add_argument("--dtype", default="auto", help="vLLM's; bfloat16 is not served on processors with AMX")
    parser.add_argument("--concurrency", type=lambda x: [int(n) for n in x.split(",")], default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=2, help="requests per request in flight, four at least")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, help="blocks of the pool; default: vLLM's choice")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--load", type=Path, help="show this document instead of measuring anything")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    options.name = "llava-1.5-narrow, random weights" if options.model is None else Path(options.model).name
    options.plan = options.plan or (NARROW_PLAN if options.model is None else {"preset": "budget-128"})
    return options


def settings(options: argparse.Namespace, arm: str) -> dict[str, Any]:
    """Of one engine. The arms differ in dropping alone."""
    found = {**SETTINGS, "model": options.model, "max_num_seqs": max(options.concurrency), "enforce_eager": True}
    found["enable_prefix_caching"] = False
    found["dtype"] = options.dtype
    if options.blocks:
        found["num_gpu_blocks_override"] = options.blocks
    return found | overrides(options.plan if arm == "dropped" else None)


# ------------------------------------------------------------------------------------------- in the engine's process


def run_engine(options: argparse.Namespace, arm: str, connection: Any) -> None:
    """Measures what it is asked for, until it is asked for nothing."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the pool can be looked into
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    llm = LLM(**settings(options, arm))
    meter = Meter(llm)
    meter.serve(1, 2, options.new_tokens)  # what is loaded and compiled late
    connection.send(str(llm.llm_engine.vllm_config.model_config.dtype).removeprefix("torch."))
    while (concurrency := connection.recv()) is not None:
        count = max(4, concurrency * options.requests)
        connection.send(meter.serve(concurrency, count, options.new_tokens))
    llm.llm_engine.engine_core.shutdown()


class Meter:
    """An engine whose blocks are watched."""

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
        """Blocks in use, without the one that vLLM keeps."""
        return self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks()

    def serve(self, concurrency: int, count: int, new_tokens: int) -> dict[str, float]:
        """One measurement."""
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
    """A picture that no other request has, so that nothing is found in a cache."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (side, side, 3)).astype("uint8"))


# ------------------------------------------------------------------------------------------------------ around it


@contextmanager
def engines(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    """Both at once, each behind its connection, and the model's dtype."""
    context = multiprocessing.get_context("spawn")
    pipes = {arm: context.Pipe() for arm in ARMS}
    processes = [context.Process(target=run_engine, args=(options, arm, pipes[arm][1])) for arm in ARMS]
    try:
        for process, (near, far) in zip(processes, pipes.values(), strict=True):
            process.start()
            far.close()  # so that the death of an engine is seen
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


def measure(options: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """All rounds, and the model's dtype. Which arm comes first changes from round to round."""
    rows = []
    with engines(options) as (connections, dtype):
        for number in range(options.rounds):
            for concurrency in options.concurrency:
                for arm in ARMS[:: -1 if number % 2 else 1]:
                    connections[arm].send(concurrency)
                    found = connections[arm].recv()
                    rows.append({"round": number, "arm": arm, "concurrency": concurrency, **found})
    return rows, dtype


def write_narrow(folder: Path) -> None:
    """The narrow model, as a checkpoint."""
    sys.path[:0] = [str(TESTS), str(TESTS / "integrations" / "vllm_plugin")]
    import checkpoint
    import tiny_llava
    from transformers import LlavaForConditionalGeneration

    config = tiny_llava.config(*(NARROW[name] for name in ("grid", "layers", "vision_layers", "head_dim")))
    for part, width in ((config.text_config, NARROW["width"]), (config.vision_config, NARROW["vision_width"])):
        part.hidden_size, part.intermediate_size = width, 8 * width // 3 // 32 * 32
        part.num_attention_heads = width // NARROW["head_dim"]
    config.text_config.num_key_value_heads = config.text_config.num_attention_heads
    config.text_config.initializer_range = 0.02
    torch.manual_seed(0)
    checkpoint.write(folder, LlavaForConditionalGeneration._from_config(config), tiny_llava.processor(NARROW["grid"]))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures what the command line asks for."""
    import transformers
    from vllm.version import __version__ as vllm_version

    about = machine.describe(torch.device("cpu"), len(os.sched_getaffinity(0)))
    about |= {"vllm": vllm_version, "transformers": transformers.__version__}
    with tempfile.TemporaryDirectory() as name:
        if options.model is None:
            options.model = str(Path(name) / "narrow")
            write_narrow(Path(options.model))
        rows, dtype = measure(options)
    return {
        "format": "mustdrop-serving/1", "command": [".venv-vllm/bin/python", "bench/serving.py", *sys.argv[1:]],
        "machine": about, "model": options.name, "dtype": dtype, "plan": options.plan, "new_tokens": options.new_tokens,
        "settings": SETTINGS, "blocks": options.blocks, "load_after": list(os.getloadavg()), "rows": rows,
    }  # fmt: skip


def markdown(document: dict[str, Any]) -> str:
    """Medians and spreads."""
    lines = [
        "| in flight | image tokens | requests/s | first token | blocks at most | between steps |",
        "|---|---|---|---|---|---|",
    ]
    for concurrency in dict.fromkeys(row["concurrency"] for row in document["rows"]):
        own = {arm: [r for r in document["rows"] if (r["concurrency"], r["arm"]) == (concurrency, arm)] for arm in ARMS}
        for arm, rows in own.items():
            rate, wait = cell(rows, "requests_per_s", "{:.2f}".format), cell(rows, "first_token_s", seconds)
            if arm == "dropped":
                rate += f" ({ratio(rows, own['full'], 'requests_per_s'):.2f}x)"
                wait += f" ({ratio(own['full'], rows, 'first_token_s'):.2f}x)"
            peak, held = (max(row[name] for row in rows) for name in ("peak_blocks", "held_blocks"))
            cells = [str(concurrency), "all" if arm == "full" else "dropped", rate, wait, f"{peak:.0f}", f"{held:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    about = document["machine"]
    where = (
        f"{document['model']}, {document['dtype']}, {about['name']}, {about['threads']} threads, vLLM {about['vllm']}"
    )
    return "\n".join([*lines, "", f"*{where}, torch {about['torch']}; `{' '.join(document['command'])}`*"])


def cell(rows: list[dict[str, Any]], name: str, show: Any) -> str:
    """Median and half the distance between the quartiles."""
    first, median, third = quartiles([row[name] for row in rows])
    return f"{show(median)} ±{100 * (third - first) / 2 / median:.0f}%"


def ratio(rows: list[dict[str, Any]], base: list[dict[str, Any]], name: str) -> float:
    """Median over the rounds."""
    of_base = {row["round"]: row[name] for row in base}
    return statistics.median(row[name] / of_base[row["round"]] for row in rows)


def seconds(value: float) -> str:
    """Three digits, in a unit that fits."""
    return duration(1e6 * value)


def main() -> None:
    """The command line."""
    options = arguments()
    if options.dry_run:
        for arm in ARMS:
            print(arm, json.dumps(settings(options, arm)))
        print(f"{options.rounds} rounds of {options.concurrency} requests in flight")
        return
    document = json.loads(options.load.read_text()) if options.load else run(options)
    if options.json:
        write_text(options.json, json.dumps(document, indent=1) + "\n")
    print(markdown(document))


if __name__ == "__main__":
    main()
