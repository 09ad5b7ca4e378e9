"""Pinned regions: host memory that the GPU may read and write on its own, piece by piece as it becomes so.

Pinning a slab takes as long as its pages need to be made resident (1 to 10 GB/s) and may be refused (memlock limits,
containers), so it happens in a thread of its own: until a region is pinned, and for ever where it is refused, transfers
go through a bounce buffer instead.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from forebay.transports.dma.device import Addresses, Device

_log = logging.getLogger("forebay.dma")


@dataclass(frozen=True, slots=True)
class _Region:
    address: int
    size: int
    writable: bool
    owner: object


@dataclass(frozen=True, slots=True)
class PinnedStatus:
    """Attributes: pinned, waiting: bytes. seconds: spent pinning. refused: why regions were refused, '' if none."""

    pinned: int
    waiting: int
    seconds: float
    refused: str


class PinnedRegions:
    """The regions of one device. May be used by several threads."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._changed = threading.Condition()
        self._regions: dict[int, tuple[_Region, int]] = {}
        """Pinned regions by address, each with the offset from the host's address to the device's."""
        none = np.zeros(0, np.int64)
        self._index = (none, none, none)
        """Start, end and offset of each pinned region, ascending; replaced as a whole."""
        self._queue: deque[_Region] = deque()
        self._thread: threading.Thread | None = None
        self._pinning = 0
        self._bytes = 0
        self._seconds = 0.0
        self._refused = ""
        self._closed = False

    def add(self, address: int, size: int, *, writable: bool, owner: object) -> None:
        """Pin a region soon. It stays mapped, because `owner` is kept, until it is removed."""
        with self._changed:
            queued = (region.address for region in self._queue)
            if self._closed or address in self._regions or address == self._pinning or address in queued:
                return
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="forebay-pin", daemon=True)
                thread.start()
                self._thread = thread
            self._queue.append(_Region(address, size, writable, owner))
            self._changed.notify_all()

    def know(self, address: int, size: int) -> None:
        """Memory that the driver gave out pinned, at the same address for the device; the caller keeps it alive."""
        with self._changed:
            self._regions[address] = (_Region(address, size, True, None), 0)
            self._reindex()

    def forget(self, address: int) -> None:
        """Take back `know`."""
        with self._changed:
            del self._regions[address]
            self._reindex()

    def remove(self, address: int) -> None:
        """Unpin a region and let go of its owner. The caller knows that no transfer uses it any more."""
        with self._changed:
            self._queue = deque(region for region in self._queue if region.address != address)
            while self._pinning == address:
                self._changed.wait()
            found = self._regions.pop(address, None)
            if found is not None:
                self._bytes -= found[0].size
                self._reindex()
        if found is not None:
            with self._device.used():
                self._device.unregister(address)

    def wait(self, timeout_s: float) -> bool:
        """Until nothing waits to be pinned; False if that took longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._pinning, timeout_s)

    def status(self) -> PinnedStatus:
        with self._changed:
            waiting = sum(region.size for region in self._queue)
            return PinnedStatus(self._bytes, waiting, self._seconds, self._refused)

    def device_addresses(self, addresses: Addresses, size: int) -> Addresses | None:
        """Where the device sees `size` bytes at each host address; None unless all of them are pinned.

        Neighbours on both sides of a region's end are no neighbours for the device's copies: see `region_of`.
        """
        starts, ends, offsets = self._index
        if not len(starts):
            return None
        at = np.searchsorted(starts, addresses, side="right") - 1
        if int(at.min(initial=0)) < 0 or bool((addresses + size > ends[at]).any()):
            return None
        return addresses + offsets[at]

    def region_of(self, addresses: Addresses) -> Addresses:
        """A number for the region that each address lies in."""
        return np.searchsorted(self._index[0], addresses, side="right")

    def close(self, timeout_s: float) -> None:
        """Unpin everything. The caller knows that no transfer is under way."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(timeout_s)  # what it was at is pinned by then
        with self._changed:
            addresses = list(self._regions)
        for address in addresses:
            self.remove(address)

    def _reindex(self) -> None:
        regions = sorted(self._regions.items())
        rows = [(address, address + region.size, offset) for address, (region, offset) in regions]
        starts, ends, offsets = np.array(rows, np.int64).reshape(len(rows), 3).T
        self._index = (starts, ends, offsets)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                region = self._queue.popleft()
                self._pinning = region.address
            began = time.monotonic()
            offset, refused = 0, ""
            try:
                with self._device.used():
                    seen = self._device.register(region.address, region.size, writable=region.writable)
                offset = seen - region.address
            except Exception as error:  # noqa: BLE001  # also the driver's own: the next region may go better
                refused = str(error) or type(error).__name__
            with self._changed:
                self._pinning = 0
                if refused:
                    if not self._refused:
                        _log.warning("transfers go through a bounce buffer: %s", refused)
                    self._refused = refused
                else:
                    self._seconds += time.monotonic() - began
                    self._bytes += region.size
                    self._regions[region.address] = (region, offset)
                    self._reindex()
                self._changed.notify_all()
            del region  # it would keep its owner until the next one comes
