# SPDX-License-Identifier: Apache-2.0
"""A short run of the fuzzer of drop_tokens, and planted bugs, each of which it must find.

MUSTDROP_FUZZ_DROPPING_CASES: number of cases.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch

from .dropping import calls
from .dropping.inputs import model_of
from .families import FAMILIES
from .family import Mismatch
from .runners import Here
from .search import compare, search

CASES = int(os.environ.get("MUSTDROP_FUZZ_DROPPING_CASES", "60"))
SEED = int(os.environ.get("MUSTDROP_FUZZ_SEED", "1"))
FAMILY = FAMILIES["drop_tokens"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_drop_tokens_agrees_with_the_masked_reference():
    tally = search(FAMILY, [Here("cpu"), Here("reference", share=0.2)], CASES, SEED)
    assert not tally.failures, "\n".join(f"{f.message}\n  {f.case}" for f in tally.failures)
    assert tally.cases == CASES
    assert sum(tally.near.values()) <= 0.1 * CASES, "too many cases are near a threshold"


CASE = {
    "op": "drop_tokens",
    "family": "llava",
    "attention": "sdpa",
    "dtype": "float32",
    "rows": [[2, ["picture", 1], 4], [["picture", 0], 7]],
    "config": {"pruning_layers": [1, 3], "key_rate": 0.1, "merge": False, "budgets": [20, 9]},
    "mask": {"vision": "some", "text": 0, "seed": 4, "type": "int64"},
    "padding": "left",
    "call": "generate",
    "tokens": 3,
    "cache": "none",
    "turn": [[2], [3, ["picture", 2], 1]],
    "contexts": 1,
}
KEEP_ALL = {"config": {"pruning_layers": [1], "key_rate": 0.0, "merge": False, "global_threshold": 0.0}}
FORWARD = {"call": "forward", "embeds": None, "form": "bias", "rows_of_logits": "labels"}


def no_bug(call, arguments):
    return call(**arguments)


def a_mask_that_is_ignored(call, arguments):
    first = arguments["first"]
    return call(**{**arguments, "first": {**first, "attention_mask": torch.ones_like(first["attention_mask"])}})


def changed(name, turn):
    """One value of a tensor of TURN, the smallest change that can be told."""

    def change(call, arguments):
        answer = call(**arguments)
        number = turn * len(calls.TURN) + calls.TURN.index(name)
        found = answer[number] = answer[number].clone()
        place = found.numel() - 1
        if found.is_floating_point() and arguments["case"]["config"] == KEEP_ALL["config"]:
            found.view(-1)[place] = torch.nextafter(found.view(-1)[place], torch.tensor(torch.inf))
        else:
            found.view(-1)[place] += 1e-3 if found.is_floating_point() else 1
        return answer

    change.__name__ = f"other {name} in turn {turn}"
    return change


def a_row_that_is_gone(call, arguments):
    answer = call(**arguments)
    rows = answer[calls.TURN.index("rows")]
    rows[0, int((rows[0] >= 0).nonzero()[-1])] = -1
    return answer


def an_error(call, arguments):
    return [torch.tensor(list(b"ValueError: planted"), dtype=torch.uint8)]


PLANTED = [
    (a_mask_that_is_ignored, {}),
    (an_error, {}),
    (an_error, KEEP_ALL),
    (a_row_that_is_gone, {}),
    *((changed(name, turn), {}) for name in ("sequences", "logits", "text", "images") for turn in (0, 1)),
    *((changed(name, 0), KEEP_ALL) for name in ("sequences", "logits")),
    (changed("score", 0), FORWARD),
    (changed("score", 0), {**FORWARD, **KEEP_ALL}),
    (a_row_that_is_gone, FORWARD),
]


@pytest.mark.parametrize(("change", "differences"), PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_a_planted_bug_is_found(change, differences):
    case = {**CASE, **differences}

    def planted(bug):
        return Here("planted", call=lambda op, case: lambda **arguments: bug(FAMILY.function, arguments))

    compare(FAMILY, case, [planted(no_bug)])
    with pytest.raises(Mismatch, match="planted"):
        compare(FAMILY, case, [planted(change)])


@pytest.mark.parametrize("left", ["a hook", "an attribute", "a weight"])
def test_what_is_left_on_the_model_is_found(left, monkeypatch):
    run, model = calls.run, model_of(CASE)
    layer = model.model.language_model.layers[2]

    def leaving(*arguments):
        if left == "a hook":
            undo.append(layer.register_forward_hook(print).remove)
        elif left == "an attribute":
            monkeypatch.setattr(layer, "forward", layer.forward)
        else:
            weight = layer.mlp.down_proj.weight
            undo.append(functools.partial(weight.data.copy_, weight.detach().clone()))
            weight.data[0, 0] += 1
        return found(*arguments)

    undo, found = [], run
    monkeypatch.setattr(calls, "run", leaving)
    try:
        with pytest.raises(Mismatch, match=r"as it was|as they were"):
            compare(FAMILY, CASE, [Here("cpu")])
    finally:
        for step in undo:
            step()
