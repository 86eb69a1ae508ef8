# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C during ``mustdrop demo``, ``bench`` and ``eval``: nothing half-written, and what was there before stays."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import matplotlib.figure
import pytest
from example import QUICK
from processes import run_python

from mustdrop_kernels.cli import demo


@pytest.fixture
def interrupted_drawing(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Ctrl-C in the middle of the first picture."""
    begun: list[Path] = []

    def savefig(figure: object, path: Path, **options: object) -> None:
        begun.append(Path(path))
        Path(path).write_bytes(b"half a pict")
        raise KeyboardInterrupt

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return begun


def files_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_demo(
    interrupted_drawing: list[Path],
    mustdrop: Callable,
    checkpoint: Path,
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / demo.PICTURE).write_bytes(b"an older picture")
    monkeypatch.setattr(demo, "_REPEATS", 1)
    words = ["--model", checkpoint, "--image", picture, "--preset", "keep-all", "--max-new-tokens", 1]
    result = mustdrop("demo", *words, "--out", tmp_path)
    assert result.exit_code != 0
    assert len(interrupted_drawing) == 1
    assert files_in(tmp_path) == [demo.PICTURE]
    assert (tmp_path / demo.PICTURE).read_bytes() == b"an older picture"


def test_bench(interrupted_drawing: list[Path], mustdrop: Callable, tmp_path: Path) -> None:
    written = tmp_path / "bench.json"
    older = Path(__file__).parents[2] / "bench" / "results" / "cpu" / "llava-1.5.json"
    result = mustdrop("bench", "ops", "--load", older, "--json", written, "--plot", tmp_path / "pictures")
    assert result.exit_code != 0
    assert len(interrupted_drawing) == 1
    assert files_in(tmp_path) == ["bench.json"]
    assert json.loads(written.read_text())["rows"], "what was finished is whole"


SIGNAL_WHILE_TIMING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may ignore it
from mustdrop_kernels.bench import timing
real, calls = timing.__dict__[{name!r}], []
def interrupted(*args, **kwargs):
    calls.append(args)
    if len(calls) > {finished}:
        os.kill(os.getpid(), signal.{signal})
    return real(*args, **kwargs)
import mustdrop_kernels.bench.run as run
for module in (timing, run):
    if hasattr(module, {name!r}):
        setattr(module, {name!r}, interrupted)
from mustdrop_kernels.cli import main
words = "bench ops {ops} --shapes tiny --quick --baselines none --json".split()
sys.argv = ["mustdrop", *words, sys.argv[1]]
main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("finished", [0, 1])
def test_a_real_signal_while_timing(name: str, finished: int, tmp_path: Path) -> None:
    """Finished cases are kept; without any, an older document stays."""
    path = tmp_path / "bench.json"
    path.write_text("older")
    code = SIGNAL_WHILE_TIMING.format(name="interleaved", ops=" ".join(QUICK[:2]), finished=finished, signal=name)
    done = run_python("-c", code, path)
    assert done.returncode == 130, done.stderr
    assert files_in(tmp_path) == ["bench.json"]
    if finished:
        assert {row["op"] for row in json.loads(path.read_text())["rows"]} == {QUICK[0]}
    else:
        assert path.read_text() == "older"


SIGINT_WHILE_ASKING = """
import functools, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may ignore it
from mustdrop_kernels.evaluation import run
real, asked = run._ask, []
def interrupted(*args):
    asked.append(args)
    if len(asked) == 6:  # in the middle of the second batch
        os.kill(os.getpid(), signal.SIGINT)
    return real(*args)
if sys.argv.pop(1) == "interrupted":
    run._ask = interrupted
run.run = functools.partial(run.run, every_s=0.0)
from mustdrop_kernels.cli import main
main()
"""


def test_a_real_signal_while_questions_are_asked(tmp_path: Path) -> None:
    def evaluate(how: str, path: Path) -> subprocess.CompletedProcess[str]:
        words = "eval --count 6 --batch 2 --seeds 0 --methods random,cls,mustdrop --budgets 64 --no-layers --json"
        return run_python("-c", SIGINT_WHILE_ASKING, how, *words.split(), path)

    path = tmp_path / "eval.json"
    done = evaluate("interrupted", path)
    assert done.returncode in (130, -signal.SIGINT), done.stderr
    assert files_in(tmp_path) == ["eval.json"]
    assert [len(cell["right"]) for cell in json.loads(path.read_text())["cells"]] == [2, 2, 2, 2]

    whole = tmp_path / "whole.json"
    assert evaluate("undisturbed", path).returncode == evaluate("undisturbed", whole).returncode == 0
    for one, other in zip(json.loads(path.read_text())["cells"], json.loads(whole.read_text())["cells"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
