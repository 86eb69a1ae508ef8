# SPDX-License-Identifier: Apache-2.0
"""Throughput of a real vLLM, with every token and with dropping: requests/s, time to the first token, peak blocks.

    .venv-vllm/bin/python bench/serving.py                    the tests' tiny model, on a CPU
    .venv-vllm/bin/python bench/serving.py --model FOLDER     a LLaVA-1.5 checkpoint
    python bench/serving.py --dry-run                         what would run; needs no vLLM

Each engine runs in a process of its own, full and dropped in turn, `--rounds` times; the table shows medians. A round
keeps a fixed number of requests in flight, each with its own picture, and counts from the first request's arrival to
the last one's end. Peak blocks are the most that were taken at the end of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
ARCHITECTURE = "MustDropLlavaForConditionalGeneration"
PROMPT = "USER: <image>\nWhat is in the image? ASSISTANT:"
TINY_PLAN = {"merge": False, "key_rate": 0.0, "pruning_layers": [2, 4], "budgets": [64, 32]}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; default: the tests' tiny model, written to a temporary one")
    parser.add_argument("--plan", type=json.loads, help="fields of MustDropConfig as JSON; default: for the tiny model")
    parser.add_argument("--concurrency", type=lambda x: [int(n) for n in x.split(",")], default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=4, help="requests per request in flight")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, help="blocks of the pool; default: vLLM's choice")
    parser.add_argument("--json", type=Path, help="write all rounds here")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--arm", choices=["full", "dropped"], help=argparse.SUPPRESS)  # in the engine's process
    options = parser.parse_args()
    if options.model and options.plan is None:
        options.plan = {"preset": "budget-128"}
    options.plan = options.plan or TINY_PLAN
    return options


# ------------------------------------------------------------------------------------------- in the engine's process


def picture(seed: int, side: int) -> Any:
    """A picture that no other request has, so that nothing is found in a cache."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (side, side, 3)).astype("uint8"))


def make_engine(options: argparse.Namespace) -> Any:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the pool can be looked into
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    settings: dict[str, Any] = {"enforce_eager": True, "max_num_seqs": max(options.concurrency), "seed": 0}
    settings["enable_prefix_caching"] = False  # the arms differ in dropping alone
    if options.arm == "dropped":
        settings["hf_overrides"] = {"architectures": [ARCHITECTURE], "mustdrop": options.plan}
    if options.blocks:
        settings["num_gpu_blocks_override"] = options.blocks
    return LLM(model=options.model, max_model_len=1024, max_num_batched_tokens=4096, block_size=32, **settings)


def serve(llm: Any, concurrency: int, count: int, new_tokens: int) -> dict[str, float]:
    """One round."""
    from vllm import SamplingParams

    core = llm.llm_engine
    pool = core.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    side = llm.model_config.hf_config.vision_config.image_size
    prompts = [{"prompt": PROMPT, "multi_modal_data": {"image": picture(seed, side)}} for seed in range(count)]
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    free, least = pool.get_num_free_blocks(), pool.get_num_free_blocks()
    arrived: dict[str, float] = {}
    first: dict[str, float] = {}
    done = sent = 0
    begin = time.perf_counter()
    while done < count:
        while sent < count and sent - done < concurrency:
            name = f"{concurrency}-{sent}"
            arrived[name] = time.perf_counter()
            core.add_request(name, prompts[sent], sampling)
            sent += 1
        for output in core.step():
            name = "-".join(output.request_id.split("-")[:2])
            if output.outputs[0].token_ids:
                first.setdefault(name, time.perf_counter())
            done += output.finished
        least = min(least, pool.get_num_free_blocks())
    seconds = time.perf_counter() - begin
    waits = [first[name] - arrived[name] for name in arrived]
    return {"requests_per_s": count / seconds, "first_token_s": statistics.median(waits), "peak_blocks": free - least}


def run_engine(options: argparse.Namespace) -> None:
    llm = make_engine(options)
    serve(llm, 1, 1, options.new_tokens)  # what is loaded and compiled late
    rows = [
        {"arm": options.arm, "concurrency": n, **serve(llm, n, n * options.requests, options.new_tokens)}
        for n in options.concurrency
    ]
    options.json.write_text(json.dumps(rows))


# ------------------------------------------------------------------------------------------------------ around it


def commands(options: argparse.Namespace, folder: Path) -> list[list[str]]:
    """One engine each: full and dropped in turn."""
    common = [sys.executable, __file__, "--model", options.model, "--plan", json.dumps(options.plan)]
    common += ["--concurrency", ",".join(map(str, options.concurrency)), "--requests", str(options.requests)]
    common += ["--new-tokens", str(options.new_tokens)]
    if options.blocks:
        common += ["--blocks", str(options.blocks)]
    return [
        [*common, "--arm", arm, "--json", str(folder / f"{arm}-{number}.json")]
        for number in range(options.rounds)
        for arm in ("full", "dropped")
    ]


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| in flight | arm | requests/s | first token (s) | peak blocks |", "|---|---|---|---|---|"]
    for concurrency in sorted({row["concurrency"] for row in rows}):
        for arm in ("full", "dropped"):
            own = [row for row in rows if (row["concurrency"], row["arm"]) == (concurrency, arm)]
            rate, wait, blocks = (
                statistics.median(row[name] for row in own)
                for name in ("requests_per_s", "first_token_s", "peak_blocks")
            )
            lines.append(f"| {concurrency} | {arm} | {rate:.2f} | {wait:.3f} | {blocks:.0f} |")
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    if options.arm:
        run_engine(options)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny = options.model is None
        options.model = options.model or str(folder / "tiny")
        if options.dry_run:
            print("\n".join(map(shlex.join, commands(options, folder))))
            return
        if tiny:
            sys.path[:0] = [str(TESTS), str(TESTS / "integrations" / "vllm_plugin")]
            import checkpoint

            checkpoint.save(Path(options.model))
        rows = []
        for command in commands(options, folder):
            subprocess.run(command, check=True)
            rows += json.loads(Path(command[-1]).read_text())
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({"plan": options.plan, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
