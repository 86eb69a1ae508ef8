# SPDX-License-Identifier: Apache-2.0
"""An error anywhere during a pass leaves model, cache and registry unchanged.

Errors are injected at the entry of every function of ours that a prompt goes through (found by tracing one), and in
every module of the model.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from attached import everything_attached
from prompts import make_inputs
from test_context import generate
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mustdrop_kernels
from mustdrop_kernels import backends
from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.transformers import context, drop_tokens
from mustdrop_kernels.ops import registry

PACKAGE = str(Path(mustdrop_kernels.__file__).parent)
CONFIGS = {
    "thresholds": MustDropConfig(pruning_layers=(1, 3), merge_threshold=0.7),
    "budgets": MustDropConfig(pruning_layers=(1, 3), budgets=(60, 30)),
    "reference": MustDropConfig(pruning_layers=(1, 3), budgets=(60, 30), backend="reference"),
}


class Injected(Exception):
    """Raised by these tests only."""


class Tracer:
    """Counts the calls of our functions; raises at the entry of the n-th one of a function."""

    def __init__(self, fail_in: str | None = None, call: int = 1) -> None:
        self.fail_in, self.call = fail_in, call
        self.calls: Counter[str] = Counter()

    def __call__(self, frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and "<" not in code.co_name:
            name = f"{Path(code.co_filename).stem}.{code.co_qualname if hasattr(code, 'co_qualname') else code.co_name}"
            self.calls[name] += 1
            if name == self.fail_in and self.calls[name] == self.call:
                raise Injected(name)
        return None

    def __enter__(self):
        self.before = sys.gettrace()  # a coverage tracer, for instance
        sys.settrace(self)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)


def surroundings() -> tuple:
    """State outside of the model that a context must restore."""
    chosen = (registry._chosen.get(), registry._traced_choice)
    return dict(backends.registered()), chosen, sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()), len(context._active)


@pytest.mark.parametrize("name", ["budgets", *(pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS)])
def test_an_error_in_any_function_of_ours(name, sdpa, processor, request):
    """In its first call; in the slow matrix in its last one too."""
    exhaustive = request.node.get_closest_marker("slow") is not None
    config, inputs = CONFIGS[name], make_inputs(processor, "padded")
    settings = {"max_new_tokens": 2}
    plain = generate(sdpa, inputs, **settings)
    with drop_tokens(sdpa, config):
        dropped = generate(sdpa, inputs, **settings)
    before, around = everything_attached(sdpa), surroundings()
    with Tracer() as tracer, drop_tokens(sdpa, config):
        generate(sdpa, inputs, **settings)
    assert len(tracer.calls) > 40, f"the tracer has missed what a prompt goes through: {sorted(tracer.calls)}"

    for function, calls in tracer.calls.items():
        for call in {1, calls} if exhaustive else {1}:
            with Tracer(function, call) as tracing:
                try:
                    with drop_tokens(sdpa, config):
                        generate(sdpa, inputs, **settings)
                except Injected:
                    pass
                except Exception as error:  # an error of the package has the injected one as its cause
                    chain = [error, error.__cause__, error.__context__]
                    assert any(isinstance(link, Injected) for link in chain), function
                else:
                    assert tracing.calls[function] < call, f"{function}: the error was swallowed"
            assert everything_attached(sdpa) == before, f"{function}, call {call}: the model is not what it was"
            assert surroundings() == around, f"{function}, call {call}"
    assert torch.equal(generate(sdpa, inputs, **settings).sequences, plain.sequences)
    with drop_tokens(sdpa, config):
        assert torch.equal(generate(sdpa, inputs, **settings).sequences, dropped.sequences)


def raising(*args, **kwargs):
    raise Injected


def attached_inside(model):
    """`everything_attached`, where hooks are what they call: inside the context they come and go."""
    state, *others = everything_attached(model)
    for (name, key), value in state.items():
        if key.endswith(("forward_hooks", "forward_pre_hooks")):
            state[name, key] = [getattr(hook, "func", hook).__qualname__ for _, hook in value]
        elif "_hooks_" in key:
            state[name, key] = len(value) if isinstance(value, tuple) else value
    return [state, *others]


def test_an_error_in_any_module_of_the_model(sdpa, processor):
    """The language model's and the tower's; the context stays usable, and the next prompt is read as ever."""
    inputs, config = make_inputs(processor, "one"), CONFIGS["budgets"]
    before = everything_attached(sdpa)
    with drop_tokens(sdpa, config) as report:
        want = generate(sdpa, inputs, max_new_tokens=2).sequences
        inside = attached_inside(sdpa)
        for name, module in sdpa.named_modules():
            prompts = len(report.prompts)
            handle = module.register_forward_pre_hook(raising)
            raised = False
            try:
                generate(sdpa, inputs, max_new_tokens=2)
            except Injected:
                raised = True
            finally:
                handle.remove()
            if raised:
                assert attached_inside(sdpa) == inside, name
                assert len(report.prompts) - prompts <= 1, name
        assert torch.equal(generate(sdpa, inputs, max_new_tokens=2).sequences, want)
    assert everything_attached(sdpa) == before


# A conversation: the cache that was handed over.


@pytest.fixture
def conversation(sdpa, processor):
    """The first turn's ids and cache, and the second turn's inputs."""
    inputs = make_inputs(processor, "padded")
    with drop_tokens(sdpa, CONFIGS["budgets"]):
        first = generate(sdpa, inputs, max_new_tokens=3)
    more = processor.tokenizer([" car What?"] * 2, return_tensors="pt", add_special_tokens=False).input_ids
    ids = torch.cat([first.sequences, more], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, ids.shape[1] - inputs["attention_mask"].shape[1])], dim=1)
    return first.past_key_values, {"input_ids": ids, "attention_mask": mask.long()}


def contents(cache) -> list:
    tokens = [(entry.length, entry.counts.tolist()) for entry in cache.layer_tokens]
    layers = [(layer.keys.clone(), layer.values.clone(), layer.dropped) for layer in cache.layers]
    return [tokens, cache.prompt_length, cache.renumbered, layers]


def same_contents(a: list, b: list) -> bool:
    return a[:3] == b[:3] and all(
        torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) and x[2] == y[2] for x, y in zip(a[3], b[3], strict=True)
    )


@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize("layer", [0, 3, 7])
@pytest.mark.parametrize("way", ["generate", "forward"])
def test_a_cache_is_as_it_was(way, layer, call, sdpa, conversation):
    """Also after passes that went well; and the same turn goes on with it as if nothing had happened."""
    cache, turn = conversation
    if way == "forward":
        call = 1
    before, kept = contents(cache), copy.deepcopy(cache)
    seen = Counter()

    def fail_later(*args):
        seen["calls"] += 1
        if seen["calls"] == call:
            raise Injected

    def go_on(with_cache):
        if way == "generate":
            return sdpa.generate(**turn, past_key_values=with_cache, max_new_tokens=4, do_sample=False)
        done = with_cache.get_seq_length()
        new = {**turn, "input_ids": turn["input_ids"][:, done:]}
        with torch.no_grad():
            return sdpa(**new, past_key_values=with_cache).logits

    with drop_tokens(sdpa, CONFIGS["budgets"]):
        handle = sdpa.model.language_model.layers[layer].mlp.register_forward_pre_hook(fail_later)
        with pytest.raises(Injected):
            go_on(cache)
        handle.remove()
        assert same_contents(contents(cache), before)
        assert torch.equal(go_on(cache), go_on(kept))


def test_a_new_cache_is_empty_again(sdpa, processor):
    """The caller's own, given for a prompt whose reading fails in the last layer."""
    inputs = make_inputs(processor, "padded")
    with drop_tokens(sdpa, CONFIGS["budgets"]):
        cache = generate(sdpa, inputs, max_new_tokens=1).past_key_values
        cache.reset()
        handle = sdpa.model.language_model.layers[7].mlp.register_forward_pre_hook(raising)
        with pytest.raises(Injected):
            generate(sdpa, inputs, past_key_values=cache)
        handle.remove()
        assert cache.get_seq_length() == 0
        assert not cache.shortened
        want = generate(sdpa, inputs)
        assert torch.equal(generate(sdpa, inputs, past_key_values=cache).sequences, want.sequences)
