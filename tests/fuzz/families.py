# SPDX-License-Identifier: Apache-2.0
"""Every operator's family."""

from __future__ import annotations

from ops.schemas import OPS

from . import merging, moving, scoring, selecting
from .family import Family

_ALL = (*merging.FAMILIES, *scoring.FAMILIES, *selecting.FAMILIES, *moving.FAMILIES)

FAMILIES: dict[str, Family] = {op: next(family for family in _ALL if family.op == op) for op in OPS}
