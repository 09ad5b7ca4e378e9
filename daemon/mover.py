"""Between the store and the nvme tier: effects become jobs on host memory, and their ends the store's next events.

Owned by the owner thread. It names memory and never touches it: the tier's threads read and write the slots.
"""

from __future__ import annotations

import ctypes
import logging
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

from forebay.daemon.live_slabs import LiveSlabs
from forebay.daemon.logging import fields
from forebay.kvstore.groups import NVME, Direction, DriveSlabAssigned, Effects, Shard, Transfer
from forebay.kvstore.movement import Verdict
from forebay.kvstore.store import Store
from forebay.tiers.nvme import NvmeTier
from forebay.tiers.nvme_jobs import (
    IoStatus,
    JobDone,
    LoadJob,
    NvmeInfo,
    RestoredBlocks,
    RestoreDone,
    RestoredSlabs,
    SlabOwner,
    WriteJob,
)

log = logging.getLogger(__name__)

_OWNERS_MAX = 1024
BEGIN_MAX = 4
"""Transfers begun in one turn of the owner; about 20 us each."""

VERDICTS = {
    IoStatus.OK: Verdict.OK,
    IoStatus.CANCELLED: Verdict.CANCELLED,
    IoStatus.IO_ERROR: Verdict.FAILED,
    IoStatus.BAD_HEADER: Verdict.CORRUPT,
    IoStatus.BAD_PAYLOAD: Verdict.CORRUPT,
    IoStatus.OTHER_BLOCK: Verdict.STALE,
    IoStatus.NO_SPACE: Verdict.FAILED,
    IoStatus.DOWN: Verdict.CANCELLED,
}
_TABLE = bytes(VERDICTS[IoStatus(byte)] if byte in set(IoStatus) else Verdict.FAILED for byte in range(256))


class Mover:
    """Carries out what the store decided about the nvme tier, and tells it what came of it."""

    def __init__(self, store: Store, tier: NvmeTier, memory: LiveSlabs) -> None:
        self._store = store
        self._tier = tier
        self._memory = memory
        self._to_begin: deque[Transfer] = deque()
        self._owners: dict[int, tuple[SlabOwner, bytes]] = {}

    @property
    def has_more(self) -> bool:
        """Transfers are left that `go_on` has to begin."""
        return bool(self._to_begin)

    def carry_out(self, effects: Effects, freed: Sequence[int], now: float) -> None:
        """To be called after the memory of new slabs was had, with the numbers of what was freed; never waits."""
        if freed:
            self._tier.drop_memory(freed)
        if effects.forgotten:
            self._tier.forget(effects.forgotten)
        for change in effects.drive_slabs:
            if isinstance(change, DriveSlabAssigned):
                self._tier.assign_slab(change.physical, self._owner(change.shard)[0], change.generation)
            else:
                self._tier.retire_slab(change.physical)
        self._to_begin += effects.transfers
        if effects.cancelled:
            self._cancel(effects.cancelled, now)

    def go_on(self, now: float) -> None:
        """Begin a few of the transfers that were decided on: a long prefetch keeps nobody waiting for his answer."""
        for _ in range(min(BEGIN_MAX, len(self._to_begin))):
            transfer = self._to_begin.popleft()
            try:
                self._begin(transfer, now)
            except Exception as error:  # a bug must cost its transfer, and nobody else's answer
                log.error("bug while a transfer was begun", exc_info=error, extra=fields(id=transfer.transfer_id))
                self._give_back(transfer, now, Verdict.FAILED)

    def _cancel(self, transfer_ids: Collection[int], now: float) -> None:
        """A long fetch that is given up is thousands of transfers, hardly any of which the tier knows yet."""
        cancelled = set(transfer_ids)
        unbegun = [transfer for transfer in self._to_begin if transfer.transfer_id in cancelled]
        self._to_begin = deque(transfer for transfer in self._to_begin if transfer.transfer_id not in cancelled)
        for transfer_id in cancelled.difference(transfer.transfer_id for transfer in unbegun):
            self._tier.cancel(transfer_id)
        for transfer in unbegun:
            self._give_back(transfer, now)

    def collect(self, now: float) -> None:
        """Tell the store all that has ended or was found since the last call."""
        for event in self._tier.completed():
            if isinstance(event, JobDone):
                self._store.transfer_done(event.job_id, event.statuses.translate(_TABLE), event.checksums, now)
            elif isinstance(event, RestoredSlabs):
                self._store.restore_slabs(event.slabs, self._tier.first_generation)
            elif isinstance(event, RestoredBlocks):
                self._store.restore_blocks(event.blocks, now)
            else:
                self._restored(event)

    def detail(self) -> NvmeInfo:
        return self._tier.detail()

    def _begin(self, transfer: Transfer, now: float) -> None:
        shard, index = transfer.shard, transfer.shard.group.index
        memory = self._memory_of(transfer)
        if memory is None:  # its slab's memory could not be had
            self._give_back(transfer, now)
            return
        places = [shard.spaces[NVME].place(slot) for slot in transfer.nvme_slots]
        space = shard.spaces[NVME]
        common: dict[str, Any] = {
            "job_id": transfer.transfer_id,
            "slot_bytes": space.slot_bytes,
            "payload_bytes": space.block_bytes,
            "namespace_id": self._owner(shard)[1],
            "slabs": [slab for slab, _ in places],
            "slots": [slot for _, slot in places],
            "hashes": [index.hashes[row] or b"" for row in transfer.rows],
            "generations": transfer.generations,
            "memory": memory,
        }
        if transfer.direction == Direction.LOAD:
            self._tier.load(LoadJob(**common))
            return
        above = [index.parents[row] for row in transfer.rows]
        parents = [(index.hashes[row] or b"") if row >= 0 else b"" for row in above]
        self._tier.write(WriteJob(**common, parents=parents, depths=[index.depths[row] for row in transfer.rows]))

    def _give_back(self, transfer: Transfer, now: float, verdict: Verdict = Verdict.CANCELLED) -> None:
        """End a transfer that the tier does not know of."""
        count = len(transfer.rows)
        self._store.transfer_done(transfer.transfer_id, [verdict] * count, [0] * count, now)

    def _owner(self, shard: Shard) -> tuple[SlabOwner, bytes]:
        """What the disk needs to know of a shard, and its namespace's id, a hash worth keeping."""
        known = self._owners.get(shard.ns)
        if known is None:
            if len(self._owners) >= _OWNERS_MAX:
                self._owners.clear()
            owner = _owner(shard)
            known = self._owners[shard.ns] = owner, owner.namespace_id()
        return known

    def _memory_of(self, transfer: Transfer) -> list[tuple[int, int]] | None:
        """Number of the memory and byte offset of each host slot."""
        shard = transfer.shard
        size, per_slab = shard.slots.slot_bytes, shard.slots.slots_per_slab
        memory = []
        for host_slot in transfer.host_slots:
            serial, slot = divmod(host_slot, per_slab)
            number = self._memory.memory(shard.ns, serial)
            if number is None:
                return None
            memory.append((number, slot * size))
        return memory

    def _restored(self, event: RestoreDone) -> None:
        self._store.restore_done()
        _trim()
        for problem in event.problems:
            log.warning("the nvme tier was not all restored from its indexes", extra=fields(reason=problem))
        seconds = round(event.seconds, 3)
        log.info("nvme tier restored", extra=fields(blocks=event.blocks, seconds=seconds, rebuilt=event.rebuilt))


def _trim() -> None:
    """Give back the holes that growing columns have left, 50 bytes a block found. Milliseconds, without the GIL."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _owner(shard: Shard) -> SlabOwner:
    """What the disk needs to know of a shard."""
    spec, space = shard.group.spec, shard.spaces[NVME]
    return SlabOwner(
        uid=shard.group.uid,
        group_fingerprint=shard.group.fingerprint,
        rank=shard.rank,
        shard_size=shard.group.index.shard_size,
        block_bytes=space.block_bytes,
        slot_bytes=space.slot_bytes,
        hash_bytes=spec.hash_bytes,
        block_tokens=spec.block_tokens,
        model=spec.model,
    )
