# SPDX-License-Identifier: Apache-2.0
"""Building blocks for SGLang at page size 1: the token table of a step in which prompts lose tokens. No plug-in yet.

``plans.PackedDropPlan`` selects tokens; ``TokenTable`` edits ``req_to_token`` and the lengths, and frees slots.
It works on SGLang's own objects, or on any with the same attributes, and imports nothing of SGLang; docs/engines.md
describes what has been tested.
"""

from __future__ import annotations

from .token_table import TokenTable

__all__ = ["TokenTable"]
