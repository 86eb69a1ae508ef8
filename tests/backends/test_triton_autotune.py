# SPDX-License-Identifier: Apache-2.0
"""MUSTDROP_AUTOTUNE=1: the search, its results and their file; with a fake clock."""

from __future__ import annotations

import json

import pytest
import torch
from example import SIMPLE, simple_arguments

import mustdrop_kernels
from mustdrop_kernels.backends import triton as backend

if not backend.interpreted() or backend.version() is None:
    pytest.skip("runs with TRITON_INTERPRET=1", allow_module_level=True)

import triton

from mustdrop_kernels.backends.triton import autotune, configs, gather
from mustdrop_kernels.backends.triton.launch import Plans

KEY = ("cpu", "gather", "narrow")
OPERATOR = getattr(gather, SIMPLE)
TRIED = (configs.shipped(KEY), *configs.CANDIDATES["gather"])
BEST = TRIED[3]


@pytest.fixture
def measured(monkeypatch, tmp_path) -> list[configs.Config]:
    """The configurations that were timed, in order; BEST is twice as fast as all others."""
    found: list[configs.Config] = []

    def measure(run):
        run()
        found.append(configs.TUNED[KEY])
        return 1.0 if configs.TUNED[KEY] == BEST else 2.0

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(configs, "TUNED", {})
    monkeypatch.setattr(configs, "SEEN", set())
    monkeypatch.setattr(autotune, "measure", measure)
    Plans.forget_all()
    yield found
    Plans.forget_all()


def call(operator) -> None:
    x = torch.randn(1, 9, 4)
    assert torch.equal(operator(*simple_arguments(x, 1, 5, 7)), x[:, [1, 5, 7]])


def new_process():
    """Configurations that a new process would use."""
    configs.TUNED.clear()
    configs.SEEN.clear()
    Plans.forget_all()
    return autotune.tuned(OPERATOR)


def test_the_fastest_is_kept_and_remembered(measured):
    operator = autotune.tuned(OPERATOR)
    call(operator)
    assert tuple(measured) == TRIED
    assert configs.TUNED == {KEY: BEST}
    call(operator)
    assert len(measured) == len(TRIED), "a tuned entry is not searched again"
    call(new_process())
    assert configs.TUNED == {KEY: BEST}
    assert len(measured) == len(TRIED)


def test_the_file_is_of_this_version(measured, monkeypatch):
    """Results of other versions of this package or of Triton are not used."""
    call(autotune.tuned(OPERATOR))
    name = autotune.cache_file().name
    assert mustdrop_kernels.__version__ in name
    assert triton.__version__ in name
    monkeypatch.setattr(triton, "__version__", "99.0.0")
    call(new_process())
    assert len(measured) == 2 * len(TRIED)


@pytest.mark.parametrize("text", ["{", "[]", '{"a/b/c": {}}', '{"a/b/c": 3}'])
def test_a_broken_file_is_searched_again(measured, text):
    file = autotune.cache_file()
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.warns(UserWarning, match="not read"):
        call(autotune.tuned(OPERATOR))
    assert tuple(measured) == TRIED
    assert list(json.loads(file.read_text())) == ["/".join(KEY)]


def test_the_file_changes_in_one_step(measured, monkeypatch):
    """The file is replaced atomically, and entries added by another process are kept."""
    call(autotune.tuned(OPERATOR))
    file = autotune.cache_file()
    before = file.read_text()
    other = {"gfx942/select/1024": {"tiles": {"BLOCK": 2048}, "num_warps": 8, "num_stages": 2}}
    file.write_text(json.dumps({**json.loads(before), **other}))
    inode = file.stat().st_ino
    autotune.save()
    assert file.stat().st_ino != inode
    assert set(json.loads(file.read_text())) == {"/".join(KEY), "gfx942/select/1024"}
    assert list(file.parent.iterdir()) == [file]


def test_a_candidate_that_fails_is_left_out(measured, monkeypatch):
    def fails_once(*args, **kwargs):
        if configs.TUNED.get(KEY) == TRIED[1]:
            raise RuntimeError("out of shared memory")
        return OPERATOR(*args, **kwargs)

    with pytest.warns(UserWarning, match="out of shared memory"):
        call(autotune.tuned(fails_once))
    assert tuple(measured) == (TRIED[0], *TRIED[2:])
    assert configs.TUNED == {KEY: BEST}


def test_nothing_is_searched_by_default(measured, monkeypatch):
    monkeypatch.delenv("MUSTDROP_AUTOTUNE", raising=False)
    call(backend.implementation(SIMPLE))
    assert not measured
    assert not autotune.cache_file().exists()
