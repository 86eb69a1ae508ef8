# SPDX-License-Identifier: Apache-2.0
"""Scores use the lse of flash attention, captured from transformers' own calls of its functions."""

from __future__ import annotations

import threading

import flash_kernels
import pytest
import torch
import transformers
from masked_reference import MaskedReference
from prompts import make_inputs
from test_dropping import BUDGETS, THRESHOLDS
from transformers import modeling_flash_attention_utils as flash

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.transformers import drop_tokens
from mustdrop_kernels.integrations.transformers.flash_lse import captured_lse
from mustdrop_kernels.ops import TokenType
from mustdrop_kernels.plans import PaddedDropPlan

NEW_TOKENS = 4


@pytest.fixture
def seen(monkeypatch):
    """Each decision's query, key (which stage 3 moves), scale, lse, real rows and types of the keys."""
    found, prune = [], PaddedDropPlan.prune

    def watched(self, query, key, scale, *, lse=None):
        found.append((query, key.clone(), scale, lse, self.tokens.types != TokenType.PADDING, self.key_types))
        return prune(self, query, key, scale, lse=lse)

    monkeypatch.setattr(PaddedDropPlan, "prune", watched)
    return found


def expected_lse(query, key, scale, key_types):  # (B, Hq, L) float64
    query, key = query.double(), key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    rows, keys = query.shape[2], key.shape[2]
    visible = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows) & (key_types != TokenType.PADDING)[:, None]
    return (query @ key.transpose(2, 3) * scale).masked_fill(~visible[:, None], -torch.inf).logsumexp(-1)


def check_lse(seen):
    for query, key, scale, lse, real, key_types in seen:
        assert lse.shape == query.shape[:3]
        where = real[:, None].expand_as(lse)
        expected = expected_lse(query, key, scale, key_types)[where].float()
        torch.testing.assert_close(lse[where], expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("settings", [THRESHOLDS, BUDGETS], ids=["thresholds", "budgets"])
@pytest.mark.parametrize("prompt", ["one", "padded"])
@pytest.mark.parametrize("version", flash_kernels.VERSIONS)
def test_it_reaches_the_scores(version, prompt, settings, sdpa, processor, seen):
    inputs = make_inputs(processor, prompt)
    with flash_kernels.installed(sdpa, version) as kernels, drop_tokens(sdpa, MustDropConfig(**settings)) as report:
        output = sdpa.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert len(seen) == 3
    assert report.last.layer_tokens[-1] < report.last.layer_tokens[0]
    check_lse(seen)
    layers = len(sdpa.model.language_model.layers)
    assert kernels.calls == layers * NEW_TOKENS
    assert kernels.asked == (3 if kernels.flag else kernels.calls)  # no other layer requests it
    tokens, _ = MaskedReference(sdpa, MustDropConfig(**settings)).generate(inputs, NEW_TOKENS)
    assert torch.equal(output[:, -NEW_TOKENS:], tokens)


@pytest.mark.skipif(transformers.__version__ < "5", reason="generate() of transformers 4 ignores such images")
@pytest.mark.parametrize("prompt", ["one", "padded"])
def test_it_reaches_the_scores_of_a_second_image(prompt, sdpa, processor, seen):
    """Behind a cache that was shortened: fewer rows than keys."""
    inputs = make_inputs(processor, prompt)
    config = MustDropConfig(**BUDGETS)
    with flash_kernels.installed(sdpa, "flash_attention_2"), drop_tokens(sdpa, config):
        first = sdpa.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        del seen[:]
        ids = torch.cat([first.sequences, inputs["input_ids"]], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), 2).long(), inputs["attention_mask"]], 1)
        again = dict(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"])
        sdpa.generate(**again, past_key_values=first.past_key_values, max_new_tokens=2, do_sample=False)
    assert [query.shape[2] < key.shape[2] for query, key, *_ in seen] == [True] * 3
    check_lse(seen)


def test_heat_maps_are_the_same(sdpa, one):
    config, maps = MustDropConfig(**BUDGETS), []
    for asked in (False, True):
        with flash_kernels.installed(sdpa, "flash_attention_2") as kernels:
            if not asked:  # a version without such a flag
                kernels.flag = "nothing"
                kernels.dense.__signature__ = kernels.dense.__signature__.replace(
                    parameters=list(kernels.dense.__signature__.parameters.values())[:-1]
                )
            with drop_tokens(sdpa, config, heat_maps=True) as report:
                sdpa.generate(**one, max_new_tokens=1, do_sample=False)
        assert kernels.asked == (len(sdpa.model.language_model.layers) if asked else 0)
        maps.append(report.last.images[0].heat)
    for layer, heat in maps[0].items():
        torch.testing.assert_close(maps[1][layer], heat, atol=1e-6, rtol=1e-5, equal_nan=True)


# Unsupported calls


def rows_of(mask, lse, *, of=torch.float32, times=1):
    query = torch.zeros(2, 4, 3, 8)
    with captured_lse(query, mask) as rows:
        function = rows.wrap(lambda q: (q, lse))
        for _ in range(times):
            function(torch.zeros(1, dtype=of))
    return rows.read()


def test_only_what_is_known_is_taken():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    dense, packed = torch.randn(2, 4, 3), torch.randn(4, 5)
    assert torch.equal(rows_of(None, dense), dense)
    found = rows_of(mask, packed)
    assert torch.equal(found[0, :, 1:], packed[:, :2])
    assert torch.equal(found[1], packed[:, 2:])
    assert rows_of(None, dense, of=torch.bfloat16) is None  # of queries that were rounded
    assert rows_of(None, dense.double()) is None
    assert rows_of(None, packed) is None  # several sequences in one row
    assert rows_of(mask, torch.randn(2, 4, 3)) is None  # the layout before 2.6
    assert rows_of(None, dense, times=2) is None


def test_other_threads_are_not_asked():
    before = flash.lazy_import_flash_attention
    functions = []
    with pytest.MonkeyPatch.context() as patched:
        dense = lambda q, return_attn_probs=False: return_attn_probs  # noqa: E731
        patched.setattr(flash, "lazy_import_flash_attention", lambda name: ((dense, dense, "more"), "process"))
        with captured_lse(torch.zeros(1, 1, 1, 1), None):
            for run in (lambda target: target(), lambda target: _in_a_thread(target)):
                run(lambda: functions.append(flash.lazy_import_flash_attention("flash_attention_2")))
    ((asked, _, more), process), ((plain, _, _), _) = functions
    assert asked(torch.zeros(1)) is True
    assert plain is dense
    assert (more, process) == ("more", "process")
    assert flash.lazy_import_flash_attention is before


def _in_a_thread(target):
    thread = threading.Thread(target=target)
    thread.start()
    thread.join()


def test_an_error_puts_everything_back(sdpa, one):
    before = flash.lazy_import_flash_attention
    with flash_kernels.installed(sdpa, "flash_attention_2"), drop_tokens(sdpa, MustDropConfig(**BUDGETS)):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(flash, "_flash_fn", _fails)
            with pytest.raises(RuntimeError, match="out of memory"):
                sdpa.generate(**one, max_new_tokens=1, do_sample=False)
        assert flash.lazy_import_flash_attention is before
        sdpa.generate(**one, max_new_tokens=1, do_sample=False)


def _fails(*args, **kwargs):
    raise RuntimeError("out of memory")
