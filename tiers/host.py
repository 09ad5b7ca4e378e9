"""The host tier: slabs in shared memory that engines map and copy to and from by themselves.

Each time a slab is opened it gets a memfd nobody has seen before, so no mapping kept from an earlier owner can show
a byte of the next one. Background threads keep populated memfds in stock for that, as many as the cap leaves room
for. The cap is hard: memory counts from the creation of its memfd until it has been given back. Handing a slab's
old memfd on after wiping it was rejected: a client that ignores "retired" could read, and write, the next owner's.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import Counter, deque

from forebay.tiers.base import TierInfo
from forebay.tiers.machine import MachineMemory
from forebay.tiers.memory import (
    PAGE_BYTES,
    PAGE_KINDS,
    LockMode,
    Memory,
    PageChoice,
    PageKind,
    SlabMemory,
    choose_nodes,
    choose_pages,
    lock_budget,
)

_RELEASE_S = 1.0
_IDLE_S = 60.0


class HostTier:
    """`capacity_bytes // slab_bytes` slabs of shared memory."""

    name = "host"

    def __init__(
        self,
        capacity_bytes: int,
        slab_bytes: int,
        *,
        pages: PageChoice = "auto",
        populate: bool = True,
        populate_threads: int = 0,
        lock: LockMode = "auto",
        numa_node: int = -1,
        beside_bytes: int = 0,
        memory: Memory | None = None,
        machine: MachineMemory | None = None,
    ) -> None:
        """Decide everything, take nothing yet.

        `populate_threads` 0 means half of the cores, at most 8; `numa_node` -1 means any. `beside_bytes` is what the
        daemon may take beside the tier, for the question whether all of it fits. `memory` and `machine` are the seams
        of tests. Raises ValueError for sizes that hold no slab, or a NUMA node that is not there.
        """
        if slab_bytes < PAGE_BYTES or slab_bytes % PAGE_BYTES:
            raise ValueError(f"slab of {slab_bytes} bytes: not a multiple of {PAGE_BYTES}")
        if capacity_bytes < slab_bytes:
            raise ValueError(f"host tier of {capacity_bytes} bytes holds no slab of {slab_bytes}")
        self.slab_bytes = slab_bytes
        self.slabs = capacity_bytes // slab_bytes
        self.capacity_bytes = self.slabs * slab_bytes
        self._memory = memory or Memory()
        self._machine = machine or MachineMemory()
        self._beside_bytes = beside_bytes
        self._cpus = sorted(os.sched_getaffinity(0))
        self._nodes = choose_nodes(numa_node, self._machine)
        self._numa_node = numa_node

        # The condition guards all below. It is never held during populate, lock or punch.
        self._changed = threading.Condition()
        self._open: dict[int, SlabMemory] = {}
        self._spares: list[SlabMemory] = []
        self._freeing: list[SlabMemory] = []
        self._waiting: deque[SlabMemory] = deque()  # opened unpopulated, no thread has taken it up yet
        self._threads: list[threading.Thread] = []
        self._warnings: list[str] = []
        self._down = ""
        self._closed = False
        self._pages = self._choose_pages(pages)
        self._populating = populate and self._fits()
        self._thread_count = populate_threads or max(1, min(8, len(self._cpus) // 2))
        self._lock_bytes = self._choose_lock(lock)

    def describe(self) -> TierInfo:
        """The state now, from counters; no system call."""
        with self._changed:
            live = self._live()
            kinds = Counter(each.pages for each in live)
            return TierInfo(
                tier=self.name,
                capacity_bytes=self.capacity_bytes,
                slab_bytes=self.slab_bytes,
                slabs=self.slabs,
                pages=self._pages,
                slabs_by_pages=tuple((kind, kinds[kind]) for kind in PAGE_KINDS if kinds[kind]),
                populated_bytes=sum(each.populated_bytes for each in live),
                locked_bytes=sum(each.locked_bytes for each in live),
                numa_node=self._numa_node,
                warnings=tuple(self._warnings),
                up=not self._down,
                reason=self._down,
            )

    def start(self) -> None:
        """Try one memfd, so that a machine that gives none is known at once; then populate in the background."""
        with self._changed:
            if self._threads or self._closed:
                return
            try:
                self._create().release(0)
            except OSError as error:
                self._down = f"no memory for a slab: {error}"
                return
            for index in range(self._thread_count if self._populating else 0):
                cpu = self._cpus[index % len(self._cpus)]
                thread = threading.Thread(target=self._work, args=(cpu,), name=f"populate-{index}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def open_slab(self, slab: int) -> None:
        """Give the slab fresh memory: populated if there is some in stock, else populated while it is used.

        Does not block. Raises as `Tier.open_slab`.
        """
        if not 0 <= slab < self.slabs:
            raise ValueError(f"slab {slab}: the tier has {self.slabs}")
        with self._changed:
            if slab in self._open:
                raise ValueError(f"slab {slab} is open")
            if self._closed:
                raise OSError(errno.ESHUTDOWN, "the tier is closed")
            self._open[slab] = self._take_spare() or self._create_waiting()
            self._changed.notify_all()

    def close_slab(self, slab: int) -> None:
        """Free the slab's memory now; see `Tier.close_slab`. Blocks 0.1 ms a MiB on 4 KiB pages, else next to nothing.

        A client that writes through a mapping it should have dropped takes pages again, until it unmaps them.
        """
        freed = self._opened(slab)
        with self._changed:
            del self._open[slab]
            if freed in self._waiting:
                self._waiting.remove(freed)
            self._freeing.append(freed)  # counts against the cap until its pages are back
        try:
            freed.free()
        except OSError as error:
            self._warn(f"memory comes back only when all clients have unmapped it: {error}")
        with self._changed:
            self._freeing.remove(freed)
            self._changed.notify_all()

    def slab_fd(self, slab: int) -> int:
        """The open slab's memfd. It stays ours: valid until `close_slab`, duplicated by sending it."""
        return self._opened(slab).fd

    def memory_number(self, slab: int) -> int:
        """What the open slab's memory is called; a slab that is opened again has other memory."""
        return self._opened(slab).number

    def close(self, timeout_s: float) -> None:
        """See `Tier.close`; what is not done by then is by the next call, or ends with the process."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            self._closed = True
            self._populating = False
            self._down = "closed"
            self._freeing = self._live()
            self._open.clear()
            self._spares.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        for each in self._freeing:
            each.release(deadline_s - time.monotonic())
        self._freeing = [each for each in self._freeing if each.fd >= 0]

    def _opened(self, slab: int) -> SlabMemory:
        with self._changed:
            if slab not in self._open:
                raise ValueError(f"slab {slab} is not open")
            return self._open[slab]

    # --- under the condition ---

    def _live(self) -> list[SlabMemory]:
        """All memory that counts against the cap."""
        return [*self._open.values(), *self._spares, *self._freeing]

    def _create(self) -> SlabMemory:
        """Fresh memory of the chosen page kind, or of the next when the hugetlb pool has run dry meanwhile."""
        try:
            return SlabMemory(self._memory, self.slab_bytes, self._pages)
        except OSError as error:
            if self._pages != "hugetlb" or error.errno not in (errno.ENOMEM, errno.ENOSPC):
                raise
            self._pages, _ = choose_pages("thp", self.capacity_bytes, self.slab_bytes, self._machine)
            self._warn(f"the hugetlb pool has run dry, new slabs are on {self._pages} pages: {error}")
            return SlabMemory(self._memory, self.slab_bytes, self._pages)

    def _take_spare(self) -> SlabMemory | None:
        best = max(self._spares, key=lambda each: each.populated_bytes, default=None)
        if best is not None:
            self._spares.remove(best)
        return best

    def _create_waiting(self) -> SlabMemory:
        """Memory for a slab to be opened. Without spares each closed slab leaves room for one below the cap."""
        try:
            made = self._create()
        except OSError as error:
            self._down = f"no memory for a slab: {error}"
            raise
        self._down = ""
        if self._populating:
            self._waiting.append(made)
        return made

    def _create_spare(self) -> SlabMemory | None:
        if len(self._live()) >= self.slabs:
            return None
        made = self._create()
        self._spares.append(made)
        return made

    # --- background threads ---

    def _work(self, cpu: int) -> None:
        """Populate what is open first, then spares up to the cap; wait for more until told to stop."""
        self._settle(cpu)
        while (made := self._next()) is not None:
            try:
                self._populate(made)
            except OSError as error:
                self._give_up(error, made)

    def _settle(self, cpu: int) -> None:
        """One core each: left alone, some kernels pack all threads on one.

        The priority stays: a thread that waits for the processor with the interpreter lock in hand, because it gave
        way, would make the owner thread wait for it.
        """
        try:
            os.sched_setaffinity(threading.get_native_id(), {cpu})
            if self._nodes:
                self._memory.prefer_nodes(self._nodes)
        except OSError as error:
            self._warn(f"populating without a core or NUMA node of its own: {error}")

    def _next(self) -> SlabMemory | None:
        """Memory to populate, marked if it is to be locked as well; waits for some. None: stop."""
        with self._changed:
            while self._populating:
                try:
                    made = self._waiting.popleft() if self._waiting else self._create_spare()
                except OSError as error:
                    self._give_up(error, None)
                    return None
                if made is not None:
                    locked = sum(each.lock for each in self._live())
                    made.lock = (locked + 1) * self.slab_bytes <= self._lock_bytes
                    return made
                self._changed.wait(_IDLE_S)
            return None

    def _populate(self, made: SlabMemory) -> None:
        try:
            made.populate(self._is_stopping)
        except OSError as error:
            if not made.lock:
                raise
            self._warn(f"memory is not locked from here on: {error}")
            self._lock_bytes = 0
            made.lock = False
            made.populate(self._is_stopping)

    def _give_up(self, error: OSError, failed: SlabMemory | None) -> None:
        """No more populating: the machine has no memory to give in advance. Slabs still open, on first use."""
        self._warn(f"populating stopped: {error}")
        with self._changed:
            self._populating = False
            self._waiting.clear()
            self._changed.notify_all()
            if failed in self._spares:
                self._spares.remove(failed)
                failed.release(_RELEASE_S)

    def _is_stopping(self) -> bool:
        return not self._populating

    # --- decisions ---

    def _choose_pages(self, wanted: PageChoice) -> PageKind:
        pages, warning = choose_pages(wanted, self.capacity_bytes, self.slab_bytes, self._machine)
        self._warn(warning)
        return pages

    def _choose_lock(self, mode: LockMode) -> int:
        lock_bytes, warning = lock_budget(mode, self._pages, self.capacity_bytes, self._machine)
        self._warn(warning)
        if lock_bytes and not self._populating:
            self._warn("memory is not locked: only memory populated in advance can be")
        return lock_bytes

    def _fits(self) -> bool:
        """Whether the machine has the memory; populating more than that would call the OOM killer."""
        available = self._machine.available_bytes()
        if self._pages == "hugetlb" or self.capacity_bytes + self._beside_bytes <= available:
            return True
        beside = f" and the drives' I/O {self._beside_bytes}" if self._beside_bytes else ""
        self._warn(
            f"the host tier may take {self.capacity_bytes} bytes{beside}, and {available} are available: it is not "
            "populated in advance; make it smaller"
        )
        return False

    def _warn(self, text: str) -> None:
        with self._changed:
            if text and text not in self._warnings:
                self._warnings.append(text)
