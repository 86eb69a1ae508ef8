# SPDX-License-Identifier: Apache-2.0
"""A worker extension, as trainers bring one along."""

from __future__ import annotations


class Extension:
    def dropped_requests(self) -> int:
        return len(self.model_runner.model.drop_record.dropped)
