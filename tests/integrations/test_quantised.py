# SPDX-License-Identifier: Apache-2.0
"""Quantized weights, by common libraries: no hook of the package touches them."""

from __future__ import annotations

import copy

import pytest
import torch
from masked_reference import MaskedReference
from test_families import BUDGETS, NEW_TOKENS, PLAIN, assert_keep_all_changes_nothing, generate, inputs_of, model_of
from torch import nn

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.transformers import drop_tokens


def torch_dynamic(language):
    """int8 by torch's own dynamic quantisation."""
    torch.ao.quantization.quantize_dynamic(language, {nn.Linear}, torch.qint8, inplace=True)


def torchao_int8(language):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantization.quantize_(language, quantization.Int8WeightOnlyConfig())


def bitsandbytes_int8(language):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    _replace(
        language,
        lambda old: bnb.nn.Linear8bitLt(old.in_features, old.out_features, bias=False, has_fp16_weights=False),
        lambda weight, new: bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False),
    )


def bitsandbytes_nf4(language):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    _replace(
        language,
        lambda old: bnb.nn.Linear4bit(
            old.in_features, old.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
        ),
        lambda weight, new: bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=new),
    )


def _replace(language, linear, parameter):
    """As transformers does when it loads a model; moving to the device quantises."""
    for module in list(language.modules()):
        for name, old in list(module.named_children()):
            if type(old) is nn.Linear:
                assert old.bias is None
                new = linear(old)
                new.weight = parameter(old.weight.data.clone(), new)
                setattr(module, name, new.to("cpu"))


def weights(language):
    """Everything that a state dict holds: packed weights, scales, types."""
    found = {}
    for name, value in language.state_dict().items():
        if isinstance(value, torch.Tensor):
            value = value.dequantize() if hasattr(value, "dequantize") and value.dim() > 1 else value
            found[name] = value.detach().clone()
        else:
            found[name] = str(value)
    return found


def assert_same_weights(after, before):
    assert after.keys() == before.keys()
    for name, value in before.items():
        same = torch.equal(after[name], value) if isinstance(value, torch.Tensor) else after[name] == value
        assert same, name


@pytest.mark.parametrize("quantise", [torch_dynamic, torchao_int8, bitsandbytes_int8, bitsandbytes_nf4])
def test_quantised_weights_stay_as_they_are(quantise):
    """Keep-all gives the bits of the quantised model, dropping the tokens of its masked reference."""
    model, inputs = copy.deepcopy(model_of("llava")), inputs_of("llava")
    language, config = model.model.language_model, MustDropConfig(**PLAIN, **BUDGETS)
    quantise(language)
    layer = language.layers[0].self_attn.q_proj
    assert type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter
    before = weights(language)
    assert_keep_all_changes_nothing(model, inputs)
    with drop_tokens(model, config) as report:
        output = generate(model, inputs)
    if quantise is not torch_dynamic:  # whose activations are quantised by the range of all tokens that are there
        tokens, _ = MaskedReference(model, config).generate(inputs, NEW_TOKENS)
        assert torch.equal(output.sequences[:, inputs["input_ids"].shape[1] :], tokens)
    assert report.last.final_cache.bytes < report.last.plain_cache.bytes
    assert language.layers[0].self_attn.q_proj is layer
    assert_same_weights(weights(language), before)
