# SPDX-License-Identifier: Apache-2.0
"""The families of all operators, and of the integration with transformers."""

from __future__ import annotations

from ops.schemas import OPS

from . import dropping, merging, moving, scoring, selecting
from .family import Family
from .sampled import sampled

_OWN = {family.op: family for family in (*merging.FAMILIES, *scoring.FAMILIES, *selecting.FAMILIES, *moving.FAMILIES)}

FAMILIES: dict[str, Family] = {
    **{op: _OWN.get(op) or sampled(op) for op in OPS},
    **{family.op: family for family in dropping.FAMILIES},
}
