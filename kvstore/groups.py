"""A namespace group: all shards of one namespace, with the index, policy and slots of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum

from forebay.kvstore.eviction import BYPASS, EvictionPolicy
from forebay.kvstore.eviction.policies import Place, PolicyMaker, lru
from forebay.kvstore.expectations import SHARE, Expectations
from forebay.kvstore.index import NO_ROW, BlockIndex
from forebay.kvstore.namespace import NamespaceSpec
from forebay.kvstore.slabs import QUARANTINED, RESERVED, RESIDENT, ShardSlots
from forebay.kvstore.stats import Counters, NamespaceStats

HOST, NVME = 0, 1
"""Numbers of the tiers in an index: fastest first."""

_FORCED_LOOK = 64
"""Coldest rows that are looked at first, before all others are."""


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


@dataclass(frozen=True, slots=True)
class DriveSlabAssigned:
    """A physical slab of the nvme tier now belongs to a shard; its slots' generations begin at `generation`."""

    shard: Shard
    physical: int
    generation: int


@dataclass(frozen=True, slots=True)
class DriveSlabRetired:
    """A physical slab of the nvme tier belongs to nobody."""

    physical: int


@dataclass(frozen=True, slots=True)
class LeaseProgress:
    """What a lease's readers are to be told: its leading `ready` blocks may be copied, no more than `total` will."""

    session_id: int
    lease_id: int
    ready: int
    total: int


class Room(IntEnum):
    """Whether room was made for a block; DECLINED: nothing that may go is worth less than it."""

    NONE = 0
    MADE = 1
    DECLINED = 2


class Direction(IntEnum):
    """Which way a transfer goes."""

    LOAD = 0
    WRITE = 1


@dataclass(slots=True)
class Transfer:
    """Blocks of one shard on their way between a host slot and an nvme slot, in prefix order; parallel lists.

    Attributes:
        generations: of the nvme slots.
        leases: of those that wait for it; a load that nobody waits for any more is cancelled, unless it is `kept`.
        cancelled: the tier was told so; what it had not begun by then will not come.
        started_s: when it was decided.
    """

    transfer_id: int
    direction: Direction
    shard: Shard
    rows: list[int]
    host_slots: list[int]
    nvme_slots: list[int]
    generations: list[int]
    started_s: float
    leases: set[int] = field(default_factory=set)
    kept: bool = False
    cancelled: bool = False


@dataclass(slots=True)
class Effects:
    """What the daemon must carry out before it answers, in order.

    `generations` holds (ns, slot id, new generation): a reader that compares after its copy must see the bump
    before the slot's next writer starts. `forgotten` holds places (physical slab, slot) of the nvme tier whose block
    has gone, `drive_slabs` comes before the transfers that use them. `warnings` are sentences for the log.
    """

    slabs: list[SlabOpened | SlabRetired] = field(default_factory=list)
    generations: list[tuple[int, int, int]] = field(default_factory=list)
    drive_slabs: list[DriveSlabAssigned | DriveSlabRetired] = field(default_factory=list)
    forgotten: list[tuple[int, int]] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    progress: list[LeaseProgress] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(
            self.slabs
            or self.generations
            or self.drive_slabs
            or self.forgotten
            or self.transfers
            or self.cancelled
            or self.progress
            or self.warnings
        )

    def drain(self) -> Effects:
        """All of it, leaving nothing behind."""
        drained = replace(self)
        for each in fields(self):
            setattr(self, each.name, [])
        return drained


class Shard:
    """One rank's slots in a group, in each tier; `ns` is the handle that names it to clients.

    Attributes:
        slots: in the host tier.
        spaces: by tier; one where there is no nvme tier.
    """

    __slots__ = ("donor_check_s", "group", "ns", "rank", "slots", "spaces")

    def __init__(self, ns: int, rank: int, group: Group, spaces: tuple[ShardSlots, ...]) -> None:
        self.ns = ns
        self.rank = rank
        self.group = group
        self.slots = spaces[HOST]
        self.spaces = spaces
        self.donor_check_s = [float("-inf")] * len(spaces)


class Group:
    """Index, policies and shards of one namespace. Blocks leave only through `drop` and `drop_from`."""

    def __init__(
        self,
        spec: NamespaceSpec,
        fingerprint: bytes,
        uid: int,
        effects: Effects,
        counters: Counters,
        tiers: int,
        host_policy: PolicyMaker = lru,
    ) -> None:
        self.spec = spec
        self.uid = uid
        self.fingerprint = fingerprint
        self._tiers = tiers
        self._host_policy = host_policy
        self.index: BlockIndex
        self.policies: tuple[EvictionPolicy, ...]
        self.shards: dict[int, Shard] = {}
        self.memory_only = ""
        """Why the nvme tier has no slot for its blocks, where there is such a tier and that is so."""
        self.last_touch_s = 0.0
        self.evicted_from_host = 0
        self.evicted_unwritten = 0
        self._effects = effects
        self._counters = counters
        self.expectations = Expectations(tiers)
        self.begin_anew()

    def begin_anew(self) -> None:
        """Know no block. Nobody holds one, and the slabs they lay in have been given back."""
        self.index = BlockIndex(self.spec.merged().shard_size, self._tiers)
        place = Place(self.index, self.spec.block_tokens, sole=self._tiers == 1)
        below = replace(place, fastest=False)
        self.policies = (self._host_policy(place), *(lru(below) for _ in range(1, self._tiers)))
        self.pinned_blocks = self.preferred_blocks = 0
        self.declined: set[int] = set()
        """Rows in host memory that were found not to be worth a write."""
        self._ending: dict[int, int] = {}
        """Rows whose writing has to end before their chain's end can be told to the policy; and what to keep of it."""
        self._nothing_evictable = [False] * self._tiers
        self.expectations = Expectations(self._tiers)

    def is_idle(self) -> bool:
        """No block is leased, pinned or being written, and no late writer may still write into a slot."""
        busy = any(shard.slots.count(RESERVED) or shard.slots.count(QUARANTINED) for shard in self.shards.values())
        return not (busy or self.pinned_blocks or any(self.index.holds))

    def request(self, hashes: Sequence[bytes], rows: Sequence[int], now: float, *, opens: bool = False) -> None:
        """A request named this chain, whose leading `rows` are present; with `opens` as the first thing it did."""
        self.last_touch_s = now
        for policy in self.policies:
            policy.request(hashes, rows, now, opens=opens)

    def grow(self, hashes: Sequence[bytes], rows: Sequence[int], above: int, now: float) -> None:
        """These blocks, whose leading `rows` are present, are to continue the row `above`."""
        self.last_touch_s = now
        for policy in self.policies:
            policy.grow(hashes, rows, above, now)

    def may_bypass(self) -> bool:
        """A block that is not stored in host memory is lost, for this and every rank, and so it may be declined."""
        return (len(self.policies) == 1 or bool(self.memory_only)) and self.index.shard_size == 1

    def _held_or_resident_above(self, row: int) -> int:
        """The nearest ancestor that is no tombstone, or NO_ROW."""
        index = self.index
        row = index.parents[row]
        while row >= 0 and not index.holds[row] and not index.is_resident(row):
            row = index.parents[row]
        return row

    def evictable(self, row: int) -> bool | None:
        """Whether a row may leave the host tier; None: not while it is being written to a slower one."""
        index = self.index
        if index.pinned[row]:
            return False
        if index.holds[row]:
            return None if len(self.policies) > 1 and index.is_coming_to(row, NVME) else False
        if self.expectations.kept[HOST] and self.is_expected(row):
            return False
        return self.stays_without(row, HOST) or not index.has_child(row)

    def _may_leave(self, tier: int) -> Callable[[int], bool | None]:
        return self.evictable if tier == HOST else self._evictable_from_nvme

    def _could_leave(self, row: int, tier: int) -> bool:
        """Whether a search for victims would find this row, at worst by force."""
        return bool(self._may_leave(tier)(row)) or (
            tier == HOST and len(self.policies) > 1 and self._lost_with(row) is not None
        )

    def _evictable_from_nvme(self, row: int) -> bool | None:
        index = self.index
        if index.pinned[row] or index.holds[row]:
            return False
        if self.expectations.kept[NVME] and self.is_expected(row, NVME):
            return False
        return self.stays_without(row, NVME) or not index.has_child(row)

    def stays_without(self, row: int, tier: int) -> bool:
        """Another tier has the whole block, so that it may leave this one and be found all the same."""
        return len(self.policies) > 1 and self.index.is_whole_in(row, NVME if tier == HOST else HOST)

    def evict_one(self, tier: int = HOST, newcomer: bytes | None = None) -> Room:
        """Let the policy's next victim leave the tier; NONE when every block is leased, pinned or being written.

        With the hash of a `newcomer` that need not be stored the policy may decline to make room for it.
        """
        if self._nothing_evictable[tier]:
            return Room.NONE
        row = self.policies[tier].victim(self._may_leave(tier), newcomer)
        if row is None and self.expectations.give_up(tier):  # a hint never costs a store
            row = self.policies[tier].victim(self._may_leave(tier), newcomer)
        if row == BYPASS:
            return Room.DECLINED
        if row is not None:
            self.evict(row, tier)
        elif not self._force_out(tier):
            self._nothing_evictable[tier] = True
            return Room.NONE
        return Room.MADE

    def evict(self, row: int, tier: int) -> None:
        """Let a block leave a tier for space; it is lost where no other has it."""
        if tier == HOST:
            self.evicted_from_host += 1
        if self.stays_without(row, tier):
            self.drop_from(row, tier)
            self._counters.released_blocks += tier == HOST
        else:
            self.lose(row)

    def lose(self, row: int) -> None:
        """Drop a block for space, wherever it is."""
        unwritten = len(self.policies) > 1 and not self.memory_only and not self.index.is_in(row, NVME)
        unwritten = unwritten and row not in self.declined and not self.policies[HOST].is_over(row)
        self.evicted_unwritten += unwritten
        self._counters.evicted_blocks += 1
        self._counters.evicted_unwritten_blocks += unwritten
        self.drop(row)

    def _force_out(self, tier: int) -> bool:
        """Drop a cold block together with all that continues it on a slower tier, which nobody could find without it.

        For when the slower tier takes no writes: blocks whose continuation it holds could never leave otherwise.
        """
        if tier != HOST or len(self.policies) == 1:
            return False
        barred: set[int] = set()  # rows above one that is in use, which would be lost with them
        looked = 0
        for limit in (_FORCED_LOOK, len(self.index.hashes)):
            coldest = self.policies[HOST].coldest(limit)
            for row in coldest[looked:]:
                lost = None if row in barred else self._lost_with(row)
                if lost is not None:
                    for each in lost:
                        self.lose(each)
                    self.evict(row, HOST)
                    return True
                while row >= 0 and row not in barred:
                    barred.add(row)
                    row = self.index.parents[row]
            looked = len(coldest)
        return False

    def _lost_with(self, row: int) -> list[int] | None:
        """What continues a row, on a slower tier only, children first; None if the row or any of that is in use."""
        index = self.index
        if index.holds[row] or index.pinned[row]:
            return None
        rows = index.subtrees([row]) - {row}
        if any(index.holds[each] or index.pinned[each] or index.is_in(each, HOST) for each in rows):
            return None
        return sorted(filter(index.is_resident, rows), key=lambda each: -index.depths[each])

    def end_chain(self, row: int, keep: int) -> int:
        """The chain up to this row will not be asked for again, but for its first `keep` blocks and what others share.

        Returns how many blocks go first in consequence.
        """
        index = self.index
        tail = index.own_tail(row, keep)
        for tier, policy in enumerate(self.policies):
            policy.demote([each for each in tail if index.is_in(each, tier)])
        if tail and not index.is_resident(row):
            self._ending[row] = keep
        return len(tail)

    def not_over(self, rows: Sequence[int]) -> list[int]:
        """Without those of chains that are said to be over: they are not worth a write."""
        is_over = self.policies[HOST].is_over
        return [row for row in rows if not is_over(row)]

    def expect(self, session_id: int, rows: Sequence[int], until: float) -> int:
        """Keep the leading blocks where they are until then, for a session; returns how many are."""
        hashes, index = self.index.hashes, self.index
        names = ((hashes[row] or b"", HOST if index.is_in(row, HOST) else NVME) for row in rows)
        room = [max(1, int(SHARE * (self.resident_bytes(tier) // self.complete_bytes))) for tier in range(self._tiers)]
        return self.expectations.add(session_id, until, names, room)

    def end_expected(self, now: float) -> None:
        """Blocks whose time has come may go as others do."""
        self.expectations.expire(now)
        self._look_again()

    def end_session(self, session_id: int) -> None:
        """What it expected may go as others do."""
        if self.expectations.end_session(session_id):
            self._look_again()

    def is_expected(self, row: int, tier: int = HOST) -> bool:
        """A client said that it will ask for this block, and its time has not passed."""
        return self.index.hashes[row] in self.expectations.kept[tier]

    def prefer(self, row: int, priority: int) -> None:
        """A row that is about to be written gets a priority, until it leaves the host tier."""
        priorities = self.index.priorities
        if priority > priorities[row] and not self.index.is_in(row, HOST):
            self.preferred_blocks += not priorities[row]
            self._counters.preferred_blocks += not priorities[row]
            priorities[row] = priority

    def _stop_preferring(self, row: int) -> None:
        if self.index.priorities[row]:
            self.index.priorities[row] = 0
            self.preferred_blocks -= 1

    def hold(self, rows: Iterable[int]) -> None:
        """A reader holds these rows; `unhold` gives them up."""
        holds = self.index.holds
        for row in rows:
            holds[row] += 1

    def unhold(self, rows: Iterable[int]) -> None:
        self._look_again()
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
            freed = (row, self._held_or_resident_above(row)) if any(self._nothing_evictable) else ()
            index.holds[row] -= 1
            index.forget_if_empty(row)
            for tier, vain in enumerate(self._nothing_evictable):
                if vain and any(r >= 0 and index.is_in(r, tier) and self._could_leave(r, tier) for r in freed):
                    self._nothing_evictable[tier] = False

    def reserve(
        self, shard: Shard, row: int, tier: int = HOST, barred: frozenset[int] = frozenset()
    ) -> tuple[int, int]:
        """Give a free slot of the shard, on a drive that is not barred, to the row's writer; (slot id, generation)."""
        slot_id, generation = shard.spaces[tier].reserve(row, barred)
        self.index.reserve(row, tier, shard.rank, slot_id, generation)
        return slot_id, generation

    def commit(self, shard: Shard, rows: Sequence[int], slots: Sequence[int], now: float, tier: int = HOST) -> None:
        """Publish written blocks, parents before children."""
        self._look_again(copied=tier != HOST)
        fresh = []
        for row, slot_id in zip(rows, slots, strict=True):
            if not self.index.is_in(row, tier):
                fresh.append(row)
            shard.spaces[tier].publish(slot_id)
            self.index.commit(row, tier, shard.rank)
        self.policies[tier].insert(fresh, now)
        if tier == HOST:
            self.last_touch_s = now
            for row in self._ending.keys() & fresh if self._ending else ():
                self.end_chain(row, self._ending.pop(row))

    def abort(self, shard: Shard, row: int, slot_id: int, *, quarantine: bool = False, tier: int = HOST) -> None:
        """A writer gave its slot up; with `quarantine` it may still be writing into it.

        A slot of a drive that could not be written is tried again after all others: the first in line must not be one
        that never can be.
        """
        self._look_again(copied=tier != HOST)
        if quarantine:
            shard.spaces[tier].quarantine(slot_id)
        else:
            self.free_slot(shard, slot_id, tier, last=tier != HOST)
        if tier == HOST and not self.index.is_in(row, HOST):
            self._stop_preferring(row)
        self.index.abort(row, tier, shard.rank)
        self._ending.pop(row, None)

    def free_slot(self, shard: Shard, slot_id: int, tier: int = HOST, *, last: bool = False) -> None:
        if tier == HOST:
            self._effects.generations.append((shard.ns, slot_id, shard.slots.free(slot_id)))
        else:
            self._effects.forgotten.append(shard.spaces[tier].place(slot_id))
            shard.spaces[tier].free(slot_id, last=last)

    def free_quarantined(self, tier: int) -> None:
        """Give slots that nobody was to have another chance."""
        for shard in self.shards.values():
            space = shard.spaces[tier]
            for slot_id in list(space.quarantined()):
                self.free_slot(shard, slot_id, tier)

    def drop(self, row: int) -> None:
        """Take a block out of all its slots. If it has children it stays as a tombstone."""
        if self.index.pinned[row]:
            self.index.pinned[row] = 0
            self.pinned_blocks -= 1
        for tier in range(len(self.policies)):
            if self.index.is_in(row, tier):
                self.drop_from(row, tier)

    def drop_from(self, row: int, tier: int, *, quarantine: bool = False) -> None:
        """Take a block out of its slots in one tier; with `quarantine` nobody gets those."""
        self._look_again()
        for rank, slot_id in self.index.vacate(row, tier):
            if quarantine:
                self._effects.forgotten.append(self.shards[rank].spaces[tier].place(slot_id))
                self.shards[rank].spaces[tier].quarantine(slot_id)
            else:
                self.free_slot(self.shards[rank], slot_id, tier)
        if tier == HOST:
            self.declined.discard(row)
        self.policies[tier].remove(row)
        if tier == HOST:
            self._stop_preferring(row)
        self.index.forget_if_empty(row)

    def _look_again(self, *, copied: bool = False) -> None:
        """Something may have become evictable; with `copied` what was being copied to a slower tier."""
        if copied:
            self.policies[HOST].look_again()
        for tier in range(len(self._nothing_evictable)):
            self._nothing_evictable[tier] = False

    def pin(self, row: int, pinned: bool) -> bool:
        """Set or clear a pin; True when that changed something."""
        if bool(self.index.pinned[row]) == pinned:
            return False
        self._look_again()
        self.index.pinned[row] = pinned
        self.pinned_blocks += 1 if pinned else -1
        return True

    def removable(self, row: int) -> bool:
        return self.index.is_resident(row) and not (self.index.holds[row] or self.index.pinned[row])

    @property
    def complete_bytes(self) -> int:
        """Bytes of one block over all its shards."""
        return self.index.shard_size * self.spec.block_bytes

    @property
    def pinned_bytes(self) -> int:
        return self.pinned_blocks * self.complete_bytes

    @property
    def preferred_bytes(self) -> int:
        return self.preferred_blocks * self.complete_bytes

    def resident_bytes(self, tier: int = HOST) -> int:
        """Payload bytes in a tier, over all shards."""
        return sum(s.spaces[tier].count(RESIDENT) * s.spaces[tier].block_bytes for s in self.shards.values())

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
            resident_bytes=self.resident_bytes(),
            nvme_resident_bytes=self.resident_bytes(NVME) if len(self.policies) > 1 else 0,
            last_touch_s=self.last_touch_s,
            memory_only=self.memory_only,
        )

    def check(self) -> Iterator[str]:
        """Yield each violated invariant of this group."""
        yield from self.index.check()
        for tier, policy in enumerate(self.policies):
            yield from policy.check(row for row in self.index.rows() if self.index.is_in(row, tier))
        if self.pinned_blocks != sum(self.index.pinned):
            yield f"{self.pinned_blocks} pinned blocks counted, {sum(self.index.pinned)} marked"
        preferred = len(self.index.priorities) - self.index.priorities.count(0)
        if preferred != self.preferred_blocks:
            yield f"{self.preferred_blocks} blocks of a priority counted, {preferred} marked"
        for shard in self.shards.values():
            for tier, space in enumerate(shard.spaces):
                yield from space.check()
                yield from self._check_slots(shard, space, tier)

    def _agrees(self, row: int, shard: Shard, tier: int, generation: int) -> bool:
        return tier != HOST or generation == self.index.generations([row], shard.rank)[0]

    def _check_slots(self, shard: Shard, space: ShardSlots, tier: int) -> Iterator[str]:
        per_slab = space.slots_per_slab
        for slab in space.slabs.values():
            for slot, row in enumerate(slab.rows):
                slot_id = slab.serial * per_slab + slot
                if slab.states[slot] == RESIDENT and self.index.slot(row, tier, shard.rank) != slot_id:
                    yield f"slot {slot_id} says it holds row {row}, which lies elsewhere"
                elif slab.states[slot] == RESIDENT and not self._agrees(row, shard, tier, slab.generations[slot]):
                    yield f"row {row} names another generation than its slot {slot_id}"
                if slab.states[slot] == RESERVED and self.index.reserved_slot(row, tier, shard.rank) != slot_id:
                    yield f"slot {slot_id} says row {row} is being written to it, which is not so"
                if slab.states[slot] not in (RESIDENT, RESERVED) and row != NO_ROW:
                    yield f"slot {slot_id} names row {row} but holds no block"
        committed = sum(self.index.slot(row, tier, shard.rank) >= 0 for row in self.index.rows())
        if committed != space.count(RESIDENT):
            yield f"{committed} committed rows, {space.count(RESIDENT)} resident slots"
