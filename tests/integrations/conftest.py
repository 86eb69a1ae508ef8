# SPDX-License-Identifier: Apache-2.0
"""A tiny LLaVA and prompts of every kind."""

from __future__ import annotations

import pytest
import tiny_llava
from prompts import PROMPTS, make_inputs


@pytest.fixture(autouse=True, scope="module")
def small_models(one_thread):
    """All tests of this folder run tiny models."""


@pytest.fixture(scope="session")
def processor():
    return tiny_llava.processor()


@pytest.fixture(scope="session")
def models():
    """One model per attention implementation, with the same weights."""
    return {attention: tiny_llava.model(attention=attention) for attention in ("sdpa", "eager")}


@pytest.fixture(params=["sdpa", "eager"])
def model(request, models):
    return models[request.param]


@pytest.fixture
def sdpa(models):
    return models["sdpa"]


@pytest.fixture(params=PROMPTS)
def inputs(request, processor):
    return make_inputs(processor, request.param)


@pytest.fixture
def one(processor):
    return make_inputs(processor, "one")


@pytest.fixture
def padded(processor):
    return make_inputs(processor, "padded")
