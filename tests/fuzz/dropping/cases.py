# SPDX-License-Identifier: Apache-2.0
"""Cases of drop_tokens as plain JSON values."""

from __future__ import annotations

import itertools
from typing import Any

import tiny_models
from hypothesis import strategies as st

from ..inputs import SEEDS, Case
from .inputs import VIDEOS, config_of, has_pictures

WHOLE = ("llava_onevision shrunk", "qwen2_5_vl", "internvl")
"""Families whose patches cannot merge in the tower, and for videos also:"""
WHOLE_VIDEOS = ("llava_next_video", "llava_onevision")


@st.composite
def _rows(draw: st.DrawFn, name: str, most: int, least: int = 1) -> list[list[Any]]:
    """Sequences of texts (a number of tokens) and pictures, at most 4 of them."""
    kinds = [0, 1, 2, *([3] if "next" in name or "onevision" in name else []), *([100, 101] if name in VIDEOS else [])]
    rows, pictures = [], 0
    for _ in range(draw(st.integers(least, most))):
        row: list[Any] = []
        for _ in range(draw(st.integers(1, 3))):
            if pictures < 4 and draw(st.sampled_from([False, True, True])):
                row.append(["picture", draw(st.sampled_from(kinds))])
                pictures += 1
            else:
                row.append(draw(st.integers(1, 12)))
        rows.append(row)
    return rows


@st.composite
def _configs(draw: st.DrawFn, name: str, rows: list[list[Any]], depth: int = tiny_models.LAYERS) -> Case:
    """Fields of a MustDropConfig."""
    layers = draw(st.sampled_from([layers for n in range(4) for layers in itertools.combinations(range(depth), n)]))
    found: Case = {
        "pruning_layers": list(layers),
        "key_rate": draw(st.sampled_from([0.0, 0.1, 0.3, 1.0])),
        "merge": False,
    }
    if draw(st.sampled_from([False, False, False, True])):
        return {**found, "global_threshold": 0.0, "individual_threshold": 0.0}
    found["text_queries"] = draw(st.sampled_from(["after_image", "last"]))
    if draw(st.booleans()):
        found["budgets"] = sorted(draw(st.lists(st.integers(0, 50), min_size=len(layers), max_size=len(layers))))[::-1]
    else:
        found["global_threshold"] = draw(st.sampled_from([0.005, 0.012, 0.02, 0.05, 1.0]))
        found["individual_threshold"] = draw(st.sampled_from([0.01, 0.03, 0.08, 1.0]))
    if draw(st.booleans()):
        found["evict"] = draw(st.booleans())
        found["evict_from"] = draw(st.one_of(st.none(), st.integers(0, depth - 1)))
    whole = name in WHOLE or (name in WHOLE_VIDEOS and has_pictures(rows, 100))
    place = draw(st.sampled_from([None, "features"] if whole else [None, "features", "tower"]))
    if place is None:
        return found
    windows = [[2, 2], [1, 2], [3, 3], [2, 3], [4, 4], [5, 2], [7, 7]]
    if place == "features":
        windows += [[2, 2, 2], [3, 1, 2], [4, 2, 1]]
    else:
        found["merge_layer"] = draw(st.integers(0, 1))
    budget = draw(st.one_of(st.none(), st.integers(0, 6), st.sampled_from([0.0, 0.3, 0.5, 1.0])))
    return {
        **found,
        "merge": True,
        "merge_at": place,
        "window": draw(st.sampled_from(windows)),
        "merge_threshold": draw(st.sampled_from([-1.0, 0.2, 0.4, 0.8])),
        "merge_budget": budget,
    }


@st.composite
def _masks(draw: st.DrawFn) -> Case:
    """What the mask hides, beside padding, and its type; "none" leaves a mask out that hides nothing."""
    hidden = [None, None, "some", "first halves", "last images", "one sequence", "runs"]
    return {
        "vision": draw(st.sampled_from(hidden)),
        "text": draw(st.sampled_from([0, 0, 0, 1, 3])),
        "seed": draw(SEEDS),
        "type": draw(st.sampled_from(["int64", "int64", "bool", "float32", "none"])),
    }


@st.composite
def _turns(draw: st.DrawFn, name: str, batch: int) -> list[list[Any]]:
    """The next turn: text, or text and images."""
    if draw(st.booleans()):
        return draw(_rows(name, batch, batch))
    return [[draw(st.integers(1, 5))] for _ in range(batch)]


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    name = draw(st.sampled_from(list(tiny_models.FAMILIES)))
    lookup = draw(st.sampled_from([False] * 9 + [True]))
    rows = draw(_rows(name, 1 if lookup else 3))
    turn = draw(st.one_of(st.none(), _turns(name, len(rows))))
    case: Case = {
        "family": name,
        "attention": draw(st.sampled_from(["sdpa", "sdpa", "eager"])),
        "dtype": "float32",
        "rows": rows,
        "config": draw(_configs(name, rows + (turn or []))),
        "mask": draw(_masks()),
        "padding": "left",
    }
    drops_nothing = config_of(case).drops_nothing
    if drops_nothing and draw(st.booleans()):
        case["dtype"] = "bfloat16"
    if lookup:
        case |= draw(_lookups())
    else:
        case |= draw(draw(st.sampled_from([_generates(), _forwards(case["attention"])])))
    if name == "qwen2_5_vl" and case.get("nested"):
        case["goes_on"] = False  # the model counts on from the positions of its last call
    if case.pop("goes_on") and turn is not None:
        case |= {"turn": turn, "contexts": draw(st.integers(1, 2))}
    return case


@st.composite
def _lookups(draw: st.DrawFn) -> Case:
    """Assisted generation by prompt lookup, which reads a prompt again if a cache holds a part of it."""
    cache = draw(st.sampled_from(["none", "dynamic", "empty"]))
    return {"call": "generate", "cache": cache, "tokens": draw(st.integers(1, 6)), "lookup": 3, "goes_on": True}


@st.composite
def _generates(draw: st.DrawFn) -> Case:
    beams, embeds = draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([None, None, None, "beside", "alone"]))
    sample = beams == 1 and draw(st.booleans())
    returns = draw(st.integers(1, 3 if sample else beams))
    one = beams == returns == 1
    caches = ["none", "dynamic", "static", "empty"]
    if embeds is None:
        caches += ["StaticCache", "no", *(["text"] if one else [])]  # which has a row for each sequence of the batch
    cache = draw(st.sampled_from(caches))
    return {
        "call": "generate",
        "tokens": draw(st.integers(1, 4)),
        "beams": beams,
        "sample": sample,
        "returns": returns,
        "embeds": embeds,
        "cache": cache,
        "nested": draw(st.sampled_from([False, False, False, True])),
        "goes_on": one and embeds is None and cache not in ("no", "static"),
    }


@st.composite
def _forwards(draw: st.DrawFn, attention: str) -> Case:
    found: Case = {"call": "forward", "padding": draw(st.sampled_from(["left", "right"]))}
    found["cache"] = draw(st.sampled_from(["none", "empty", "text", "StaticCache", "no"]))
    found["embeds"] = draw(st.sampled_from([None, None, "alone"]))
    if found["cache"] != "StaticCache":
        bools = ["bool", "images", "holes", "window", "tree"]  # which eager attention adds
        bools = bools if attention == "sdpa" else []
        found["form"] = draw(st.sampled_from([None, None, "added", "bias", "slopes", *bools]))
    found["rows_of_logits"] = draw(
        st.sampled_from(["all", "all", "labels", 1, 2, 7, [-1], [-3, -1], [0, -2], [[-1, -1], [-1, -2], [-2, -1]]])
    )
    found["goes_on"] = found["cache"] != "no"
    return found


def kinds(case: Case) -> list[str]:
    """Features of a case, for the record."""
    config = case["config"]
    found = [case["family"], case["attention"], case["dtype"], f"{case['call']}, cache: {case['cache']}"]
    found.append("keep-all" if config_of(case).drops_nothing else "budgets" if "budgets" in config else "thresholds")
    if config["merge"]:
        found.append(f"merge in {config['merge_at']}{' by budget' if config['merge_budget'] is not None else ''}")
    found += [f"pruning layers: {len(config['pruning_layers'])}", f"sequences: {len(case['rows'])}"]
    if not has_pictures(case["rows"]):
        found.append("no image")
    if case["mask"]["vision"]:
        found.append(f"hidden: {case['mask']['vision']}")
    if case["mask"]["text"]:
        found.append("hidden text")
    if case["mask"]["type"] != "int64":
        found.append(f"mask: {case['mask']['type']}")
    if case["padding"] == "right":
        found.append("padding on the right")
    if "turn" in case:
        found.append("another turn with images" if has_pictures(case["turn"]) else "another turn of text")
    names = ("lookup", "nested", "embeds", "form", "beams", "returns", "sample", "contexts", "rows_of_logits")
    return found + [f"{name}: {case[name]}" for name in names if case.get(name) and case[name] not in (1, "all")]


CASES = _cases()
