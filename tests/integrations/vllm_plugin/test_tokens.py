# SPDX-License-Identifier: Apache-2.0
"""vLLM's tokens equal those of the transformers integration with the same plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import engines
from engines import ASKS, BUDGETS, PLANS, SLOTS, engine, free_blocks, generate, ledger, scheduler

NEW = 20


@pytest.mark.parametrize("name", PLANS)
def test_tokens_equal_transformers(name, checkpoint, transformers_of):
    plan = PLANS[name]
    asks = ASKS if plan.get("merge") is False else ASKS[:4]  # transformers refuses a prompt in which nobody votes
    expected = [transformers_of.generate(ask, plan, NEW) for ask in asks]
    with engine(checkpoint, plan) as llm:
        free = free_blocks(llm)
        assert generate(llm, asks, NEW) == [tokens for tokens, _ in expected]
        # Each prompt gave back as many blocks as its dropped tokens had emptied, and all are free again.
        assert scheduler(llm).released_blocks == sum(dropped // SLOTS for _, dropped in expected)
        assert free_blocks(llm) == free
        for ask, (tokens, _) in zip(asks, expected, strict=True):
            assert generate(llm, [ask], NEW) == [tokens]
        assert generate(llm, asks[1:2], 1)  # a step after which the worker has heard of all that ended
        assert set(ledger(llm).lost.values()) == set()
    assert any(dropped > 0 for _, dropped in expected)


def test_drops_are_not_whole_blocks(transformers_of):
    """The plans above would also pass with rounding if every drop were a multiple of a block."""
    assert any(transformers_of.generate(ask, BUDGETS, NEW)[1] % SLOTS for ask in ASKS[:4])


def test_keep_all_equals_plain_vllm(checkpoint):
    with engine(checkpoint, None) as llm:
        plain = generate(llm, ASKS, NEW)
    plan = {"merge": False, "key_rate": 0.0, "global_threshold": 0.0, "individual_threshold": 0.0}
    with engine(checkpoint, {**plan, "pruning_layers": [1, 3]}) as llm:
        assert generate(llm, ASKS, NEW) == plain
        assert scheduler(llm).released_blocks == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_processes_of_their_own(ranks, checkpoint, transformers_of):
    """The engine core, and with two ranks the workers, each of which holds half of the heads."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < ranks:
        pytest.skip("each rank needs a core")
    program = (
        "import json, sys, engines\n"
        "if __name__ == '__main__':\n"
        f"    with engines.engine(sys.argv[1], engines.BUDGETS, tensor_parallel_size={ranks}) as llm:\n"
        f"        print('tokens', json.dumps(engines.generate(llm, engines.ASKS, {NEW})))\n"
    )
    here = Path(engines.__file__).parent
    script = checkpoint.parent / "own_process.py"
    script.write_text(program)
    paths = [str(here), str(here.parents[1]), *sys.path]
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cores[:ranks])),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    result = subprocess.run(
        [sys.executable, str(script), str(checkpoint)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    line = next(line for line in result.stdout.splitlines() if line.startswith("tokens "))
    expected = [transformers_of.generate(ask, BUDGETS, NEW)[0] for ask in ASKS]
    assert json.loads(line.removeprefix("tokens ")) == expected
