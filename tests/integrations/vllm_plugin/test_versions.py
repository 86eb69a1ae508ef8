# SPDX-License-Identifier: Apache-2.0
"""Versions of vLLM: others than the supported ones serve their own models, and refuse to drop tokens."""

from __future__ import annotations

import logging
import sys

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import vllm.version
from engines import BUDGETS, arguments
from servers import switched_on

from mustdrop_kernels.integrations import vllm as plugin
from mustdrop_kernels.integrations.vllm import beams
from mustdrop_kernels.integrations.vllm.settings import VARIABLE
from mustdrop_kernels.integrations.vllm.versions import check, problem

SUPPORTED = ["0.32.0", "0.32.0rc1", "0.32.1+cpu", "0.33.0", "0.33.0+cu129", "0.33.0.post1", "0.33.1.dev3+g4ba787ec9"]
REFUSED = ["0.9.2", "0.31.0", "0.31.1.dev7+g4ba787ec9", "0.34.0rc1", "0.34.0+cpu", "1.0", "1"]
WITHOUT_NUMBER = ["dev", "unknown", "0.1.dev1+g4ba787ec9"]
SENTENCE = r"mustdrop: vLLM 0\.31\.0 is not supported: install vllm>=0\.32,<0\.34"


def configure(checkpoint, plan):
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(**arguments(checkpoint, plan)).create_engine_config()


@pytest.fixture
def version(monkeypatch):
    return lambda text: monkeypatch.setattr(vllm.version, "__version__", text)


@pytest.fixture
def log():
    """Messages of the plug-in's logger, which may propagate or not, as vLLM configures it."""
    messages, handler, logger = [], logging.Handler(), logging.getLogger("vllm.mustdrop")
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.mark.parametrize("text", SUPPORTED + WITHOUT_NUMBER)
def test_supported(text):
    assert problem(text) is None


@pytest.mark.parametrize("text", REFUSED)
def test_not_supported(text):
    assert problem(text).startswith(f"mustdrop: vLLM {text} is not supported: install vllm>=0.32,<0.34")


def test_this_vllm_is_supported(log):
    check()
    assert not log


def test_another_version_serves_plain_models_only(checkpoint, version):
    version("0.31.0")
    plugin.register()
    assert configure(checkpoint, None).scheduler_config.scheduler_cls is None
    with pytest.raises(ValueError, match=SENTENCE):
        configure(checkpoint, BUDGETS)
    with switched_on("budget-64"), pytest.raises(ValueError, match=SENTENCE):
        configure(checkpoint, None)


def test_a_build_without_number_is_used_with_one_warning(version, log):
    version("dev")
    check()
    check()
    assert log == ["mustdrop: vLLM dev has no release number; the plug-in supports vllm>=0.32,<0.34"]


@pytest.mark.parametrize(("text", "times"), [("0.31.0", 0), ("0.33.0", 1)])
def test_requests_of_beam_search_are_marked_in_supported_versions(text, times, version, monkeypatch):
    calls = []
    monkeypatch.setattr(beams, "install", lambda: calls.append(True))
    version(text)
    plugin.register()
    assert len(calls) == times


@pytest.mark.parametrize(
    ("text", "sentence"), [("0.31.0", SENTENCE), ("0.33.0", r"mustdrop: vLLM 0\.33\.0 lacks a name")]
)
def test_missing_names_do_not_keep_vllm_from_starting(text, sentence, version, log, monkeypatch):
    """Unless the variable enables the plug-in: it would silently be without effect."""
    version(text)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models.config", None)
    plugin.register()
    assert len(log) == 1
    monkeypatch.setenv(VARIABLE, "budget-64")
    with pytest.raises(ValueError, match=sentence):
        plugin.register()
