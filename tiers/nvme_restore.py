"""Brings one drive's blocks back after a start, in a thread of its own, while loads are already served.

The index is read by a child process (nvme_reader.py), which tells what it found over a pipe. Anything but a clean
answer in time - another exit status, a damaged frame, silence - sets the index aside and scans the slots' headers
instead (nvme_scan.py), which takes longer and finds the same.

A second thread watches the first, because a drive may let a call hang for ever: where nothing has moved for HANG_S the
drive is given up for this life, and the others, which wait for its slabs, go on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from forebay.kvstore.errors import Corrupt
from forebay.tiers.nvme_drive import Drive
from forebay.tiers.nvme_format import SlotRecord, encode_slab, found_record, slot_key
from forebay.tiers.nvme_index import Committer, quarantine_index
from forebay.tiers.nvme_jobs import RestoredBlock
from forebay.tiers.nvme_reader import Assigned, IndexReader
from forebay.tiers.nvme_scan import SlabFindings, scan_all, scan_slabs, scan_slots
from forebay.tiers.nvme_walk import KEY_BYTES
from forebay.transports.threads import BackgroundThread

log = logging.getLogger(__name__)

BLOCKS_PER_EVENT = 1000
HANG_S = 60.0
"""Without a sign of life for so long, beside what a reader of the index may take, a drive hangs: twice a usual time-out
of the kernel's."""
_LOOK_S = 0.5


class _GivenUp(Exception):
    """The drive began to answer after it had been given up."""


class Teller(Protocol):
    """Where the findings go. Slab numbers are the drive's own. The calls may wait for room or for other drives."""

    def is_stopping(self) -> bool: ...

    def slabs(self, found: list[Assigned]) -> None:
        """All assigned slabs; once."""

    def blocks(self, found: list[RestoredBlock]) -> None:
        """At most BLOCKS_PER_EVENT."""

    def done(self, blocks: int, seconds: float, rebuilt: bool, problems: tuple[str, ...]) -> None: ...


class Restore:
    """One drive's way back. The progress fields may be read by any thread."""

    def __init__(self, drive: Drive, committer: Committer, teller: Teller, *, walk_timeout_s: float) -> None:
        self._drive = drive
        self._committer = committer
        self._teller = teller
        self._reader = IndexReader(drive, walk_timeout_s)
        self._problems: list[str] = []
        self._told: list[bytes] = []
        self._slabs_told = False
        self._stopping = threading.Event()
        self._walk_timeout_s = walk_timeout_s
        self._sound = False
        """The index may be opened: it was walked whole, or is new."""
        # The lock guards these: whether the worker tells what it found, and how long the drive may take until it is
        # given up.
        self._lock = threading.Lock()
        self._telling = False
        self._given_up = False
        self._due_s = 0.0
        self._ended = threading.Event()
        self.state = "loading"
        """"loading", "rebuilding" or "up"."""
        self.blocks = 0
        self.fraction = 0.0
        self.rebuilt = False
        name = drive.directory.name
        self._thread = BackgroundThread(self._run, name=f"restore-{name}")
        self._worker = BackgroundThread(self._work, name=f"restore-work-{name}")

    def start(self) -> None:
        self._expect()
        self._worker.start()
        self._thread.start()

    def stop(self, deadline_s: float) -> bool:
        """End early; True: the threads have ended (time.monotonic)."""
        self._stopping.set()
        self._reader.kill()
        threads = [thread for thread in (self._worker, self._thread) if thread.ident is not None]
        for thread in threads:
            thread.join(max(0.1, deadline_s - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _is_stopping(self) -> bool:
        return self._stopping.is_set() or self._given_up or self._teller.is_stopping()

    def _expect(self, more_s: float = 0.0) -> None:
        """The drive has answered: the next answer may take HANG_S and `more_s`."""
        self._due_s = time.monotonic() + HANG_S + more_s

    def _page_read(self) -> bool:
        """A sign of life, and whether to stop."""
        self._expect()
        return self._is_stopping()

    def _run(self) -> None:
        """Watch the worker until it has ended or is given up, then tell the end, whatever it was."""
        began_s = time.monotonic()
        while not self._ended.wait(_LOOK_S):
            with self._lock:
                self._given_up = not self._telling and time.monotonic() > self._due_s
            if self._given_up:
                self._problems.append(f"{self._drive.directory} hangs: it is not used until the next start")
                self._reader.kill()
                break
        if not self._sound:
            self._committer.refuse("; ".join(self._problems) or "not restored")
        self._committer.begin()
        if not self._slabs_told:
            self._slabs_told = True
            self._teller.slabs([])
        self.state, self.fraction = "up", 1.0
        self._teller.done(self.blocks, time.monotonic() - began_s, self.rebuilt, tuple(self._problems))

    def _work(self) -> None:
        try:
            if self._drive.is_new:
                self._sound = True
                self._tell_slabs([])
                self._committer.complete()
            elif not self._from_index() and not self._is_stopping():
                self._rebuild()
        except _GivenUp:
            pass
        except Exception as error:  # noqa: BLE001  # noted, told and logged
            self._note(error, "")
        finally:
            self._ended.set()

    def _note(self, error: Exception, place: str) -> None:
        """A problem to be told; one that nobody foresaw is logged whole."""
        if not isinstance(error, OSError | Corrupt):
            log.error("bug while a drive was restored", exc_info=error)
        said = str(error) if isinstance(error, OSError | Corrupt) else f"{type(error).__name__}: {error}"
        self._problems.append(f"{place or self._drive.directory}: {said}")

    def _tell(self, call: Callable[[], None]) -> None:
        """Tell something, which may wait for room or for other drives: meanwhile this one owes no sign of life."""
        with self._lock:
            if self._given_up:
                raise _GivenUp
            self._telling = True
        try:
            call()
        finally:
            self._expect()
            self._telling = False

    def _tell_slabs(self, found: list[Assigned]) -> None:
        def call() -> None:
            self._slabs_told = True
            self._teller.slabs(found)

        self._tell(call)

    def _tell_blocks(self, found: list[RestoredBlock]) -> None:
        def call() -> None:
            self.blocks += len(found)
            self._teller.blocks(found)

        self._tell(call)

    # --- by the index ---

    def _from_index(self) -> bool:
        """Tell what the index says; False when it is missing or broken, some of it perhaps told already."""
        index = self._drive.index_directory
        if not self._reader.exists():
            self._problems.append(f"{index} is missing")
            return False
        self._expect(self._reader.first_s())
        try:
            for found in self._reader.read():
                self._expect(self._walk_timeout_s)
                if self._is_stopping():
                    return False
                if isinstance(found, list):
                    self._settle_headers(found)
                    self._reader.adopt_copy()
                    self._sound = True
                    self._committer.begin()
                    self._tell_slabs(found)
                else:
                    self._told.append(found[0])
                    self._tell_blocks(found[1])
                    self.fraction = self.blocks / self._reader.blocks_expected
        except _GivenUp:
            raise
        except Exception as error:  # noqa: BLE001  # whatever it was, the slots' headers are there
            if not self._is_stopping():
                self._note(error, str(index))
            return False
        return True

    def _settle_headers(self, found: list[Assigned]) -> None:
        """Where a kill came between a slab's header and its index record, the header follows the record.

        The record is what this life goes by; blocks written under it would be a stranger's to a rebuild by headers.
        """
        try:
            wrong = [
                (slab, page)
                for slab, owner, generation in found
                if (page := encode_slab(self._drive.drive_id, slab, owner, generation))
                != self._drive.read_slab_page(slab)
            ]
            for slab, page in wrong:
                self._drive.write_slab_page(slab, page)
            if wrong:
                self._drive.sync()
        except OSError as error:
            self._problems.append(f"{self._drive.directory}: slab headers could not be settled: {error}")

    # --- by the headers ---

    def _rebuild(self) -> None:
        """Tell what the slots' headers say, but for what has been told already, and make a new index of it.

        An index that was walked whole, and whose reader died while telling, is sound and stays as it is.
        """
        self.state = "rebuilding"
        kept = self._slabs_told
        self.rebuilt = not kept
        if not kept and self._drive.index_directory.exists():
            self._set_aside()
        assigned: list[Assigned] = []
        for found in scan_slabs(self._drive, self._page_read):
            if isinstance(found, int):
                self._problems.append(f"{self._drive.directory}: the header of slab {found} is damaged")
            else:
                assigned.append(found)
        if not kept:
            self._committer.adopt_slabs(assigned)
            self._sound = True
            self._tell_slabs(assigned)
            self._committer.begin()
        self._rebuild_slots(assigned, kept)

    def _set_aside(self) -> None:
        """Where that fails nothing new is durable in this life: a broken index must never be opened here."""
        try:
            quarantine_index(self._drive.directory)
        except OSError as error:
            reason = f"{self._drive.index_directory} is broken and could not be set aside: {error}"
            self._problems.append(reason)
            self._committer.refuse(reason)

    def _rebuild_slots(self, assigned: list[Assigned], kept: bool) -> None:
        told = {blob[at : at + KEY_BYTES] for blob in self._told for at in range(0, len(blob), KEY_BYTES)}

        def scan(found: Assigned) -> SlabFindings:
            return scan_slots(self._drive, *found, self._page_read)

        for number, findings in enumerate(scan_all(assigned, scan, self._is_stopping), 1):
            records = [record for record in findings.blocks if slot_key(record.slab, record.slot) not in told]
            for at in range(0, len(records), BLOCKS_PER_EVENT):
                self._tell_found(records[at : at + BLOCKS_PER_EVENT], kept)
            self.fraction = number / len(assigned)
        if not kept and not self._is_stopping():
            self._committer.complete()

    def _tell_found(self, records: list[SlotRecord], kept: bool) -> None:
        if not kept:
            self._committer.adopt_blocks([found_record(record) for record in records])
        self._tell_blocks(
            [
                (record.slab, record.slot, record.hash, record.parent, record.depth, record.generation)
                for record in records
            ]
        )
