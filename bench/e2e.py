"""The end-to-end run: two OpenAI servers of vLLM share one daemon, restart, and lose it; the tokens stay the same.

Chats of several turns over long documents. Each request is answered by a reference server as well, without forebay and
without a prefix cache, whose greedy float32 token ids must be the same. The servers take turns, because on a small
machine two at once would time each other. What has to be restored is known beforehand, to the token: the whole blocks
that any server stored since the daemon began. The last line is JSON, one entry a request.

Exit status: 0 all identical, restored to the token, and no hit slower than computing; 1 not so; 3 the model could not
be set up; 4 a process failed.
"""

from __future__ import annotations

import json
import pydoc_data.topics
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forebay.bench import demo_model
from forebay.bench.demo_processes import Process, ProcessError, forebay
from forebay.bench.e2e_server import BLOCK, Answer, Server
from forebay.client import Client

DAEMON_READY_S = 30.0
HOST_BYTES = "1GiB"
ANSWER_TOKENS = 24
DOCUMENT_CHARS = 6000
QUESTIONS = ("What does this text describe?", "Which rule comes first?", "What happens on an error?")
CHATS = ("calls", "function", "import", "strings", "try")
LATE_CHATS = ("assignment", "comparisons")
EXIT_DIFFERS, EXIT_SETUP, EXIT_PROCESS = 1, 3, 4


@dataclass(frozen=True, slots=True)
class Case:
    """Which server is asked the next question of which chats; see `_before` for what happens before.

    Attributes:
        restores: whether forebay must have something for each.
    """

    name: str
    server: str
    chats: tuple[str, ...]
    restores: bool


SCRIPT = (
    Case("cold", "A", CHATS, False),
    Case("other server", "B", CHATS, True),
    Case("server restarted", "A", CHATS, True),
    Case("daemon killed", "B", LATE_CHATS, False),
    Case("daemon restarted", "A", LATE_CHATS, False),
    Case("other server again", "B", LATE_CHATS, True),
)


class Run:
    """The processes, and what each chat has come to."""

    def __init__(self, model: str, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self._runtime_dir = folder / "run"
        self._daemon: Process | None = None
        self._servers: dict[str, Server] = {}
        self._chats: dict[str, list[dict[str, str]]] = {}
        self._stored: list[Sequence[int]] = []

    def start_daemon(self) -> None:
        command = ("serve", "--runtime-dir", str(self._runtime_dir), "--set", f"host.bytes={HOST_BYTES}")
        line = forebay(*command, "--set", "metrics.listen=off")
        self._daemon = Process("daemon", line, self._folder / "daemon.log", talks=False)
        deadline = time.monotonic() + DAEMON_READY_S
        with Client(self._runtime_dir, budget_ms=1000) as client:
            while not client.ping():
                if time.monotonic() > deadline:
                    raise ProcessError("the daemon did not answer")

    def kill_daemon(self) -> None:
        """SIGKILL: what it held is gone."""
        if self._daemon is not None:
            self._daemon.kill()
        self._daemon, self._stored = None, []

    def server(self, name: str) -> Server:
        """The server of that name, started if it is not running. `reference` is the one without forebay."""
        if name not in self._servers:
            runtime_dir = None if name == "reference" else self._runtime_dir
            self._servers[name] = Server(name, self._model, runtime_dir, self._folder)
        return self._servers[name]

    def stop(self, name: str) -> None:
        self._servers.pop(name).stop()

    def stop_all(self) -> None:
        for name in list(self._servers):
            self.stop(name)
        if self._daemon is not None:
            self._daemon.stop()

    def ask(self, case: Case, document: str) -> dict[str, Any]:
        chat = self._chats.setdefault(document, [])
        question = QUESTIONS[len(chat) // 2 % len(QUESTIONS)]
        text = question if chat else f"{pydoc_data.topics.topics[document][:DOCUMENT_CHARS]}\n\n{question}"
        chat.append({"role": "user", "content": text})
        with_, without = (self.server(name).ask(chat, ANSWER_TOKENS) for name in (case.server, "reference"))
        chat.append({"role": "assistant", "content": with_.text})
        expected = max(0, shared_tokens(with_.prompt, self._stored) - with_.local)
        if self._daemon is not None:
            self._stored.append([*with_.prompt, *with_.ids[:-1]])  # the last token is not computed
        return row(case, with_, without, expected)


def shared_tokens(prompt: Sequence[int], stored: Iterable[Sequence[int]]) -> int:
    """How much of a prompt can come out of these: its longest prefix of whole blocks, less than all of it."""
    longest = 0
    for known in stored:
        same = next((i for i, (a, b) in enumerate(zip(prompt, known)) if a != b), min(len(prompt), len(known)))
        longest = max(longest, min(same, len(prompt) - 1) // BLOCK * BLOCK)
    return longest


def row(case: Case, with_: Answer, without: Answer, expected: int) -> dict[str, Any]:
    """One request's entry; `expected` tokens must have been restored."""
    identical = with_.ids == without.ids and with_.prompt == without.prompt
    faster = not with_.restored or with_.ttft_ms < without.ttft_ms
    return {
        "case": case.name,
        "prompt_tokens": len(with_.prompt),
        "computed_tokens": with_.computed,
        "restored_tokens": with_.restored,
        "local_tokens": with_.local,
        "ttft_ms_without": round(without.ttft_ms, 1),
        "ttft_ms_with": round(with_.ttft_ms, 1),
        "identical": identical,
        "as_expected": identical and faster and with_.restored == expected and (expected > 0) == case.restores,
    }


def run(model: str, folder: Path) -> list[dict[str, Any]]:
    scene, rows = Run(model, folder), []
    try:
        scene.start_daemon()
        for case in SCRIPT:
            _before(scene, case)
            for document in case.chats:
                rows.append(scene.ask(case, document))
                tell(" ".join(f"{key}={value}" for key, value in rows[-1].items()))
    finally:
        scene.stop_all()
    return rows


def _before(scene: Run, case: Case) -> None:
    if case.name == "server restarted":
        scene.stop("A")
    elif case.name == "daemon killed":
        scene.kill_daemon()
    elif case.name == "daemon restarted":
        scene.start_daemon()
    elif case.name == "other server again":  # it has the chats' first turns in its own cache, and goes
        scene.stop("B")


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The one line: every request, and how the times to the first token lie, hits and misses each for themselves.

    A ratio is the reference's time over forebay's, request by request.
    """
    hits = [row for row in rows if row["restored_tokens"]]
    misses = [row for row in rows if not row["restored_tokens"]]
    return {
        "cases": rows,
        "hits": distributions(hits),
        "misses": distributions(misses),
        "hits_slower": sum(row["ttft_ms_with"] >= row["ttft_ms_without"] for row in hits),
        "ok": all(row["as_expected"] for row in rows),
    }


def distributions(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "requests": len(rows),
        "ttft_ms_without": spread([row["ttft_ms_without"] for row in rows]),
        "ttft_ms_with": spread([row["ttft_ms_with"] for row in rows]),
        "ratio": spread([row["ttft_ms_without"] / row["ttft_ms_with"] for row in rows]),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Smallest, quartiles and largest; empty for none."""
    if not values:
        return {}
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    names = ("min", "p25", "p50", "p75", "max")
    return {name: round(value, 2) for name, value in zip(names, [min(values), *quartiles, max(values)], strict=True)}


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends its children too
    demo_model.go_offline()
    try:
        demo_model.prepare("smollm2", tell)
    except demo_model.SetupError as error:
        tell(str(error))
        return EXIT_SETUP
    model = str(demo_model.CACHE_DIR / "smollm2-135m-instruct-fp32")
    with tempfile.TemporaryDirectory(prefix="forebay-e2e-") as folder:
        try:
            result = summary(run(model, Path(folder)))
        except ProcessError as error:
            tell(str(error))
            return EXIT_PROCESS
    for kind in ("hits", "misses"):
        tell(f"{kind}: {result[kind]}")
    print(json.dumps(result))
    return 0 if result["ok"] else EXIT_DIFFERS


if __name__ == "__main__":
    sys.exit(main())
