# SPDX-License-Identifier: Apache-2.0
"""positions="published" reproduces a whole run of the published code (golden/end_to_end)."""

from __future__ import annotations

from types import SimpleNamespace

import golden_llava
import pytest
import torch

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.transformers import drop_tokens


@pytest.fixture(scope="module")
def tensors():
    return golden_llava.recording()[0]


@pytest.fixture(scope="module")
def about():
    return golden_llava.recording()[1]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def run(request, about):
    """One generate call with everything that is to be compared."""
    model, inputs = golden_llava.model(request.param), golden_llava.inputs()
    config = MustDropConfig(
        merge_uniform=True,
        merge_threshold=about["merge_threshold"],
        key_rate=about["keep_rate"],
        pruning_layers=about["pruning_layers"],
        global_threshold=about["global_thr"],
        individual_threshold=about["individual_thr"],
        positions="published",
    )
    found = SimpleNamespace(inputs=inputs, positions=[], last_hidden=[], features=[])
    rotary = model.model.language_model.rotary_emb.register_forward_hook(
        lambda module, args, kwargs, output: found.positions.append(kwargs.get("position_ids", args[-1])),
        with_kwargs=True,
    )
    layers = [
        layer.register_forward_hook(lambda module, args, output: found.last_hidden.append(_hidden(output)[0, -1]))
        for layer in model.model.language_model.layers
    ]
    projector = model.model.multi_modal_projector.register_forward_hook(
        lambda module, args, output: found.features.append(output)
    )
    with drop_tokens(model, config) as report:
        found.output = model.generate(
            **inputs, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    for handle in (rotary, projector, *layers):
        handle.remove()
    found.report = report.last
    (found.image,) = report.last.images
    return found


def _hidden(output):
    return output[0] if isinstance(output, tuple) else output


def test_merged_windows_and_features(run, tensors):
    row, column = torch.tensor([window[:2] for window in run.image.windows]).T
    assert sorted((row // 3 * 8 + column // 3).tolist()) == sorted(tensors["merged_windows"][0].tolist())
    torch.testing.assert_close(run.features[0], tensors["image_features"], atol=2e-3, rtol=0)


def test_key_tokens(run, tensors, about):
    assert run.image.key_tokens == about["key_set_size"]
    marked = run.image.token_of_patch[run.image.key].unique().tolist()
    assert marked == sorted(tensors["key_set"].tolist())  # published positions: tokens go by their own numbers


def test_kept_tokens_at_each_layer(run, tensors, about):
    assert run.image.tokens == about["n_vision_after_merge"]
    assert list(run.image.kept.values()) == about["vision_tokens_after_each_pruning_layer"]
    for layer in about["pruning_layers"]:
        survivors = run.image.token_of_patch[run.image.survived[layer]].unique().tolist()
        assert survivors == tensors[f"prune{layer}.kept_original"].tolist()


def test_cache(run, tensors, about):
    assert run.report.prefill_cache.lengths == about["kv_len_before_eviction"]
    assert run.report.final_cache.lengths == about["kv_len_after_prefill"]
    cache = run.output.past_key_values
    for name, recorded in tensors.items():
        if "_cache_after_prefill" in name:
            layer = cache.layers[int(name.rsplit("layer", 1)[1])]
            ours = layer.keys if name.startswith("k_") else layer.values
            torch.testing.assert_close(ours[:, :, : recorded.shape[2]], recorded, atol=2e-3, rtol=0)


def test_decode_positions(run, tensors):
    # The model computes positions once per pass, which go unused; then each group of layers computes its own.
    steps = len(tensors["decode_position_ids"])
    single = [positions.item() for positions in run.positions if positions.shape[-1] == 1]
    assert len(single) == 3 * steps
    lengths = run.report.final_cache.lengths
    for step, recorded in enumerate(tensors["decode_position_ids"].tolist()):
        whole, cut = single[3 * step + 1 : 3 * step + 3]
        assert recorded == [whole if length == lengths[0] else cut for length in lengths]


def test_hidden_states_and_logits(run, tensors):
    depth = len(tensors["last_token_hidden_after_layer"])
    hidden = torch.stack(run.last_hidden[:depth])
    torch.testing.assert_close(hidden, tensors["last_token_hidden_after_layer"], atol=2e-3, rtol=0)
    logits = torch.cat(run.output.logits)[:, :-1]  # without the image token's entry
    torch.testing.assert_close(logits, tensors["step_logits"], atol=2e-3, rtol=0)


def test_generated_ids(run, tensors):
    prompt = run.inputs["input_ids"]
    assert torch.equal(run.output.sequences[:, : prompt.shape[1]], prompt)
    assert run.output.sequences[0, prompt.shape[1] :].tolist() == tensors["generated_ids"].tolist()


def test_original_positions_are_another_thing(tensors, about):
    """The recording's negative control: kept positions change the logits by about 3."""
    config = MustDropConfig(global_threshold=about["global_thr"], individual_threshold=about["individual_thr"])
    model, inputs = golden_llava.model(), golden_llava.inputs()
    with drop_tokens(model, config), torch.no_grad():
        logits = model(**inputs).logits[:, -1, :-1]
    assert (logits - tensors["prefill_logits_last"]).abs().max() > 1
