# SPDX-License-Identifier: Apache-2.0
"""Streaming, clients that hang up, engines that are killed; one rank and two, each of which holds half of the heads."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import gpu_backends
import tiny
from engines import ASKS, BUDGETS, PLANS
from servers import Server, joined, switched_on
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.version import __version__

NEW = 20
OVER_RANKS = PLANS["all by thresholds"]


def start_one(checkpoint):
    with switched_on(json.dumps(BUDGETS)):
        return Server(checkpoint, None)


def start_two(checkpoint):
    return Server(checkpoint, OVER_RANKS, ranks=2)


START = {"one rank": start_one, "two ranks": start_two}


@pytest.fixture(scope="module")
def servers(checkpoint):
    """Both, beside each other; a test may put others in their place."""
    found = {name: start(checkpoint) for name, start in START.items()}
    yield found
    for server in found.values():
        server.stop()


@pytest.fixture(scope="module")
def answers(transformers_of):
    """transformers' answers to each request."""
    return {
        "one rank": [(ask, transformers_of.generate(ask, BUDGETS, NEW)[0]) for ask in ASKS],
        "two ranks": [(ask, transformers_of.generate(ask, OVER_RANKS, NEW)[0]) for ask in ASKS],
    }


@pytest.mark.parametrize("name", START)
def test_streams_equal_transformers(name, servers, answers):
    server, (asks, expected) = servers[name], zip(*answers[name], strict=True)
    streams = server.streams(asks, NEW)
    assert [joined(pieces) for pieces in streams] == list(expected)
    assert all(len(pieces) > 1 for pieces in streams)
    for ask, tokens in answers[name]:
        assert server.tokens([ask], NEW) == [tokens]
    assert server.pool_is_free()


@pytest.mark.parametrize("name", START)
def test_clients_that_hang_up_change_nothing(name, servers, answers):
    server, (asks, expected) = servers[name], zip(*answers[name], strict=True)
    streams = server.streams(asks, NEW, leave_after={0: 1, 3: 5})
    for i, pieces in enumerate(streams):
        got = joined(pieces)
        assert got == expected[i][: len(got)]
        assert len(got) == NEW if i not in (0, 3) else 1 <= len(got) < NEW
    assert server.tokens(asks, NEW) == list(expected)
    assert server.pool_is_free()


def test_prompts_that_arrive_in_parts(servers, answers, transformers_of):
    """They keep all their tokens, since their end is unknown when they begin."""
    server, (asks, expected) = servers["one rank"], zip(*answers["one rank"], strict=True)
    text, picture = asks[1], asks[0]
    assert server.in_parts([text], NEW) == ("length", expected[1])
    assert server.in_parts([picture], NEW) == ("length", transformers_of.continued([], picture, NEW))
    # vLLM keeps what a part has generated, without the last token, which no step has read.
    before = [*transformers_of.ids(text), *expected[1][:-1]]
    continued = transformers_of.continued(before, picture, NEW)
    assert server.in_parts([text, picture], NEW) == ("length", expected[1] + continued)
    assert server.tokens(asks, NEW) == list(expected)
    assert server.pool_is_free()


@pytest.mark.skipif(
    __version__.startswith("0.33"), reason="two engines of vLLM 0.33 on a CPU need two NUMA nodes, with any model"
)
def test_two_engines_share_the_requests(checkpoint, answers):
    asks, expected = zip(*answers["one rank"], strict=True)
    server = Server(checkpoint, BUDGETS, data_parallel_size=2)
    try:
        assert server.tokens(asks * 3, NEW) == list(expected * 3)
        assert server.pool_is_free()
    finally:
        server.stop()


def test_interpreted_kernels(tiny_checkpoint, tiny_transformers):
    """TRITON_ATTN on model runner V2, with a smaller model and fewer requests."""
    plan, asks, new = tiny.PLANS["all stages"], tiny.ASKS, 4
    expected = [tiny_transformers.generate(ask, plan, new)[0] for ask in asks]
    with gpu_backends.platform(2, "TRITON_ATTN"):
        server = Server(tiny_checkpoint, plan, block_size=16)
        try:
            assert server.tokens(asks, new) == expected
            assert server.pool_is_free()
        finally:
            server.stop()


@pytest.mark.skipif(gpu_backends.DEFAULT.startswith("2"), reason="the processes are those of model runner V1")
def test_killed_engines_leave_nothing_behind(servers, answers, checkpoint):
    """Both killed at work and started again."""
    for server in servers.values():
        ended, left = server.kill_at_work(ASKS[:3], 300)
        assert all(isinstance(error, EngineDeadError) for error in ended)
        assert not left
    for name, start in START.items():
        servers[name].stop()
        servers[name] = start(checkpoint)
    for name, server in servers.items():
        asks, expected = zip(*answers[name], strict=True)
        assert server.tokens(asks, NEW) == list(expected)
        assert server.pool_is_free()
