# SPDX-License-Identifier: Apache-2.0
"""tools/precompile_triton.py fills a cache in which another process finds all kernels, and says why where it cannot."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from processes import output_of_python, python_path, run_python

from mustdrop_kernels.backends import triton as backend

if backend.interpreted():
    pytest.skip("TRITON_INTERPRET is set: kernels are not compiled", allow_module_level=True)
if backend.version() is None:
    pytest.skip("triton is not installed", allow_module_level=True)

TOOLS = Path(__file__).resolve().parents[2] / "tools"
TESTS = "tests/ops/test_gather.py::test_position_ids_and_masks"
NAME = "triton-cache-sm90"
PATH = python_path(TOOLS, TOOLS.parent)


def fill(*arguments: object) -> str:
    return output_of_python(TOOLS / "precompile_triton.py", "--jobs=1", "--shapes=", *arguments, PYTHONPATH=PATH)


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> tuple[Path, Path]:
    """The folder with the archive, and the cache."""
    folder = tmp_path_factory.mktemp("triton")
    out, cache = folder / "out", folder / "cache"
    assert "; 0 were there already" in fill("--out", out, "--cache", cache, "--tests", TESTS)
    return out, cache


# The tests again, with the arguments that the operators make, through Triton's launch path.
AGAIN = f"""
import collections, json, precompile_triton
from mustdrop_kernels.backends.triton import precompile
seen = {{}}
with precompile.compiling("sm90", lambda folder, hit: seen.setdefault(folder.name, hit)):
    assert precompile_triton.run_tests({TESTS!r}) == []
print(json.dumps(seen))
"""


def test_another_process_finds_everything(filled):
    out, cache = filled
    document = json.loads((out / f"{NAME}.json").read_text())
    assert document["target"] == "sm90"
    assert document["multiprocessors"] == 132
    assert document["bytes"] == (out / document["archive"]).stat().st_size
    number = document["kernels"]
    assert number > 0
    shutil.rmtree(cache)
    unpacked = run_python(TOOLS / "triton_cache.py", out / f"{NAME}.json", PYTHONPATH=PATH)
    assert unpacked.stdout.strip() == str(cache)
    assert unpacked.stderr == ""
    assert {file.suffix for file in cache.rglob("*") if file.is_file()} == {".cubin", ".json"}
    seen = json.loads(output_of_python("-c", AGAIN, PYTHONPATH=PATH, TRITON_CACHE_DIR=str(cache)))
    assert len(seen) == number
    assert all(seen.values())
    once_more = fill("--out", out, "--cache", cache, "--tests", TESTS)
    assert f"{number} entries" in once_more
    assert f"; {number} were there already" in once_more


@pytest.fixture
def precompile(monkeypatch, capsys):
    """The command in this process: its status, and what it writes to standard output and standard error."""
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setenv("TRITON_CACHE_DIR", "is set")
    import precompile_triton

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["precompile_triton.py", "--jobs=1", *arguments])
        try:
            status = precompile_triton.main()
        except SystemExit as refused:
            status = refused.code
        return status, *capsys.readouterr()

    return run


def test_why_a_cache_is_not_used(filled, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(TOOLS))
    import triton_cache

    document = json.loads((filled[0] / f"{NAME}.json").read_text())
    file = tmp_path / "cache.json"
    monkeypatch.setattr(sys, "argv", ["triton_cache.py", str(file)])
    for change, reason in (
        ({"triton": "3.0.0"}, "triton: the cache was filled with '3.0.0', here is"),
        ({"triton_key": "0"}, "triton_key: the cache was filled with '0'"),
        ({"format": "another"}, "does not describe a cache"),
        ({}, "FileNotFoundError"),
    ):
        file.write_text(json.dumps({**document, "cache": str(tmp_path / "there"), **change}))
        assert triton_cache.main() == 1
        said = capsys.readouterr()
        assert "the Triton cache is not used: " in said.err
        assert reason in said.err
        assert said.out == ""


def test_dry_run(precompile, tmp_path):
    """Counts what the shapes of the benchmark launch, with each operator called at least once."""
    status, said, told = precompile("--dry-run", "--cache", str(tmp_path / "cache"), "--tests", "--shapes=tiny,tiny:2")
    assert status == 0
    assert "recorded: 2 of 2" in told
    numbers = dict(re.findall(r"(\w+) (\d+)(?:,|$)", said.partition(": ")[2]))
    assert {"scores_kernel", "map_kernel", "_dual_kernel", "_topk_kernel", "_gather_kernel", "_compact_kernel"} <= set(
        numbers
    )
    assert said.startswith(f"{sum(map(int, numbers.values()))} kernels: ")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--target=sm42", "--out=x"], "no target 'sm42'; there are sm80, sm90"),
        ([], "--out is missing"),
        (["--dry-run", "--tests", "tests/ops/test_nothing.py"], "no such tests: tests/ops/test_nothing.py"),
        (["--dry-run", "--shapes=llava-9"], "there is no shape 'llava-9'"),
        (["--dry-run", "--dtypes=int8"], "unknown dtypes ['int8']"),
    ],
    ids=str,
)
def test_what_is_refused(precompile, arguments, reason):
    status, _, told = precompile(*arguments)
    assert status == 2
    assert reason in told


def test_nothing_to_compile(precompile, tmp_path):
    """Tests that launch nothing are a mistake in the command."""
    out = tmp_path / "out"
    status, said, told = precompile("--out", str(out), "--tests", "--shapes=", "--cache", str(tmp_path / "cache"))
    assert (status, said) == (1, "0 kernels: \n")
    assert "WRONG: nothing was launched" in told
    assert not out.exists()


def test_without_triton(precompile, monkeypatch):
    monkeypatch.setattr(backend, "version", lambda: None)
    assert "triton is not installed" in precompile("--dry-run")[2]


def test_in_the_interpreter(precompile, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET is set" in precompile("--dry-run")[2]
