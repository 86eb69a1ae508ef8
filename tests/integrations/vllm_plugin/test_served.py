# SPDX-License-Identifier: Apache-2.0
"""The trained small model's questions through real vLLM with the plug-in, by the command that a user types."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.evaluation import datasets
from mustdrop_kernels.evaluation.results import read

SCRIPT = Path(__file__).resolve().parents[3] / "bench" / "served.py"
COUNT, SEED = 30, 8


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "served.json"
    command = [sys.executable, str(SCRIPT), "--count", str(COUNT), "--seeds", str(SEED), "--json", str(path)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=900)
    return read(path)


@pytest.mark.parametrize("method", ["full", "mustdrop-read", "mustdrop"])
def test_answers_equal_transformers(method, document, small_model):
    """With the same plan; the last one has key tokens."""
    asked = datasets.made("test", [SEED], COUNT).examples
    (cell,) = (cell for cell in document["cells"] if cell["method"] == method)
    assert cell["answers"] == [small_model.answer(e.text, e.picture(), cell["plan"]) for e in asked]
    assert cell["right"] == [int(got in e.answers) for got, e in zip(cell["answers"], asked, strict=True)]
    assert len(set(cell["answers"])) > 8


def test_64_tokens_keep_the_answers(document):
    """By the tokens that the engine held, not by those of the plan."""
    right, tokens, last = (
        {cell["method"]: sum(cell[name]) / len(cell[name]) for cell in document["cells"]}
        for name in ("right", "tokens", "last")
    )
    assert right["full"] > 0.9
    assert right["mustdrop-read"] > 0.8
    assert tokens == {"full": 576, "mustdrop-read": pytest.approx(64, abs=0.1), "mustdrop": pytest.approx(64, abs=0.1)}
    assert last["mustdrop-read"] == MustDropConfig.preset("small-64").budgets[-1]


def test_methods_that_the_plugin_does_not_know_are_refused():
    command = [sys.executable, str(SCRIPT), "--count", "1", "--methods", "tome"]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "served.py: tome has a first stage of its own, which the plug-in does not support" in done.stderr


def test_the_document_is_one_of_mustdrop_eval(document):
    from mustdrop_kernels.evaluation.summary import markdown

    assert "| `mustdrop-read` | 64 |" in markdown(document, "mustdrop-read", "what it costs")
