"""A GPU made of host memory whose streams execute as late, and in as odd an order, as their events allow.

Nothing runs when it is enqueued. Each time somebody asks whether an event has passed, a few operations run, of streams
drawn at random; so a missing event, a buffer used before it is filled or let go of too early shows as wrong bytes.
Memory is poisoned when it is made and when it is let go of.
"""

from __future__ import annotations

import ctypes
import random
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forebay.kernels.layout import Table
from forebay.kernels.reference import ReferenceKernels
from forebay.transports.dma.device import Addresses, Buffer, Direction
from forebay.transports.dma.errors import DmaError

POISON = 0xA5


@dataclass(slots=True, eq=False)
class Event:
    """Attributes: recorded: how often it was recorded. reached: the last record that was executed."""

    recorded: int = 0
    reached: int = 0


@dataclass(slots=True)
class _Stream:
    operations: deque[tuple[Callable[[], bool], Callable[[], None]]] = field(default_factory=deque)


class LateDevice:
    """See `forebay.transports.dma.device.Device`.

    Attributes:
        executed: operations that have run. hung: while True, nothing runs.
        refuse: why memory cannot be pinned; '' pins it.
        unpinned_copies: pieces whose host side lay in no pinned memory.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._lock = threading.RLock()
        self._streams: dict[int, _Stream] = {0: _Stream()}
        self._pinned: dict[int, int] = {}
        self._memory: weakref.WeakSet[Any] = weakref.WeakSet()
        self.kernels = LateKernels(self)
        self.executed = 0
        self.hung = False
        self.refuse = ""
        self.unpinned_copies = 0

    def used(self) -> AbstractContextManager[None]:
        return nullcontext()

    def stream(self, *, urgent: bool) -> int:
        with self._lock:
            handle = len(self._streams)
            self._streams[handle] = _Stream()
            return handle

    def event(self) -> Event:
        return Event()

    def record(self, event: Event, stream: int) -> None:
        with self._lock:
            event.recorded += 1
            ticket = event.recorded
            self.enqueue(stream, lambda: self._reach(event, ticket))

    def wait(self, stream: int, event: Event) -> None:
        with self._lock:
            ticket = event.recorded
            self._streams[stream].operations.append((lambda: event.reached >= ticket, lambda: None))

    def passed(self, event: Event) -> bool:
        with self._lock:
            self.run(self._random.randrange(12))
            return event.reached >= event.recorded

    def copy(self, targets: Addresses, sources: Addresses, sizes: Addresses, direction: Direction, stream: int) -> None:
        pieces = list(zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True))
        for target, source, size in pieces:
            self._check_pinned(source if direction is Direction.LOAD else target, size)
            self.enqueue(stream, lambda piece=(target, source, size): ctypes.memmove(*piece))

    def device_memory(self, size: int) -> Buffer:
        return self._buffer(size, pinned=False)

    def pinned_memory(self, size: int) -> Buffer:
        return self._buffer(size, pinned=True)

    def register(self, address: int, size: int, *, writable: bool) -> int:
        if self.refuse:
            raise DmaError(self.refuse)
        with self._lock:
            self._pinned[address] = size
        return address

    def unregister(self, address: int) -> None:
        with self._lock:
            del self._pinned[address]

    # --- what a test does -------------------------------------------------------------------------------------

    def enqueue(self, stream: int, call: Callable[[], object]) -> None:
        """Run a call on a stream, when its turn comes."""
        with self._lock:
            self._streams[stream].operations.append((lambda: True, call))  # type: ignore[arg-type]

    def run(self, operations: int) -> int:
        """Execute at most so many operations of random streams; returns how many ran."""
        with self._lock:
            for count in range(operations):
                ready = [s for s in self._streams.values() if s.operations and s.operations[0][0]()]
                if not ready or self.hung:
                    return count
                self._random.choice(ready).operations.popleft()[1]()
                self.executed += 1
            return operations

    def settle(self) -> None:
        """Run everything; fails if something waits for ever."""
        while self.run(1000):
            pass
        assert not any(stream.operations for stream in self._streams.values())

    def _reach(self, event: Event, ticket: int) -> None:
        event.reached = max(event.reached, ticket)

    def _buffer(self, size: int, *, pinned: bool) -> Buffer:
        memory: NDArray[np.uint8] = np.full(size + 16, POISON, np.uint8)
        skip = -memory.ctypes.data % 16
        view = memory[skip : skip + size]
        address = view.ctypes.data
        owner = _Owner(memory)
        if pinned:
            with self._lock:
                self._pinned[address] = size
            weakref.finalize(owner, self._pinned.pop, address, None)
        weakref.finalize(owner, memory.fill, POISON)
        return Buffer(address, size, owner, view if pinned else None)

    def _check_pinned(self, address: int, size: int) -> None:
        with self._lock:
            inside = any(start <= address and address + size <= start + n for start, n in self._pinned.items())
            self.unpinned_copies += not inside


class _Owner:
    """What a buffer is kept alive by; its memory outlives it by the finalizer's reference."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self.memory = memory


class LateKernels:
    """The reference kernels, run when their stream's turn comes."""

    def __init__(self, device: LateDevice) -> None:
        self._device = device
        self._kernels = ReferenceKernels()

    def gather(self, table: Table, block_ids: int, slots: int, blocks: int, *, stream: int = 0, **options: Any) -> None:
        self._later(stream, self._kernels.gather, table, block_ids, slots, blocks, **options)

    def scatter(
        self, table: Table, block_ids: int, slots: int, blocks: int, *, stream: int = 0, **options: Any
    ) -> None:
        self._later(stream, self._kernels.scatter, table, block_ids, slots, blocks, **options)

    def read(self, table: Table, block_ids: int, blocks: int, *, stream: int = 0, **options: Any) -> None:
        self._later(stream, self._kernels.read, table, block_ids, blocks, **options)

    def finish(self, table: Table, block_ids: int, blocks: int, *, stream: int = 0, **options: Any) -> None:
        self._later(stream, self._kernels.finish, table, block_ids, blocks, **options)

    def _later(self, stream: int, kernel: Callable[..., None], *arguments: Any, **options: Any) -> None:
        self._device.enqueue(stream, lambda: kernel(*arguments, **options))
