"""What the engine needs of a GPU: streams, events, copies, memory.

Handles of streams are the driver's own numbers, so those of any other library in the process are as good (torch's
``stream.cuda_stream``). The seam lets tests run the engine over host memory, with streams that execute as late and in
as odd an order as their events allow.
"""

from __future__ import annotations

import enum
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from forebay.kernels.layout import Table

Addresses = NDArray[np.int64]


class Direction(enum.Enum):
    """Which way blocks move."""

    LOAD = "load"
    """Host to device."""
    STORE = "store"
    """Device to host."""


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """Memory that lives as long as this object does.

    Attributes:
        address: the device's.
        view: of pinned host memory, uint8 (size,); None for device memory.
    """

    address: int
    size: int
    owner: object
    view: NDArray[np.uint8] | None = None


class Kernels(Protocol):
    """`forebay.kernels.cuda.CudaKernels` and its twins."""

    def gather(
        self,
        table: Table,
        block_ids: int,
        slots: int,
        blocks: int,
        *,
        width: int,
        sums: int = 0,
        stream: int = 0,
        multiprocessors: int = 0,
    ) -> None: ...

    def scatter(
        self,
        table: Table,
        block_ids: int,
        slots: int,
        blocks: int,
        *,
        width: int,
        sums: int = 0,
        stream: int = 0,
        multiprocessors: int = 0,
    ) -> None: ...

    def read(
        self,
        table: Table,
        block_ids: int,
        blocks: int,
        *,
        width: int,
        sums: int,
        stream: int = 0,
        multiprocessors: int = 0,
    ) -> None: ...

    def finish(
        self, table: Table, block_ids: int, blocks: int, *, sums: int, checksums: int, stream: int = 0
    ) -> None: ...


class Device(Protocol):
    """One GPU. Every method that enqueues returns at once; all may be used by several threads."""

    kernels: Kernels

    def used(self) -> AbstractContextManager[None]:
        """Within it this is the calling thread's current device; around whatever a thread asks of it."""
        ...

    def stream(self, *, urgent: bool) -> int:
        """A new stream that does not wait for the legacy default stream; lives as long as the device object."""
        ...

    def event(self) -> Any:
        """A new event, passed as long as it was never recorded."""
        ...

    def record(self, event: Any, stream: int) -> None: ...

    def wait(self, stream: int, event: Any) -> None:
        """What is enqueued on the stream from now on runs after what the event was last recorded behind."""
        ...

    def passed(self, event: Any) -> bool: ...

    def copy(self, targets: Addresses, sources: Addresses, sizes: Addresses, direction: Direction, stream: int) -> None:
        """Copy pieces, in no particular order. The host's side is pinned."""
        ...

    def device_memory(self, size: int) -> Buffer: ...

    def pinned_memory(self, size: int) -> Buffer: ...

    def register(self, address: int, size: int, *, writable: bool) -> int:
        """Pin and map host memory; returns the address at which the device sees it. Raises DmaError."""
        ...

    def unregister(self, address: int) -> None: ...
