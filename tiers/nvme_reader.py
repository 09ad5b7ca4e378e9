"""The parent's side of nvme_walk.py: starts the child, reads its frames, and believes nothing but a clean answer.

The child may die of a damaged index, loop in it, or be killed; a wait has a deadline and each frame a bound.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import IO

from forebay.kvstore.errors import Corrupt
from forebay.tiers.nvme_drive import Drive, sync_directory
from forebay.tiers.nvme_format import SLAB_KEY_BYTES, SLAB_RECORD_BYTES, decode_slab_record
from forebay.tiers.nvme_jobs import RestoredBlock, SlabOwner
from forebay.tiers.nvme_walk import BLOCKS, END, FRAME, INDEX_FILE, KEY_BYTES, PROBLEM, SLABS, TOTALS, told_struct

Assigned = tuple[int, SlabOwner, int]

_WALKER = (sys.executable, "-P", "-m", "forebay.tiers.nvme_walk")
_COPY_PREFIX = "index.copy-"
_INDEX_BYTES_PER_S = 20 << 20
_BODY_BYTES_MAX = 64 << 20
_SLAB_BYTES = SLAB_KEY_BYTES + SLAB_RECORD_BYTES
_PIPE_BYTES = 1 << 20
_EXIT_S = 10.0
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""What a service manager or a terminal sends to the child as well as to the daemon, which ends it itself when it stops.
Died of one, its silence would be taken for a broken index.
"""


class IndexReader:
    """One reading of one drive's index. `read` is one thread's, `kill` anybody's."""

    def __init__(self, drive: Drive, timeout_s: float) -> None:
        """`timeout_s` is how long the child may stay silent; at first longer, by the size of the index."""
        self.blocks_expected = 0
        self.stale = 0
        """Records of earlier owners of slabs, not told."""
        self._drive = drive
        self._timeout_s = timeout_s
        self._index = drive.index_directory
        self._copy = drive.directory / f"{_COPY_PREFIX}{os.getpid()}"
        self._child: subprocess.Popen[bytes] | None = None
        self._killed = False

    def exists(self) -> bool:
        """Whether there is an index to read."""
        return (self._index / INDEX_FILE).exists()

    def first_s(self) -> float:
        """How long the child may stay silent at first. Raises OSError."""
        return self._timeout_s + (self._index / INDEX_FILE).stat().st_size / _INDEX_BYTES_PER_S

    def read(self) -> Iterator[list[Assigned] | tuple[bytes, list[RestoredBlock]]]:
        """The assigned slabs, once the index has been walked whole; then blocks with their keys, parents first.

        Raises Corrupt or OSError for anything else; what was told before that is right all the same.
        """
        self.remove_copies()
        try:
            yield from self._read(self._start())
        except (struct.error, subprocess.TimeoutExpired) as error:
            raise Corrupt(f"its reader's answer makes no sense: {error}") from error
        finally:
            self._end()

    def adopt_copy(self) -> None:
        """Put the walked copy in the index's place; only after the slabs have been told. Raises OSError."""
        if (self._copy / INDEX_FILE).exists():  # else the disk was too full for one
            os.replace(self._copy / INDEX_FILE, self._index / INDEX_FILE)
            sync_directory(self._index)

    def kill(self) -> None:
        """Make `read` end soon."""
        self._killed = True
        child = self._child
        if child is not None:
            child.kill()

    def remove_copies(self) -> None:
        """What a child left behind that died with its daemon."""
        for path in self._drive.directory.glob(f"{_COPY_PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _start(self) -> IO[bytes]:
        header = self._drive.header
        sizes = (header.drive_id.hex(), str(header.slab_bytes), str(header.slabs))
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)  # the child inherits what is blocked
        try:
            child = subprocess.Popen(
                [*_WALKER, str(self._index), str(self._copy), *sizes],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pipesize=_PIPE_BYTES,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._child = child
        if self._killed:
            child.kill()
        assert child.stdout is not None
        return child.stdout

    def _read(self, stream: IO[bytes]) -> Iterator[list[Assigned] | tuple[bytes, list[RestoredBlock]]]:
        told = 0
        first_s = self.first_s()
        longest = max(_BODY_BYTES_MAX, TOTALS.size + self._drive.slabs * _SLAB_BYTES)
        for kind, hash_len, parent_len, count, body in _frames(stream.fileno(), longest, first_s, self._timeout_s):
            if kind == SLABS:
                self.blocks_expected, self.stale = TOTALS.unpack_from(body)
                yield _slabs_of(body[TOTALS.size :], count)
            elif kind == BLOCKS:
                told += count
                blocks = list(told_struct(hash_len, parent_len).iter_unpack(body[count * KEY_BYTES :]))
                if len(blocks) != count:
                    raise Corrupt(f"{len(blocks)} blocks in a frame of {count}")
                yield bytes(body[: count * KEY_BYTES]), blocks
            else:
                raise Corrupt(bytes(body[:500]).decode(errors="replace") if kind == PROBLEM else "an unknown frame")
        assert self._child is not None
        status = self._child.wait(_EXIT_S)
        if status or told != self.blocks_expected:
            raise Corrupt(f"its reader ended with {status} after {told} of {self.blocks_expected} blocks")

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs at the drive is left to the kernel
                child.wait(_EXIT_S)
            if child.stdout is not None:
                child.stdout.close()
        shutil.rmtree(self._copy, ignore_errors=True)


def _slabs_of(body: memoryview, count: int) -> list[Assigned]:
    return [
        decode_slab_record(bytes(body[at : at + SLAB_KEY_BYTES]), bytes(body[at + SLAB_KEY_BYTES : at + _SLAB_BYTES]))
        for at in range(0, count * _SLAB_BYTES, _SLAB_BYTES)
    ]


def _frames(fd: int, longest: int, first_s: float, next_s: float) -> Iterator[tuple[int, int, int, int, memoryview]]:
    """The child's frames up to END; raises Corrupt for anything else, or when the next takes too long."""
    wait_s = first_s
    while True:
        kind, hash_len, parent_len, count, length = FRAME.unpack(_read(fd, FRAME.size, wait_s))
        if length > longest:
            raise Corrupt("a frame too long")
        body = _read(fd, length, next_s)
        if kind == END:
            return
        yield kind, hash_len, parent_len, count, body
        wait_s = next_s


def _read(fd: int, length: int, timeout_s: float) -> memoryview:
    """Exactly `length` bytes of a pipe by the deadline, else Corrupt."""
    view = memoryview(bytearray(length))
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    deadline_s = time.monotonic() + timeout_s
    at = 0
    while at < length:
        if not poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
            raise Corrupt(f"its reader said nothing for {timeout_s:.0f} s")
        got = os.readv(fd, [view[at:]])
        if not got:
            raise Corrupt("its reader ended in the middle")
        at += got
    return view
