# SPDX-License-Identifier: Apache-2.0
"""One step of the engine in which prompts with images begin, independent of the model runner."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...config import MustDropConfig
from . import images
from .requests import Reading


class StepRequest(NamedTuple):
    """A request of a step."""

    name: str
    reading: Reading | None
    images: Sequence[Any]  # its multimodal features
    adapter: int = 0  # of LoRA; 0: none


def beginning(requests: Sequence[StepRequest], computed: Sequence[int]) -> list[int]:
    """The requests whose prompts begin and lose tokens, from the number of tokens that each has computed before."""
    return [i for i, (r, tokens) in enumerate(zip(requests, computed, strict=True)) if r.reading and tokens == 0]


@dataclasses.dataclass(frozen=True)
class Step:
    """R requests and their new tokens, packed row by row.

    Lengths and block tables are those of the cache: without the tokens that a request has lost in earlier steps, and
    without the blocks that these have emptied.
    """

    requests: list[StepRequest]
    beginning: list[int]  # at least one
    new: list[int]  # new tokens of each request
    lengths: list[int]  # cached tokens of each request after the step, at most
    seq_lens: Tensor  # (R) int32, the same, exactly
    block_table: Tensor  # (R, max_blocks) int32
    groups: list[Any]  # vLLM's attention groups, which build metadata
    report: Callable[[str, int], None]  # receives the name of each request that begins, and how many tokens it loses

    @property
    def rows(self) -> int:
        """New tokens of all requests."""
        return sum(self.new)

    @property
    def config(self) -> MustDropConfig:
        """The config of the requests that begin; the scheduler lets requests of one config begin in a step."""
        reading = self.requests[self.beginning[0]].reading
        assert reading is not None
        return reading.config

    def placeholders(self, device: torch.device) -> Tensor:
        """(rows) bool: the rows of images of requests that begin."""
        members = set(self.beginning)
        pairs = zip(self.requests, self.new, strict=True)
        parts = [images.rows(r.images if i in members else (), rows) for i, (r, rows) in enumerate(pairs)]
        return torch.cat(parts).to(device)


class StepSource(Protocol):
    """A model runner, as the model sees it."""

    def step(self, context: Any) -> AbstractContextManager[Step | None]:
        """The step of a forward context, if prompts with images begin in it.

        Inside the block the metadata of the context are those of requests without their lost tokens.
        """
