# SPDX-License-Identifier: Apache-2.0
"""Arguments of ``generate`` and ``forward``: caches, logits_to_keep, labels, embeddings; images at the end; presets."""

from __future__ import annotations

import copy
import json

import pytest
import tiny_models
import torch
from masked_reference import MaskedReference
from test_families import (
    BUDGETS,
    FAMILIES,
    FEATURES,
    NEW_TOKENS,
    ONE,
    PLAIN,
    THRESHOLDS,
    assert_keep_all_changes_nothing,
    assert_same_bits,
    cache_of,
    generate,
    inputs_of,
    model_of,
)
from tiny_models import IMAGE, VIDEO
from transformers import DynamicCache, GenerationConfig

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.transformers import DropCache, drop_tokens

CONFIGS = {
    "thresholds": MustDropConfig(**PLAIN, **THRESHOLDS),
    "budgets": MustDropConfig(**PLAIN, **BUDGETS),
    "features": MustDropConfig(**{**PLAIN, **BUDGETS, **FEATURES}),
    "keep-all": MustDropConfig.preset("keep-all", pruning_layers=(1, 3)),
}
NAMES = ("llava", "llava_next", "qwen2_5_vl", "internvl")
BATCH = None
LAST = [[3, ("picture", 0), 8], [9, ("picture", 1)], [6]]
"""The second sequence ends with its image."""


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


# Caches


@pytest.mark.parametrize("where", ["argument", "model", "generation_config"])
def test_a_dynamic_cache_by_name(where, config):
    model, inputs = copy.deepcopy(model_of("llava")), inputs_of("llava", ONE)
    with drop_tokens(model, config):
        expected = generate(model, inputs)
    settings = {}
    if where == "argument":
        settings["cache_implementation"] = "dynamic"
    elif where == "model":
        model.generation_config.cache_implementation = "dynamic"
    else:
        settings["generation_config"] = copy.deepcopy(model.generation_config)
        settings["generation_config"].cache_implementation = "dynamic"
    with drop_tokens(model, config):
        assert_same_bits(generate(model, inputs, **settings), expected)
    if where == "model":
        assert model.generation_config.cache_implementation == "dynamic"


@pytest.mark.parametrize("rows", [ONE, BATCH], ids=["one", "padded"])
@pytest.mark.parametrize("made", ["empty", "with the model's config"])
def test_an_empty_cache_of_the_caller(made, rows, config):
    """It is filled, as without dropping, and goes on."""
    model, inputs = model_of("llava"), inputs_of("llava", rows)
    own = lambda: DynamicCache(**({} if made == "empty" else {"config": model.config.text_config}))  # noqa: E731
    caches = [own(), own()]
    with drop_tokens(model, config), torch.no_grad():
        expected, direct = generate(model, inputs), model(**inputs)
        assert_same_bits(generate(model, inputs, past_key_values=caches[0]), expected)
        output = model(**inputs, past_key_values=caches[1])
        assert torch.equal(output.logits, direct.logits)
        assert cache_of(output) is caches[1]
        token = output.logits[:, -1:].argmax(-1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
        place = (mask.cumsum(1) - 1)[:, -1:]
        step = {"input_ids": token, "attention_mask": mask, "position_ids": place}
        ours, theirs = (model(**step, past_key_values=cache).logits for cache in (caches[1], cache_of(direct)))
        assert torch.equal(ours, theirs)
    assert caches[0].get_seq_length() == expected.sequences.shape[1] - 1
    assert isinstance(caches[0], DropCache)


@pytest.mark.skipif(tiny_models.tf.__version__ < "5", reason="generate() of transformers 4 ignores such images")
@pytest.mark.parametrize("name", NAMES)
def test_a_cache_that_holds_text(name, config):
    """A system prompt that was read before, plainly; the image's prompt follows."""
    model = model_of(name)
    inputs = inputs_of(name, [[3, 9, ("picture", 1), 8]])
    text = 7
    cache = DynamicCache(config=model.config.get_text_config())
    opening = {key: inputs[key][:, :text] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        model(**opening, past_key_values=cache)
    plain_cache = copy.deepcopy(cache)
    if config is CONFIGS["keep-all"]:
        plain = generate(model, inputs, past_key_values=plain_cache)
        with drop_tokens(model, config):
            assert_same_bits(generate(model, inputs, past_key_values=cache), plain)
    else:
        with drop_tokens(model, config) as report:
            output = generate(model, inputs, past_key_values=cache)
            expected = generate(model, inputs)
        assert torch.equal(output.sequences, expected.sequences)
        for ours, whole in zip(output.logits, expected.logits, strict=True):
            torch.testing.assert_close(ours, whole, atol=1e-4, rtol=0)
        assert report.prompts[0].images[0].kept == report.prompts[1].images[0].kept
        assert report.prompts[0].final_cache.lengths == report.prompts[1].final_cache.lengths


def test_positions_behind_a_cache_are_counted_on():
    """model(**inputs) without position_ids: the model counts from the cache's length, and so do the tokens left."""
    model, inputs = model_of("llava"), inputs_of("llava", [[12, ("picture", 1), 8]])
    rest = {**inputs, "input_ids": inputs["input_ids"][:, 5:]}
    with drop_tokens(model, CONFIGS["budgets"]), torch.no_grad():
        expected = model(**inputs).logits[:, -1]
        cache = DynamicCache()
        model(input_ids=inputs["input_ids"][:, :5], past_key_values=cache)
        torch.testing.assert_close(model(**rest, past_key_values=cache).logits[:, -1], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in NAMES),
        ("llava", {"num_beams": 2}),
        ("llava", {"num_return_sequences": 2, "num_beams": 2}),
    ],
    ids=str,
)
def test_without_a_cache(name, settings, config):
    """Each step reads the prompt and what was generated: the same tokens, and one prompt in the report."""
    model, inputs = model_of(name), inputs_of(name, [[3, ("picture", 1), 8], [9]])
    banned = {"suppress_tokens": [IMAGE, VIDEO]}  # the model counts a generated placeholder as one of the prompt
    if config is CONFIGS["keep-all"]:
        plain = generate(model, inputs, use_cache=False, **banned, **settings)
        with drop_tokens(model, config):
            assert_same_bits(generate(model, inputs, use_cache=False, **banned, **settings), plain)
        return
    with drop_tokens(model, config) as report:
        expected = generate(model, inputs, **banned, **settings)
        output = generate(model, inputs, use_cache=False, **banned, **settings)
    assert torch.equal(output.sequences, expected.sequences)
    for ours, cached in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, cached, atol=1e-4, rtol=0)
    assert cache_of(output) is None
    assert len(report.prompts) == 2
    assert report.prompts[1].images[0].kept == report.prompts[0].images[0].kept


# Rows of the output


def call(model, inputs, config, **settings):
    with drop_tokens(model, config) as report, torch.no_grad():
        return model(**inputs, **settings), report.last


def wanted(length):
    """Values of logits_to_keep, and the positions that they name."""
    place = torch.arange(length)
    for keep in (1, 3, torch.tensor([length - 1, length - 3]), torch.tensor([-2, -1])):
        yield keep, place[keep] if isinstance(keep, torch.Tensor) else place[-keep:]


@pytest.mark.parametrize(("name", "rows"), [*((name, BATCH) for name in NAMES), ("llava", ONE)])
def test_logits_to_keep_counts_positions_of_the_prompt(name, rows, config):
    model, inputs = model_of(name), inputs_of(name, rows)
    whole, last = call(model, inputs, config)
    assert last.rows.shape == inputs["input_ids"].shape
    for keep, places in wanted(inputs["input_ids"].shape[1]):
        output, again = call(model, inputs, config, logits_to_keep=keep)
        sequence = torch.arange(len(last.rows))[:, None]
        expected = whole.logits[sequence, last.rows[:, places]]
        torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=0)
        assert torch.equal(again.rows, last.rows)
    if config is CONFIGS["keep-all"]:
        assert torch.equal(last.rows, torch.arange(last.length).expand_as(last.rows))
        with torch.no_grad():
            for keep in (5, 20, torch.tensor([0, 7])):
                plain = model(**inputs, logits_to_keep=keep).logits
                assert torch.equal(call(model, inputs, config, logits_to_keep=keep)[0].logits, plain)


def test_logits_to_keep_of_more_positions_than_rows_are_left(config):
    """Positions that the mask hides count, and have no row."""
    model, inputs = model_of("llava"), inputs_of("llava", [[3, ("picture", 0), ("picture", 1), 2]])
    inputs["attention_mask"][:, -38:-2] = 0  # the second image
    whole, _ = call(model, inputs, config)
    logits = call(model, inputs, config, logits_to_keep=38)[0].logits
    assert logits.shape[1] == 38
    torch.testing.assert_close(logits[:, -2:], whole.logits[:, -2:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_rows_map_positions(name, config):
    """Text has its row, in order; the rows of vision tokens are as many as were kept; the rest has none."""
    model, inputs = model_of(name), inputs_of(name)
    output, last = call(model, inputs, config)
    mask, ids = inputs["attention_mask"].bool(), inputs["input_ids"]
    vision = (ids == IMAGE) | (ids == VIDEO)
    for row, sequence in enumerate(last.rows):
        real = sequence[mask[row]]
        assert (sequence[mask[row] & ~vision[row]] >= 0).all()
        assert real[real >= 0].tolist() == sorted(real[real >= 0].tolist())
        assert sequence[-1] == output.logits.shape[1] - 1
        kept = sum(image.kept[3] for image in last.images if image.sequence == row)
        assert int((sequence[vision[row]] >= 0).sum()) == kept
    assert json.loads(json.dumps(last.to_dict()))["rows"] == last.rows.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_a_dropped_position_is_refused(name):
    model, inputs, config = model_of(name), inputs_of(name, ONE), CONFIGS["budgets"]
    _, last = call(model, inputs, config)
    gone = int((last.rows[0] < 0).nonzero()[0])
    length = inputs["input_ids"].shape[1]
    for keep in (length, torch.tensor([gone]), torch.tensor([[gone, -1]])):
        with pytest.raises(
            ValueError, match=rf"logits_to_keep: position {gone} of the prompt was dropped; report\.last\.rows"
        ):
            call(model, inputs, config, logits_to_keep=keep)


# Labels


@pytest.mark.parametrize(("name", "rows"), [*((name, BATCH) for name in NAMES), ("qwen2_5_vl", ONE)])
def test_labels_follow_the_rows(name, rows, config):
    """The loss is that of the rows left that a token precedes; vision rows carry none, and gradients reach weights."""
    model, inputs = copy.deepcopy(model_of(name)), inputs_of(name, rows)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with drop_tokens(model, config) as report:
        output = model(**inputs, labels=labels, use_cache=False)
        logits = model(**inputs, use_cache=False).logits
    assert torch.equal(output.logits, logits)
    if config is CONFIGS["keep-all"]:
        assert torch.equal(output.loss, model(**inputs, labels=labels).loss)
    else:
        left = torch.full(logits.shape[:2], -100)
        for row, sequence in enumerate(report.last.rows.tolist()):
            for position, place in enumerate(sequence):
                if place > 0 and place - 1 in sequence and inputs["input_ids"][row, position] not in (IMAGE, VIDEO):
                    left[row, place] = labels[row, position]
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), left[:, 1:].flatten())
        torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert torch.equal(labels, inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100))


# Embeddings


@pytest.mark.parametrize(
    ("name", "rows"), [("llava", ONE), ("llava", BATCH), ("llava_next", BATCH), ("internvl", BATCH)]
)
def test_embeddings(name, rows, config):
    """Beside the ids, or alone: the placeholders are found by their embedding, as the model itself finds them."""
    model, inputs = model_of(name), inputs_of(name, rows)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    alone = {key: value for key, value in inputs.items() if key != "input_ids"}
    with drop_tokens(model, config), torch.no_grad():
        expected, logits = generate(model, inputs), model(**inputs).logits
        assert_same_bits(generate(model, {**inputs, "inputs_embeds": embeds}), expected)
        assert torch.equal(model(**alone, inputs_embeds=embeds).logits, logits)
        output = generate(model, {**alone, "inputs_embeds": embeds})
    assert all(torch.equal(ours, want) for ours, want in zip(output.logits, expected.logits, strict=True))


# A prompt that ends with its image


@pytest.mark.parametrize("queries", ["after_image", "last"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_that_nothing_follows(name, queries):
    """Its sequence keeps its tokens, or its last token votes; the others are dropped as ever."""
    model = model_of(name)
    for rows in (LAST, [[9, ("picture", 1)]]) if name == "llava" else (LAST,):
        inputs = inputs_of(name, rows)
        if name == "qwen2_5_vl":  # its image ends with a token of its own, which is text
            inputs = {
                key: value[:, :-1] if value.shape == inputs["input_ids"].shape else value
                for key, value in inputs.items()
            }
            inputs["input_ids"] = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], tiny_models.PAD)
        assert_keep_all_changes_nothing(model, inputs)
        for settings in (PLAIN | THRESHOLDS, PLAIN | BUDGETS | FEATURES):
            config = MustDropConfig(**settings, text_queries=queries)
            with drop_tokens(model, config) as report:
                output = generate(model, inputs)
            reference = MaskedReference(model, config)
            reference.check(output, inputs, NEW_TOKENS)
            left = int((reference.alive[4] & reference.vision).sum())
            assert sum(image.kept[3] for image in report.last.images) == left
            images = [image for image in report.last.images if image.sequence == len(rows) // 2]
            if queries == "after_image":
                assert all(image.kept[3] >= image.tokens for image in images)
            elif "budgets" in settings:
                assert sum(image.kept[3] for image in images) <= 10 + sum(image.key_tokens for image in images)


# Nothing that plain generate() does is refused where nothing can be dropped.


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_implementation": "offloaded"},
        {"prefill_chunk_size": 16},
        {"use_cache": False},
        {"generation_config": GenerationConfig(max_new_tokens=3, do_sample=False, cache_implementation="offloaded")},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_keep_all_refuses_nothing(settings):
    model, inputs = model_of("llava"), inputs_of("llava", ONE)
    try:
        plain = generate(model, inputs, **copy.deepcopy(settings))
    except Exception as error:  # what plain generate() cannot do here
        with drop_tokens(model, CONFIGS["keep-all"]), pytest.raises(type(error)):
            generate(model, inputs, **copy.deepcopy(settings))
        return
    with drop_tokens(model, CONFIGS["keep-all"]):
        assert_same_bits(generate(model, inputs, **copy.deepcopy(settings)), plain)


class OtherCache(DynamicCache):
    """A cache of a kind that this package does not know, such as a quantized one."""


@pytest.mark.parametrize("rows", [ONE, BATCH], ids=["one", "padded"])
def test_keep_all_takes_any_cache(rows):
    model, inputs = model_of("llava"), inputs_of("llava", rows)
    plain = generate(model, inputs, past_key_values=OtherCache())
    with torch.no_grad():
        logits = model(**inputs, past_key_values=OtherCache()).logits
        with drop_tokens(model, CONFIGS["keep-all"]):
            assert_same_bits(generate(model, inputs, past_key_values=OtherCache()), plain)
            kept = model(**inputs, past_key_values=OtherCache(), logits_to_keep=2).logits
            assert torch.equal(model(**inputs, past_key_values=OtherCache()).logits, logits)
    torch.testing.assert_close(kept, logits[:, -2:], atol=1e-5, rtol=0)
    with (
        drop_tokens(model, CONFIGS["budgets"]),
        pytest.raises(TypeError, match=r"is a OtherCache.*pass a DynamicCache"),
    ):
        generate(model, inputs, past_key_values=OtherCache())


def test_keep_all_with_features_that_were_computed_before():
    if tiny_models.tf.__version__ < "5":
        pytest.skip("transformers 4 takes no encoder outputs")
    model, inputs = model_of("llava"), inputs_of("llava", ONE)
    pixels = inputs.pop("pixel_values")
    with torch.no_grad():
        features = lambda: {"image": model.model.get_image_features(pixel_values=pixels, return_dict=True)}  # noqa: E731
        plain = model(**inputs, mm_encoder_outputs=features()).logits
        given, again = features(), features()
        with drop_tokens(model, CONFIGS["keep-all"]):
            assert torch.equal(model(**inputs, mm_encoder_outputs=given).logits, plain)
            last = model(**inputs, mm_encoder_outputs=again, logits_to_keep=2).logits
        with drop_tokens(model, CONFIGS["budgets"]), pytest.raises(ValueError, match="pass pixel_values"):
            model(**inputs, mm_encoder_outputs=given)
    torch.testing.assert_close(last, plain[:, -2:], atol=1e-5, rtol=0)


# Presets on any grid


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("preset", ["budget-192", "budget-64"])
def test_presets_merge_a_share_of_the_windows(preset, name):
    """Of whole windows, whatever the grid; what the grid cuts off does not merge."""
    model, inputs = model_of(name), inputs_of(name, ONE)
    for window in ((3, 3), (2, 2), (4, 5)):
        config = MustDropConfig.preset(preset, merge_at="features", window=window, key_rate=0.0).for_depth(6)
        with drop_tokens(model, config) as report:
            output = generate(model, inputs)
        if window == (2, 2):
            MaskedReference(model, config).check(output, inputs, NEW_TOKENS)
        for image in report.last.images:
            for number in range(len(image.views)):
                view = image.view(number)
                height, width = view.grid[-2:]
                whole = (height // window[0]) * (width // window[1])
                assert len(view.windows) == round(config.merge_budget * whole)


@pytest.mark.parametrize(
    ("budget", "window"),
    [(0, (4, 4)), (1, (5, 2)), (0.5, (5, 2)), (1.0, (2, 5)), (100, (4, 4)), (0.7, (3, 7)), (3, (7, 7))],
)
def test_windows_that_the_grid_cuts_do_not_merge(budget, window):
    """Inside the tower, where the tokens of the rest follow those of the whole windows."""
    model, inputs = model_of("llava"), inputs_of("llava")
    config = MustDropConfig(**{**PLAIN, **BUDGETS, "merge": True, "window": window, "merge_budget": budget})
    with drop_tokens(model, config) as report:
        output = generate(model, inputs)
    MaskedReference(model, config).check(output, inputs, NEW_TOKENS)
    whole = (6 // window[0]) * (6 // window[1])
    merged = round(budget * whole) if isinstance(budget, float) else min(budget, whole)
    assert [len(image.windows) for image in report.last.images] == [merged] * len(report.last.images)
    assert config.merged_windows(whole) == merged
