"""A drive's I/O process: the same bytes and verdicts as threads give, and what becomes of its work when it dies."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.tiers.nvme_rig import PAYLOAD, SLAB, SLOT, WAIT_S, Rig, content

from forebay.kvstore.errors import Busy
from forebay.tiers import nvme_io_child, nvme_io_process
from forebay.tiers.core_sharing import CoreSharing
from forebay.tiers.files import OsFiles
from forebay.tiers.nvme_drive import DATA_NAME, open_drive, open_existing
from forebay.tiers.nvme_format import PAGE, slot_offset
from forebay.tiers.nvme_io import Part, Work, buffer_bytes_max
from forebay.tiers.nvme_io_process import IoProcess
from forebay.tiers.nvme_io_wire import Kind, frame
from forebay.tiers.nvme_jobs import IoStatus, LoadJob, WriteJob
from forebay.tiers.nvme_staging import STREAMING
from forebay.transports.shm import create_memfd, map_shared
from support.live import eventually

OK = IoStatus.OK
NEVER = threading.Event()


class ProcessRig(Rig):
    """A tier whose I/O is done by a process; every block of a job lies in a memfd of its own."""

    def __init__(self, *paths: Path, **options: Any) -> None:
        self.memfds: dict[int, int] = {}
        self.asked: list[int] = []
        super().__init__(*paths, memory=self._handle, **options)

    def write_job(self, numbers: Sequence[int], slab: int | Sequence[int] = 0, **changed: Any) -> WriteJob:
        memory = self._new_memory(len(numbers))
        for (each, _), number in zip(memory, numbers):
            self.bytes_of(each)[:PAYLOAD] = content(number)[:PAYLOAD]
        return super().write_job(numbers, slab, **{"views": (), "memory": memory, **changed})

    def load_job(self, numbers: Sequence[int], slab: int | Sequence[int] = 0, **changed: Any) -> LoadJob:
        return super().load_job(numbers, slab, **{"views": (), "memory": self._new_memory(len(numbers)), **changed})

    def load(self, numbers: Sequence[int], slab: int | Sequence[int] = 0, **changed: Any) -> list[IoStatus]:
        job = self.load_job(numbers, slab, **changed)
        self.tier.load(job)
        statuses = self.wait(job)
        self.compare(job, numbers)
        return statuses

    def compare(self, job: LoadJob, numbers: Sequence[int]) -> None:
        """What is OK has the right bytes."""
        for number, (memory, _), status in zip(numbers, job.memory, self.done[job.job_id].statuses):
            assert status or self.bytes_of(memory)[:PAYLOAD] == content(number)[:PAYLOAD]

    def bytes_of(self, number: int) -> memoryview:
        return memoryview(map_shared(self.memfds[number], SLOT, writable=True))

    def io(self) -> IoProcess:
        io = self.tier._units[0].io
        assert isinstance(io, IoProcess)
        return io

    def _new_memory(self, count: int) -> list[tuple[int, int]]:
        fds = [create_memfd("test", SLOT) for _ in range(count)]
        numbers = range(len(self.memfds) + 1, len(self.memfds) + count + 1)
        self.memfds.update(zip(numbers, fds))
        return [(number, 0) for number in numbers]

    def _handle(self, number: int) -> tuple[int, int]:
        self.asked.append(number)
        return self.memfds[number], SLOT


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., ProcessRig]]:
    """Running tiers with blocks 0 .. 9 durable in slab 0."""
    made: list[ProcessRig] = []

    def make_rig(**options: Any) -> ProcessRig:
        rig = ProcessRig(tmp_path / "drive", **options)
        made.append(rig)
        rig.restore()
        rig.assign()
        assert set(rig.write(range(10))) == {OK}
        return rig

    yield make_rig
    for rig in made:
        rig.close()
        for fd in rig.memfds.values():
            os.close(fd)


@pytest.fixture
def rig(make: Callable[..., ProcessRig]) -> ProcessRig:
    return make()


def stop(rig: ProcessRig) -> int:
    """Freeze the process, as a drive that hangs would."""
    pid = rig.io().pid
    os.kill(pid, signal.SIGSTOP)
    return pid


def is_alive(pid: int) -> bool:
    try:
        return b") Z" not in Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False


def test_blocks_come_back_in_any_order_with_the_checksums_of_their_writes(rig: ProcessRig) -> None:
    job = rig.load_job([7, 2, 3, 9, 0, 4])
    rig.tier.load(job)
    assert set(rig.wait(job)) == {OK}
    rig.compare(job, [7, 2, 3, 9, 0, 4])
    written = rig.done[1].checksums
    assert list(rig.done[job.job_id].checksums) == [written[number] for number in (7, 2, 3, 9, 0, 4)]


def test_what_it_did_is_counted(rig: ProcessRig) -> None:
    rig.load(range(10))
    info = rig.tier.detail()
    assert (info.read_blocks, info.written_blocks) == (10, 10)
    assert info.read_bytes == info.written_bytes == 10 * (PAGE + SLOT)
    assert sum(info.load_latency.counts) >= 1
    assert info.drives[0].queued_load_blocks == info.drives[0].loading == 0


def test_damage_is_told_by_block_and_cause(rig: ProcessRig, tmp_path: Path) -> None:
    with (tmp_path / "drive" / DATA_NAME).open("r+b") as file:
        file.seek(slot_offset(SLAB, SLOT, 0, 3) + PAGE + 100)
        file.write(b"damaged")
    assert rig.load([2, 3, 4, 30]) == [OK, IoStatus.BAD_PAYLOAD, OK, IoStatus.BAD_HEADER]
    assert rig.errors() == {"load_bad_header": 1, "load_bad_payload": 1}


def test_job_that_does_not_say_where_is_refused(rig: ProcessRig) -> None:
    with pytest.raises(ValueError, match="where each of its blocks lies"):
        rig.tier.load(rig.load_job([1, 2], memory=[(1, 0)]))


def test_killed_process_costs_what_it_had_under_way_and_comes_back(rig: ProcessRig) -> None:
    pid = stop(rig)
    load, write = rig.load_job(range(10)), rig.write_job([11, 12])
    rig.tier.load(load)
    rig.tier.write(write)
    os.kill(pid, signal.SIGKILL)
    assert set(rig.wait(load)) == {IoStatus.DOWN}, "blocks of which nothing bad is known must not be given up"
    assert set(rig.wait(write)) == {IoStatus.IO_ERROR}
    assert rig.errors() == {"io_process_ended": 12}
    eventually(lambda: rig.io().pid not in (0, pid), "no process took its place")
    assert set(rig.load(range(10))) == {OK}
    info = rig.tier.detail()
    assert info.read_blocks == 10
    assert info.written_blocks == 10, "what the killed process had counted is forgotten"


def kill_once(rig: ProcessRig, ends: int) -> None:
    """Kill the process, and wait until its end is counted."""
    eventually(lambda: bool(rig.io().pid), "no process took its place")
    os.kill(rig.io().pid, signal.SIGKILL)
    eventually(lambda: rig.io().ends == ends, "its end is not counted")


def test_process_that_ends_is_counted_with_how_it_ended(rig: ProcessRig) -> None:
    drive = rig.tier.detail().drives[0]
    assert (drive.io_process_ends, drive.io_process_reason) == (0, "")
    for ends in (1, 2):
        kill_once(rig, ends)
        drive = rig.tier.detail().drives[0]
        assert drive.up
        assert drive.io_process_ends == ends
        assert drive.io_process_reason == f"the I/O process of {drive.path} was killed by SIGKILL"
    eventually(lambda: bool(rig.io().pid), "no process took its place")
    assert set(rig.load(range(10))) == {OK}
    drive = rig.tier.detail().drives[0]
    assert drive.writing
    assert not drive.reason, "what is over is still told as the state now"


@pytest.mark.parametrize(
    ("code", "said"),
    [(0, "ended with exit status 0"), (-11, "was killed by SIGSEGV"), (-63, "was killed by signal 63")],
)
def test_how_a_process_ended_is_said_in_words(code: int, said: str) -> None:
    assert nvme_io_process._how_ended(code) == said


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ends in a row are enough, and the pauses between them short."""
    monkeypatch.setattr(nvme_io_process, "ENDS_MAX", 3)
    monkeypatch.setattr(nvme_io_process, "_RESTART_FIRST_S", 0.01)


@pytest.mark.usefixtures("impatient")
def test_drive_whose_process_ends_again_and_again_is_given_up(rig: ProcessRig, tmp_path: Path) -> None:
    """Its loads are errors from then on, so that blocks nobody will get from it can be stored anew."""
    kill_once(rig, 1)
    kill_once(rig, 2)
    eventually(lambda: bool(rig.io().pid), "no process took its place")
    pid = stop(rig)
    load, write = rig.load_job([1, 2]), rig.write_job([11])
    rig.tier.load(load)
    rig.tier.write(write)
    os.kill(pid, signal.SIGKILL)
    assert set(rig.wait(load)) == {IoStatus.DOWN}
    assert rig.wait(write) == [IoStatus.IO_ERROR]
    eventually(lambda: not rig.tier.describe().up, "the drive is not given up")
    reason = f"the I/O process of {tmp_path / 'drive'} was killed by SIGKILL, 3 times in a row: "
    reason += "the drive is not used until the next start"
    info, [drive] = rig.tier.describe(), rig.tier.detail().drives
    assert info.reason == drive.reason == reason
    assert reason in info.warnings
    assert (drive.up, drive.writing, drive.io_process_ends, drive.io_memory_bytes) == (False, False, 3, 0)
    assert set(rig.load([1, 2])) == {IoStatus.IO_ERROR}
    assert set(rig.write([13])) == {IoStatus.DOWN}
    NEVER.wait(0.1)
    assert rig.io().pid == 0, "it was started once more"
    assert rig.io().ends == 3


@pytest.mark.usefixtures("impatient")
def test_drive_that_was_given_up_is_let_go_of_and_has_what_was_durable(
    make: Callable[..., ProcessRig], tmp_path: Path
) -> None:
    rig = make()
    for ends in (1, 2, 3):
        kill_once(rig, ends)
    eventually(lambda: not rig.tier.describe().up, "the drive is not given up")
    rig.close()
    again = ProcessRig(tmp_path / "drive")
    try:
        again.restore()
        assert again.numbers() == list(range(10))
        assert set(again.load_restored(again.blocks)) == {OK}
    finally:
        again.close()


@pytest.mark.usefixtures("impatient")
def test_of_two_drives_the_other_one_goes_on(tmp_path: Path) -> None:
    rig = ProcessRig(tmp_path / "a", tmp_path / "b")
    try:
        rig.restore()
        rig.assign(0)
        rig.assign(1)
        assert set(rig.write([1, 2], slab=[0, 1])) == {OK}
        for ends in (1, 2, 3):
            kill_once(rig, ends)
        eventually(lambda: not rig.tier.detail().drives[0].up, "the drive is not given up")
        assert rig.tier.describe().up
        assert [drive.up for drive in rig.tier.detail().drives] == [False, True]
        assert rig.load([1, 2], slab=[0, 1]) == [IoStatus.IO_ERROR, OK]
    finally:
        rig.close()


def test_process_that_lived_long_enough_is_not_one_in_a_row(rig: ProcessRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme_io_process, "ENDS_MAX", 2)
    monkeypatch.setattr(nvme_io_process, "_RESTART_MAX_S", 0.0)
    for ends in (1, 2, 3):
        kill_once(rig, ends)
    assert rig.tier.describe().up
    eventually(lambda: bool(rig.io().pid), "no process took its place")
    assert set(rig.load(range(10))) == {OK}


@pytest.mark.parametrize("staging", ["never", "always"])
def test_memory_of_the_process_is_told_and_within_its_bounds(make: Callable[..., ProcessRig], staging: str) -> None:
    rig = make(staging=staging, queue_depth=2)
    before = nvme_io_process.own_bytes(rig.io().pid)
    for _ in range(5):
        rig.load(range(10))
    told = rig.tier.detail().drives[0].io_memory_bytes
    buffer = 10 * (PAGE + (SLOT if staging == "always" else 0))
    bound = nvme_io_process.IO_PROCESS_BYTES + buffer_bytes_max(2, is_staged=staging == "always")
    assert before < nvme_io_process.IO_PROCESS_BYTES
    assert before + buffer <= told <= bound


def test_memory_of_a_process_that_is_gone_is_none() -> None:
    assert nvme_io_process.own_bytes(2**31 - 1) == 0


def test_bug_while_it_is_heard_costs_what_it_had_under_way(rig: ProcessRig, monkeypatch: pytest.MonkeyPatch) -> None:
    pid, settle = rig.io().pid, nvme_io_process.settle

    def fail_once(*done: Any) -> None:
        monkeypatch.setattr(nvme_io_process, "settle", settle)
        raise RuntimeError("a bug")

    monkeypatch.setattr(nvme_io_process, "settle", fail_once)
    assert set(rig.load([1, 2])) == {IoStatus.DOWN}
    assert rig.errors() == {"io_process_ended": 2}
    eventually(lambda: rig.io().pid not in (0, pid), "no process took its place")
    assert set(rig.load([1, 2])) == {OK}


def test_memory_that_the_kernel_does_not_take_now_is_sent_later(
    rig: ProcessRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's descriptors on their way are limited in number, those of all his processes together."""
    send, refused = nvme_io_process.send_memory, 3

    def send_memory(*said: Any) -> None:
        nonlocal refused
        if refused:
            refused -= 1
            raise OSError(errno.ETOOMANYREFS, "Too many references")
        send(*said)

    monkeypatch.setattr(nvme_io_process, "send_memory", send_memory)
    assert set(rig.load(range(10))) == {OK}
    assert not refused
    assert rig.errors() == {}


def test_process_that_starts_while_the_tier_closes_ends_at_once(
    rig: ProcessRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has to wait for the deadline of the close, and then to kill it."""
    popen, starting, go_on = subprocess.Popen, threading.Event(), threading.Event()

    def start_slowly(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        starting.set()
        assert go_on.wait(WAIT_S)
        return popen(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", start_slowly)
    os.kill(rig.io().pid, signal.SIGKILL)
    assert starting.wait(WAIT_S)
    closing = threading.Thread(target=rig.tier.close, args=(2 * WAIT_S,))
    closing.start()
    assert rig.io()._closing.wait(WAIT_S)
    go_on.set()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    assert not rig.io().pid


def test_while_there_is_no_process_jobs_end_at_once(rig: ProcessRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme_io_process, "_COMMAND", ("/nowhere",))
    os.kill(rig.io().pid, signal.SIGKILL)
    eventually(lambda: not rig.io().pid, "its end was not noticed")
    assert set(rig.load([1, 2])) == {IoStatus.DOWN}
    assert set(rig.write([13])) == {IoStatus.DOWN}
    assert rig.errors() == {"load_down": 2, "write_down": 1}
    eventually(lambda: "no I/O process" in rig.tier.detail().drives[0].reason, "nobody is told why")


def test_drive_that_hangs_gets_no_more_loads_until_it_goes_on(rig: ProcessRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme_io_process, "STUCK_S", 0.1)
    pid = stop(rig)
    first = rig.load_job([1])
    rig.tier.load(first)
    NEVER.wait(0.2)
    assert set(rig.load([2, 3])) == {IoStatus.DOWN}
    os.kill(pid, signal.SIGCONT)
    assert rig.wait(first) == [OK]
    assert set(rig.load([2, 3])) == {OK}


def test_cancelled_job_ends_unread_as_far_as_it_had_not_begun(make: Callable[..., ProcessRig]) -> None:
    rig = make(queue_depth=1)
    pid = stop(rig)
    jobs = [rig.load_job([number]) for number in range(10)]
    for job in jobs:
        rig.tier.load(job)
    for job in jobs[1:]:
        rig.tier.cancel(job.job_id)
    os.kill(pid, signal.SIGCONT)
    statuses = [rig.wait(job)[0] for job in jobs]
    assert statuses[0] == OK
    assert set(statuses) <= {OK, IoStatus.CANCELLED}
    assert IoStatus.CANCELLED in statuses


def test_more_memory_and_words_than_the_sockets_hold_all_arrive(rig: ProcessRig) -> None:
    pid = stop(rig)
    jobs = [rig.load_job(list(range(10)) * 4) for _ in range(40)]
    for job in jobs:
        rig.tier.load(job)
    os.kill(pid, signal.SIGCONT)
    for job in jobs:
        assert set(rig.wait(job)) == {OK}
        rig.compare(job, list(range(10)) * 4)
    assert len(rig.asked) == len(set(rig.asked)) == 10 + 1600


def test_dropped_memory_is_unmapped(rig: ProcessRig) -> None:
    def mapped() -> int:
        return Path(f"/proc/{rig.io().pid}/maps").read_text().count("memfd:test")

    rig.load(range(10))
    assert mapped() == 20
    rig.tier.drop_memory(list(rig.memfds))
    eventually(lambda: mapped() == 0, "memory is still mapped")
    assert set(rig.load(range(10))) == {OK}


def test_close_ends_the_process_and_lets_go_of_the_drive(rig: ProcessRig, tmp_path: Path) -> None:
    pid = rig.io().pid
    with pytest.raises(Busy):
        open_existing(OsFiles(), tmp_path / "drive")
    rig.close()
    assert not is_alive(pid)
    open_existing(OsFiles(), tmp_path / "drive").close()


def test_close_does_not_wait_for_a_process_that_hangs(rig: ProcessRig) -> None:
    pid = stop(rig)
    job = rig.load_job([1])
    rig.tier.load(job)
    began_s = time.monotonic()
    rig.tier.close(0.3)
    assert time.monotonic() - began_s < 5
    assert rig.wait(job) == [IoStatus.CANCELLED]
    eventually(lambda: not is_alive(pid), "the process outlives the tier")


def test_process_ends_with_the_daemon_however_that_ends(tmp_path: Path) -> None:
    program = (
        "import signal; from pathlib import Path; from tests.tiers.test_nvme_io_process import ProcessRig;"
        f"rig = ProcessRig(Path({str(tmp_path / 'drive')!r})); rig.restore();"
        "print(rig.io().pid, flush=True); signal.pause()"
    )
    root = Path(__file__).parents[2]
    path = os.pathsep.join(map(str, (root, root / "tests" / "shared", *filter(None, sys.path))))
    with subprocess.Popen(
        [sys.executable, "-P", "-c", program], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    ) as daemon:
        assert daemon.stdout is not None
        pid = int(daemon.stdout.readline())
        assert is_alive(pid)
        daemon.kill()
    eventually(lambda: not is_alive(pid), "the process outlives its daemon")
    open_existing(OsFiles(), tmp_path / "drive").close()


def test_end_told_to_a_daemon_that_is_gone_is_no_error(tmp_path: Path) -> None:
    """By a thread of the drive, before the process has seen it: a traceback in its log would be taken for a bug."""
    stream, daemons = socket.socketpair()
    told = argparse.Namespace(queue_depth=1, staged=False, nice=0)
    with stream, closing(open_drive(OsFiles(), tmp_path / "drive", slab_bytes=SLAB, slabs=1)) as drive:
        child = nvme_io_child.IoChild(stream, stream, drive, told)
        job = LoadJob(
            job_id=1,
            slot_bytes=SLOT,
            payload_bytes=PAYLOAD,
            namespace_id=b"",
            slabs=[],
            slots=[],
            hashes=[],
            generations=[],
        )
        part = Part(Work(job), [], [])
        child._part_ids[id(part)] = 1
        daemons.close()
        child._ended(part)
        assert not child._part_ids


def test_cores_are_looked_at_while_there_is_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    applied, reviewed = threading.Event(), threading.Event()
    monkeypatch.setattr(CoreSharing, "apply", lambda _: applied.set())
    monkeypatch.setattr(CoreSharing, "review", lambda _: reviewed.set())
    stream, daemons = socket.socketpair()
    channel, others = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    told = argparse.Namespace(queue_depth=1, staged=False, nice=0)
    with (
        stream,
        daemons,
        channel,
        others,
        closing(open_drive(OsFiles(), tmp_path / "drive", slab_bytes=SLAB, slabs=1)) as drive,
    ):
        child = nvme_io_child.IoChild(stream, channel, drive, told)
        child._part_ids[0] = 1
        thread = threading.Thread(target=child.run, daemon=True)
        thread.start()
        told_of_work = reviewed.wait(WAIT_S)
        daemons.sendall(frame([Kind.CLOSE, 0.0]))
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert applied.is_set()
    assert told_of_work


@pytest.mark.parametrize("nice", [0, 12])
def test_all_threads_give_way_and_those_that_hash_and_copy_are_as_nice_as_told(
    make: Callable[..., ProcessRig], nice: int
) -> None:
    pid = make(io_nice=nice).io().pid
    workers = max(1, len(os.sched_getaffinity(0)) - 1)

    def as_told() -> bool:
        threads = [int(thread) for thread in os.listdir(f"/proc/{pid}/task")]
        niceness = [os.getpriority(os.PRIO_PROCESS, thread) for thread in threads]
        return {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_BATCH} and (
            niceness.count(nice) == (workers if nice else len(threads))
        )

    eventually(as_told, "not all threads give way, or not those that work, and they alone, are nice")


@pytest.mark.parametrize("told", ["", "glibc.malloc.arena_max=1"])
def test_its_large_copies_pass_the_caches_by(
    make: Callable[..., ProcessRig], monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    """What whoever started the daemon has told glibc comes last, and so wins."""
    monkeypatch.setenv("GLIBC_TUNABLES", told)
    pid = make().io().pid
    environment = Path(f"/proc/{pid}/environ").read_text().replace("\0", ":")  # as glibc cuts its own up
    expected = ":".join(filter(None, (STREAMING, told)))
    assert f":GLIBC_TUNABLES={expected}:" in environment


@pytest.mark.parametrize("ignored", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_to_the_whole_group_are_the_daemons_to_heed(rig: ProcessRig, ignored: signal.Signals) -> None:
    pid = rig.io().pid
    os.kill(pid, ignored)
    assert set(rig.load(range(10))) == {OK}
    assert rig.io().pid == pid
