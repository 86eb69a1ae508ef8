# SPDX-License-Identifier: Apache-2.0
"""Invalid arguments raise a RuntimeError that names the op and the argument, before any work.

A table lists the invalid values of each argument of each op. Every backend raises the same message as the reference
backend, and so do the fakes, which torch.compile calls.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mustdrop_kernels

from .cases import Watch
from .sample_calls import deciding, sample, tensors_in
from .schemas import OPS

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

Change = Callable[[dict], Any]


def cast(dtype: torch.dtype) -> Change:
    return lambda t: t.to(dtype)


def shape(*sizes: int) -> Change:
    return lambda t: t.new_ones(sizes)


def value(v: Any) -> Change:
    return lambda _: v


def gaps(t: torch.Tensor) -> torch.Tensor:
    """The same values, not contiguous in the last dimension."""
    return t.repeat_interleave(2, dim=-1)[..., ::2]


def first(change: Change) -> Change:
    return lambda tensors: [change(tensors[0]), *tensors[1:]]


def last(change: Change) -> Change:
    return lambda tensors: [*tensors[:-1], change(tensors[-1])]


def expanded(t: torch.Tensor) -> torch.Tensor:
    return t[:, :, :1].expand_as(t)


INT, DOUBLE, HALF = cast(torch.int64), cast(torch.float64), cast(torch.float16)


def dtypes_but(*served: torch.dtype) -> dict[str, Change]:
    """A row for each other dtype of torch's stable ABI."""
    floats = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2, torch.float8_e4m3fn]
    floats += [torch.float8_e5m2fnuz, torch.float8_e4m3fnuz]
    integers = [torch.int8, torch.int16, torch.int32, torch.int64]
    integers += [torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
    every = [*floats, *integers, torch.complex32, torch.complex64, torch.complex128]
    return {str(dtype).removeprefix("torch."): cast(dtype) for dtype in every if dtype not in served}


# op -> argument -> {description: the changed argument}; a tuple changes other arguments too, by name.
QUERY = {
    "rank 3": shape(2, 4, 8),
    "rank 5": shape(2, 4, 12, 8, 1),
    "integers": INT,
    "float64": DOUBLE,
    "more rows than keys": shape(2, 4, 15, 8),
    "last dimension with gaps": gaps,
}
KEY = {
    "rank 3": shape(2, 14, 8),
    "another batch": shape(3, 2, 14, 8),
    "another head_dim": shape(2, 2, 14, 9),
    "heads that do not divide": shape(2, 3, 14, 8),
    "more heads than the query": shape(2, 8, 14, 8),
    "no heads": shape(2, 0, 14, 8),
    "another dtype": HALF,
    "last dimension with gaps": gaps,
}
TYPES = {
    "rank 1": shape(14),
    "another length": shape(2, 13),
    "another batch": shape(1, 14),
    "int64": INT,
    "bool": cast(torch.bool),
    "float32": cast(torch.float32),
    "last dimension with gaps": gaps,
}
LSE = {
    "float64": DOUBLE,
    "float16": HALF,
    "rank 2": shape(2, 12),
    "heads of k": shape(2, 2, 12),
    "rows of k": shape(2, 4, 14),
}
DENSE = {"q": QUERY, "k": KEY, "token_types": TYPES, "lse": LSE}
OPTIONS = {
    "protected": {
        "uint8": cast(torch.uint8),
        "float32": cast(torch.float32),
        "rank 1": shape(14),
        "another length": shape(2, 13),
        "last dimension with gaps": gaps,
    },
    "capacity": {"negative": value(-1)},
    "drop_multiple": {"zero": value(0), "negative": value(-4)},
}
BUDGETS = {"int64": INT, "rank 2": shape(2, 1), "another batch": shape(3), "one for all": shape(1)}
VALUES = {
    "rank 1": shape(14),
    "rank 3": shape(2, 14, 1),
    "integers": INT,
    "float64": DOUBLE,
    "last dimension with gaps": gaps,
}
PACKED_Q = {
    "rank 2": shape(9, 32),
    "rank 4": shape(1, 9, 4, 8),
    "integers": INT,
    "float64": DOUBLE,
    "last dimension with gaps": gaps,
}
CU = {"int64": INT, "rank 2": shape(1, 3), "float32": cast(torch.float32)}
PACKED_LSE = {"float64": DOUBLE, "rows first": shape(9, 4), "rank 3": shape(1, 4, 9), "heads of k": shape(2, 9)}
KEEP = {
    "int32": first(cast(torch.int32)),
    "rank 1": first(shape(4)),
    "rank 4": first(shape(2, 3, 4, 1)),
    "another batch": first(shape(3, 4)),
    "another number of heads": first(shape(2, 2, 4)),
    "neither one nor one per layer": lambda k: k * 2,
    "none": value([]),
    "last dimension with gaps": first(gaps),
}
COUNTS = {
    "int64": first(INT),
    "float32": first(cast(torch.float32)),
    "another batch": first(shape(3)),
    "rank 2 with a set for all heads": first(shape(2, 3)),
    "more than keep": lambda c: c * 3,
    "none": value([]),
}
CACHE = {
    "rank 3": first(shape(2, 3, 10)),
    "rank 5 in the last layer": last(shape(2, 3, 10, 8, 1)),
    "expanded over slots": first(expanded),
    "expanded in the last layer": last(expanded),
}

TABLE: dict[str, dict[str, dict[str, Change]]] = {
    "spatial_merge": {
        "x": {
            "rank 2": shape(25, 8),
            "rank 4": shape(2, 1, 25, 8),
            "integers": INT,
            "float64": DOUBLE,
            "one token too few": shape(2, 24, 8),
            "one token too many": shape(2, 26, 8),
            "last dimension with gaps": gaps,
        },
        "grid": {
            "empty": value([]),
            "one entry": value([24]),
            "four entries": value([1, 1, 4, 6]),
            "negative": value([-4, -6]),
        },
        "window": {
            "empty": value([]),
            "one entry": value([2]),
            "three entries for two": value([1, 2, 2]),
            "zero": value([0, 2]),
            "negative": value([2, -2]),
        },
        "num_prefix_tokens": {"negative": value(-1)},
        "sizes": {
            "rank 1": shape(25),
            "another length": shape(2, 24),
            "another batch": shape(1, 25),
            "float16": HALF,
            "float64": DOUBLE,
            "last dimension with gaps": gaps,
        },
        "budget": {"negative": value(-1), "above the number of windows": value(7)},
    },
    "cls_attention": {
        "q": {
            "rank 1": shape(8),
            "rank 2": shape(2, 8),
            "rank 4": shape(2, 3, 1, 8),
            **dtypes_but(torch.float32, torch.float16, torch.bfloat16),
            "last dimension with gaps": gaps,
        },
        "k": {
            "rank 3": shape(2, 11, 8),
            "another batch": shape(1, 3, 11, 8),
            "other heads": shape(2, 1, 11, 8),
            "another head_dim": shape(2, 3, 11, 9),
            "another dtype": HALF,
            "last dimension with gaps": gaps,
        },
        "counts": {"int64": INT, "rank 2": shape(2, 1), "another batch": shape(3)},
        "num_prefix_tokens": {"negative": value(-1)},
    },
    "text_vision_scores": DENSE,
    "text_vision_attention": {**DENSE, "max_query": {"negative": value(-1)}},
    "dual_attention_select": {**DENSE, **OPTIONS},
    "topk_attention_select": {**DENSE, **OPTIONS, "budget": {"negative": value(-1)}, "budgets": BUDGETS},
    "text_vision_scores_varlen": {
        "q": PACKED_Q,
        "k": {
            "rank 4": shape(1, 14, 2, 8),
            "another head_dim": shape(14, 2, 9),
            "heads that do not divide": shape(14, 3, 8),
            "no heads": shape(14, 0, 8),
            "another dtype": HALF,
            "last dimension with gaps": gaps,
        },
        "token_types": {"rank 2": shape(2, 14), "another length": shape(13), "int64": INT, "gaps": gaps},
        "cu_seqlens_q": {**CU, "empty": shape(0)},
        "cu_seqlens_k": {**CU, "another batch": shape(4)},
        "max_seqlen_q": {"negative": value(-1)},
        "max_seqlen_k": {"negative": value(-1)},
        "lse": PACKED_LSE,
    },
    "text_vision_scores_paged": {
        "q": PACKED_Q,
        "k_cache": {
            "rank 3": shape(7, 2, 8),
            "rank 5": shape(7, 1, 4, 2, 8),
            "another head_dim": shape(7, 4, 2, 9),
            "heads that do not divide": shape(7, 4, 3, 8),
            "blocks without slots": shape(7, 0, 2, 8),
            "another dtype": HALF,
        },
        "block_table": {"int64": INT, "rank 1": shape(3), "another batch": shape(3, 3)},
        "seq_lens": {"int64": INT, "rank 2": shape(2, 1), "another batch": shape(3)},
        "token_types": {"rank 1": shape(9), "another batch": shape(3, 9), "int64": INT, "gaps": gaps},
        "cu_seqlens_q": {**CU, "empty": shape(0)},
        "max_seqlen_q": {"negative": value(-1)},
        "lse": PACKED_LSE,
    },
    "select_dual": {
        "total": VALUES,
        "peak": {"another length": shape(2, 13), "rank 1": shape(14), "another dtype": HALF, "integers": INT},
        "token_types": TYPES,
        **OPTIONS,
    },
    "select_topk": {
        "scores": VALUES,
        "token_types": TYPES,
        "k": {"negative": value(-1)},
        "budgets": BUDGETS,
        **OPTIONS,
    },
    "gather_tokens": {
        "x": {"rank 1": shape(10), "rank 0": shape(), "last dimension with gaps": gaps},
        "keep": {
            "int32": cast(torch.int32),
            "float32": cast(torch.float32),
            "rank 1": shape(4),
            "rank 3": shape(2, 4, 1),
            "another batch": shape(3, 4),
            "last dimension with gaps": gaps,
        },
        "counts": {**dtypes_but(torch.int32), "rank 2": shape(2, 1), "another batch": shape(3)},
    },
    "compact_kv_": {
        "keys": {
            **CACHE,
            "a layer twice": lambda k: [k[0], k[1], k[0]],
            "last dimension with gaps": first(gaps),
        },
        "values": {
            **CACHE,
            "one layer less": lambda v: v[:-1],
            "another length": last(shape(2, 3, 9, 4)),
            "other heads": first(shape(2, 2, 10, 4)),
            "a layer twice": lambda v: [v[0], v[0], v[2]],
            "last dimension with gaps": first(gaps),
        },
        "keep": KEEP,
        "counts": COUNTS,
    },
    "compact_paged_kv_": {
        "keys": {
            **CACHE,
            "a layer twice": lambda k: [k[0], k[1], k[0]],
        },
        "values": {
            **CACHE,
            "one layer less": lambda v: v[:-1],
            "another number of slots": last(shape(7, 5, 3, 4)),
            "other heads": first(shape(7, 4, 2, 4)),
            "a layer twice": lambda v: [v[0], v[0], v[2]],
        },
        "block_table": {"int64": INT, "rank 1": shape(3), "rank 3": shape(2, 3, 1)},
        "keep": KEEP,
        "counts": COUNTS,
        "seq_lens": {"int64": INT, "rank 2": shape(2, 1), "another batch": shape(3), "missing": value(None)},
    },
}

# Other ops have their rows in their own test files, as REFUSALS.
for op in set(OPS) - set(TABLE):
    TABLE[op] = importlib.import_module(f".test_{op}", __package__).REFUSALS

# Invalid combinations: the changes, and the argument that the error names.
TOGETHER = [
    ("spatial_merge", "uniform", {"budget": 1, "uniform": True}),
    ("spatial_merge", "window", {"budget": 1, "window": [3, 3]}),
    ("spatial_merge", "window", {"budget": 0, "window": [2, 4]}),
    ("spatial_merge", "budget", {"budget": 1, "window": [1, 1]}),
    ("spatial_merge", "x", {"grid": [4, 5]}),
    ("spatial_merge", "x", {"num_prefix_tokens": 2}),
    ("compact_kv_", "keys", {"keys": last(shape(3, 3, 10, 8)), "values": last(shape(3, 3, 10, 4))}),
    ("compact_paged_kv_", "keys", {"keys": last(shape(6, 4, 3, 8)), "values": last(shape(6, 4, 3, 4))}),
    ("compact_paged_kv_", "keys", {"keys": last(shape(7, 5, 3, 8)), "values": last(shape(7, 5, 3, 4))}),
]

ROWS = [(op, argument, wrong) for op, rows in TABLE.items() for argument, ways in rows.items() for wrong in ways]


def broken(op: str, argument: str, wrong: str, device: str) -> dict[str, Any]:
    given = sample(op, device)
    given[argument] = TABLE[op][argument][wrong](given.get(argument))
    return given


def broken_together(op: str, changes: dict[str, Any], device: str) -> dict[str, Any]:
    given = sample(op, device)
    return {**given, **{name: new(given[name]) if callable(new) else new for name, new in changes.items()}}


def refusal(op: str, given: dict) -> str | None:
    """The message of the reference backend; None if it accepts the call."""
    try:
        getattr(mustdrop_kernels, op)(**given, backend="reference")
    except RuntimeError as error:
        return str(error)
    return None


def expect_refusal(call: Callable, op: str, argument: str, given: dict, expected: str | None = None) -> None:
    """``expected``: the reference backend's message, if it cannot be called with the same tensors."""
    watch = Watch(*tensors_in(given)) if all(type(t) is torch.Tensor for t in tensors_in(given)) else None
    with pytest.raises(RuntimeError) as refused:
        call(**given)
    message = str(refused.value)
    assert message.startswith(f"mustdrop::{op}: {argument}"), message
    rest = message.removeprefix(f"mustdrop::{op}: {argument}")
    assert rest[0] in " [", f"must name {argument}: {message}"
    assert len(rest) > 10, f"must describe the error: {message}"
    assert watch is None or watch.nothing_changed()
    assert message == (refusal(op, given) if expected is None else expected)


def test_table_is_complete():
    """The table covers every argument of every op except floats and bools, which accept any value."""
    assert set(TABLE) == set(OPS)
    for op in OPS:
        arguments = getattr(torch.ops.mustdrop, op).default._schema.arguments
        able = {a.name for a in arguments if str(a.type) not in ("float", "bool")}
        assert set(TABLE[op]) == able


@pytest.mark.parametrize("op", OPS)
def test_the_sample_is_accepted(backend, op):
    getattr(backend, op)(**sample(op, backend.device))


@pytest.mark.parametrize(("op", "argument", "wrong"), ROWS)
def test_refused(backend, op, argument, wrong):
    expect_refusal(getattr(backend, op), op, argument, broken(op, argument, wrong, backend.device))


@pytest.mark.parametrize(("op", "argument", "changes"), TOGETHER)
def test_refused_together(backend, op, argument, changes):
    expect_refusal(getattr(backend, op), op, argument, broken_together(op, changes, backend.device))


@pytest.mark.parametrize("op", OPS)
def test_the_same_argument_is_refused_first(backend, op):
    """Two invalid arguments at once, every pair of rows: all backends check in the reference backend's order."""
    rows = [(argument, wrong) for argument, ways in TABLE[op].items() for wrong in ways]
    for (first_name, first_wrong), (second_name, second_wrong) in itertools.combinations(rows, 2):
        if first_name == second_name:
            continue
        given = broken(op, first_name, first_wrong, backend.device)
        given[second_name] = TABLE[op][second_name][second_wrong](given.get(second_name))
        expected = refusal(op, given)
        if expected is None:  # two changes that are consistent with each other
            continue
        with pytest.raises(RuntimeError) as refused:
            getattr(backend, op)(**given)
        assert str(refused.value) == expected, (first_name, first_wrong, second_name, second_wrong)


@pytest.mark.parametrize("op", OPS)
def test_refused_on_fakes(op, device):
    """The whole table on fake tensors, except for errors that depend on addresses."""
    mode = FakeTensorMode()

    def fake(t: Any) -> Any:
        if isinstance(t, list):
            return [fake(item) for item in t]
        return mode.from_tensor(t) if isinstance(t, torch.Tensor) else t

    rows = [
        (argument, broken(op, argument, wrong, device))
        for o, argument, wrong in ROWS
        if o == op and "twice" not in wrong
    ]
    rows += [(argument, broken_together(op, changes, device)) for o, argument, changes in TOGETHER if o == op]
    for argument, given in rows:
        expected = refusal(op, given)
        with mode:
            fakes = {name: fake(v) for name, v in given.items()}
            expect_refusal(getattr(mustdrop_kernels, op), op, argument, fakes, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@pytest.mark.parametrize("op", OPS)
def test_tensors_on_another_device(backend, op):
    if backend.device != "cuda":
        pytest.skip("the second device is the CPU")
    for name, argument in sample(op, "cuda").items():
        if name in deciding(op):
            continue
        given = sample(op, "cuda")
        if isinstance(argument, torch.Tensor):
            given[name] = argument.cpu()
        elif isinstance(argument, list) and isinstance(argument[0], torch.Tensor):
            given[name] = [argument[0].cpu(), *argument[1:]]
        else:
            continue
        expect_refusal(getattr(backend, op), op, name, given)


def test_the_same_memory_as_key_and_value(backend):
    for op in ("compact_kv_", "compact_paged_kv_"):
        given = sample(op, backend.device)
        given["values"] = [given["values"][0], given["keys"][1], given["values"][2]]
        expect_refusal(getattr(backend, op), op, "values", given)


def test_positional_types_are_torchs_own_refusal(backend):
    """Arguments of types that the schema excludes never reach an op."""
    with pytest.raises((RuntimeError, TypeError)):
        torch.ops.mustdrop.select_topk("scores", None, 3)
    with pytest.raises((RuntimeError, TypeError)):
        torch.ops.mustdrop.gather_tokens(torch.zeros(1, 2, 3))
