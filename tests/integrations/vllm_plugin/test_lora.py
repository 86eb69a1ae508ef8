# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters: requests of the base model and of two adapters in one batch, with and without dropped tokens."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import lora
from engines import ASKS, BUDGETS, KEEP_ALL, PLANS, Transformers, engine, sampling

NEW = 8
ASKED = list(itertools.product(ASKS[:4], (0, 1, 2)))  # 0: the base model
# One slot more than adapters: vLLM's operators for CPUs apply the last slot to rows without an adapter.
SETTINGS = {"enable_lora": True, "max_lora_rank": lora.RANK, "max_loras": 3, "max_num_seqs": 12}


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory):
    """Two adapters, and the checkpoints that they are merged into."""
    root = tmp_path_factory.mktemp("lora")
    for seed in (1, 2):
        lora.save(root / f"adapter-{seed}", checkpoint, seed)
        lora.save_merged(root / f"merged-{seed}", checkpoint, seed)
    return root


def answers(llm, folders, asked):
    from vllm.lora.request import LoRARequest

    adapters = [None, *(LoRARequest(f"adapter-{n}", n, str(folders / f"adapter-{n}")) for n in (1, 2))]
    prompts = [ask.for_vllm() for ask, _ in asked]
    chosen = [adapters[number] for _, number in asked]
    outputs = llm.generate(prompts, sampling(NEW), use_tqdm=False, lora_request=chosen)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("name", ["budgets", "key tokens"])
def test_adapters_equal_merged_weights(name, checkpoint, folders, transformers_of):
    """All at once, and one adapter at a time."""
    plan = PLANS[name]
    models = [transformers_of, *(Transformers(folders / f"merged-{number}") for number in (1, 2))]
    expected = [models[number].generate(ask, plan, NEW)[0] for ask, number in ASKED]
    assert len(set(map(tuple, expected))) == len(ASKED)
    with engine(checkpoint, plan, **SETTINGS) as llm:
        assert answers(llm, folders, ASKED) == expected
        for number in (2, 0, 1):
            chosen = [i for i, (_, adapter) in enumerate(ASKED) if adapter == number]
            assert answers(llm, folders, [ASKED[i] for i in chosen]) == [expected[i] for i in chosen]


def test_keep_all_equals_plain_vllm(checkpoint, folders):
    with engine(checkpoint, None, **SETTINGS) as llm:
        plain = answers(llm, folders, ASKED)
    with engine(checkpoint, KEEP_ALL, **SETTINGS) as llm:
        assert answers(llm, folders, ASKED) == plain


def test_the_adapter_of_images_applies_by_default(checkpoint, folders, transformers_of):
    merged = Transformers(folders / "merged-1")
    expected = [merged.generate(ASKS[0], BUDGETS, NEW)[0], transformers_of.generate(ASKS[1], BUDGETS, NEW)[0]]
    default = {"image": str(folders / "adapter-1")}
    with engine(checkpoint, BUDGETS, **SETTINGS, default_mm_loras=default) as llm:
        assert answers(llm, folders, [(ASKS[0], 0), (ASKS[1], 0)]) == expected
