"""The data file of a daemon that does not run: where its blocks lie, and ways to damage it."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_64_intdigest

from forebay.tiers.nvme_format import (
    HEADER_COPY_OFFSET,
    PAGE,
    SlotRecord,
    decode_drive,
    decode_slab,
    slab_offset,
    slot_offset,
    slot_stride,
    slots_per_slab,
    unpack_slot,
)

DRIVE_HEADER_BYTES = 56
VERSION_OFFSET = 8


@dataclass(frozen=True, slots=True)
class FoundSlot:
    """A sound slot header, and where in the file the slot begins; its payload follows on the next page."""

    record: SlotRecord
    offset: int
    slot_bytes: int

    @property
    def payload_offset(self) -> int:
        return self.offset + PAGE

    @property
    def stride(self) -> int:
        return slot_stride(self.slot_bytes)


def find_slots(path: Path) -> dict[bytes, FoundSlot]:
    """The slots of all blocks, by hash; of one that lies there twice the newer."""
    found: dict[bytes, FoundSlot] = {}
    with path.open("rb") as file:
        drive = decode_drive(file.read(PAGE))
        for slab in range(drive.slabs):
            owned = decode_slab(_page(file.fileno(), slab_offset(drive.slab_bytes, slab)), drive.drive_id, slab)
            if owned is None:
                continue
            size = owned[0].slot_bytes
            for slot in range(slots_per_slab(drive.slab_bytes, size)):
                offset = slot_offset(drive.slab_bytes, size, slab, slot)
                record = unpack_slot(_page(file.fileno(), offset), drive.drive_id)
                known = found.get(record.hash) if record is not None else None
                if record is not None and (known is None or known.record.generation < record.generation):
                    found[record.hash] = FoundSlot(record, offset, size)
    return found


def _page(fd: int, offset: int) -> bytes:
    return os.pread(fd, PAGE, offset)


def read_at(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        return os.pread(file.fileno(), length, offset)


def write_at(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), data, offset)


def flip_bit(path: Path, bit: int) -> None:
    """Invert one bit of a file."""
    at, mask = bit // 8, 1 << bit % 8
    write_at(path, at, bytes([read_at(path, at, 1)[0] ^ mask]))


def swap(path: Path, first: int, second: int, length: int) -> None:
    """Exchange two ranges of a file."""
    held = read_at(path, first, length)
    write_at(path, first, read_at(path, second, length))
    write_at(path, second, held)


def set_format_version(path: Path, version: int) -> None:
    """Let both copies of the drive header name another version, under a right checksum."""
    for offset in (0, HEADER_COPY_OFFSET):
        page = bytearray(read_at(path, offset, DRIVE_HEADER_BYTES))
        struct.pack_into("<H", page, VERSION_OFFSET, version)
        write_at(path, offset, page + struct.pack("<Q", xxh3_64_intdigest(page)))
