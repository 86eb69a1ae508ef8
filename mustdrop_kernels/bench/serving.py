# SPDX-License-Identifier: Apache-2.0
"""Throughput of vLLM with every vision token, with dropping, and with smaller images.

Each arm is an engine in a process of its own, on a GPU with an equal share of the memory. They run alternately, for
each round and number of requests in flight, so that drift of the machine affects all. A measurement keeps that number
of requests in flight, each with its own picture, and lasts from the first arrival to the last completion. A first round
compiles kernels and is discarded. A table shows medians over the rounds, half the interquartile range, and ratios to
the first arm within a round.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..config import MustDropConfig
from ..errors import Refusal, first_line
from . import machine
from .documents import Document, Keep, Sheet, Tell, note, reader
from .serving_engine import run_engine
from .smaller_images import smaller_images
from .timing import quartiles
from .units import duration
from .vllm_engine import overrides

FORMAT = "mustdrop-serving/2"
read = reader(FORMAT, "mustdrop bench serving")
Row = dict[str, Any]
LABELS = {"full": "all", "dropped": "dropped", "smaller": "smaller images"}  # of the arms
PLAN = {"preset": "budget-128"}
SHALLOW = "llava-1.5-shallow"
SHALLOW_PLAN = {"merge_budget": 40, "pruning_layers": [1, 3, 5], "budgets": [200, 128, 80]}  # for its 12 layers
COMMON = {"max_model_len": 1024, "enable_prefix_caching": False, "seed": 0}
ON_CPU = {
    "block_size": 32, "enforce_eager": True, "kv_cache_memory_bytes": 2 << 30, "max_num_batched_tokens": 4096,
}  # fmt: skip
GPU_MEMORY = 0.84  # of all engines: each has a context and graphs beside its share


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of ``mustdrop bench serving``.

    Raises:
        ValueError: the plan is invalid, or a number of requests in flight.
    """

    model: str | None = None  # a folder, or a name of random_llava.MODELS; None: by the device
    plan: dict[str, Any] | None = None  # of ``config_of``; None: one for the depth of the model
    dtype: str = "auto"  # vLLM's
    concurrency: tuple[int, ...] | None = None  # None: by the device
    requests: int = 2  # for each request in flight; four at least
    new_tokens: int = 32
    rounds: int = 3
    blocks: int | None = None  # of the pool; None: vLLM's choice

    def __post_init__(self) -> None:
        if self.plan is not None:
            config_of(self.plan)
        if self.concurrency is not None and min(self.concurrency) < 1:
            raise ValueError(f"--concurrency must be numbers of at least 1, got {min(self.concurrency)}")

    def count(self, concurrency: int) -> int:
        """Requests of a measurement."""
        return max(4, concurrency * self.requests)


def config_of(fields: dict[str, Any]) -> MustDropConfig:
    """The config of a plan: of fields, or of a preset and fields that change it."""
    changes = {name: value for name, value in fields.items() if name != "preset"}
    if "preset" in fields:
        return MustDropConfig.preset(fields["preset"], **changes)
    return MustDropConfig.from_dict(changes)


def platform() -> str:
    """Type of the device that vLLM runs on here; torch's where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


@dataclasses.dataclass(frozen=True)
class Course:
    """What is measured on one type of device."""

    model: str  # a folder, or a name of random_llava.MODELS
    random_weights: bool
    plan: dict[str, Any]  # of ``config_of``
    concurrency: tuple[int, ...]
    arms: dict[str, dict[str, Any]]
    """Arguments of each engine. They differ in dropping, or in the size of the images, alone."""
    vision_tokens: dict[str, float] | None
    """Of an image: with dropping, the mean over the layers; of a smaller image. None without smaller images."""
    left_out: str | None
    """The reason why there are no smaller images."""

    @property
    def name(self) -> str:
        """Name of the model."""
        return f"{self.model}, random weights" if self.random_weights else Path(self.model).name


def plan_course(options: Options, device: str) -> Course:
    """The course for this type of device.

    Raises:
        Refusal: the model has no configuration that transformers reads.
    """
    from transformers import AutoConfig

    from .random_llava import MODELS

    on_cpu = device == "cpu"
    model = options.model or (SHALLOW if on_cpu else "llava-1.5-7b")
    plan = options.plan or (SHALLOW_PLAN if model == SHALLOW else PLAN)
    random_weights = model in MODELS
    try:
        config = MODELS[model].config() if random_weights else AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise Refusal(f"--model {model}: {first_line(error)}") from None
    arms = {"full": {}, "dropped": overrides(plan)}
    vision_tokens = left_out = None
    try:
        smaller = smaller_images(config, config_of(plan), random_weights)
        arms["smaller"] = smaller.arguments
        vision_tokens = {"dropped": smaller.mean_tokens, "smaller": smaller.tokens}
    except Refusal as refusal:
        left_out = f"smaller images are left out: {refusal}"
    concurrency = options.concurrency or ((1, 8, 32) if on_cpu else (1, 8, 32, 128))
    common = {"model": model, **COMMON, "dtype": options.dtype, "max_num_seqs": max(concurrency)}
    common |= ON_CPU if on_cpu else {"gpu_memory_utilization": round(GPU_MEMORY / len(arms), 2)}
    if random_weights:
        common["load_format"] = "dummy"
    if options.blocks:
        common["num_gpu_blocks_override"] = options.blocks
    arms = {arm: common | own for arm, own in arms.items()}
    return Course(model, random_weights, plan, concurrency, arms, vision_tokens, left_out)


class Engine:
    """An engine in a process of its own."""

    def __init__(self, arm: str, arguments: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.arm = arm
        self.near, far = context.Pipe()
        self.process = context.Process(target=run_engine, args=(arguments, far))
        self.process.start()
        far.close()  # recv raises when the engine dies

    def receive(self) -> dict[str, Any]:
        """What the engine sends next.

        Raises:
            Refusal: the process has ended.
        """
        try:
            return dict(self.near.recv())
        except EOFError:
            raise Refusal(f"the engine of the arm {self.arm!r} ended; its error is printed above") from None

    def serve(self, concurrency: int, count: int, new_tokens: int) -> dict[str, Any]:
        """One measurement; see ``Meter.serve``."""
        self.near.send((concurrency, count, new_tokens))
        return self.receive()


@contextmanager
def engines(arms: dict[str, dict[str, Any]], tell: Tell) -> Iterator[dict[Engine, dict[str, Any]]]:
    """The engines and their facts. They start one after another, since vLLM measures the free memory at its start."""
    started: dict[Engine, dict[str, Any]] = {}
    try:
        for arm, arguments in arms.items():
            tell(f"starting the engine of {arm!r}", 0.0)
            engine = Engine(arm, arguments)
            started[engine] = {}
            started[engine] = engine.receive()
        yield started
        for engine in started:
            engine.near.send(None)
        for engine in started:
            engine.process.join()
    finally:
        for engine in started:
            if engine.process.is_alive():
                engine.process.terminate()


def one_round(number: int, started: Sequence[Engine], course: Course, options: Options, tell: Tell) -> list[Row]:
    """Rows of a round; round 0 is the warm-up. The order of the engines alternates."""
    rows = []
    for concurrency in course.concurrency:
        what = f"round {number} of {options.rounds}" if number else "warm-up"
        tell(f"{what}, {concurrency} in flight", number / (options.rounds + 1))
        for engine in started[:: -1 if number % 2 else 1]:
            found = engine.serve(concurrency, options.count(concurrency), options.new_tokens)
            rows.append({"round": number, "arm": engine.arm, "concurrency": concurrency, **found})
    return rows


def plan_lines(options: Options) -> Iterator[str]:
    """Lines of a dry run: the arguments of the engines, then the rounds."""
    course = plan_course(options, platform())
    for arm, arguments in course.arms.items():
        yield f"{arm} {json.dumps(arguments)}"
    if course.left_out:
        yield course.left_out
    requests = len(course.arms) * (options.rounds + 1) * sum(map(options.count, course.concurrency))
    yield (
        f"{options.rounds} rounds of {list(course.concurrency)} requests in flight after a warm-up: {requests} requests"
    )


def run(
    options: Options,
    command: Sequence[str] = (),
    tell: Tell = lambda what, share: None,
    keep: Keep = lambda document: None,
) -> Document:
    """Measure; `keep` takes the document after each round.

    Raises:
        Refusal: vLLM is not installed, or an engine ended with an error.
    """
    if importlib.util.find_spec("vllm") is None:
        raise Refusal("serving needs vLLM: run it in an environment with vllm and mustdrop_kernels (docs/engines.md)")
    import transformers
    from vllm.version import __version__ as vllm_version

    from .random_llava import MODELS, save_without_weights

    device = platform()
    course = plan_course(options, device)
    about = machine.describe(torch.device(device), len(os.sched_getaffinity(0)))
    about |= {"vllm": vllm_version, "transformers": transformers.__version__}
    with tempfile.TemporaryDirectory() as scratch:
        arms = course.arms
        if course.random_weights:
            save_without_weights(Path(scratch), MODELS[course.model])
            arms = {arm: {**arguments, "model": scratch} for arm, arguments in arms.items()}
        with engines(arms, tell) as started:
            facts = {engine.arm: {"arguments": course.arms[engine.arm], **found} for engine, found in started.items()}
            document: Document = {
                "format": FORMAT, "command": list(command), "machine": about, "model": course.name,
                "dtype": facts["full"]["dtype"], "plan": course.plan, "new_tokens": options.new_tokens,
                "arms": facts, "vision_tokens": course.vision_tokens, "left_out": course.left_out, "rows": [],
            }  # fmt: skip
            for number in range(options.rounds + 1):
                rows = one_round(number, list(started), course, options, tell)
                if number:
                    document["rows"] += rows
                    document["load_after"] = machine.load()
                    keep(document)
    return document


def _seconds(value: float) -> str:
    """A time in seconds, in the unit that fits."""
    return duration(1e6 * value)


RATES = {  # column: name in a row, how it is shown, whether more is better
    "requests/s": ("requests_per_s", "{:.2f}".format, True),
    "tokens/s": ("tokens_per_s", "{:.0f}".format, True),
    "first token": ("first_token_s", _seconds, False),
    "between tokens": ("between_tokens_s", _seconds, False),
}
BLOCKS = {"blocks at most": "peak_blocks", "while decoding": "held_blocks"}


def sheet(document: Document) -> Sheet:
    """Medians and spreads of all arms, for each number of requests in flight."""
    every = document["rows"]
    lines = []
    for concurrency in dict.fromkeys(row["concurrency"] for row in every):
        own = {arm: [r for r in every if (r["concurrency"], r["arm"]) == (concurrency, arm)] for arm in LABELS}
        for arm, rows in own.items():
            if not rows:
                continue
            cells = []
            for name, show, more_is_better in RATES.values():
                cells.append(cell(rows, name, show))
                if arm != "full":
                    pair = (rows, own["full"]) if more_is_better else (own["full"], rows)
                    cells[-1] += f" ({ratio(*pair, name):.2f}x)"
            lines.append([str(concurrency), LABELS[arm], *cells, *(blocks(rows, name) for name in BLOCKS.values())])
    return Sheet(["in flight", "image tokens", *RATES, *BLOCKS], lines, note(document, *_facts(document)))


def _facts(document: Document) -> Iterator[str]:
    """What was measured where, for the note."""
    about = document["machine"]
    yield from (document["model"], document["dtype"], about["name"])
    yield f"{about['threads']} threads" if about["device"] == "cpu" else f"CUDA {about['torch_cuda']}"
    if tokens := document["vision_tokens"]:
        yield f"dropping keeps {tokens['dropped']:.0f} vision tokens on average over the layers"
        yield f"smaller images have {tokens['smaller']}"
    if document["left_out"]:
        yield document["left_out"]
    arms = list(document["arms"].values())
    pools = "/".join(str(facts["pool_blocks"]) for facts in arms)
    yield f"pools of {pools} blocks of {arms[0]['block_size']} tokens"
    yield f"vLLM {about['vllm']}"


def cell(rows: list[Row], name: str, show: Any) -> str:
    """Median and half the distance between the quartiles."""
    first, median, third = quartiles([row[name] for row in rows])
    return f"{show(median)} ±{100 * (third - first) / 2 / median:.0f}%"


def ratio(rows: list[Row], base: list[Row], name: str) -> float:
    """Median over the rounds of a ratio within a round."""
    of_base = {row["round"]: row[name] for row in base}
    return statistics.median(row[name] / of_base[row["round"]] for row in rows)


def blocks(rows: list[Row], name: str) -> str:
    """Most blocks of any round; a dash if they were never counted."""
    found = [row[name] for row in rows if row[name] is not None]
    return str(max(found)) if found else "-"
