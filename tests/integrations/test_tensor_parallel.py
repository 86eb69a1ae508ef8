# SPDX-License-Identifier: Apache-2.0
"""``tp_plan="auto"`` under torchrun: two processes with half of the heads each give the results of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import tiny_llava
import torch
from processes import output_of_python
from prompts import make_inputs

from mustdrop_kernels.config import MustDropConfig

pytest.importorskip("accelerate", reason="tp_plan needs accelerate")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory, processor):
    """Checkpoints and a padded batch, and what two ranks made of them."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny_llava.model().save_pretrained(folder / "model")
    tiny_llava.model(layers=6, key_heads=1).save_pretrained(folder / "one key head")
    torch.save(make_inputs(processor, "padded"), folder / "inputs.pt")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    output_of_python(*torchrun, HERE / "ranks.py", folder, OMP_NUM_THREADS="1")
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """Results of each rank."""
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def check_ranks(found, expected):
    """Tokens, maps and logits of one process; each rank's cache holds its own heads of them."""
    for rank in found:
        assert torch.equal(rank["tokens"], expected["tokens"])
        torch.testing.assert_close(rank["logits"], expected["logits"], atol=1e-4, rtol=0)
        for one, other in zip(rank["keys"], expected["keys"], strict=True):
            assert torch.equal(one, other)
        for one, other in zip(rank["survived"], expected["survived"], strict=True):
            assert all(torch.equal(one[layer], other[layer]) for layer in other)
        assert rank["caches"] == [(b, heads // 2, *rest) for b, heads, *rest in expected["caches"]]


@pytest.mark.parametrize("name", ranks.CONFIGS)
def test_two_ranks_equal_one_process(name, folder, found):
    inputs, model = torch.load(folder / "inputs.pt"), ranks.load(folder)
    expected = ranks.run(model, inputs, MustDropConfig(**ranks.CONFIGS[name]))
    lengths = [shape[2] for shape in expected["caches"]]
    assert lengths[-1] < lengths[0]  # it did drop
    check_ranks([rank[name] for rank in found], expected)


@pytest.mark.skipif(not ranks.TOWER_CAN_BE_SHARDED, reason="transformers 4 cannot shard a CLIP tower")
def test_a_vision_tower_whose_heads_are_shared_out(folder, found):
    inputs, model = torch.load(folder / "inputs.pt"), ranks.load(folder)
    expected = ranks.run(model, inputs, MustDropConfig(**ranks.CONFIGS["budgets"]))
    check_ranks([rank["sharded tower"] for rank in found], expected)


def test_fewer_key_heads_than_ranks_are_refused(found):
    for rank in found:
        assert rank["refusal"] == "drop_tokens: num_key_value_heads (1) must be a multiple of the 2 ranks"
