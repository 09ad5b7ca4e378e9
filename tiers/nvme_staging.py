"""Where calls read to and write from: the host's memory itself, or a buffer beside it.

What reaches memory by itself, as a drive's DMA does, is best led straight into the slots. The bytes of a virtual disk
are copied by the CPU of the machine that makes it, and it does that much faster where few megabytes are used again and
again than all over gigabytes of slots: a virtio disk read at 2.4 to 2.7 GB/s instead of 1.4 to 1.6, blocks hashed, and
wrote at 3.1 instead of 2.05 (2 MiB calls at depth 8; bench/results). So there a call has a buffer, laid out as the file
is. The copy between that and the slots costs little, since hashing finds the bytes in the core's cache in exchange. It
costs least where glibc writes past the caches (non-temporal stores), for nobody needs a slot's old bytes, nor soon its
new ones: 0.12 CPU seconds a GB for hash and copy instead of 0.17. The process that copies is started so that it does.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from xxhash import xxh3_64

from forebay.tiers.nvme_format import PAGE

STAGED_BYTES_MAX = 9 << 20
"""Larger calls, each of one block, go straight: up to 8 MiB it was measured to gain, and each way has a buffer."""
PIECE_BYTES = 256 << 10 if len(os.sched_getaffinity(0)) <= 4 else 1 << 20
"""Hashed and copied in one go, before others have their turn: 0.03 ms where cores are so few that an answer from memory
may have to wait for this one. Each piece costs two turns of the interpreter lock, which more cores contend for: theirs
are larger for that, a choice that was not measured."""
STREAMING = f"glibc.cpu.x86_non_temporal_threshold={PIECE_BYTES}"
"""For GLIBC_TUNABLES: copies of that size and more pass the caches by. Other libraries and machines ignore it."""
_CACHED_BYTES = PIECE_BYTES // 2
_HUGE_PAGE = 2 << 20
_HELD_BYTES_MAX = 64 << 10
"""Copied with the interpreter lock held: handing it over takes longer."""
_NO_HEADER = bytes(PAGE)
_OWN = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
"""What Python maps by default is shared: no huge pages, and not counted as the process's own."""

_memmove = ctypes.CDLL(None).memmove
_memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memmove.restype = None


class Passage(NamedTuple):
    """The memory of one call on adjacent slots: as the file has it, and each block's header page and slot in it."""

    buffers: Sequence[memoryview]
    pages: Sequence[memoryview]
    slots: Sequence[memoryview]


class Straight:
    """From and into the host's slots, interleaved with header pages of its own, page-aligned."""

    def __init__(self, blocks_max: int) -> None:
        """`blocks_max`: the most a call has."""
        whole = memoryview(mmap.mmap(-1, blocks_max * PAGE, flags=_OWN))
        self._pages = [whole[at : at + PAGE] for at in range(0, len(whole), PAGE)]

    @property
    def held_bytes(self) -> int:
        """Memory it has taken; it never takes less again."""
        return len(self._pages) * PAGE

    def open(self, slots: Sequence[memoryview]) -> Passage:
        """For a call on these, until the next is opened. What the pages and staged slots hold is left from others."""
        return Passage([buffer for pair in zip(self._pages, slots) for buffer in pair], self._pages, slots)


class Staged(Straight):
    """Through one buffer, header pages included."""

    def __init__(self, blocks_max: int) -> None:
        super().__init__(blocks_max)
        self._whole = memoryview(b"")

    @property
    def held_bytes(self) -> int:
        return super().held_bytes + len(self._whole)

    def open(self, slots: Sequence[memoryview]) -> Passage:
        stride = PAGE + len(slots[0])
        size = stride * len(slots)
        if size > STAGED_BYTES_MAX:
            return super().open(slots)
        if size > len(self._whole):
            self._whole = _in_one_piece(size)
        whole = self._whole[:size]
        return Passage(
            (whole,),
            [whole[at : at + PAGE] for at in range(0, size, stride)],
            [whole[at + PAGE : at + stride] for at in range(0, size, stride)],
        )


def carry(
    target: memoryview,
    source: memoryview,
    payload_bytes: int,
    *,
    to_drive: bool,
    after_each: Callable[[int], None],
) -> int:
    """Copy a slot between its place and its buffer, unless they are one; the xxh3_64 of its leading `payload_bytes`.

    Piece by piece, so that the core's cache still has what is hashed; `after_each` is told the size of each. What comes
    from the drive is in its place before it is known to be right, as where calls go straight: nobody else reads it yet.
    """
    size, running, buffer = len(source), xxh3_64(), target if to_drive else source
    for at in range(0, size, PIECE_BYTES):
        end = min(size, at + PIECE_BYTES)
        if to_drive:
            _copy(target, source, at, end, _CACHED_BYTES)
        running.update(buffer[at : min(end, payload_bytes)])
        if not to_drive:
            _copy(target, source, at, end, PIECE_BYTES)
        after_each(end - at)
    return running.intdigest()


def _copy(target: memoryview, source: memoryview, start: int, end: int, piece: int) -> None:
    if target is source:
        return
    if end - start <= _HELD_BYTES_MAX:
        target[start:end] = source[start:end]
        return
    to, of = _address(target), _address(source)
    for at in range(start, end, piece):
        _memmove(to + at, of + at, min(piece, end - at))


def blank(page: memoryview) -> None:
    """Leave nothing in a header page."""
    page[:] = _NO_HEADER


def _in_one_piece(size: int) -> memoryview:
    """Memory that a call need not be cut up for: on huge pages as far as it fills them, if the system has some."""
    space = mmap.mmap(-1, size + _HUGE_PAGE, flags=_OWN)
    start = -_address(memoryview(space)) % _HUGE_PAGE
    if size >= _HUGE_PAGE:
        with contextlib.suppress(OSError):
            space.madvise(mmap.MADV_HUGEPAGE, start, size - size % _HUGE_PAGE)
    return memoryview(space)[start : start + size]


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
