"""An offline check finds every kind of damage, and a repair makes an index of what is sound."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.tiers.nvme_rig import OWNER, SLAB, SLOT, Rig, filled

from forebay.kvstore.errors import Busy, Corrupt
from forebay.tiers.nvme_drive import DATA_NAME
from forebay.tiers.nvme_format import PAGE, slab_offset, slot_offset
from forebay.tiers.nvme_fsck import check
from forebay.tiers.nvme_jobs import IoStatus


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed drive with blocks 0 .. 9."""
    filled(tmp_path / "drive", 10).close()
    return tmp_path / "drive"


def flip(path: Path, offset: int) -> None:
    with (path / DATA_NAME).open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def slot_at(slot: int) -> int:
    return slot_offset(SLAB, SLOT, 0, slot)


def test_sound_drive_is_sound(path: Path) -> None:
    report = check(path, repair=False)
    assert report.is_sound
    assert (report.matching, report.stale, report.missing, report.repaired) == (10, 0, 0, False)
    (slab,) = report.slabs
    assert (slab.slab, slab.owner, slab.sound, slab.leftovers) == (0, OWNER, 10, 0)
    assert report.header.epoch == 1


def test_every_kind_of_damage_is_counted(path: Path) -> None:
    flip(path, slot_at(2) + 60)
    flip(path, slot_at(4) + PAGE + 100)
    report = check(path, repair=False)
    assert not report.is_sound
    (slab,) = report.slabs
    assert (slab.sound, slab.bad_headers, slab.bad_payloads) == (8, 1, 1)
    assert (report.matching, report.stale, report.missing) == (8, 2, 0)


def test_damaged_slab_header_is_named(path: Path) -> None:
    flip(path, slab_offset(SLAB, 0) + 40)
    report = check(path, repair=False)
    assert report.damaged_slabs == [0]
    assert report.slabs == []


def test_missing_index_is_made_by_a_repair_and_only_then(path: Path) -> None:
    shutil.rmtree(path / "index")
    report = check(path, repair=False)
    assert (report.index_reason, report.missing, report.is_sound) == ("it is missing", 10, False)
    assert not (path / "index").exists()
    assert check(path, repair=True).repaired
    assert check(path, repair=False).is_sound


def test_repair_leaves_damaged_blocks_out_and_a_daemon_goes_on_with_the_rest(path: Path) -> None:
    flip(path, slot_at(4) + PAGE + 100)
    assert check(path, repair=True).repaired
    assert (path / "index.bad-1").is_dir()
    report = check(path, repair=False)
    assert (report.matching, report.stale, report.missing) == (9, 0, 0)
    rig = Rig(path)
    done = rig.restore()
    assert (done.blocks, done.rebuilt) == (9, False)
    assert 4 not in rig.numbers()
    assert set(rig.load_restored(rig.blocks)) == {IoStatus.OK}
    rig.close()


def test_progress_ends_at_one(path: Path) -> None:
    heard: list[float] = []
    check(path, repair=False, progress=heard.append)
    assert heard == [1.0]


def test_path_of_a_running_daemon_is_refused(tmp_path: Path) -> None:
    rig = filled(tmp_path / "drive", 1)
    with pytest.raises(Busy):
        check(tmp_path / "drive", repair=True)
    rig.close()


def test_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / DATA_NAME).write_bytes(b"not ours" * 2000)
    with pytest.raises(Corrupt):
        check(tmp_path, repair=True)
