# SPDX-License-Identifier: Apache-2.0
"""Accuracy of ``mustdrop eval`` in vLLM with the plug-in, one engine per method.

    .venv-vllm/bin/python bench/served.py --count 200
    .venv-vllm/bin/python bench/served.py --methods full,mustdrop-read --budgets 128,64 --json served.json
    .venv-vllm/bin/python bench/served.py --model FOLDER --questions TEXTVQA.json --methods preset-budget-64

Methods are those of ``mustdrop eval`` that are a configuration of the plug-in: full, mustdrop-read, mustdrop,
sparsevlm, pyramiddrop, after-K, preset-NAME. The document is one of ``mustdrop eval`` too, which shows it with
``--load FILE``, with the answers beside it; tokens are those that the engine's layers held, not those that a plan
promises.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before vLLM is imported: the engine core in this process, so that the model is accessible.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from rich.console import Console

from mustdrop_kernels.bench.machine import describe
from mustdrop_kernels.bench.vllm_engine import engine, overrides
from mustdrop_kernels.cli.progress import bar
from mustdrop_kernels.evaluation import FULL, datasets, results, summary
from mustdrop_kernels.evaluation.checkpoint import SMALL, SMALL_MODEL, prompt_text
from mustdrop_kernels.evaluation.methods import Sizes, make
from mustdrop_kernels.flops import LanguageModel
from mustdrop_kernels.integrations.vllm import settings


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with a LLaVA-1.5 checkpoint; default: the small one in the package")
    parser.add_argument("--questions", type=Path, help="a file of TextVQA, GQA or POPE; default: made, framed digits")
    parser.add_argument("--images", type=Path, help="folder of the file's pictures; default: the file's")
    parser.add_argument("--count", type=int, help="questions; default: 200 made ones, all of a file")
    parser.add_argument("--split", default="test", choices=("validation", "test"), help="of made questions")
    parser.add_argument("--seeds", type=lambda x: [int(n) for n in x.split(",")], default=[0, 1, 2])
    parser.add_argument("--methods", type=lambda x: x.split(","), default=[FULL, "mustdrop-read", "mustdrop"])
    parser.add_argument("--budgets", type=lambda x: [float(n) for n in x.split(",")], default=[64.0])
    parser.add_argument("--max-new-tokens", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32, help="questions in flight")
    parser.add_argument("--json", type=Path, help="write the document here")
    return parser.parse_args()


def plan(cell: results.Key, sizes: Sizes) -> dict[str, Any] | None:
    """Fields for ``hf_overrides``; None: the plug-in is not used.

    Raises:
        ValueError: the plug-in cannot run the method.
    """
    if cell[0] == FULL:
        return None
    method = make(*cell, sizes)
    if method.stage is not None:
        raise ValueError(f"{cell[0]} has a first stage of its own, which the plug-in does not support")
    fields = method.config.to_dict()
    settings.parse(fields)
    return fields


# -------------------------------------------------------------------------------------------------------- an engine


def engine_arguments(model: str, fields: dict[str, Any] | None, batch: int) -> dict[str, Any]:
    """Arguments of a vLLM engine for the checkpoint, with the plug-in where there are fields."""
    return {
        "model": model,
        "dtype": "float32" if model == str(SMALL_MODEL) else "auto",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_batched_tokens": 4096,
        "max_num_seqs": batch,
        "seed": 0,
        **overrides(fields),
    }


class Watch:
    """Recorder of the vision tokens that the layers of a dropping model hold of each prompt."""

    def __init__(self, llm: Any) -> None:
        model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        self.layers: list[list[int]] = []
        """Vision tokens of each prompt, layer by layer."""
        self.last: list[int] = []
        """Vision tokens of each prompt at the start of decoding."""
        prefill = getattr(model, "_prefill", None)
        if prefill is not None:
            run = prefill.run

            def watched(*args: Any) -> Any:
                final, plan = run(*args)
                self.layers += map(list, zip(*(x.vision_token_counts for x in plan.cached_tokens), strict=True))
                self.last += plan.tokens.vision_token_counts
                return final, plan

            prefill.run = watched

    def take(self) -> tuple[list[list[int]], list[int]]:
        """Counts of the prompts since the last call."""
        found = self.layers, self.last
        self.layers, self.last = [], []
        return found


class Evaluator:
    """Runs questions and adds their answers and costs to a cell."""

    def __init__(self, questions: datasets.Questions, processor: Any, sizes: Sizes, slot_bytes: int, tokens: int):
        self.questions, self.processor, self.sizes = questions, processor, sizes
        self.slot_bytes, self.tokens = slot_bytes, tokens

    def run(self, llm: Any, watch: Watch, examples: Sequence[datasets.Example], cell: dict[str, Any]) -> None:
        """Run these questions in one batch."""
        from vllm import SamplingParams

        prompts = [
            {"prompt": prompt_text(self.processor, e.text), "multi_modal_data": {"image": e.picture()}}
            for e in examples
        ]
        begin = time.perf_counter()
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=self.tokens), use_tqdm=False)
        cell["seconds"] += time.perf_counter() - begin
        answers = [output.outputs[0].text.strip() for output in outputs]
        cell["answers"] += answers
        cell["right"] += self.questions.scores(answers, examples)
        lengths = [len(output.prompt_token_ids) for output in outputs]
        self._count(cell, *watch.take(), sum(lengths) / len(lengths) - self.sizes.patches, len(examples))

    def _count(
        self, cell: dict[str, Any], layers: list[list[int]], last: list[int], text: float, questions: int
    ) -> None:
        """Means over the questions."""
        if not layers:  # nothing was dropped
            layers, last = [[self.sizes.patches] * self.sizes.depth] * questions, [self.sizes.patches] * questions
        assert len(layers) == questions, "a prompt was read twice, or not at all"
        processed = [sum(layer) / questions for layer in zip(*layers, strict=True)]
        kept = sum(last) / questions
        kv_bytes = (kept + text) * self.sizes.depth * self.slot_bytes
        results.count(cell, processed, last=kept, kv_bytes=kv_bytes, text=text)


# ------------------------------------------------------------------------------------------------------- all of them


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all methods; returns the document."""
    from transformers import AutoConfig, AutoProcessor
    from vllm.version import __version__ as vllm_version

    model = options.model or str(SMALL_MODEL)
    config, processor = AutoConfig.from_pretrained(model), AutoProcessor.from_pretrained(model)
    sizes, language = Sizes.of(config), LanguageModel.of(config)
    # Methods that the plug-in does not support raise before anything runs.
    plans = {cell: plan(cell, sizes) for cell in results.keys(options.methods, options.budgets)}
    if options.questions is None:
        questions = datasets.made(options.split, options.seeds, options.count or 200)
        about: dict[str, Any] = {"questions": questions.name, "split": options.split, "seeds": options.seeds}
    else:
        questions = datasets.read(options.questions, options.images).head(options.count)
        about = {"questions": questions.name, "file": options.questions.name}
    found = results.start(about, questions, list(plans))
    found["command"] = " ".join([".venv-vllm/bin/python bench/served.py", *sys.argv[1:]])
    found["machine"] = describe(torch.device("cpu"), torch.get_num_threads()) | {"vllm": vllm_version}
    with bar() as tell:
        for number, (cell, fields) in enumerate(zip(found["cells"], plans.values(), strict=True)):
            name = f"{cell['method']} {cell['budget'] or ''}"
            tell(f"{name}: starting vLLM", number / len(plans))
            cell |= {"answers": [], "plan": fields}
            with engine(**engine_arguments(model, fields, options.batch)) as llm:
                dtype = llm.model_config.dtype
                slot_bytes = language.token_bytes(dtype.itemsize)
                evaluator = Evaluator(questions, processor, sizes, slot_bytes, options.max_new_tokens)
                watch = Watch(llm)
                for begin in range(0, len(questions.examples), options.batch):
                    examples = questions.examples[begin : begin + options.batch]
                    evaluator.run(llm, watch, examples, cell)
                    tell(name, (number + (begin + len(examples)) / len(questions.examples)) / len(plans))
    found["about"] |= {
        "model": options.model or SMALL, "sizes": dataclasses.asdict(language), "engine": f"vLLM {vllm_version}",
        "dtype": str(dtype).removeprefix("torch."), "max_new_tokens": options.max_new_tokens,
    }  # fmt: skip
    return found


def main() -> None:
    """Run the command line."""
    options = arguments()
    try:
        found = run(options)
    except ValueError as error:
        sys.exit(f"served.py: {error}")
    if options.json is not None:
        results.write(found, options.json)
    console = Console()
    for table in summary.tables(found, "mustdrop-read"):
        console.print(table)
    for line in summary.notes(found):
        console.print(line, style="dim", markup=False, highlight=False)


if __name__ == "__main__":
    main()
