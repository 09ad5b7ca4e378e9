"""Both client shells behind one face, so that one suite can be run against each."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path
from typing import Any

from forebay.client import AsyncClient, Client


class SyncShell:
    """The blocking client, as it is."""

    kind = "sync"

    def __init__(self, runtime_dir: Path, **options: Any) -> None:
        self.client = Client(runtime_dir, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)


class AsyncShell:
    """The asyncio client, each call run to its end on a loop of its own."""

    kind = "async"

    def __init__(self, runtime_dir: Path, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self.client = AsyncClient(runtime_dir, **options)

    def __getattr__(self, name: str) -> Any:
        member = getattr(self.client, name)
        if not inspect.iscoroutinefunction(member):
            return member
        return lambda *args, **options: self.wait(member(*args, **options))

    def wait(self, coroutine: Any) -> Any:
        return self._loop.run_until_complete(coroutine)

    def close(self) -> None:
        self.wait(self.client.close())
        self.wait(self._loop.shutdown_default_executor())
        self._loop.close()


def commit(shell: Any, reservation: Any, failed: tuple[int, ...] = ()) -> int:
    """Commit a reservation of either shell."""
    outcome = reservation.commit(failed)
    return shell.wait(outcome) if inspect.isawaitable(outcome) else outcome


def wait(shell: Any, lease: Any, blocks: int | None = None, timeout_ms: float | None = None) -> int:
    """Wait for a lease of either shell."""
    outcome = lease.wait(blocks, timeout_ms)
    return shell.wait(outcome) if inspect.isawaitable(outcome) else outcome
