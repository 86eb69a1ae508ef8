# SPDX-License-Identifier: Apache-2.0
"""Tests of the fuzzer: planted bugs are found, shrunk, stored and replayed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from example import QUICK
from hypothesis import find, settings

import mustdrop_kernels as mk

from .families import FAMILIES
from .family import Mismatch
from .runners import Child, Here, takes
from .search import Failure, compare, replay, search

CASES = 400


def planted(op, change):
    """The reference backend with `change` applied to its results or arguments."""

    def call(name, case):
        def run(**arguments):
            return change(lambda **given: getattr(mk, name)(**given, backend="reference"), arguments)

        return run

    return Here("planted", call=call)


def ties_to_the_higher_index(call, arguments):
    flipped = {
        name: value.flip(1) if isinstance(value, torch.Tensor) and value.dim() == 2 else value
        for name, value in arguments.items()
    }
    found = call(**flipped)
    length = arguments["scores"].shape[1]
    keep = torch.where(found.keep >= 0, length - 1 - found.keep, 2**40).sort(1).values
    return torch.where(keep < 2**40, keep, -1), found.counts


def one_past_the_counts(call, arguments):
    return call(**{**arguments, "counts": arguments["counts"] + 1})


def one_past_the_end_is_written(call, arguments):
    call(**arguments)
    key = arguments["keys"][0]
    storage = key.untyped_storage()
    used = key.storage_offset() + sum((n - 1) * s for n, s in zip(key.shape, key.stride(), strict=True)) + 1
    if key.numel() and used * key.element_size() < storage.nbytes():
        storage[used * key.element_size()] = storage[used * key.element_size()] ^ 1


def a_rounding_too_many(call, arguments):
    total, peak = call(**arguments)
    return total.bfloat16().float(), peak


def a_merge_that_forgets_the_sizes(call, arguments):
    return call(**{**arguments, "sizes": None})


PLANTED = [
    ("select_topk", ties_to_the_higher_index),
    ("gather_tokens", one_past_the_counts),
    ("compact_kv_", one_past_the_end_is_written),
    ("text_vision_scores", a_rounding_too_many),
    ("spatial_merge", a_merge_that_forgets_the_sizes),
]


@pytest.mark.parametrize(("op", "change"), PLANTED, ids=[change.__name__ for _, change in PLANTED])
def test_a_planted_bug_is_found_shrunk_kept_and_replayed(op, change, tmp_path):
    family, runner = FAMILIES[op], planted(op, change)
    tally = search(family, [Here("reference"), runner], CASES, seed=5, most_failures=1)
    assert tally.failures, "not found"
    failure = tally.failures[0]
    assert failure.backend == "planted"
    assert tally.shrinking > 0
    case = failure.case
    sizes = [case.get("batch", 1), *case.get("shape", []), case.get("length", 1)]
    assert max(sizes) <= 12, f"not shrunk: {case}"
    path = failure.save(tmp_path)
    assert path.name.startswith(op)
    with pytest.raises(AssertionError, match="planted"):
        replay(path, family, [runner])
    replay(path, family, [Here("reference")])


def test_the_same_seed_generates_the_same_cases():
    drawn = []
    for _ in range(2):
        seen = []

        def call(name, case, seen=seen):
            seen.append(json.dumps(case, sort_keys=True))
            return lambda **arguments: mk.select_topk(**arguments)

        search(FAMILIES["select_topk"], [Here("cpu", call=call)], 20, seed=3)
        drawn.append(seen)
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 15


def test_share():
    cases = [{"op": "x", "seed": i} for i in range(2000)]
    taken = sum(takes(Here("x", share=0.1), case) for case in cases)
    assert 120 < taken < 280


CRASHING = "import os, sys; sys.stdin.readline(); os.abort()"
SILENT = "import sys, time; sys.stdin.readline(); time.sleep(60)"


@pytest.mark.parametrize(("code", "told"), [(CRASHING, "died with status -6"), (SILENT, "gave no answer")])
def test_a_process_that_crashes_or_hangs_is_a_mismatch(code, told):
    runner = Child("broken", "cpu", patience_s=5.0, command=(sys.executable, "-S", "-c", code))
    case = {**select_topk_case(), "op": "select_topk"}
    with pytest.raises(Mismatch, match=told):
        compare(FAMILIES["select_topk"], case, [runner])
    runner.close()


def select_topk_case():
    """The minimal case."""
    return find(FAMILIES["select_topk"].strategy, lambda case: True, settings=settings(database=None))


def test_a_child_process_gives_the_same_result():
    runner = Child("cpu", "cpu", environment={"OMP_NUM_THREADS": "1"})
    try:
        for op in (*QUICK, "compact_kv_", "spatial_merge"):
            tally = search(FAMILIES[op], [Here("reference"), runner], 15, seed=2)
            assert not tally.failures, tally.failures[0].message
            assert tally.by_runner["cpu"] == 15
    finally:
        runner.close()


def test_the_file_name_is_a_hash_of_the_case(tmp_path: Path):
    failure = Failure("cpu", "cpu: differs", {"op": "select_topk", "length": 3})
    assert failure.save(tmp_path) == failure.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
