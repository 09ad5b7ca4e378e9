"""The NVMe tier as the owner thread sees it: warm restarts, several drives, refusals, and a close in time."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import cast

import pytest
from tests.tiers.nvme_rig import BYTES, OWNER, SLAB, SLABS, SLOT, WAIT_S, FaultyFiles, Rig, crash, filled, memory, name

from forebay.tiers import nvme
from forebay.tiers.files import FilesystemInfo
from forebay.tiers.nvme import NvmeTier
from forebay.tiers.nvme_bandwidth import Bandwidth, write_bandwidth
from forebay.tiers.nvme_drive import DATA_NAME
from forebay.tiers.nvme_format import PAGE
from forebay.tiers.nvme_jobs import IoStatus, NvmeOptions, RestoreDone, SlabOwner

OK = IoStatus.OK


def options(*paths: Path, **changed: object) -> NvmeOptions:
    settings: dict[str, object] = {"bytes_per_path": BYTES, "slab_bytes": SLAB, **changed}
    return NvmeOptions(paths=paths, **settings)  # type: ignore[arg-type]


# --- a start ---


def test_new_tier_has_nothing_and_says_so_at_once(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "drive")
    assert rig.restore() == RestoreDone(0, rig.restored.seconds, False, ())  # type: ignore[union-attr]
    assert rig.slabs == []
    info = rig.tier.describe()
    assert (info.tier, info.up, info.slabs, info.capacity_bytes) == ("nvme", True, SLABS, SLABS * SLAB)
    assert rig.tier.first_generation == 1 << 32 | 1
    rig.close()


def test_files_never_exceed_their_cap(tmp_path: Path) -> None:
    rig = filled(tmp_path / "drive", 50)
    assert (tmp_path / "drive" / DATA_NAME).stat().st_size <= BYTES
    rig.close()


@pytest.mark.parametrize(
    "changed",
    [{"bytes_per_path": SLAB}, {"slab_bytes": 5000}, {"slab_bytes": 4096}],
    ids=str,
)
def test_sizes_that_hold_nothing_are_refused(tmp_path: Path, changed: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"slab|path"):
        NvmeTier(options(tmp_path / "drive", **changed), wake=lambda: None)


def test_path_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only once"):
        NvmeTier(options(tmp_path, tmp_path), wake=lambda: None)


def test_place_that_cannot_be_asked_about_is_used_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no answer")

    monkeypatch.setattr(FaultyFiles, "filesystem", fail)
    rig = Rig(tmp_path / "drive")
    info = rig.tier.describe()
    assert (info.up, info.warnings) == (True, ())
    rig.close()


def test_tier_that_cannot_start_is_down_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "drive").touch()
    rig = Rig(tmp_path / "drive")
    info = rig.tier.describe()
    assert not info.up
    assert "not a directory" in info.reason
    assert rig.load([0]) == [IoStatus.DOWN]
    assert rig.write([0]) == [IoStatus.DOWN]
    rig.close()


def test_second_tier_on_a_path_is_down_and_harms_nothing(tmp_path: Path) -> None:
    first = filled(tmp_path / "drive", 5)
    second = Rig(tmp_path / "drive")
    assert "in use by another daemon" in second.tier.describe().reason
    second.close()
    assert set(first.load(range(5))) == {OK}
    first.close()


def test_changed_capacity_is_down_until_it_is_changed_back(tmp_path: Path) -> None:
    filled(tmp_path / "drive", 5).close()
    other = Rig(tmp_path / "drive", bytes_per_path=2 * BYTES)
    assert "was made with 7 slabs" in other.tier.describe().reason
    other.close()
    back = Rig(tmp_path / "drive")
    assert back.restore().blocks == 5
    back.close()


# --- restarts ---


@pytest.mark.parametrize("end", [Rig.close, crash], ids=["closed", "killed"])
def test_restart_brings_every_durable_block_back(tmp_path: Path, end: object) -> None:
    rig = filled(tmp_path / "drive", 30)
    first_generation = rig.tier.first_generation
    end(rig)  # type: ignore[operator]
    again = Rig(tmp_path / "drive")
    done = again.restore()
    assert (done.blocks, done.rebuilt, done.problems) == (30, False, ())
    assert again.slabs == [(0, OWNER, first_generation)]
    assert again.blocks == [(0, n, name(n), name(n - 1) if n else b"", n, first_generation) for n in range(30)]
    assert again.tier.first_generation > max(block[5] for block in again.blocks)
    assert set(again.load_restored(again.blocks)) == {OK}
    again.close()


def test_bytes_written_are_counted_over_restarts(tmp_path: Path) -> None:
    rig = filled(tmp_path / "drive", 20, life_bytes=1 << 40)
    once = 20 * (PAGE + SLOT)
    assert [drive.lifetime_written_bytes for drive in rig.tier.detail().drives] == [once]
    rig.close()
    again = Rig(tmp_path / "drive")
    again.restore()
    (drive,) = again.tier.detail().drives
    assert (drive.lifetime_written_bytes, drive.index_records) == (once, 20)
    assert (again.tier.detail().written_bytes, rig.tier.detail().life_bytes) == (0, 1 << 40)
    again.close()


def test_moved_path_comes_back_as_it_was(tmp_path: Path) -> None:
    filled(tmp_path / "drive", 5).close()
    (tmp_path / "drive").rename(tmp_path / "elsewhere")
    rig = Rig(tmp_path / "elsewhere")
    assert rig.restore().blocks == 5
    assert set(rig.load_restored(rig.blocks)) == {OK}
    rig.close()


def test_forgotten_block_does_not_come_back(tmp_path: Path) -> None:
    rig = filled(tmp_path / "drive", 5)
    rig.tier.forget([(0, 1), (0, 3)])
    rig.close()
    again = Rig(tmp_path / "drive")
    again.restore()
    assert again.numbers() == [0, 2, 4]
    again.close()


def test_slab_given_to_another_owner_comes_back_as_his(tmp_path: Path) -> None:
    rig = filled(tmp_path / "drive", 5)
    other = SlabOwner(2000, bytes(32), 1, 2, 100, 4096, 16, 32, "other")
    since = rig.tier.first_generation + 10
    rig.assign(0, other, since)
    rig.close()
    again = Rig(tmp_path / "drive")
    assert again.restore().blocks == 0
    assert again.slabs == [(0, other, since)]
    again.close()


def test_retired_slab_is_free_after_a_restart(tmp_path: Path) -> None:
    rig = filled(tmp_path / "drive", 5)
    rig.tier.retire_slab(0)
    rig.close()
    again = Rig(tmp_path / "drive")
    assert again.restore().blocks == 0
    assert again.slabs == []
    again.close()


def test_loads_are_served_while_the_restore_is_under_way(tmp_path: Path) -> None:
    """Nobody takes events here, so the restore cannot have ended."""
    filled(tmp_path / "drive", 5).close()
    rig = Rig(tmp_path / "drive")
    statuses = rig.load(range(5), generations=[1 << 32 | 1] * 5)
    assert set(statuses) == {OK}
    rig.close()


def test_writes_given_before_the_index_is_back_become_durable_after_it(tmp_path: Path) -> None:
    filled(tmp_path / "drive", 5).close()
    rig = Rig(tmp_path / "drive")
    rig.until(lambda: rig.slabs is not None)
    rig.assign(1)
    assert rig.write([7], slab=1) == [OK]
    rig.restore()
    rig.close()
    again = Rig(tmp_path / "drive")
    again.restore()
    assert again.numbers() == [0, 1, 2, 3, 4, 7]
    again.close()


# --- several drives ---


@pytest.mark.parametrize(
    ("staging", "is_virtual", "io"),
    [
        ("auto", True, "staged"),
        ("auto", False, "direct"),
        ("always", False, "staged"),
        ("never", True, "direct"),
    ],
)
def test_calls_go_through_buffers_on_virtual_disks_unless_told_otherwise(
    tmp_path: Path, staging: str, is_virtual: bool, io: str
) -> None:
    files = FaultyFiles()
    files.kind = FilesystemInfo("ext4", is_system_disk=False, is_virtual_disk=is_virtual)
    rig = Rig(tmp_path / "drive", files=files, staging=staging)
    told = rig.tier.detail().drives[0]
    rig.close()
    if told.io == "buffered":
        pytest.skip(f"{told.io_reason} on {tmp_path}")
    assert told.io == io


def test_slabs_alternate_between_drives(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    rig = Rig(*paths)
    rig.restore()
    assert rig.tier.slabs == 2 * SLABS
    for slab in range(4):
        rig.assign(slab)
    slabs = [n % 4 for n in range(20)]
    assert set(rig.write(range(20), slabs)) == {OK}
    assert set(rig.load(range(20), slabs)) == {OK}
    assert [drive.index_records for drive in rig.tier.detail().drives] == [10, 10]
    rig.close()
    again = Rig(*reversed(paths))
    assert again.restore().blocks == 20
    assert {slab for slab, _, _ in again.slabs or ()} == {0, 1, 2, 3}
    assert set(again.load_restored(again.blocks)) == {OK}
    again.close()


def test_drives_can_be_added_and_change_their_order(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    filled(one, 20).close()
    rig = Rig(two, one)
    assert rig.restore().blocks == 20
    assert set(rig.load_restored(rig.blocks)) == {OK}
    assert {block[0] % 2 for block in rig.blocks} == {1}
    rig.close()


@pytest.mark.parametrize("call", ["size", "sync"])
def test_drive_that_hangs_at_the_start_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """While it is opened, and while its life begins. It is let go of when it answers after all."""
    paths = tmp_path / "hangs", tmp_path / "works"
    for path in paths:
        filled(path, 3).close()
    monkeypatch.setattr(nvme, "OPEN_S", 0.2)
    files, go_on, first = FaultyFiles(), threading.Event(), iter([True])
    honest = getattr(files, call)

    def hang(fd: int) -> int | None:
        if next(first, False):
            assert go_on.wait(WAIT_S)
        return cast("int | None", honest(fd))

    monkeypatch.setattr(files, call, hang)
    rig = Rig(*paths, files=files)
    rig.restore()
    info, (works, hangs) = rig.tier.describe(), rig.tier.detail().drives
    assert (info.up, info.slabs, works.up, hangs.up, hangs.path) == (True, SLABS, True, False, str(paths[0]))
    assert "no answer within 0.2 s" in hangs.reason
    assert hangs.reason in info.warnings
    go_on.set()
    rig.close()
    again = Rig(*paths)
    assert again.tier.describe().slabs == 2 * SLABS
    again.close()


def test_drive_that_cannot_be_used_is_left_out_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "bad").touch()
    rig = Rig(tmp_path / "good", tmp_path / "bad")
    rig.restore()
    info = rig.tier.describe()
    assert (info.up, info.slabs) == (True, SLABS)
    assert any("bad is not a directory" in warning for warning in info.warnings)
    assert [drive.up for drive in rig.tier.detail().drives] == [True, False]
    rig.close()


def benched(path: Path, read_bytes_per_s: int) -> Path:
    """A drive's folder in which a benchmark has left what it measured."""
    path.mkdir(mode=0o700)
    write_bandwidth(path, Bandwidth(read_bytes_per_s, 10**9, 2 << 20, 8, "2026-01-02T03:04:05Z"))
    return path


def test_rates_that_a_benchmark_left_on_the_drives_are_added_up(tmp_path: Path) -> None:
    """A drive without such a file counts as the others do, one that is not used not at all."""
    (tmp_path / "bad").touch()
    paths = benched(tmp_path / "a", 2 * 10**9), benched(tmp_path / "b", 4 * 10**9), tmp_path / "c", tmp_path / "bad"
    rig = Rig(*paths)
    assert rig.tier.benched_read_bytes_per_s == 9e9
    rig.close()
    rig = Rig(tmp_path / "c")
    assert rig.tier.benched_read_bytes_per_s == 0
    assert not any("bandwidth" in warning for warning in rig.tier.describe().warnings)
    rig.close()


def test_rates_that_cannot_be_believed_cost_a_warning(tmp_path: Path) -> None:
    path = benched(tmp_path / "drive", 2 * 10**9)
    (path / "bandwidth.json").write_text("{}")
    rig = Rig(path)
    assert rig.tier.benched_read_bytes_per_s == 0
    assert rig.tier.describe().up
    [warning] = [each for each in rig.tier.describe().warnings if "bandwidth" in each]
    assert warning == f"{path}/bandwidth.json is not used: its version is None, not 1"
    rig.close()


def test_generations_of_all_drives_lie_behind_the_oldest_life(tmp_path: Path) -> None:
    for _ in range(3):
        Rig(tmp_path / "old").close()
    rig = Rig(tmp_path / "new", tmp_path / "old")
    assert rig.tier.first_generation == 4 << 32 | 1
    rig.close()


# --- jobs ---


def test_job_without_blocks_is_done(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "drive")
    assert rig.load([]) == []
    rig.close()


@pytest.mark.parametrize(
    "changed",
    [
        {"slabs": [SLABS]},
        {"slabs": [-1]},
        {"slots": [1000]},
        {"slot_bytes": 5000},
        {"payload_bytes": SLOT + 1},
        {"views": memory(1, 4096)},
        {"hashes": [bytes(33)]},
        {"hashes": [b""]},
        {"parents": [bytes(33)]},
        {"depths": [1 << 32]},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_place_that_does_not_exist_is_refused(tmp_path: Path, changed: dict[str, object]) -> None:
    rig = Rig(tmp_path / "drive")
    job = rig.write_job([0])
    bad = type(job)(**{**{field: getattr(job, field) for field in job.__dataclass_fields__}, **changed})
    with pytest.raises(ValueError, match=r"job|slots"):
        rig.tier.write(bad)
    rig.close()


def test_wake_comes_once_until_the_events_are_taken(tmp_path: Path) -> None:
    count = threading.Semaphore(0)
    tier = NvmeTier(options(tmp_path / "drive"), files=FaultyFiles(), wake=count.release)
    tier.start()
    seen: list[object] = []
    while not any(isinstance(event, RestoreDone) for event in seen):
        assert count.acquire(timeout=30)
        assert not count.acquire(blocking=False)
        seen += tier.completed()
    tier.close(10)


# --- the end ---


def test_closed_tier_is_down(tmp_path: Path) -> None:
    rig = filled(tmp_path / "drive", 1)
    rig.close()
    rig.close()
    assert not rig.tier.describe().up
    assert rig.load([0]) == [IoStatus.DOWN]


def test_close_makes_durable_what_is_queued(tmp_path: Path) -> None:
    rig = filled(tmp_path / "drive", 1, index_batch_s=60.0)
    job = rig.write_job(range(1, 20))
    rig.tier.write(job)
    rig.close()
    assert set(rig.wait(job)) == {OK}
    again = Rig(tmp_path / "drive")
    assert again.restore().blocks == 20
    again.close()


def test_close_cancels_what_does_not_end_in_time(tmp_path: Path) -> None:
    rig = filled(tmp_path / "drive", 3, queue_depth=1)
    rig.files.gate.clear()
    stuck, waiting = rig.load_job([0]), rig.load_job([2])
    rig.tier.load(stuck)
    rig.tier.load(waiting)
    rig.tier.close(0.05)
    assert rig.wait(waiting) == [IoStatus.CANCELLED]
    rig.files.gate.set()
    assert rig.wait(stuck) == [OK]
    rig.close()


def test_index_that_is_gone_is_made_anew(tmp_path: Path) -> None:
    filled(tmp_path / "drive", 30).close()
    shutil.rmtree(tmp_path / "drive" / "index")
    rig = Rig(tmp_path / "drive")
    done = rig.restore()
    assert (done.blocks, done.rebuilt) == (30, True)
    assert "missing" in done.problems[0]
    assert set(rig.load_restored(rig.blocks)) == {OK}
    rig.close()
    again = Rig(tmp_path / "drive")
    assert (again.restore().rebuilt, again.restored.blocks) == (False, 30)  # type: ignore[union-attr]
    again.close()
