# SPDX-License-Identifier: Apache-2.0
"""The small trained model, and a few held-out questions."""

from __future__ import annotations

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from mustdrop_kernels.evaluation import datasets
from mustdrop_kernels.evaluation.checkpoint import Checkpoint, load_model


@pytest.fixture(scope="session")
def subject() -> Checkpoint:
    return load_model(None, "cpu")


@pytest.fixture(scope="session")
def asked() -> datasets.Questions:
    """Two of each kind."""
    return datasets.made("test", [11, 12], 12)
