# SPDX-License-Identifier: Apache-2.0
"""Models, batches and masks of a case."""

from __future__ import annotations

import functools
from typing import Any

import tiny_models
import torch
from tiny_models import IMAGE, VIDEO
from torch import Tensor

from mustdrop_kernels.config import MustDropConfig

from ..inputs import Case, dtype_of, numbers

Inputs = dict[str, Any]
Pictures = list[tuple[int, slice]]
"""The sequence and the placeholders of each picture of a batch."""
VIDEOS = ("llava_next_video", "llava_onevision", "video_llava", "qwen2_5_vl")
"""Families that read videos."""
OTHER = [[5, ["picture", 0], 4]]
"""A prompt for calls inside of generate()."""


def config_of(case: Case, backend: str | None = None) -> MustDropConfig:
    """The config."""
    return MustDropConfig.from_dict({**case["config"], "backend": backend})


def has_pictures(rows: list[list[Any]], least: int = 0) -> bool:
    return any(isinstance(piece, list) and piece[1] >= least for row in rows for piece in row)


@functools.cache
def _model(name: str, attention: str, dtype: str) -> Any:
    model = tiny_models.model_of(tiny_models.FAMILIES[name], attention).to(dtype_of(dtype))
    for picture in (0, 100) if name in VIDEOS else (0,):  # transformers adds hooks when first used
        model(**batch(model, name, [[1, ["picture", picture], 1]]), output_hidden_states=True)
    return model


def model_of(case: Case) -> Any:
    """The model, the same object in all cases."""
    return _model(case["family"], case["attention"], case["dtype"])


def batch(model: Any, name: str, rows: list[list[Any]], padding: str = "left") -> dict[str, Tensor]:
    inputs = tiny_models.batch(tiny_models.FAMILIES[name], model.config, rows)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if padding == "right":
        for row, real in enumerate(mask.sum(1).tolist()):
            ids[row], mask[row] = ids[row].roll(real), mask[row].roll(real)
    if name == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return {key: x.to(model.dtype) if x.is_floating_point() else x for key, x in inputs.items()}


def places_of(model: Any, name: str, rows: list[list[Any]], mask: Tensor) -> Pictures:
    """The sequence and the placeholders of each picture, or of each tile of InternVL, without hidden tokens."""
    found = []
    for number, row in enumerate(rows):
        begin = int(mask[number].argmax()) + 1
        for piece in row:
            if isinstance(piece, int):
                begin += piece
                continue
            ids = torch.tensor(tiny_models.FAMILIES[name].picture(model.config, piece[1]).placeholders)
            places = ((ids == IMAGE) | (ids == VIDEO)).nonzero().flatten() + begin
            size = model.config.image_seq_length if name == "internvl" else len(places)
            found += [(number, slice(int(part[0]), int(part[-1]) + 1)) for part in places.split(size)]
            begin += len(ids)
    return found


def _hide(mask: Tensor, pictures: Pictures, described: Case) -> Tensor:
    """The mask with some vision and text tokens hidden; the last token of each sequence is not text that is hidden."""
    draw, hidden = numbers(described["seed"]), mask.clone()
    text = mask.bool()
    for number, (row, own) in enumerate(pictures):
        text[row, own] = False
        count, what = own.stop - own.start, described["vision"]
        last = number + 1 == len(pictures) or pictures[number + 1][0] != row
        if what == "some":
            hidden[row, own] = torch.from_numpy(draw.random(count) < 0.6).long()
        elif what == "first halves":
            hidden[row, own.start : own.start + count // 2] = 0
        elif what == "runs":
            begin, end = sorted(draw.integers(0, count + 1, 2).tolist())
            hidden[row, own.start + begin : own.start + end] = 0
        elif (what == "last images" and last) or (what == "one sequence" and row == described["seed"] % len(mask)):
            hidden[row, own] = 0
    places = [place for row in text for place in row.nonzero().flatten()[:-1].tolist()]
    owners = [row for row in range(len(text)) for _ in range(int(text[row].sum()) - 1)]
    for i in draw.permutation(len(places))[: described["text"]].tolist():
        hidden[owners[i], places[i]] = 0
    return hidden


def _four_dimensions(mask: Tensor, pictures: Pictures, form: str, heads: int) -> Tensor:
    """(B, 1 or heads, L, L): the same as the mask (B, L), or with a structure that no mask (B, L) has."""
    place = torch.arange(mask.shape[1])
    dense = (place[:, None] >= place) & mask.bool()[:, None, None, :]
    for row, own in pictures:
        if form == "images":  # attention in both directions inside of an image
            dense[row, 0, own, own] = mask[row, own].bool()
        elif form == "holes":  # text that does not attend to every patch; a last one that nothing reaches is hidden
            dense[row, 0, own.stop : own.stop + 2, own.start : own.stop - 1 : 2] = False
    if form == "tree":  # the last token and the one before it go on behind the same text
        for row, real in enumerate(mask.bool()):
            last = real.nonzero().flatten()[-2:]
            if not any(own.start <= last[-1] + 1 and last[0] < own.stop for owner, own in pictures if owner == row):
                dense[row, 0, last[-1], last[:-1]] = False
    if form == "window":
        count = mask.cumsum(1)[:, None]
        dense &= count[..., None] - count[:, :, None] < 16
    if form not in ("added", "bias", "slopes"):
        return dense
    added = torch.zeros(dense.shape).masked_fill(~dense, torch.finfo(torch.float32).min)
    if form in ("bias", "slopes"):
        slope = 0.05 if form == "bias" else 0.02 * torch.arange(1, heads + 1)[:, None, None]
        added = added - slope * (place[:, None] - place).abs()
    return added


def build(case: Case) -> dict[str, Any]:
    """The inputs of the first turn, and those that the second one adds."""
    model, name = model_of(case), case["family"]
    first = batch(model, name, case["rows"], case["padding"])
    pictures = places_of(model, name, case["rows"], first["attention_mask"])
    if case.get("lookup"):  # few different tokens, so that it finds candidates
        ids = first["input_ids"]
        first["input_ids"] = torch.where(ids >= 10, 10 + ids % 3, ids)
    mask = _hide(first["attention_mask"], pictures, case["mask"])
    if case["call"] == "generate":
        mask[:, -1] = 1  # what is generated follows this token
    given = case["call"] == "forward" or case.get("embeds") == "alone" or not torch.equal(mask, first["attention_mask"])
    if name == "qwen2_5_vl" and given:  # which it does not compute right from embeddings, nor where tokens are hidden
        names = ("image_grid_thw", "video_grid_thw", "mm_token_type_ids", "input_ids", "attention_mask")
        sizes = {key: first[key] for key in names if key in first}
        first["position_ids"], first["rope_deltas"] = model.model.get_rope_index(**sizes)
    first["attention_mask"] = mask
    if case.get("form"):
        dense = _four_dimensions(mask, pictures, case["form"], model.config.get_text_config().num_attention_heads)
        if dense.is_floating_point():
            dense = dense.clamp(min=torch.finfo(model.dtype).min).to(model.dtype)
        first["dense"] = dense
    if case.get("rows_of_logits") == "labels":
        real = first["attention_mask"].bool()
        shown = torch.nn.functional.pad(real, (1, -1))  # the token before, which predicts this one
        first["labels"] = first["input_ids"].masked_fill(~(real & shown), -100)
    second = batch(model, name, case["turn"]) if "turn" in case else {}
    return {"case": case, "first": first, "second": second}


def pictures_of(case: Case, turn: int) -> Pictures:
    """The pictures of a turn. generate() reads those of the second one with the last token before them."""
    rows, padding = (case["turn"], "left") if turn else (case["rows"], case["padding"])
    model, lead = model_of(case), turn * (case["call"] == "generate")
    found = places_of(model, case["family"], rows, batch(model, case["family"], rows, padding)["attention_mask"])
    return [(row, slice(own.start + lead, own.stop + lead)) for row, own in found]
