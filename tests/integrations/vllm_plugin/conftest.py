# SPDX-License-Identifier: Apache-2.0
"""The checkpoint, written once, and its reference."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    import checkpoint

    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoint.save(folder)
    return folder


@pytest.fixture(scope="session")
def transformers_of(checkpoint):
    import engines

    return engines.Transformers(checkpoint)


@pytest.fixture(scope="session")
def small_model():
    import small_model

    return small_model.SmallModel()
