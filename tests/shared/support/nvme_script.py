"""An NVMe tier of one simulated drive, told step by step what to do: for cases a simulation found."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from pathlib import Path

from forebay.tiers.nvme import NvmeTier
from forebay.tiers.nvme_jobs import (
    IoStatus,
    JobDone,
    NvmeOptions,
    RestoredBlock,
    RestoredBlocks,
    RestoreDone,
    RestoredSlabs,
    SlabOwner,
    WriteJob,
)
from support.nvme_model import Shape
from support.sim_files import SimFiles

SLAB_BYTES = 128 << 10
WAIT_S = 10.0


class Script:
    """Started and restored when made; `slabs` and `blocks` are what the restore told."""

    def __init__(self, folder: Path, files: SimFiles) -> None:
        self.files = files
        self.slabs: list[tuple[int, SlabOwner, int]] = []
        self.blocks: list[RestoredBlock] = []
        self._restored = False
        self._done: dict[int, JobDone] = {}
        self._woken = threading.Event()
        options = NvmeOptions(paths=(folder / "drive",), bytes_per_path=2 << 20, slab_bytes=SLAB_BYTES)
        self.tier = NvmeTier(options, files=files, wake=self._woken.set)
        self.tier.start()
        self._next_generation = self.tier.first_generation + 10
        self.until(lambda: self._restored)

    def write(self, shape: Shape, slot: int) -> None:
        """Make a block durable in slab 0."""
        self._next_generation += 1
        job_id = self._next_generation
        self.tier.write(
            WriteJob(
                job_id=job_id,
                slot_bytes=shape.slot_bytes,
                payload_bytes=shape.payload_bytes,
                namespace_id=shape.owner.namespace_id(),
                slabs=[0],
                slots=[slot],
                hashes=[bytes([slot]) * 32],
                generations=[self._next_generation],
                views=[memoryview(mmap.mmap(-1, shape.slot_bytes))],
                parents=[b""],
                depths=[0],
            )
        )
        self.until(lambda: job_id in self._done)
        assert list(self._done[job_id].statuses) == [IoStatus.OK]

    def killed(self) -> SimFiles:
        """The machine after the process was killed."""
        survivor = self.files.process_kill()
        self.tier.close(WAIT_S)
        return survivor

    def until(self, done: Callable[[], bool]) -> None:
        for _ in range(int(WAIT_S / 0.01)):
            for event in self.tier.completed():
                if isinstance(event, JobDone):
                    self._done[event.job_id] = event
                elif isinstance(event, RestoredSlabs):
                    self.slabs += event.slabs
                elif isinstance(event, RestoredBlocks):
                    self.blocks += event.blocks
                elif isinstance(event, RestoreDone):
                    self._restored = True
            if done():
                return
            self._woken.wait(0.01)
            self._woken.clear()
        raise AssertionError(f"nothing came of it in {WAIT_S} s")
