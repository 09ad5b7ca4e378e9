"""The demonstration: two engine processes share one daemon, and a prompt read once is never computed again.

Two processes, each with a real trained model, chat about long documents (pages of Python's own language reference,
which every Python carries). The second asks other questions about the first one's documents and continues its
chats. Each request runs twice in the same process, through forebay and by plain `generate`; greedy float32 tokens
must be the same. The engines take turns, because on a small machine two at once would time each other.

Exit status: 0 all identical and some tokens restored, 1 not so, 2 usage, 3 the model could not be set up, 4 a process
failed, 130 interrupted.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from forebay.bench import demo_model
from forebay.bench.demo_processes import Process, ProcessError, forebay, python

READY_S = 120.0
ANSWER_S = 300.0
DAEMON_READY_S = 30.0
HOST_BYTES = "1GiB"
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
QUICK = tuple(ask for ask in SCRIPT if ask.document == "calls")


@dataclass(frozen=True, slots=True)
class Row:
    """What one request showed; times in seconds to the first token."""

    engine: str
    chat: str
    turn: int
    prompt_tokens: int
    restored_tokens: int
    plain_ttft_s: float
    ttft_s: float
    restored_bytes: int
    gb_per_s: float
    stored_blocks: int
    identical: bool
    failure: str
    question: str
    answer: str


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
        self._dir = Path(tempfile.mkdtemp(prefix="forebay-demo-"))
        self._runtime = self._dir / "run"
        self._processes: list[Process] = []
        self._histories: dict[str, list[int]] = {}
        self._turns: dict[str, int] = {}
        self.rows: list[Row] = []

    def run(self) -> None:
        """Play the script; raises ProcessError when a process fails."""
        self._start_daemon()
        engines = self._start_engines()
        script = QUICK if self._options.quick else SCRIPT
        self._print(_HEADER)
        for number, ask in enumerate(script, start=1):
            self._progress.say(f"request {number} of {len(script)}: engine {ask.engine}, chat {ask.chat}")
            row = self._ask(engines[ask.engine], ask)
            self.rows.append(row)
            self._print(_row_text(row))
            if not row.identical and not self._options.keep_going:
                self._print("stopped at the first output that differs (--keep-going goes on)")
                return

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
        daemon = self._start("daemon", forebay(*arguments, "--metrics-listen", "off"))
        deadline = time.monotonic() + DAEMON_READY_S
        ping = forebay("ping", "--runtime-dir", str(self._runtime))
        while subprocess.run(ping, capture_output=True, timeout=DAEMON_READY_S).returncode != 0:
            if not daemon.alive() or time.monotonic() > deadline:
                raise daemon.failure("does not answer")
            self._progress.tick()

    def _start_engines(self) -> dict[str, Process]:
        engines = {}
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
        return engines

    def _start(self, name: str, command: list[str]) -> Process:
        process = Process(name, command, self._dir / f"{name.replace(' ', '-')}.log")
        self._processes.append(process)
        return process

    def _ask(self, engine: Process, ask: Ask) -> Row:
        history = self._histories.get(ask.chat, [])
        opening = "\n" if history else _opening(ask.document, self._options.model)
        text = f"{opening}<|im_start|>user\n{ask.question}<|im_end|>\n<|im_start|>assistant\n"
        engine.send({"history": history, "text": text, "max_new_tokens": 8 if self._options.quick else 24})
        reply = engine.receive(ANSWER_S, self._progress.tick)
        self._histories[ask.chat] = reply["ids"]
        self._turns[ask.chat] = self._turns.get(ask.chat, 0) + 1
        return _row(ask, self._turns[ask.chat], reply)

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


def _row(ask: Ask, turn: int, reply: dict[str, Any]) -> Row:
    report = reply["report"]
    return Row(
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
        failure=report["failure"] or report["bypassed"],
        question=ask.question,
        answer=" ".join(reply["answer"].split()),
    )


_HEADER = (
    "\n"
    "                   prompt  restored    first token, s        speed  fetched  rate      tokens\n"
    "engine chat        tokens  tokens      without  forebay      up     MB       GB/s      identical"
)


def _row_text(row: Row) -> str:
    rate = f"{row.gb_per_s:.1f}" if row.restored_bytes else "-"
    speed_up = f"{row.plain_ttft_s / row.ttft_s:.1f}x" if row.restored_bytes else "-"
    numbers = (
        f"{row.engine:<6} {row.chat + '/' + str(row.turn):<12}{row.prompt_tokens:>6}{row.restored_tokens:>10}"
        f"{row.plain_ttft_s:>13.2f}{row.ttft_s:>9.2f}{speed_up:>12}"
        f"{row.restored_bytes / 1e6:>7.0f}{rate:>10}      {'yes' if row.identical else 'NO'}"
    )
    lines = [numbers, f"         {row.question} -> {row.answer[:80]!r}"]
    return "\n".join(lines + ([f"         not served: {row.failure}"] if row.failure else []))


def summarize(rows: list[Row]) -> dict[str, Any]:
    """The totals; `speed_up` is over all requests, `speed_up_of_hits` over those that restored something."""
    hits = [row for row in rows if row.restored_tokens]
    plain_s, forebay_s = sum(row.plain_ttft_s for row in rows), sum(row.ttft_s for row in rows)
    hits_plain_s, hits_forebay_s = sum(row.plain_ttft_s for row in hits), sum(row.ttft_s for row in hits)
    return {
        "requests": len(rows),
        "identical": sum(row.identical for row in rows),
        "prompt_tokens": sum(row.prompt_tokens for row in rows),
        "restored_tokens": sum(row.restored_tokens for row in rows),
        "plain_ttft_s": plain_s,
        "forebay_ttft_s": forebay_s,
        "saved_s": plain_s - forebay_s,
        "speed_up": plain_s / forebay_s if forebay_s else 0.0,
        "hits": len(hits),
        "speed_up_of_hits": hits_plain_s / hits_forebay_s if hits_forebay_s else 0.0,
        "restored_bytes": sum(row.restored_bytes for row in rows),
    }


def _summary_text(total: dict[str, Any]) -> str:
    share = 100 * total["restored_tokens"] / max(1, total["prompt_tokens"])
    return (
        f"\n{total['identical']} of {total['requests']} outputs identical to plain generate\n"
        f"{total['restored_tokens']} of {total['prompt_tokens']} prompt tokens not recomputed ({share:.0f} %), "
        f"{total['restored_bytes'] / 1e6:.0f} MB restored\n"
        f"waiting for first tokens: {total['plain_ttft_s']:.1f} s without, {total['forebay_ttft_s']:.1f} s with "
        f"forebay; {total['saved_s']:.1f} s saved, {total['speed_up']:.1f} times faster over all, "
        f"{total['speed_up_of_hits']:.1f} times over the {total['hits']} requests with a stored prefix"
    )


def _finish(demo: Demo, options: argparse.Namespace, progress: Progress) -> int:
    total = summarize(demo.rows)
    status = demo.status()
    progress.clear()
    if options.json:
        rows = [asdict(row) for row in demo.rows]
        print(json.dumps({"requests": rows, "summary": total, "status": json.loads(status)}))
    else:
        print(_summary_text(total))
        print(f"\n$ forebay status\n{status.rstrip()}")
    if total["identical"] < total["requests"]:
        print("FAILED: an output differs", file=sys.stderr)
        return EXIT_DIFFERS
    if not total["restored_tokens"]:
        print("FAILED: no token was restored", file=sys.stderr)
        return EXIT_DIFFERS
    return 0


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description="Two engine processes share one KV cache; see what it saves.")
    parser.add_argument("--quick", action="store_true", help="one document, six requests, short answers")
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
