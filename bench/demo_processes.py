"""The processes of the demonstration: started, spoken to and ended with a deadline on every wait."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STOP_S = 10.0
LOG_TAIL_LINES = 12

Tick = Callable[[], None]


class ProcessError(Exception):
    """A process died, failed or stayed silent; the text holds the end of its log."""


class Process:
    """A child in a process group of its own (Ctrl-C reaches only the parent, which then ends it in order).

    Args:
        talks: it answers on its standard output; else that goes to the log too.
    """

    def __init__(self, name: str, command: list[str], log: Path, *, talks: bool = True) -> None:
        self.name = name
        self.log = log
        with log.open("wb") as sink:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if talks else sink,
                stderr=sink,
                start_new_session=True,
            )
        self._stdin: Any = self._child.stdin
        self._stdout: Any = self._child.stdout or ()
        self._lines: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, name=f"read-{name}", daemon=True).start()

    def alive(self) -> bool:
        return self._child.poll() is None

    def send(self, message: dict[str, Any]) -> None:
        """Write one JSON line; raises ProcessError when the child is gone."""
        try:
            self._stdin.write(json.dumps(message).encode() + b"\n")
            self._stdin.flush()
        except OSError as error:
            raise self.failure("is gone") from error

    def receive(self, timeout_s: float, tick: Tick) -> dict[str, Any]:
        """The next JSON line; calls `tick` about once a second while waiting."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                line = self._lines.get(timeout=1.0)
                if not line:
                    raise self.failure("ended")
                message: dict[str, Any] = json.loads(line)
                return message
            tick()
        raise self.failure(f"did not answer within {timeout_s:.0f} s")

    def failure(self, what: str) -> ProcessError:
        """An error that shows the end of the log."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout=1.0)
        state = "running" if self.alive() else f"exit status {self._child.returncode}"
        tail = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return ProcessError("\n".join([f"{self.name} {what} ({state}); the end of its log:", *tail]))

    def kill(self) -> None:
        """SIGKILL, and nothing before it, to all that it has started too; returns when it is dead."""
        self._kill_all()
        self._child.wait(timeout=STOP_S)

    def stop(self) -> None:
        """End of input and SIGTERM, then SIGKILL; returns within twice STOP_S."""
        with contextlib.suppress(OSError):
            self._stdin.close()
        for end in (self._child.terminate, self._child.kill):
            if not self.alive():
                break
            end()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(timeout=STOP_S)
        self._kill_all()

    def _kill_all(self) -> None:
        """An engine's own processes outlive it when it is killed; all are of the session that began with it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)

    def _read(self) -> None:
        for line in self._stdout:
            self._lines.put(line)
        self._lines.put(b"")


def python(script: str, *arguments: str) -> list[str]:
    """The command that runs a script beside this one with this interpreter."""
    return [sys.executable, str(Path(__file__).resolve().parent / script), *arguments]


def forebay(*arguments: str) -> list[str]:
    """The command line of the installed `forebay`."""
    return [str(Path(sys.executable).with_name("forebay")), *arguments]
