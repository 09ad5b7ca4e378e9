"""One configured path of the NVMe tier: its directory, the preallocated data file in it, and the right to use both.

A file is taken only when it is beyond doubt ours: right magic, right version, right sizes, nobody else's lock. Anything
else is refused with words that say what was found, because the alternative is to overwrite it. The header lies on two
pages, rewritten one after the other, so that a power cut in the middle leaves one of them whole.

Two descriptors: one through the page cache, which holds the lock and the size, and one with O_DIRECT, which moves
bytes. Where O_DIRECT does not work the first does both, and the kernel is told not to keep what it has read or written.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from forebay.kvstore.errors import Busy, Corrupt, Forbidden, LayoutError, TierFull
from forebay.tiers.files import Files
from forebay.tiers.nvme_format import (
    HEADER_COPY_OFFSET,
    PAGE,
    SLABS_OFFSET,
    WRITTEN_OFFSETS,
    DriveHeader,
    decode_drive,
    decode_written,
    encode_drive,
    encode_written,
    file_bytes,
    slab_offset,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

DATA_NAME = "blocks.dat"
INDEX_NAME = "index"
DIRECTORY_MODE = 0o700
_COPIES = (HEADER_COPY_OFFSET, 0)
LOCK_S = 1.0
_LOCK_AGAIN_S = 0.02
_never = threading.Event()
LIFETIME_STEP_BYTES = 64 << 20
"""What a killed daemon may forget of the bytes it has written."""
_MEMORY_KINDS = ("tmpfs", "ramfs", "hugetlbfs")
_NETWORK_KINDS = ("nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "virtiofs", "lustre", "glusterfs", "beegfs", "afs")


class SlotFile:
    """A data file as far as slots go. Its methods block on the disk, release the GIL and are for any thread."""

    def __init__(
        self, files: Files, directory: Path, fd: int, drive_id: bytes, slab_bytes: int, *, is_direct: bool
    ) -> None:
        """`fd` stays the caller's; `is_direct` says whether it was opened with O_DIRECT."""
        self.files = files
        self.directory = directory
        self.drive_id = drive_id
        self.slab_bytes = slab_bytes
        self.is_direct = is_direct
        self._fd = fd

    def read(self, buffers: Sequence[WriteableBuffer], offset: int) -> int:
        """preadv; with O_DIRECT each buffer begins on a page and is whole pages long. May be short."""
        got = self.files.preadv(self._fd, buffers, offset)
        if not self.is_direct and got > 0:
            self._forget_cached(offset, got)
        return got

    def write(self, buffers: Sequence[ReadableBuffer], offset: int) -> int:
        """pwritev, as `read`."""
        return self.files.pwritev(self._fd, buffers, offset)

    def free_bytes(self) -> int:
        """Room left on the path's filesystem; 0 when it cannot be asked."""
        try:
            return self.files.statvfs_free_bytes(self.directory)
        except OSError:
            return 0

    def _forget_cached(self, offset: int, length: int) -> None:
        """A hint to the kernel; where it is not taken, what was read or written is as good."""
        with contextlib.suppress(OSError):
            self.files.advise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)


class Drive(SlotFile):
    """An open, locked data file."""

    def __init__(self, files: Files, directory: Path, header: DriveHeader, lock_fd: int) -> None:
        """Takes over `lock_fd`; `open_drive` is how to get one."""
        super().__init__(files, directory, lock_fd, header.drive_id, header.slab_bytes, is_direct=False)
        self.header = header
        self.slabs = header.slabs
        self.is_new = header.epoch == 0
        self.io_reason = ""
        """Why the file is read and written through the page cache; empty with O_DIRECT."""
        self._lock_fd = lock_fd
        self._probe_direct()
        counts = [self._read_written(offset) for offset in WRITTEN_OFFSETS]
        self.lifetime_written_bytes = self._noted_bytes = max(counts)
        """Bytes written to the slots in all lives of the drive; the index's own are not counted."""
        self._next_note = 1 - counts.index(self._noted_bytes)

    @property
    def descriptors(self) -> tuple[int, int]:
        """For a process that is to move slots: the descriptor to do it with, and the one that holds the lock."""
        return self._fd, self._lock_fd

    @property
    def index_directory(self) -> Path:
        return self.directory / INDEX_NAME

    def warnings(self) -> tuple[str, ...]:
        """What an operator should know about the place, in sentences that name the path."""
        found = self.files.filesystem(self.directory)
        said = []
        if found.kind in _MEMORY_KINDS:
            said.append(f"{self.directory} is memory ({found.kind}), not a drive: nothing there survives a restart")
        if found.kind in _NETWORK_KINDS or found.kind.startswith("fuse."):
            said.append(f"{self.directory} is on a network file system ({found.kind}): slow, and locks may not hold")
        if found.is_system_disk:
            said.append(f"{self.directory} is on the system's disk: block I/O will slow down the system's own")
        if not self.is_direct:
            said.append(f"{self.directory} is read and written through the page cache: {self.io_reason}")
        return tuple(said)

    def is_virtual(self) -> bool:
        """Whether it lies on a disk whose host copies each byte; no where that cannot be told."""
        try:
            return self.files.filesystem(self.directory).is_virtual_disk
        except OSError:
            return False

    def begin_life(self, epoch: int) -> None:
        """Write the epoch into both headers, each on the medium before the next is begun. Raises OSError."""
        self.header = DriveHeader(self.drive_id, self.slab_bytes, self.slabs, epoch)
        page = _aligned_page()
        page[:] = encode_drive(self.header)
        for offset in _COPIES:
            if self.write([page], offset) != PAGE:
                raise OSError("short write of the drive header")
            self.sync()

    def sync(self) -> None:
        """fdatasync; raises OSError, after which nothing written since the last success may be believed."""
        self.files.sync(self._fd)
        if not self.is_direct:
            self._forget_cached(0, 0)

    def read_slab_page(self, slab: int) -> bytes:
        """A slab's header page as it lies on the drive; raises OSError, also for a short read."""
        aligned = _aligned_page()
        if self.read([aligned], slab_offset(self.slab_bytes, slab)) != PAGE:
            raise OSError("short read of a slab header")
        return bytes(aligned)

    def write_slab_page(self, slab: int, page: bytes) -> None:
        """Replace a slab's header page; raises OSError, also for a short write."""
        aligned = _aligned_page()
        aligned[:] = page
        if self.write([aligned], slab_offset(self.slab_bytes, slab)) != PAGE:
            raise OSError("short write of a slab header")

    def count_written(self, size_bytes: int) -> None:
        """Add to `lifetime_written_bytes`; for one thread. Notes it on the drive now and then."""
        self.lifetime_written_bytes += size_bytes
        if self.lifetime_written_bytes - self._noted_bytes >= LIFETIME_STEP_BYTES:
            self.note_written()

    def note_written(self) -> None:
        """Put `lifetime_written_bytes` down for the next life. Where that fails a count is lost, and no block."""
        if self.lifetime_written_bytes == self._noted_bytes:
            return
        page = _aligned_page()
        page[:] = encode_written(self.drive_id, self.lifetime_written_bytes)
        with contextlib.suppress(OSError):
            self.write([page], WRITTEN_OFFSETS[self._next_note])
            self._noted_bytes = self.lifetime_written_bytes
            self._next_note = 1 - self._next_note

    def close(self) -> None:
        """Give the file up, lock included. No other call may be under way. Idempotent."""
        for fd in {self._fd, self._lock_fd} - {-1}:
            self.files.close(fd)
        self._fd = self._lock_fd = -1

    def _read_written(self, offset: int) -> int:
        page = _aligned_page()
        try:
            return decode_written(page, self.drive_id) if self.read([page], offset) == PAGE else 0
        except OSError:
            return 0

    def _probe_direct(self) -> None:
        """Try what the I/O will do: open with O_DIRECT and read a page into page-aligned memory."""
        fd = -1
        try:
            fd = self.files.open(self.directory / DATA_NAME, os.O_RDWR | os.O_DIRECT | os.O_NOFOLLOW)
            if self.files.preadv(fd, [_aligned_page()], 0) != PAGE:
                raise OSError("short read of the first page")
        except OSError as error:
            self.io_reason = f"O_DIRECT does not work here: {error}"
            if fd >= 0:
                self.files.close(fd)
            return
        self._fd = fd
        self.is_direct = True


def open_drive(files: Files, directory: Path, *, slab_bytes: int, slabs: int) -> Drive:
    """Take the path's data file, making directory and file where there are none. Blocks for a few small writes.

    Raises Busy (another process has it), LayoutError (other sizes or version), Corrupt (not ours), Forbidden (a
    directory that others can write to, or somebody else's), TierFull (no room for the file), OSError. Each message
    names the path.
    """
    _prepare_directory(directory)
    fd, made = _open_or_create(files, directory / DATA_NAME)
    try:
        _lock(files, fd, directory)
        header = _settle(files, fd, directory, slab_bytes, slabs, made)
        return Drive(files, directory, header, fd)
    except BaseException:
        files.close(fd)
        raise


def open_existing(files: Files, directory: Path) -> Drive:
    """Take a path's data file with whatever sizes it has; makes nothing. Raises as `open_drive`."""
    fd = files.open(directory / DATA_NAME, os.O_RDWR | os.O_NOFOLLOW)
    try:
        _lock(files, fd, directory)
        return Drive(files, directory, _read_header(files, fd, directory / DATA_NAME), fd)
    except BaseException:
        files.close(fd)
        raise


def _prepare_directory(directory: Path) -> None:
    """Make the directory, or see to it that nobody but root and us can put something else in its place or into it.

    A link is followed, so that the checks are of what it leads to; whose the link is counts as well.
    """
    try:
        directory.mkdir(mode=DIRECTORY_MODE, parents=True)
        return
    except FileExistsError:
        pass
    found = directory.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise Forbidden(f"{directory} is not a directory")
    for uid in (directory.lstat().st_uid, found.st_uid):
        if uid not in (0, os.geteuid()):
            raise Forbidden(f"{directory}, or what it is a link to, belongs to uid {uid}, not to the daemon's user")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(found.st_mode)
        raise Forbidden(f"{directory} has mode {mode:04o} and can be written by others: take that away, chmod go-w")


def _open_or_create(files: Files, path: Path) -> tuple[int, bool]:
    """The descriptor, and whether the file was made just now."""
    try:
        return files.open(path, os.O_RDWR | os.O_NOFOLLOW), False
    except FileNotFoundError:
        return files.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW), True


def _lock(files: Files, fd: int, directory: Path) -> None:
    """A daemon that was killed holds its drive until its I/O process has ended too, a moment later."""
    until_s = time.monotonic() + LOCK_S
    while True:
        try:
            return files.lock(fd)
        except BlockingIOError:
            if time.monotonic() >= until_s:
                raise Busy(f"{directory} is in use by another daemon") from None
        _never.wait(_LOCK_AGAIN_S)


def _settle(files: Files, fd: int, directory: Path, slab_bytes: int, slabs: int, made: bool) -> DriveHeader:
    """The header of a file that is complete: an old one checked, a new one written, its space allocated."""
    path = directory / DATA_NAME
    size = file_bytes(slab_bytes, slabs)
    if made or _is_unfinished(files, fd, directory):
        _check_room(files, directory, size - files.size(fd))
        header = DriveHeader(os.urandom(16), slab_bytes, slabs, 0)
        for offset in _COPIES:
            if files.pwritev(fd, [encode_drive(header)], offset) != PAGE:
                raise TierFull(f"{path}: no room for its header")
        files.sync(fd)
        sync_directory(directory)
    else:
        header = _read_header(files, fd, path)
        _check_sizes(header, path, slab_bytes, slabs)
    held = files.size(fd)
    if held > size:
        raise LayoutError(f"{path} has {held} bytes, and its header says {size}: it is not touched")
    if held < size:
        _check_room(files, directory, size - held)
        files.allocate(fd, 0, size)
    return header


def _is_unfinished(files: Files, fd: int, directory: Path) -> bool:
    """A creation that was cut short before its header was on the medium: empty, or zeros where the header would be.

    Never where there is an index: that comes after the header, so the header was there once.
    """
    if (directory / INDEX_NAME).exists():
        return False
    head = bytearray(SLABS_OFFSET)
    got = files.preadv(fd, [head], 0) if files.size(fd) else 0
    return not any(head) and got in (0, len(head), files.size(fd))


def _check_sizes(header: DriveHeader, path: Path, slab_bytes: int, slabs: int) -> None:
    if (header.slab_bytes, header.slabs) != (slab_bytes, slabs):
        raise LayoutError(
            f"{path} was made with {header.slabs} slabs of {header.slab_bytes} bytes, and the configuration asks for "
            f"{slabs} of {slab_bytes}: restore the old sizes, or delete the directory to begin anew"
        )


def _check_room(files: Files, directory: Path, wanted: int) -> None:
    free = files.statvfs_free_bytes(directory)
    if free < wanted:
        raise TierFull(f"{directory} has {free} bytes free, and the data file needs {wanted} more")


def _read_header(files: Files, fd: int, path: Path) -> DriveHeader:
    """The newer of the two copies that are sound; raises what is wrong with the first when none is."""
    page = bytearray(PAGE)
    sound: list[DriveHeader] = []
    problem: Corrupt | LayoutError | None = None
    for offset in sorted(_COPIES):
        try:
            if files.preadv(fd, [page], offset) != PAGE:
                raise Corrupt("it is too short for a forebay data file")
            sound.append(decode_drive(bytes(page)))
        except (Corrupt, LayoutError) as error:
            problem = problem or error
    if not sound:
        assert problem is not None
        raise type(problem)(f"{path} is not touched: {problem}") from problem
    return max(sound, key=lambda header: header.epoch)


def sync_directory(directory: Path) -> None:
    """Make renames and new names in the directory last. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _aligned_page() -> memoryview:
    return memoryview(mmap.mmap(-1, PAGE))
