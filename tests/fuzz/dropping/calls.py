# SPDX-License-Identifier: Apache-2.0
"""The turns of a case, inside drop_tokens or with the plain model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from attached import everything_attached
from tiny_models import IMAGE, VIDEO
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache

from mustdrop_kernels.integrations.transformers import drop_tokens
from mustdrop_kernels.integrations.transformers.compat import CACHE

from ..inputs import Case, dtype_of
from .inputs import OTHER, Inputs, batch, config_of, has_pictures, model_of

Turns = list[Tensor]
"""For each turn the tensors of TURN."""
SETTINGS: Inputs = {
    "do_sample": False,
    "output_scores": True,  # for the scores of beams
    "suppress_tokens": [IMAGE, VIDEO],  # a generated placeholder has no picture
}
OUTPUT: Inputs = {"output_logits": True, "return_dict_in_generate": True}
TURN = ("sequences", "logits", "score", "rows", "text", "images")
"""Tensors of a turn: tokens, logits, the loss or the scores of the beams, and the report."""
NONE = torch.zeros(0)
"""A tensor that a turn does not have."""


class _Ask(LogitsProcessor):
    """Calls the model on another prompt in each step of a generate()."""

    def __init__(self, model: Any, inputs: Inputs) -> None:
        self.model, self.inputs, self.answers = model, inputs, []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        with torch.no_grad():
            self.answers.append(self.model(**self.inputs).logits)
        return scores


def generate_settings(case: Case) -> Inputs:
    """The settings that the reference also takes."""
    found = {**SETTINGS, "max_new_tokens": case["tokens"], **({"temperature": 2.0} if case.get("sample") else {})}
    names = {"sample": "do_sample", "beams": "num_beams", "returns": "num_return_sequences"}
    return found | {name: case[key] for key, name in names.items() if key in case}


def copies(case: Case) -> int:
    """Sequences that generate() makes of each of the batch."""
    return max(case.get("beams", 1), case.get("returns", 1))


def _places(mask: Tensor, first: Inputs, call: str) -> Tensor:
    """position_ids of the whole prompt, as the model counts them."""
    if "position_ids" in first:
        return first["position_ids"]
    return (mask.cumsum(1) - 1).clamp(min=0) if call == "generate" else torch.arange(mask.shape[1]).expand_as(mask)


def text_before(case: Case, first: Inputs) -> int:
    """Tokens before the first picture of the batch, which a cache can hold; the last token is never cached."""
    ids = first["input_ids"]
    vision = ((ids == IMAGE) | (ids == VIDEO)).any(0)
    return min(int(vision.int().argmax()) if vision.any() else ids.shape[1], ids.shape[1] - 1)


def _cache(case: Case, model: Any, first: Inputs) -> Inputs:
    """The settings of the first turn's cache."""
    kind, config = case["cache"], model.config.get_text_config()
    if kind in ("dynamic", "static"):
        return {"cache_implementation": kind}
    if kind == "empty":
        return {CACHE: DynamicCache()}
    if kind == "StaticCache":
        return {CACHE: StaticCache(config=config, max_cache_len=600)}
    if kind == "text":
        count, mask = text_before(case, first), first["attention_mask"]
        places = _places(mask, first, case["call"])[..., :count]
        opening = {"input_ids": first["input_ids"][:, :count], "attention_mask": mask[:, :count]}
        if "dense" in first:
            opening["attention_mask"] = first["dense"][:, :, :count, :count]
        cache = DynamicCache(config=config)
        with torch.no_grad():
            model(**opening, position_ids=places, **{CACHE: cache})
        return {CACHE: cache}
    return {"use_cache": False} if kind == "no" else {}


def _cache_of(output: Any) -> Any:
    return getattr(output, "cache", None) or output.past_key_values


def run(case: Case, first: Inputs, second: Inputs, around: Callable[[], Any]) -> Turns:
    """The turns of a case in a context, or in a context each."""
    model = model_of(case)
    first, settings = dict(first), _cache(case, model, first)
    model.model.rope_deltas = first.pop("rope_deltas", None)
    _forget_sizes(model)
    begin, go_on = (_generate, _generate_on) if case["call"] == "generate" else (_forward, _forward_on)
    with torch.no_grad(), contextlib.ExitStack() as stack:
        prompts = getattr(stack.enter_context(around()), "prompts", [])
        output, found = begin(case, model, first, settings, prompts)
        if "turn" in case:
            if case["contexts"] == 2:
                stack.close()
                prompts = getattr(stack.enter_context(around()), "prompts", [])
            found += go_on(case, model, first, second, output, prompts)
    return found


def _given(case: Case, first: Inputs) -> Inputs:
    """The inputs with the mask in the form of the case."""
    mask = first["attention_mask"]
    if case["mask"]["type"] != "none":
        return {**first, "attention_mask": mask.to(dtype_of(case["mask"]["type"]))}
    return {key: value for key, value in first.items() if key != "attention_mask" or not mask.all()}


def _generate(case: Case, model: Any, first: Inputs, options: Inputs, prompts: list[Any]) -> tuple[Any, Turns]:
    given, ask, asked = _given(case, first), None, 0
    if case.get("embeds"):
        given["inputs_embeds"] = model.get_input_embeddings()(first["input_ids"])
        if case["embeds"] == "alone":
            del given["input_ids"]
    if case.get("lookup"):
        options["prompt_lookup_num_tokens"] = case["lookup"]
    if case.get("nested"):
        ask, asked = _Ask(model, batch(model, case["family"], OTHER)), case["tokens"]
        options["logits_processor"] = LogitsProcessorList([ask])
        alone = model(**ask.inputs).logits
        prompts.clear()
    options |= {**generate_settings(case), **OUTPUT}
    torch.manual_seed(0)
    output = model.generate(**given, **options)
    if ask is not None:
        assert len(ask.answers) == asked, f"{len(ask.answers)} calls inside of generate()"
        assert all(same_bits(answer, alone) for answer in ask.answers), "a call inside of generate() gave other logits"
    found = _turn(output, torch.stack(output.logits, 1), output.get("sequences_scores"))
    return output, found + _reported(prompts, has_pictures(case["rows"]), asked)


def _generate_on(case: Case, model: Any, first: Inputs, second: Inputs, before: Any, prompts: list[Any]) -> Turns:
    options = {CACHE: _cache_of(before), **generate_settings(case), **OUTPUT}
    torch.manual_seed(0)
    output = model.generate(**next_turn(first, second, before.sequences), **options)
    return _turn(output, torch.stack(output.logits, 1), None) + _reported(prompts, has_pictures(case["turn"]))


def next_turn(first: Inputs, second: Inputs, sequences: Tensor) -> Inputs:
    """The inputs of the second turn, with all tokens before it."""
    mask = first["attention_mask"]
    generated = torch.ones(len(mask), sequences.shape[1] - mask.shape[1], dtype=mask.dtype)
    return {
        **second,
        "input_ids": torch.cat([sequences, second["input_ids"]], 1),
        "attention_mask": torch.cat([mask, generated, second["attention_mask"]], 1),
    }


def _forward(case: Case, model: Any, first: Inputs, options: Inputs, prompts: list[Any]) -> tuple[Any, Turns]:
    given, seen = _given(case, first), text_before(case, first) if case["cache"] == "text" else 0
    dense = given.pop("dense", None)
    if dense is not None:
        given["attention_mask"] = dense[:, :, seen:]
    if seen:
        given["position_ids"] = _places(first["attention_mask"], first, "forward")[..., seen:]
        for key in ("input_ids", "labels", "mm_token_type_ids"):
            if key in given:
                given[key] = given[key][:, seen:]
    if case["embeds"]:
        given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids"))
    rows = case["rows_of_logits"]
    if rows not in ("all", "labels"):
        options["logits_to_keep"] = torch.tensor(rows_of_logits(case)) if isinstance(rows, list) else rows
    output = model(**given, **options)
    return output, _turn(None, output.logits, output.get("loss")) + _reported(prompts, has_pictures(case["rows"]))


def _forward_on(case: Case, model: Any, first: Inputs, second: Inputs, before: Any, prompts: list[Any]) -> Turns:
    turn, new = next_turn(first, second, first["input_ids"]), second["input_ids"].shape[1]
    turn |= {"input_ids": second["input_ids"], "position_ids": turn_places(turn, new, case)}
    output = model(**turn, **{CACHE: _cache_of(before)})
    return _turn(None, output.logits, None) + _reported(prompts, has_pictures(case["turn"]))


def rows_of_logits(case: Case) -> list[Any]:
    """Positions for logits_to_keep, (n) or (B, n)."""
    rows = case["rows_of_logits"]
    return rows[: len(case["rows"])] if isinstance(rows[0], list) else rows


def turn_places(turn: Inputs, new: int, case: Case) -> Tensor:
    """position_ids of the second turn, which goes on behind all real tokens."""
    places = (turn["attention_mask"].cumsum(1) - 1)[:, -new:]
    return places.expand(3, -1, -1) if case["family"] == "qwen2_5_vl" else places


def _turn(output: Any, logits: Tensor, score: Tensor | None) -> list[Tensor]:
    return [NONE if output is None else output.sequences, logits, NONE if score is None else score]


def _reported(prompts: list[Any], pictures: bool, asked: int = 0) -> list[Tensor]:
    """The report of a turn, with as many prompts more as calls inside of it; empties the report."""
    found, own = list(prompts), int(pictures)
    prompts.clear()
    if not found:
        return [NONE] * 3
    assert len(found) == own + asked, f"{len(found)} prompts are reported, not {own + asked}"
    if not pictures:
        return [NONE] * 3
    images = [
        [image.sequence, image.hidden, image.tokens, image.key_tokens, *image.kept.values()]
        for image in found[0].images
    ]
    return [found[0].rows, torch.tensor(found[0].text), torch.tensor(images)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit by bit, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


def _forget_sizes(model: Any) -> None:
    """Makes generate() choose the size of a static cache, on which bits depend, without regard to the last one."""
    vars(model).pop("_previous_max_cache_length", None)


@torch.no_grad()
def _state(model: Any, name: str) -> tuple[Any, Tensor]:
    """What is attached to a model, and its plain logits."""
    logits = model(**batch(model, name, OTHER)).logits
    model.model.rope_deltas = None  # of the last prompt of Qwen2.5-VL
    _forget_sizes(model)
    return everything_attached(model), logits


def attempt(case: Case, first: Inputs, second: Inputs, around: Callable[[], Any]) -> Turns:
    """The turns; one tensor with the bytes of a sentence if the call raises."""
    try:
        return run(case, first, second, around)
    except AssertionError:
        raise
    except Exception as error:
        return [torch.tensor(list(f"{type(error).__name__}: {error}".encode()), dtype=torch.uint8)]


def drop(case: Case, first: Inputs, second: Inputs, backend: str | None = None) -> Turns:
    """The case inside drop_tokens, on a backend.

    Raises:
        AssertionError: the model is not as it was before.
    """
    model = model_of(case)
    before, plain = _state(model, case["family"])
    found = attempt(case, first, second, lambda: drop_tokens(model, config_of(case, backend)))
    after, again = _state(model, case["family"])
    assert after == before, "the model is not as it was"
    assert same_bits(plain, again), "the model's plain logits are not as they were"
    return found
