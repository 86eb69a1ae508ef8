# SPDX-License-Identifier: Apache-2.0
"""torch.compile: decoding in one graph without a break, and models that the caller has compiled."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from test_families import ONE, assert_same_bits, cache_of, generate, inputs_of, model_of
from test_static import CONFIGS, STATIC, assert_same_tokens, own_cache
from torch._dynamo.utils import counters
from transformers import CompileConfig

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.transformers import drop_tokens

NAMES = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl", "internvl")
LONGER = dict(max_new_tokens=6)


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that runs what it is given, and counts how often it was given something, and a graph was run."""

    def __init__(self):
        self.compiled = self.runs = 0

    def __call__(self, graph, example_inputs):
        self.compiled += 1

        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run

    def __deepcopy__(self, memo):  # generate() copies its settings
        return self


def compiling(backend):
    """generate() compiles decoding on a GPU; here it is told to."""
    config = CompileConfig(fullgraph=True, backend=backend, mode=None, dynamic=None)
    config._compile_all_devices = True
    return {**STATIC, "compile_config": config}


def fresh(name):
    """generate() keeps what it has compiled on the model."""
    return copy.deepcopy(model_of(name))


def cases():
    """All in the slow matrix."""
    for name, kind in itertools.product(NAMES, ("eviction everywhere", "thresholds", "no eviction")):
        quick = name == "llava" or kind == "thresholds"
        yield pytest.param(name, kind, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("rows", [ONE, None], ids=["one", "padded"])
@pytest.mark.parametrize(("name", "kind"), [*cases()])
def test_decoding_is_one_graph(name, kind, rows):
    """Compiled once, in the first step after the prompt; fullgraph=True makes a break an error."""
    model, inputs, config = fresh(name), inputs_of(name, rows), MustDropConfig(**CONFIGS[kind])
    graphs = Graphs()
    with drop_tokens(model, config):
        expected = generate(model, inputs, **LONGER)
        assert_same_tokens(generate(model, inputs, **compiling(graphs), **LONGER), expected)
        steps = LONGER["max_new_tokens"] - 1
        assert (graphs.compiled, graphs.runs) == (1, steps)
        assert not counters["graph_break"]
        assert_same_tokens(generate(model, inputs, **compiling(graphs), **LONGER), expected)
        assert (graphs.compiled, graphs.runs) == (1, 2 * steps)


def test_other_prompts_and_configs_do_not_use_the_wrong_graph():
    """Layers with inputs of their own change from config to config, and with them the graph; then it is there."""
    model, graphs, cache = fresh("llava"), Graphs(), own_cache(model_of("llava"))
    settings = {**compiling(graphs), **LONGER}
    del settings["cache_implementation"]
    prompts = [inputs_of("llava", rows) for rows in (ONE, [[7, ("picture", 0), 3]], [[2, ("picture", 2), 9]])]

    def run(inputs, config):
        with drop_tokens(model, config):
            expected = generate(model, inputs, **LONGER)
            cache.reset()
            assert_same_tokens(generate(model, inputs, past_key_values=cache, **settings), expected)

    def plain(inputs):
        cache.reset()
        expected = generate(model, inputs, **LONGER)
        assert torch.equal(generate(model, inputs, past_key_values=cache, **settings).sequences, expected.sequences)

    kinds = [MustDropConfig(**CONFIGS[kind]) for kind in ("thresholds", "no eviction", "eviction everywhere")]
    for config in kinds:
        plain(prompts[0])
        run(prompts[0], config)
    compiled = graphs.compiled
    for inputs in prompts:
        plain(inputs)
        for config in kinds:
            run(inputs, config)
    assert graphs.compiled == compiled


@pytest.mark.parametrize("rows", [ONE, None], ids=["one", "padded"])
def test_positions_as_published(rows):
    model, inputs, graphs = fresh("llava"), inputs_of("llava", rows), Graphs()
    with drop_tokens(model, MustDropConfig(**CONFIGS["thresholds"], positions="published")):
        expected = generate(model, inputs, **LONGER)
        assert_same_tokens(generate(model, inputs, **compiling(graphs), **LONGER), expected)
    assert (graphs.compiled, graphs.runs) == (1, LONGER["max_new_tokens"] - 1)


def test_text_alone_runs_the_plain_graph():
    """A model compiled before the context works inside it."""
    model, inputs, graphs = fresh("llava"), inputs_of("llava", [[9]]), Graphs()
    plain = generate(model, inputs, **compiling(graphs), **LONGER)
    before = graphs.compiled
    with drop_tokens(model, MustDropConfig(**CONFIGS["thresholds"])):
        output = generate(model, inputs, **compiling(graphs), **LONGER)
    assert_same_bits(output, plain)
    assert graphs.compiled == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_inductor(name):
    model, inputs = fresh(name), inputs_of(name)
    with drop_tokens(model, MustDropConfig(**CONFIGS["thresholds"])):
        expected = generate(model, inputs, **LONGER)
        assert_same_tokens(generate(model, inputs, **compiling("inductor"), **LONGER), expected)
    assert not counters["graph_break"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("rows", [ONE, None], ids=["one", "padded"])
def test_decoding_in_a_cuda_graph(rows):
    """generate() compiles decoding with a static cache on a GPU, mode "reduce-overhead": one CUDA graph a step."""
    model = fresh("llava").cuda()
    inputs = {name: value.cuda() for name, value in inputs_of("llava", rows).items()}
    with drop_tokens(model, MustDropConfig(**CONFIGS["thresholds"])):
        expected = generate(model, inputs, **LONGER)
        for _ in range(3):  # warmed up, captured, replayed
            assert_same_tokens(generate(model, inputs, **STATIC, **LONGER), expected)


# Models that a user has compiled


def forward(model, graphs):
    model.forward = torch.compile(model.forward, backend=graphs)
    return model


def in_place(model, graphs):
    model.compile(backend=graphs)
    return model


def around(model, graphs):
    return torch.compile(model, backend=graphs)


def layers(model, graphs):
    for layer in model.model.language_model.layers:
        layer.forward = torch.compile(layer.forward, backend=graphs)
    return model


def layers_around(model, graphs):
    stack = model.model.language_model.layers
    for i, layer in enumerate(stack):
        stack[i] = torch.compile(layer, backend=graphs)
    return model


def layers_in_place(model, graphs):
    for layer in model.model.language_model.layers:
        layer.compile(backend=graphs)
    return model


WAYS = [forward, in_place, around, layers, layers_around, layers_in_place]


def ways():
    """All in the slow matrix; in the quick one the most telling."""
    for way, when, cache in itertools.product(WAYS, ("before", "within"), ("dynamic", "static")):
        quick = way in (forward, in_place, layers) and (when, cache) == ("before", "static")
        yield pytest.param(way, when, cache, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("way", "when", "cache"), [*ways()])
def test_compiled_by_the_user(way, when, cache):
    inputs, config, graphs = inputs_of("llava"), MustDropConfig(**CONFIGS["no eviction"]), Graphs()
    settings = {**STATIC, "disable_compile": True} if cache == "static" else {}
    with drop_tokens(model_of("llava"), config):
        expected = generate(model_of("llava"), inputs, **LONGER)
    model = fresh("llava")
    if when == "before":
        model = way(model, graphs)
        generate(model, inputs, **settings, **LONGER)  # so that something is compiled already
        with drop_tokens(model, config) as report:
            output = generate(model, inputs, **settings, **LONGER)
    else:
        with drop_tokens(model, config) as report:
            output = generate(way(model, graphs), inputs, **settings, **LONGER)
    assert_same_tokens(output, expected)
    assert report.last.final_cache.bytes < report.last.plain_cache.bytes


@pytest.mark.parametrize("way", WAYS)
def test_compiled_by_the_user_and_called(way):
    inputs, config, graphs = inputs_of("llava", ONE), MustDropConfig(**CONFIGS["thresholds"]), Graphs()
    model = way(fresh("llava"), graphs)
    with torch.no_grad():
        with drop_tokens(model_of("llava"), config):
            expected = model_of("llava")(**inputs)
        with drop_tokens(model, config):
            output = model(**inputs)
            torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=0)
            cache = cache_of(output)
            after = model(input_ids=output.logits[:, -1:].argmax(-1), past_key_values=cache)
        with drop_tokens(model_of("llava"), config):
            cache = cache_of(expected)
            want = model_of("llava")(input_ids=expected.logits[:, -1:].argmax(-1), past_key_values=cache)
    torch.testing.assert_close(after.logits, want.logits, atol=1e-4, rtol=0)


def test_a_compiled_function_around_the_model_is_refused():
    model, inputs = fresh("llava"), inputs_of("llava", ONE)
    call = torch.compile(lambda **given: model(**given).logits, backend="eager", fullgraph=True)
    with drop_tokens(model, MustDropConfig(**CONFIGS["thresholds"])), torch.no_grad():
        with pytest.raises(Exception, match="do not call the model inside a compiled function"):
            call(**inputs)
        first = generate(model, inputs)
        cache = cache_of(first)
        with pytest.raises(Exception, match="do not call the model inside a compiled function"):
            call(input_ids=torch.tensor([[40]]), past_key_values=cache)
