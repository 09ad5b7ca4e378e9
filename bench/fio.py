"""The bound of a drive: fio, with the block size, the queue depth and the kind of pages that the nvme tier works with.

The pages under a buffer matter as much as the drive: a request is cut into as many pieces as its pages are scattered in
physical memory, and on a virtual disk that halves the rate. fio's own buffers are scattered or not by turns, as the
kernel hands out again what the last run gave back. So its buffers lie on memory that was had at the start and populated
as the daemon's slabs are, other parts of it in each run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from forebay.bench.figures import KIB, MIB
from forebay.bench.processes import BenchError, Process
from forebay.tiers.memory import Memory

Direction = Literal["read", "write"]

_BUFFERS = 8
_BUFFER_BYTES = 32 * MIB
"""More than fio takes at any depth used here; it gives the rest back."""
_ENGINES = ("io_uring", "libaio", "psync")
_SPARE_S = 60.0


@dataclass(frozen=True, slots=True)
class Rate:
    """What fio reached: bytes and CPU seconds per second of wall time."""

    bytes_per_s: float
    cpu_share: float

    @property
    def cpu_s_per_gb(self) -> float:
        return self.cpu_share / self.bytes_per_s * 1e9


class Fio:
    """fio on a file of its own, written once, so that no request is the first to its place.

    Args:
        directory: on the file system to measure; the file is left for whoever removes the directory.
        pages: the kind of pages of the daemon's slabs, as its status names it.
    """

    def __init__(self, directory: Path, file_bytes: int, pages: str) -> None:
        """Blocks until the file is written. Raises BenchError without fio."""
        if shutil.which("fio") is None:
            raise BenchError("fio is not installed (Debian: apt-get install fio)")
        self._file = directory / "fio.dat"
        self._file_bytes = file_bytes
        self._pages = pages
        self._buffers = deque([] if pages == "hugetlb" else [_populated(pages) for _ in range(_BUFFERS)])
        self._engine = next(filter(self._works, _ENGINES), _ENGINES[-1])
        self._run("write", "--rw=write", f"--bs={2 * MIB}", "--iodepth=8", "--end_fsync=1")

    def random(self, direction: Direction, block_bytes: int, depth: int, seconds: float) -> Rate:
        """Random reads or writes of whole blocks, past the page cache."""
        timed = ("--time_based", f"--runtime={seconds * 1000:.0f}ms")
        return self._run(direction, f"--rw=rand{direction}", f"--bs={block_bytes}", f"--iodepth={depth}", *timed)

    def describe(self) -> str:
        return f"fio {self._engine}, buffers on {self._pages} pages"

    def _works(self, engine: str) -> bool:
        """io_uring may be forbidden, and libaio not be built in."""
        self._engine = engine
        try:
            self._run("write", "--rw=write", f"--bs={4 * KIB}", "--iodepth=1", f"--io_size={4 * KIB}")
        except BenchError:
            return False
        return True

    def beside(self, direction: Direction, block_bytes: int, depth: int, log: Path) -> Process:
        """A fio that goes on until it is stopped, for what others reach meanwhile."""
        options = (f"--rw=rand{direction}", f"--bs={block_bytes}", f"--iodepth={depth}", "--time_based", "--runtime=1h")
        return Process("fio", [*self._common(), *options], log)

    def close(self) -> None:
        """Give the memory back. Idempotent."""
        while self._buffers:
            os.close(self._buffers.pop())

    def _common(self) -> tuple[str, ...]:
        return (
            "fio",
            "--name=bench",
            f"--filename={self._file}",
            f"--size={self._file_bytes}",
            f"--ioengine={self._engine}",
            f"--mem={self._memory()}",
            "--direct=1",
            "--output-format=json",
        )

    def _memory(self) -> str:
        if not self._buffers:
            return "mmaphuge"
        self._buffers.rotate()
        return f"mmapshared:/proc/{os.getpid()}/fd/{self._buffers[0]}"

    def _run(self, direction: Direction, *options: str) -> Rate:
        command = [*self._common(), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SPARE_S, check=False)
        try:
            job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        except (ValueError, KeyError, IndexError):
            raise BenchError(f"fio: {(done.stderr or done.stdout)[-300:].strip()}") from None
        if done.returncode or job["error"]:
            raise BenchError(f"fio ended with status {done.returncode}: {done.stderr[-300:].strip()}")
        return Rate(float(job[direction]["bw_bytes"]), (job["usr_cpu"] + job["sys_cpu"]) / 100)


def _populated(pages: str) -> int:
    """A memfd whose pages were had piece by piece, in order, as those of a slab."""
    memory = Memory()
    fd = os.memfd_create("fio", os.MFD_CLOEXEC)
    os.ftruncate(fd, _BUFFER_BYTES)
    address = memory.map(fd, 0, _BUFFER_BYTES)
    if pages == "thp":
        memory.advise_huge(address, _BUFFER_BYTES)
    memory.populate(address, _BUFFER_BYTES)
    memory.unmap(address, _BUFFER_BYTES)
    return fd
