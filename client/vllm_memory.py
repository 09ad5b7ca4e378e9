"""The engine's KV memory as the worker moves it: host memory in place, device memory through a staging buffer.

Copies of device memory are plain torch copies on a stream of their own, block by block through pinned memory. They
stand in until there are copy kernels, and have been run on CPU tensors only, not on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from forebay.client.copier import Copier, CopyPlan
from forebay.client.results import FetchResult
from forebay.client.segments import SegmentTable

Fetch = Callable[[Sequence[bytes], SegmentTable, Sequence[int]], FetchResult]
"""Bring blocks into a table of host memory: `Client.fetch` in a namespace."""

STAGING_BYTES = 32 << 20


class EngineMemory(Protocol):
    """Blocks of the engine. May be used by several threads at once."""

    def load(self, fetch: Fetch, hashes: Sequence[bytes], block_ids: Sequence[int]) -> FetchResult:
        """Fetch blocks into the engine's memory; blocks until they are there."""
        ...

    def gather(self, block_ids: Sequence[int], slots: Sequence[NDArray[np.uint8]]) -> None:
        """Copy blocks into slots, uint8 (block_bytes,) each; blocks until they are there."""
        ...


class HostMemory:
    """Memory that the copiers reach: no staging."""

    def __init__(self, table: SegmentTable, copier: Copier) -> None:
        self._table = table
        self._copier = copier

    def load(self, fetch: Fetch, hashes: Sequence[bytes], block_ids: Sequence[int]) -> FetchResult:
        return fetch(hashes, self._table, block_ids)

    def gather(self, block_ids: Sequence[int], slots: Sequence[NDArray[np.uint8]]) -> None:
        ids = self._table.checked_ids(block_ids, len(slots))
        addresses = np.array([slot.__array_interface__["data"][0] for slot in slots], np.int64)
        self._copier.gather(CopyPlan(self._table, ids, addresses, self._table.block_bytes, tuple(slots)))


class StagedMemory:
    """Device memory: each copy takes a turn at one staging buffer a direction.

    Args:
        pages: each layer's tensor with blocks on axis 0, in the order of the slot.
        torch: the module, which the caller has imported.
    """

    def __init__(self, pages: Sequence[Any], page_bytes: Sequence[int], torch: Any) -> None:
        self._pages = list(pages)
        self._torch = torch
        self._bytes = tuple(page_bytes)
        block_bytes = sum(page_bytes)
        self._count = max(1, STAGING_BYTES // block_bytes)
        self._on_device = pages[0].device.type == "cuda"
        self._loading, self._storing = threading.Lock(), threading.Lock()
        self._in, self._out = (
            torch.empty((self._count, block_bytes), dtype=torch.uint8, pin_memory=self._on_device) for _ in range(2)
        )
        self._table = SegmentTable.packed(self._in.numpy(), block_bytes)
        self._stream = torch.cuda.Stream(pages[0].device) if self._on_device else None

    def load(self, fetch: Fetch, hashes: Sequence[bytes], block_ids: Sequence[int]) -> FetchResult:
        blocks = moved = 0
        with self._loading:
            for first in range(0, len(hashes), self._count):
                part = hashes[first : first + self._count]
                got = fetch(part, self._table, range(len(part)))
                if got.blocks:
                    self._scatter(block_ids[first : first + got.blocks])
                blocks, moved = blocks + got.blocks, moved + got.bytes
                if got.blocks < len(part):
                    return FetchResult(blocks, moved, got.reason)
        return FetchResult(blocks, moved)

    def gather(self, block_ids: Sequence[int], slots: Sequence[NDArray[np.uint8]]) -> None:
        with self._storing:
            for first in range(0, len(slots), self._count):
                ids = block_ids[first : first + self._count]
                self._collect(ids)
                staged = self._out.numpy()
                for row, slot in zip(staged, slots[first : first + len(ids)]):
                    np.copyto(slot, row)

    def _scatter(self, block_ids: Sequence[int]) -> None:
        for page, part in self._parts(self._in, len(block_ids)):
            shape = (len(block_ids), *page.shape[1:])
            rows = part.contiguous().view(page.dtype).view(shape)

            def copy(page: Any = page, rows: Any = rows) -> None:
                page.index_copy_(0, self._ids(block_ids, page), rows.to(page))

            self._on_stream(copy)
        self._wait()

    def _collect(self, block_ids: Sequence[int]) -> None:
        for page, part in self._parts(self._out, len(block_ids)):

            def copy(page: Any = page, part: Any = part) -> None:
                rows = page.index_select(0, self._ids(block_ids, page)).contiguous()
                part.copy_(rows.view(len(block_ids), -1).view(self._torch.uint8))

            self._on_stream(copy)
        self._wait()

    def _parts(self, staging: Any, count: int) -> list[tuple[Any, Any]]:
        ends = np.cumsum(self._bytes).tolist()
        return [
            (page, staging[:count, end - size : end])
            for page, size, end in zip(self._pages, self._bytes, ends, strict=True)
        ]

    def _ids(self, block_ids: Sequence[int], page: Any) -> Any:
        return self._torch.tensor(list(block_ids), dtype=self._torch.int64, device=page.device)

    def _on_stream(self, copy: Callable[[], object]) -> None:
        if self._stream is None:
            copy()
            return
        with self._torch.cuda.stream(self._stream):
            copy()

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
