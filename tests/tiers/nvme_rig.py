"""What the NVMe tier's tests stand on: a small tier in a directory, host memory, and files that fail on demand."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forebay.tiers.files import FilesystemInfo, OsFiles
from forebay.tiers.nvme import NvmeTier
from forebay.tiers.nvme_format import PAGE
from forebay.tiers.nvme_io_process import MemoryHandle
from forebay.tiers.nvme_jobs import (
    Event,
    IoStatus,
    JobDone,
    LoadJob,
    NvmeOptions,
    RestoredBlock,
    RestoredBlocks,
    RestoreDone,
    RestoredSlabs,
    SlabOwner,
    WriteJob,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

SLAB = 1 << 20
SLABS = 7
BYTES = (SLABS + 1) * SLAB
SLOT = 8192
PAYLOAD = 8000
WAIT_S = 30.0
OWNER = SlabOwner(
    uid=1000,
    group_fingerprint=bytes(range(32)),
    rank=0,
    shard_size=1,
    block_bytes=PAYLOAD,
    slot_bytes=SLOT,
    hash_bytes=32,
    block_tokens=16,
    model="tiny",
)


def memory(blocks: int, slot_bytes: int = SLOT) -> list[memoryview]:
    """Host slots, page-aligned, zeroed."""
    whole = memoryview(mmap.mmap(-1, max(1, blocks) * slot_bytes))
    return [whole[at : at + slot_bytes] for at in range(0, blocks * slot_bytes, slot_bytes)]


def name(number: int) -> bytes:
    """The hash of block `number`; block 0 is a root and each one the parent of the next."""
    return number.to_bytes(4, "little") * 8


def content(number: int, size: int = PAYLOAD) -> bytes:
    return (number.to_bytes(4, "little") + b"kv of a block") * (size // 17 + 1)


class FaultyFiles(OsFiles):
    """The real files, with calls that fail, fall short or wait when a test says so."""

    def __init__(self) -> None:
        self.direct = True
        self.writes: list[Exception | int] = []
        """What the next pwritev calls answer: an error to raise or a number of bytes to claim."""
        self.reads: list[Exception | int] = []
        self.syncs: list[OSError] = []
        self.advised: list[int] = []
        self.sizes: list[int] = []
        """Bytes asked of each preadv and pwritev of more than a page."""
        self.free_bytes: int | None = None
        self.kind: FilesystemInfo | None = None
        self.gate = threading.Event()
        """Cleared, reads and writes of slots wait for it."""
        self.gate.set()
        self.waiting = threading.Semaphore(0)
        """Released once for each call that has come to the closed gate."""

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        if flags & os.O_DIRECT and not self.direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return super().open(path, flags, mode)

    def preadv(self, fd: int, buffers: Sequence[WriteableBuffer], offset: int) -> int:
        return self._do(super().preadv, self.reads, fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[ReadableBuffer], offset: int) -> int:
        return self._do(super().pwritev, self.writes, fd, buffers, offset)

    def sync(self, fd: int) -> None:
        if self.syncs:
            raise self.syncs.pop(0)
        super().sync(fd)

    def advise(self, fd: int, offset: int, length: int, advice: int) -> None:
        self.advised.append(advice)
        super().advise(fd, offset, length, advice)

    def statvfs_free_bytes(self, path: Path) -> int:
        return super().statvfs_free_bytes(path) if self.free_bytes is None else self.free_bytes

    def filesystem(self, path: Path) -> FilesystemInfo:
        return self.kind or super().filesystem(path)

    def _do(self, call: Callable[..., int], planned: list[Any], fd: int, buffers: Sequence[Any], offset: int) -> int:
        size = sum(map(len, buffers))
        if size > PAGE:
            self.sizes.append(size)
            if not self.gate.is_set():
                self.waiting.release()
                self.gate.wait(WAIT_S)
            if planned:
                answer = planned.pop(0)
                if isinstance(answer, Exception):
                    raise answer
                return int(answer)
        return call(fd, buffers, offset)


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Rig:
    """A tier with one namespace, driven as the owner thread would drive it."""

    def __init__(
        self,
        *paths: Path,
        files: FaultyFiles | None = None,
        memory: MemoryHandle | None = None,
        started: bool = True,
        **options: Any,
    ) -> None:
        settings = {"bytes_per_path": BYTES, "slab_bytes": SLAB, "index_batch_s": 0.01, **options}
        self.files = files or FaultyFiles()
        self.clock = Clock()
        self._woken = threading.Event()
        self.tier = NvmeTier(
            NvmeOptions(paths=paths, **settings),
            files=self.files,
            memory=memory,
            wake=self._woken.set,
            clock=self.clock,
        )
        self.done: dict[int, JobDone] = {}
        self.slabs: list[tuple[int, SlabOwner, int]] | None = None
        self.blocks: list[RestoredBlock] = []
        self.restored: RestoreDone | None = None
        self._next_id = 0
        if started:
            self.tier.start()

    def take(self, event: Event) -> None:
        if isinstance(event, JobDone):
            self.done[event.job_id] = event
        elif isinstance(event, RestoredSlabs):
            self.slabs = event.slabs
        elif isinstance(event, RestoredBlocks):
            self.blocks += event.blocks
        else:
            self.restored = event

    def until(self, condition: Callable[[], Any]) -> None:
        """Take events until the condition holds; a failure after WAIT_S."""
        deadline_s = time.monotonic() + WAIT_S
        while True:
            self._woken.clear()
            for event in self.tier.completed():
                self.take(event)
            if condition():
                return
            assert time.monotonic() < deadline_s, f"not within {WAIT_S} s: {self.tier.detail()}"
            self._woken.wait(0.05)

    def restore(self) -> RestoreDone:
        self.until(lambda: self.restored)
        assert self.restored is not None
        return self.restored

    def assign(self, slab: int = 0, owner: SlabOwner = OWNER, generation: int | None = None) -> None:
        self.tier.assign_slab(slab, owner, self.tier.first_generation if generation is None else generation)

    def places(self, numbers: Sequence[int], slab: int | Sequence[int] = 0) -> dict[str, Any]:
        slabs = [slab] * len(numbers) if isinstance(slab, int) else list(slab)
        return {
            "slot_bytes": SLOT,
            "payload_bytes": PAYLOAD,
            "namespace_id": OWNER.namespace_id(),
            "slabs": slabs,
            "slots": list(numbers),
            "hashes": [name(number) for number in numbers],
            "generations": [self.tier.first_generation] * len(numbers),
        }

    def write_job(self, numbers: Sequence[int], slab: int | Sequence[int] = 0, **changed: Any) -> WriteJob:
        """Block n into slot n, its parent block n - 1."""
        views = memory(len(numbers))
        for view, number in zip(views, numbers):
            view[:PAYLOAD] = content(number)[:PAYLOAD]
        self._next_id += 1
        names = {
            "parents": [name(number - 1) if number else b"" for number in numbers],
            "depths": list(numbers),
        }
        return WriteJob(job_id=self._next_id, **{"views": views, **self.places(numbers, slab), **names, **changed})

    def load_job(self, numbers: Sequence[int], slab: int | Sequence[int] = 0, **changed: Any) -> LoadJob:
        self._next_id += 1
        return LoadJob(job_id=self._next_id, **{"views": memory(len(numbers)), **self.places(numbers, slab), **changed})

    def wait(self, job: LoadJob | WriteJob) -> list[IoStatus]:
        self.until(lambda: job.job_id in self.done)
        return [IoStatus(status) for status in self.done[job.job_id].statuses]

    def write(self, numbers: Sequence[int], slab: int | Sequence[int] = 0, **changed: Any) -> list[IoStatus]:
        job = self.write_job(numbers, slab, **changed)
        self.tier.write(job)
        return self.wait(job)

    def load(self, numbers: Sequence[int], slab: int | Sequence[int] = 0, **changed: Any) -> list[IoStatus]:
        """Load and check: what is OK has the right bytes."""
        job = self.load_job(numbers, slab, **changed)
        self.tier.load(job)
        statuses = self.wait(job)
        for number, view, status in zip(numbers, job.views, statuses):
            assert status or view[:PAYLOAD] == content(number)[:PAYLOAD]
        return statuses

    def load_restored(self, blocks: Sequence[RestoredBlock]) -> list[IoStatus]:
        """Load what a restore has named, under the names and generations it gave."""
        numbers = [int.from_bytes(block[2][:4], "little") for block in blocks]
        return self.load(
            numbers,
            [block[0] for block in blocks],
            slots=[block[1] for block in blocks],
            hashes=[block[2] for block in blocks],
            generations=[block[5] for block in blocks],
        )

    def numbers(self) -> list[int]:
        """Which blocks a restore has named."""
        return sorted(int.from_bytes(block[2][:4], "little") for block in self.blocks)

    def errors(self) -> dict[str, int]:
        return dict(self.tier.detail().errors)

    def close(self) -> None:
        self.tier.close(WAIT_S)


def filled(path: Path, count: int, **options: Any) -> Rig:
    """A running tier with blocks 0 .. count-1 durable in slab 0."""
    rig = Rig(path, **options)
    rig.restore()
    rig.assign()
    job = rig.write_job(range(count))
    rig.tier.write(job)
    rig.until(lambda: rig.tier.flush() or job.job_id in rig.done)
    assert set(rig.wait(job)) == {IoStatus.OK}
    return rig


def crash(rig: Rig) -> None:
    """Let go of the files as the kernel does for a killed process: nothing is finished, nothing committed."""
    for unit in rig.tier._units:
        unit.restore.stop(time.monotonic() + WAIT_S)
        unit.drive.close()
