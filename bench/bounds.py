"""Bounds: what this machine reaches without forebay, for the same bytes, by the plainest means.

A round trip is held against a bare pyzmq echo over ipc between two processes; a fetch or store against one memcpy of
all its bytes at once, in the same process, between the same kinds of memory (a shared memfd on the daemon's kind of
pages, and private heap). One memcpy of everything is the hardest form of that bound: it pays for no block twice.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import zmq
from numpy.typing import NDArray

from forebay.bench.echo import LENGTH_BYTES
from forebay.bench.processes import START_S, BenchError, Process, python
from forebay.bench.timing import Action, timed
from forebay.transports.shm import create_memfd, map_shared

HUGE_PAGE_BYTES = 2 << 20

Bytes = NDArray[np.uint8]


class Echo:
    """A raw echo server and a DEALER to it."""

    def __init__(self, directory: Path, cores: frozenset[int]) -> None:
        self._server = Process(
            "the echo server",
            [*python("forebay.bench.echo"), f"ipc://{directory}/echo.sock"],
            directory / "echo.log",
            cores=cores,
        )
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        self._dealer.setsockopt(zmq.LINGER, 0)
        self._dealer.setsockopt(zmq.RCVTIMEO, int(START_S * 1000))
        self._dealer.connect(f"ipc://{directory}/echo.sock")

    def caller(self, request_bytes: int, reply_bytes: int) -> Any:
        """A function that makes one round trip of payloads this long. Raises BenchError when nobody answers."""
        request = reply_bytes.to_bytes(LENGTH_BYTES, "little").ljust(request_bytes, b"\0")
        send, receive = self._dealer.send, self._dealer.recv

        def call() -> None:
            send(request)
            receive()

        try:
            call()
        except zmq.Again:
            self._server.check()
            raise BenchError("the echo server does not answer") from None
        return call

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._dealer.close()
        self._context.term()
        self._server.stop()


class Memcpy:
    """A shared memfd and this process's heap, both touched, copied whole.

    Args:
        heap: the engine's side; the copy's other end is as long.
        pages: the kind of pages of the daemon's slabs, as its status names it.
    """

    def __init__(self, heap: Bytes, pages: str) -> None:
        self._heap = heap
        self._shared = shared_array(len(heap), pages)

    def out(self) -> Action:
        """Shared memory -> heap, as a fetch copies."""
        return timed(lambda: np.copyto(self._heap, self._shared))

    def into(self) -> Action:
        """Heap -> shared memory, as a store copies."""
        return timed(lambda: np.copyto(self._shared, self._heap))


def shared_array(size_bytes: int, pages: str) -> Bytes:
    """A touched memfd, mapped as a client maps a slab, on the kind of pages named. Raises OSError."""
    rounded = -(-size_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    fd = create_memfd("forebay-bench", rounded, huge_page_bytes=HUGE_PAGE_BYTES if pages == "hugetlb" else 0)
    try:
        mapping = map_shared(fd, rounded, writable=True)
    finally:
        os.close(fd)
    if pages == "thp":
        mapping.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(mapping, np.uint8)[:size_bytes]
    array[:] = 1
    return array


def heap_array(size_bytes: int, *, past_bytes: int = 0) -> Bytes:
    """Touched private memory on huge pages, as an engine's pool; it begins `past_bytes` past a huge page's start.

    All heap here is alike, bounds included: arrays of different sizes from malloc would lie on different pages.
    """
    mapping = mmap.mmap(-1, size_bytes + 2 * HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(mapping, np.uint8)
    start = -int(whole.__array_interface__["data"][0]) % HUGE_PAGE_BYTES + past_bytes
    array = whole[start : start + size_bytes]
    array[:] = 2
    return array


def pages_of(status: dict[str, Any]) -> str:
    """The kind of pages the daemon's slabs lie on."""
    return str(status["tiers"][0]["pages"])
