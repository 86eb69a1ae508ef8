# SPDX-License-Identifier: Apache-2.0
"""Building blocks for SGLang at page size 1: the token table of a step in which prompts lose tokens. No plug-in yet.

``plans.PackedDropPlan`` decides; ``TokenTable`` edits ``req_to_token`` and the requests' lengths and gives slots back.
It takes SGLang's own objects, or any shaped like them, and imports nothing of SGLang; docs/engines.md says what ran.
"""

from __future__ import annotations

from .token_table import TokenTable

__all__ = ["TokenTable"]
