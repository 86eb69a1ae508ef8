# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` as a user starts it, and its clients over HTTP."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

PATIENCE = 240  # seconds, on a machine that others use too
SETTINGS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-batched-tokens", "1024"]


# Text of the tests' prompts around a question; the pictures come first.
TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} ASSISTANT:{% endfor %}"
)


def body(ask, tokens, **more):
    """A request for the chat that becomes this prompt."""
    pictures = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in ask.images()]
    text = ask.text.removeprefix("USER: ").removesuffix(" ASSISTANT:").replace("<image>\n", "")
    return {
        "messages": [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}],
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
        "return_token_ids": True,
        **more,
    }


def data_url(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


class HttpServer:
    """The command in a process of its own; ``ready`` waits until it answers."""

    def __init__(self, model, log, *arguments, **environment):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--chat-template", TEMPLATE]
        inherited = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        self.log = log
        with log.open("w") as file:
            self.process = psutil.Popen(
                [*command, *SETTINGS, *arguments, "--host", "127.0.0.1", "--port", str(port)],
                env={**inherited, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.url = f"http://127.0.0.1:{port}"

    def ready(self):
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(self.url + "/health").is_success:
                    return self
            time.sleep(0.2)
        raise AssertionError(f"vllm serve does not answer:\n{self.log.read_text()[-4000:]}")

    def answers(self, asks, tokens, **more):
        """Tokens of each request, all at once and each in one piece."""

        async def send(client, number, ask):
            response = await client.post("/v1/chat/completions", json=body(ask, tokens, **more))
            response.raise_for_status()
            return response.json()["choices"][0]["token_ids"]

        return self._together(send, asks)

    def streams(self, asks, tokens, leave_after=None):
        """The streamed pieces of each request, sent in parallel; some clients hang up after a number of pieces."""
        leave = leave_after or {}

        async def send(client, number, ask):
            pieces = []
            request = client.stream("POST", "/v1/chat/completions", json=body(ask, tokens, stream=True))
            async with request as response:
                async for line in response.aiter_lines():
                    data = line.removeprefix("data: ")
                    if data and data != "[DONE]" and (piece := json.loads(data)["choices"][0].get("token_ids")):
                        pieces.append(piece)
                    if len(pieces) == leave.get(number):
                        break
            return pieces

        return self._together(send, asks)

    def _together(self, send, asks):
        async def all_of_them():
            async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE) as client:
                return await asyncio.gather(*(send(client, number, ask) for number, ask in enumerate(asks)))

        return asyncio.run(all_of_them())

    def metric(self, name):
        """A gauge or counter of the one engine."""
        lines = httpx.get(self.url + "/metrics").text.splitlines()
        (value,) = (line.rpartition(" ")[2] for line in lines if line.startswith(name + "{"))
        return float(value)

    def is_idle(self, within=60):
        """Nothing runs or waits, and no block is held, after this number of seconds at the latest."""
        gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        end = time.monotonic() + within
        while any(map(self.metric, gauges)):
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def terminate(self):
        """SIGTERM; returns the processes that have outlived it."""
        processes = [self.process, *self.process.children(recursive=True)]
        self.process.terminate()
        return psutil.wait_procs(processes, timeout=60)[1]

    def stop(self):
        """Whatever state it is in."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in self.terminate():
                process.kill()
