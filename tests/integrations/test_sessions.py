# SPDX-License-Identifier: Apache-2.0
"""Calls that outlive their context, calls inside calls, calls from several threads."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import threading

import pytest
import tiny_llava
import torch
from attached import everything_attached
from test_families import (
    BUDGETS,
    FEATURES,
    NEW_TOKENS,
    ONE,
    PLAIN,
    assert_same_bits,
    cache_of,
    generate,
    inputs_of,
    model_of,
)
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, pipeline

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.transformers import drop_tokens
from mustdrop_kernels.integrations.transformers.compat import STATIC_CACHE_GETTERS

CONFIGS = {
    "keep-all": MustDropConfig.preset("keep-all", pruning_layers=(1, 3)),
    "budgets": MustDropConfig(**PLAIN, **BUDGETS),
    "features": MustDropConfig(**{**PLAIN, **BUDGETS, **FEATURES}),
}
OTHER = [[5, ("picture", 0), 4]]
STATIC = {"cache_implementation": "static"}
"""generate() of transformers 4 keeps a static cache on the model, and Qwen2.5-VL the positions of the last prompt."""


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(params=["llava", "qwen2_5_vl"])
def model(request):
    return model_of(request.param)


@pytest.fixture
def llava():
    return model_of("llava")


# After the context


@pytest.mark.parametrize("within", ["nothing", "another context"])
def test_methods_taken_inside_run_the_model_s_own_code(config, within, llava):
    inputs, later = inputs_of("llava", ONE), inputs_of("llava", OTHER)
    plain, logits = generate(llava, inputs), llava(**inputs).logits
    before = everything_attached(llava)
    with drop_tokens(llava, config):
        ask = functools.partial(generate, llava)
        forward, body = llava.forward, llava.model.forward
        calls = [llava.generate, forward, body, llava.prepare_inputs_for_generation, llava.model.get_image_features]
    assert everything_attached(llava) == before
    around = drop_tokens(llava, CONFIGS["budgets"]) if within == "another context" else contextlib.nullcontext()
    with around as report:
        generated = calls[0](**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert torch.equal(generated, plain.sequences)
        assert torch.equal(forward(**inputs).logits, logits)
        assert body(**inputs).last_hidden_state.shape[1] == inputs["input_ids"].shape[1]
        features = calls[4](pixel_values=inputs["pixel_values"])
        assert not hasattr(features, "mustdrop")
        if report is not None:
            assert report.prompts == []
            generate(llava, later)
            assert len(report.prompts) == 1
    assert everything_attached(llava) == before
    assert_same_bits(ask(inputs), plain)


class Pause(StoppingCriteria):
    """Stops a generate() after its first token until ``go_on``."""

    def __init__(self):
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self, ids, scores, **kwargs):
        self.begun.set()
        assert self.go_on.wait(60)
        return torch.zeros(len(ids), dtype=torch.bool)


@pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("after", ["nothing", "another context"])
@pytest.mark.parametrize("rows", [ONE, None], ids=["one", "padded"])
def test_a_generate_that_outlives_its_context(rows, after, cache, config, llava):
    """What was shortened cannot go on; what was not goes on by the model's own code."""
    inputs = inputs_of("llava", rows)
    plain, before, pause, ended = generate(llava, inputs, **cache), everything_attached(llava), Pause(), []

    def work():
        try:
            ended.append(generate(llava, inputs, **cache, stopping_criteria=StoppingCriteriaList([pause])))
        except RuntimeError as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    with drop_tokens(llava, config):
        thread.start()
        assert pause.begun.wait(60)
    assert everything_attached(llava) == before
    around = drop_tokens(llava, CONFIGS["budgets"]) if after == "another context" else contextlib.nullcontext()
    with around as report:
        if report is not None:
            expected = generate(llava, inputs_of("llava", OTHER))
        pause.go_on.set()
        thread.join()
        if report is not None:
            assert_same_bits(generate(llava, inputs_of("llava", OTHER)), expected)
            assert len(report.prompts) == 2
    assert everything_attached(llava) == before
    if config is CONFIGS["keep-all"]:
        assert_same_bits(ended[0], plain)
    else:
        assert "only be continued inside drop_tokens" in str(ended[0])
    assert_same_bits(generate(llava, inputs, **cache), plain)


def test_what_was_replaced_inside_stays_replaced(llava):
    """By a wrapper of the caller's around ours: it stays, and reaches the model's own code."""
    inputs = inputs_of("llava", ONE)
    plain = generate(llava, inputs)
    with drop_tokens(llava, CONFIGS["budgets"]):
        ours = llava.generate
        llava.generate = lambda *args, **kwargs: ours(*args, **kwargs)
    try:
        assert "generate" in vars(llava)
        assert_same_bits(generate(llava, inputs), plain)
    finally:
        del llava.generate


def test_a_model_copied_inside_is_an_ordinary_one(llava):
    inputs = inputs_of("llava", ONE)
    plain = generate(llava, inputs)
    with drop_tokens(llava, CONFIGS["budgets"]) as report:
        twin = copy.deepcopy(llava)
        assert_same_bits(generate(twin, inputs), plain)
        assert report.prompts == []
        with drop_tokens(twin, CONFIGS["budgets"]) as own:
            first = generate(twin, inputs)
        assert_same_bits(generate(llava, inputs), first)
        assert (len(own.prompts), len(report.prompts)) == (1, 1)


# Calls inside calls


class Ask(LogitsProcessor):
    """Calls the model in each step of a generate()."""

    def __init__(self, call):
        self.call, self.answers = call, []

    def __call__(self, ids, scores):
        with torch.no_grad():
            self.answers.append(self.call())
        return scores


def calls(model, inputs):
    """Ways of calling a model on other inputs, each with one result."""
    text = {name: inputs[name][:, -4:] for name in ("input_ids", "attention_mask")}

    def continued():
        output = model(**inputs)
        token = output.logits[:, -1:].argmax(-1)
        return model(input_ids=token, past_key_values=cache_of(output)).logits

    yield lambda: model(**inputs).logits[:, -1]
    yield lambda: model(**text).logits
    yield lambda: torch.stack(generate(model, inputs, max_new_tokens=3).logits)
    yield lambda: torch.stack(generate(model, inputs, max_new_tokens=3, **STATIC).logits)
    yield continued


@pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("rows", [ONE, None], ids=["one", "padded"])
@pytest.mark.parametrize("kind", ["keep-all", "budgets"])
def test_calls_inside_generate(rows, cache, kind, model):
    """Each call is dropped and reported as if alone, and so is the generate() around them."""
    config = CONFIGS[kind]
    name = "llava" if model is model_of("llava") else "qwen2_5_vl"
    inputs, batch = inputs_of(name, rows), inputs_of(name)
    for other, way in [*((inputs_of(name, OTHER), way) for way in range(5)), (batch, 0)]:
        with drop_tokens(model, config) as report, torch.no_grad():
            vars(model).pop("_cache", None)  # kept by transformers 4.57: a longer static cache rounds differently
            expected, alone = list(calls(model, other))[way](), len(report.prompts)
            outer = generate(model, inputs, **cache)
            report.prompts.clear()
            ask = Ask(list(calls(model, other))[way])
            output = generate(model, inputs, **cache, logits_processor=LogitsProcessorList([ask]))
        assert_same_bits(output, outer)
        assert len(ask.answers) == NEW_TOKENS
        assert all(torch.equal(answer, expected) for answer in ask.answers), way
        assert len(report.prompts) == 1 + alone * NEW_TOKENS


@pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
def test_guidance(cache, config, llava):
    """transformers' own logits processor for guidance calls the model on the negative prompt in each step."""
    inputs, negative = inputs_of("llava", [[3, ("picture", 0), 8], [9]]), torch.full((2, 3), 20)
    settings = {"guidance_scale": 1.5, "negative_prompt_ids": negative, "output_scores": True, **cache}
    plain = generate(llava, inputs, **settings)
    with drop_tokens(llava, config) as report:
        output = generate(llava, inputs, **settings)
        alone = generate(llava, inputs, max_new_tokens=1, **cache)
    assert len(report.prompts) == 2
    assert torch.equal(output.logits[0], alone.logits[0])
    if config is CONFIGS["keep-all"]:
        assert_same_bits(output, plain)
    generated = output.sequences[:, inputs["input_ids"].shape[1] :]
    for step, (logits, scores) in enumerate(zip(output.logits, output.scores, strict=True)):
        with torch.no_grad():
            unguided = llava(input_ids=torch.cat([negative, generated[:, :step]], 1)).logits[:, -1].log_softmax(-1)
        torch.testing.assert_close(scores, 1.5 * (logits.log_softmax(-1) - unguided) + unguided, atol=1e-4, rtol=0)


def test_an_error_inside_a_call_inside_generate(llava):
    """The generate() around it goes on as if nothing had happened."""
    inputs, other = inputs_of("llava"), inputs_of("llava", OTHER)

    def fail():
        handle = llava.model.language_model.layers[2].mlp.register_forward_pre_hook(_raise)
        with contextlib.suppress(KeyError):
            llava(**other)
        handle.remove()

    with drop_tokens(llava, CONFIGS["budgets"]) as report:
        expected = generate(llava, inputs)
        output = generate(llava, inputs, logits_processor=LogitsProcessorList([Ask(fail)]))
    assert_same_bits(output, expected)
    assert len(report.prompts) == 2


def _raise(*args):
    raise KeyError("injected")


# Several threads


@pytest.fixture
def switching():
    """Threads take turns after a few bytecodes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
def test_threads_in_one_context(cache, config, model, switching):
    """Each gets what it would get alone, and the report has all of their prompts."""
    name = "llava" if model is model_of("llava") else "qwen2_5_vl"
    batches = [inputs_of(name, rows) for rows in (ONE, OTHER, [[9]])]
    found = [[] for _ in batches]

    def work(number):
        for _ in range(3):
            try:
                found[number].append(generate(model, batches[number], **cache))
            except Exception as error:
                found[number].append(error)

    with drop_tokens(model, config) as report:
        expected = [generate(model, inputs, **cache) for inputs in batches]
        report.prompts.clear()
        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for answers, want in zip(found, expected, strict=True):
        for answer in answers:
            assert not isinstance(answer, Exception), answer
            if STATIC_CACHE_GETTERS and cache:  # the bits depend on the size of the cache, and that on earlier calls
                assert torch.equal(answer.sequences, want.sequences)
                torch.testing.assert_close(answer.logits, want.logits, atol=1e-5, rtol=0)
            else:
                assert_same_bits(answer, want)
    assert len(report.prompts) == 6


# Models inside of something


class Adapter(nn.Module):
    """The interface of a PEFT model: it calls the forward of the model inside, without its hooks."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def get_base_model(self):
        return self.base_model

    def forward(self, *args, **kwargs):
        return self.base_model.forward(*args, **kwargs)

    def generate(self, **kwargs):
        return self.base_model.generate(**kwargs)


@pytest.mark.parametrize("wrap", [Adapter, nn.DataParallel, torch.compile, lambda model: Adapter(torch.compile(model))])
def test_wrapped_models(wrap, llava):
    inputs, config = inputs_of("llava", ONE), CONFIGS["budgets"]
    with drop_tokens(llava, config), torch.no_grad():
        expected, logits = generate(llava, inputs), llava(**inputs).logits
    wrapped = wrap(llava)
    with drop_tokens(wrapped, config) as report, torch.no_grad():
        assert torch.equal(wrapped(**inputs).logits, logits)
        if hasattr(wrapped, "generate"):
            assert_same_bits(generate(wrapped, inputs), expected)
    assert report.last.images[0].kept == {1: 30, 3: 10}


def test_a_peft_model(llava):
    """Adapters apply inside of a context, and may be switched there."""
    peft = pytest.importorskip("peft")
    inputs, config = inputs_of("llava"), CONFIGS["budgets"]
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with drop_tokens(llava, config), torch.no_grad():
        base = llava(**inputs).logits
    adapted = peft.get_peft_model(copy.deepcopy(llava), adapter).eval()
    merged = copy.deepcopy(adapted).merge_and_unload()
    with drop_tokens(merged, config), torch.no_grad():
        expected, logits = generate(merged, inputs), merged(**inputs).logits
    with torch.no_grad():
        plain = adapted(**inputs).logits
        with drop_tokens(adapted, config) as report:
            output = generate(adapted, inputs)
            torch.testing.assert_close(adapted(**inputs).logits, logits, atol=1e-4, rtol=0)
            with adapted.disable_adapter():
                assert torch.equal(adapted(**inputs).logits, base)
        with drop_tokens(adapted, CONFIGS["keep-all"]):
            assert torch.equal(adapted(**inputs).logits, plain)
        assert torch.equal(adapted(**inputs).logits, plain)
    assert torch.equal(output.sequences, expected.sequences)
    assert len(report.prompts) == 3
    assert (logits - base).abs().max() > 1e-2


def test_data_parallel_on_several_devices_is_refused(llava):
    wrapped = nn.DataParallel(llava)
    wrapped.device_ids = [0, 1]
    with pytest.raises(TypeError, match=r"pass the model inside \(\.module\)"):
        drop_tokens(wrapped, CONFIGS["budgets"]).__enter__()


def test_a_pipeline(models, processor, one):
    """One made before the context, or given instead of the model."""
    model = models["sdpa"]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    ask = {"images": tiny_llava.picture(0), "text": "USER: <image>\nWhat is in the image? ASSISTANT:"}
    settings = {"generate_kwargs": {"do_sample": False, "max_new_tokens": 4}}
    plain = pipe(**ask, **settings)[0]["generated_text"]
    config = MustDropConfig(pruning_layers=(1, 3), budgets=(20, 5))
    for given in (pipe, model):
        with drop_tokens(given, config) as report:
            text = pipe(**ask, **settings)[0]["generated_text"]
            ids = model.generate(**one, max_new_tokens=4, do_sample=False)
        assert len(report.prompts) == 2
        assert text.startswith("USER:")
        assert processor.decode(ids[0], skip_special_tokens=True).endswith(text[-5:])
    assert pipe(**ask, **settings)[0]["generated_text"] == plain


@pytest.mark.parametrize(
    ("name", "merge_at"), [("llava", "tower"), ("qwen2_5_vl", "features"), ("internvl", "features")]
)
def test_a_preset_by_name(name, merge_at):
    """Without the pruning layers that the model lacks; with merging after a tower that requires all patches."""
    model, inputs = model_of(name), inputs_of(name, ONE)
    with drop_tokens(model, "budget-64") as report:
        generate(model, inputs)
    expected = MustDropConfig.preset("budget-64", merge_at=merge_at).for_depth(6)
    assert report.config == expected
    with drop_tokens(model, expected) as other:
        generate(model, inputs)
    assert report.last.images[0].kept == other.last.images[0].kept
    with drop_tokens(model, "keep-all"):
        kept = generate(model, inputs)
    assert_same_bits(kept, generate(model, inputs))
    with pytest.raises(ValueError, match="no preset 'budget'; there are 192"):
        drop_tokens(model, "budget").__enter__()
