# SPDX-License-Identifier: Apache-2.0
"""A model and requests for interpreted kernels: 36 vision tokens, four layers."""

from __future__ import annotations

import dataclasses

import tiny_llava
from engines import Ask

GRID, LAYERS = 6, 4


@dataclasses.dataclass(frozen=True)
class TinyAsk(Ask):
    def images(self):
        return [tiny_llava.picture(seed, grid=GRID, flat=0.5) for seed in self.pictures]


ASKS = [TinyAsk("USER: <image>\ncar? ASSISTANT:", (0,)), TinyAsk("USER: car?"), TinyAsk("USER: <image> a", (1,))]
PLANS = {
    "budgets": {"merge": False, "key_rate": 0.0, "pruning_layers": [0, 2], "budgets": [20, 9]},
    "all stages": {"merge_budget": 2, "pruning_layers": [1], "global_threshold": 0.04, "individual_threshold": 0.05},
}
