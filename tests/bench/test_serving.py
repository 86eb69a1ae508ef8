# SPDX-License-Identifier: Apache-2.0
"""`mustdrop bench serving` without vLLM; tests/integrations/vllm_plugin runs it."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from mustdrop_kernels.bench import serving, serving_engine, smaller_images
from mustdrop_kernels.config import MustDropConfig

transformers = pytest.importorskip("transformers")

# ------------------------------------------------------------------------------------------------ what would be done


@pytest.fixture
def dry_run(mustdrop, monkeypatch):
    """Function: (engine arguments by arm, the lines after them) of a dry run on a device."""

    def run(*words: str, device: str = "cpu") -> tuple[dict[str, dict], list[str]]:
        monkeypatch.setattr(serving, "platform", lambda: device)
        lines = mustdrop("bench", "serving", "--dry-run", *words).stdout.splitlines()
        arms = {name: json.loads(text) for name, text in (line.split(" ", 1) for line in lines if "{" in line)}
        return arms, lines[len(arms) :]

    return run


def test_dry_run_says_what_the_arms_are(dry_run):
    arms, (rounds,) = dry_run("--rounds", "2", "--concurrency", "1,4", "--model", "tiny")
    assert list(arms) == ["full", "dropped", "smaller"]
    assert arms["dropped"].pop("hf_overrides")["mustdrop"] == {"preset": "budget-128"}
    assert arms["full"] == arms["dropped"], "they differ in dropping alone"
    for name in ("hf_overrides", "mm_processor_kwargs"):
        arms["smaller"].pop(name)
    assert arms["full"] == arms["smaller"], "they differ in the size of the images alone"
    assert arms["full"]["model"] == "tiny"
    assert arms["full"]["load_format"] == "dummy"
    assert rounds == "2 rounds of [1, 4] requests in flight after a warm-up: 108 requests"
    plan = {"merge": False, "budgets": [1], "pruning_layers": [0]}
    assert dry_run("--plan", json.dumps(plan))[0]["dropped"]["hf_overrides"]["mustdrop"] == plan


def test_on_a_cpu(dry_run):
    arms, (rounds,) = dry_run()
    for arguments in arms.values():
        assert arguments["model"] == "llava-1.5-shallow"
        assert arguments["enforce_eager"]
        assert arguments["max_num_seqs"] == 32
        assert "gpu_memory_utilization" not in arguments
    assert arms["dropped"]["hf_overrides"]["mustdrop"]["pruning_layers"] == [1, 3, 5], "a plan for 12 layers"
    assert "[1, 8, 32] requests in flight" in rounds


def test_on_a_gpu_it_has_graphs_shares_of_memory_and_128_in_flight(dry_run):
    arms, (rounds,) = dry_run(device="cuda")
    assert len(arms) == 3
    for arguments in arms.values():
        assert arguments["model"] == "llava-1.5-7b"
        assert arguments["gpu_memory_utilization"] == 0.28
        assert arguments["max_num_seqs"] == 128
        assert arguments["dtype"] == "auto"
        assert not arguments.keys() & serving.ON_CPU.keys(), "vLLM's defaults: graphs, block size, batch size, pool"
    assert "[1, 8, 32, 128] requests in flight" in rounds
    two, _ = dry_run("--plan", '{"preset": "64"}', device="cuda")
    assert [arguments["gpu_memory_utilization"] for arguments in two.values()] == [0.42, 0.42]


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_it_says_what_is_missing(mustdrop):
    result = mustdrop("bench", "serving")
    assert result.exit_code == 2
    assert "mustdrop: serving needs vLLM" in result.output


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("budget-128", "--plan is not JSON"),
        ('"budget-128"', "--plan must be a JSON object"),
        ('{"budget": 3}', "unknown field(s) budget"),
    ],
)
def test_a_plan_must_be_valid(mustdrop, plan, message):
    result = mustdrop("bench", "serving", "--dry-run", "--plan", plan)
    assert result.exit_code == 2
    assert message in result.output


def test_requests_in_flight_are_at_least_one(mustdrop):
    result = mustdrop("bench", "serving", "--dry-run", "--concurrency", "1,0")
    assert result.exit_code == 2
    assert "--concurrency must be numbers of at least 1, got 0" in result.output


def test_a_model_must_be_there(mustdrop, tmp_path):
    result = mustdrop("bench", "serving", "--dry-run", "--model", str(tmp_path / "none"))
    assert result.exit_code == 2
    assert f"mustdrop: --model {tmp_path / 'none'}: " in result.output


def test_a_configuration_is_a_checkpoint_without_weights(tmp_path):
    from mustdrop_kernels.bench.random_llava import MODELS, save_without_weights

    save_without_weights(tmp_path, MODELS["llava-1.5-narrow"])
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.text_config.num_hidden_layers, config.architectures) == (32, ["LlavaForConditionalGeneration"])
    assert not list(tmp_path.glob("*.safetensors"))
    assert image_tokens(tmp_path, config) == 576


def image_tokens(folder, config, **arguments) -> int:
    inputs = transformers.AutoProcessor.from_pretrained(folder)(
        images=serving_engine.picture(0), text=serving_engine.PROMPT, return_tensors="pt", **arguments
    )
    return int((inputs["input_ids"] == config.image_token_index).sum())


# ------------------------------------------------------------------------------------------------ smaller images


@pytest.mark.parametrize(("preset", "grid"), [("budget-192", 14), ("budget-128", 11), ("budget-64", 8)])
def test_smaller_images_have_the_nearest_number_of_tokens(preset, grid, tmp_path):
    """196, 121 and 64 for means of 192, 128 and 64; the processor takes the arguments."""
    from mustdrop_kernels.bench.random_llava import MODELS, save_without_weights

    config = MODELS["llava-1.5-7b"].config()
    smaller = smaller_images.smaller_images(config, MustDropConfig.preset(preset), random_weights=True)
    assert (smaller.tokens, smaller.mean_tokens) == (grid**2, float(preset.removeprefix("budget-")))
    assert smaller.arguments["hf_overrides"] == {"vision_config": {"image_size": 14 * grid}}
    save_without_weights(tmp_path, MODELS["llava-1.5-7b"])
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert image_tokens(tmp_path, config, **smaller.arguments["mm_processor_kwargs"]) == grid**2


def test_smaller_images_are_left_out_where_weights_are_given(dry_run, tmp_path):
    from mustdrop_kernels.bench.random_llava import MODELS, save_without_weights

    save_without_weights(tmp_path, MODELS["tiny"])
    arms, (reason, _) = dry_run("--model", str(tmp_path))
    assert list(arms) == ["full", "dropped"]
    assert "load_format" not in arms["full"]
    assert reason == "smaller images are left out: the position embeddings of this model fix the size of its images"


def test_smaller_images_are_left_out_where_their_number_is_unknown(dry_run):
    arms, (reason, _) = dry_run("--plan", '{"preset": "64"}')
    assert list(arms) == ["full", "dropped"]
    assert "left out: thresholds keep a number of tokens that depends on the picture" in reason


def test_another_family_adds_its_way(dry_run, monkeypatch, tmp_path):
    transformers.LlavaNextConfig().save_pretrained(tmp_path)
    arms, (reason, _) = dry_run("--model", str(tmp_path))
    assert list(arms) == ["full", "dropped"]
    assert "no engine arguments are known that make the images of a 'llava_next' model smaller" in reason
    found = smaller_images.Smaller(100, 101.0, {"mm_processor_kwargs": {"max_pixels": 100 * 28**2}})
    monkeypatch.setitem(smaller_images.WAYS, "llava_next", lambda config, plan, random_weights: found)
    arms, (_,) = dry_run("--model", str(tmp_path))
    assert arms["smaller"] == arms["full"] | found.arguments


# ------------------------------------------------------------------------------------------------ a measurement


class FakeEngine:
    """An engine in which a step takes a second and gives each running request a token.

    A prompt takes 10 blocks, of which 6 are free after its first token. With ``ahead`` the tokens of a step come out of
    the next one, as with asynchronous scheduling.
    """

    def __init__(self, clock: SimpleNamespace, ahead: bool) -> None:
        self.clock, self.ahead, self.before = clock, ahead, []
        self.most = 1000  # tokens of an answer
        self.running: list[SimpleNamespace] = []
        self.prompts: list[dict] = []
        self.schedule = lambda: list(self.running)
        block_pool = SimpleNamespace(num_gpu_blocks=101, get_num_free_blocks=lambda: 100 - self.blocks())
        self.kv_cache_manager = SimpleNamespace(block_pool=block_pool)
        core = SimpleNamespace(scheduler=self)
        self.llm_engine = SimpleNamespace(
            engine_core=SimpleNamespace(engine_core=core), add_request=self.add_request, step=self.step
        )
        self.renderer = SimpleNamespace(render_cmpl=self.render)

    def blocks(self) -> int:
        return sum(4 if request.num_output_tokens else 10 for request in self.running)

    def render(self, prompts):
        self.prompts += [prompt["multi_modal_data"]["image"] for prompt in prompts]
        return [{"prompt_token_ids": [0] * 50} for _ in prompts]

    def add_request(self, name, prompt, sampling):
        self.running.append(
            SimpleNamespace(request_id=name, num_output_tokens=0, most=min(self.most, sampling.max_tokens))
        )

    def step(self):
        planned = self.schedule()
        self.clock.now += 1.0
        ready, self.before = (self.before, planned) if self.ahead else (planned, [])
        outputs = []
        for request in ready:
            if request in self.running:
                request.num_output_tokens += 1
                finished = request.num_output_tokens == request.most
                outputs.append(SimpleNamespace(request_id=request.request_id, finished=finished))
                if finished:
                    self.running.remove(request)
        return outputs


@pytest.fixture
def meter(monkeypatch):
    """Function: a meter of a fake engine, and the engine."""

    def build(ahead: bool):
        clock = SimpleNamespace(now=0.0)
        monkeypatch.setattr(serving_engine.time, "perf_counter", lambda: clock.now)
        monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
        engine = FakeEngine(clock, ahead)
        return serving_engine.Meter(engine), engine

    return build


@pytest.mark.parametrize("ahead", [False, True])
def test_what_a_measurement_counts(meter, ahead):
    """Two requests in flight: both read, then decode together, then the other two."""
    measured, _ = meter(ahead)
    found = measured.serve(concurrency=2, count=4, new_tokens=5)
    seconds = 12.0 if ahead else 10.0
    assert found == {
        "requests": 4, "prompt_tokens": 50, "seconds": seconds, "requests_per_s": 4 / seconds,
        "tokens_per_s": 20 / seconds, "first_token_s": 2.0 if ahead else 1.0, "between_tokens_s": 1.0,
        "peak_blocks": 20, "held_blocks": 8,
    }  # fmt: skip


def test_blocks_while_decoding_are_unknown_where_no_step_decodes(meter):
    """Each request ends with the step that reads its prompt."""
    measured, engine = meter(ahead=False)
    engine.most = 1
    assert measured.serve(concurrency=1, count=3, new_tokens=2)["held_blocks"] is None


def test_no_two_requests_have_the_same_picture(meter):
    measured, engine = meter(ahead=False)
    for _ in range(2):
        measured.serve(concurrency=2, count=3, new_tokens=2)
    assert len({picture.tobytes() for picture in engine.prompts}) == 6


class FakeArm:
    """Records in which order the arms are measured."""

    def __init__(self, arm: str, order: list) -> None:
        self.arm, self.order = arm, order

    def serve(self, *work):
        self.order.append((self.arm, *work))
        return {"seconds": 1.0}


def test_the_order_of_the_engines_alternates():
    order: list = []
    arms = [FakeArm(arm, order) for arm in ("full", "dropped", "smaller")]
    options = serving.Options(concurrency=(1, 8), rounds=2, new_tokens=3)
    course = serving.plan_course(options, "cpu")
    for number in (0, 1):
        rows = serving.one_round(number, arms, course, options, lambda what, share: None)
        assert [(row["round"], row["arm"], row["concurrency"]) for row in rows] == [
            (number, arm, in_flight) for arm, in_flight, *_ in order[-6:]
        ]
    one_way, other = ["full", "dropped", "smaller"], ["smaller", "dropped", "full"]
    assert [arm for arm, *_ in order] == [*one_way, *one_way, *other, *other]
    assert order[:6:3] == [("full", 1, 4, 3), ("full", 8, 16, 3)]


def test_an_engine_that_ends_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(serving, "run_engine", sys.exit)
    with (
        pytest.raises(serving.Refusal, match="the engine of the arm 'full' ended; its error is printed above"),
        serving.engines({"full": {}}, lambda what, share: None),
    ):
        pass


# ------------------------------------------------------------------------------------------------ its table


def document(**change) -> dict:
    machine = {"device": "cuda", "name": "Some GPU", "torch": "2.13.0", "torch_cuda": "13.0", "vllm": "0.32.0"}
    facts = {"pool_blocks": 100, "block_size": 16}
    return {
        "command": ["mustdrop", "bench"], "machine": machine, "model": "some", "dtype": "bfloat16",
        "arms": {"full": facts, "dropped": facts | {"pool_blocks": 90}, "smaller": facts},
        "vision_tokens": {"dropped": 128.0, "smaller": 121}, "left_out": None,
        "rows": [
            row(number, arm, factor)
            for number in (1, 2, 3)
            for arm, factor in (("full", 1), ("dropped", 2), ("smaller", 4))
        ],
        **change,
    }  # fmt: skip


def row(number: int, arm: str, factor: int, **change) -> dict:
    return {
        "round": number, "arm": arm, "concurrency": 128, "requests_per_s": 10.0 * factor * number,
        "tokens_per_s": 320.0 * factor * number, "first_token_s": 0.8 / factor / number,
        "between_tokens_s": 0.08 / factor / number, "peak_blocks": 40 // factor + number, "held_blocks": 40 // factor,
        **change,
    }  # fmt: skip


def test_the_table_has_medians_and_ratios_within_a_round():
    sheet = serving.sheet(document())
    assert sheet.columns == [
        "in flight", "image tokens", "requests/s", "tokens/s", "first token", "between tokens", "blocks at most",
        "while decoding",
    ]  # fmt: skip
    assert [line[:2] for line in sheet.rows] == [["128", "all"], ["128", "dropped"], ["128", "smaller images"]]
    full, dropped, smaller = sheet.rows
    assert full[2:] == ["20.00 ±25%", "640 ±25%", "400 ms ±33%", "40 ms ±33%", "43", "40"]
    assert [cell.split("(")[1] for cell in dropped[2:6]] == ["2.00x)"] * 4
    assert [cell.split("(")[1] for cell in smaller[2:6]] == ["4.00x)"] * 4
    assert dropped[6:] == ["23", "20"]
    assert sheet.note == (
        "some, bfloat16, Some GPU, CUDA 13.0, dropping keeps 128 vision tokens on average over the layers, "
        "smaller images have 121, pools of 100/90/100 blocks of 16 tokens, vLLM 0.32.0, torch 2.13.0; `mustdrop bench`"
    )


def test_the_table_without_smaller_images_gives_the_reason():
    two = [row(1, "full", 1), row(1, "dropped", 2, held_blocks=None)]
    sheet = serving.sheet(document(rows=two, vision_tokens=None, left_out="smaller images are left out: some reason"))
    assert [line[1] for line in sheet.rows] == ["all", "dropped"]
    assert sheet.rows[1][-1] == "-", "no step was seen in which no prompt was read"
    assert "smaller images are left out: some reason" in sheet.note
