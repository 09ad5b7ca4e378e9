"""Shared memory: sealed memfds, and the generation table that tells a late reader that a slot has moved on.

A memfd has no name to leak, collide on, or leave behind; it lives as long as somebody holds or maps it, so a
daemon's restart never takes memory from under an engine. It is sealed against resizing, since a peer that could
shrink it would kill every other with SIGBUS. POSIX shm and files in /dev/shm were rejected: any process of the
user can open, truncate or unlink them.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys

from forebay.kvstore.errors import Corrupt, LayoutError

PAGE_BYTES = 4096
GENERATION_BYTES = 8

_F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h, since Linux 5.1; not in Python's fcntl
_MFD_HUGE_SHIFT = 26
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_TABLE_SEALS = _SIZE_SEALS | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL


def create_memfd(name: str, size_bytes: int, *, huge_page_bytes: int = 0) -> int:
    """A new zeroed memfd, close-on-exec, that can neither grow nor shrink; the caller owns it.

    No page is taken yet. With `huge_page_bytes` (2 MiB, 1 GiB) it lies on hugetlb pages of that size, which must
    divide `size_bytes`. Raises OSError (ENOMEM, ENODEV: no such huge pages; EMFILE).
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    if huge_page_bytes:
        flags |= os.MFD_HUGETLB | ((huge_page_bytes.bit_length() - 1) << _MFD_HUGE_SHIFT)
    fd = os.memfd_create(name, flags)
    try:
        os.ftruncate(fd, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def map_shared(fd: int, size_bytes: int, *, writable: bool) -> mmap.mmap:
    """Map a memfd whole. The mapping outlives `fd`, which stays the caller's. Raises OSError (EPERM: sealed)."""
    protection = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
    return mmap.mmap(fd, size_bytes, flags=mmap.MAP_SHARED, prot=protection)


def map_received(fd: int, size_bytes: int, *, writable: bool) -> mmap.mmap:
    """Map a memfd that came from a peer: it must be of the size agreed and never able to change it.

    Raises Corrupt otherwise (touching a page beyond the end would kill the process), or OSError.
    """
    check_received(fd, size_bytes)
    return map_shared(fd, size_bytes, writable=writable)


def check_received(fd: int, size_bytes: int) -> None:
    """Raise Corrupt unless `fd` is a memfd of at least `size_bytes`, sealed against shrinking."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise Corrupt(f"a descriptor that is no memfd: {error.strerror}") from error
    if not seals & fcntl.F_SEAL_SHRINK or os.fstat(fd).st_size < size_bytes:
        raise Corrupt(f"a memfd that may not hold its {size_bytes} bytes")


def table_bytes(slots: int) -> int:
    """Size of a generation table's memfd: one u64 a slot, rounded up to whole pages."""
    return -(-slots * GENERATION_BYTES // PAGE_BYTES) * PAGE_BYTES


class GenerationTable:
    """The daemon's side of one slab's generations: u64 little-endian, slot i at byte 8 * i.

    Only this mapping can ever write: the memfd is sealed (FUTURE_WRITE) right after it is made, so a peer that
    receives `fd` can map it read-only and nothing else. One writer, the owner thread. A number changes by one
    aligned 8-byte store, so a reader sees the old or the new one, never a mix.
    """

    def __init__(self, slots: int, name: str = "forebay-generations") -> None:
        """A table of zeros for `slots` slots. Raises OSError."""
        if slots < 1:
            raise LayoutError("a generation table has at least one slot")
        self.slots = slots
        self.fd = create_memfd(name, table_bytes(slots))
        try:
            self._map = map_shared(self.fd, table_bytes(slots), writable=True)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _TABLE_SEALS)
        except OSError:
            os.close(self.fd)
            raise
        self._words = _words(self._map)

    def get(self, slot: int) -> int:
        return self._words[slot]

    def set(self, slot: int, generation: int) -> None:
        """Publish a slot's generation, as the store's core counts it."""
        self._words[slot] = generation

    def bump(self, slot: int) -> int:
        """Add one to a slot's generation; returns the new one. Readers of the old one fail from here on."""
        generation = self._words[slot] + 1
        self._words[slot] = generation
        return generation

    def bump_all(self) -> None:
        """Make every reader of the slab fail: it is being taken back."""
        words = self._words
        for slot in range(self.slots):
            words[slot] += 1

    def close(self) -> None:
        """Let go of the memory; peers keep their mappings, whose numbers no longer change. Idempotent."""
        if self.fd >= 0:
            self._words.release()
            self._map.close()
            os.close(self.fd)
            self.fd = -1


class GenerationView:
    """A peer's read-only view of a slab's generations; `words[slot]` is the number to compare after the copy."""

    def __init__(self, fd: int, slots: int) -> None:
        """Map a received table; `fd` stays the caller's, to be closed. Raises Corrupt, OSError."""
        self.slots = slots
        self._map = map_received(fd, table_bytes(slots), writable=False)
        self.words = _words(self._map)

    def get(self, slot: int) -> int:
        return self.words[slot]

    @property
    def buffer(self) -> mmap.mmap:
        """The mapping itself, for readers that compare many at once (u64 little-endian)."""
        return self._map

    def close(self) -> None:
        """Unmap; raises BufferError while somebody else still views `buffer`."""
        self.words.release()
        self._map.close()


def _words(mapped: mmap.mmap) -> memoryview[int]:
    if sys.byteorder != "little":
        raise LayoutError("shared memory is little-endian")
    return memoryview(mapped).cast("Q")
