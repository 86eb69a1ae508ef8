# SPDX-License-Identifier: Apache-2.0
"""How a request is read: decided once by the scheduler, and sent to the workers with the request."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from ...config import MustDropConfig

_FIELD = "mustdrop_reading"


@dataclasses.dataclass(frozen=True)
class Reading:
    """A prompt with images that is read in one step and loses tokens; requests without a reading are plain."""

    tokens: int
    """Number of tokens of the prompt that were not generated."""
    config: MustDropConfig


def reading(request: Any) -> Reading | None:
    """The reading of a request, of the scheduler or of a model runner; None: it is plain."""
    sampling = request.sampling_params
    found = None if sampling is None else (sampling.extra_args or {}).get(_FIELD)
    return found if isinstance(found, Reading) else None


def set_reading(request: Any, chosen: Reading) -> None:
    """Records how a request is read. Its sampling parameters are copied, since other requests may share them."""
    sampling = copy.copy(request.sampling_params)
    sampling.extra_args = {**(sampling.extra_args or {}), _FIELD: chosen}
    request.sampling_params = sampling
