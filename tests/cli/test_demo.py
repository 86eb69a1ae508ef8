# SPDX-License-Identifier: Apache-2.0
"""``mustdrop demo`` on its defaults and on a checkpoint, and everything that it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.evaluation.checkpoint import DEMO_SEED, SMALL, load_image, load_model, made_question
from mustdrop_kernels.evaluation.questions import items


@pytest.fixture(scope="module")
def default_run(mustdrop, as_json, tmp_path_factory):
    """`mustdrop demo --json`: the document and the folder."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    result = mustdrop("demo", "--json", "--out", out, "--max-new-tokens", 3)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return as_json(result), out


def test_default_run_asks_a_held_out_question(default_run) -> None:
    found, _ = default_run
    assert found["model"]["name"] == SMALL
    assert "none of it used in training" in found["image"]
    assert found["preset"] == "small-64"
    *_, question, truth = made_question(0)
    assert (found["prompt"], found["answers"]["right"]) == (question, truth)


def test_default_run_keeps_what_the_preset_says(default_run) -> None:
    found, _ = default_run
    config = MustDropConfig.preset("small-64")
    tokens = found["tokens"]
    assert tokens["patches"] == 576
    assert tokens["merged_windows"] == config.merged_windows(64)
    assert tokens["after_merge"] == 576 - 8 * tokens["merged_windows"]
    assert tokens["after_layer"] == {str(n): k for n, k in zip(config.pruning_layers, config.budgets, strict=True)}
    assert 63 < tokens["mean_per_layer"] <= 64


def test_default_run_saves_cache(default_run) -> None:
    found, _ = default_run
    plain, before, after = (found["kv_cache"][name] for name in ("plain", "before_stage_3", "after_stage_3"))
    assert plain["bytes"] > before["bytes"] > after["bytes"] > 0
    assert len(set(plain["lengths"])) == 1
    assert after["lengths"][-1] == plain["lengths"][-1] - 576 + MustDropConfig.preset("small-64").budgets[-1]


def test_default_run_times_and_answers(default_run) -> None:
    found, _ = default_run
    for way in ("plain", "mustdrop"):
        for what in ("prefill_ms", "decode_ms_per_token"):
            time = found["timing"][way][what]
            assert 0 < time["least"] <= time["median"] <= time["most"]
    assert found["answers"]["plain"] == found["answers"]["right"]
    assert found["answers"]["mustdrop"] == found["answers"]["right"], "with 64 tokens as with 576"
    assert found["answers"]["same_tokens"] == 2, "a word and the end"


def test_default_run_draws(default_run) -> None:
    found, out = default_run
    assert Path(found["files"]["picture"]).parent == out
    with Image.open(found["files"]["picture"]) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    height, width = pixels.shape[:2]
    assert width > 1500
    assert 0.8 < height / width < 1.4, "two rows of panels above the cache"
    assert len(np.unique(pixels @ [65536, 256, 1])) > 5000
    merged_windows = (0, 169, 189)
    assert (np.abs(pixels - merged_windows).sum(-1) < 30).sum() > 500


def test_default_run_writes_the_maps(default_run) -> None:
    found, _ = default_run
    written = json.loads(Path(found["files"]["report"]).read_text())
    image = written["prompts"][-1]["images"][0]
    assert np.shape(image["token_of_patch"]) == (24, 24)
    assert written["config"] == found["config"]


def test_background_merges_and_digits_do_not(default_run) -> None:
    found, _ = default_run
    image = json.loads(Path(found["files"]["report"]).read_text())["prompts"][-1]["images"][0]
    merged = np.zeros((24, 24), bool)
    for top, left, rows, columns in image["windows"]:
        merged[top : top + rows, left : left + columns] = True
    (item,) = items("test", DEMO_SEED, 1)
    covered = np.max([box.coverage() for box in item.scene().boxes], axis=0) > 0.9
    assert merged[~covered].mean() > 0.6
    assert merged[covered].mean() < 0.2


def test_checkpoint_in_words(mustdrop, checkpoint, picture, tmp_path) -> None:
    result = mustdrop(
        "demo", "--model", checkpoint, "--image", picture, "--prompt", "What is red?", "--out", tmp_path,
        "--max-new-tokens", 4,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for words in ("preset 192", "half_flat.png", "after layer 2", "after layer 6", "KV cache", "prefill", "decode"):
        assert words in result.stdout
    assert "after layer 10" not in result.stdout, "the model has 8 layers"
    assert "Right answer" not in result.stdout, "the right answer is unknown"
    assert "answer" in result.stdout
    assert (tmp_path / "mustdrop_demo.png").stat().st_size > 20_000


def test_checkpoint_with_another_preset(mustdrop, as_json, checkpoint, picture, tmp_path) -> None:
    words = ("--model", checkpoint, "--image", picture, "--out", tmp_path, "--max-new-tokens", 1, "--json")
    found = as_json(mustdrop("demo", "--preset", "keep-all", *words))
    assert found["tokens"]["after_layer"] == {"2": 144, "6": 144}
    assert found["answers"]["plain"] == found["answers"]["mustdrop"]
    assert found["kv_cache"]["plain"] == found["kv_cache"]["after_stage_3"]
    assert found["timing"]["plain"]["decode_ms_per_token"] is None, "one token, nothing to decode"
    assert found["model"]["name"] == str(checkpoint)


@pytest.fixture
def damaged(checkpoint, tmp_path) -> Path:
    shutil.copytree(checkpoint, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"no weights")
    return tmp_path / "damaged"


@pytest.fixture
def llama(tmp_path) -> Path:
    LlamaConfig().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--image", "{tmp}/none.png"], "there is no file"),
        (["--image", "{tmp}"], "cannot be read"),
        (["--image", "{tmp}/text.png"], "not an image"),
        (["--preset", "65"], "there is no '65'; there are 192, 128, 64, 64-strict, budget-192"),
        (["--backend", "none"], "there is no 'none'; there are cpu"),
        (["--backend", "cuda"], "it serves CUDA tensors"),
        (["--model", "{tmp}/nothing"], "cannot be loaded"),
        (["--model", "{tmp}/llama"], "is a 'llama' model"),
        (["--model", "{tmp}/damaged"], "cannot be loaded"),
        (["--out", "{tmp}/text.png"], "cannot be made"),
    ],
    ids=["no file", "folder", "no image", "preset", "backend", "device", "no model", "other model", "damaged", "out"],
)
def test_refusals_are_one_sentence(words, sentence, mustdrop, llama, damaged, tmp_path, monkeypatch) -> None:
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("the backend may serve here")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no pixels")
    result = mustdrop("demo", "--json", *(word.format(tmp=tmp_path) for word in words))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("mustdrop: ")
    assert result.stderr.count("\n") == 1
    assert sentence in result.stderr


@pytest.mark.parametrize("module", ["transformers", "matplotlib", "PIL"])
def test_missing_packages_are_one_sentence(module, mustdrop, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    result = mustdrop("demo", "--out", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.strip().endswith("pip install 'mustdrop_kernels[demo]'")


def test_without_scikit_image_another_picture_is_asked_for(mustdrop, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    result = mustdrop("demo", "--out", tmp_path)
    assert result.exit_code == 2
    assert "--image" in result.stderr


def test_zero_tokens_are_refused(mustdrop) -> None:
    assert mustdrop("demo", "--max-new-tokens", 0).exit_code == 2


def test_gray_and_transparent_pictures_are_read(tmp_path) -> None:
    for mode in ("L", "RGBA", "P", "CMYK"):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.new(mode, (20, 10)).save(tmp_path / f"{mode}.{suffix}")
        image, name = load_image(tmp_path / f"{mode}.{suffix}")
        assert (image.mode, image.size) == ("RGB", (20, 10))
        assert name == f"{mode}.{suffix}"


def test_another_seed_is_another_question() -> None:
    questions = [made_question(number)[2:] for number in range(4)]
    assert len(set(questions)) == 4
    assert questions == [made_question(number)[2:] for number in range(4)]


def test_prompt_and_picture_reach_the_model() -> None:
    subject = load_model(None, "cpu")
    image, _ = load_image(None)
    inputs = subject.inputs([image], "Which digit is in the red box?")
    ids = inputs["input_ids"][0]
    assert int((ids == subject.model.config.image_token_index).sum()) == 576
    text = subject.processor.tokenizer.decode(ids, skip_special_tokens=True)
    assert "which digit is in the red box ? assistant :" in text
    seen = subject.seen(inputs["pixel_values"])
    assert seen.shape == (336, 336, 3)
    # The tower's input is the middle of the photograph, 336 pixels high.
    middle = image.resize((round(image.width * 336 / image.height), 336))
    left = (middle.width - 336) // 2
    middle = np.asarray(middle.crop((left, 0, left + 336, 336))).astype(int)
    assert np.abs(middle - seen).mean() < 3
