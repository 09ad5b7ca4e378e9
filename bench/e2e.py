"""The end-to-end run: two vLLM processes share one daemon, restart, and lose it; the tokens stay the same.

Chats of several turns over long documents. Each request is answered by a reference process as well, without forebay and
without a prefix cache, whose greedy float32 token ids must be the same. The processes take turns, because on a small
machine two at once would time each other. The last line is JSON, one entry a request.

Exit status: 0 all identical, tokens restored wherever they had to be; 1 not so; 3 the model could not be set up; 4 a
process failed.
"""

from __future__ import annotations

import json
import pydoc_data.topics
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forebay.bench import demo_model
from forebay.bench.demo_processes import Process, ProcessError, forebay, python
from forebay.client import Client

READY_S = 180.0
ANSWER_S = 300.0
DAEMON_READY_S = 30.0
HOST_BYTES = "1GiB"
ANSWER_TOKENS = 24
DOCUMENT_CHARS = 6000
DOCUMENTS = ("calls", "function", "import")
QUESTIONS = ("What does this text describe?", "Which rule comes first?", "What happens on an error?")
EXIT_DIFFERS, EXIT_SETUP, EXIT_PROCESS = 1, 3, 4


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: which engine is asked a chat's next question, and whether forebay must have had something for it."""

    case: str
    engine: str
    document: str
    restores: bool


SCRIPT = (
    Ask("cold", "A", "calls", False),
    Ask("cold", "A", "function", False),
    Ask("other engine", "B", "calls", True),
    Ask("other engine", "B", "function", True),
    Ask("engine restarted", "A", "calls", True),
    Ask("engine restarted", "A", "function", True),
    Ask("daemon killed", "B", "import", False),
    Ask("daemon restarted", "A", "import", False),
    Ask("other engine again", "B", "import", True),
)


class Run:
    """The processes, and what each chat has come to."""

    def __init__(self, model: str, tokenizer: Any, folder: Path) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._folder = folder
        self._runtime_dir = folder / "run"
        self._processes: dict[str, Process] = {}
        self._chats: dict[str, list[int]] = {}
        self._turns: dict[str, int] = {}

    def start_daemon(self) -> None:
        command = ("serve", "--runtime-dir", str(self._runtime_dir), "--set", f"host.bytes={HOST_BYTES}")
        self._processes["daemon"] = Process(
            "daemon", forebay(*command, "--set", "metrics.listen=off"), self._folder / "daemon.log"
        )
        deadline = time.monotonic() + DAEMON_READY_S
        with Client(self._runtime_dir, budget_ms=1000) as client:
            while not client.ping():
                if time.monotonic() > deadline:
                    raise ProcessError("the daemon did not answer")

    def kill_daemon(self) -> None:
        self._processes.pop("daemon").kill()

    def engine(self, name: str) -> Process:
        """The engine of that name, started if it is not running. `reference` is the one without forebay."""
        if name not in self._processes:
            arguments = [self._model] if name == "reference" else [self._model, str(self._runtime_dir)]
            command = python("e2e_engine.py", *arguments)
            process = self._processes[name] = Process(f"engine {name}", command, self._folder / f"{name}.log")
            process.receive(READY_S, _nothing)
        return self._processes[name]

    def stop(self, name: str) -> None:
        self._processes.pop(name).stop()

    def stop_all(self) -> None:
        for name in list(self._processes):
            self.stop(name)

    def ask(self, ask: Ask) -> dict[str, Any]:
        turn = self._turns.get(ask.document, 0)
        chat = self._chats.get(ask.document)
        if chat is None:
            chat = self._tokenizer.encode(pydoc_data.topics.topics[ask.document][:DOCUMENT_CHARS])
        prompt = [*chat, *self._tokenizer.encode(f"\n{QUESTIONS[turn % len(QUESTIONS)]}\n")]
        with_, without = (self._answer(name, prompt) for name in (ask.engine, "reference"))
        self._chats[ask.document], self._turns[ask.document] = [*prompt, *with_["ids"]], turn + 1
        return {
            "case": ask.case,
            "prompt_tokens": len(prompt),
            "computed_tokens": with_["computed"],
            "restored_tokens": with_["restored"],
            "local_tokens": with_["local"],
            "ttft_ms_without": round(without["ttft_ms"], 1),
            "ttft_ms_with": round(with_["ttft_ms"], 1),
            "identical": with_["ids"] == without["ids"],
        }

    def _answer(self, name: str, prompt: list[int]) -> dict[str, Any]:
        engine = self.engine(name)
        engine.send({"ids": prompt, "tokens": ANSWER_TOKENS})
        return engine.receive(ANSWER_S, _nothing)


def _nothing() -> None:
    return None


def run(model: str, tokenizer: Any, folder: Path) -> list[dict[str, Any]]:
    scene = Run(model, tokenizer, folder)
    rows, case = [], ""
    try:
        scene.start_daemon()
        for ask in SCRIPT:
            if ask.case != case:
                _between(scene, ask.case)
            case = ask.case
            row = scene.ask(ask)
            row["as_expected"] = row["identical"] and (row["restored_tokens"] > 0) == ask.restores
            print(" ".join(f"{key}={value}" for key, value in row.items()), file=sys.stderr, flush=True)
            rows.append(row)
    finally:
        scene.stop_all()
    return rows


def _between(scene: Run, case: str) -> None:
    """What happens before the first request of a case."""
    if case == "engine restarted":
        scene.stop("A")
    elif case == "daemon killed":
        scene.kill_daemon()
    elif case == "daemon restarted":
        scene.start_daemon()
        scene.stop("A")
    elif case == "other engine again":  # it has the chat's first turn in its own cache, and goes
        scene.stop("B")


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The one line: every request, and by how much hits were faster than computing, each for itself."""
    gains = [row["ttft_ms_without"] / row["ttft_ms_with"] for row in rows if row["restored_tokens"]]
    return {
        "cases": rows,
        "ttft_gain_min": round(min(gains, default=0.0), 2),
        "ttft_gain_median": round(statistics.median(gains), 2) if gains else 0.0,
        "ttft_gain_max": round(max(gains, default=0.0), 2),
        "ok": all(row["as_expected"] for row in rows),
    }


def main() -> int:
    demo_model.go_offline()
    try:
        demo_model.prepare("smollm2", lambda text: print(text, file=sys.stderr, flush=True))
    except demo_model.SetupError as error:
        print(error, file=sys.stderr)
        return EXIT_SETUP
    from transformers import AutoTokenizer

    model = str(demo_model.CACHE_DIR / "smollm2-135m-instruct-fp32")
    tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True)
    with tempfile.TemporaryDirectory(prefix="forebay-e2e-") as folder:
        try:
            result = summary(run(model, tokenizer, Path(folder)))
        except ProcessError as error:
            print(error, file=sys.stderr)
            return EXIT_PROCESS
    print(json.dumps(result))
    return 0 if result["ok"] else EXIT_DIFFERS


if __name__ == "__main__":
    sys.exit(main())
