"""Checks a path of the NVMe tier offline, every payload included, and makes its index anew on request.

Nothing is repaired in the data file: a damaged block is a miss, and stays where it is until its slot is written again.
Repairing means a new index from the slots that are sound; the old one is set aside.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from xxhash import xxh3_64_intdigest

from forebay.kvstore.errors import Corrupt
from forebay.tiers.files import Files, OsFiles
from forebay.tiers.nvme_drive import Drive, open_existing
from forebay.tiers.nvme_format import (
    PAGE,
    DriveHeader,
    SlotRecord,
    found_record,
    has_slot_magic,
    slot_key,
    slot_offset,
    slots_per_slab,
    unpack_slot,
)
from forebay.tiers.nvme_index import Batch, Index, quarantine_index
from forebay.tiers.nvme_jobs import SlabOwner
from forebay.tiers.nvme_reader import Assigned, IndexReader
from forebay.tiers.nvme_scan import belongs, read_page, scan_slabs

_WALK_TIMEOUT_S = 300.0
_BATCH_BLOCKS = 10_000


@dataclass(slots=True)
class SlabReport:
    """The slots of one assigned slab; the rest of them was never written or holds no header.

    `leftovers` are sound headers of earlier owners of the slab.
    """

    slab: int
    owner: SlabOwner
    sound: int = 0
    bad_headers: int = 0
    bad_payloads: int = 0
    unreadable: int = 0
    leftovers: int = 0


@dataclass(slots=True)
class Report:
    """What a check has found. `index_reason` is empty when the index could be read whole.

    Index records are `matching` (the slot holds that block, soundly), `stale` (it does not); `missing` counts sound
    blocks without a record.
    """

    path: str
    header: DriveHeader
    slabs: list[SlabReport] = field(default_factory=list)
    damaged_slabs: list[int] = field(default_factory=list)
    index_reason: str = ""
    matching: int = 0
    stale: int = 0
    missing: int = 0
    repaired: bool = False

    @property
    def is_sound(self) -> bool:
        """Whether all there is can be read and the index says what is there."""
        bad = any(slab.bad_headers or slab.bad_payloads or slab.unreadable for slab in self.slabs)
        return not (bad or self.damaged_slabs or self.index_reason or self.stale or self.missing)


def check(
    path: Path, *, repair: bool, files: Files | None = None, progress: Callable[[float], None] = lambda fraction: None
) -> Report:
    """Read a path whole. `progress` hears the fraction of slabs done. Blocks for as long as reading the drive takes.

    Raises Busy when a daemon holds the path, Corrupt or LayoutError when its file is not ours to judge, OSError.
    """
    drive = open_existing(files or OsFiles(), path)
    try:
        report = Report(str(path), drive.header)
        records = _read_index(drive, report)
        assigned: list[Assigned] = []
        for found in scan_slabs(drive, _never):
            if isinstance(found, int):
                report.damaged_slabs.append(found)
            else:
                assigned.append(found)
        rebuilt = _Rebuilt(drive, assigned) if repair else None
        for number, (slab, owner, generation) in enumerate(assigned, 1):
            sound = _check_slab(drive, slab, owner, generation, report)
            _compare(sound, records, report)
            if rebuilt:
                rebuilt.add(sound)
            progress(number / len(assigned))
        report.stale += len(records)
        if rebuilt:
            rebuilt.finish()
            report.repaired = True
        return report
    finally:
        drive.close()


def _never() -> bool:
    return False


def _read_index(drive: Drive, report: Report) -> dict[bytes, tuple[bytes, int]]:
    """Hash and generation by place; what could be read of it when the index is broken."""
    records: dict[bytes, tuple[bytes, int]] = {}
    reader = IndexReader(drive, _WALK_TIMEOUT_S)
    if not reader.exists():
        report.index_reason = "it is missing"
        return records
    try:
        for found in reader.read():
            if isinstance(found, tuple):
                for slab, slot, hash_, _, _, generation in found[1]:
                    records[slot_key(slab, slot)] = hash_, generation
    except (Corrupt, OSError) as error:
        report.index_reason = str(error)
    report.stale += reader.stale
    return records


def _check_slab(drive: Drive, slab: int, owner: SlabOwner, generation: int, report: Report) -> list[SlotRecord]:
    """Read every slot of a slab; the blocks that are sound, payloads included."""
    said = SlabReport(slab, owner)
    report.slabs.append(said)
    namespace = owner.namespace_id()
    page, payload = memoryview(mmap.mmap(-1, PAGE)), memoryview(mmap.mmap(-1, owner.slot_bytes))
    sound: list[SlotRecord] = []
    for slot in range(slots_per_slab(drive.slab_bytes, owner.slot_bytes)):
        offset = slot_offset(drive.slab_bytes, owner.slot_bytes, slab, slot)
        if not read_page(drive, page, offset):
            said.unreadable += 1
            continue
        if not has_slot_magic(page):
            continue
        record = unpack_slot(page, drive.drive_id)
        if record is None:
            said.bad_headers += 1
        elif not belongs(record, slab, slot, namespace, owner, generation):
            said.leftovers += 1
        elif not _read_payload(drive, payload, offset + PAGE):
            said.unreadable += 1
        elif xxh3_64_intdigest(payload[: record.payload_bytes]) != record.payload_checksum:
            said.bad_payloads += 1
        else:
            said.sound += 1
            sound.append(record)
    return sound


def _read_payload(drive: Drive, payload: memoryview, offset: int) -> bool:
    try:
        return drive.read([payload], offset) == len(payload)
    except OSError:
        return False


def _compare(sound: list[SlotRecord], records: dict[bytes, tuple[bytes, int]], report: Report) -> None:
    """Take the slab's records out of `records`, which in the end holds those whose slot has nothing sound."""
    for record in sound:
        indexed = records.pop(slot_key(record.slab, record.slot), None)
        if indexed == (record.hash, record.generation):
            report.matching += 1
        else:
            report.missing += 1
            report.stale += indexed is not None


class _Rebuilt:
    """A new index in the making, in the old one's place."""

    def __init__(self, drive: Drive, assigned: list[Assigned]) -> None:
        if drive.index_directory.exists():
            quarantine_index(drive.directory)
        self._index = Index(drive.index_directory, drive.header)
        self._batch, self._blocks = Batch(), 0
        self._batch.adopt_slabs(assigned)

    def add(self, sound: list[SlotRecord]) -> None:
        self._batch.adopt_blocks([found_record(record) for record in sound])
        self._blocks += len(sound)
        if self._blocks >= _BATCH_BLOCKS:
            self._index.apply(self._batch, whole=False)
            self._batch, self._blocks = Batch(), 0

    def finish(self) -> None:
        self._index.apply(self._batch, whole=True)
        self._index.close()
