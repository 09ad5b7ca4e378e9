"""A real daemon in a process of its own, started the way an operator starts it and stopped with the test.

Readiness is what the service manager is told (READY=1 over NOTIFY_SOCKET), so nothing polls for it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from forebay.daemon.control_link import ControlLink
from forebay.transports.messages import CheckReply, CheckRequest, StatusReply, StatusRequest

FOREBAY = str(Path(sys.executable).parent / "forebay")
COMMAND = [FOREBAY] if Path(FOREBAY).exists() else [sys.executable, "-P", "-m", "forebay.daemon.cli"]
"""The second where forebay is on the path of modules only, as on a machine lent for its GPU."""

START_S = 30.0
STOP_S = 15.0


class LiveDaemon:
    """`forebay serve` on a runtime directory of its own. Settings are flags: ``{"leases.ttl_ms": 200}``.

    `settings` and `wrap` may be changed between two starts.
    """

    def __init__(
        self,
        settings: dict[str, object] | None = None,
        *,
        host_bytes: str = "64MiB",
        descriptors: int = 0,
        wrap: Sequence[str] = (),
    ) -> None:
        """`descriptors` is the most files it may open; 0 for this process's limit. `wrap` is a command that ends by
        becoming the one that follows it.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="forebay-test-")
        self.folder = Path(self._folder.name)
        self.runtime_dir = Path(self._folder.name) / "run"
        self.log_path = Path(self._folder.name) / "log"
        self.config_path = Path(self._folder.name) / "forebay.toml"
        self.config_path.write_text("")
        self.messages: list[bytes] = []
        self._ready: socket.socket | None = None
        self.wrap = ["prlimit", f"--nofile={descriptors}:{descriptors}"] if descriptors else [*wrap]
        self.settings: dict[str, object] = {"host.bytes": host_bytes, "metrics.listen": "off", **(settings or {})}
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop()
        if error is not None:
            print(self.log_path.read_text(errors="replace")[-8000:], file=sys.stderr)
        self._close_ready()
        self._folder.cleanup()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        """Start, and return when it says that it is ready."""
        self.launch()
        self.wait_for(b"READY=1")

    def launch(self) -> None:
        """Start, and return at once."""
        flags = [part for key, value in self.settings.items() for part in ("--set", f"{key}={value}")]
        flags += ["--config", str(self.config_path)]
        notify = str(Path(self._folder.name) / "notify")
        self._close_ready()
        self._ready = ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with self.log_path.open("ab") as log:
            Path(notify).unlink(missing_ok=True)
            ready.bind(notify)
            self.process = subprocess.Popen(
                [*self.wrap, *COMMAND, "serve", "--runtime-dir", str(self.runtime_dir), *flags],
                stdout=log,
                stderr=log,
                env={**os.environ, "NOTIFY_SOCKET": notify},
            )

    def is_ready(self) -> bool:
        """Wait until it says that it is; False when it has died instead."""
        assert self.process is not None
        try:
            self.wait_for(b"READY=1")
        except AssertionError:
            if self.process.poll() is None:
                raise
            return False
        return True

    def kill(self) -> None:
        """SIGKILL, as the out-of-memory killer does."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(STOP_S)

    def restart(self) -> None:
        self.kill()
        self.start()

    def stop(self) -> int:
        """SIGTERM; returns the exit code. What does not stop in time is killed."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(STOP_S)

    def link(self) -> ControlLink:
        """An operator's connection."""
        return ControlLink(str(self.runtime_dir), timeout_s=10.0)

    def status(self) -> dict[str, Any]:
        with self.link() as link:
            return json.loads(link.call(StatusRequest(), StatusReply).document)

    def problems(self) -> tuple[str, ...]:
        """Violated invariants, as the daemon itself finds them."""
        with self.link() as link:
            return link.call(CheckRequest(), CheckReply).problems

    def store(self) -> dict[str, Any]:
        """The core's part of the status; this very question's session is not counted."""
        store = self.status()["store"]
        store["sessions"] -= 1
        return store

    def wait_for(self, state: bytes) -> None:
        """Until the daemon tells its service manager this; what it told is kept in `messages`."""
        assert self._ready is not None
        assert self.process is not None
        deadline = time.monotonic() + START_S
        self._ready.settimeout(0.1)
        while time.monotonic() < deadline:
            try:
                self.messages.append(self._ready.recv(4096))
            except TimeoutError:
                if self.process.poll() is not None:
                    break
            else:
                if state in self.messages[-1]:
                    return
        log = self.log_path.read_text(errors="replace")[-4000:]
        raise AssertionError(f"the daemon did not say {state!r}: {log}")

    def _close_ready(self) -> None:
        if self._ready is not None:
            self._ready.close()
            self._ready = None


def eventually(condition: Callable[[], bool], what: str, within_s: float = 10.0) -> float:
    """Wait until the condition holds; returns the seconds it took. Fails, naming `what`, after `within_s`."""
    started = time.monotonic()
    pause = threading.Event()
    while not condition():
        if time.monotonic() - started > within_s:
            raise AssertionError(f"not within {within_s} s: {what}")
        pause.wait(0.005)
    return time.monotonic() - started
