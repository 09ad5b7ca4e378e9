"""A namespace group: all shards of one namespace, with the index, policy and slots of its blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from forebay.kvstore.eviction import EvictionPolicy
from forebay.kvstore.eviction.lru import LruPolicy
from forebay.kvstore.index import NO_ROW, BlockIndex
from forebay.kvstore.namespace import NamespaceSpec
from forebay.kvstore.slabs import RESERVED, RESIDENT, ShardSlots
from forebay.kvstore.stats import Counters, NamespaceStats

HOST = 0
"""Number of the host tier in an index: tiers are numbered fastest first."""


@dataclass(frozen=True, slots=True)
class SlabOpened:
    """A physical slab now belongs to shard `ns` under the serial `slab`: it needs fresh memory for `slots` slots."""

    ns: int
    slab: int
    physical: int
    slots: int


@dataclass(frozen=True, slots=True)
class SlabRetired:
    """The slab was taken back: bump all its generations, tell its readers, free its memory."""

    ns: int
    slab: int
    physical: int


@dataclass(slots=True)
class Effects:
    """What the daemon must carry out before it answers, in order.

    `generations` holds (ns, slot id, new generation): a reader that compares after its copy must see the bump
    before the slot's next writer starts.
    """

    slabs: list[SlabOpened | SlabRetired] = field(default_factory=list)
    generations: list[tuple[int, int, int]] = field(default_factory=list)


class Shard:
    """One rank's slots in a group; `ns` is the handle that names it to clients."""

    __slots__ = ("donor_check_s", "group", "ns", "rank", "slots")

    def __init__(self, ns: int, rank: int, group: Group, slots: ShardSlots) -> None:
        self.ns = ns
        self.rank = rank
        self.group = group
        self.slots = slots
        self.donor_check_s = float("-inf")


class Group:
    """Index, policy and shards of one namespace. Blocks leave only through `drop`."""

    def __init__(self, spec: NamespaceSpec, uid: int, effects: Effects, counters: Counters) -> None:
        self.spec = spec
        self.uid = uid
        self.fingerprint = spec.group_fingerprint()
        self.index = BlockIndex(spec.merged().shard_size)
        self.policy: EvictionPolicy = LruPolicy(self.index.parents, self.index.depths)
        self.shards: dict[int, Shard] = {}
        self.pinned_blocks = 0
        self.last_touch_s = 0.0
        self._effects = effects
        self._counters = counters
        self._nothing_evictable = False

    def touch(self, hashes: Sequence[bytes], rows: Sequence[int], now: float) -> None:
        self.last_touch_s = now
        self.policy.request(hashes, rows, now)

    def _held_or_resident_above(self, row: int) -> int:
        """The nearest ancestor that is no tombstone, or NO_ROW."""
        index = self.index
        row = index.parents[row]
        while row >= 0 and not index.holds[row] and not index.is_resident(row):
            row = index.parents[row]
        return row

    def evictable(self, row: int) -> bool:
        index = self.index
        return not (index.holds[row] or index.pinned[row] or index.has_child(row))

    def evict_one(self) -> bool:
        """Drop the policy's next victim; False when every block is leased, pinned or being written."""
        if self._nothing_evictable:
            return False
        row = self.policy.victim(self.evictable)
        if row is None:
            self._nothing_evictable = True
            return False
        self.drop(row)
        self._counters.evicted_blocks += 1
        return True

    def hold(self, rows: Iterable[int]) -> None:
        """A reader holds these rows; `unhold` gives them up."""
        holds = self.index.holds
        for row in rows:
            holds[row] += 1

    def unhold(self, rows: Iterable[int]) -> None:
        self._nothing_evictable = False
        holds = self.index.holds
        for row in rows:
            holds[row] -= 1

    def let_go(self, rows: Iterable[int]) -> None:
        """Undo a `hold` that lasted only while room was made.

        What was not evictable without it still is not, so unlike `unhold` this keeps a search that found nothing
        from being made again for each store into a full tier.
        """
        index = self.index
        for row in rows:
            freed = (row, self._held_or_resident_above(row)) if self._nothing_evictable else ()
            index.holds[row] -= 1
            index.forget_if_empty(row)
            if any(r >= 0 and index.is_resident(r) and self.evictable(r) for r in freed):
                self._nothing_evictable = False

    def reserve(self, shard: Shard, row: int) -> tuple[int, int]:
        """Give a free slot of the shard to the row's writer; returns (slot id, generation)."""
        slot_id, generation = shard.slots.reserve(row)
        self.index.reserve(row, HOST, shard.rank, slot_id, generation)
        return slot_id, generation

    def commit(self, shard: Shard, rows: Sequence[int], slots: Sequence[int], now: float) -> None:
        """Publish written blocks, parents before children."""
        self._nothing_evictable = False
        fresh = []
        for row, slot_id in zip(rows, slots, strict=True):
            if not self.index.is_resident(row):
                fresh.append(row)
            shard.slots.publish(slot_id)
            self.index.commit(row, HOST, shard.rank)
        self.policy.insert(fresh, now)
        self.last_touch_s = now

    def abort(self, shard: Shard, row: int, slot_id: int, *, quarantine: bool = False) -> None:
        """A writer gave its slot up; with `quarantine` it may still be writing into it."""
        self._nothing_evictable = False
        if quarantine:
            shard.slots.quarantine(slot_id)
        else:
            self.free_slot(shard, slot_id)
        self.index.abort(row, HOST, shard.rank)

    def free_slot(self, shard: Shard, slot_id: int) -> None:
        self._effects.generations.append((shard.ns, slot_id, shard.slots.free(slot_id)))

    def drop(self, row: int) -> None:
        """Take a block out of all its slots. If it has children it stays as a tombstone."""
        self._nothing_evictable = False
        for rank, slot_id in self.index.vacate(row, HOST):
            self.free_slot(self.shards[rank], slot_id)
        if self.index.pinned[row]:
            self.index.pinned[row] = 0
            self.pinned_blocks -= 1
        self.policy.remove(row)
        self.index.forget_if_empty(row)

    def pin(self, row: int, pinned: bool) -> bool:
        """Set or clear a pin; True when that changed something."""
        if bool(self.index.pinned[row]) == pinned:
            return False
        self._nothing_evictable = False
        self.index.pinned[row] = pinned
        self.pinned_blocks += 1 if pinned else -1
        return True

    def removable(self, row: int) -> bool:
        return self.index.is_resident(row) and not (self.index.holds[row] or self.index.pinned[row])

    def resident_rows(self) -> Iterator[int]:
        return (row for row in self.index.rows() if self.index.is_resident(row))

    @property
    def complete_bytes(self) -> int:
        """Bytes of one block over all its shards."""
        return self.index.shard_size * self.spec.block_bytes

    @property
    def pinned_bytes(self) -> int:
        return self.pinned_blocks * self.complete_bytes

    @property
    def resident_bytes(self) -> int:
        return sum(s.slots.count(RESIDENT) * s.slots.block_bytes for s in self.shards.values())

    def stats(self) -> NamespaceStats:
        return NamespaceStats(
            fingerprint=self.fingerprint.hex(),
            model=self.spec.model,
            uid=self.uid,
            block_tokens=self.spec.block_tokens,
            block_bytes=self.spec.block_bytes,
            shard_size=self.index.shard_size,
            blocks=len(self.index.complete),
            pinned_blocks=self.pinned_blocks,
            slabs=sum(len(s.slots.slabs) for s in self.shards.values()),
            resident_bytes=self.resident_bytes,
            last_touch_s=self.last_touch_s,
        )

    def check(self) -> Iterator[str]:
        """Yield each violated invariant of this group."""
        yield from self.index.check()
        yield from self.policy.check(self.resident_rows())
        if self.pinned_blocks != sum(self.index.pinned):
            yield f"{self.pinned_blocks} pinned blocks counted, {sum(self.index.pinned)} marked"
        for shard in self.shards.values():
            yield from shard.slots.check()
            yield from self._check_slots(shard)

    def _generation(self, row: int, shard: Shard) -> int:
        return self.index.generations([row], HOST, shard.rank)[0]

    def _check_slots(self, shard: Shard) -> Iterator[str]:
        per_slab = shard.slots.slots_per_slab
        for slab in shard.slots.slabs.values():
            for slot, row in enumerate(slab.rows):
                slot_id = slab.serial * per_slab + slot
                if slab.states[slot] == RESIDENT and self.index.slot(row, HOST, shard.rank) != slot_id:
                    yield f"slot {slot_id} says it holds row {row}, which lies elsewhere"
                elif slab.states[slot] == RESIDENT and slab.generations[slot] != self._generation(row, shard):
                    yield f"row {row} names another generation than its slot {slot_id}"
                if slab.states[slot] == RESERVED and self.index.reserved_slot(row, HOST, shard.rank) != slot_id:
                    yield f"slot {slot_id} says row {row} is being written to it, which is not so"
                if slab.states[slot] not in (RESIDENT, RESERVED) and row != NO_ROW:
                    yield f"slot {slot_id} names row {row} but holds no block"
        committed = sum(self.index.slot(row, HOST, shard.rank) >= 0 for row in self.index.rows())
        if committed != shard.slots.count(RESIDENT):
            yield f"{committed} committed rows, {shard.slots.count(RESIDENT)} resident slots"
