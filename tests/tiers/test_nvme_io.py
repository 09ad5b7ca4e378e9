"""Reading and writing slots: what is one call, what goes first, what every kind of damage comes to."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.tiers.nvme_rig import (
    SLAB,
    SLOT,
    WAIT_S,
    Clock,
    FaultyFiles,
    Rig,
    filled,
)

from forebay.tiers import nvme_io
from forebay.tiers.core_sharing import CoreSharing
from forebay.tiers.nvme_drive import DATA_NAME
from forebay.tiers.nvme_format import PAGE, slot_offset
from forebay.tiers.nvme_io import (
    CALL_BLOCKS_MAX,
    CALL_BYTES_MAX,
    CallQueue,
    Meter,
    Part,
    Work,
    WriteHealth,
    added,
    plan_calls,
)
from forebay.tiers.nvme_jobs import LATENCY_BOUNDS_S, IoStatus, LoadJob

OK = IoStatus.OK
EIO = OSError(errno.EIO, "Input/output error")
ENOSPC = OSError(errno.ENOSPC, "No space left on device")
STRIDE = PAGE + SLOT


@pytest.fixture(params=["never", "always"])
def rig(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    """Blocks 0 .. 9 durable in slab 0, by calls that go straight, or through buffers."""
    made = filled(tmp_path / "drive", 10, staging=request.param)
    yield made
    made.files.gate.set()
    made.close()


def data_of(rig: Rig) -> Path:
    return rig.tier._units[0].drive.directory / DATA_NAME


def patch(rig: Rig, slot: int, offset: int, change: bytes | None = None) -> None:
    """Overwrite bytes of a slot of slab 0 behind the tier's back, or flip one."""
    at = slot_offset(SLAB, SLOT, 0, slot) + offset
    with data_of(rig).open("r+b") as file:
        file.seek(at)
        change = change or bytes([file.read(1)[0] ^ 0x10])
        file.seek(at)
        file.write(change)


def image(rig: Rig, slot: int) -> bytes:
    with data_of(rig).open("rb") as file:
        file.seek(slot_offset(SLAB, SLOT, 0, slot))
        return file.read(STRIDE)


# --- what is one call ---


def planned_job(slabs: list[int], slots: list[int], slot_bytes: int = SLOT) -> LoadJob:
    return LoadJob(
        job_id=1,
        slot_bytes=slot_bytes,
        payload_bytes=slot_bytes,
        namespace_id=bytes(16),
        slabs=slabs,
        slots=slots,
        hashes=[],
        generations=[],
        views=[],
    )


def planned(slabs: list[int], slots: list[int], slot_bytes: int = SLOT, slab_bytes: int = SLAB) -> list[list[int]]:
    job = planned_job(slabs, slots, slot_bytes)
    calls = plan_calls(Part(Work(job), range(len(slots)), slabs), slab_bytes)
    for _, offset, run in calls:
        assert offset == slot_offset(slab_bytes, slot_bytes, slabs[run[0]], slots[run[0]])
    return [run for _, _, run in calls]


def test_adjacent_slots_are_one_call_in_the_order_of_the_file() -> None:
    assert planned([0, 0, 0], [3, 1, 2]) == [[1, 2, 0]]


def test_gap_or_another_slab_is_another_call() -> None:
    assert planned([0, 0, 0, 1], [0, 1, 3, 4]) == [[0, 1], [2], [3]]


def test_call_stays_below_its_limits() -> None:
    small = planned([0] * 300, list(range(300)), slot_bytes=4096, slab_bytes=4 << 20)
    assert max(map(len, small)) == CALL_BLOCKS_MAX
    large = planned([0] * 100, list(range(100)), slot_bytes=64 << 10, slab_bytes=16 << 20)
    assert max(map(len, large)) == CALL_BYTES_MAX // (PAGE + (64 << 10))
    assert planned([0, 0], [0, 1], slot_bytes=4 << 20, slab_bytes=16 << 20) == [[0], [1]]


def test_job_of_adjacent_slots_reaches_the_disk_as_one_call(rig: Rig) -> None:
    rig.files.sizes.clear()
    assert set(rig.load(range(10))) == {OK}
    assert rig.files.sizes == [10 * STRIDE]


# --- what is read is what was written ---


def test_blocks_come_back_in_any_order_and_grouping(rig: Rig) -> None:
    assert set(rig.load([7, 2, 3, 9, 0, 4])) == {OK}


def test_checksums_of_loads_are_those_of_writes(rig: Rig) -> None:
    written = rig.done[1].checksums
    job = rig.load_job(range(10))
    rig.tier.load(job)
    rig.wait(job)
    assert rig.done[job.job_id].checksums == written
    assert len(set(written)) == 10


def test_payload_may_fill_its_slot(rig: Rig) -> None:
    job = rig.write_job([20], payload_bytes=SLOT)
    job.views[0][:] = bytes(range(256)) * (SLOT // 256)
    rig.tier.write(job)
    assert rig.wait(job) == [OK]
    back = rig.load_job([20], payload_bytes=SLOT)
    rig.tier.load(back)
    assert rig.wait(back) == [OK]
    assert back.views[0] == job.views[0]


def test_slot_never_written_has_no_header(rig: Rig) -> None:
    assert rig.load([30]) == [IoStatus.BAD_HEADER]
    assert rig.errors() == {"load_bad_header": 1}


# --- damage ---


def test_flipped_payload_is_found_and_its_neighbours_are_served(rig: Rig) -> None:
    patch(rig, 4, PAGE + 1234)
    assert rig.load(range(10)) == [OK] * 4 + [IoStatus.BAD_PAYLOAD] + [OK] * 5
    assert rig.errors() == {"load_bad_payload": 1}


def test_flipped_header_is_found(rig: Rig) -> None:
    patch(rig, 0, 60)
    assert rig.load([0, 1]) == [IoStatus.BAD_HEADER, OK]


def test_two_slots_exchanged_are_both_other_blocks(rig: Rig) -> None:
    third, fourth = image(rig, 3), image(rig, 4)
    patch(rig, 3, 0, fourth)
    patch(rig, 4, 0, third)
    assert rig.load([2, 3, 4]) == [OK, IoStatus.OTHER_BLOCK, IoStatus.OTHER_BLOCK]


def test_payload_of_another_block_under_the_right_header_is_found(rig: Rig) -> None:
    patch(rig, 3, PAGE, image(rig, 4)[PAGE:])
    assert rig.load([3]) == [IoStatus.BAD_PAYLOAD]


def test_replayed_image_of_an_earlier_write_is_another_block(rig: Rig) -> None:
    """The disk lost the second write to a slot: same block, same place, older generation."""
    old = image(rig, 5)
    later = [rig.tier.first_generation + 1]
    assert rig.write([5], generations=later) == [OK]
    patch(rig, 5, 0, old)
    assert rig.load([5], generations=later) == [IoStatus.OTHER_BLOCK]


def test_read_that_fails_once_is_cured_by_reading_again(rig: Rig) -> None:
    rig.files.reads = [EIO]
    assert set(rig.load(range(10))) == {OK}
    assert rig.errors() == {"load_reread": 10}


def test_short_read_is_read_again(rig: Rig) -> None:
    rig.files.reads = [PAGE]
    assert rig.load([1]) == [OK]


def test_read_that_keeps_failing_is_an_io_error_of_its_block_alone(rig: Rig) -> None:
    rig.files.reads = [EIO, EIO]
    assert rig.load([0, 1, 2]) == [IoStatus.IO_ERROR, OK, OK]
    assert rig.errors() == {"load_io_error": 1, "load_reread": 2}


def test_checksum_of_a_lost_block_is_zero(rig: Rig) -> None:
    patch(rig, 4, PAGE + 1)
    job = rig.load_job([4])
    rig.tier.load(job)
    rig.wait(job)
    assert list(rig.done[job.job_id].checksums) == [0]


# --- the order of reads ---


class PassedOver(FaultyFiles):
    """A disk that leaves reads of block 0 for later."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = threading.Event()

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        if offset == slot_offset(SLAB, SLOT, 0, 0):
            self.turn.wait(WAIT_S)
        return super().preadv(fd, buffers, offset)


@pytest.fixture
def reads(tmp_path: Path) -> Iterator[tuple[Rig, list[LoadJob]]]:
    """A queue of two, and reads of 13 blocks, the first of which gets no turn until `turn` is set."""
    files = PassedOver()
    rig = filled(tmp_path / "drive", 13, files=files, queue_depth=2)
    yield rig, [rig.load_job([number]) for number in range(13)]
    files.turn.set()
    rig.close()


def test_read_that_many_have_overtaken_is_waited_for(
    reads: tuple[Rig, list[LoadJob]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, jobs = reads
    monkeypatch.setattr(nvme_io, "OVERTAKEN_S", WAIT_S)
    for job in jobs:
        rig.tier.load(job)
    rig.until(lambda: len(rig.done) == 1 + 4)
    drive = rig.tier.detail().drives[0]
    assert (drive.queued_load_blocks, drive.loading) == (8, 1)
    rig.files.turn.set()  # type: ignore[attr-defined]
    assert [rig.wait(job) for job in jobs] == [[OK]] * 13


def test_read_that_hangs_keeps_no_other_back_for_long(reads: tuple[Rig, list[LoadJob]]) -> None:
    rig, (stuck, *others) = reads
    for job in (stuck, *others):
        rig.tier.load(job)
    assert [rig.wait(job) for job in others] == [[OK]] * 12
    assert stuck.job_id not in rig.done
    rig.files.turn.set()  # type: ignore[attr-defined]
    assert rig.wait(stuck) == [OK]


# --- the processor ---


def test_hashing_leaves_a_core_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(nvme_io, "LATE_S", WAIT_S)
    rig = filled(tmp_path / "drive", 20)
    inside, most, check = 0, 0, nvme_io.check_slot
    counting, two_at_once = threading.Lock(), threading.Event()

    def counted(*arguments: Any) -> Any:
        nonlocal inside, most
        with counting:
            inside += 1
            most = max(most, inside)
            if inside == 2:
                two_at_once.set()
        two_at_once.wait(WAIT_S)
        threading.Event().wait(0.005)  # time for a third
        with counting:
            inside -= 1
        return check(*arguments)

    monkeypatch.setattr(nvme_io, "check_slot", counted)
    jobs = [rig.load_job([number]) for number in range(20)]
    for job in jobs:
        rig.tier.load(job)
    assert [rig.wait(job) for job in jobs] == [[OK]] * 20
    assert most == 2
    rig.close()


def test_drive_goes_on_where_nobody_else_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where others keep every core busy: what stands back for them is never its turn."""
    turn = threading.Event()
    monkeypatch.setattr(CoreSharing, "be_nice", lambda _: turn.wait(WAIT_S))
    rig = filled(tmp_path / "drive", 20)
    jobs = [rig.load_job([number]) for number in range(20)]
    for job in jobs:
        rig.tier.load(job)
    assert [rig.wait(job) for job in jobs] == [[OK]] * 20
    assert rig.write([20, 22]) == [OK, OK]
    assert rig.load([20, 22]) == [OK, OK]
    turn.set()
    rig.close()


def test_others_have_their_turn_after_so_many_bytes_hashed_or_copied(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[None] = []
    monkeypatch.setattr(os, "sched_yield", lambda: given.append(None))
    monkeypatch.setattr(nvme_io, "PIECE_BYTES", 3 * SLOT)
    assert rig.write(range(6)) == [OK] * 6
    assert len(given) == 2
    assert rig.load(range(6)) == [OK] * 6
    assert len(given) == 4


# --- failed writes ---


@pytest.mark.parametrize(
    ("answers", "status", "cause"),
    [
        ([EIO], IoStatus.IO_ERROR, "write_io_error"),
        ([ENOSPC], IoStatus.NO_SPACE, "write_no_space"),
        ([PAGE, PAGE], IoStatus.IO_ERROR, "write_io_error"),
    ],
)
def test_failed_write_loses_its_blocks_and_nothing_else(
    rig: Rig, answers: list[OSError | int], status: IoStatus, cause: str
) -> None:
    rig.files.writes = list(answers)
    assert set(rig.write([20, 21])) == {status}
    assert rig.errors() == {cause: 2}
    assert set(rig.load(range(10))) == {OK}
    assert rig.tier.describe().up


def test_short_write_is_tried_again(rig: Rig) -> None:
    rig.files.writes = [PAGE]
    assert rig.write([20]) == [OK]
    assert rig.load([20]) == [OK]


def test_short_writes_on_a_full_disk_are_no_space(rig: Rig) -> None:
    rig.files.free_bytes = 0
    rig.files.writes = [PAGE, PAGE]
    assert rig.write([20]) == [IoStatus.NO_SPACE]


def test_writing_rests_after_three_failures_and_recovers_by_itself(rig: Rig) -> None:
    rig.files.writes = [EIO] * 3
    for number in (20, 21, 22):
        assert rig.write([number]) == [IoStatus.IO_ERROR]
    assert rig.write([23]) == [IoStatus.DOWN]
    assert not rig.tier.detail().drives[0].writing
    assert set(rig.load(range(10))) == {OK}
    rig.clock.now_s += 1.1
    assert rig.write([23]) == [OK]
    assert rig.tier.detail().drives[0].writing


def test_failed_try_makes_the_rest_longer() -> None:
    clock = Clock()
    health = WriteHealth(clock, 1.0)
    for _ in range(3):
        assert not health.is_down()
        health.failed("full")
    for pause_s in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0):
        clock.now_s += pause_s - 0.01
        assert health.is_down()
        clock.now_s += 0.02
        assert not health.is_down()
        health.failed("full")
    health.worked()
    assert not health.is_down()
    health.failed("once")
    assert not health.is_down()


# --- order and cancellation ---


def held(rig: Rig, calls: int) -> None:
    """Wait until so many calls have come to the closed gate."""
    for _ in range(calls):
        assert rig.files.waiting.acquire(timeout=WAIT_S)


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[Rig]:
    """One call a direction at a time."""
    made = filled(tmp_path / "narrow", 10, queue_depth=1)
    made.files.gate.clear()
    yield made
    made.files.gate.set()
    made.close()


def test_cancelled_job_ends_at_once_for_what_has_not_begun(narrow: Rig) -> None:
    first, second = narrow.load_job([0]), narrow.load_job([2, 4])
    narrow.tier.load(first)
    held(narrow, 1)
    narrow.tier.load(second)
    narrow.tier.cancel(second.job_id)
    assert narrow.wait(second) == [IoStatus.CANCELLED] * 2
    narrow.tier.cancel(first.job_id)
    narrow.files.gate.set()
    assert narrow.wait(first) == [OK]


def test_job_cancelled_in_the_middle_keeps_what_has_begun(narrow: Rig) -> None:
    """Begun is what is at the drive, and the next call, which is made ready meanwhile."""
    job = narrow.write_job([20, 22, 24])
    narrow.tier.write(job)
    held(narrow, 1)
    narrow.until(lambda: narrow.tier.detail().drives[0].storing == 2)
    narrow.tier.cancel(job.job_id)
    narrow.files.gate.set()
    assert narrow.wait(job) == [OK, OK, IoStatus.CANCELLED]
    assert narrow.load([20, 22, 24]) == [OK, OK, IoStatus.BAD_HEADER]


def test_queue_is_first_come_first_served_and_gives_up_a_whole_job() -> None:
    part = Part(Work(planned_job([], [])), [], [])
    queue = CallQueue()
    for job_id, offset in ((1, 10), (2, 20), (1, 11), (3, 30)):
        queue.add(job_id, [(part, offset, [0])])
    assert len(queue) == 4
    assert queue.take()[1] == 10
    assert [offset for _, offset, _ in queue.take_job(2)] == [20]
    assert queue.take_job(2) == ()
    assert [offset for _, offset, _ in queue.take_all()] == [11, 30]
    assert not queue


@pytest.mark.parametrize("direction", ["load", "write"])
def test_unforeseen_error_costs_its_blocks_and_no_thread(rig: Rig, direction: str) -> None:
    """More of them than there are threads; an answer for each, and the next job is served."""
    calls = rig.files.reads if direction == "load" else rig.files.writes
    ask = rig.load if direction == "load" else rig.write
    for _ in range(12):
        calls.append(ValueError("operation forbidden on released memoryview object"))
        assert ask([3]) == [IoStatus.IO_ERROR]
    assert ask([3]) == [OK]
    assert rig.errors()[f"{direction}_bug"] == 12


def test_unknown_job_can_be_cancelled(rig: Rig) -> None:
    rig.tier.cancel(12345)


def test_close_is_not_held_up_by_each_of_many_hanging_calls(tmp_path: Path) -> None:
    rig = filled(tmp_path / "drive", 10, queue_depth=40)
    rig.files.gate.clear()
    for _ in range(40):
        rig.tier.load(rig.load_job([0]))
    held(rig, 40)
    began_s = time.monotonic()
    rig.tier.close(0.0)
    assert time.monotonic() - began_s < 2.0
    rig.files.gate.set()


def test_depth_bounds_the_calls_under_way(narrow: Rig) -> None:
    jobs = [narrow.load_job([number]) for number in (0, 2, 4)]
    for job in jobs:
        narrow.tier.load(job)
    held(narrow, 1)
    drive = narrow.tier.detail().drives[0]
    assert (drive.loading, drive.queued_load_blocks) == (1, 2)
    narrow.files.gate.set()
    for job in jobs:
        assert narrow.wait(job) == [OK]


def test_unforeseen_error_at_the_start_of_io_costs_its_job(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def submit(part: Part) -> None:
        raise TypeError("not a part")

    with monkeypatch.context() as patched:
        patched.setattr(rig.tier._units[0].io, "submit", submit)
        assert rig.load([1, 2]) == [IoStatus.IO_ERROR] * 2
    assert rig.errors()["submit_bug"] == 2
    assert rig.load([1, 2]) == [OK] * 2


def test_next_load_is_at_the_drive_while_the_last_is_checked(narrow: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drive would idle for as long as hashing takes."""
    checking, go_on = threading.Semaphore(0), threading.Event()
    io = narrow.tier._units[0].io
    check = io._check

    def slow(*arguments: Any) -> bool:
        checking.release()
        assert go_on.wait(WAIT_S)
        return check(*arguments)

    monkeypatch.setattr(io, "_check", slow)
    begun = len(narrow.files.sizes)
    jobs = [narrow.load_job([number]) for number in (0, 2)]
    for job in jobs:
        narrow.tier.load(job)
    narrow.files.gate.set()
    assert checking.acquire(timeout=WAIT_S)
    narrow.until(lambda: len(narrow.files.sizes) == begun + 2)
    go_on.set()
    for job in jobs:
        assert narrow.wait(job) == [OK]


def test_while_loads_wait_one_write_is_under_way(tmp_path: Path) -> None:
    rig = filled(tmp_path / "drive", 10, queue_depth=2)
    rig.files.gate.clear()
    loads = [rig.load_job([number]) for number in (0, 2, 4)]
    for job in loads:
        rig.tier.load(job)
    held(rig, 2)
    writes = [rig.write_job([number]) for number in (20, 22, 24)]
    for job in writes:
        rig.tier.write(job)
    held(rig, 1)
    drive = rig.tier.detail().drives[0]
    assert (drive.loading, drive.storing, drive.queued_load_blocks, drive.queued_write_blocks) == (2, 1, 1, 2)
    rig.files.gate.set()
    for each in (*loads, *writes):
        assert rig.wait(each) == [OK]
    rig.close()


# --- counting ---


def test_bytes_blocks_and_latency_are_counted(rig: Rig) -> None:
    before = rig.tier.detail()
    rig.load(range(10))
    after = rig.tier.detail()
    assert after.read_blocks - before.read_blocks == 10
    assert after.read_bytes - before.read_bytes == 10 * STRIDE
    assert (after.written_blocks, after.written_bytes) == (10, 10 * STRIDE)
    assert sum(after.load_latency.counts) == sum(before.load_latency.counts) + 1
    assert after.load_latency.sum_s > before.load_latency.sum_s


def test_latency_falls_into_the_first_bound_that_holds_it() -> None:
    meters = [Meter(), Meter()]
    meters[0].add(0.0001, 1, 1)
    meters[1].add(0.0002, 1, 1)
    meters[1].add(9.0, 1, 1)
    found = added(meters).latency()
    assert found.counts == (1, 1, *(0,) * (len(LATENCY_BOUNDS_S) - 2), 1)
    assert found.sum_s == pytest.approx(9.0003)


def test_page_cache_serves_as_well(tmp_path: Path) -> None:
    files = FaultyFiles()
    files.direct = False
    rig = filled(tmp_path / "drive", 10, files=files)
    assert set(rig.load(range(10))) == {OK}
    assert rig.tier.detail().drives[0].io == "buffered"
    rig.close()
