"""What the tiers on disk ask of the operating system for block I/O, behind one seam.

`OsFiles` is the real thing; tests put a disk in its place that tears writes, loses them, turns slow or full. The seam
covers the one large data file of a drive and nothing else: directories and the index go to the system directly, since
LMDB maps its file and cannot be led through here.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_MOUNTS = Path("/proc/self/mountinfo")
_BLOCK_DEVICES = Path("/sys/dev/block")
_VIRTIO = re.compile(r"virtio\d+")


@dataclass(frozen=True, slots=True)
class FilesystemInfo:
    """Where a path lies: the filesystem's name as the kernel has it ("ext4", "tmpfs", "nfs4"; "" when unknown)."""

    kind: str
    is_system_disk: bool
    is_virtual_disk: bool = False
    """On a disk whose host copies each byte: virtio, or such a one under LVM, dm-crypt or a RAID."""


class Files(Protocol):
    """Descriptors and positions, as the kernel has them. Any call may raise OSError and may block on the disk."""

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        """A descriptor of our own, never inherited by a child process; the caller closes it."""

    def close(self, fd: int) -> None: ...

    def lock(self, fd: int) -> None:
        """Take the file for this open descriptor alone, at once; raises BlockingIOError when another has it."""

    def size(self, fd: int) -> int: ...

    def allocate(self, fd: int, offset: int, length: int) -> None:
        """Take the disk's space for the range now; bytes that were never written read as zeros."""

    def preadv(self, fd: int, buffers: Sequence[WriteableBuffer], offset: int) -> int:
        """Fill the buffers in order; returns the bytes read, which may be fewer than asked for."""

    def pwritev(self, fd: int, buffers: Sequence[ReadableBuffer], offset: int) -> int:
        """Write the buffers in order; returns the bytes written, which may be fewer than asked for."""

    def sync(self, fd: int) -> None:
        """Return when all that was written has reached the medium."""

    def advise(self, fd: int, offset: int, length: int, advice: int) -> None:
        """posix_fadvise."""

    def statvfs_free_bytes(self, path: Path) -> int:
        """Room left for us on the path's filesystem."""

    def filesystem(self, path: Path) -> FilesystemInfo: ...


class OsFiles:
    """The operating system's own calls; all that touch the disk release the GIL."""

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def close(self, fd: int) -> None:
        os.close(fd)

    def lock(self, fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def allocate(self, fd: int, offset: int, length: int) -> None:
        os.posix_fallocate(fd, offset, length)

    def preadv(self, fd: int, buffers: Sequence[WriteableBuffer], offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[ReadableBuffer], offset: int) -> int:
        return os.pwritev(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        os.fdatasync(fd)

    def advise(self, fd: int, offset: int, length: int, advice: int) -> None:
        os.posix_fadvise(fd, offset, length, advice)

    def statvfs_free_bytes(self, path: Path) -> int:
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize

    def filesystem(self, path: Path) -> FilesystemInfo:
        """By the mount the path lies on, and by whether its disk, or a partition of it, also holds the root."""
        ours, root = os.stat(path).st_dev, os.stat("/").st_dev
        on_system_disk = ours == root or _disk(ours) == _disk(root) != ""
        return FilesystemInfo(_mounted_kind(path.resolve()), on_system_disk, is_virtual(_entry(ours)))


def _mounted_kind(path: Path) -> str:
    """The type of the deepest mount above the path; of two at one place the later hides the earlier."""
    best, kind = -1, ""
    for line in _MOUNTS.read_text().splitlines():
        fields = line.split()
        if "-" not in fields:
            continue
        mount = fields[4].encode().decode("unicode_escape")  # blanks are written \040
        if path.is_relative_to(mount) and len(mount) >= best:
            best, kind = len(mount), fields[fields.index("-") + 1]
    return kind


def is_virtual(device: Path) -> bool:
    """Whether a block device, by its folder in /sys, is virtio's or stands on one that is."""
    if not device.exists():
        return False
    return any(_VIRTIO.fullmatch(name) for name in device.resolve().parts) or any(
        is_virtual(below) for below in device.glob("slaves/*")
    )


def _entry(device: int) -> Path:
    """Where /sys describes a device number; nowhere for overlays and networks."""
    return _BLOCK_DEVICES / f"{os.major(device)}:{os.minor(device)}"


def _disk(device: int) -> str:
    """The whole disk behind a device number; empty when none is known."""
    entry = _entry(device)
    if not entry.exists():
        return ""
    found = entry.resolve()
    return (found.parent if (found / "partition").exists() else found).name
