"""The bound of a drive: fio, with the block size, the queue depth and the kind of pages that the nvme tier works with.

The kind of pages under a buffer matters as much as the drive: a request from 4 KiB pages is cut into many pieces, and
on a virtual disk that halves the rate. So fio's buffers lie on what the daemon's slabs lie on, shared pages of 4 KiB or
huge ones.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from forebay.bench.figures import KIB, MIB
from forebay.bench.processes import BenchError

Direction = Literal["read", "write"]

MEMORY = {"4k": "mmapshared", "thp": "mmaphuge", "hugetlb": "mmaphuge"}
"""The daemon's kind of pages -> fio's; its buffers are a few MiB, so a small pool of huge pages does."""
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
        self._memory = MEMORY[pages]
        self._engine = next(filter(self._works, _ENGINES), _ENGINES[-1])
        self._run("write", "--rw=write", f"--bs={2 * MIB}", "--iodepth=8", "--end_fsync=1")

    def random(self, direction: Direction, block_bytes: int, depth: int, seconds: float) -> Rate:
        """Random reads or writes of whole blocks, past the page cache."""
        timed = ("--time_based", f"--runtime={seconds * 1000:.0f}ms")
        return self._run(direction, f"--rw=rand{direction}", f"--bs={block_bytes}", f"--iodepth={depth}", *timed)

    def describe(self) -> str:
        return f"fio {self._engine}, buffers {self._memory}"

    def _works(self, engine: str) -> bool:
        """io_uring may be forbidden, and libaio not be built in."""
        self._engine = engine
        try:
            self._run("write", "--rw=write", f"--bs={4 * KIB}", "--iodepth=1", f"--io_size={4 * KIB}")
        except BenchError:
            return False
        return True

    def _run(self, direction: Direction, *options: str) -> Rate:
        common = (
            "fio",
            "--name=bench",
            f"--filename={self._file}",
            f"--size={self._file_bytes}",
            f"--ioengine={self._engine}",
            f"--mem={self._memory}",
            "--direct=1",
            "--output-format=json",
        )
        done = subprocess.run([*common, *options], capture_output=True, text=True, timeout=_SPARE_S, check=False)
        try:
            job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        except (ValueError, KeyError, IndexError):
            raise BenchError(f"fio: {(done.stderr or done.stdout)[-300:].strip()}") from None
        if done.returncode or job["error"]:
            raise BenchError(f"fio ended with status {done.returncode}: {done.stderr[-300:].strip()}")
        return Rate(float(job[direction]["bw_bytes"]), (job["usr_cpu"] + job["sys_cpu"]) / 100)
