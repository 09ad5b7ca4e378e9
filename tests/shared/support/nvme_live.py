"""A live daemon with an nvme tier, and an engine that stores on it, keeps the ledger and judges what comes back.

The blocks are small, so that a test has many of them: what is tested here is which bytes come back, not how fast.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from forebay.client import Client
from forebay.client.namespaces import Namespace
from forebay.client.results import PersistResult, StoreResult
from forebay.kvstore.hashing import PrefixHasher
from forebay.kvstore.namespace import NamespaceSpec
from support.ledger import Ledger, Verdict
from support.live import LiveDaemon, eventually

BLOCK_BYTES = 16 << 10
BLOCKS = 8
"""Blocks of a chain."""
SPEC = NamespaceSpec("faults", "1", "uint8", 4, (BLOCK_BYTES,))
OTHER_SPEC = NamespaceSpec("other", "1", "uint8", 4, (BLOCK_BYTES + 5000,))
OTHER_FIRST = 1_000_000
"""Chains from this number on are of another namespace, with larger blocks."""
SLAB_BYTES = 1 << 20
PERSIST_MS = 20_000


def chain(number: int, blocks: int = BLOCKS) -> list[bytes]:
    """The hashes of a conversation that differs from that of any other number from its first block on."""
    return _hasher(number).hashes(range(number * 1000, number * 1000 + SPEC.block_tokens * blocks))


def _hasher(number: int) -> PrefixHasher:
    return PrefixHasher(SPEC if number < OTHER_FIRST else OTHER_SPEC)


def _words(path: Path) -> list[str]:
    """Of a file that may be gone by now."""
    try:
        return path.read_text().split()
    except OSError:
        return []


class NvmeDaemon(LiveDaemon):
    """Drives of `nvme_bytes` each, in the daemon's own folder unless `paths` says otherwise."""

    def __init__(
        self,
        settings: dict[str, object] | None = None,
        *,
        host_bytes: str = "16MiB",
        nvme_bytes: int = 32 << 20,
        drives: int = 1,
        paths: Sequence[Path] = (),
        wrap: Sequence[str] = (),
    ) -> None:
        super().__init__(None, host_bytes=host_bytes, wrap=wrap)
        self.paths = list(paths) or [self.folder / f"nvme{number}" for number in range(drives)]
        self.settings |= {"host.slab_bytes": "1MiB", "nvme.bytes": nvme_bytes, "nvme.slab_bytes": SLAB_BYTES}
        self.settings["shutdown.flush_s"] = 0
        self.settings |= settings or {}

    def launch(self) -> None:
        self.settings["nvme.paths"] = ",".join(map(str, self.paths))
        super().launch()

    @property
    def io_pids(self) -> list[int]:
        """The drives' I/O processes; one that took a dead one's place is the child of another thread."""
        children = [pid for task in Path(f"/proc/{self.pid}/task").glob("*/children") for pid in _words(task)]
        return [int(pid) for pid in children if b"nvme_io_child" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    @property
    def pids(self) -> list[int]:
        """All that touch the drives."""
        return [self.pid, *self.io_pids]

    @property
    def data_files(self) -> list[Path]:
        return [path / "blocks.dat" for path in self.paths]

    def restored(self) -> None:
        """Wait until everything that is on the drives has been found."""
        eventually(lambda: bool(self.status()["nvme"]["restored"]), "the restore ends", within_s=60)

    def nvme(self) -> dict[str, Any]:
        """The tier's slots, as the core counts them."""
        return next(tier for tier in self.store()["tiers"] if tier["tier"] == "nvme")

    def errors(self) -> dict[str, int]:
        """Blocks lost, by cause."""
        return dict(self.status()["nvme"]["errors"])

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


class Engine:
    """A client of a daemon that may die at any time; what it was told stays in the ledger."""

    def __init__(
        self, daemon: LiveDaemon, ledger: Ledger, *, timeout_ms: float = 10_000.0, others: bool = False
    ) -> None:
        """`others`: chains from OTHER_FIRST on will be used as well."""
        self.client = Client(daemon.runtime_dir, timeout_ms=timeout_ms)
        self.ns = self.client.open_namespace(SPEC)
        self.other_ns = self.client.open_namespace(OTHER_SPEC) if others else self.ns
        self.ledger = ledger

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.client.close()

    def ns_of(self, number: int) -> Namespace:
        return self.ns if number < OTHER_FIRST else self.other_ns

    def store(self, number: int, blocks: int = BLOCKS) -> StoreResult:
        """Store a chain; what is there already stays."""
        hashes = chain(number, blocks)
        memory = self._memory(number, blocks)
        self.ledger.fill(hashes, memory.reshape(-1).data)
        return self.client.store(self.ns_of(number), hashes, memory)

    def _memory(self, number: int, blocks: int) -> NDArray[np.uint8]:
        return np.zeros((blocks, self.ns_of(number).block_bytes), np.uint8)

    def persist(self, number: int, blocks: int = BLOCKS, timeout_ms: float = PERSIST_MS) -> PersistResult:
        """Have a chain made durable, and note in the ledger what the daemon says is."""
        result = self.client.persist(self.ns_of(number), chain(number, blocks), timeout_ms)
        self.ledger.durable(chain(number, blocks)[: result.durable])
        return result

    def store_durably(self, numbers: Sequence[int], blocks: int = BLOCKS) -> None:
        """Store chains whole and have them made durable whole."""
        for number in numbers:
            stored = self.store(number, blocks)
            assert stored.rejected == 0, f"chain {number}: {stored}"
        for number in numbers:
            result = self.persist(number, blocks)
            assert result.durable == blocks, f"chain {number}: {result}"

    def fetch(self, number: int, blocks: int = BLOCKS) -> Verdict:
        """Fetch a chain and judge it."""
        hashes = chain(number, blocks)
        memory = self._memory(number, blocks)
        got = self.client.fetch(self.ns_of(number), hashes, memory).blocks
        return self.ledger.compare(hashes, [memory[at].data if at < got else None for at in range(blocks)])

    def fetch_all(self, numbers: Sequence[int], blocks: int = BLOCKS) -> Verdict:
        return sum((self.fetch(number, blocks) for number in numbers), Verdict())


# --- strace: faults of a live daemon's own system calls ------------------------------------------------------------


def why_no_strace() -> str:
    """Why system calls of another process cannot be tampered with here; empty where they can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        try:
            tried = subprocess.run(
                ["timeout", "0.2", "strace", "-o", "/dev/null", "-p", str(sleeper.pid)],
                capture_output=True,
                text=True,
                check=False,
                timeout=20,
            )
        finally:
            sleeper.kill()
    return "" if "attached" in tried.stderr else f"ptrace is not permitted here: {tried.stderr.strip()[-200:]}"


def killed_at(call: str, when: int) -> list[str]:
    """What to wrap a daemon in, so that it dies as it begins the n-th call of this kind; each thread counts its own."""
    inject = ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={when}"]
    return ["strace", "-D", "-f", "-qq", "-o", "/dev/null", *inject]


class Tampered:
    """While it is entered, system calls of these processes end as `fault` says, in strace's words: `error=EIO`.

    With `path` only calls on that file.
    """

    def __init__(self, pids: Sequence[int], calls: Sequence[str], fault: str, path: Path | None = None) -> None:
        named = ",".join(calls)
        self._command = ["strace", "-f", "-o", "/dev/null", "-e", f"trace={named}", "-e", f"inject={named}:{fault}"]
        self._command += ["-P", str(path)] if path is not None else []
        self._command += [word for pid in pids for word in ("-p", str(pid))]
        self._attaching = len(pids)
        self._strace: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._strace = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        assert self._strace.stderr is not None
        for line in self._strace.stderr:
            self._attaching -= "attached" in line
            if not self._attaching:
                return self
        raise AssertionError("strace did not attach")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        assert self._strace is not None
        self._strace.terminate()
        self._strace.communicate(timeout=20)
