"""Stand-ins for the tiers' tests: a tier of plain bytes, a memory whose calls fail on demand, a machine on paper."""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from forebay.tiers.base import TierInfo
from forebay.tiers.host import HostTier
from forebay.tiers.machine import MachineMemory
from forebay.tiers.memory import Memory, SlabMemory
from forebay.transports.shm import map_shared


class FakeTier:
    """A tier in a dict of bytearrays; what the core's tests may use instead of shared memory."""

    name = "fake"

    def __init__(self, capacity_bytes: int, slab_bytes: int) -> None:
        self.slab_bytes = slab_bytes
        self.slabs = capacity_bytes // slab_bytes
        self.full = False
        self._open: dict[int, bytearray] = {}
        self._closed = False

    def describe(self) -> TierInfo:
        live = len(self._open)
        return TierInfo(
            tier=self.name,
            capacity_bytes=self.slabs * self.slab_bytes,
            slab_bytes=self.slab_bytes,
            slabs=self.slabs,
            pages="4k",
            slabs_by_pages=(("4k", live),) if live else (),
            populated_bytes=live * self.slab_bytes,
            locked_bytes=0,
            numa_node=-1,
            warnings=(),
            up=not self._closed,
            reason="closed" if self._closed else "",
        )

    def start(self) -> None:
        pass

    def open_slab(self, slab: int) -> None:
        if not 0 <= slab < self.slabs or slab in self._open:
            raise ValueError(f"slab {slab}")
        if self._closed or self.full:
            raise OSError(errno.ENOMEM, "the fake refuses")
        self._open[slab] = bytearray(self.slab_bytes)

    def close_slab(self, slab: int) -> None:
        if slab not in self._open:
            raise ValueError(f"slab {slab}")
        memory = self._open.pop(slab)
        memory[:] = bytes(len(memory))

    def close(self, timeout_s: float) -> None:
        self._closed = True
        self._open.clear()

    def view(self, slab: int) -> memoryview:
        return memoryview(self._open[slab])


def view_of(memory: SlabMemory) -> memoryview:
    """A slab's bytes."""
    return memoryview(map_shared(memory.fd, memory.size_bytes, writable=True))


class ViewedHostTier(HostTier):
    """The host tier, whose slabs' bytes can be looked at."""

    def view(self, slab: int) -> memoryview:
        return memoryview(map_shared(self.slab_fd(slab), self.slab_bytes, writable=True))


class FailingMemory(Memory):
    """The real calls, except that those named in `errors` fail with their errno; `calls` counts all by name.

    `hold` stops populate until it is set, as a machine does that is slow to give memory.
    """

    def __init__(self, **errors: int) -> None:
        super().__init__()
        self.errors = errors
        self.calls: Counter[str] = Counter()
        self.hold = threading.Event()
        self.hold.set()
        self.nodes: tuple[int, ...] = ()

    def _enter(self, call: str) -> None:
        self.calls[call] += 1
        if call in self.errors:
            raise OSError(self.errors[call], os.strerror(self.errors[call]))

    def create(self, size_bytes: int, *, hugetlb: bool) -> int:
        self._enter("create_hugetlb" if hugetlb else "create")
        return super().create(size_bytes, hugetlb=False)

    def map(self, fd: int, offset: int, length: int) -> int:
        self._enter("map")
        return super().map(fd, offset, length)

    def populate(self, address: int, length: int) -> None:
        self._enter("populate")
        self.hold.wait(30)
        super().populate(address, length)

    def lock(self, address: int, length: int) -> None:
        self._enter("lock")  # never for real: the limit here may be small

    def punch(self, fd: int, length: int) -> None:
        self._enter("punch")
        super().punch(fd, length)

    def prefer_nodes(self, nodes: tuple[int, ...]) -> None:  # type: ignore[override]
        self._enter("prefer_nodes")
        self.nodes = nodes


@dataclass(frozen=True, slots=True)
class FakeMachine(MachineMemory):
    """A machine with exactly these facts."""

    root: Path = Path("/nonexistent")
    available: int = 1 << 40
    swap: int = 0
    hugetlb: int = 0
    thp: bool = False
    nodes: tuple[int, ...] = (0,)
    near_gpus: tuple[int, ...] = ()
    lock_limit: int | None = None

    def available_bytes(self) -> int:
        return self.available

    def swap_bytes(self) -> int:
        return self.swap

    def free_hugetlb_bytes(self) -> int:
        return self.hugetlb

    def shmem_thp(self) -> bool:
        return self.thp

    def numa_nodes(self) -> tuple[int, ...]:
        return self.nodes

    def gpu_nodes(self) -> tuple[int, ...]:
        return self.near_gpus

    def lock_limit_bytes(self) -> int | None:
        return self.lock_limit
