# SPDX-License-Identifier: Apache-2.0
"""Real engines around the tiny checkpoint, requests for them, and transformers' answers to the same requests."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os

# Before vLLM is imported: the engine core in this process, where the tests can look into it.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # gpu_backends.platform chooses another

import gpu_backends
import pytest
import tiny_llava
import torch

from mustdrop_kernels.bench import vllm_engine
from mustdrop_kernels.config import MustDropConfig

PAGE_SIZE = 32  # of a block, the fewest that vLLM's CPU attention takes
BUDGETS = {"merge": False, "key_rate": 0.0, "pruning_layers": [1, 3, 5], "budgets": [70, 40, 20]}
KEEP_ALL = {
    "merge": False,
    "key_rate": 0.0,
    "pruning_layers": [1, 3],
    "global_threshold": 0.0,
    "individual_threshold": 0.0,
}
PLANS = {
    "budgets": BUDGETS,
    "thresholds": {
        "merge": False,
        "key_rate": 0.0,
        "pruning_layers": [1, 3, 5],
        "global_threshold": 0.01,
        "individual_threshold": 0.02,
    },
    "merge and thresholds": {
        "merge_budget": 7,
        "key_rate": 0.0,
        "pruning_layers": [0, 6],
        "global_threshold": 0.01,
        "individual_threshold": 0.02,
    },
    "merge only": {"merge_budget": 7, "key_rate": 0.0, "pruning_layers": []},
    "key tokens": {**BUDGETS, "key_rate": 0.2},
    "all stages": {"merge_budget": 7, "merge_layer": 1, "pruning_layers": [1, 4], "global_threshold": 0.01},
    "all by thresholds": {"preset": "64", "pruning_layers": [1, 3, 5]},
    "last layer, last token as query": {
        **BUDGETS,
        "pruning_layers": [2, 7],
        "budgets": [50, 0],
        "text_queries": "last",
    },
}


@dataclasses.dataclass(frozen=True)
class Ask:
    """A prompt and the seeds of its pictures."""

    text: str
    pictures: tuple[int, ...] = ()

    def images(self):
        return [tiny_llava.picture(seed, flat=(0.5, 0.25, 0.75)[seed % 3]) for seed in self.pictures]

    def for_vllm(self):
        data = {"multi_modal_data": {"image": self.images()}} if self.pictures else {}
        return {"prompt": self.text, **data}


ASKS = [
    Ask("USER: <image>\nWhat is in the image? ASSISTANT:", (0,)),
    Ask("USER: What is a car? ASSISTANT:"),
    Ask("USER: <image>\ncar? ASSISTANT: a", (1,)),
    Ask("USER: <image> and <image>\nWhat is in the images? ASSISTANT:", (2, 0)),
    Ask("USER: <image>", (1,)),  # no text query
]


@contextlib.contextmanager
def engine(checkpoint, plan, **settings):
    """A vLLM around the checkpoint; without a plan a plain one."""
    found = arguments(checkpoint, plan, **settings)
    with gpu_backends.default_platform(), _quick_collections(), vllm_engine.engine(**found) as llm:
        yield llm


_alive = []


@contextlib.contextmanager
def _quick_collections():
    """An engine collects garbage ten times in its life, a second each with all of vLLM's modules: those are frozen."""
    if not _alive:  # an engine that is frozen would never be freed
        gc.unfreeze()
        gc.collect()
        gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("freeze", "unfreeze"):
            patch.setattr(gc, name, lambda: None)
        _alive.append(True)
        try:
            yield
        finally:
            _alive.pop()


def arguments(checkpoint, plan, **settings):
    return {
        "model": str(checkpoint),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 1024,
        "block_size": PAGE_SIZE,
        "seed": 0,
        **vllm_engine.overrides(plan),
        **settings,
    }


def sampling(tokens):
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def generate(llm, asks, tokens):
    outputs = llm.generate([ask.for_vllm() for ask in asks], sampling(tokens), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def compare_with_plain(checkpoint, answer, asks, plan, **settings):
    """Answers of plain vLLM and, with dropped tokens, of an engine with these settings; `answer(llm, asks)` gives them.

    Those with every token kept equal plain vLLM's, and those with dropped tokens do not depend on the batch.
    """
    with engine(checkpoint, None, **settings) as llm:
        plain = answer(llm, asks)
    with engine(checkpoint, KEEP_ALL, **settings) as llm:
        assert answer(llm, asks) == plain
    with engine(checkpoint, plan, **settings) as llm:
        free, dropped = free_blocks(llm), answer(llm, asks)
        assert [answer(llm, [ask])[0] for ask in asks] == dropped
        assert scheduler(llm).released_blocks > 0
        assert free_blocks(llm) == free
    return plain, dropped


def scheduler(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


@contextlib.contextmanager
def recorded_preemptions(llm):
    """A list of the requests that are preempted in the block, each time."""
    preempt, seen = scheduler(llm)._preempt_request, []

    def recorded(request, *args, **kwargs):
        seen.append(request)
        return preempt(request, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler(llm), "_preempt_request", recorded)
        yield seen


def free_blocks(llm):
    return scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks()


def drop_record(llm):
    """None in a plain engine."""
    return getattr(llm.llm_engine.model_executor.driver_worker.worker.model_runner.model, "drop_record", None)


class Transformers:
    """The same checkpoint in transformers, in and out of drop_tokens."""

    def __init__(self, checkpoint, grid=12):
        from transformers import LlavaForConditionalGeneration

        self.model = LlavaForConditionalGeneration.from_pretrained(checkpoint).eval()
        self.model.generation_config.eos_token_id = None
        self.processor = tiny_llava.processor(grid)
        self.known = {}

    def generate(self, ask, plan, tokens):
        """Tokens, and how many tokens of the prompt were dropped."""
        key = (ask, repr(plan), tokens)
        if key not in self.known:
            self.known[key] = self._generate(ask, plan, tokens)
        return self.known[key]

    @torch.no_grad()
    def _generate(self, ask, plan, tokens):
        from mustdrop_kernels.integrations.transformers import drop_tokens

        inputs = self.processor(images=ask.images() or None, text=ask.text, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        if not ask.pictures:
            output = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
            return output[0, length:].tolist(), 0
        settings = {**plan, "evict_from": 0}
        config = MustDropConfig.preset(settings.pop("preset", "192"), **settings)
        with drop_tokens(self.model, config) as report:
            output = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        return output[0, length:].tolist(), length - report.last.final_cache.lengths[-1]

    def ids(self, ask):
        return self.processor(images=ask.images() or None, text=ask.text)["input_ids"][0]

    @torch.no_grad()
    def continued(self, before, ask, tokens):
        """Tokens with every token kept, after the token ids `before`."""
        inputs = self.processor(images=ask.images() or None, text=ask.text, return_tensors="pt")
        ids = torch.cat([torch.tensor([before], dtype=torch.long), inputs["input_ids"]], dim=1)
        pictures = {"pixel_values": inputs["pixel_values"]} if ask.pictures else {}
        output = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **pictures
        )
        return output[0, ids.shape[1] :].tolist()
