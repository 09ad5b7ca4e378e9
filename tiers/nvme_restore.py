"""Brings one drive's blocks back after a start, in a thread of its own, while loads are already served.

The index is read by a child process (nvme_reader.py), which tells what it found over a pipe. Anything but a clean
answer in time - another exit status, a damaged frame, silence - sets the index aside and scans the slots' headers
instead (nvme_scan.py), which takes longer and finds the same.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from forebay.kvstore.errors import Corrupt
from forebay.tiers.nvme_drive import Drive
from forebay.tiers.nvme_format import SlotRecord, encode_slab, found_record, slot_key
from forebay.tiers.nvme_index import Committer, quarantine_index
from forebay.tiers.nvme_jobs import RestoredBlock
from forebay.tiers.nvme_reader import Assigned, IndexReader
from forebay.tiers.nvme_scan import SlabFindings, scan_slabs, scan_slots
from forebay.tiers.nvme_walk import KEY_BYTES

BLOCKS_PER_EVENT = 1000
_SCANNERS = 4


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
        self.state = "loading"
        """"loading", "rebuilding" or "up"."""
        self.blocks = 0
        self.fraction = 0.0
        self.rebuilt = False
        self._thread = threading.Thread(target=self._run, name=f"restore-{drive.directory.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, deadline_s: float) -> bool:
        """End early; True: the thread has ended (time.monotonic)."""
        self._stopping.set()
        self._reader.kill()
        if self._thread.ident is not None:
            self._thread.join(max(0.1, deadline_s - time.monotonic()))
        return not self._thread.is_alive()

    def _is_stopping(self) -> bool:
        return self._stopping.is_set() or self._teller.is_stopping()

    def _run(self) -> None:
        began_s = time.monotonic()
        try:
            if self._drive.is_new:
                self._tell_slabs([])
                self._committer.complete()
            elif not self._from_index() and not self._is_stopping():
                self._rebuild()
        except OSError as error:
            self._problems.append(f"{self._drive.directory}: {error}")
        if not self._slabs_told:
            self._tell_slabs([])
        self._committer.begin()
        self.state, self.fraction = "up", 1.0
        self._teller.done(self.blocks, time.monotonic() - began_s, self.rebuilt, tuple(self._problems))

    def _tell_slabs(self, found: list[Assigned]) -> None:
        self._slabs_told = True
        self._teller.slabs(found)

    def _tell_blocks(self, found: list[RestoredBlock]) -> None:
        self.blocks += len(found)
        self._teller.blocks(found)

    # --- by the index ---

    def _from_index(self) -> bool:
        """Tell what the index says; False when it is missing or broken, some of it perhaps told already."""
        index = self._drive.index_directory
        if not self._reader.exists():
            self._problems.append(f"{index} is missing")
            return False
        try:
            for found in self._reader.read():
                if self._is_stopping():
                    return False
                if isinstance(found, list):
                    self._settle_headers(found)
                    self._reader.adopt_copy()
                    self._committer.begin()
                    self._tell_slabs(found)
                else:
                    self._told.append(found[0])
                    self._tell_blocks(found[1])
                    self.fraction = self.blocks / self._reader.blocks_expected
        except (Corrupt, OSError) as error:
            if not self._is_stopping():
                self._problems.append(f"{index}: {error}")
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
        for found in scan_slabs(self._drive, self._is_stopping):
            if isinstance(found, int):
                self._problems.append(f"{self._drive.directory}: the header of slab {found} is damaged")
            else:
                assigned.append(found)
        if not kept:
            self._committer.adopt_slabs(assigned)
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
            return scan_slots(self._drive, *found, self._is_stopping)

        with ThreadPoolExecutor(_SCANNERS, thread_name_prefix=f"scan-{self._drive.directory.name}") as pool:
            for number, findings in enumerate(pool.map(scan, assigned), 1):
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
