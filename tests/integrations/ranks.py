# SPDX-License-Identifier: Apache-2.0
"""One process, alone or as a rank under torchrun: ``python ranks.py FOLDER``.

FOLDER holds checkpoints and inputs, and gets what each rank found.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import LlavaForConditionalGeneration

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.transformers import drop_tokens

CONFIGS = {
    "thresholds": dict(pruning_layers=(1, 3, 5), global_threshold=0.01, individual_threshold=0.02),
    "budgets": dict(pruning_layers=(1, 3, 5), budgets=(70, 40, 20), key_rate=0.15),
    "last token as query": dict(pruning_layers=(2,), budgets=(25,), text_queries="last", merge=False),
}
TOWER_CAN_BE_SHARDED = int(transformers.__version__.split(".")[0]) >= 5
SHARDED_TOWER = {  # no model's own plan does that
    f"model.{layers}.*.self_attn.{name}": style
    for layers, output in (("vision_tower.encoder.layers", "out_proj"), ("language_model.layers", "o_proj"))
    for name, style in {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", output: "rowwise"}.items()
}


def run(model, inputs, config):
    """Tokens, logits, which patches survived, and the shapes of the caches."""
    with drop_tokens(model, config) as report:
        output = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return {
        "tokens": output.sequences,
        "logits": torch.stack(output.logits, 1),
        "keys": [image.key for image in report.last.images],
        "survived": [image.survived for image in report.last.images],
        "caches": [tuple(layer.keys.shape) for layer in output.past_key_values.layers],
    }


def load(folder, name="model", **settings):
    model = LlavaForConditionalGeneration.from_pretrained(folder / name, **settings).eval()
    model.generation_config.eos_token_id = None
    return model


def refusal(model):
    """The message of drop_tokens."""
    config = MustDropConfig(**CONFIGS["budgets"])
    with pytest.raises(ValueError, match="drop_tokens: ") as caught, drop_tokens(model, config):
        pass
    return str(caught.value)


def main(folder):
    torch.set_num_threads(1)
    inputs = torch.load(folder / "inputs.pt")
    model = load(folder, tp_plan="auto")
    found = {name: run(model, inputs, MustDropConfig(**config)) for name, config in CONFIGS.items()}
    if TOWER_CAN_BE_SHARDED:
        model = load(folder, tp_plan=SHARDED_TOWER)
        found["sharded tower"] = run(model, inputs, MustDropConfig(**CONFIGS["budgets"]))
    found["refusal"] = refusal(load(folder, "one key head", tp_plan="auto"))
    torch.save(found, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
