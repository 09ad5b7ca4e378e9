"""Copiers: move blocks between an engine's paged memory and slots, at memcpy speed, in numpy alone.

Two costs decide the shapes below. A numpy or ctypes call costs 0.3 to 3 us, so adjacent pieces are merged and
equal-sized, equally spaced ones (a *strip*: the layers' K and V of one allocator mostly are) go through one
vectorised call. And a call that releases the GIL for a 32 KiB piece gives it to any busy Python thread for 5 ms
each time (64 MiB then took 2.6 s instead of 6 ms), so the GIL is released around large copies only and small
pieces are moved with it held, one block at a time. Large copies are `np.positive` of bytes: numpy's own vector
loop is 10 to 20 % faster than glibc's memmove on pieces of 32 KiB and more, and twice as fast where the two
sides lie differently to a cache line. Rejected: `np.take` into a strided `out` (it buffers), memoryview
assignment (holds the GIL however large), a C extension.
"""

from __future__ import annotations

import ctypes
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from forebay.client.segments import Addresses, SegmentTable, raw_array
from forebay.kvstore.errors import ForebayError

LEGACY_STREAM = 0
"""Handle of CUDA's legacy default stream: what is enqueued there comes after all of every blocking stream."""

HELD_PIECE_BYTES_MAX = 256 * 1024
"""Pieces up to this size are moved with the GIL held: handing it over may cost more than the copy."""

STRETCH_BYTES = 2 << 20
"""Pieces are moved in stretches of about this size; other threads may take the GIL in between."""

SHARED_PIECE_BYTES_MIN = 1 << 20

RUN_BYTES_MIN = 1 << 20
"""Runs of adjacent slots shorter than this on average are not worth a vectorised call each."""

COLUMN_BLOCKS_MIN = 8
COLUMN_BYTES_MAX = 8 * 1024

RELEASED_ITEMS = 512
"""numpy keeps the GIL for a fancy assignment of up to 500 items, however large; so fewer are cut smaller."""

ITEM_BYTES_MIN = 16 * 1024

WINDOW_BYTES_MAX = 1 << 62
WINDOW_RANGES_MAX = 4


class CopyTimeout(ForebayError):
    """A copy has not ended in time and may still be moving bytes: neither side's memory may be given away."""


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """Which blocks of a table belong to which slots, in order.

    Attributes:
        table: the engine's side; its `owners` keep that memory alive.
        block_ids: int64 (n,), checked against the table; repeats are allowed when gathering.
        addresses: int64 (n,), where each block's slot begins in this process.
        slot_bytes: distance of adjacent slots, at least the table's block_bytes.
        owners: slab mappings to keep alive until the copy has ended.
        stream: of device memory: handle of the CUDA stream after whose work the copy comes; None: after nothing.
        sums: uint64 (n,) of zeros: the checksums of the blocks that were copied, told by a copier that makes them on
            the way, as each of device memory does. Others leave it alone. None: nobody asks.
    """

    table: SegmentTable
    block_ids: Addresses
    addresses: Addresses
    slot_bytes: int
    owners: tuple[object, ...]
    stream: int | None = LEGACY_STREAM
    sums: NDArray[np.uint64] | None = None


class Pinned(NamedTuple):
    """What GPUs reach by themselves of the daemon's memory, and why they do not reach other: '' if none was refused."""

    size_bytes: int = 0
    refused: str = ""


class Copier(Protocol):
    """Executes plans; blocks until the bytes have moved. May be called by several threads at once.

    Raises CopyTimeout where it cannot tell that they do not move any more.
    """

    def gather(self, plan: CopyPlan) -> Sequence[int]:
        """Paged memory -> slots. Returns the positions in the plan whose copy failed, ascending."""
        ...

    def scatter(self, plan: CopyPlan) -> Sequence[int]:
        """Slots -> paged memory. Returns the positions in the plan whose copy failed, ascending."""
        ...


class NumpyCopier:
    """Copies on the calling thread; never fails a single block.

    With `shares` it is one of several threads that copy: together they are bound by the machine's memory, not by a
    core, and glibc's memmove, which spares it the reading of what is overwritten, is then the faster one for segments
    of a megabyte and more (12.9 against 11.6 GB/s on two cores of a Xeon).
    """

    def __init__(self, *, shares: bool = False) -> None:
        self._shares = shares

    def gather(self, plan: CopyPlan) -> Sequence[int]:
        if self._moves_whole(plan):
            _move_pieces(plan, slice(None), to_slots=True)
            return ()
        packed, runs = _is_packed(plan), _runs(plan)
        if _copied_in_strips(plan, runs, to_slots=True):
            return ()
        if not _is_uniform(plan) or (packed and _is_choppy(plan, runs)):
            _move_pieces(plan, slice(None), to_slots=True)
        elif packed:
            for run in runs:
                _gather_packed(plan, run)
        else:
            for run in runs:
                _gather_run(plan, run)
        return ()

    def scatter(self, plan: CopyPlan) -> Sequence[int]:
        if self._moves_whole(plan):
            _move_pieces(plan, slice(None), to_slots=False)
            return ()
        packed, runs = _is_packed(plan), _runs(plan)
        if _copied_in_strips(plan, runs, to_slots=False):
            return ()
        if not _is_uniform(plan) or _is_choppy(plan, runs):
            _move_pieces(plan, slice(None), to_slots=False)
            return ()
        for run in runs:
            if packed and _is_straight(plan.block_ids[run]):
                _copy_straight(plan, run, to_slots=False)
            elif not _scatter_windows(plan, run):
                _move_pieces(plan, run, to_slots=False)
        return ()

    def _moves_whole(self, plan: CopyPlan) -> bool:
        return self._shares and min(plan.table.sizes) >= SHARED_PIECE_BYTES_MIN


def lets_go_of_the_gil(plan: CopyPlan) -> bool:
    """Whether this copy runs in calls that let other threads go on, so that several may share it."""
    table = plan.table
    if not len(plan.addresses):
        return False
    if table.block_bytes <= HELD_PIECE_BYTES_MAX:
        return _is_packed(plan) and table.block_bytes >= ITEM_BYTES_MIN and not _is_choppy(plan, _runs(plan))
    return table.block_bytes // len(_strips(table, int(plan.addresses[0]))) > HELD_PIECE_BYTES_MAX


def _runs(plan: CopyPlan) -> list[slice]:
    """Maximal runs of blocks whose slots are adjacent in memory."""
    if not len(plan.addresses):
        return []
    cuts = np.flatnonzero(np.diff(plan.addresses) != plan.slot_bytes) + 1
    bounds = [0, *cuts.tolist(), len(plan.addresses)]
    return [slice(first, last) for first, last in itertools.pairwise(bounds)]


def _is_uniform(plan: CopyPlan) -> bool:
    return len(set(plan.table.sizes)) == 1


def _is_choppy(plan: CopyPlan, runs: list[slice]) -> bool:
    return len(runs) > 1 and len(plan.addresses) * plan.slot_bytes < len(runs) * RUN_BYTES_MIN


def _is_packed(plan: CopyPlan) -> bool:
    """Blocks lie one after the other without gaps, on both sides."""
    table = plan.table
    return len(table.sizes) == 1 and table.block_bytes == plan.slot_bytes == int(table.strides[0])


def _is_straight(block_ids: Addresses) -> bool:
    return len(block_ids) == 1 or bool((np.diff(block_ids) == 1).all())


def _bytes_at(address: int, size: int) -> NDArray[np.uint8]:
    return raw_array(address, (size,), (1,), 1).view(np.uint8)


@dataclass(frozen=True, slots=True)
class _Strip:
    """Segments `first` to `last - 1` of a table: equal sizes and strides, bases `spacing` bytes apart."""

    first: int
    last: int
    spacing: int


def _strips(table: SegmentTable, slots_address: int) -> list[_Strip]:
    """The fewest strips in order, none with the slots in its midst.

    One whose span encloses the slots would look to numpy as if the two might overlap: it would copy it aside first.
    """
    bases, strides, sizes = table.bases.tolist(), table.strides.tolist(), table.sizes
    strips: list[_Strip] = []
    first, count = 0, len(sizes)
    while first < count:
        last, spacing = first + 1, sizes[first]
        if last < count:
            spacing = bases[last] - bases[first]
        while (
            last < count
            and sizes[last] == sizes[first]
            and strides[last] == strides[first]
            and bases[last] - bases[last - 1] == spacing
            and (bases[last] < slots_address) == (bases[first] < slots_address)
        ):
            last += 1
        strips.append(_Strip(first, last, spacing))
        first = last
    return strips


def _copied_in_strips(plan: CopyPlan, runs: list[slice], *, to_slots: bool) -> bool:
    """Copy with one call a block and strip, or a run where both sides are straight; False: pieces are too small."""
    table = plan.table
    if not runs or table.block_bytes <= HELD_PIECE_BYTES_MAX:
        return False
    views: dict[int, list[tuple[int, NDArray[np.uint8]]]] = {}  # by how many segments lie below a run's slots
    for run in runs:
        ids, address = plan.block_ids[run], int(plan.addresses[run.start])
        below = int(np.count_nonzero(table.bases < address))
        if below not in views:
            strips = _strips(table, address)
            if not views and table.block_bytes // len(strips) <= HELD_PIECE_BYTES_MAX:
                return False
            views[below] = [(int(table.offsets[strip.first]), _strip_of(table, strip)) for strip in strips]
        if _is_packed(plan) and _is_straight(ids):
            _copy_straight(plan, run, to_slots=to_slots)
            continue
        for offset, paged in views[below]:
            shape = (len(ids), *paged.shape[1:])
            slots = raw_array(address + offset, shape, (plan.slot_bytes, shape[2], 1), 1).view(np.uint8)
            blocks = map(paged.__getitem__, ids.tolist())
            deque(map(np.positive, *((blocks, slots) if to_slots else (slots, blocks))), maxlen=0)
    return True


def _strip_of(table: SegmentTable, strip: _Strip) -> NDArray[np.uint8]:
    """The engine's side of a strip: uint8 (blocks, segments, segment bytes)."""
    shape = (table.blocks, strip.last - strip.first, table.sizes[strip.first])
    strides = (int(table.strides[strip.first]), strip.spacing, 1)
    return raw_array(int(table.bases[strip.first]), shape, strides, 1).view(np.uint8)


def _copy_straight(plan: CopyPlan, run: slice, *, to_slots: bool) -> None:
    size = (run.stop - run.start) * plan.slot_bytes
    paged = _bytes_at(int(plan.table.bases[0] + plan.block_ids[run.start] * plan.slot_bytes), size)
    slots = _bytes_at(int(plan.addresses[run.start]), size)
    np.positive(*((paged, slots) if to_slots else (slots, paged)))


def _gather_packed(plan: CopyPlan, run: slice) -> None:
    ids = plan.block_ids[run]
    if _is_straight(ids):
        return _copy_straight(plan, run, to_slots=True)
    out = raw_array(int(plan.addresses[run.start]), (len(ids), 1), (plan.slot_bytes,) * 2, plan.slot_bytes)
    # Any other mode than clip makes numpy buffer `out` (a fifth of the speed); the ids were checked before.
    np.take(plan.table.rows[0], ids, axis=0, out=out, mode="clip")
    return None


def _gather_run(plan: CopyPlan, run: slice) -> None:
    """A column of many blocks at a time where segments are small and blocks lie in order; else block by block."""
    rows, size, ids = plan.table.rows, plan.table.sizes[0], plan.block_ids[run]
    count = len(ids)
    slots = raw_array(int(plan.addresses[run.start]), (count, len(rows)), (plan.slot_bytes, size), size)
    if count >= COLUMN_BLOCKS_MIN and size <= COLUMN_BYTES_MAX and _is_straight(ids):
        first = int(ids[0])
        for column, row in enumerate(rows):
            np.copyto(slots[:, column], row[first : first + count, 0])
        return
    # Items as wide as a segment: for so few of them numpy does not hand the GIL over at each.
    for block, slot in zip(ids.tolist(), slots, strict=True):
        np.concatenate([row[block] for row in rows], out=slot)


def _scatter_windows(plan: CopyPlan, run: slice) -> bool:
    """Scatter a run by fancy assignment into windows over the paged memory; False where that cannot be.

    A window is an array of overlapping items over all addresses an item may begin at: one assignment places any
    number of items anywhere. Its span must not enclose the slots, else numpy sees a possible overlap and copies
    them aside first; so segments below and above the slots get windows apart.
    """
    table, count = plan.table, run.stop - run.start
    below = table.extents()[1] <= int(plan.addresses[run.start])
    bounds = [0, *(np.flatnonzero(np.diff(below)) + 1).tolist(), len(table.sizes)]
    if len(bounds) > WINDOW_RANGES_MAX + 1:
        return False
    item = _item_bytes(table.sizes[0], count * len(table.sizes))
    pieces = np.arange(0, table.sizes[0], item, dtype=np.int64)
    paged = (plan.block_ids[run, None] * table.strides + table.bases)[:, :, None] + pieces
    slots = raw_array(int(plan.addresses[run.start]), paged.shape, (plan.slot_bytes, table.sizes[0], item), item)
    ranges = itertools.pairwise(bounds)
    return all(_assign(paged[:, first:last], slots[:, first:last], item) for first, last in ranges)


def _item_bytes(segment_bytes: int, segments: int) -> int:
    item = segment_bytes
    while segments * (segment_bytes // item) < RELEASED_ITEMS and item % 2 == 0 and item >= 2 * ITEM_BYTES_MIN:
        item //= 2
    return item


def _assign(targets: Addresses, items: NDArray[Any], item_bytes: int) -> bool:
    """Put each item at its target address, by one assignment into one window."""
    base = int(targets.min())
    offsets = targets - base
    step = max(int(np.gcd.reduce(offsets, axis=None)), 1)
    window_items = int(offsets.max()) // step + 1
    if window_items * item_bytes > WINDOW_BYTES_MAX:
        return False
    window = raw_array(base, (window_items,), (step,), item_bytes)
    if items.flags.c_contiguous:  # one dimension takes numpy's short way
        offsets, items = offsets.ravel(), items.reshape(-1)
    window[offsets // step] = items
    return True


def _move_pieces(plan: CopyPlan, run: slice, *, to_slots: bool) -> None:
    """Any sizes, any places: one memmove a piece, driven by C iterators."""
    table = plan.table
    paged = plan.block_ids[run, None] * table.strides + table.bases
    slots = plan.addresses[run, None] + table.offsets
    targets, sources = (slots, paged) if to_slots else (paged, slots)
    move = _move_held if max(table.sizes) <= HELD_PIECE_BYTES_MAX else _move_released
    step = max(1, STRETCH_BYTES // table.block_bytes)
    sizes = table.sizes * step
    for first in range(0, len(targets), step):
        pieces = (
            targets[first : first + step].ravel().tolist(),
            sources[first : first + step].ravel().tolist(),
        )
        deque(map(move, *pieces, sizes), maxlen=0)


def _memmove(library: ctypes.CDLL) -> Any:
    function = library["memmove"]
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    function.restype = None
    return function


_move_held = _memmove(ctypes.PyDLL(None))
_move_released = _memmove(ctypes.CDLL(None))
