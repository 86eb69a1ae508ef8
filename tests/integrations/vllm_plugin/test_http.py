# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` with the plug-in, over HTTP, enabled by an argument and by the environment variable."""

from __future__ import annotations

import itertools
import json

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import httpx
from engines import ASKS, BUDGETS, KEEP_ALL, Ask
from http_server import HttpServer
from servers import joined

from mustdrop_kernels.bench.vllm_engine import ARCHITECTURE
from mustdrop_kernels.integrations.vllm.settings import VARIABLE

NEW = 20
TWO = Ask("USER: <image>\n<image>\nWhat is in the images? ASSISTANT:", (2, 0))
ASKED = [ASKS[0], ASKS[1], TWO, Ask("USER: <image>\ncar? ASSISTANT:", (1,)), ASKS[0]]
FEWER = {"budgets": [30, 20, 10]}
OVERRIDES = {"architectures": [ARCHITECTURE], "mustdrop": BUDGETS}
SWITCHES = {
    "argument": (["--hf-overrides", json.dumps(OVERRIDES), "--mm-processor-cache-type", "shm"], {}),
    "variable": (["--mm-tensor-ipc", "torch_shm"], {VARIABLE: json.dumps(BUDGETS)}),
}


@pytest.fixture(scope="module")
def servers(checkpoint, tmp_path_factory):
    """Both, beside each other."""
    logs = tmp_path_factory.mktemp("logs")
    found = {
        name: HttpServer(checkpoint, logs / name, *arguments, **environment)
        for name, (arguments, environment) in SWITCHES.items()
    }
    try:
        for server in found.values():
            server.ready()
        yield found
    finally:
        for server in found.values():
            server.stop()


@pytest.fixture(scope="module")
def expected(transformers_of):
    """transformers' answers with the same plan, each request alone."""
    found = [transformers_of.generate(ask, BUDGETS, NEW)[0] for ask in ASKED]
    assert found[0] != transformers_of.generate(ASKED[0], {**BUDGETS, "budgets": [144] * 3}, NEW)[0]
    return found


@pytest.mark.parametrize("name", SWITCHES)
def test_answers_equal_transformers(name, servers, expected):
    """In parallel and alone, in one piece and streamed."""
    server = servers[name]
    assert server.answers(ASKED, NEW) == expected
    streams = server.streams(ASKED, NEW)
    assert [joined(pieces) for pieces in streams] == expected
    assert all(len(pieces) > 1 for pieces in streams)
    for ask, tokens in zip(ASKED, expected, strict=True):
        assert server.answers([ask], NEW) == [tokens]
    assert server.is_idle()


@pytest.mark.parametrize("name", SWITCHES)
def test_one_beam_is_greedy(name, servers, expected):
    asks, new = ASKED[:3], 4
    beams = servers[name].answers(asks, new, use_beam_search=True)
    assert beams == [tokens[:new] for tokens in expected[:3]]


@pytest.mark.parametrize("name", SWITCHES)
def test_settings_of_a_request(name, servers, expected, transformers_of):
    """As text; a wrong one is the client's error."""
    for value, plan in (("false", KEEP_ALL), (json.dumps(FEWER), {**BUDGETS, **FEWER})):
        answers = servers[name].answers(ASKED[:2], NEW, vllm_xargs={"mustdrop": value})
        assert answers == [transformers_of.generate(ask, plan, NEW)[0] for ask in ASKED[:2]]
    with pytest.raises(httpx.HTTPStatusError, match="400 Bad Request") as failed:
        servers[name].answers(ASKED[:1], NEW, vllm_xargs={"mustdrop": "some"})
    assert "no preset 'some'" in failed.value.response.text
    assert servers[name].answers(ASKED, NEW) == expected


@pytest.mark.parametrize("name", SWITCHES)
def test_clients_that_hang_up_change_nothing(name, servers, expected):
    server, leaving = servers[name], {0: 1, 2: 4}
    streams = server.streams(ASKED, NEW, leaving)
    for i, pieces in enumerate(streams):
        got = joined(pieces)
        assert got == expected[i][: len(got)]
        assert len(got) < NEW if i in leaving else len(got) == NEW
    assert server.is_idle()
    assert server.answers(ASKED, NEW) == expected


def test_terminated_servers_leave_nothing_behind(servers):
    """The engine cores are processes of their own."""
    for server in servers.values():
        assert server.process.children(recursive=True)
    assert list(itertools.chain.from_iterable(server.terminate() for server in servers.values())) == []
