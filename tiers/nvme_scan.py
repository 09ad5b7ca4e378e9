"""Finds blocks by their headers on the drive itself: how an index is made anew, and what a check compares it with.

Only header pages are read, one small read each; payloads are verified when they are loaded. A header counts when it is
whole, names this drive and the very place it was read from, and belongs to the slab's owner: what an earlier owner left
in the slab has another namespace or an older generation. A payload that looks like a header is no danger, since nobody
but the daemon knows the drive's 16 random bytes.
"""

from __future__ import annotations

import contextlib
import mmap
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from forebay.tiers.nvme_drive import Drive
from forebay.tiers.nvme_format import (
    PAGE,
    SlotRecord,
    decode_slab,
    has_slot_magic,
    is_free_slab,
    slab_offset,
    slot_offset,
    slots_per_slab,
    unpack_slot,
)
from forebay.tiers.nvme_jobs import SlabOwner

_SCANNERS = 4
_LOOK_S = 0.5


@dataclass(slots=True)
class SlabFindings:
    """What the slots of one slab hold. `leftovers` are sound headers of earlier owners or of forgotten places."""

    blocks: list[SlotRecord]
    bad_headers: int = 0
    leftovers: int = 0
    unreadable: int = 0


def scan_slabs(drive: Drive, stop: Callable[[], bool]) -> Iterator[tuple[int, SlabOwner, int] | int]:
    """(slab, owner, first generation) of each assigned slab; the bare number of one whose header is not to be read."""
    page = memoryview(mmap.mmap(-1, PAGE))
    for slab in range(drive.slabs):
        if stop():
            return
        if not read_page(drive, page, slab_offset(drive.slab_bytes, slab)):
            yield slab
            continue
        found = decode_slab(page, drive.drive_id, slab)
        if found is not None and slots_per_slab(drive.slab_bytes, found[0].slot_bytes) > 0:
            yield slab, *found
        elif not is_free_slab(page):
            yield slab


def scan_slots(drive: Drive, slab: int, owner: SlabOwner, generation: int, stop: Callable[[], bool]) -> SlabFindings:
    """The slab's blocks, parents before children. Ends early when `stop` says so."""
    page = memoryview(mmap.mmap(-1, PAGE))
    found = SlabFindings([])
    namespace = owner.namespace_id()
    for slot in range(slots_per_slab(drive.slab_bytes, owner.slot_bytes)):
        if stop():
            break
        if not read_page(drive, page, slot_offset(drive.slab_bytes, owner.slot_bytes, slab, slot)):
            found.unreadable += 1
        elif has_slot_magic(page):
            record = unpack_slot(page, drive.drive_id)
            if record is None:
                found.bad_headers += 1
            elif belongs(record, slab, slot, namespace, owner, generation):
                found.blocks.append(record)
            else:
                found.leftovers += 1
    found.blocks.sort(key=lambda record: record.depth)
    return found


def scan_all(
    assigned: Sequence[tuple[int, SlabOwner, int]],
    scan: Callable[[tuple[int, SlabOwner, int]], SlabFindings],
    stop: Callable[[], bool],
) -> Iterator[SlabFindings]:
    """What `scan` finds in each slab, as it comes, by a few threads; ends when `stop` says so, whoever hangs.

    The threads are daemons: one that the drive never lets go of keeps no process from ending. Raises what `scan` did.
    """
    todo: queue.SimpleQueue[tuple[int, SlabOwner, int]] = queue.SimpleQueue()
    done: queue.SimpleQueue[SlabFindings | Exception] = queue.SimpleQueue()
    for each in assigned:
        todo.put(each)

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while not stop():
                each = todo.get_nowait()
                try:
                    done.put(scan(each))
                except Exception as error:  # noqa: BLE001  # raised where it is waited for
                    done.put(error)

    for number in range(min(_SCANNERS, len(assigned))):
        threading.Thread(target=work, name=f"scan-{number}", daemon=True).start()
    left = len(assigned)
    while left and not stop():
        try:
            found = done.get(timeout=_LOOK_S)
        except queue.Empty:
            continue
        if isinstance(found, Exception):
            raise found
        left -= 1
        yield found


def belongs(record: SlotRecord, slab: int, slot: int, namespace: bytes, owner: SlabOwner, generation: int) -> bool:
    """Whether a sound header is of this very place and of the slab's present owner."""
    return (
        (record.slab, record.slot) == (slab, slot)
        and record.namespace_id == namespace
        and record.generation >= generation
        and len(record.hash) == owner.hash_bytes
        and record.payload_bytes <= owner.slot_bytes
    )


def read_page(drive: Drive, page: memoryview, offset: int) -> bool:
    """Whether the page came, at the second try if need be."""
    for _ in range(2):
        try:
            if drive.read([page], offset) == PAGE:
                return True
        except OSError:
            pass
    return False
