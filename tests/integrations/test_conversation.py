# SPDX-License-Identifier: Apache-2.0
"""Conversations on a shortened cache continue correctly or are refused."""

from __future__ import annotations

import copy
import dataclasses

import emulated_flash
import pytest
import torch
from test_context import generate

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.transformers import DropCache, drop_tokens

SETTINGS = dict(pruning_layers=(1, 3), global_threshold=0.01, individual_threshold=0.02)
TURN = [40, 41, 42, 43, 44]


@pytest.fixture(params=["original", "published"])
def config(request):
    return MustDropConfig(positions=request.param, **SETTINGS)


def first_turn(model, inputs):
    return generate(model, inputs, max_new_tokens=4)


def next_turn(model, ids, mask, cache, new_tokens):
    turn = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
    return generate(model, turn, max_new_tokens=new_tokens)


def feed(model, cache, ids, mask):
    """Logits of `ids` after the cached tokens; `mask` covers everything up to their end."""
    positions = (mask.long().cumsum(1) - 1)[:, -ids.shape[1] :]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


@pytest.mark.parametrize("evict", [True, False])
def test_whole_turn_equals_token_by_token(evict, config, model, inputs):
    with drop_tokens(model, dataclasses.replace(config, evict=evict)):
        output = first_turn(model, inputs)
        cache, batch = output.past_key_values, len(inputs["input_ids"])
        seen = torch.cat([inputs["attention_mask"], torch.ones(batch, 3 + len(TURN), dtype=torch.long)], 1)
        ids = torch.tensor([TURN]).repeat(batch, 1)
        assert cache.get_seq_length() == seen.shape[1] - len(TURN)
        whole = feed(model, copy.deepcopy(cache), ids, seen)
        alone = [
            feed(model, cache, ids[:, i : i + 1], seen[:, : seen.shape[1] - len(TURN) + i + 1])
            for i in range(len(TURN))
        ]
    torch.testing.assert_close(whole, torch.cat(alone, 1), atol=1e-4, rtol=0)


def test_whole_turn_with_masks_for_flash_attention(config, sdpa, inputs):
    with emulated_flash.on(sdpa):
        test_whole_turn_equals_token_by_token(False, config, sdpa, inputs)


def test_generate_goes_on_from_the_cache(config, model, padded):
    """Both turns in one go equal a first turn whose tokens are forced and then generated on."""
    with drop_tokens(model, config) as report:
        long = model.generate(**padded, max_new_tokens=9, do_sample=False)
        output = first_turn(model, padded)
        cache = output.past_key_values
        mask = torch.cat([padded["attention_mask"], torch.ones(2, 4, dtype=torch.long)], 1)
        again = next_turn(model, output.sequences, mask, cache, 5).sequences
        assert torch.equal(again, long)
        ids = torch.cat([again, torch.tensor([TURN, TURN])], 1)
        mask = torch.cat([mask, torch.ones(2, 5 + len(TURN), dtype=torch.long)], 1)
        second = next_turn(model, ids, mask, cache, 3)
    assert len(report.prompts) == 2
    # The same by hand, one token at a time.
    with drop_tokens(model, config):
        cache = first_turn(model, padded).past_key_values
        start = padded["input_ids"].shape[1] + 3
        for end in range(start + 1, ids.shape[1] + 1):
            logits = feed(model, cache, ids[:, end - 1 : end], mask[:, :end])
    torch.testing.assert_close(second.logits[0], logits[:, -1], atol=1e-4, rtol=0)


def test_masked_new_tokens_are_not_seen(config, model, one):
    """The caller's mask applies after the prompt: a turn padded on its left equals the turn."""
    length = one["input_ids"].shape[1] + 3
    with drop_tokens(model, config):
        cache = first_turn(model, one).past_key_values
        mask = torch.ones(1, length + 7, dtype=torch.long)
        mask[:, length : length + 2] = 0
        padded = feed(model, copy.deepcopy(cache), torch.tensor([[3, 3, *TURN]]), mask)
        if config.positions == "original":  # published positions count the cache, padding and all
            plain = feed(model, cache, torch.tensor([TURN]), torch.ones(1, length + 5, dtype=torch.long))
            torch.testing.assert_close(padded[:, 2:], plain, atol=1e-4, rtol=0)


def test_masked_new_tokens_are_not_seen_by_what_is_generated(model, one):
    """Nor by the tokens that come after a padded turn, which pass by the hooks where nothing is masked."""
    logits = []
    with drop_tokens(model, MustDropConfig(**SETTINGS)):
        first = first_turn(model, one)
        for pads in ([], [3, 3]):
            turn = torch.tensor([pads + TURN])
            ids = torch.cat([first.sequences, turn], 1)
            mask = torch.ones_like(ids)
            mask[:, first.sequences.shape[1] :][:, : len(pads)] = 0
            output = next_turn(model, ids, mask, copy.deepcopy(first.past_key_values), 4)
            logits.append(torch.stack(output.logits))
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=0)


def test_outside_the_context_it_is_refused(config, model, one):
    with drop_tokens(model, config):
        cache = first_turn(model, one).past_key_values
        saved = copy.deepcopy(cache)
    for shortened in (cache, saved):
        with pytest.raises(RuntimeError, match="only be continued inside drop_tokens"):
            model(input_ids=torch.tensor([TURN]), past_key_values=shortened)
    with drop_tokens(model, config), torch.no_grad():  # another context will do
        model(input_ids=torch.tensor([TURN]), past_key_values=cache)


def test_a_cache_that_lost_nothing_is_an_ordinary_one(model, one):
    with drop_tokens(model, MustDropConfig.preset("keep-all", pruning_layers=(1,))):
        cache = first_turn(model, one).past_key_values
    plain = first_turn(model, one).past_key_values
    ids = torch.tensor([TURN])
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids, past_key_values=c).logits for c in (cache, plain))
    assert torch.equal(ours, theirs)


def test_refused_continuations(config, sdpa, one):
    with drop_tokens(sdpa, config), torch.no_grad():
        cache = first_turn(sdpa, one).past_key_values
        if config.positions == "published":
            with pytest.raises(ValueError, match="cannot be done to an image behind cached tokens"):
                sdpa(**one, past_key_values=cache)
        with pytest.raises(ValueError, match="attention_mask must be"):
            sdpa(input_ids=torch.tensor([TURN]), attention_mask=torch.ones(1, 5), past_key_values=cache)
        with pytest.raises(RuntimeError, match="prompt that drop_tokens has shortened cannot be cropped"):
            cache.crop(-cache.generated - 1)


def test_cache_rows_can_be_reordered_repeated_and_selected(config, sdpa, padded):
    """Reordering, repeating and selecting rows of a cache, as beam search does: each row continues unchanged."""
    with drop_tokens(sdpa, config):
        cache = first_turn(sdpa, padded).past_key_values
        mask = torch.cat([padded["attention_mask"], torch.ones(2, 4, dtype=torch.long)], 1)
        ids = torch.tensor([[40], [50]])
        expected = feed(sdpa, copy.deepcopy(cache), ids, mask)
        rows = torch.tensor([1, 1, 0, 0])
        changed = copy.deepcopy(cache)
        changed.batch_repeat_interleave(2)
        changed.reorder_cache(torch.tensor([2, 3, 0, 1]))
        torch.testing.assert_close(feed(sdpa, changed, ids[rows], mask[rows]), expected[rows], atol=1e-4, rtol=0)
        cache.batch_select_indices(torch.tensor([1]))
        torch.testing.assert_close(feed(sdpa, cache, ids[1:], mask[1:]), expected[1:], atol=1e-4, rtol=0)


def test_reset_makes_it_new(config, sdpa, one):
    with drop_tokens(sdpa, config):
        cache = DropCache(sdpa.config.text_config)
        first, second = (
            (sdpa.generate(**one, max_new_tokens=2, past_key_values=cache), cache.shortened, cache.reset())
            for _ in range(2)
        )
    assert torch.equal(first[0], second[0])
    assert first[1:] == second[1:] == (True, None)
    assert not cache.shortened
