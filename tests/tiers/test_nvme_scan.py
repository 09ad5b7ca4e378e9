"""Finding blocks by their headers: the present owner's and nobody else's."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.tiers.nvme_rig import OWNER, SLAB, SLOT, FaultyFiles, Rig, filled, name

from forebay.tiers.nvme_drive import DATA_NAME, Drive, open_existing
from forebay.tiers.nvme_format import PAGE, slab_offset, slot_offset
from forebay.tiers.nvme_jobs import IoStatus, SlabOwner
from forebay.tiers.nvme_scan import scan_slabs, scan_slots


def never() -> bool:
    return False


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return filled(tmp_path / "drive", 10)


@pytest.fixture
def drive(rig: Rig, tmp_path: Path) -> Iterator[Drive]:
    """The drive of ten blocks in slab 0, closed by its tier."""
    rig.close()
    opened = open_existing(FaultyFiles(), tmp_path / "drive")
    yield opened
    opened.close()


def flip(tmp_path: Path, offset: int) -> None:
    with (tmp_path / "drive" / DATA_NAME).open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_assigned_slabs_are_found_and_free_ones_are_not(drive: Drive) -> None:
    assert list(scan_slabs(drive, never)) == [(0, OWNER, 1 << 32 | 1)]


def test_damaged_slab_header_is_a_bare_number(drive: Drive, tmp_path: Path) -> None:
    flip(tmp_path, slab_offset(SLAB, 0) + 50)
    assert list(scan_slabs(drive, never)) == [0]


def test_blocks_come_parents_first(drive: Drive) -> None:
    found = scan_slots(drive, 0, OWNER, 1 << 32 | 1, never)
    assert [record.hash for record in found.blocks] == [name(number) for number in range(10)]
    assert [record.depth for record in found.blocks] == list(range(10))
    assert (found.bad_headers, found.leftovers, found.unreadable) == (0, 0, 0)


def test_damaged_header_is_counted(drive: Drive, tmp_path: Path) -> None:
    flip(tmp_path, slot_offset(SLAB, SLOT, 0, 3) + 100)
    found = scan_slots(drive, 0, OWNER, 1 << 32 | 1, never)
    assert (len(found.blocks), found.bad_headers) == (9, 1)


def test_older_generations_and_other_namespaces_are_leftovers(drive: Drive) -> None:
    assert scan_slots(drive, 0, OWNER, 2 << 32, never).leftovers == 10
    stranger = SlabOwner(1, OWNER.group_fingerprint, 0, 1, OWNER.block_bytes, SLOT, 32, 16, "tiny")
    assert scan_slots(drive, 0, stranger, 0, never).leftovers == 10


def test_header_inside_a_payload_is_not_found(rig: Rig, tmp_path: Path) -> None:
    """A tenant who wrote another's header into his own block would need to know the drive's number."""
    forged = rig.write_job([40])
    with (tmp_path / "drive" / DATA_NAME).open("rb") as file:
        file.seek(slot_offset(SLAB, SLOT, 0, 5))
        header = bytearray(file.read(PAGE))
    header[16:32] = bytes(16)  # the drive's number, which no client has seen
    forged.views[0][:PAGE] = header
    rig.tier.write(forged)
    assert rig.wait(forged) == [IoStatus.OK]
    rig.close()
    drive = open_existing(FaultyFiles(), tmp_path / "drive")
    finer = SlabOwner(1000, OWNER.group_fingerprint, 0, 1, 4096, 4096, 32, 16, "tiny")
    assert scan_slots(drive, 0, finer, 0, never).blocks == []
    drive.close()


def test_unreadable_page_is_tried_twice_and_counted(drive: Drive) -> None:
    files = drive.files
    assert isinstance(files, FaultyFiles)
    failing = iter([OSError(errno.EIO, "io")] * 2 + [None] * 1000)
    read = drive.read

    def flaky(buffers: object, offset: int) -> int:
        error = next(failing)
        if error:
            raise error
        return read(buffers, offset)  # type: ignore[arg-type]

    drive.read = flaky  # type: ignore[method-assign]
    found = scan_slots(drive, 0, OWNER, 1 << 32 | 1, never)
    assert (len(found.blocks), found.unreadable) == (9, 1)


def test_scan_ends_when_told(drive: Drive) -> None:
    assert scan_slots(drive, 0, OWNER, 0, lambda: True).blocks == []
    assert list(scan_slabs(drive, lambda: True)) == []
