# SPDX-License-Identifier: Apache-2.0
"""Overhead of a decode step: no function of the package runs inside the layers if the model can run unchanged."""

from __future__ import annotations

import contextlib
import cProfile
import pstats
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny_models
from test_families import BUDGETS, ONE, PLAIN, generate, inputs_of, model_of
from test_static import STATIC

import mustdrop_kernels
from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.transformers import drop_tokens

PACKAGE = str(Path(mustdrop_kernels.__file__).parent)
KEEP_ALL = MustDropConfig.preset("keep-all", pruning_layers=(1, 3))
BUDGET = MustDropConfig(**PLAIN, **BUDGETS)
STEPS = 5
ENTRIES = {"passes.forward": 3, "passes._run_plain": 1, "passes._tokens": 1}
"""Of the model, of its body and of its language model."""


class Calls:
    """Counts calls of the package's functions during a step's forward pass."""

    def __init__(self, model):
        self.model, self.depth, self.passes = model, 0, 0
        self.inside: list[Counter[str]] = []

    def __call__(self, frame, event, argument):
        code = frame.f_code
        if code is type(self.model).__call__.__code__ and frame.f_locals.get("self") is self.model:
            if event == "call":
                self.inside.append(Counter())
            self.depth += {"call": 1, "return": -1}.get(event, 0)
        elif event == "call" and self.depth and code.co_filename.startswith(PACKAGE):
            self.inside[-1][f"{Path(code.co_filename).stem}.{code.co_name}"] += 1

    def __enter__(self):
        sys.setprofile(self)
        return self

    def __exit__(self, *error):
        sys.setprofile(None)


def ours_per_pass(rows, config, **settings):
    """Calls in the prompt's pass, then in each step."""
    model, inputs = model_of("llava"), inputs_of("llava", rows)
    with drop_tokens(model, config):
        generate(model, inputs, max_new_tokens=2, **settings)  # after another prompt
        with Calls(model) as calls:
            generate(model, inputs, max_new_tokens=STEPS, **settings)
    assert len(calls.inside) == STEPS
    return calls.inside


@pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    ("rows", "config"),
    [([[9], [4]], BUDGET), (ONE, KEEP_ALL), (ONE, BUDGET)],
    ids=["text alone", "image, all kept", "image, most dropped"],
)
def test_nothing_of_ours_runs_in_a_step(rows, config, cache):
    first, *steps = ours_per_pass(rows, config, **cache)
    if len(rows[0]) > 1:
        assert sum(first.values()) > 40  # the counting works
    for name in ("layers.set", "layers._install"):  # hooks of layers with inputs of their own come with the first step
        steps[0].pop(name, None)
    for step in steps:
        # Layer 0, before the first pruning layer, holds more than the others; a static cache's has a mask of its own.
        own = {"decode.replace_inputs": 1} if config is BUDGET and cache and len(rows[0]) > 1 else {}
        assert {name: step.pop(name) for name in ENTRIES} == ENTRIES
        methods = {name.split(".")[1] for name in step.keys() - own.keys()}
        assert methods <= {"update", "get_seq_length", "get_mask_sizes"}, step  # of the cache's layers
        assert step["decode.replace_inputs"] == own.get("decode.replace_inputs", 0)


def test_layers_enter_nothing_of_ours():
    """A growing cache adds no call to any of them."""
    for rows, config in (([[9], [4]], BUDGET), (ONE, KEEP_ALL), (ONE, BUDGET)):
        _, *steps = ours_per_pass(rows, config)
        ours = [step.total() - sum(ENTRIES.values()) for step in steps]
        assert max(ours) < tiny_models.LAYERS, steps


def calls_per_step(rows, config=None):
    """Of all functions, Python's and C's: what ten steps more have more."""
    model, inputs = model_of("llava"), inputs_of("llava", rows)
    counts = []
    with drop_tokens(model, config) if config else contextlib.nullcontext():
        for steps in (2, 2, 12):  # the first warms up
            with cProfile.Profile() as profile:
                generate(model, inputs, max_new_tokens=steps)
            counts.append(pstats.Stats(profile).total_calls)
    return (counts[2] - counts[1]) / 10


@pytest.mark.parametrize(("rows", "config"), [([[9], [4]], BUDGET), (ONE, KEEP_ALL)], ids=["text alone", "all kept"])
def test_a_step_makes_a_handful_of_calls_more(rows, config):
    """Whatever the number of layers; a whole step makes thousands."""
    plain, ours = calls_per_step(rows), calls_per_step(rows, config)
    assert plain > 500
    assert ours - plain < 25
