"""A disk in memory behind the tiers' `Files` seam, which fails, lies and loses power by a seeded plan.

Each page (4096 bytes) exists up to three times: as a reader sees it, as it would be after a power cut, and as a sound
disk would hold it. A read is corrupt when the first and the third differ, whatever made them differ; so the record
needs no knowledge of the faults' after-effects. What is written is volatile until `sync`. Files are sparse: a page
costs memory once it is written. The parent folders of files are not modelled.
"""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from forebay.tiers.files import FilesystemInfo
from support.sim_faults import Corruption, CorruptRead, Fault, FaultPlan, Record, SiteCount

PAGE = 4096
SECTOR = 512
ZEROS = bytes(PAGE)
MISDIRECTED_PAGES = 64
"""How far a misdirected write lands from its place, at most; half of them land a whole multiple of their length away,
where a neighbour of the same shape lies."""

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

Pages = dict[int, bytes]
Stall = Callable[[str, Path, int], None]


_ERRNO = {Fault.EIO: errno.EIO, Fault.ENOSPC: errno.ENOSPC, Fault.HELD: errno.EAGAIN}


@dataclass(slots=True)
class _File:
    path: Path
    size: int = 0
    durable_size: int = 0
    exists_durably: bool = False
    seen: Pages = field(default_factory=dict)
    durable: Pages = field(default_factory=dict)
    wanted: Pages = field(default_factory=dict)
    pending: list[tuple[int, bytes]] = field(default_factory=list)
    """Page writes since the last sync, in order; the last `last_call` of them belong to one call."""
    last_call: int = 0
    doomed: set[int] = field(default_factory=set)
    """Pages a failed sync gave up: readers see them until the power goes, whatever is synced later."""

    def copy(self) -> _File:
        return replace(
            self,
            seen=dict(self.seen),
            durable=dict(self.durable),
            wanted=dict(self.wanted),
            pending=list(self.pending),
            doomed=set(self.doomed),
        )

    def read(self, offset: int, length: int) -> bytes:
        return b"".join(self.seen.get(page, ZEROS)[start:end] for page, start, end in _pages(offset, length))

    def write(self, offset: int, data: bytes) -> list[int]:
        """Let readers see `data`, volatile; returns the pages touched."""
        touched = _overlay(self.seen, offset, data)
        self.pending += ((page, self.seen[page]) for page in touched)
        self.last_call = len(touched)
        self.doomed.difference_update(touched)
        if data:
            self.size = max(self.size, offset + len(data))
        return touched

    def want(self, offset: int, data: bytes) -> list[int]:
        """Note what a sound disk would hold now; returns the pages where this one holds something else."""
        touched = _overlay(self.wanted, offset, data)
        wrong = [page for page in touched if self.wanted[page] != self.seen.get(page, ZEROS)]
        self.settle(set(touched).difference(wrong))  # equal: one object instead of two
        return wrong

    def settle(self, pages: Iterable[int]) -> None:
        """Of these pages nothing is promised any more: what is there is as good as anything."""
        for page in pages:
            self.wanted[page] = self.seen.get(page, ZEROS)

    def sync(self, given_up: Callable[[], bool] | None) -> None:
        """Make durable what is pending, except the pages of which `given_up` says so (asked page by page)."""
        for page in sorted({page for page, _ in self.pending}):
            if given_up is not None and given_up():
                self.doomed.add(page)
            else:
                self.durable[page] = self.seen[page]
        self.pending.clear()
        self.last_call = 0
        if given_up is None:
            self.durable_size, self.exists_durably = self.size, True

    def cut(self, dice: random.Random, sector_bytes: int) -> None:
        """Become what the power cut left, durable from now on."""
        unsure = {page for page, _ in self.pending} | self.doomed
        right = {page for page in unsure if self.seen.get(page, ZEROS) == self.wanted.get(page, ZEROS)}
        last_call = self.pending[len(self.pending) - self.last_call :]
        torn = dice.choice(last_call)[0] if last_call and dice.random() < 0.5 else -1
        for page in sorted(unsure):
            versions = [content for wanted, content in self.pending if wanted == page and dice.random() < 0.5]
            if dice.random() < 0.25:
                dice.shuffle(versions)
            before = self.durable.get(page, ZEROS)
            content = versions[-1] if versions else before
            if page == torn:
                middle = sector_bytes * dice.randrange(1, PAGE // sector_bytes) if sector_bytes < PAGE else 0
                content = self.seen[page][:middle] + before[middle:]
            self.durable[page] = content
        if dice.random() < 0.5:
            self.size = self.durable_size
        self.durable_size, self.exists_durably = self.size, True
        for pages in (self.durable, self.wanted):
            for page in [page for page in pages if page * PAGE >= self.size]:
                del pages[page]
        self.seen = dict(self.durable)
        self.settle(page for page in right if page in self.seen)  # what was wrong before stays so
        self.pending.clear()
        self.doomed.clear()
        self.last_call = 0


class SimFiles:
    """The `Files` of one machine's life. Any thread may call; every method may raise OSError as the plan says.

    `plan` may be replaced at any time. `stall` is called, outside all locks, by the calls the plan makes slow: it may
    wait for an event, or turn a clock.
    """

    def __init__(
        self,
        rng: random.Random,
        plan: FaultPlan | None = None,
        *,
        free_bytes: int = 1 << 40,
        sector_bytes: int = PAGE,
        stall: Stall | None = None,
        filesystem: FilesystemInfo | None = None,
    ) -> None:
        """`sector_bytes`, 4096 or 512, is written whole or not at all, and what O_DIRECT wants offset, length and
        address to be multiples of. `free_bytes` is what the file system has left for files to grow.
        """
        self.plan = plan or FaultPlan()
        self.record = Record(rng.getrandbits(64))
        self.stall = stall
        self.kind = filesystem or FilesystemInfo("simulated", is_system_disk=False)
        self._capacity_bytes = free_bytes
        self._sector_bytes = sector_bytes
        self._lock = threading.Lock()
        self._files: dict[Path, _File] = {}
        self._open: dict[int, tuple[_File, int]] = {}
        self._locks: dict[Path, int] = {}
        self._next_fd = 1000
        self._lives = 0
        self._dead = False

    # --- the seam --------------------------------------------------------------------------------------------------

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        self._enter("open", path, 0)
        with self._lock:
            self._check_alive(path)
            if flags & os.O_DIRECT and not self.plan.direct:
                raise _error(errno.EINVAL, path)
            file = self._files.get(path)
            if file is None and not flags & os.O_CREAT:
                raise _error(errno.ENOENT, path)
            if file is not None and flags & os.O_CREAT and flags & os.O_EXCL:
                raise _error(errno.EEXIST, path)
            if file is None or flags & os.O_TRUNC:
                file = self._files[path] = _File(path)
            self._next_fd += 1
            self._open[self._next_fd] = (file, flags)
            return self._next_fd

    def close(self, fd: int) -> None:
        with self._lock:
            if fd not in self._open:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            file, _ = self._open.pop(fd)
            if self._locks.get(file.path) == fd:
                del self._locks[file.path]

    def lock(self, fd: int) -> None:
        path = self._opened(fd).path
        self._enter("lock", path, 0)
        with self._lock:
            if self._locks.setdefault(path, fd) != fd:
                raise _error(errno.EAGAIN, path)

    def size(self, fd: int) -> int:
        file = self._opened(fd)
        self._enter("size", file.path, 0)
        return file.size

    def allocate(self, fd: int, offset: int, length: int) -> None:
        file = self._opened(fd)
        self._enter("allocate", file.path, offset)
        with self._lock:
            self._check_alive(file.path)
            if offset + length - file.size > self._free_bytes():
                raise _error(errno.ENOSPC, file.path)
            file.size = max(file.size, offset + length)

    def preadv(self, fd: int, buffers: Sequence[WriteableBuffer], offset: int) -> int:
        file = self._opened(fd)
        self._check_alignment(fd, buffers, offset)
        fault, dice = self._enter("preadv", file.path, offset)
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        with self._lock:
            self._check_alive(file.path)
            length = max(0, min(sum(map(len, views)), file.size - offset))
            if fault is Fault.SHORT:
                length = self._some_sectors(length, dice)
            if fault is Fault.FLIP_MEDIA and length:
                self._flip(file, offset + dice.randrange(length), dice.randrange(8))
            data = bytearray(file.read(offset, length))
            if fault is Fault.FLIP_READ and length:
                byte = dice.randrange(length)
                data[byte] ^= 1 << dice.randrange(8)
                self._note_corruption(fault, file, [(offset + byte) // PAGE])
            self._note_read(file, offset, data)
        _scatter(data, views)
        return length

    def pwritev(self, fd: int, buffers: Sequence[ReadableBuffer], offset: int) -> int:
        file = self._opened(fd)
        if self._open[fd][1] & os.O_ACCMODE == os.O_RDONLY:
            raise _error(errno.EBADF, file.path)
        self._check_alignment(fd, buffers, offset)
        fault, dice = self._enter("pwritev", file.path, offset, raises=False)
        data = b"".join(buffers)
        with self._lock:
            self._check_alive(file.path)
            if offset + len(data) - file.size > self._free_bytes():
                raise _error(errno.ENOSPC, file.path)
            return self._write(file, offset, data, fault, dice)

    def sync(self, fd: int) -> None:
        """Pages written before are durable now. If it fails, each is or is given up, and nobody says which."""
        file = self._opened(fd)
        fault, dice = self._enter("sync", file.path, 0, raises=False)
        with self._lock:
            self._check_alive(file.path)
            file.sync(given_up=(lambda: dice.random() < 0.5) if fault else None)
        if fault:
            raise _error(_ERRNO[fault], file.path)

    def advise(self, fd: int, offset: int, length: int, advice: int) -> None:
        self._enter("advise", self._opened(fd).path, offset)

    def statvfs_free_bytes(self, path: Path) -> int:
        self._enter("statvfs_free_bytes", path, 0)
        with self._lock:
            return self._free_bytes()

    def filesystem(self, path: Path) -> FilesystemInfo:
        self._enter("filesystem", path, 0)
        return self.kind

    # --- the ends of a life ----------------------------------------------------------------------------------------

    def power_cut(self) -> SimFiles:
        """The machine after the power came back; this one answers EIO from now on.

        Of the writes to a page since the last sync, each was kept, was lost or took effect out of order, and one page
        of the very last write may be torn between sectors. A file that was never synced may be gone.
        """
        with self._lock:
            successor = self._end("power_cut")
            dice = self.record.dice("power_cut", self._lives)
            for path, file in sorted(successor._files.items()):
                if not file.exists_durably and dice.random() < 0.5:
                    del successor._files[path]
                else:
                    file.cut(dice, self._sector_bytes)
            return successor

    def process_kill(self) -> SimFiles:
        """The same machine after the process died: the page cache lives on, descriptors and locks are gone."""
        with self._lock:
            return self._end("process_kill")

    # --- the record ------------------------------------------------------------------------------------------------

    def sites(self) -> dict[str, SiteCount]:
        """Calls and faults per site, over this life and those before."""
        with self._lock:
            return self.record.sites()

    def corruptions(self) -> list[Corruption]:
        """Pages made wrong silently so far, in order; a page may come again."""
        with self._lock:
            return list(self.record.corruptions)

    def corrupt_reads(self, since: int = 0) -> list[CorruptRead]:
        """Pages given wrong to a reader, in order, from the `since`-th on."""
        with self._lock:
            return self.record.corrupt_reads[since:]

    def last_read_wrong(self, path: Path, page: int) -> int:
        """The first wrong byte in what the page's last reader got; -1 if all was right or nobody has read it."""
        with self._lock:
            return self.record.read_wrong.get((path, page), -1)

    def wrong_pages(self, path: Path) -> frozenset[int]:
        """Pages that hold something else than was written there, read or not."""
        with self._lock:
            file = self._files.get(path)
            pages = file.wanted.items() if file else ()
            return frozenset(page for page, wanted in pages if file and wanted != file.seen.get(page, ZEROS))

    def stored_bytes(self) -> int:
        """Bytes in pages that were written."""
        with self._lock:
            return sum(len(file.seen) for file in self._files.values()) * PAGE

    def remove(self, path: Path) -> None:
        """Delete the file for good, if it is there; nobody may have it open."""
        with self._lock:
            self._files.pop(path, None)

    def flip_bit(self, path: Path, byte: int, bit: int = 0) -> None:
        """Let the medium decay at a place of the caller's choice."""
        with self._lock:
            self._flip(self._files[path], byte, bit)

    # --- inside ----------------------------------------------------------------------------------------------------

    def _enter(self, site: str, path: Path, offset: int, *, raises: bool = True) -> tuple[Fault | None, random.Random]:
        """Count the call and decide what goes wrong in it; raise that, or leave it to the caller to do."""
        with self._lock:
            self._check_alive(path)
            call, dice = self.record.begin(site, path, offset)
            slow = dice.random() < self.plan.slow
            fault = self.plan.draw(site, call, offset, dice)
            if fault:
                self.record.fault(site, fault)
        if slow and self.stall is not None:
            self.stall(site, path, offset)
        if raises and fault in _ERRNO:
            raise _error(_ERRNO[fault], path)
        return fault, dice

    def _write(self, file: _File, offset: int, data: bytes, fault: Fault | None, dice: random.Random) -> int:
        """Carry out a write as the fault has it; returns what the caller is told was written. Raises OSError."""
        if fault in _ERRNO or fault is Fault.SHORT:
            length = self._some_sectors(len(data), dice)
            file.settle(file.write(offset, data[:length]))
            if fault in _ERRNO:
                raise _error(_ERRNO[fault], file.path)
            return length
        if fault is Fault.TORN:
            file.write(offset, data[: self._some_sectors(len(data), dice)])
        elif fault is Fault.MISDIRECTED:
            elsewhere = _elsewhere(offset, len(data), file, self.plan.silent_from_byte, dice)
            self._note_corruption(fault, file, file.write(elsewhere, data))
        elif fault is not Fault.LOST:
            file.write(offset, data)
        wrong = file.want(offset, data)
        if fault is not None:
            self._note_corruption(fault, file, wrong)
        return len(data)

    def _some_sectors(self, length: int, dice: random.Random) -> int:
        """A length that is whole sectors, and less unless it is 0."""
        return dice.randrange(-(-length // self._sector_bytes)) * self._sector_bytes if length else 0

    def _flip(self, file: _File, byte: int, bit: int) -> None:
        page = byte // PAGE
        for pages in (file.seen, file.durable):
            content = bytearray(pages.get(page, ZEROS))
            content[byte % PAGE] ^= 1 << bit
            pages[page] = bytes(content)
        self._note_corruption(Fault.FLIP_MEDIA, file, [page])

    def _note_corruption(self, kind: Fault, file: _File, pages: Sequence[int]) -> None:
        self.record.corruptions += (Corruption(kind, file.path, page) for page in pages)

    def _note_read(self, file: _File, offset: int, data: bytearray) -> None:
        """Compare what a reader gets with what a sound disk would give, page by page; only reads at whole pages."""
        for start in range(0, len(data), PAGE):
            place = (file.path, (offset + start) // PAGE)
            got = data[start : start + PAGE]
            wanted = file.wanted.get(place[1], ZEROS)
            if offset % PAGE or got == wanted[: len(got)]:
                self.record.read_wrong.pop(place, None)
            else:
                first = next(index for index, byte in enumerate(got) if byte != wanted[index])
                self.record.read_wrong[place] = first
                self.record.corrupt_reads.append(CorruptRead(*place, first))

    def _check_alignment(self, fd: int, buffers: Sequence[ReadableBuffer], offset: int) -> None:
        file, flags = self._open[fd]
        if flags & os.O_DIRECT:
            places = [offset, *(memoryview(buffer).nbytes for buffer in buffers), *map(_address, buffers)]
            if any(place % self._sector_bytes for place in places):
                raise _error(errno.EINVAL, file.path)

    def _check_alive(self, path: Path) -> None:
        if self._dead:
            raise _error(errno.EIO, path)

    def _opened(self, fd: int) -> _File:
        with self._lock:
            if fd not in self._open:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            return self._open[fd][0]

    def _free_bytes(self) -> int:
        return max(0, self._capacity_bytes - sum(file.size for file in self._files.values()))

    def _end(self, how: str) -> SimFiles:
        self._dead = True
        successor = SimFiles(
            self.record.dice(how, self._lives),
            self.plan,
            free_bytes=self._capacity_bytes,
            sector_bytes=self._sector_bytes,
            stall=self.stall,
            filesystem=self.kind,
        )
        successor.record = self.record
        successor._lock = self._lock  # it guards the record as well
        successor._lives = self._lives + 1
        successor._files = {path: file.copy() for path, file in self._files.items()}
        return successor


def _elsewhere(offset: int, length: int, file: _File, from_byte: int, dice: random.Random) -> int:
    """Where a misdirected write lands: another place within the file and not below `from_byte`, if there is one."""
    step = length if dice.random() < 0.5 else PAGE
    distance = dice.randint(1, MISDIRECTED_PAGES) * (step or PAGE)
    places = [place for place in (offset + distance, offset - distance) if from_byte <= place <= file.size - length]
    return dice.choice(places) if places else offset


def _overlay(pages: Pages, offset: int, data: bytes) -> list[int]:
    """Put `data` over what is there; returns the pages touched."""
    touched = []
    for page, start, end in _pages(offset, len(data)):
        first = page * PAGE + start - offset
        piece = data[first : first + end - start]
        if end - start < PAGE:
            before = pages.get(page, ZEROS)
            piece = before[:start] + piece + before[end:]
        pages[page] = piece
        touched.append(page)
    return touched


def _pages(offset: int, length: int) -> Iterator[tuple[int, int, int]]:
    """The pages of a range: number, first byte within it, end within it."""
    end = offset + length
    for page in range(offset // PAGE, -(-end // PAGE)):
        yield page, max(0, offset - page * PAGE), min(PAGE, end - page * PAGE)


def _scatter(data: bytearray, views: Sequence[memoryview]) -> None:
    start = 0
    for view in views:
        piece = data[start : start + len(view)]
        view[: len(piece)] = piece
        start += len(piece)


def _address(buffer: ReadableBuffer) -> int:
    return int(np.frombuffer(memoryview(buffer), np.uint8).__array_interface__["data"][0]) if memoryview(buffer) else 0


def _error(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))
