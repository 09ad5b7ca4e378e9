"""The index of one drive: which block lies in which slot, in LMDB, written by one thread in batches.

The index is a hint. Slot headers are the truth, every load checks them, and a lost index is made anew from them. What
it buys is a restart in seconds. A batch is: fdatasync of the data file, one transaction, sync of the index; only then
are its writes reported as done, so a block that was reported is found again after a power cut. The transactions are
numbered, and the number of the last one stands in a file of its own: LMDB keeps the tree before, whole, and one flipped
bit in a meta page makes that the newest. That file is not synced: after a power cut it may be behind, never ahead.

Never `sync=False`, which a power cut turns into silent damage, and never `writemap=True`, which a full disk turns into
SIGBUS. LMDB is only ever opened here on a file that a child process has made and walked (nvme_walk.py), or a new one.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lmdb

from forebay.tiers.nvme_drive import INDEX_NAME, Drive, sync_directory
from forebay.tiers.nvme_format import (
    LAST_FILE,
    META_KEY,
    PAGE,
    SLAB_KEY_BYTES,
    STATE_KEY,
    DriveHeader,
    decode_state,
    encode_last,
    encode_meta,
    encode_record,
    encode_slab,
    encode_slab_record,
    encode_state,
    file_bytes,
    record_sum,
    slab_key,
    slot_key,
    slot_place,
    slot_stride,
)
from forebay.tiers.nvme_io import Errors, Part, WriteHealth, status_of
from forebay.tiers.nvme_jobs import IoStatus, SlabOwner, WriteJob
from forebay.transports.threads import BackgroundThread

log = logging.getLogger(__name__)

INDEX_FILE = "data.mdb"
_QUARANTINED_MAX = 2
_MAP_BYTES_MIN = 64 << 20
_FREE_BYTES_MIN = 1 << 20
_FORGOTTEN_MAX = 1 << 17
_RETRY_S = 1.0
_RESTS = 5

Assigned = tuple[SlabOwner, int]
Records = Sequence[tuple[bytes, bytes]]


class Index:
    """An open LMDB environment. One thread at a time; the calls block on the disk and raise lmdb.Error."""

    def __init__(self, directory: Path, header: DriveHeader) -> None:
        """Open, or create empty. The map is as large as the index can ever grow, which costs addresses only."""
        directory.mkdir(mode=0o700, exist_ok=True)
        self._directory = directory
        self._header = header
        self._env = lmdb.open(
            str(directory),
            map_size=max(_MAP_BYTES_MIN, file_bytes(header.slab_bytes, header.slabs) // 16),
            max_dbs=3,
            mode=0o600,
            metasync=False,
            lock=False,
            readahead=False,
        )
        self._meta, self._slabs, self._slots = (self._env.open_db(name) for name in (b"meta", b"slabs", b"slots"))
        with self._env.begin() as txn:
            state = txn.get(STATE_KEY, db=self._meta)
        self._number, self._total = (0, 0) if state is None else decode_state(state)

    def apply(self, batch: Batch, *, whole: bool) -> None:
        """One transaction, on the medium when this returns.

        `whole` says that the index now knows all that is on the drive.
        """
        with self._env.begin(write=True) as txn:
            slabs, slots = _Summed(txn, self._slabs), _Summed(txn, self._slots)
            for slab, assigned in batch.slabs.items():
                key = slab_key(slab)
                slots.clear(key)
                if assigned is None:
                    slabs.delete(key)
                else:
                    slabs.put(key, encode_slab_record(key, *assigned))
            for prefix in sorted(batch.records):
                for key, value in sorted(batch.records[prefix].items()):
                    if value is None:
                        slots.delete(key)
                    else:
                        slots.put(key, value)
            for slab, assigned in batch.adopted_slabs.items():
                key = slab_key(slab)
                slabs.put(key, encode_slab_record(key, *assigned))
            for records in batch.adopted.values():
                for key, value in records.items():
                    slots.add(key, value)
            if whole:
                txn.put(META_KEY, encode_meta(self._header), db=self._meta)
            number, total = self._number + 1, self._total + slabs.change + slots.change
            txn.put(STATE_KEY, encode_state(number, total), db=self._meta)
        self._number, self._total = number, total
        self._env.sync(True)
        _note_last(self._directory, number)

    def records(self) -> int:
        with self._env.begin() as txn:
            return int(txn.stat(self._slots)["entries"])

    def close(self) -> None:
        self._env.close()


class _Summed:
    """One database within one transaction, and by how much that changes the sum of its records."""

    def __init__(self, txn: lmdb.Transaction, database: Any) -> None:
        self._txn = txn
        self._database = database
        self.change = 0

    def put(self, key: bytes, value: bytes) -> None:
        if not self.add(key, value):
            replaced = self._txn.replace(key, value, db=self._database)
            assert replaced is not None
            self.change += record_sum(value) - record_sum(replaced)

    def add(self, key: bytes, value: bytes) -> bool:
        """False, and nothing done, where there is a record already."""
        added = bool(self._txn.put(key, value, overwrite=False, db=self._database))
        if added:
            self.change += record_sum(value)
        return added

    def delete(self, key: bytes) -> None:
        gone = self._txn.pop(key, db=self._database)
        if gone is not None:
            self.change -= record_sum(gone)

    def clear(self, prefix: bytes) -> None:
        with self._txn.cursor(self._database) as cursor:
            found = cursor.set_range(prefix)
            while found and cursor.key().startswith(prefix):
                self.change -= record_sum(cursor.value())
                found = cursor.delete()


def _note_last(directory: Path, number: int) -> None:
    """Say in the file beside the index that this transaction has been made. Raises OSError."""
    fd = os.open(directory / LAST_FILE, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        is_new = not os.fstat(fd).st_size
        content = encode_last(number)
        if os.pwrite(fd, content, 0) != len(content):
            raise OSError(errno.EIO, f"{LAST_FILE} was written in part")
        if is_new:
            os.fsync(fd)
    finally:
        os.close(fd)
    if is_new:
        sync_directory(directory)


def quarantine_index(directory: Path) -> None:
    """Set a drive's index aside for whoever wants to look at it, the two latest being kept. Raises OSError."""
    bad = sorted(directory.glob(f"{INDEX_NAME}.bad-*"), key=_quarantine_number)
    for path in bad[: max(0, len(bad) - _QUARANTINED_MAX + 1)]:
        shutil.rmtree(path, ignore_errors=True)
    number = _quarantine_number(bad[-1]) + 1 if bad else 1
    os.rename(directory / INDEX_NAME, directory / f"{INDEX_NAME}.bad-{number}")
    sync_directory(directory)


def _quarantine_number(path: Path) -> int:
    text = path.name.rpartition("-")[2]
    return int(text) if text.isdigit() else 0


class Batch:
    """What one transaction is to change, folded in order, so that what came later has the last word.

    None as a value deletes; a slab that changes hands loses all its slots. What a rebuild has adopted stands aside: it
    was on the drive before all else that is said here, and overwrites nothing. Records lie by their slab's key: a
    namespace of a million blocks goes with all its slabs at once, and each must find its own without a look at all.
    """

    def __init__(self) -> None:
        self.slabs: dict[int, Assigned | None] = {}
        self.records: dict[bytes, dict[bytes, bytes | None]] = {}
        self.adopted_slabs: dict[int, Assigned] = {}
        self.adopted: dict[bytes, dict[bytes, bytes]] = {}
        self.parts: list[Part] = []
        self.written_blocks = 0
        self.written_bytes = 0
        self.whole = False

    def set_slab(self, slab: int, assigned: Assigned | None) -> None:
        prefix = slab_key(slab)
        self.records.pop(prefix, None)
        self.adopted.pop(prefix, None)
        self.adopted_slabs.pop(slab, None)
        self.slabs[slab] = assigned

    def forget(self, places: Iterable[tuple[int, int]]) -> None:
        for place in places:
            key = slot_key(*place)
            self.say(key, None)
            if self.adopted:
                self.adopted.get(key[:SLAB_KEY_BYTES], {}).pop(key, None)

    def say(self, key: bytes, value: bytes | None) -> None:
        """The record of one place from now on."""
        records = self.records.get(key[:SLAB_KEY_BYTES])
        if records is None:
            records = self.records[key[:SLAB_KEY_BYTES]] = {}
        records[key] = value

    def adopt_slabs(self, found: Iterable[tuple[int, SlabOwner, int]]) -> None:
        self.adopted_slabs.update((slab, (owner, generation)) for slab, owner, generation in found)

    def adopt_blocks(self, records: Records) -> None:
        for key, value in records:
            self.adopted.setdefault(key[:SLAB_KEY_BYTES], {})[key] = value

    def put(self, part: Part) -> None:
        self.parts.append(part)
        work = part.work
        job = work.job
        assert isinstance(job, WriteJob)
        written = part.written()
        self.written_blocks += len(written)
        self.written_bytes += len(written) * slot_stride(job.slot_bytes)
        for at in written:
            block = part.blocks[at]
            key = slot_key(part.slabs[at], job.slots[block])
            record = encode_record(
                key,
                job.hashes[block],
                job.parents[block],
                job.depths[block],
                job.generations[block],
                work.checksums[block],
            )
            self.say(key, record)

    def complete(self) -> None:
        self.whole = True

    def is_empty(self) -> bool:
        return not (self.slabs or self.records)

    def unsaid(self) -> Batch:
        """What has to be said again when the transaction failed: everything but the blocks, which are then lost."""
        kept = Batch()
        kept.slabs = self.slabs
        deleted = [key for records in self.records.values() for key, value in records.items() if value is None]
        kept.forget(map(slot_place, deleted[-_FORGOTTEN_MAX:]))
        return kept


class SyncFailed(OSError):
    """The data file could not be synced: the drive's own fault, and not the index's."""


class Committer:
    """The thread that makes written blocks durable. Everything may be called from any thread and returns at once."""

    def __init__(
        self,
        drive: Drive,
        health: WriteHealth,
        errors: Errors,
        *,
        batch_s: float,
        batch_blocks: int,
        finished: Callable[[Part], None],
    ) -> None:
        """`finished` is called from the thread for each part given to `written`, its statuses final."""
        self._drive = drive
        self._health = health
        self._errors = errors
        self._batch_s = batch_s
        self._batch_blocks = batch_blocks
        self._finished = finished
        self._rested_s = 0.0
        # The condition guards the queue and what `begin`, `flush` and `close` say; the rest is the thread's.
        self._changed = threading.Condition()
        self._steps: list[Callable[[Batch], None]] = []
        self._queued_blocks = 0
        self._writes_wait = False
        self._ready = False
        self._hurry = False
        self._closed = False
        self._kept = Batch()
        self._lost_adopted = False
        self._refused = ""
        self._index: Index | None = None
        self.reason = ""
        """Why the last transaction failed; empty when it did not."""
        self.records: int | None = None
        """Blocks in the index; None until it has been opened in this life."""
        self._thread = BackgroundThread(self._run, name=f"index-{drive.directory.name}")

    def start(self) -> None:
        self._thread.start()

    def begin(self) -> None:
        """The index on disk may be opened from now on; until then everything queues up."""
        with self._changed:
            self._ready = True
            self._changed.notify()

    def refuse(self, reason: str) -> None:
        """Never open the index in this life; every write fails."""
        self._refused = self.reason = reason

    def queued_blocks(self) -> int:
        return self._queued_blocks

    def assign_slab(self, slab: int, owner: SlabOwner, generation: int) -> None:
        self._queue(1, lambda batch: batch.set_slab(slab, (owner, generation)))

    def retire_slab(self, slab: int) -> None:
        self._queue(1, lambda batch: batch.set_slab(slab, None))

    def forget(self, places: Sequence[tuple[int, int]]) -> None:
        self._queue(len(places), lambda batch: batch.forget(places))

    def written(self, part: Part) -> None:
        """A part whose calls have ended; ends in `finished`."""

        def put(batch: Batch) -> None:
            if part.sync_failures != self._health.sync_failures:
                part.fail(IoStatus.IO_ERROR)
            batch.put(part)

        self._queue(len(part.blocks), put, writes=True)

    def adopt_slabs(self, found: Sequence[tuple[int, SlabOwner, int]]) -> None:
        """Slabs that a rebuild has found; nobody waits for them, and their header pages stay as they are."""
        self._queue(len(found), lambda batch: batch.adopt_slabs(found))

    def adopt_blocks(self, records: Records) -> None:
        """Blocks that a rebuild has found. They never replace what was said of their places meanwhile."""
        self._queue(len(records), lambda batch: batch.adopt_blocks(records))

    def complete(self) -> None:
        """Everything on the drive has been adopted: from now on the index is worth reading at a start."""
        self._queue(1, Batch.complete)

    def flush(self) -> None:
        """Commit what is queued, or written next, without waiting for company."""
        with self._changed:
            self._hurry = bool(self._steps or self._health.calls_left)
            self._changed.notify()

    def close(self, deadline_s: float) -> bool:
        """Commit what is queued and close the index, by the deadline (time.monotonic). True: the thread has ended."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(max(0.1, deadline_s - time.monotonic()))
        return not self._thread.is_alive()

    def _queue(self, blocks: int, step: Callable[[Batch], None], *, writes: bool = False) -> None:
        with self._changed:
            self._writes_wait |= writes
            self._steps.append(step)
            self._queued_blocks += blocks
            self._changed.notify()

    # --- the thread ---

    def _run(self) -> None:
        while (steps := self._next()) is not None:
            self._commit(steps)
        self._drive.note_written()
        if self._index is not None:
            self._index.close()

    def _next(self) -> list[Callable[[Batch], None]] | None:
        """The next batch, after waiting for company; None to end. What failed before is tried again each second."""
        with self._changed:
            while not (self._ready and self._steps) and not self._closed:
                retry = self._ready and not self._kept.is_empty()
                if not self._changed.wait(_RETRY_S if retry else None) and retry:
                    break
            if self._closed and not self._steps:
                return None
            until_s = time.monotonic() + self._batch_s
            while (left_s := self._company_s(until_s)) > 0:
                self._changed.wait(left_s)
            steps, self._steps = self._steps, []
            self._queued_blocks = 0
            self._writes_wait = False
            self._hurry = False
            return steps

    def _company_s(self, until_s: float) -> float:
        """How much longer to wait for company, beside a short rest for the drive: only while no written block waits.

        What is not committed holds memory that the next writes need, so waiting for company would starve the drive.
        """
        if self._queued_blocks >= self._batch_blocks or self._hurry or self._closed:
            return 0.0
        if self._writes_wait or not self._health.calls_left:
            until_s = min(until_s, self._rested_s)
        return until_s - time.monotonic()

    def _commit(self, steps: list[Callable[[Batch], None]]) -> None:
        batch, self._kept = self._kept, Batch()
        for step in steps:
            step(batch)
        self._drive.count_written(batch.written_bytes)
        try:
            if not self._ready:
                raise OSError("closed before the index could be opened")
            if self._refused:
                raise OSError(self._refused)
            self._sync(batch)
            self._apply(batch)
        except Exception as error:  # whatever it was, those who wait for their blocks must hear of it
            if not isinstance(error, OSError | lmdb.Error):
                log.exception("bug while the index was written")
            self._failed(error, batch)
        else:
            self.reason = ""
            if batch.written_blocks:
                self._health.worked()
        for part in batch.parts:
            self._finished(part)
        self._rested_s = time.monotonic() + self._batch_s / _RESTS

    def _sync(self, batch: Batch) -> None:
        """Bring the blocks, and the header pages of slabs that have changed hands, to the medium."""
        for slab, assigned in batch.slabs.items():
            page = bytes(PAGE) if assigned is None else encode_slab(self._drive.drive_id, slab, *assigned)
            self._drive.write_slab_page(slab, page)
        if batch.slabs or batch.written_blocks:
            try:
                self._drive.sync()
            except OSError as error:
                self._health.sync_failures += 1
                raise SyncFailed(error.errno, error.strerror or str(error)) from error

    def _apply(self, batch: Batch) -> None:
        if self._index is None:
            self._index = Index(self._drive.index_directory, self._drive.header)
        try:
            self._index.apply(batch, whole=batch.whole and not self._lost_adopted)
        except lmdb.PanicError:  # a meta page could not be written, and LMDB refuses all until it is opened again
            self._index.close()
            self._index = None
            raise
        self.records = self._index.records()

    def _failed(self, error: Exception, batch: Batch) -> None:
        status = self._status_of(error)
        self.reason = _reason(error, status)
        self._kept = batch.unsaid()
        self._lost_adopted |= bool(any(batch.adopted.values()) or batch.adopted_slabs or batch.whole)
        if batch.written_blocks:
            step = "sync" if isinstance(error, SyncFailed) else "index"
            self._errors.add(f"{step}_{status.name.lower()}", batch.written_blocks)
            self._health.failed(self.reason)
        for part in batch.parts:
            part.fail(status)

    def _status_of(self, error: Exception) -> IoStatus:
        """LMDB calls a full disk an input/output error, so the filesystem is asked."""
        if isinstance(error, OSError):
            return status_of(error)
        full = isinstance(error, lmdb.MapFullError) or self._drive.free_bytes() < _FREE_BYTES_MIN
        return IoStatus.NO_SPACE if full else IoStatus.IO_ERROR


def _reason(error: Exception, status: IoStatus) -> str:
    """In words; a full disk is named as one, whatever LMDB calls it."""
    text, full = str(error), os.strerror(errno.ENOSPC)
    return f"{full}: {text}" if status is IoStatus.NO_SPACE and full not in text else text
