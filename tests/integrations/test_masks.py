# SPDX-License-Identifier: Apache-2.0
"""``attention_mask``: vision tokens that it hides are padding, and a mask of 4 dimensions keeps its structure."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from masked_reference import MaskedReference
from test_families import (
    BUDGETS,
    FAMILIES,
    NEW_TOKENS,
    ONE,
    PLAIN,
    THRESHOLDS,
    assert_keep_all_changes_nothing,
    assert_same_bits,
    cache_of,
    configs,
    generate,
    inputs_of,
    model_of,
)
from test_static import own_cache
from tiny_models import IMAGE, VIDEO
from torch.nn.attention.flex_attention import create_block_mask

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.transformers import drop_tokens

KEEP_ALL = MustDropConfig.preset("keep-all", pruning_layers=(1, 3))
STATIC = {"cache_implementation": "static"}


def images_of(inputs):
    """(B, L) bool: the placeholders."""
    return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)


def runs(row):
    """Slices of the runs of true values, the images of a sequence."""
    places = row.nonzero().flatten().tolist()
    begins = [place for place in places if place - 1 not in places]
    return [slice(begin, next(end for end in range(begin, len(row) + 1) if end not in places)) for begin in begins]


def hide(name, rows, what):
    """The inputs with some placeholders hidden by the mask."""
    inputs = inputs_of(name, rows)
    if name == "qwen2_5_vl" and tiny_models.tf.__version__ < "5":
        pytest.skip("plain generation of Qwen2.5-VL in transformers 4 fails with hidden placeholders")
    if name == "qwen2_5_vl":  # computes no positions where placeholders are hidden
        names = ("image_grid_thw", "video_grid_thw", "mm_token_type_ids", "input_ids", "attention_mask")
        sizes = {key: inputs[key] for key in names if key in inputs}
        inputs["position_ids"], model_of(name).model.rope_deltas = model_of(name).model.get_rope_index(**sizes)
    images, mask = images_of(inputs), inputs["attention_mask"].clone()
    for number, row in enumerate(images):
        places = row.nonzero().flatten()
        if what == "some":
            mask[number, places[number % 3 :: 3]] = 0
        elif what == "first halves":
            for run in runs(row):
                mask[number, run.start : (run.start + run.stop) // 2] = 0
        elif what == "last images" and len(places):
            mask[number, runs(row)[-1]] = 0
        elif what == "all of one sequence" and number == 0:
            mask[number, places] = 0
    return {**inputs, "attention_mask": mask}


HIDDEN = ("some", "first halves", "last images", "all of one sequence")


@pytest.mark.parametrize("what", HIDDEN)
@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_vision_tokens_are_padding(name, what):
    """In batches of mixed requests, with every kind of merging, in every family."""
    model, inputs = model_of(name), hide(name, None, what)
    assert_keep_all_changes_nothing(model, inputs)
    placeholders = images_of(inputs)
    shown = placeholders & inputs["attention_mask"].bool()
    for kind, settings in configs(name).items():
        config = MustDropConfig(**settings)
        with drop_tokens(model, config) as report:
            output = generate(model, inputs)
        reference = MaskedReference(model, config)
        reference.check(output, inputs, NEW_TOKENS)
        last, images = report.last, report.last.images
        assert last.text == (inputs["attention_mask"].sum(1) - shown.sum(1)).tolist(), kind
        assert sum(image.hidden for image in images) == int((placeholders & ~shown).sum())
        assert sum(image.tokens for image in images) == int(reference.vision.sum())
        assert sum(image.key_tokens for image in images) == int(reference.key.sum())
        for layer in config.pruning_layers:
            left = int((reference.alive[layer + 1] & reference.vision).sum())
            assert sum(image.kept[layer] for image in images) == left


@pytest.mark.parametrize("cache", [{}, STATIC, {"use_cache": False}], ids=["dynamic", "static", "no cache"])
@pytest.mark.parametrize("what", ["some", "all of one sequence"])
@pytest.mark.parametrize("budget", ["all", "half"])
def test_budgets_count_visible_tokens(budget, what, cache):
    """A budget of all visible tokens gives the plain result; half of them the masked reference's."""
    model = model_of("llava")
    inputs = hide("llava", ONE, what)
    count = int((images_of(inputs) & inputs["attention_mask"].bool()).sum())
    count = count if budget == "all" else count // 2
    config = MustDropConfig(**{**PLAIN, "key_rate": 0.0}, budgets=(count, count))
    with drop_tokens(model, config) as report:
        output = generate(model, inputs, **cache)
    assert sum(image.kept[3] for image in report.last.images) == count
    if budget == "all" and cache != {"use_cache": False}:
        assert_same_bits(output, generate(model, inputs, **cache))
    MaskedReference(model, config).check(output, inputs, NEW_TOKENS)


def test_a_hidden_image_is_as_if_it_were_not_there():
    """The text between it and the image before it scores that image; the report counts it nowhere."""
    model = model_of("llava")
    inputs = inputs_of("llava", [[3, ("picture", 0), 5, ("picture", 1), 4]])
    images = runs(images_of(inputs)[0])
    inputs["attention_mask"][0, images[1]] = 0
    alone = {name: torch.cat([inputs[name][:, : images[1].start], inputs[name][:, images[1].stop :]], 1)
             for name in ("input_ids", "attention_mask")}  # fmt: skip
    place = torch.arange(inputs["input_ids"].shape[1])[inputs["attention_mask"][0] == 1][None]
    config = MustDropConfig(**PLAIN, **THRESHOLDS)
    with drop_tokens(model, config) as report, torch.no_grad():
        hidden = model(**inputs)
        without = model(**alone, pixel_values=inputs["pixel_values"][:1], position_ids=place)
    first, second = report.prompts
    torch.testing.assert_close(hidden.logits[:, -1], without.logits[:, -1], atol=1e-4, rtol=0)
    assert [image.kept for image in first.images] == [second.images[0].kept, {1: 0, 3: 0}]
    assert [image.hidden for image in first.images] == [0, 36]
    assert first.mean_tokens == second.mean_tokens
    assert first.text == second.text


# Later turns


def next_turn(first, inputs, more):
    """A turn whose mask hides every second placeholder of the first one."""
    images, ids = images_of(inputs), torch.cat([first.sequences, more["input_ids"]], 1)
    mask = torch.ones_like(ids)
    mask[:, : images.shape[1]] = inputs["attention_mask"]
    mask[:, : images.shape[1]][images] = torch.arange(int(images.sum())) % 2
    return {**more, "input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["thresholds", "budgets", "no eviction", "keep-all"])
@pytest.mark.parametrize("rows", [ONE, [[3, ("picture", 0), 8], [9, ("picture", 1), 4]]], ids=["one", "padded"])
def test_a_later_turn_hides_tokens_of_an_earlier_one(rows, kind, cache):
    model, inputs = model_of("llava"), inputs_of("llava", rows)
    settings = BUDGETS if kind == "budgets" else THRESHOLDS
    config = MustDropConfig(**PLAIN, **settings, evict=kind != "no eviction")
    config = KEEP_ALL if kind == "keep-all" else config
    own = {"past_key_values": own_cache(model)} if cache == "static" else {}
    with drop_tokens(model, config):
        first = generate(model, inputs, **own)
        turn = next_turn(first, inputs, {"input_ids": torch.tensor([[40, 41, 42]] * len(rows))})
        second = generate(model, turn, past_key_values=cache_of(first))
    reference = MaskedReference(model, config)
    reference.check(first, inputs, NEW_TOKENS)
    reference.check(second, turn, NEW_TOKENS)


@pytest.mark.skipif(tiny_models.tf.__version__ < "5", reason="generate() of transformers 4 ignores such images")
@pytest.mark.parametrize("kind", ["thresholds", "budgets"])
def test_a_later_turn_with_an_image_hides_tokens_of_an_earlier_one(kind):
    model, inputs = model_of("llava_next"), inputs_of("llava_next", ONE)
    config = MustDropConfig(**PLAIN, **(BUDGETS if kind == "budgets" else THRESHOLDS))
    with drop_tokens(model, config):
        first = generate(model, inputs)
        turn = next_turn(first, inputs, inputs_of("llava_next", [[2, ("picture", 0), 5]]))
        second = generate(model, turn, past_key_values=cache_of(first))
    reference = MaskedReference(model, config)
    reference.check(first, inputs, NEW_TOKENS)
    reference.check(second, turn, NEW_TOKENS)


# 4 dimensions


def causal(inputs):
    """(B, 1, L, L) bool, the same as the mask (B, L)."""
    length = inputs["input_ids"].shape[1]
    return torch.ones(length, length, dtype=torch.bool).tril() & inputs["attention_mask"].bool()[:, None, None, :]


def added(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def structures(inputs):
    """Masks that no mask (B, L) can say."""
    mask, images = causal(inputs), images_of(inputs)
    whole = mask.clone()
    for row, flags in enumerate(images):
        for run in runs(flags):
            whole[row, :, run, run] = True  # attention in both directions inside of an image
    yield "images in both directions", whole
    near = mask.clone()
    for row, flags in enumerate(images):
        for run in runs(flags):
            near[row, 0, run.stop + 2 : run.stop + 4, run.start : run.stop : 2] = False
    yield "text that does not attend to every patch", near
    late = mask.clone()
    for row, flags in enumerate(images):
        for run in runs(flags):
            late[row, 0, run.stop :, run.start : run.stop - 1 : 2] = False
    yield "patches that only other patches attend to", late
    place = torch.arange(mask.shape[2])
    yield "a window", mask & (place[:, None] - place < 20)
    tree = mask.clone()
    tree[:, :, -1, -3:-1] = False  # the last token and the two before it go on behind the same text
    yield "a tree", tree
    yield "a bias", added(mask) - 0.05 * (torch.arange(mask.shape[2])[:, None] - torch.arange(mask.shape[2])).abs()


def last_logits(model, inputs, config=None):
    if config is None:
        return model(**inputs).logits[:, -1]
    with drop_tokens(model, config):
        return model(**inputs).logits[:, -1]


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("form", ["bool", "added"])
@pytest.mark.parametrize("kind", ["thresholds", "budgets", "features"])
@torch.no_grad()
def test_a_mask_of_4_dimensions_that_says_the_same(kind, form, name):
    model, inputs = model_of(name), inputs_of(name)
    if kind == "budgets":
        inputs = hide(name, None, "some")
    settings = {**PLAIN, **BUDGETS} if kind == "budgets" else configs(name)[kind]
    config, mask = MustDropConfig(**settings), causal(inputs)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    given = {**inputs, "position_ids": positions if name != "qwen2_5_vl" else positions.expand(3, -1, -1)}
    four = {**given, "attention_mask": mask if form == "bool" else added(mask)}
    torch.testing.assert_close(last_logits(model, four, config), last_logits(model, given, config), atol=1e-4, rtol=0)
    assert torch.equal(last_logits(model, four, KEEP_ALL), last_logits(model, four))


@pytest.mark.parametrize("kind", ["thresholds", "budgets"])
@torch.no_grad()
def test_the_structure_of_a_mask_is_kept(kind):
    """Equal to a full-length pass whose dropped tokens are masked; decisions by the attention under that mask."""
    model, inputs = model_of("llava"), inputs_of("llava")
    settings = {**PLAIN, **(BUDGETS if kind == "budgets" else THRESHOLDS)}
    config = MustDropConfig(**settings)
    for label, mask in structures(inputs):
        four = {**inputs, "attention_mask": mask}
        reference = MaskedReference(model, config)
        expected = reference.read(inputs, mask)[:, -1]
        with drop_tokens(model, config) as report:
            logits = model(**four).logits[:, -1]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0, msg=label)
        kept = sum(image.kept[3] for image in report.last.images)
        assert kept == int((reference.alive[4] & reference.vision).sum()), label
        assert kept < int(reference.vision.sum())
        assert (logits - last_logits(model, inputs, config)).abs().max() > 1e-3, label  # the structure matters
        assert torch.equal(last_logits(model, four, KEEP_ALL), last_logits(model, four)), label


@torch.no_grad()
def test_documents_in_one_sequence():
    """Text that the last query does not reach stays as it is; an image that no text query reaches is refused."""
    model, config = model_of("llava"), MustDropConfig(**PLAIN, **BUDGETS)
    one, text = inputs_of("llava", ONE), torch.tensor([[14, 15, 16, 17]])
    length = one["input_ids"].shape[1]
    for parts in ([text, one["input_ids"]], [one["input_ids"], text]):
        sizes = [part.shape[1] for part in parts]
        mask = torch.block_diag(*[torch.ones(size, size).tril() for size in sizes]).bool()[None, None]
        place = torch.cat([torch.arange(size) for size in sizes])[None]
        given = {**one, "input_ids": torch.cat(parts, 1), "attention_mask": mask, "position_ids": place}
        with drop_tokens(model, config) as report:
            alone = model(**one).logits[0]
            both = model(**given).logits[0]
        first, second = report.prompts
        assert second.text == [first.text[0] + text.shape[1]]
        assert [image.kept for image in second.images] == [image.kept for image in first.images]
        of_text, of_image = second.rows[0].split(sizes)[:: 1 if parts[0] is text else -1]
        torch.testing.assert_close(both[of_text], model(text).logits[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(both[of_image[of_image >= 0]], alone, atol=1e-4, rtol=0)

    ids, mask = torch.cat([one["input_ids"]] * 2, 1), torch.block_diag(*[torch.ones(length, length).tril()] * 2)
    pictures = torch.cat([one["pixel_values"]] * 2)
    given = {"input_ids": ids, "attention_mask": mask.bool()[None, None], "pixel_values": pictures}
    with pytest.raises(ValueError, match="give each document a sequence of the batch"), drop_tokens(model, config):
        model(**given)
    assert torch.equal(last_logits(model, given, KEEP_ALL), last_logits(model, given))


@torch.no_grad()
def test_a_window_behind_a_cache_that_holds_text():
    """Cached tokens that no new query attends to are real in the next turn."""
    model, config = model_of("llava"), MustDropConfig(**PLAIN, **BUDGETS)
    inputs = inputs_of("llava", [[12, ("picture", 1), 8]])
    ids, seen = inputs["input_ids"], 10
    place = torch.arange(ids.shape[1])
    mask = ((place[:, None] >= place) & (place[:, None] - place < 8))[None, None]
    turn = torch.tensor([[9, 8]])
    whole = {"attention_mask": torch.ones(1, ids.shape[1] + 2, dtype=torch.long)}
    reference = MaskedReference(model, config)
    reference.read(inputs, mask)
    expected = reference.read({**whole, "input_ids": torch.cat([ids, turn], 1)})
    with drop_tokens(model, config):
        cache = model(input_ids=ids[:, :seen], attention_mask=mask[:, :, :seen, :seen]).past_key_values
        given = {**inputs, "input_ids": ids[:, seen:], "attention_mask": mask[:, :, seen:]}
        model(**given, past_key_values=cache)
        logits = model(input_ids=turn, past_key_values=cache, **whole).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_heat_maps_under_a_mask():
    """They show the attention under it."""
    model, inputs = model_of("llava"), inputs_of("llava", ONE)
    mask, (image,) = causal(inputs), runs(images_of(inputs)[0])
    mask[0, 0, image.stop :, image.start + 5] = False
    with drop_tokens(model, MustDropConfig(**PLAIN, **BUDGETS), heat_maps=True) as report:
        model(**{**inputs, "attention_mask": mask})
    heat = report.last.images[0].heat[1].flatten()
    assert heat[5] == 0
    assert (heat > 0).sum() == 35


@torch.no_grad()
def test_masks_of_which_no_part_can_be_taken():
    model, inputs = model_of("llava"), inputs_of("llava", ONE)
    config = MustDropConfig(**PLAIN, **BUDGETS)
    with drop_tokens(model, config):
        with pytest.raises(ValueError, match=r"attention_mask must have the shape \(1, 1 or heads, 48, 48\)"):
            model(**{**inputs, "attention_mask": torch.ones(1, 1, 48, 40, dtype=torch.bool)})
        cache = generate(model, inputs, max_new_tokens=1)
        cache = getattr(cache, "cache", None) or cache.past_key_values
        with pytest.raises(ValueError, match=r"attention_mask must be \(B, 49\)"):
            model(input_ids=torch.tensor([[9]]), past_key_values=cache, attention_mask=torch.ones(1, 1, 1, 49).bool())
        mask = torch.ones(1, 1, 48, 96, dtype=torch.bool)
        with pytest.raises(ValueError, match="behind a cache that drop_tokens has shortened"):
            model(**{**inputs, "attention_mask": mask}, past_key_values=cache)


@torch.no_grad()
def test_masks_of_flex_attention():
    """They are refused where tokens are dropped, since no part of one can be taken."""
    model, inputs = copy.deepcopy(model_of("llava")), inputs_of("llava", ONE)
    model.set_attn_implementation({"text_config": "flex_attention"})
    length = inputs["input_ids"].shape[1]
    mask = create_block_mask(lambda b, h, q, k: q >= k, 1, None, length, length, device="cpu")
    given = {**inputs, "attention_mask": mask}
    plain = last_logits(model, given)  # compiled by transformers, unlike a prompt inside drop_tokens
    torch.testing.assert_close(last_logits(model, given, KEEP_ALL), plain, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"is a BlockMask .* pass a mask \(B, L\), or a bool or float mask"):
        last_logits(model, given, MustDropConfig(**PLAIN, **BUDGETS))
