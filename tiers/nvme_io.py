"""The I/O of one drive: threads that read and write slots, straight from and into the host's memory.

Threads and preadv rather than an asynchronous interface: it needs nothing of the kernel that a container may forbid,
and from 256 KiB on it is as fast. Each direction has as many threads as its queue is deep, which do nothing but wait
for the drive. Hashing and copying is the work of others, one fewer than there are cores: they may give way to everybody
else after each piece of a block (core_sharing.py), and the drive still has its next call at once. Threads that did both
left it idle for a quarter of the time where cores are scarce, since a call that had ended waited for the hash of
another. Where those who hash get no core at all, the drive's threads take over.

Calls go straight from and into the host's slots, or through buffers (nvme_staging.py). Loads go first: while one waits,
at most one write is under way, so that stores go on but never in a load's way. What a job has in adjacent slots is one
call, header pages and payloads interleaved.

Who fetches needs the first blocks first, and a disk scheduler that sorts by place (mq-deadline) may pass one read over
for as long as others come: the first of 80 calls in a row was seen to end last. So a read that many have overtaken
holds back more of them for a moment.

The interpreter lock is the scarce good here, so the work on a block is one unpacking, one comparison and two hashes,
and hashing and I/O run without it. The daemon runs this in a process of its own (nvme_io_child.py), so that the owner
thread has its lock for itself.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from array import array
from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from forebay.tiers.core_sharing import CoreSharing
from forebay.tiers.nvme_drive import SlotFile
from forebay.tiers.nvme_format import PAGE, check_slot, pack_slot, slot_offset, slot_stride
from forebay.tiers.nvme_jobs import LATENCY_BOUNDS_S, IoStatus, Latency, LoadJob, WriteJob
from forebay.tiers.nvme_staging import PIECE_BYTES, STAGED_BYTES_MAX, Passage, Staged, Straight, blank, carry

log = logging.getLogger(__name__)

CALL_BYTES_MAX = 2 << 20
"""What one call moves at most, unless a single block is larger."""
CALL_BLOCKS_MAX = 120
"""Two buffers a block: virtio and many controllers take no more than about 254 pieces a request."""

OVERTAKEN_S = 0.05
"""How long a read that many others have overtaken holds back those after it."""
LATE_S = 0.25
"""What has waited so long to be hashed is taken over; a tenth of it cost the writes of a busy machine 5 %."""
_OVERTAKING = 2
"""How many may overtake it, in queue depths."""
_FAILURES_MAX = 3
_DOWN_MAX_S = 60.0
_LAST_JOIN_S = 0.1
"""For all threads together after the deadline: hundreds may hang in the kernel."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Work:
    """One job on its way through the drives it touches; `statuses` and `checksums` fill up block by block.

    A block is an I/O error until it has been found to be otherwise.
    """

    __slots__ = ("checksums", "job", "parts_left", "statuses")

    def __init__(self, job: LoadJob | WriteJob, status: IoStatus = IoStatus.IO_ERROR) -> None:
        self.job = job
        self.statuses = bytearray([status]) * len(job.slots)
        self.checksums = array("Q", bytes(8 * len(job.slots)))
        self.parts_left = 0


class Part:
    """A job's blocks on one drive: `blocks` are positions in the job, `slabs` that drive's own slab numbers."""

    __slots__ = ("blocks", "calls_left", "slabs", "sync_failures", "work")

    def __init__(self, work: Work, blocks: Sequence[int], slabs: Sequence[int]) -> None:
        self.work = work
        self.blocks = blocks
        self.slabs = slabs
        self.calls_left = 0
        self.sync_failures = 0

    def fail(self, status: IoStatus) -> None:
        """Give this status to all blocks that were well so far."""
        statuses = self.work.statuses
        for block in self.blocks:
            statuses[block] = statuses[block] or status

    def written(self) -> list[int]:
        """Positions within the part of the blocks that are well so far."""
        statuses = self.work.statuses
        return [at for at, block in enumerate(self.blocks) if not statuses[block]]


Call = tuple[Part, int, list[int]]
"""One call to be made: its part, the offset in the file, and the positions within the part, in the file's order."""


def plan_calls(part: Part, slab_bytes: int) -> list[Call]:
    """Cut a part into calls: adjacent slots together, at most CALL_BYTES_MAX and CALL_BLOCKS_MAX each."""
    job, slabs = part.work.job, part.slabs
    slots, slot_bytes, stride = job.slots, job.slot_bytes, slot_stride(job.slot_bytes)
    offsets = [slot_offset(slab_bytes, slot_bytes, slab, slots[block]) for slab, block in zip(slabs, part.blocks)]
    limit = max(1, min(CALL_BLOCKS_MAX, CALL_BYTES_MAX // stride))
    calls: list[Call] = []
    run: list[int] = []
    next_offset = -1
    for at in sorted(range(len(offsets)), key=offsets.__getitem__):
        if offsets[at] != next_offset or len(run) == limit:
            run = []
            calls.append((part, offsets[at], run))
            next_offset = offsets[at]
        run.append(at)
        next_offset += stride
    return calls


def ways_of(queue_depth: int) -> int:
    """Calls of one direction that have memory: those at the drive, and half as many that are worked on meanwhile."""
    return queue_depth + max(1, queue_depth // 2)


def buffer_bytes_max(queue_depth: int, *, is_staged: bool) -> int:
    """The most memory that the calls of one drive take beside the host's slots."""
    return 2 * ways_of(queue_depth) * (CALL_BLOCKS_MAX * PAGE + is_staged * STAGED_BYTES_MAX)


class WriteHealth:
    """Whether writing to a drive makes sense now. Three failures in a row take it down, for longer each time.

    After the pause one job may try. Counts from several threads may race by one, which changes nothing that matters.
    """

    def __init__(self, clock: Callable[[], float], down_s: float) -> None:
        self._clock = clock
        self._down_first_s = down_s
        self._failures = 0
        self._down_s = down_s
        self._until = 0.0
        self.reason = ""
        self.calls_left = 0
        """Writes that are queued or under way."""
        self.sync_failures = 0
        """How often fdatasync has failed. A part that began under another number is not to be believed."""

    def is_down(self) -> bool:
        return self._failures >= _FAILURES_MAX and self._clock() < self._until

    def failed(self, reason: str) -> None:
        self.reason = reason
        self._failures += 1
        if self._failures >= _FAILURES_MAX and self._clock() >= self._until:
            self._until = self._clock() + self._down_s
            self._down_s = min(_DOWN_MAX_S, 2 * self._down_s)

    def worked(self) -> None:
        self._failures = 0
        self._down_s = self._down_first_s
        self.reason = ""


class Meter:
    """What one direction has done: I/O calls by duration, bytes, blocks."""

    __slots__ = ("blocks", "bytes", "counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(LATENCY_BOUNDS_S) + 1)
        self.sum_s = 0.0
        self.bytes = 0
        self.blocks = 0

    def add(self, seconds: float, size: int, blocks: int) -> None:
        self.counts[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
        self.sum_s += seconds
        self.bytes += size
        self.blocks += blocks

    def latency(self) -> Latency:
        """The calls' histogram."""
        return Latency(tuple(self.counts), self.sum_s)


def added(meters: Iterable[Meter]) -> Meter:
    """Several meters as one."""
    total = Meter()
    for meter in meters:
        total.counts = [mine + its for mine, its in zip(total.counts, meter.counts, strict=True)]
        total.sum_s += meter.sum_s
        total.bytes += meter.bytes
        total.blocks += meter.blocks
    return total


class Errors:
    """Blocks lost, by cause; for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, cause: str, blocks: int = 1) -> None:
        with self._lock:
            self._counts[cause] += blocks

    def listed(self) -> tuple[tuple[str, int], ...]:
        with self._lock:
            return tuple(sorted(self._counts.items()))


class CallQueue:
    """Calls that have not begun, first come first served. A job's are taken out without a look at all the others.

    Attributes:
        blocks: how many all its calls have.
    """

    __slots__ = ("_count", "_jobs", "blocks")

    def __init__(self) -> None:
        self._jobs: OrderedDict[int, deque[Call]] = OrderedDict()
        self._count = 0
        self.blocks = 0

    def __len__(self) -> int:
        return self._count

    def add(self, job_id: int, calls: Sequence[Call]) -> None:
        if calls:
            self._jobs.setdefault(job_id, deque()).extend(calls)
            self._count_in(calls, 1)

    def take(self) -> Call:
        """The next call; there is one."""
        job_id, calls = next(iter(self._jobs.items()))
        call = calls.popleft()
        if not calls:
            del self._jobs[job_id]
        self._count_in((call,), -1)
        return call

    def take_job(self, job_id: int) -> Sequence[Call]:
        """All of one job's."""
        calls = self._jobs.pop(job_id, ())
        self._count_in(calls, -1)
        return calls

    def take_all(self) -> list[Call]:
        return [call for job_id in list(self._jobs) for call in self.take_job(job_id)]

    def _count_in(self, calls: Iterable[Call], sign: int) -> None:
        for _, _, run in calls:
            self._count += sign
            self.blocks += sign * len(run)


class _Passing(NamedTuple):
    """A call and its memory: what was read and is to be checked, or what is ready to be written."""

    call: Call
    way: Straight
    passage: Passage
    is_whole: bool = True
    """All of it came."""


_Step = Callable[[], None]


class DriveIo:
    """The threads of one drive. `submit` and `cancel` are the owner's; they never wait for the disk."""

    def __init__(
        self,
        drive: SlotFile,
        queue_depth: int,
        health: WriteHealth,
        errors: Errors,
        *,
        loaded: Callable[[Part], None],
        written: Callable[[Part], None],
        is_staged: bool = False,
        sharing: CoreSharing | None = None,
    ) -> None:
        """`is_staged`: calls go through buffers (nvme_staging.py). `loaded` is called from a thread of ours when all
        blocks of a part have their status, `written` when all are in the file but perhaps not yet on the medium.
        `sharing`: how the threads that hash and copy share their cores with others.
        """
        self._drive = drive
        self._health = health
        self._errors = errors
        self._loaded = loaded
        self._written = written
        self._sharing = sharing or CoreSharing()
        # The lock guards all below, and `calls_left` of parts.
        self._lock = threading.Lock()
        self._load_ready = threading.Condition(self._lock)
        self._work_ready = threading.Condition(self._lock)
        self._write_ready = threading.Condition(self._lock)
        self._idle = threading.Condition(self._lock)
        self._loads = CallQueue()
        self._writes = CallQueue()
        self._to_check: deque[_Passing] = deque()
        self._to_reread: deque[tuple[_Passing, list[int]]] = deque()
        """Calls of which these blocks were not right."""
        self._to_write: deque[_Passing] = deque()
        self._begun: dict[int, tuple[int, float]] = {}
        """Loads at the drive, oldest first, by their call's id: the how many-th, and since when."""
        self._taken = 0
        self._checking = 0
        """Loads that have been at the drive and are not over."""
        self._worked_s = 0.0
        """When one of those who hash last looked for work, or work came when there was none."""
        self._storing = 0
        """Writes at the drive, or being made ready for it."""
        self._worked_bytes = 0
        """Since somebody last gave way; whose they were does not matter, nor one that is counted late."""
        self._closed = False
        self._queue_depth = queue_depth
        self._load_meter, self._write_meter = Meter(), Meter()
        make_way = Staged if is_staged else Straight
        self._ways = [make_way(CALL_BLOCKS_MAX) for _ in range(2 * ways_of(queue_depth))]
        self._load_ways, self._write_ways = self._ways[::2], self._ways[1::2]
        """Those that no call has; the last one used, which a cache may still hold, goes first."""
        threads = (
            ("load", queue_depth, self._await_load),
            ("store", queue_depth, self._await_write),
            ("work", max(1, len(os.sched_getaffinity(0)) - 1), self._await_work),
        )
        self._threads = [
            threading.Thread(
                target=self._run, args=(kind, next_step), name=f"{kind}-{drive.directory.name}-{index}", daemon=True
            )
            for kind, count, next_step in threads
            for index in range(count)
        ]

    @property
    def load_meters(self) -> Sequence[Meter]:
        return (self._load_meter,)

    @property
    def write_meters(self) -> Sequence[Meter]:
        return (self._write_meter,)

    def memory_bytes(self) -> int:
        """Memory taken beside the host's slots; at most `buffer_bytes_max`."""
        return sum(way.held_bytes for way in self._ways)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def submit(self, part: Part) -> None:
        """Queue a part's calls."""
        calls = plan_calls(part, self._drive.slab_bytes)
        part.calls_left = len(calls)
        job_id = part.work.job.job_id
        with self._lock:
            part.sync_failures = self._health.sync_failures
            if isinstance(part.work.job, WriteJob):
                self._health.calls_left += len(calls)
                self._worked_s = self._worked_s if self._writes else time.monotonic()
                self._writes.add(job_id, calls)
                self._work_ready.notify(len(calls))
                self._write_ready.notify()
            else:
                self._loads.add(job_id, calls)
                self._load_ready.notify(len(calls))

    def cancel(self, job_id: int) -> None:
        """End what the job has not begun as CANCELLED; what is under way goes on."""
        with self._lock:
            dropped = [call for queue in (self._loads, self._writes) for call in queue.take_job(job_id)]
            ended = [part for part, _, _ in dropped if self._drop(part)]
            self._work_ready.notify(len(self._writes))
        self._end_dropped(dropped, ended)

    def queued_blocks(self) -> tuple[int, int]:
        """Blocks whose call has not begun: loads, writes."""
        return self._loads.blocks, self._writes.blocks

    def under_way(self) -> tuple[int, int]:
        """Calls under way: loads at the drive, writes at the drive or being made ready for it."""
        return len(self._begun), self._storing

    def close(self, deadline_s: float) -> bool:
        """Finish what is queued until the deadline (time.monotonic), cancel the rest. True: no thread is left."""
        with self._lock:
            while self._is_busy() and time.monotonic() < deadline_s:
                self._idle.wait(max(0.0, deadline_s - time.monotonic()))
            self._closed = True
            dropped = [*self._loads.take_all(), *self._writes.take_all()]
            ended = [part for part, _, _ in dropped if self._drop(part)]
            self._wake_all()
        self._end_dropped(dropped, ended)
        until_s = max(deadline_s, time.monotonic()) + _LAST_JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self, kind: str, next_step: Callable[[], _Step | None]) -> None:
        """A thread's life. Nothing of its last step is held while it waits for the next."""
        if kind == "work":
            self._sharing.be_nice()
        while (step := next_step()) is not None:
            step()
            del step

    def _drop(self, part: Part) -> bool:
        """One call less, made or not; whether it was the part's last."""
        if isinstance(part.work.job, WriteJob):
            self._health.calls_left -= 1
        part.calls_left -= 1
        return part.calls_left == 0

    def _end_dropped(self, dropped: list[Call], ended: list[Part]) -> None:
        for part, _, run in dropped:
            for at in run:
                part.work.statuses[part.blocks[at]] = IoStatus.CANCELLED
        for part in ended:
            self._end(part)

    def _end(self, part: Part) -> None:
        if isinstance(part.work.job, WriteJob):
            self._written(part)
        else:
            self._loaded(part)

    @contextmanager
    def _survived(self, direction: str, call: Call) -> Iterator[None]:
        """A bug in here costs the call's blocks, which are I/O errors by now, and neither thread nor queue."""
        try:
            yield
        except Exception:
            log.exception("bug while a %s was under way", direction)
            self._errors.add(f"{direction}_bug", len(call[2]))

    # --- hashing and copying ---

    def _await_work(self) -> _Step | None:
        """The next step of a thread that works, once there is one; None to end."""
        with self._lock:
            while True:
                self._worked_s = time.monotonic()
                if self._to_check:
                    return partial(self._judge, self._to_check.popleft())
                if self._may_prepare():
                    return self._take_write()
                if self._closed and not self._begun:
                    return None
                self._work_ready.wait()

    def _give_way(self, worked_bytes: int) -> None:
        """So many bytes were hashed or copied: once they are enough, whoever waits for this core has it."""
        self._worked_bytes += worked_bytes
        if self._worked_bytes >= PIECE_BYTES:
            self._worked_bytes = 0
            self._sharing.give_turn()

    def _is_late(self) -> bool:
        """Those who hash have not come for what waits for them."""
        return time.monotonic() >= self._worked_s + LATE_S

    def _may_prepare(self) -> bool:
        return bool(self._writes and self._write_ways and (not self._loads or not self._storing))

    # --- loads ---

    def _await_load(self) -> _Step | None:
        """The next step of a thread that reads, once there is one; None to end."""
        with self._lock:
            while True:
                if self._to_reread:
                    return partial(self._reread, *self._to_reread.popleft())
                if self._loads and self._load_ways and not self._is_overtaken():
                    return partial(self._load, self._take_load(), self._load_ways.pop())
                if self._to_check and self._is_late():
                    return partial(self._judge, self._to_check.popleft())
                if self._closed:
                    return None
                self._load_ready.wait(OVERTAKEN_S if self._loads else LATE_S if self._to_check else None)

    def _take_load(self) -> Call:
        call = self._loads.take()
        self._taken += 1
        self._begun[id(call)] = self._taken, time.monotonic()
        if not self._loads:
            self._work_ready.notify(len(self._writes))
        return call

    def _is_overtaken(self) -> bool:
        """Whether the read that is longest at the drive has been overtaken by many, and not for too long."""
        if not self._begun:
            return False
        number, since_s = next(iter(self._begun.values()))
        overtaking = self._taken - number
        return overtaking >= _OVERTAKING * self._queue_depth and time.monotonic() < since_s + OVERTAKEN_S

    def _load(self, call: Call, way: Straight) -> None:
        """Read one call's blocks and leave them to be checked."""
        part, offset, run = call
        read = None
        with self._survived("load", call):
            passage = way.open([part.work.job.views[part.blocks[at]] for at in run])
            read = _Passing(call, way, passage, self._read(offset, passage, len(run)))
        with self._lock:
            del self._begun[id(call)]
            self._checking += 1
            if read is not None:
                self._worked_s = self._worked_s if self._to_check else time.monotonic()
                self._to_check.append(read)
            self._work_ready.notify()
            self._load_ready.notify(min(len(self._loads), len(self._load_ways)))
            if self._closed:
                self._wake_all()
        if read is None:
            self._end_load(call, way)

    def _read(self, offset: int, passage: Passage, blocks: int) -> bool:
        """Read adjacent slots; whether all of them came."""
        began_s = time.perf_counter()
        try:
            got = self._drive.read(passage.buffers, offset)
        except OSError:
            got = 0
        took_s = time.perf_counter() - began_s
        with self._lock:
            self._load_meter.add(took_s, got, blocks)
        return got == sum(map(len, passage.buffers))

    def _judge(self, read: _Passing) -> None:
        """Give each block of a call its status."""
        (part, _, run), way, passage, is_whole = read
        wrong: list[int] = []
        with self._survived("load", read.call):
            wrong = [index for index, at in enumerate(run) if not is_whole or not self._check(part, at, passage, index)]
        if wrong:
            with self._lock:
                if not self._closed:  # a drive may take its time over a bad block, and others are to be checked
                    self._to_reread.append((read, wrong))
                    self._load_ready.notify()
                    return
            self._reread(read, wrong)
        else:
            self._end_load(read.call, way)

    def _reread(self, read: _Passing, wrong: list[int]) -> None:
        """Read the blocks that were not right once more, singly."""
        call, way, _, _ = read
        part, offset, run = call
        job, statuses = part.work.job, part.work.statuses
        with self._survived("load", call):
            for index in wrong:
                block = part.blocks[run[index]]
                statuses[block] = IoStatus.IO_ERROR
                there = offset + index * slot_stride(job.slot_bytes)
                alone = way.open([job.views[block]])
                if self._read(there, alone, 0) and self._check(part, run[index], alone, 0):
                    self._errors.add("load_reread")
                else:
                    self._errors.add(f"load_{IoStatus(statuses[block]).name.lower()}")
        self._end_load(call, way)

    def _end_load(self, call: Call, way: Straight) -> None:
        part = call[0]
        with self._lock:
            self._load_ways.append(way)
            self._checking -= 1
            ended = self._drop(part)
            self._load_ready.notify()
            self._tell_idle()
        if ended:
            self._loaded(part)

    def _check(self, part: Part, at: int, passage: Passage, index: int) -> bool:
        """Judge one block that was read, note it, and have it in its slot, unless its header is not the right one."""
        work, block, slot = part.work, part.blocks[at], passage.slots[index]
        job = work.job
        status, checksum = check_slot(
            passage.pages[index],
            job.payload_bytes,
            self._drive.drive_id,
            job.namespace_id,
            (part.slabs[at], job.slots[block]),
            job.hashes[block],
            job.generations[block],
            partial(carry, job.views[block], slot, job.payload_bytes, to_drive=False, after_each=self._give_way),
        )
        work.statuses[block] = status
        work.checksums[block] = checksum
        return status == IoStatus.OK

    # --- writes ---

    def _await_write(self) -> _Step | None:
        """The next step of a thread that writes, once there is one; None to end."""
        with self._lock:
            while not self._to_write:
                if self._may_prepare() and self._is_late():
                    return self._take_write()
                if self._closed and not self._storing:
                    return None
                self._write_ready.wait(LATE_S if self._writes else None)
            return partial(self._write, self._to_write.popleft())

    def _take_write(self) -> _Step:
        self._storing += 1
        return partial(self._prepare, self._writes.take(), self._write_ways.pop())

    def _prepare(self, call: Call, way: Straight) -> None:
        """Make one call's headers, and have its blocks where they are written from."""
        part, _, run = call
        ready = None
        with self._survived("write", call):
            passage = way.open([part.work.job.views[part.blocks[at]] for at in run])
            for index, at in enumerate(run):
                self._make_ready(part, at, passage, index)
            ready = _Passing(call, way, passage)
        if ready is None:
            self._end_write(call, way)
            return
        with self._lock:
            self._to_write.append(ready)
            self._write_ready.notify()

    def _make_ready(self, part: Part, at: int, passage: Passage, index: int) -> None:
        """One block's payload and header."""
        work, block, page, slot = part.work, part.blocks[at], passage.pages[index], passage.slots[index]
        job = work.job
        assert isinstance(job, WriteJob)
        checksum = work.checksums[block] = carry(
            slot, job.views[block], job.payload_bytes, to_drive=True, after_each=self._give_way
        )
        blank(page)
        pack_slot(
            page,
            self._drive.drive_id,
            job.namespace_id,
            (part.slabs[at], job.slots[block]),
            (job.hashes[block], job.parents[block], job.depths[block], job.generations[block]),
            job.payload_bytes,
            checksum,
        )

    def _write(self, ready: _Passing) -> None:
        """Write one call's blocks; all or none of them count as written."""
        call, way, passage, _ = ready
        part, offset, run = call
        with self._survived("write", call):
            began_s = time.perf_counter()
            status, reason, size = self._put(passage.buffers, offset)
            took_s = time.perf_counter() - began_s
            with self._lock:
                self._write_meter.add(took_s, size, len(run))
            for at in run:
                part.work.statuses[part.blocks[at]] = status
            if status is not IoStatus.OK:
                self._health.failed(reason)
                self._errors.add(f"write_{status.name.lower()}", len(run))
        self._end_write(call, way)

    def _end_write(self, call: Call, way: Straight) -> None:
        part = call[0]
        with self._lock:
            self._write_ways.append(way)
            self._storing -= 1
            ended = self._drop(part)
            self._work_ready.notify(len(self._writes))
            self._tell_idle()
            if self._closed:
                self._wake_all()
        if ended:
            self._written(part)

    def _put(self, buffers: Sequence[memoryview], offset: int) -> tuple[IoStatus, str, int]:
        """Write it all, trying once more after a short write: that tells a full disk from an accident."""
        wanted = sum(map(len, buffers))
        for _ in range(2):
            try:
                put = self._drive.write(buffers, offset)
            except OSError as error:
                return status_of(error), str(error), 0
            if put == wanted:
                return IoStatus.OK, "", put
        if self._drive.free_bytes() < wanted:
            return IoStatus.NO_SPACE, "short writes on a full disk", 0
        return IoStatus.IO_ERROR, "short writes", 0

    def _wake_all(self) -> None:
        """For whoever is to end."""
        self._load_ready.notify_all()
        self._work_ready.notify_all()
        self._write_ready.notify_all()

    def _tell_idle(self) -> None:
        if self._closed or not self._is_busy():
            self._idle.notify_all()

    def _is_busy(self) -> bool:
        return bool(self._loads or self._writes or self._begun or self._checking or self._storing)


def status_of(error: OSError) -> IoStatus:
    """Of a write that failed."""
    return IoStatus.NO_SPACE if error.errno in _NO_SPACE else IoStatus.IO_ERROR
