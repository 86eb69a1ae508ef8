# SPDX-License-Identifier: Apache-2.0
"""The training script starts, stops, goes on to the same weights, and writes a model that loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from processes import output_of_python, run_python
from safetensors import safe_open
from safetensors.torch import load_file

SCRIPT = Path(__file__).resolve().parents[2] / "training" / "train.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="not in a source checkout")


TINY = ["--layers", "2", "--width", "32", "--vision-layers", "2", "--validation", "2", "--steps", "2"]


def train(out: Path, *words: str) -> None:
    output_of_python(SCRIPT, "--out", out, *TINY, *words)


def test_resumed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    train(tmp_path / "once")
    train(tmp_path / "twice", "--until", "language:1")
    assert not (tmp_path / "twice" / "model").exists()
    with safe_open(tmp_path / "twice" / "language.safetensors", "pt") as file:
        position = json.loads(file.metadata()["position"])
    assert (position["stage"], position["step"]) == (0, 1)
    train(tmp_path / "twice")
    once, twice = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("once", "twice"))
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert all(weight.dtype == torch.float16 for weight in once.values())
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in once, "the hub's names"

    lines = [json.loads(line) for line in (tmp_path / "once" / "log.jsonl").read_text().splitlines()]
    assert {line["task"] for line in lines} == {"tower", "language"}
    assert all(0 <= lines[-1][kind] <= 1 for kind in ("digit in colour", "presence", "all"))


INTERRUPTED = """
import os, pathlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may ignore it
sys.path.insert(0, str(pathlib.Path(sys.argv[1]).parent))
import {module} as module
def interrupted(tensors, path, metadata):
    pathlib.Path(path).write_bytes(b"half of it")
    os.kill(os.getpid(), signal.SIGINT)
module.save_file = interrupted
import train, typer
sys.argv = sys.argv[1:]
typer.run(train.main)
"""


@pytest.mark.parametrize("module", ["loop", "model"])  # who writes checkpoints, and the trained model
def test_ctrl_c_while_it_writes_leaves_nothing_half_written(tmp_path: Path, module: str) -> None:
    code = INTERRUPTED.format(module=module)
    done = run_python("-c", code, SCRIPT, "--out", tmp_path, *TINY)
    assert done.returncode not in (0, 1), done.stderr
    whole = {"loop": [], "model": ["language.safetensors", "log.jsonl", "tower.safetensors"]}[module]
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")) == whole
    if module == "model":
        train(tmp_path)
        assert (tmp_path / "model" / "model.safetensors").exists()


def test_help_says_what_it_does() -> None:
    assert "Train the small LLaVA" in output_of_python(SCRIPT, "--help")
