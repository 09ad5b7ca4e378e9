"""One engine of the end-to-end run: vLLM's OpenAI server in a process of its own, spoken to over HTTP.

Answers are streamed and asked for with their token ids; what was computed and what was restored is read from the
server's own Prometheus endpoint.
"""

from __future__ import annotations

import http.client
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forebay.bench.demo_processes import Process, ProcessError
from forebay.bench.processes import pause

HOST = "127.0.0.1"
READY_S = 600.0
ANSWER_S = 300.0
COUNTED_S = 10.0
POOL_BYTES = 512 << 20
BLOCK = 32
MAX_TOKENS = 4096
SOURCES = {"local_compute": "computed", "external_kv_transfer": "restored", "local_cache_hit": "local"}
SERIES = "vllm:prompt_tokens_by_source_total"

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a chat's next turn came to.

    Attributes:
        prompt: token ids that the server made of the messages.
        ids: token ids of the answer.
        ttft_ms: from before the request was sent until its first token had come.
        computed, restored, local: prompt tokens, by where the server says they came from.
    """

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    ttft_ms: float
    computed: int = 0
    restored: int = 0
    local: int = 0


class Server:
    """A server that runs; the constructor returns when it answers.

    Args:
        runtime_dir: of the daemon. None: without forebay, and without a prefix cache of its own: the reference.
    Raises ProcessError, from every method, when the process died, failed or stayed silent.
    """

    def __init__(self, name: str, model: str, runtime_dir: Path | None, folder: Path) -> None:
        self._port = _free_port()
        self._process = Process(name, command(model, self._port, runtime_dir), folder / f"{name}.log", talks=False)
        try:
            self._wait(self._is_ready, READY_S, "did not become ready")
        except BaseException:
            self.stop()
            raise

    def ask(self, messages: Sequence[Message], tokens: int) -> Answer:
        """Greedy, `tokens` tokens."""
        before = self._counters()
        answer = self._stream(messages, tokens)
        total = sum(before.values()) + len(answer.prompt)
        self._wait(lambda: sum(self._counters().values()) >= total, COUNTED_S, "did not count a prompt")
        after = self._counters()
        return Answer(
            answer.prompt,
            answer.ids,
            answer.text,
            answer.ttft_ms,
            **{source: after[source] - before[source] for source in before},
        )

    def stop(self) -> None:
        self._process.stop()

    def _stream(self, messages: Sequence[Message], tokens: int) -> Answer:
        body = {
            "model": "model",
            "messages": list(messages),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        begun = time.perf_counter()
        connection = http.client.HTTPConnection(HOST, self._port, timeout=ANSWER_S)
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise self._process.failure(f"answered {response.status}: {response.read()[:500]!r}")
            return read_answer(response, lambda: (time.perf_counter() - begun) * 1000)
        except (OSError, http.client.HTTPException) as error:
            raise self._process.failure(f"did not answer: {error}") from error
        finally:
            connection.close()

    def _counters(self) -> dict[str, int]:
        status, body = self._get("/metrics")
        if status != 200:
            raise self._process.failure(f"has no metrics: {status}")
        return read_counters(body.decode())

    def _is_ready(self) -> bool:
        try:
            return self._get("/health")[0] == 200
        except ConnectionError:
            return False

    def _get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=ANSWER_S)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _wait(self, condition: Callable[[], bool], within_s: float, what: str) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            if not self._process.alive() or time.monotonic() > deadline:
                raise self._process.failure(what)
            pause(0.05)


def command(model: str, port: int, runtime_dir: Path | None) -> list[str]:
    """The command line of a server."""
    line = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    line += ["--served-model-name", "model", "--host", HOST, "--port", str(port), "--dtype", "float32"]
    line += ["--max-model-len", str(MAX_TOKENS), "--max-num-batched-tokens", str(MAX_TOKENS), "--enforce-eager"]
    line += ["--block-size", str(BLOCK), "--kv-cache-memory-bytes", str(POOL_BYTES)]
    if runtime_dir is None:
        return [*line, "--no-enable-prefix-caching"]
    transfer = {
        "kv_connector": "ForebayConnector",
        "kv_connector_module_path": "forebay.client.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"runtime_dir": str(runtime_dir)},
    }
    return [*line, "--kv-transfer-config", json.dumps(transfer)]


def read_answer(lines: Iterator[bytes] | http.client.HTTPResponse, now_ms: Callable[[], float]) -> Answer:
    """An answer out of a stream of server-sent events. Raises ProcessError when it is an error or brings no token."""
    prompt: list[int] = []
    ids: list[int] = []
    text, ttft_ms = "", 0.0
    for line in lines:
        if not line.startswith(b"data:") or line.strip() == b"data: [DONE]":
            continue
        event: dict[str, Any] = json.loads(line[len(b"data:") :])
        if "error" in event:
            raise ProcessError(f"the server answered {event['error']}")
        prompt += event.get("prompt_token_ids") or []
        for choice in event["choices"]:
            if choice.get("token_ids"):
                ttft_ms = ttft_ms or now_ms()
                ids += choice["token_ids"]
            text += choice["delta"].get("content") or ""
    if not ids or not prompt:
        raise ProcessError("the server answered without a token")
    return Answer(tuple(prompt), tuple(ids), text, ttft_ms)


def read_counters(text: str) -> dict[str, int]:
    """Prompt tokens by where they came from, out of Prometheus's text."""
    found = dict.fromkeys(SOURCES.values(), 0)
    for line in text.splitlines():
        for source, name in SOURCES.items():
            if line.startswith(SERIES + "{") and f'source="{source}"' in line:
                found[name] += int(float(line.rpartition(" ")[2]))
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
