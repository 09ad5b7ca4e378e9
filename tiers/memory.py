"""How a slab's memory is had: page kind, population, locking, NUMA node.

Best first: hugetlb pages if the pool covers the tier, transparent huge pages if the kernel gives them to shared
memory, else 4 KiB pages, which always work. Copies run at the same speed on all three; what differs is the time to
populate (4 KiB pages take about 15 times longer) and how fast a disk reads into them. Memory is populated piece by
piece and unmapped again, so the daemon's own RSS stays small; only locked memory stays mapped. Populating never
writes: an engine may be filling the same slab. That rules out touching each page, so kernels without
MADV_POPULATE_WRITE (before 5.14) get fallocate.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import threading
from collections.abc import Callable, Sequence
from itertools import count
from typing import Literal, get_args

from forebay.tiers.machine import HUGE_PAGE_BYTES, MachineMemory
from forebay.transports.shm import create_memfd

PageKind = Literal["hugetlb", "thp", "4k"]
PageChoice = Literal["auto", "hugetlb", "thp", "4k"]
LockMode = Literal["auto", "on", "off"]
PAGE_KINDS: tuple[PageKind, ...] = get_args(PageKind)

PAGE_BYTES = 4096
PIECE_BYTES = 8 << 20
"""Populated at a time: the longest wait of `SlabMemory.free` and of a stop (about 5 ms on 4 KiB pages)."""

_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23
_FALLOC_PUNCH_HOLE = 0x03  # with FALLOC_FL_KEEP_SIZE
_MPOL_PREFERRED = 1
_MPOL_INTERLEAVE = 3
_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
_MAP_FAILED = ctypes.c_void_p(-1).value
_numbers = count(1)


class Memory:
    """The system calls slabs are made of; all raise OSError and release the GIL while they work. Tests replace some."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        size, offset, address = ctypes.c_size_t, ctypes.c_int64, ctypes.c_void_p
        libc.mmap.restype = address
        libc.mmap.argtypes = (address, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, offset)
        libc.munmap.argtypes = (address, size)
        libc.madvise.argtypes = (address, size, ctypes.c_int)
        libc.mlock.argtypes = (address, size)
        libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, offset, offset)
        self._libc = libc

    def create(self, size_bytes: int, *, hugetlb: bool) -> int:
        """A zeroed memfd whose size and seals nobody can change any more; the caller closes it."""
        fd = create_memfd("forebay-slab", size_bytes, huge_page_bytes=HUGE_PAGE_BYTES if hugetlb else 0)
        try:
            # A peer that could add F_SEAL_WRITE would keep us from ever punching the memory free.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
        except OSError:
            os.close(fd)
            raise
        return fd

    def map(self, fd: int, offset: int, length: int) -> int:
        """Map shared and writable; returns the address."""
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        address = self._libc.mmap(None, length, protection, mmap.MAP_SHARED, fd, offset)
        if address is None or address == _MAP_FAILED:
            raise _os_error("mmap")
        return int(address)

    def unmap(self, address: int, length: int) -> None:
        self._check("munmap", self._libc.munmap(address, length))

    def advise_huge(self, address: int, length: int) -> None:
        self._check("madvise(MADV_HUGEPAGE)", self._libc.madvise(address, length, _MADV_HUGEPAGE))

    def populate(self, address: int, length: int) -> None:
        """Take the pages now, contents untouched."""
        self._check("madvise(MADV_POPULATE_WRITE)", self._libc.madvise(address, length, _MADV_POPULATE_WRITE))

    def allocate(self, fd: int, offset: int, length: int) -> None:
        """The same without a mapping; shared memory asked this way gets no transparent huge pages."""
        self._check("fallocate", self._libc.fallocate(fd, 0, offset, length))

    def lock(self, address: int, length: int) -> None:
        """Take the pages and keep them from being swapped for as long as they stay mapped."""
        self._check("mlock", self._libc.mlock(address, length))

    def punch(self, fd: int, length: int) -> None:
        """Give all pages back; whoever maps them reads zeros from now on."""
        self._check("fallocate(PUNCH_HOLE)", self._libc.fallocate(fd, _FALLOC_PUNCH_HOLE, 0, length))

    def prefer_nodes(self, nodes: Sequence[int]) -> None:
        """Pages this thread takes from now on come from the node, or from several in turn, while they have room.

        A preference: a strict binding would call the OOM killer on a full node instead of using the next one.
        """
        number = _SET_MEMPOLICY.get(platform.machine())
        if number is None:
            raise OSError(errno.ENOSYS, "set_mempolicy: unknown machine")
        mode = _MPOL_PREFERRED if len(nodes) == 1 else _MPOL_INTERLEAVE
        words = [0] * (max(nodes) // 64 + 1)
        for node in nodes:
            words[node // 64] |= 1 << node % 64
        mask = (ctypes.c_uint64 * len(words))(*words)
        bits = 64 * len(words) + 1  # the kernel reads one bit less than it is told
        self._check("set_mempolicy", self._libc.syscall(number, mode, mask, ctypes.c_ulong(bits)))

    def _check(self, call: str, result: int) -> None:
        if result != 0:
            raise _os_error(call)


class SlabMemory:
    """One slab's memfd, ours alone; a background thread may populate it while its owner hands it out or frees it."""

    def __init__(self, memory: Memory, size_bytes: int, pages: PageKind) -> None:
        """Fresh zeroed memory, not populated. Hugetlb pages are reserved here, so no peer can run out of them later
        (that would be a SIGBUS). Raises OSError.
        """
        self.number = next(_numbers)
        """Never another memory's, whatever slab it serves as."""
        self.size_bytes = size_bytes
        self.pages = pages
        self.lock = False
        """Whether `populate` locks as well; the owner's choice, made before it."""
        self.populated_bytes = 0
        self.locked_bytes = 0
        self._memory = memory
        self._piece = threading.Lock()  # held for one piece at a time
        self._locked_at = 0
        self.fd = memory.create(size_bytes, hugetlb=pages == "hugetlb")
        if pages == "hugetlb":
            try:
                memory.unmap(memory.map(self.fd, 0, size_bytes), size_bytes)
            except OSError:
                os.close(self.fd)
                raise

    def populate(self, stop: Callable[[], bool]) -> None:
        """Take all pages, and lock them if `lock`; ends early when `stop` says so or the memory was freed.

        Blocks for milliseconds to seconds, GIL released. May be called again after an error. Raises OSError.
        """
        while self.populated_bytes < self.size_bytes and not stop():
            with self._piece:
                if self.fd < 0:
                    return
                length = min(PIECE_BYTES, self.size_bytes - self.populated_bytes)
                if self.lock:
                    self._lock_piece(length)
                else:
                    self._populate_piece(length)
                self.populated_bytes += length

    def free(self) -> None:
        """Give the memory back now, mapped by peers or not; waits for at most one piece of `populate`."""
        with self._piece:
            try:
                self._unmap()
                self._memory.punch(self.fd, self.size_bytes)
            finally:
                self._close()

    def release(self, timeout_s: float) -> None:
        """Let go of our handle only: peers that map the memory keep its bytes. Gives up after `timeout_s`."""
        if self._piece.acquire(timeout=max(0.0, timeout_s)):
            try:
                self._unmap()
                self._close()
            finally:
                self._piece.release()

    def _populate_piece(self, length: int) -> None:
        address = self._memory.map(self.fd, self.populated_bytes, length)
        try:
            if self.pages == "thp":
                self._memory.advise_huge(address, length)
            self._memory.populate(address, length)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._memory.allocate(self.fd, self.populated_bytes, length)
        finally:
            self._memory.unmap(address, length)

    def _lock_piece(self, length: int) -> None:
        if not self._locked_at:
            self._locked_at = self._memory.map(self.fd, 0, self.size_bytes)
            if self.pages == "thp":
                self._memory.advise_huge(self._locked_at, self.size_bytes)
        self._memory.lock(self._locked_at + self.populated_bytes, length)
        self.locked_bytes += length

    def _unmap(self) -> None:
        if self._locked_at:
            self._memory.unmap(self._locked_at, self.size_bytes)
            self._locked_at = self.locked_bytes = 0

    def _close(self) -> None:
        fd, self.fd, self.populated_bytes = self.fd, -1, 0
        if fd >= 0:
            os.close(fd)


def choose_pages(
    wanted: PageChoice, capacity_bytes: int, slab_bytes: int, machine: MachineMemory
) -> tuple[PageKind, str]:
    """The best page kind to be had, not better than wanted, and a warning when that is less than was wanted."""
    best = PAGE_KINDS.index("hugetlb" if wanted == "auto" else wanted)
    whole = slab_bytes % HUGE_PAGE_BYTES == 0
    had = {
        "hugetlb": whole and machine.free_hugetlb_bytes() >= capacity_bytes,
        "thp": whole and machine.shmem_thp(),
        "4k": True,
    }
    got = next(kind for kind in PAGE_KINDS[best:] if had[kind])
    if wanted in ("auto", got):
        return got, ""
    needs = {
        "hugetlb": f"{-(-capacity_bytes // HUGE_PAGE_BYTES)} free huge pages of 2 MiB (vm.nr_hugepages)",
        "thp": "/sys/kernel/mm/transparent_hugepage/shmem_enabled set to advise",
    }
    return got, f"pages {wanted} asked for, {got} used: {wanted} needs slabs of whole 2 MiB and {needs[wanted]}"


def lock_budget(mode: LockMode, pages: PageKind, capacity_bytes: int, machine: MachineMemory) -> tuple[int, str]:
    """How many bytes to lock, and a warning when the limit allows fewer than are needed.

    Nothing needs locking on hugetlb pages, which are never swapped, nor with `auto` on a machine without swap.
    """
    if mode == "off" or pages == "hugetlb" or (mode == "auto" and not machine.swap_bytes()):
        return 0, ""
    limit = machine.lock_limit_bytes()
    if limit is None or limit >= capacity_bytes:
        return capacity_bytes, ""
    return limit, (
        f"RLIMIT_MEMLOCK is {limit} bytes but locking the host tier needs {capacity_bytes}: what is beyond the limit "
        "can be swapped out. Set LimitMEMLOCK=infinity in the systemd unit (or `ulimit -l unlimited` in the shell), "
        "or switch locking off"
    )


def choose_nodes(numa_node: int, machine: MachineMemory) -> tuple[int, ...]:
    """Nodes to take pages from: the one asked for.

    For -1 the GPUs', where all are on one; else all in turn, or no policy, (), when there is one only.
    """
    nodes = machine.numa_nodes()
    if numa_node == -1:
        near = machine.gpu_nodes()
        if len(nodes) > 1 and len(near) == 1 and near[0] in nodes:
            return near
        return nodes if len(nodes) > 1 else ()
    if numa_node not in nodes:
        raise ValueError(f"NUMA node {numa_node} has no memory here; nodes with memory: {list(nodes)}")
    return (numa_node,)


def _os_error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")
