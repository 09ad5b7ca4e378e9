"""The simulated disk is sound when nothing is planned, fails as planned, and keeps the books about it."""

from __future__ import annotations

import errno
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from support.sim_faults import SITE_FAULTS, SITES, Corruption, CorruptRead, Fault, FaultPlan
from support.sim_files import PAGE, SECTOR, SimFiles

PATH = Path("/sim/drive0/blocks.dat")
FLAGS = os.O_RDWR | os.O_CREAT
SIZE = 1 << 30


def disk(seed: int = 0, **plan: object) -> tuple[SimFiles, int]:
    """A disk with one file of 1 GiB, and its descriptor; the plan holds once that is there."""
    files = SimFiles(random.Random(seed))
    fd = files.open(PATH, FLAGS)
    files.allocate(fd, 0, SIZE)
    files.sync(fd)
    files.plan = FaultPlan(**plan)  # type: ignore[arg-type]
    return files, fd


def page(number: int) -> bytes:
    return number.to_bytes(8, "little") * (PAGE // 8)


def read(files: SimFiles, fd: int, number: int, pages: int = 1) -> bytes:
    buffer = bytearray(pages * PAGE)
    return bytes(buffer[: files.preadv(fd, [buffer], number * PAGE)])


def reopened(files: SimFiles) -> int:
    files.plan = FaultPlan()
    return files.open(PATH, os.O_RDWR)


# --- a sound disk --------------------------------------------------------------------------------------------------


def test_what_was_written_is_read() -> None:
    files, fd = disk()
    assert files.pwritev(fd, [page(1), page(2)], 7 * PAGE) == 2 * PAGE
    parts = [bytearray(100), bytearray(2 * PAGE - 100)]
    assert files.preadv(fd, parts, 7 * PAGE) == 2 * PAGE
    assert b"".join(parts) == page(1) + page(2)
    assert read(files, fd, 6) == bytes(PAGE)


def test_bytes_off_the_page_boundary_leave_their_neighbours_alone() -> None:
    files, fd = disk()
    files.pwritev(fd, [page(1), page(2)], 0)
    files.pwritev(fd, [b"x" * 5000], 100)
    assert read(files, fd, 0, 2) == page(1)[:100] + b"x" * 5000 + (page(1) + page(2))[5100:]


def test_a_large_file_costs_what_is_written() -> None:
    files, fd = disk()
    files.pwritev(fd, [page(1)], SIZE - PAGE)
    assert files.size(fd) == SIZE
    assert files.stored_bytes() == PAGE


def test_read_ends_where_the_file_ends() -> None:
    files, fd = disk()
    assert len(read(files, fd, SIZE // PAGE - 1, 4)) == PAGE
    assert read(files, fd, SIZE // PAGE) == b""


@pytest.mark.parametrize(
    ("flags", "number"),
    [(os.O_RDWR, errno.ENOENT), (FLAGS | os.O_DIRECT, errno.EINVAL)],
    ids=["missing file", "no O_DIRECT here"],
)
def test_open_refuses(flags: int, number: int) -> None:
    with pytest.raises(OSError) as refused:  # noqa: PT011 - the errno is compared
        SimFiles(random.Random(0), FaultPlan(direct=False)).open(PATH, flags)
    assert refused.value.errno == number


def test_direct_io_refuses_what_is_not_aligned() -> None:
    files, _ = disk()
    fd = files.open(PATH, os.O_RDWR | os.O_DIRECT)
    memory = memoryview(bytearray(4 * PAGE))
    start = next(at for at in range(PAGE) if _aligned(memory[at:]))
    assert files.preadv(fd, [memory[start : start + PAGE]], PAGE) == PAGE
    for view, offset in ((memory[start : start + PAGE], 1), (memory[start : start + 1], 0), (memory[start + 1 :], 0)):
        with pytest.raises(OSError, match="Invalid argument"):
            files.preadv(fd, [view], offset)


def _aligned(view: memoryview) -> bool:
    import numpy as np

    return bool(np.frombuffer(view, np.uint8).ctypes.data % PAGE == 0)


def test_file_is_locked_by_one_descriptor_until_it_closes() -> None:
    files, first = disk()
    second = files.open(PATH, FLAGS)
    files.lock(first)
    files.lock(first)
    with pytest.raises(BlockingIOError):
        files.lock(second)
    files.close(first)
    files.lock(second)


def test_full_file_system_refuses_growth_and_nothing_else() -> None:
    files = SimFiles(random.Random(0), free_bytes=4 * PAGE)
    fd = files.open(PATH, FLAGS)
    files.allocate(fd, 0, 3 * PAGE)
    assert files.statvfs_free_bytes(PATH) == PAGE
    with pytest.raises(OSError, match="No space"):
        files.allocate(fd, 3 * PAGE, 2 * PAGE)
    with pytest.raises(OSError, match="No space"):
        files.pwritev(fd, [page(1), page(2)], 3 * PAGE)
    assert files.pwritev(fd, [page(1)], 2 * PAGE) == PAGE


def test_closed_descriptor_is_bad() -> None:
    files, fd = disk()
    files.close(fd)
    for call in (lambda: files.size(fd), lambda: files.close(fd), lambda: read(files, fd, 0)):
        with pytest.raises(OSError, match="Bad file descriptor"):
            call()


# --- faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
def test_chosen_call_of_a_site_fails_and_is_counted(site: str) -> None:
    files, fd = disk(at=((site, 3, Fault.EIO),))
    calls = {
        "open": lambda: files.open(PATH, FLAGS),
        "lock": lambda: files.lock(fd),
        "size": lambda: files.size(fd),
        "allocate": lambda: files.allocate(fd, 0, PAGE),
        "preadv": lambda: read(files, fd, 0),
        "pwritev": lambda: files.pwritev(fd, [page(1)], 0),
        "sync": lambda: files.sync(fd),
        "advise": lambda: files.advise(fd, 0, PAGE, 0),
        "statvfs_free_bytes": lambda: files.statvfs_free_bytes(PATH),
        "filesystem": lambda: files.filesystem(PATH),
    }
    for _ in range(2 - files.sites()[site].calls):
        calls[site]()
    with pytest.raises(OSError, match="Input/output error"):
        calls[site]()
    calls[site]()
    count = files.sites()[site]
    assert (count.calls, count.raised, count.short, count.lied) == (4, 1, 0, 0)


def test_plan_with_a_fault_its_site_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match="sync call 1"):
        FaultPlan(at=(("sync", 1, Fault.TORN),))


@pytest.mark.parametrize("site", [site for site in SITES if site not in ("preadv", "pwritev", "sync")])
def test_every_chance_of_the_plan_is_taken(site: str) -> None:
    field, fault = SITE_FAULTS[site][0]
    files, fd = disk(**{field: 1.0})
    arguments = {
        "open": (PATH, FLAGS),
        "lock": (fd,),
        "size": (fd,),
        "allocate": (fd, 0, 1),
        "advise": (fd, 0, 1, 0),
        "statvfs_free_bytes": (PATH,),
        "filesystem": (PATH,),
    }[site]
    with pytest.raises(OSError):  # noqa: PT011 - any errno
        getattr(files, site)(*arguments)
    assert files.record.faults() == {f"{site}.{fault}": 1}


@pytest.mark.parametrize(("field", "number"), [("eio_write", errno.EIO), ("enospc_write", errno.ENOSPC)])
def test_failed_write_may_have_left_a_part(field: str, number: int) -> None:
    parts = set()
    for seed in range(40):
        files, fd = disk(seed, **{field: 1.0})
        with pytest.raises(OSError) as failed:  # noqa: PT011 - the errno is compared
            files.pwritev(fd, [page(1), page(2)], 0)
        assert failed.value.errno == number
        files.plan = FaultPlan()
        parts.add(read(files, fd, 0, 2))
        assert files.corruptions() == files.corrupt_reads() == []
    assert parts == {bytes(2 * PAGE), page(1) + bytes(PAGE)}


def test_short_calls_do_and_tell_less() -> None:
    files, fd = disk(short_read=1.0, short_write=1.0)
    assert {files.pwritev(fd, [page(1), page(2)], place * 2 * PAGE) for place in range(40)} == {0, PAGE}
    assert {len(read(files, fd, place, 2)) for place in range(40)} == {0, PAGE}
    assert files.corruptions() == []


def test_lost_write_is_a_corruption_until_written_again() -> None:
    files, fd = disk(lost_write=1.0)
    assert files.pwritev(fd, [page(1), page(2)], PAGE) == 2 * PAGE
    assert files.corruptions() == [Corruption(Fault.LOST, PATH, 1), Corruption(Fault.LOST, PATH, 2)]
    assert read(files, fd, 1) == bytes(PAGE)
    assert files.corrupt_reads() == [CorruptRead(PATH, 1, 0)]
    assert files.last_read_wrong(PATH, 1) == 0
    files.plan = FaultPlan()
    files.pwritev(fd, [page(1)], PAGE)
    assert read(files, fd, 1) == page(1)
    assert len(files.corrupt_reads()) == 1
    assert files.last_read_wrong(PATH, 1) == -1


def test_write_torn_within_a_page_is_wrong_from_the_tear_on() -> None:
    tears = set()
    for seed in range(30):
        files = SimFiles(random.Random(seed), FaultPlan(torn_write=1.0), sector_bytes=SECTOR)
        fd = files.open(PATH, FLAGS)
        assert files.pwritev(fd, [page(1)], 0) == PAGE
        content = read(files, fd, 0)
        tears.add(len(content.rstrip(b"\0")) // SECTOR)
        assert files.corruptions() == [Corruption(Fault.TORN, PATH, 0)]
    assert len(tears) > 4


def test_misdirected_write_corrupts_two_places() -> None:
    landed = set()
    for seed in range(30):
        files, fd = disk(seed, misdirected_write=1.0)
        assert files.pwritev(fd, [page(1), page(2)], 100 * PAGE) == 2 * PAGE
        pages = [corruption.page for corruption in files.corruptions()]
        assert len(pages) == 4
        assert pages[2:] == [100, 101] or pages[:2] in ([99, 100], [101, 102])
        files.plan = FaultPlan()
        assert read(files, fd, pages[0], 2) == page(1) + page(2)
        landed.add(pages[0])
    assert len(landed) > 10


def test_bit_flipped_in_reading_is_right_the_next_time() -> None:
    files, fd = disk(flip_read=1.0)
    files.pwritev(fd, [page(1)], 0)
    got = read(files, fd, 0)
    assert (int.from_bytes(got) ^ int.from_bytes(page(1))).bit_count() == 1
    files.plan = FaultPlan()
    assert read(files, fd, 0) == page(1)
    assert [corruption.kind for corruption in files.corruptions()] == [Fault.FLIP_READ]


def test_bit_flipped_on_the_medium_stays_over_a_power_cut() -> None:
    files, fd = disk(flip_media=1.0)
    files.pwritev(fd, [page(1)], 0)
    files.sync(fd)
    got = read(files, fd, 0)
    assert (int.from_bytes(got) ^ int.from_bytes(page(1))).bit_count() == 1
    files = files.power_cut()
    assert read(files, reopened(files), 0) == got
    assert len(files.corrupt_reads()) == 2


def test_bit_can_be_flipped_by_hand() -> None:
    files, fd = disk()
    files.flip_bit(PATH, 3 * PAGE + 9, 4)
    assert read(files, fd, 3)[9] == 16
    assert files.corrupt_reads() == [CorruptRead(PATH, 3, 9)]


def test_silent_faults_spare_the_beginning_when_asked() -> None:
    files, fd = disk(lost_write=1.0, silent_from_byte=PAGE)
    files.pwritev(fd, [page(1)], 0)
    files.pwritev(fd, [page(1)], PAGE)
    assert [corruption.page for corruption in files.corruptions()] == [1]


def test_slow_call_is_handed_to_the_callback_and_others_go_on() -> None:
    files, fd = disk()
    stalled: list[tuple[str, Path, int]] = []

    def stall(site: str, path: Path, offset: int) -> None:
        stalled.append((site, path, offset))
        files.plan = FaultPlan()
        files.pwritev(fd, [page(2)], 0)

    files.stall, files.plan = stall, FaultPlan(slow=1.0)
    assert read(files, fd, 0) == page(2)
    assert stalled == [("preadv", PATH, 0)]


# --- power ---------------------------------------------------------------------------------------------------------


def test_synced_pages_survive_a_power_cut() -> None:
    for seed in range(20):
        files, fd = disk(seed)
        files.pwritev(fd, [page(1), page(2)], 0)
        files.sync(fd)
        files = files.power_cut()
        assert read(files, reopened(files), 0, 2) == page(1) + page(2)


def test_unsynced_pages_are_kept_lost_or_reordered_each_by_itself() -> None:
    images = set()
    for seed in range(200):
        files, fd = disk(seed)
        files.pwritev(fd, [page(1), page(1)], 0)
        files.sync(fd)
        files.pwritev(fd, [page(2), page(2)], 0)
        files.pwritev(fd, [page(3)], 0)
        files = files.power_cut()
        got = read(files, reopened(files), 0, 2)
        images.add((got[0], got[PAGE]))
        assert files.corrupt_reads() == []
    assert images == {(first, second) for first in (1, 2, 3) for second in (1, 2)}


def test_last_write_may_be_torn_between_sectors() -> None:
    torn = 0
    for seed in range(40):
        files = SimFiles(random.Random(seed), sector_bytes=SECTOR)
        fd = files.open(PATH, FLAGS)
        files.allocate(fd, 0, PAGE)
        files.sync(fd)
        files.pwritev(fd, [page(1)], 0)
        files = files.power_cut()
        torn += read(files, reopened(files), 0) not in (page(1), bytes(PAGE))
    assert torn > 5


def test_power_cut_keeps_reporting_what_was_corrupt_before() -> None:
    files, fd = disk(lost_write=1.0)
    files.pwritev(fd, [page(1)], 0)
    files.sync(fd)
    files = files.power_cut()
    assert read(files, reopened(files), 0) == bytes(PAGE)
    assert len(files.corrupt_reads()) == 1


def test_what_a_misdirected_write_hit_stays_wrong_over_a_power_cut() -> None:
    files, fd = disk()
    files.pwritev(fd, [page(number) for number in range(200)], 0)
    files.sync(fd)
    files.plan = FaultPlan(misdirected_write=1.0)
    files.pwritev(fd, [b"m" * PAGE], 500 * PAGE)
    files.plan = FaultPlan()
    hit = files.wrong_pages(PATH) - {500}
    files = files.power_cut()
    left = {number for number in hit if read(files, reopened(files), number) == b"m" * PAGE}
    assert left == files.wrong_pages(PATH) - {500}


def test_machine_without_power_answers_nothing_more() -> None:
    files, fd = disk()
    files.power_cut()
    for call in (lambda: files.sync(fd), lambda: read(files, fd, 0), lambda: files.open(PATH, FLAGS)):
        with pytest.raises(OSError, match="Input/output error"):
            call()
    files.close(fd)


def test_file_never_synced_may_be_gone_after_a_power_cut() -> None:
    left = set()
    for seed in range(20):
        files = SimFiles(random.Random(seed))
        files.open(PATH, FLAGS)
        files = files.power_cut()
        try:
            left.add(reopened(files) > 0)
        except FileNotFoundError:
            left.add(False)
    assert left == {True, False}


def test_killed_process_loses_its_lock_and_no_byte() -> None:
    files, fd = disk()
    files.lock(fd)
    files.pwritev(fd, [page(1)], 0)
    files = files.process_kill()
    fd = reopened(files)
    files.lock(fd)
    assert read(files, fd, 0) == page(1)


def test_after_a_failed_sync_no_later_sync_saves_what_it_gave_up() -> None:
    kept = set()
    for seed in range(20):
        files, fd = disk(seed, eio_sync=1.0)
        files.pwritev(fd, [page(1)], 0)
        with pytest.raises(OSError, match="Input/output error"):
            files.sync(fd)
        files.plan = FaultPlan()
        files.sync(fd)
        assert read(files, fd, 0) == page(1)
        files = files.power_cut()
        kept.add(read(files, reopened(files), 0) == page(1))
    assert kept == {True, False}


# --- replay --------------------------------------------------------------------------------------------------------

EVERYTHING = replace(
    FaultPlan(),
    **{field: 0.1 for faults in SITE_FAULTS.values() for field, _ in faults},  # type: ignore[arg-type]
)


def _outcome(files: SimFiles, fd: int, place: int) -> list[object]:
    outcome: list[object] = []
    for turn in range(4):
        for call in (
            lambda turn=turn: files.pwritev(fd, [page(turn), page(place)], place * 200 * PAGE),
            lambda: read(files, fd, place * 200, 2),
        ):
            try:
                outcome.append(call())
            except OSError as error:
                outcome.append(error.errno)
    return outcome


def test_same_seed_meets_the_same_faults_in_whatever_order_threads_call() -> None:
    def run(threads: int, folder: str) -> tuple[list[list[object]], dict[str, int]]:
        files = SimFiles(random.Random(5))
        path = Path(folder) / "drive0" / "blocks.dat"
        fd = files.open(path, FLAGS)
        files.allocate(fd, 0, SIZE)
        files.plan = EVERYTHING
        with ThreadPoolExecutor(threads) as pool:
            outcomes = list(pool.map(lambda place: _outcome(files, fd, place), range(64)))
        return outcomes, files.record.faults()

    alone = run(1, "/tmp/a")
    assert run(8, "/tmp/b") == alone
    assert len(alone[1]) == len(SITE_FAULTS["preadv"]) + len(SITE_FAULTS["pwritev"])


def test_another_seed_meets_other_faults() -> None:
    def run(seed: int) -> list[object]:
        files, fd = disk(seed)
        files.plan = EVERYTHING
        return [_outcome(files, fd, place) for place in range(8)]

    assert run(1) != run(2)
