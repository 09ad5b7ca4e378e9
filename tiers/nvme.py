"""The NVMe tier: slabs and slots in one preallocated file a drive, behind jobs that go down and events that come up.

Nothing here decides what is stored where; the owner thread does, and never waits: what it calls only queues. Slab s
lies on drive s mod n, so that consecutive slabs alternate between the drives; on disk each drive numbers its own.
A drive that cannot be used is left out with a warning that says why, and the tier is down when none is left.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

from forebay.kvstore.errors import ForebayError
from forebay.tiers.base import TierInfo
from forebay.tiers.deadline import within
from forebay.tiers.files import Files, OsFiles
from forebay.tiers.nvme_bandwidth import BANDWIDTH_NAME, BadBandwidth, Bandwidth, read_bandwidth
from forebay.tiers.nvme_drive import Drive, open_drive
from forebay.tiers.nvme_format import HASH_BYTES_MAX, PAGE, slabs_in, slots_per_slab
from forebay.tiers.nvme_index import Committer
from forebay.tiers.nvme_io import DriveIo, Errors, Part, Work, WriteHealth, added
from forebay.tiers.nvme_io_process import IoProcess, MemoryHandle
from forebay.tiers.nvme_jobs import (
    DriveInfo,
    Event,
    IoStatus,
    JobDone,
    LoadJob,
    NvmeInfo,
    NvmeOptions,
    RestoredBlock,
    RestoredBlocks,
    RestoreDone,
    RestoredSlabs,
    SlabOwner,
    WriteJob,
)
from forebay.tiers.nvme_reader import Assigned
from forebay.tiers.nvme_restore import Restore

log = logging.getLogger(__name__)

OPEN_S = 30.0
"""A drive that takes longer to be opened, or to begin its life, is left out until the next start."""
_RESTORED_EVENTS_MAX = 8
"""A thousand blocks each: enough for the owner never to wait, and little memory."""
_IDLE_S = 1.0
_U32 = 0xFFFFFFFF


@dataclass(slots=True)
class _Unit:
    """A drive with all that works on it."""

    drive: Drive
    health: WriteHealth
    committer: Committer
    io: DriveIo | IoProcess
    restore: Restore
    is_staged: bool


class NvmeTier:
    """The owner thread calls everything; `completed` brings what has happened since it was last called."""

    name = "nvme"

    def __init__(
        self,
        options: NvmeOptions,
        *,
        files: Files | None = None,
        memory: MemoryHandle | None = None,
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Check the sizes, touch nothing. Raises ValueError for sizes that hold no slab.

        With `memory` each drive's I/O is done by a process of its own, which is handed the memory that jobs name;
        without, by threads of this process, in the views that jobs bring.
        `wake` is called from any thread, once until `completed` has been called, and must not block. `clock` times
        the pauses of a failing drive.
        """
        if not options.paths or len(set(options.paths)) != len(options.paths):
            raise ValueError("the NVMe tier needs at least one path, each only once")
        if options.slab_bytes < 2 * PAGE or options.slab_bytes % PAGE:
            raise ValueError(f"NVMe slab of {options.slab_bytes} bytes: not a multiple of {PAGE}")
        self._slabs_per_drive = slabs_in(options.bytes_per_path, options.slab_bytes)
        if not self._slabs_per_drive:
            raise ValueError(f"{options.bytes_per_path} bytes a path hold no slab of {options.slab_bytes}")
        self.slab_bytes = options.slab_bytes
        self.slabs = self._slabs_per_drive * len(options.paths)
        """Over all drives; fewer after `start` when a drive had to be left out."""
        self.benched_read_bytes_per_s = 0.0
        """What all drives that are up were measured to read together, by their bandwidth.json; those that have none
        count as the others do. 0: none has one."""
        self.first_generation = 0
        """The least generation to give to what is written in this life of the tier; 0 before `start`."""
        self._options = options
        self._files = files or OsFiles()
        self._memory = memory
        self._wake = wake
        self._clock = clock
        self._errors = Errors()
        self._units: list[_Unit] = []
        self._refused: list[tuple[Path, str]] = []
        self._warnings: list[str] = []
        self._down = "not started"
        self._slots: dict[int, int] = {}
        # The condition guards all below.
        self._changed = threading.Condition()
        self._finished: list[Event] = []
        self._restored: deque[Event] = deque()
        self._woken = False
        self._closed = False
        self._slabs_found: list[list[Assigned] | None] = []
        self._slabs_told = False
        self._restores_left = 0
        self._restore_s = 0.0
        self._problems: list[str] = []

    def start(self) -> None:
        """Open, lock and probe the drives and begin to restore. Blocks for a few small reads and writes a drive, for
        OPEN_S where one hangs.
        """
        if self._units or self._closed:
            return
        drives = [drive for path in self._options.paths if (drive := self._open(path)) is not None]
        drives = self._begin_lives(drives)
        self.slabs = self._slabs_per_drive * len(drives)
        self._down = "" if drives else "; ".join(reason for _, reason in self._refused)
        rates = [found.read_bytes_per_s for drive in drives if (found := self._benched(drive.directory)) is not None]
        self.benched_read_bytes_per_s = len(drives) * fmean(rates) if rates else 0.0
        self._slabs_found = [None] * len(drives)
        self._restores_left = len(drives)
        self._units = [self._make_unit(number, drive) for number, drive in enumerate(drives)]
        for unit in self._units:
            unit.committer.start()
            unit.io.start()
            unit.restore.start()

    def describe(self) -> TierInfo:
        """The state now; `detail` has what is particular to this tier."""
        reason = self._why_down()
        return TierInfo(
            tier=self.name,
            capacity_bytes=self.slabs * self.slab_bytes,
            slab_bytes=self.slab_bytes,
            slabs=self.slabs,
            pages="",
            slabs_by_pages=(),
            populated_bytes=0,
            locked_bytes=0,
            numa_node=-1,
            warnings=(*self._warnings, *filter(None, map(_given_up, self._units))),
            up=not reason,
            reason=reason,
        )

    def _why_down(self) -> str:
        """Why no drive can be used; empty while one can."""
        given_up = [_given_up(unit) for unit in self._units]
        if self._down or not all(given_up):
            return self._down
        return "; ".join([*(reason for _, reason in self._refused), *given_up])

    def detail(self) -> NvmeInfo:
        """Drives, counters and histograms now. Cheap, but not for every request: it adds up over all threads."""
        loads = added(meter for unit in self._units for meter in unit.io.load_meters)
        writes = added(meter for unit in self._units for meter in unit.io.write_meters)
        restores = [unit.restore for unit in self._units]
        return NvmeInfo(
            drives=(*(_drive_info(unit) for unit in self._units), *(_refused_info(*each) for each in self._refused)),
            read_bytes=loads.bytes,
            written_bytes=writes.bytes,
            read_blocks=loads.blocks,
            written_blocks=writes.blocks,
            load_latency=loads.latency(),
            write_latency=writes.latency(),
            errors=self._errors.listed(),
            restored_blocks=sum(restore.blocks for restore in restores),
            restored_fraction=sum(restore.fraction for restore in restores) / len(restores) if restores else 1.0,
            restored=not self._restores_left,
            rebuilt=any(restore.rebuilt for restore in restores),
            life_bytes=self._options.life_bytes,
        )

    # --- what the owner asks for ---

    def assign_slab(self, slab: int, owner: SlabOwner, generation: int) -> None:
        """Cut the slab anew for an owner; what it held is gone. `generation` is the first its blocks will have.

        Not before `RestoredSlabs` has come; a slab that it named, not before `RestoreDone` or `retire_slab`.
        """
        unit, own = self._unit_of(slab)
        unit.committer.assign_slab(own, owner, generation)

    def retire_slab(self, slab: int) -> None:
        """Forget the slab's owner and all its blocks."""
        unit, own = self._unit_of(slab)
        unit.committer.retire_slab(own)

    def load(self, job: LoadJob) -> None:
        """Read blocks into host slots; ends in a `JobDone`. Raises ValueError for a place that does not exist."""
        self._submit(job)

    def write(self, job: WriteJob) -> None:
        """Write blocks from host slots and make them durable; ends in a `JobDone`. Raises as `load`.

        While writing to a drive is down, its blocks end at once as DOWN.
        """
        self._submit(job)

    def cancel(self, job_id: int) -> None:
        """End what the job has not begun as CANCELLED. What is under way goes on; `JobDone` comes when it is over."""
        for unit in self._units:
            unit.io.cancel(job_id)

    def forget(self, places: Sequence[tuple[int, int]]) -> None:
        """Take blocks out of the index, some time soon. The slots may be written again at once."""
        count = len(self._units)
        for number, unit in enumerate(self._units):
            own = [(slab // count, slot) for slab, slot in places if slab % count == number]
            if own:
                unit.committer.forget(own)

    def drop_memory(self, numbers: Sequence[int]) -> None:
        """Memory that is gone: no job will name it again."""
        for unit in self._units:
            if isinstance(unit.io, IoProcess):
                unit.io.drop(numbers)

    def completed(self) -> list[Event]:
        """All jobs that have ended since the last call, and at most one `RestoredBlocks`, so that a call stays short.

        When more is waiting, `wake` is called again right away.
        """
        with self._changed:
            events, self._finished = self._finished, []
            if self._restored:
                events.append(self._restored.popleft())
                self._changed.notify_all()
            self._woken = bool(self._restored)
            again = self._woken
        if again:
            self._wake()
        return events

    def flush(self) -> None:
        """Commit what has been written without waiting for company."""
        for unit in self._units:
            unit.committer.flush()

    def close(self, timeout_s: float) -> None:
        """Finish what is queued within `timeout_s`, commit, and let go of the drives; the rest ends as CANCELLED.

        A drive whose threads hang in the kernel keeps its file open until the process ends. Idempotent.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            self._closed = True
            self._down = "closed"
            self._changed.notify_all()
        restored = [unit.restore.stop(deadline_s) for unit in self._units]
        idle = [unit.io.close(deadline_s) for unit in self._units]
        committed = [unit.committer.close(deadline_s) for unit in self._units]
        for unit, *ended in zip(self._units, restored, idle, committed):
            if all(ended):
                unit.drive.close()

    # --- start ---

    def _open(self, path: Path) -> Drive | None:
        try:
            drive = within(
                OPEN_S,
                lambda: open_drive(self._files, path, slab_bytes=self.slab_bytes, slabs=self._slabs_per_drive),
                late=Drive.close,
            )
        except TimeoutError as error:
            self._refuse(path, f"{path} could not be opened: {error}")
            return None
        except (ForebayError, OSError) as error:
            self._refuse(path, str(error))
            return None
        with contextlib.suppress(OSError):  # a place that cannot be asked about is used without a warning
            self._warnings += drive.warnings()
        return drive

    def _benched(self, path: Path) -> Bandwidth | None:
        """What a benchmark left there; a file that cannot be believed costs a warning, and no more."""
        try:
            return within(OPEN_S, partial(read_bandwidth, path), late=lambda _: None)
        except (TimeoutError, OSError, BadBandwidth) as error:
            self._warnings.append(f"{path / BANDWIDTH_NAME} is not used: {error}")
            return None

    def _begin_lives(self, drives: list[Drive]) -> list[Drive]:
        """Give all drives one epoch, later than any they have seen; the generations of this life begin with it."""
        epoch = max((drive.header.epoch for drive in drives), default=0) + 1
        begun = []
        for drive in drives:
            try:
                within(OPEN_S, partial(_begin_life, drive, epoch), late=Drive.close)
                begun.append(drive)
            except TimeoutError as error:  # closed when its call ends
                self._refuse(drive.directory, f"{drive.directory} could not be written to: {error}")
            except OSError as error:
                self._refuse(drive.directory, f"{drive.directory}: {error}")
                drive.close()
        self.first_generation = epoch << 32 | 1
        return begun

    def _refuse(self, path: Path, reason: str) -> None:
        self._refused.append((path, reason))
        self._warnings.append(reason)

    def _make_unit(self, number: int, drive: Drive) -> _Unit:
        options = self._options
        health = WriteHealth(self._clock, options.down_s)
        committer = Committer(
            drive,
            health,
            self._errors,
            batch_s=options.index_batch_s,
            batch_blocks=options.index_batch_blocks,
            finished=self._part_ended,
        )
        is_staged = drive.is_direct and (
            options.staging == "always" or (options.staging == "auto" and drive.is_virtual())
        )
        io = self._make_io(drive, health, committer, is_staged)
        teller = _Teller(self, number)
        restore = Restore(drive, committer, teller, walk_timeout_s=options.walk_timeout_s)
        return _Unit(drive, health, committer, io, restore, is_staged)

    def _make_io(self, drive: Drive, health: WriteHealth, committer: Committer, is_staged: bool) -> DriveIo | IoProcess:
        depth, loaded, written = self._options.queue_depth, self._part_ended, committer.written
        if self._memory is None:
            return DriveIo(drive, depth, health, self._errors, loaded=loaded, written=written, is_staged=is_staged)
        return IoProcess(
            drive,
            depth,
            health,
            self._errors,
            loaded=loaded,
            written=written,
            memory=self._memory,
            is_staged=is_staged,
            nice=self._options.io_nice,
        )

    # --- jobs ---

    def _unit_of(self, slab: int) -> tuple[_Unit, int]:
        if not 0 <= slab < self.slabs:
            raise ValueError(f"slab {slab}: the tier has {self.slabs}")
        count = len(self._units)
        return self._units[slab % count], slab // count

    def _submit(self, job: LoadJob | WriteJob) -> None:
        if not job.slots:
            self._finish(Work(job))
            return
        if self._down:
            self._finish(Work(job, IoStatus.DOWN))
            return
        self._check_places(job)
        work = Work(job)
        parts = self._cut(work)
        work.parts_left = len(parts)
        for unit, part in parts:
            if isinstance(job, WriteJob) and unit.health.is_down():
                for block in part.blocks:
                    work.statuses[block] = IoStatus.DOWN
                self._errors.add("write_down", len(part.blocks))
                self._part_ended(part)
                continue
            try:
                unit.io.submit(part)
            except Exception as error:  # a bug must cost its part, for others may be under way
                log.error("bug while I/O was begun", exc_info=error)
                self._errors.add("submit_bug", len(part.blocks))
                part.fail(IoStatus.IO_ERROR)
                self._part_ended(part)

    def _check_places(self, job: LoadJob | WriteJob) -> None:
        """A place beyond the end would be somebody else's."""
        slots = self._slots.get(job.slot_bytes)
        if slots is None:
            if job.slot_bytes <= 0 or job.slot_bytes % PAGE:
                raise ValueError(f"slots of {job.slot_bytes} bytes: not whole pages")
            slots = self._slots[job.slot_bytes] = slots_per_slab(self.slab_bytes, job.slot_bytes)
        if min(job.slabs) < 0 or max(job.slabs) >= self.slabs or min(job.slots) < 0 or max(job.slots) >= slots:
            raise ValueError(f"job {job.job_id} names a slab or slot that the tier does not have")
        if job.payload_bytes > job.slot_bytes or any(len(view) != job.slot_bytes for view in job.views):
            raise ValueError(f"job {job.job_id} has a view or a payload that is no slot of {job.slot_bytes} bytes")
        if len(job.views if self._memory is None else job.memory) != len(job.slots):
            raise ValueError(f"job {job.job_id} does not say where each of its blocks lies in memory")
        _check_names(job)

    def _cut(self, work: Work) -> list[tuple[_Unit, Part]]:
        """A job's parts, one for each drive it touches."""
        slabs, count = work.job.slabs, len(self._units)
        if count == 1:
            return [(self._units[0], Part(work, range(len(slabs)), slabs))]
        parts = []
        for number, unit in enumerate(self._units):
            blocks = [block for block, slab in enumerate(slabs) if slab % count == number]
            if blocks:
                parts.append((unit, Part(work, blocks, [slabs[block] // count for block in blocks])))
        return parts

    def _part_ended(self, part: Part) -> None:
        with self._changed:
            part.work.parts_left -= 1
            ended = part.work.parts_left == 0
        if ended:
            self._finish(part.work)

    def _finish(self, work: Work) -> None:
        for block, status in enumerate(work.statuses):
            if status:
                work.checksums[block] = 0
        done = JobDone(work.job.job_id, bytes(work.statuses), work.checksums)
        with self._changed:
            self._finished.append(done)
            wake, self._woken = not self._woken, True
        if wake:
            self._wake()

    # --- what was on the drives ---

    def _tell(self, event: Event) -> None:
        with self._changed:
            while len(self._restored) >= _RESTORED_EVENTS_MAX and not self._closed:
                self._changed.wait(_IDLE_S)
            self._restored.append(event)
            wake, self._woken = not self._woken, True
        if wake:
            self._wake()

    def _tell_slabs(self, number: int, found: list[Assigned]) -> None:
        """Wait until all drives have named their slabs; the last one tells them."""
        count = len(self._slabs_found)
        with self._changed:
            self._slabs_found[number] = [
                (slab * count + number, owner, generation) for slab, owner, generation in found
            ]
            last = None not in self._slabs_found
        if last:
            self._tell(RestoredSlabs([each for found in self._slabs_found for each in found or ()]))
        with self._changed:
            self._slabs_told |= last
            self._changed.notify_all()
            while not (self._slabs_told or self._closed):
                self._changed.wait(_IDLE_S)

    def _tell_blocks(self, number: int, found: list[RestoredBlock]) -> None:
        count = len(self._units)
        if count > 1:
            found = [
                (slab * count + number, slot, hash_, parent, depth, generation)
                for slab, slot, hash_, parent, depth, generation in found
            ]
        self._tell(RestoredBlocks(found))

    def _restore_ended(self, seconds: float, problems: tuple[str, ...]) -> None:
        with self._changed:
            self._restores_left -= 1
            self._restore_s = max(self._restore_s, seconds)
            self._problems += problems
            last = self._restores_left == 0
        if last:
            restores = [unit.restore for unit in self._units]
            blocks, rebuilt = sum(each.blocks for each in restores), any(each.rebuilt for each in restores)
            self._tell(RestoreDone(blocks, self._restore_s, rebuilt, tuple(self._problems)))


def _begin_life(drive: Drive, epoch: int) -> Drive:
    drive.begin_life(epoch)
    return drive


class _Teller:
    """One drive's way to tell the tier what it has found."""

    def __init__(self, tier: NvmeTier, number: int) -> None:
        self._tier = tier
        self._number = number

    def is_stopping(self) -> bool:
        return self._tier._closed

    def slabs(self, found: list[Assigned]) -> None:
        self._tier._tell_slabs(self._number, found)

    def blocks(self, found: list[RestoredBlock]) -> None:
        self._tier._tell_blocks(self._number, found)

    def done(self, blocks: int, seconds: float, rebuilt: bool, problems: tuple[str, ...]) -> None:
        self._tier._restore_ended(seconds, problems)


def _check_names(job: LoadJob | WriteJob) -> None:
    """Raise ValueError for what no header has room for."""
    if not all(0 < len(hash_) <= HASH_BYTES_MAX for hash_ in job.hashes):
        raise ValueError(f"job {job.job_id} has a hash that is empty or too long")
    if isinstance(job, WriteJob):
        if max(map(len, job.parents)) > HASH_BYTES_MAX:
            raise ValueError(f"job {job.job_id} has a parent's hash that is too long")
        if min(job.depths) < 0 or max(job.depths) > _U32:
            raise ValueError(f"job {job.job_id} has a depth beyond 32 bits")


def _given_up(unit: _Unit) -> str:
    """Why a drive that was opened is not used any more; empty while it is."""
    return unit.io.reason if isinstance(unit.io, IoProcess) and unit.io.given_up else ""


def _drive_info(unit: _Unit) -> DriveInfo:
    drive, io, committer, restore = unit.drive, unit.io, unit.committer, unit.restore
    loads, writes = io.queued_blocks()
    loading, storing = io.under_way()
    process = io if isinstance(io, IoProcess) else None
    no_process = "" if process is None else process.why_down
    return DriveInfo(
        path=str(drive.directory),
        up=not _given_up(unit),
        reason=no_process or unit.health.reason,
        io="staged" if unit.is_staged else "direct" if drive.is_direct else "buffered",
        io_reason=drive.io_reason,
        writing=not (no_process or unit.health.is_down()),
        queued_load_blocks=loads,
        queued_write_blocks=writes,
        loading=loading,
        storing=storing,
        index="failing" if committer.reason else restore.state,
        index_reason=committer.reason,
        index_records=restore.blocks if committer.records is None else committer.records,
        index_queue=committer.queued_blocks(),
        lifetime_written_bytes=drive.lifetime_written_bytes,
        io_process_ends=0 if process is None else process.ends,
        io_process_reason="" if process is None else process.reason,
        io_memory_bytes=io.memory_bytes(),
    )


def _refused_info(path: Path, reason: str) -> DriveInfo:
    return DriveInfo(
        path=str(path),
        up=False,
        reason=reason,
        io="",
        io_reason="",
        writing=False,
        queued_load_blocks=0,
        queued_write_blocks=0,
        loading=0,
        storing=0,
        index="",
        index_reason="",
        index_records=0,
        index_queue=0,
        lifetime_written_bytes=0,
    )
