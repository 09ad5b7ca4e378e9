"""Starts with many blocks on the drive: when the daemon answers, when all are there, and what they cost in memory.

The drive's state is written by the tier itself, in this process, through the same jobs that a daemon gives it: a client
would take minutes. It is in the page cache then, and the daemon starts on a warm one.
"""

from __future__ import annotations

import mmap
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from forebay.bench.engine_memory import INDEX, chain
from forebay.bench.figures import MIB, Figure
from forebay.bench.footprint import own_bytes
from forebay.bench.nvme import SLAB_BYTES, nvme_settings
from forebay.bench.plan import Plan, pinned
from forebay.bench.processes import BenchError, Daemon, pause, wait_until
from forebay.client import Client
from forebay.tiers.nvme import NvmeTier
from forebay.tiers.nvme_format import SLABS_OFFSET, slots_per_slab
from forebay.tiers.nvme_jobs import IoStatus, JobDone, NvmeOptions, RestoreDone, SlabOwner, WriteJob

BLOCKS, BLOCKS_QUICK = 1_000_000, 100_000
CHAIN_BLOCKS = 250
HOST_BYTES = 256 * MIB
NAMES = ("start_ms_1m_blocks", "visible_s_1m_blocks", "index_bytes_per_block")
SETTLE_S = 2.0
_STARTS = 3
_JOBS_MAX = 8
_WRITE_S = 120.0
_POLL_S = 0.001
_LOOK_S = 0.02


def restart(plan: Plan) -> Iterator[Figure]:
    """A daemon that finds them, again and again; the best of its starts counts."""
    blocks = plan.pick(BLOCKS_QUICK, BLOCKS)
    path = plan.on_drive / "million"
    try:
        plan.progress(f"{blocks} blocks onto the drive")
        drive_bytes = write_blocks(path, blocks)
        plan.progress("starts with them")
        starts, visible, full_bytes = [], [], 0.0
        for number in range(_STARTS):
            with pinned(plan.cores.client), _daemon(plan, f"million-{number}", path, drive_bytes) as daemon:
                daemon.ready(step_s=_POLL_S)
                starts.append(time.monotonic() - daemon.started_s)
                with daemon.client() as client:
                    _wait_for(client, blocks)
                    visible.append(time.monotonic() - daemon.started_s)
                    if not number:
                        _look_up_all(client, blocks)
                pause(SETTLE_S)
                full_bytes = own_bytes(daemon.pid)
    finally:
        shutil.rmtree(path, ignore_errors=True)
    empty_bytes = _empty_bytes(plan)
    note = f"{blocks} blocks of {INDEX.block_bytes} bytes, warm page cache, best of {_STARTS}"
    yield Figure(NAMES[0], min(starts) * 1e3, "ms", samples={"ms": [each * 1e3 for each in starts]}, note=note)
    yield Figure(NAMES[1], min(visible), "s", samples={"s": visible}, note=f"{note}; from exec to the last of them")
    told = f"{empty_bytes / MIB:.1f} MiB without, {full_bytes / MIB:.1f} MiB with {blocks} (VmRSS less RssShmem)"
    yield Figure(NAMES[2], (full_bytes - empty_bytes) / blocks, "B", note=told)


def write_blocks(path: Path, blocks: int) -> int:
    """Make a drive that holds this many blocks, in chains of CHAIN_BLOCKS; returns its size. Raises BenchError."""
    per_slab = slots_per_slab(SLAB_BYTES, INDEX.block_bytes)
    slabs = -(-blocks // per_slab)
    size = SLABS_OFFSET + slabs * SLAB_BYTES
    woken = threading.Event()
    tier = NvmeTier(NvmeOptions(paths=(path,), bytes_per_path=size, slab_bytes=SLAB_BYTES), wake=woken.set)
    tier.start()
    try:
        _Writer(tier, woken).write(blocks, slabs, per_slab)
    finally:
        tier.close(_WRITE_S)
    return size


class _Writer:
    """Gives the tier its jobs, a few at a time."""

    def __init__(self, tier: NvmeTier, woken: threading.Event) -> None:
        self._tier = tier
        self._woken = woken
        self._restored = False
        self._under_way = 0
        self._view = memoryview(mmap.mmap(-1, INDEX.block_bytes))

    def write(self, blocks: int, slabs: int, per_slab: int) -> None:
        self._until(lambda: self._restored)
        owner, generation = _owner(), self._tier.first_generation
        for slab in range(slabs):
            self._tier.assign_slab(slab, owner, generation)
        for number in range(blocks // CHAIN_BLOCKS):
            self._until(lambda: self._under_way < _JOBS_MAX)
            places = [divmod(block, per_slab) for block in range(number * CHAIN_BLOCKS, (number + 1) * CHAIN_BLOCKS)]
            self._under_way += 1
            self._tier.write(self._job(number, owner.namespace_id(), places, generation))
        self._until(lambda: not self._under_way)

    def _job(self, number: int, namespace: bytes, places: list[tuple[int, int]], generation: int) -> WriteJob:
        hashes = _chain(number)
        return WriteJob(
            job_id=number,
            slot_bytes=INDEX.block_bytes,
            payload_bytes=INDEX.block_bytes,
            namespace_id=namespace,
            slabs=[slab for slab, _ in places],
            slots=[slot for _, slot in places],
            hashes=hashes,
            generations=[generation] * len(places),
            views=[self._view] * len(places),
            parents=[b"", *hashes[:-1]],
            depths=range(len(places)),
        )

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + _WRITE_S
        while not condition():
            if time.monotonic() > deadline_s:
                raise BenchError(f"writing blocks: not within {_WRITE_S:g} s")
            self._woken.wait(_LOOK_S)
            self._woken.clear()
            for event in self._tier.completed():
                self._restored |= isinstance(event, RestoreDone)
                if isinstance(event, JobDone):
                    self._under_way -= 1
                    if event.statuses.count(IoStatus.OK) != len(event.statuses):
                        raise BenchError(f"blocks were not written: {self._tier.detail().errors}")


def _chain(number: int) -> list[bytes]:
    return chain(f"million {number}", CHAIN_BLOCKS)


def _owner() -> SlabOwner:
    """The namespace as the daemon will know it when this user opens it."""
    spec = INDEX.spec.merged()
    return SlabOwner(
        uid=os.geteuid(),
        group_fingerprint=spec.group_fingerprint(),
        rank=spec.shard_rank,
        shard_size=spec.shard_size,
        block_bytes=spec.block_bytes,
        slot_bytes=INDEX.block_bytes,
        hash_bytes=spec.hash_bytes,
        block_tokens=spec.block_tokens,
        model=spec.model,
    )


def _daemon(plan: Plan, name: str, path: Path, nvme_bytes: int) -> Daemon:
    settings = nvme_settings(path, nvme_bytes)
    return Daemon(plan.directory / name, HOST_BYTES, cores=plan.cores.free, settings=settings)


def _wait_for(client: Client, blocks: int) -> None:
    """Until so many have been taken in and no more are to come."""

    def restored() -> bool:
        status = client.status()
        return bool(status["nvme"]["restored"]) and int(status["store"]["counters"]["restored_blocks"]) >= blocks

    wait_until(restored, _WRITE_S, "finding the blocks", step_s=_LOOK_S)


def _look_up_all(client: Client, blocks: int) -> None:
    """All are there by their hashes, and a chain by its bytes too: the daemon checks what it reads."""
    namespace = client.open_namespace(INDEX.spec)
    found = sum(client.lookup(namespace, _chain(number)).blocks for number in range(blocks // CHAIN_BLOCKS))
    if found != blocks:
        raise BenchError(f"{found} of {blocks} blocks are there after a start")
    with client.acquire(namespace, _chain(0)) as lease:
        if lease.wait() != CHAIN_BLOCKS:
            raise BenchError(f"a chain of {CHAIN_BLOCKS} blocks could not be read back")


def _empty_bytes(plan: Plan) -> float:
    """The same daemon with nothing on its drive."""
    path = plan.on_drive / "none"
    with pinned(plan.cores.client), _daemon(plan, "none", path, SLABS_OFFSET + SLAB_BYTES) as daemon:
        daemon.ready()
        with daemon.client() as client:
            _wait_for(client, 0)
        pause(SETTLE_S)
        return own_bytes(daemon.pid)
