"""The demonstration: two engine processes share one daemon, and a prompt read once is never computed again.

In the second act not even after the daemon has been killed: a new one finds on the drive what the first had written.

Two processes, each with a real trained model, chat about long documents (pages of Python's own language reference,
which every Python carries). The second asks other questions about the first one's documents and continues its
chats. Each request runs twice in the same process, through forebay and by plain `generate`; greedy float32 tokens
must be the same. The engines take turns, because on a small machine two at once would time each other.

Exit status: 0 all identical and some tokens restored, in the second act from nvme; 1 not so, 2 usage, 3 the model could
not be set up, 4 a process failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from forebay.bench import demo_model
from forebay.bench.demo_processes import Process, ProcessError, forebay, python
from forebay.bench.demo_rows import HEADER, Row, failures, row_text, summarize, summary_text

READY_S = 120.0
ANSWER_S = 300.0
DAEMON_READY_S = 30.0
HOST_BYTES = "1GiB"
NVME_BYTES, NVME_BYTES_MIN = 2 << 30, 256 << 20
PERSIST_S = 60.0
FIND_S = 30.0
PLAIN_PROGRESS_S = 10.0
TINY_DOCUMENT_CHARS = 1500
EXIT_DIFFERS, EXIT_SETUP, EXIT_PROCESS, EXIT_INTERRUPTED = 1, 3, 4, 130


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: who asks what about which document, in which chat (a chat keeps its document and its turns)."""

    engine: str
    chat: str
    document: str
    question: str


SCRIPT = (
    Ask("A", "calls-1", "calls", "What does this text describe?"),
    Ask("A", "calls-1", "calls", "What happens to excess positional arguments?"),
    Ask("A", "calls-1", "calls", "What is a keyword argument?"),
    Ask("A", "function-1", "function", "What does a function definition do when it is executed?"),
    Ask("A", "function-1", "function", "When are default parameter values evaluated?"),
    Ask("A", "try-1", "try", "What is an except clause for?"),
    Ask("B", "calls-2", "calls", "In which order are the arguments of a call evaluated?"),
    Ask("B", "calls-1", "calls", "Can a class be called, and what comes back?"),
    Ask("B", "function-2", "function", "What is a decorator?"),
    Ask("B", "function-1", "function", "Why is a mutable default value surprising?"),
    Ask("B", "try-2", "try", "When is the finally clause executed?"),
    Ask("B", "try-1", "try", "What if no except clause matches?"),
    Ask("A", "calls-1", "calls", "Thank you. Summarize what we discussed in one sentence."),
    Ask("A", "try-2", "try", "And what does the else clause do?"),
)
AFTER_KILL = (
    Ask("B", "calls-1", "calls", "Which of the answers above was the most important one?"),
    Ask("A", "function-1", "function", "What is the value of a default parameter?"),
    Ask("A", "try-1", "try", "And what is a finally clause for?"),
)


def _quick(script: tuple[Ask, ...]) -> tuple[Ask, ...]:
    return tuple(ask for ask in script if ask.document == "calls")


class Progress:
    """One line on stderr that says what is being done: redrawn on a terminal, now and then elsewhere."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._text = ""
        self._last_plain = 0.0
        self._tty = sys.stderr.isatty()

    def say(self, text: str) -> None:
        self._text = text
        self._last_plain = 0.0
        self.tick()

    def tick(self) -> None:
        now = time.monotonic()
        line = f"[{now - self._begun:4.0f} s] {self._text}"
        if self._tty:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        elif now - self._last_plain >= PLAIN_PROGRESS_S:
            self._last_plain = now
            print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._tty:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class Demo:
    """Daemon, two engines and the rows they produced; `close` ends and removes everything."""

    def __init__(self, options: argparse.Namespace, progress: Progress) -> None:
        self._options = options
        self._progress = progress
        self._out = sys.stderr if options.json else sys.stdout
        self._nvme_bytes = _nvme_bytes(Path(tempfile.gettempdir()))
        self._dir = Path(tempfile.mkdtemp(prefix="forebay-demo-"))
        self._runtime = self._dir / "run"
        self._processes: list[Process] = []
        self._histories: dict[str, list[int]] = {}
        self._turns: dict[str, int] = {}
        self._engines: dict[str, Process] = {}
        self._daemon: Process | None = None
        self.rows: list[Row] = []

    def run(self) -> None:
        """Play both acts; raises ProcessError when a process fails."""
        script, after = (_quick(SCRIPT), _quick(AFTER_KILL)) if self._options.quick else (SCRIPT, AFTER_KILL)
        self._start_daemon()
        self._start_engines()
        if self._play(script, act=1):
            self._kill_daemon(after)
            self._play(after, act=2)

    def totals(self) -> list[dict[str, Any]]:
        """The totals of each act that was played."""
        acts = [[row for row in self.rows if row.act == act] for act in (1, 2)]
        return [summarize(rows) for rows in acts if rows]

    def _play(self, script: tuple[Ask, ...], act: int) -> bool:
        """Whether to go on after it."""
        self._print(HEADER)
        for number, ask in enumerate(script, start=1):
            self._progress.say(f"request {number} of {len(script)}: engine {ask.engine}, chat {ask.chat}")
            row = self._ask(self._engines[ask.engine], ask, act)
            self.rows.append(row)
            self._print(row_text(row))
            if not row.identical and not self._options.keep_going:
                self._print("stopped at the first output that differs (--keep-going goes on)")
                return False
        return True

    def _kill_daemon(self, asks: Sequence[Ask]) -> None:
        """Between the acts: make durable what the second will ask for, kill the daemon, start another."""
        assert self._daemon is not None
        self._progress.say("waiting until the drive has what will be asked for")
        replies = [self._request(ask, {"persist": self._histories[ask.chat], "timeout_s": PERSIST_S}) for ask in asks]
        durable, wanted, took_s = (sum(reply[key] for reply in replies) for key in ("durable", "wanted", "seconds"))
        self._print(f"\nsecond act: {durable} of {wanted} blocks of {len(asks)} chats made durable in {took_s:.2f} s")
        self._daemon.kill()
        begun = time.monotonic()
        self._start_daemon()
        self._print(f"the daemon killed (SIGKILL); another one answered {time.monotonic() - begun:.2f} s later")

    def _request(self, ask: Ask, request: dict[str, Any]) -> dict[str, Any]:
        engine = self._engines[ask.engine]
        engine.send(request)
        return engine.receive(ANSWER_S, self._progress.tick)

    def status(self) -> str:
        """What `forebay status` prints now."""
        flags = ["--json"] if self._options.json else []
        command = forebay("status", "--runtime-dir", str(self._runtime), *flags)
        done = subprocess.run(command, capture_output=True, text=True, timeout=DAEMON_READY_S)
        if done.returncode != 0:
            raise ProcessError(f"forebay status exited with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def close(self) -> None:
        for process in reversed(self._processes):
            process.stop()
        shutil.rmtree(self._dir, ignore_errors=True)

    def _start_daemon(self) -> None:
        self._progress.say("starting the daemon")
        arguments = ["serve", "--runtime-dir", str(self._runtime), "--host-bytes", HOST_BYTES]
        arguments += ["--set", f"nvme.paths={self._dir / 'nvme'}", "--set", f"nvme.bytes={self._nvme_bytes}"]
        number = sum(process.name.startswith("daemon") for process in self._processes) + 1
        command = forebay(*arguments, "--metrics-listen", "off")
        self._daemon = daemon = self._start(f"daemon {number}", command)
        deadline = time.monotonic() + DAEMON_READY_S
        ping = forebay("ping", "--runtime-dir", str(self._runtime))
        while subprocess.run(ping, capture_output=True, timeout=DAEMON_READY_S).returncode != 0:
            if not daemon.alive() or time.monotonic() > deadline:
                raise daemon.failure("does not answer")
            self._progress.tick()

    def _start_engines(self) -> None:
        engines = self._engines
        for name in ("A", "B"):
            arguments = ["--model", self._options.model, "--runtime-dir", str(self._runtime), "--name", f"demo-{name}"]
            engines[name] = self._start(f"engine {name}", python("demo_engine.py", *arguments))
        for name, engine in engines.items():
            self._progress.say(f"engine {name} loads the model")
            ready = engine.receive(READY_S, self._progress.tick)["ready"]
            self._print(
                f"engine {name}: {ready['model']}, loaded in {ready['load_s']:.1f} s, weights fingerprinted in "
                f"{ready['fingerprint_s']:.1f} s, blocks of {ready['block_tokens']} tokens, "
                f"{ready['block_bytes'] / 1024:.0f} KiB"
            )

    def _start(self, name: str, command: list[str]) -> Process:
        process = Process(name, command, self._dir / f"{name.replace(' ', '-')}.log")
        self._processes.append(process)
        return process

    def _ask(self, engine: Process, ask: Ask, act: int) -> Row:
        history = self._histories.get(ask.chat, [])
        by_tier = self._request(ask, {"find": history, "timeout_s": FIND_S})["by_tier"] if act > 1 else {}
        opening = "\n" if history else _opening(ask.document, self._options.model)
        text = f"{opening}<|im_start|>user\n{ask.question}<|im_end|>\n<|im_start|>assistant\n"
        engine.send({"history": history, "text": text, "max_new_tokens": 8 if self._options.quick else 24})
        reply = engine.receive(ANSWER_S, self._progress.tick)
        self._histories[ask.chat] = reply["ids"]
        self._turns[ask.chat] = self._turns.get(ask.chat, 0) + 1
        return _row(ask, act, self._turns[ask.chat], by_tier, reply)

    def _print(self, text: str) -> None:
        self._progress.clear()
        print(text, file=self._out, flush=True)


def _opening(document: str, model: str) -> str:
    """The system turn that carries the document."""
    from pydoc_data.topics import topics

    text = topics[document]
    if model == "tiny":
        text = text[:TINY_DOCUMENT_CHARS]
    return f"<|im_start|>system\nYou answer questions about this text.\n\n{text}<|im_end|>\n"


def _nvme_bytes(folder: Path) -> int:
    """What the demo's drive may take: less where the disk is nearly full. Raises SetupError."""
    allowed = min(NVME_BYTES, shutil.disk_usage(folder).free // 2)
    if allowed < NVME_BYTES_MIN:
        raise demo_model.SetupError(f"{folder} needs {2 * NVME_BYTES_MIN >> 20} MiB of free disk for the nvme tier")
    return allowed


def _row(ask: Ask, act: int, turn: int, by_tier: dict[str, int], reply: dict[str, Any]) -> Row:
    report = reply["report"]
    return Row(
        act=act,
        engine=ask.engine,
        chat=ask.chat,
        turn=turn,
        prompt_tokens=report["prompt_tokens"],
        restored_tokens=report["restored_tokens"],
        plain_ttft_s=reply["plain_ttft_s"],
        ttft_s=report["ttft_s"],
        restored_bytes=report["restored_bytes"],
        gb_per_s=report["gb_per_s"],
        stored_blocks=report["stored_blocks"],
        identical=reply["identical"],
        by_tier=by_tier,
        failure=report["failure"] or report["bypassed"],
        question=ask.question,
        answer=" ".join(reply["answer"].split()),
    )


def _finish(demo: Demo, options: argparse.Namespace, progress: Progress) -> int:
    totals = demo.totals()
    status = demo.status()
    progress.clear()
    if options.json:
        rows = [asdict(row) for row in demo.rows]
        after_kill = totals[1] if len(totals) > 1 else None
        answer = {"requests": rows, "summary": totals[0], "after_kill": after_kill, "status": json.loads(status)}
        print(json.dumps(answer))
    else:
        print("\n".join(summary_text(total) for total in totals))
        if len(totals) > 1:
            print(f"{totals[1]['nvme_tokens']} tokens came from nvme, after the daemon was killed")
        print(f"\n$ forebay status\n{status.rstrip()}")
    failed = failures(totals)
    for reason in failed:
        print(f"FAILED: {reason}", file=sys.stderr)
    return EXIT_DIFFERS if failed else 0


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    text = "Two engine processes share one KV cache, and get it back after its daemon was killed."
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--quick", action="store_true", help="one document, seven requests, short answers")
    parser.add_argument("--model", choices=demo_model.MODELS, default=demo_model.MODELS[0])
    parser.add_argument("--keep-going", action="store_true", help="go on after an output that differs")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, the table on stderr")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    progress = Progress()
    demo: Demo | None = None
    try:
        demo_model.go_offline()
        demo_model.prepare(options.model, progress.say)
        demo = Demo(options, progress)
        demo.run()
        return _finish(demo, options, progress)
    except demo_model.SetupError as error:
        print(f"\nthe model could not be set up: {error}", file=sys.stderr)
        return EXIT_SETUP
    except (ProcessError, OSError, subprocess.TimeoutExpired) as error:
        print(f"\n{error}", file=sys.stderr)
        return EXIT_PROCESS
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave processes behind
        if demo is not None:
            demo.close()


if __name__ == "__main__":
    sys.exit(main())
