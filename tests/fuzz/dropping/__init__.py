# SPDX-License-Identifier: Apache-2.0
"""drop_tokens on tiny models of every family: batches, masks, caches, calls and turns of a conversation.

A config that drops nothing, or a prompt without images, gives the bits of the plain model. All else is compared with
the masked reference, in which nothing is shortened. A model must be as it was after each case.

- ``cases``: the strategy. ``inputs``: models, batches and masks. ``calls``: the turns of a case, inside drop_tokens or
  not. ``comparison``: with the plain model and with the masked reference.
"""

from __future__ import annotations

from ..family import Family
from .calls import drop
from .cases import CASES, kinds
from .comparison import check
from .inputs import build

FAMILIES = (Family("drop_tokens", CASES, build, check, function=drop, kinds=kinds),)
