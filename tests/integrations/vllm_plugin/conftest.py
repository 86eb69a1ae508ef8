# SPDX-License-Identifier: Apache-2.0
"""The checkpoints, written once, and their references."""

from __future__ import annotations

import gpu_backends
import pytest

gpu_backends.offer_triton()  # before vLLM is imported


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
def tiny_checkpoint(tmp_path_factory):
    import checkpoint
    import tiny

    folder = tmp_path_factory.mktemp("tiny")
    checkpoint.save(folder, grid=tiny.GRID, layers=tiny.LAYERS)
    return folder


@pytest.fixture(scope="session")
def tiny_transformers(tiny_checkpoint):
    import engines
    import tiny

    return engines.Transformers(tiny_checkpoint, grid=tiny.GRID)


@pytest.fixture(scope="session")
def small_model():
    import small_model

    return small_model.SmallModel()
