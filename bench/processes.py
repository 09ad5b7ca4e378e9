"""Processes that a benchmark starts: the daemon under test, the raw echo server, workers. None outlives the run.

Each is killed when its context ends, and by the kernel should the benchmark itself be killed. Every wait has a
deadline. Cores are set from outside right after the start, before a process has a second thread.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from forebay.client import Client
from forebay.kvstore.errors import ForebayError

START_S = 20.0
ANSWER_S = 60.0
STOP_S = 3.0
LOG_TAIL_LINES = 8

_never = threading.Event()


class BenchError(Exception):
    """A measurement could not be made; the text says why."""


@dataclass(frozen=True, slots=True)
class Cores:
    """Who runs where. On one core all share it.

    Attributes:
        client: the measured client, alone with the daemon or among others.
        daemon: the daemon, or the echo server.
        busy_client: the measured client beside others that keep a core busy; on two cores it shares the daemon's.
        others: those others; never the daemon's core where there are two.
        free: every core the benchmark may use.
    """

    client: frozenset[int]
    daemon: frozenset[int]
    busy_client: frozenset[int]
    others: frozenset[int]
    free: frozenset[int]

    @classmethod
    def of(cls, available: Sequence[int]) -> Cores:
        """The first core for client and copies, the second for the daemon, the rest for others."""
        ordered = sorted(available)
        first, second, rest = ordered[:1], ordered[1:2] or ordered[:1], ordered[2:]
        client_beside, others = (first, rest) if rest else (second, first)
        return cls(*map(frozenset, (first, second, client_beside, others, ordered)))

    @classmethod
    def here(cls) -> Cores:
        return cls.of(sorted(os.sched_getaffinity(0)))


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str, *, step_s: float = 0.002) -> None:
    """Wait for something that sends no event. Raises BenchError at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"{what}: not within {timeout_s:g} s")
        _never.wait(step_s)


def pause(seconds: float) -> None:
    """Let time pass."""
    _never.wait(seconds)


class Process:
    """A child and its log file."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, *, cores: frozenset[int] | None = None, pipes: bool = False
    ) -> None:
        self.name = name
        self._log = log
        pipe = subprocess.PIPE if pipes else subprocess.DEVNULL
        with log.open("wb") as sink:
            self.child = subprocess.Popen([*_die_with_parent(), *command], stdin=pipe, stdout=pipe, stderr=sink)
        if cores is not None:
            os.sched_setaffinity(self.child.pid, cores)

    @property
    def pid(self) -> int:
        return self.child.pid

    def check(self) -> None:
        """Raise BenchError, with the end of the log, when the process is gone."""
        if self.child.poll() is not None:
            raise self.failure(f"ended with status {self.child.returncode}")

    def failure(self, what: str) -> BenchError:
        tail = self._log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return BenchError(" | ".join([f"{self.name} {what}", *tail]))

    def stop(self) -> None:
        """SIGTERM, then SIGKILL; returns within STOP_S. Idempotent."""
        for end in (self.child.terminate, self.child.kill):
            if self.child.poll() is not None:
                break
            end()
            try:
                self.child.wait(STOP_S / 2)
            except subprocess.TimeoutExpired:
                continue
        for pipe in (self.child.stdin, self.child.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


class Daemon(Process):
    """A daemon on a runtime directory of its own, with explicit sizes and no configuration file of the machine's.

    Args:
        directory: made here; one per daemon.
        settings: further keys, as `--set` takes them.
    """

    def __init__(
        self,
        directory: Path,
        host_bytes: int,
        *,
        cores: frozenset[int] | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        directory.mkdir(mode=0o700)
        self.directory = directory
        empty = directory / "forebay.toml"
        empty.touch()
        more = [f"--set={key}={value}" for key, value in (settings or {}).items()]
        listen = f"--metrics-listen=unix:{directory}/metrics.sock"
        flags = [f"--config={empty}", f"--runtime-dir={directory}", f"--host-bytes={host_bytes}", listen, *more]
        command = [*python("forebay.daemon.cli"), "serve", "--log-level=warning", *flags]
        self.started_s = time.monotonic()
        super().__init__("the daemon", command, directory / "daemon.log", cores=cores)

    @property
    def pids(self) -> list[int]:
        """Its own and those of its children, which do the drives' I/O."""
        return [self.pid, *map(int, Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split())]

    def ready(self, step_s: float = 0.002) -> Self:
        """Wait until it serves, looking every `step_s`."""
        wait_until(self._serves, START_S, "the daemon's start", step_s=step_s)
        return self

    def populated(self) -> Self:
        """Wait until it serves and all its memory was touched."""
        self.ready()
        with self.client() as client:
            wait_until(lambda: _untouched(client.status()) == 0, START_S, "touching the daemon's memory", step_s=0.02)
        return self

    def client(self, name: str = "bench", *, copy_threads: int = 1, copy_cpus: Sequence[int] = ()) -> Client:
        """Strict, and patient: a benchmark wants errors, and a copy of 1 GiB may hold the machine."""
        return Client(
            self.directory,
            name,
            strict=True,
            budget_ms=500,
            timeout_ms=10_000,
            copy_threads=copy_threads,
            copy_cpus=copy_cpus,
        )

    def _serves(self) -> bool:
        self.check()
        if not (self.directory / "session.sock").exists():
            return False
        try:
            with self.client() as client:
                return client.ping()
        except ForebayError:
            return False


class Worker(Process):
    """A client process that is told what to do line by line; see `worker.py`."""

    def __init__(self, number: int, daemon: Daemon, cores: frozenset[int]) -> None:
        command = [*python("forebay.bench.worker"), str(daemon.directory)]
        log = daemon.directory / f"worker-{number}-{time.monotonic_ns()}.log"
        super().__init__(f"worker {number}", command, log, cores=cores, pipes=True)

    def tell(self, order: str, **arguments: object) -> None:
        """Send an order without waiting for its answer."""
        pipe: Any = self.child.stdin
        try:
            pipe.write(json.dumps({"order": order, **arguments}).encode() + b"\n")
            pipe.flush()
        except OSError as error:
            raise self.failure("is gone") from error

    def hear(self, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """The answer to the oldest order not yet answered."""
        pipe: Any = self.child.stdout
        if not select.select([pipe], [], [], timeout_s)[0]:
            raise self.failure(f"did not answer within {timeout_s:g} s")
        line = pipe.readline()
        if not line:
            self.child.wait(STOP_S)
            raise self.failure(f"ended with status {self.child.returncode}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{self.name}: {answer['error']}")
        return answer

    def ask(self, order: str, **arguments: object) -> dict[str, Any]:
        """Send an order and wait for its answer."""
        self.tell(order, **arguments)
        return self.hear()


def python(module: str) -> list[str]:
    """The command that runs a module with this interpreter, its compiled form kept as after any installation.

    Without the `env` a shell that forbids writing compiled modules would make every start compile everything anew.
    """
    return ["env", "-u", "PYTHONDONTWRITEBYTECODE", sys.executable, "-P", "-m", module]


def _untouched(status: Mapping[str, Any]) -> int:
    host = status["tiers"][0]
    return int(host["capacity_bytes"]) - int(host["populated_bytes"])


def _die_with_parent() -> list[str]:
    """What to put before a command so that it ends with this process, however that ends; nothing where not to be had.

    A preexec_fn was rejected: it forks this process, its threads' locks and the clients' fork handlers included.
    """
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []
