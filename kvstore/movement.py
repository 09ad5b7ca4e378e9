"""Movement between host memory and the nvme tier: what is brought up, what is written down, and when.

Blocks go down lazily. Those next in line to leave host memory are written ahead of need, so that the coldest share of
every namespace is *clean*: it can leave at once, and a store never waits for the drive. Where the drive cannot follow,
blocks leave unwritten and are counted; nobody waits. Blocks come up when a lease or a prefetch asks for them, in prefix
order, and the lease's readers are told as its leading part lands.

A transfer holds its blocks: neither slot can change hands while it is under way. Rejected: writing at commit
(write-through costs writes for blocks that nobody will ask for again and saves nothing), and one transfer a block (a
thousand blocks of 64 KiB a second would cost a core).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import islice

from forebay.kvstore.admission import BURST_S, AdmissionRule, WorthWriting, WriteBudget, WriteOnEvict, WriteTerms
from forebay.kvstore.allocation import Allocator
from forebay.kvstore.groups import HOST, NVME, Direction, Effects, Group, LeaseProgress, Room, Shard, Transfer
from forebay.kvstore.index import NO_SLOT
from forebay.kvstore.leases import Lease
from forebay.kvstore.planner import Link, PrefillRate
from forebay.kvstore.slabs import FREE, RESIDENT, SlabFormat
from forebay.kvstore.stats import Counters, MovementStats

MIB = 1 << 20
PAGE_BYTES = 4096

CLEAN_BLOCKS_MIN = 16
CLEAN_BLOCKS_MAX = 4096
SWEEP_ROWS = 16_384
"""Rows that a sweep looks at, of all namespaces together."""
PLAN_GROUPS = 32
"""Namespaces that one plan looks at beside those stirred since the last: it is made after every request."""
LOOK_AGAIN_S = 0.25
PRESSED_S = 5.0
"""So long after blocks had to leave unwritten the clean share is as large as bursts of stores ask for."""
FLUSH_TRIES = 8
PAUSE_S = 0.5
"""A drive's, after a transfer of whose blocks on it none was written."""

WINDOW_SHARE = 4
"""What is being written cannot leave host memory meanwhile, so it is at most this part of a small tier."""


@dataclass(frozen=True, slots=True)
class NvmeConfig:
    """Sizes and rates of the nvme tier, as the core needs them. Times are seconds.

    Attributes:
        window_bytes: most payload on its way to the drive at one time.
        chunk_bytes: payload of one transfer, at least a block.
        clean_share: share of a namespace's blocks, coldest first, that is kept written ahead.
        prefetch_share: most of the host tier that prefetches may be filling at one time.
        ahead_bytes: payload of prefetches asked of a drive at one time; the rest waits, so that leases need not.
        idle_s: without a request for so long, what is only in host memory is written down as well.
        budget_bytes_per_day: what may be written; 0: any amount.
        budget_burst_s: what fills the budget's bucket takes so long.
        terms: by which it is weighed what is worth writing; None: it is not.
        drives: how many the tier has; slab s lies on drive s mod `drives`.
    """

    capacity_bytes: int
    slab_bytes: int
    window_bytes: int = 256 * MIB
    chunk_bytes: int = 8 * MIB
    clean_share: float = 0.05
    prefetch_share: float = 0.25
    ahead_bytes: int = 16 * MIB
    idle_s: float = 2.0
    budget_bytes_per_day: int = 0
    budget_burst_s: float = BURST_S
    terms: WriteTerms | None = None
    drives: int = 1

    @property
    def form(self) -> SlabFormat:
        return SlabFormat(self.slab_bytes, PAGE_BYTES, PAGE_BYTES, drives=self.drives)


class Verdict(IntEnum):
    """How a block's transfer ended, as far as it decides what becomes of the block."""

    OK = 0
    CANCELLED = 1
    """Not tried; what is on the drive is believed as before."""
    FAILED = 2
    CORRUPT = 3
    STALE = 4
    """The drive holds another block there."""


@dataclass(slots=True)
class _Watch:
    """When a group was last looked at, why to look again, what is left to write, and how far a sweep of it has come.

    Attributes:
        evicted: blocks that had left host memory at the last look; `noticed` at the last plan.
        unwritten: blocks that had left it unwritten, at the last plan; `pressed_s` is when the last of them were seen.
        burst: most blocks that left between two plans since then.
        pending: rows still to be written of those seen at the last look, the next one last.
        cursor: the row with which the sweep goes on, and `to_sweep` what it found before that and has still to write.
        stored: how often blocks became dirty; `swept` is how often they had when the last full sweep began, `sweeping`
            when this one did.
    """

    evicted: int = 0
    looked_s: float = float("-inf")
    target: int = 0
    noticed: int = 0
    unwritten: int = 0
    pressed_s: float = float("-inf")
    burst: int = 0
    pending: list[int] = field(default_factory=list)
    cursor: int = 0
    to_sweep: list[int] = field(default_factory=list)
    stored: int = 1
    swept: int = 0
    sweeping: int = 0

    def notice(self, group: Group, now: float) -> None:
        """Take in how many blocks have left since the last plan."""
        left, self.noticed = group.evicted_from_host - self.noticed, group.evicted_from_host
        if group.evicted_unwritten > self.unwritten:
            self.unwritten, self.pressed_s = group.evicted_unwritten, now
            self.burst = max(self.burst, left)
        elif self.burst and not self.is_pressed(now):
            self.burst = 0

    def is_pressed(self, now: float) -> bool:
        """Blocks have left unwritten lately: more should be clean than are."""
        return now - self.pressed_s < PRESSED_S


class Movement:
    """Plans transfers and takes in how they ended.

    Args:
        leases: the store's, by id: told of progress.
        prefill: how long computing takes.
    """

    def __init__(
        self,
        config: NvmeConfig,
        allocators: tuple[Allocator, Allocator],
        effects: Effects,
        counters: Counters,
        leases: dict[int, Lease],
        prefill: PrefillRate,
    ) -> None:
        self.config = config
        self.budget = WriteBudget(config.budget_bytes_per_day, config.budget_burst_s)
        self.ready = False
        self._host, self._nvme = allocators
        self._effects = effects
        self._counters = counters
        self._leases = leases
        self._prefill = prefill
        self._rule = self._new_rule()
        self._transfers: dict[int, Transfer] = {}
        self._last_id = 0
        self._loading: dict[tuple[int, int], Transfer] = {}
        self._watches: dict[Group, _Watch] = {}
        self._stirred: OrderedDict[Group, None] = OrderedDict()
        self._stirred_now: dict[Group, None] = {}
        self._asked: dict[Group, dict[int, bytes | None]] = {}
        """Rows that clients want written and the window had no room for, oldest first, with their blocks' names."""
        self._swept: Group | None = None
        self._writing_bytes = 0
        self._pauses: dict[int, float] = {}
        """Until when each drive is not written to."""
        self._last_failed = False
        self._flushes = 0
        self._to_flush: list[tuple[Group, list[int]]] | None = None
        self._prefetching_bytes = 0
        self._waiting: OrderedDict[int, Transfer] = OrderedDict()
        """Prefetches that the drives have not been asked for yet, by id."""
        self._ahead: dict[int, int] = {}
        """Payload of those that they have, by id."""
        self._ahead_bytes = 0
        self.link: Link | None = None
        """Is told how long loads take."""

    def reconfigure(self, config: NvmeConfig) -> None:
        """Other rates and terms."""
        self.config = config
        self._rule = self._new_rule()

    def _new_rule(self) -> AdmissionRule:
        terms = self.config.terms
        return WriteOnEvict() if terms is None else WorthWriting(terms, self.budget, self._prefill, self._counters)

    # Up

    def fetch(self, lease: Lease, groups: Collection[Group], now: float, hand_over: Callable[[], None]) -> int:
        """Bring a lease's blocks to host memory, as many leading ones as there is room for; returns how many.

        To find room for a block takes microseconds, for thousands of them as long as the drives take for many. So what
        was decided is handed over part by part, for the drives to begin. That may cut the lease short, or even end it.
        """
        group, rows = lease.group, lease.rows
        if group.index.count_by_tier(rows)[HOST] == len(rows):
            lease.ready = len(rows)
            return len(rows)
        stride = max(1, self.config.ahead_bytes * self.config.drives // group.complete_bytes)
        covered = 0
        for first in range(0, len(rows), stride):
            if first:
                hand_over()
                if lease.total < len(rows) or lease.lease_id not in self._leases:
                    break
            part = rows[first : first + stride]
            covered += self.promote(group, part, lease, groups, now)
            if covered < first + len(part):
                left = rows[covered:]
                self._counters.promotions_full_blocks += len(left) - group.index.count_by_tier(left)[HOST]
                break
        return covered

    def promote(
        self, group: Group, rows: Sequence[int], lease: Lease | None, groups: Collection[Group], now: float
    ) -> int:
        """Bring these complete blocks, which the caller holds, to host memory; returns how many leading ones will be.

        Fewer than all when host memory has no room. With a lease it is told of the progress; without one this is a
        prefetch, and bounded.
        """
        index = group.index
        left = len(rows) - index.count_by_tier(rows)[HOST]
        if not left:
            return len(rows)
        batches = [_Batch(shard) for shard in group.shards.values()]
        covered = len(rows)
        for position, row in enumerate(rows):
            if index.is_whole_in(row, HOST):
                continue
            for batch in batches:
                if not self._bring(batch, row, lease, groups, left, now):
                    break
            else:
                left -= 1
                continue
            covered = position
            break
        for batch in batches:
            self._start_load(batch, () if lease is None else (lease,), now, kept=lease is None)
        return covered

    def _bring(
        self, batch: _Batch, row: int, lease: Lease | None, groups: Collection[Group], left: int, now: float
    ) -> bool:
        shard = batch.shard
        group, index = shard.group, shard.group.index
        if index.slot(row, HOST, shard.rank) != NO_SLOT:
            return True
        if index.reserved_slot(row, HOST, shard.rank) != NO_SLOT:
            return self._is_being_brought(batch, row, lease)
        size = shard.slots.block_bytes
        if lease is None:
            left = min(left, self._prefetch_room() // size)
        if left < 1 or not self._host.ensure(shard, groups, now, left):
            return False
        host_slot, _ = group.reserve(shard, row, HOST)
        batch.add(row, host_slot, index.slot(row, NVME, shard.rank))
        self._prefetching_bytes += 0 if lease else size
        if len(batch.rows) * size >= self.config.chunk_bytes:
            self._start_load(batch, () if lease is None else (lease,), now, kept=lease is None)
        return True

    def _is_being_brought(self, batch: _Batch, row: int, lease: Lease | None) -> bool:
        """What fills the row's host slot is a load; a client that stores it again may yet give up."""
        transfer = self._loading.get((batch.shard.ns, row))
        if transfer is None:
            return row in batch.rows  # the same block twice in one request
        if lease is not None:
            self._join(transfer, lease)
        elif not transfer.kept and self._payload(transfer) <= self._prefetch_room():
            transfer.kept = True
            self._prefetching_bytes += self._payload(transfer)
        return True

    def _prefetch_room(self) -> int:
        return int(self.config.prefetch_share * self._host.tier.capacity_bytes) - self._prefetching_bytes

    def _payload(self, transfer: Transfer) -> int:
        return len(transfer.rows) * transfer.shard.slots.block_bytes

    def _join(self, transfer: Transfer, lease: Lease) -> None:
        transfer.leases.add(lease.lease_id)
        lease.transfers.add(transfer.transfer_id)
        if self._waiting.pop(transfer.transfer_id, None) is not None:
            self._ask(transfer)

    def _ask(self, transfer: Transfer) -> None:
        """The drives are to move it now."""
        self._effects.transfers.append(transfer)
        if self.link is not None and transfer.direction == Direction.LOAD:
            self.link.begin(self._payload(transfer))

    def _start_load(self, batch: _Batch, leases: Sequence[Lease], now: float, *, kept: bool) -> None:
        """`kept`: it goes on whoever waits for it."""
        if not batch.rows:
            return
        transfer = self._begin(Direction.LOAD, batch, now, waits=not leases)
        transfer.kept = kept
        for lease in leases:
            self._join(transfer, lease)
        for row in transfer.rows:
            self._loading[transfer.shard.ns, row] = transfer
        batch.clear()
        self._ask_ahead()

    def _ask_ahead(self) -> None:
        """Ask the drives for prefetches that wait, first come first served, as many as may be under way."""
        while self._waiting and self._ahead_bytes < self.config.ahead_bytes * self.config.drives:
            transfer_id, transfer = self._waiting.popitem(last=False)
            self._ahead[transfer_id] = self._payload(transfer)
            self._ahead_bytes += self._ahead[transfer_id]
            self._ask(transfer)

    def advance(self, lease: Lease) -> bool:
        """Count the leading blocks that have landed; True when there are more than before."""
        before, index, rows = lease.ready, lease.group.index, lease.rows
        while lease.ready < lease.total and index.is_whole_in(rows[lease.ready], HOST):
            lease.ready += 1
        return lease.ready > before

    def let_go(self, lease: Lease) -> None:
        """The lease has ended: loads that only it waited for need not go on."""
        for transfer_id in lease.transfers:
            transfer = self._transfers.get(transfer_id)
            if transfer is None:
                continue
            transfer.leases.discard(lease.lease_id)
            if not transfer.leases and not transfer.kept and not transfer.cancelled:
                transfer.cancelled = True
                self._effects.cancelled.append(transfer_id)

    # Down

    def stir(self, group: Group, *, stored: bool = False) -> None:
        """Something was asked for in the group, or even `stored`: look at it in the next `plan`."""
        if group.memory_only:
            return
        self._stirred[group] = self._stirred_now[group] = None
        self._watch(group).stored += stored

    def ask(self, group: Group, rows: Sequence[int], groups: Collection[Group], now: float) -> bool:
        """A client wants these written, parents before children; True when none waits for its turn.

        What the window has no room for follows as others end, whether or not the client asks again.
        """
        if self.write(group, rows, groups, now, asked=True) and not self.waits(now):
            return True
        shards, names = tuple(group.shards.values()), group.index.hashes
        dirty = (row for row in rows if any(self._is_dirty(shard, row) for shard in shards))
        self._asked.setdefault(group, {}).update((row, names[row]) for row in dirty)
        return False

    def _write_asked(self, group: Group, groups: Collection[Group], now: float) -> None:
        """Go on with what clients have asked for; a row that has another block by now is passed over."""
        asked, names = self._asked[group], group.index.hashes
        while asked and (room := self._window()) > 0:
            part = list(islice(asked, max(1, room // group.complete_bytes)))
            if not self.write(group, [row for row in part if names[row] == asked[row]], groups, now, asked=True):
                return  # what was begun of it is passed over next time
            for row in part:
                del asked[row]
        if not asked:
            del self._asked[group]

    def plan(self, groups: Collection[Group], now: float) -> None:
        """Write what should be written next, as far as the window allows. Cheap where nothing has changed."""
        if not self._may_write(now):
            return
        for group in list(self._asked):
            self._write_asked(group, groups, now)
        for group in self._to_plan():
            watch = self._watch(group)
            watch.notice(group, now)
            if self._window() <= 0:
                continue
            if not watch.pending and self._is_due(group, watch, now):
                self._look_at(group, watch, now)
            self._write_in_turn(group, watch.pending, groups, now)

    def _to_plan(self) -> Collection[Group]:
        """What was stirred since the last plan, and some of the others in turn."""
        chosen, self._stirred_now = self._stirred_now, {}
        for group in list(islice(self._stirred, PLAN_GROUPS)):
            self._stirred.move_to_end(group)
            chosen[group] = None
        return chosen

    def _is_due(self, group: Group, watch: _Watch, now: float) -> bool:
        """The part that was kept clean has shrunk, or other blocks may be in it by now."""
        evicted = group.evicted_from_host - watch.evicted
        return evicted >= max(CLEAN_BLOCKS_MIN // 2, watch.target // 4) or now - watch.looked_s >= LOOK_AGAIN_S

    def _look_at(self, group: Group, watch: _Watch, now: float) -> None:
        """Find what should be clean and is not; forget the group where there is room without that."""
        target = self._clean_target(group, watch, now)
        if not target:
            del self._stirred[group]
            return
        watch.evicted, watch.looked_s, watch.target = group.evicted_from_host, now, target
        watch.pending = self._chains(group, group.policies[HOST].coldest(target))
        watch.pending.reverse()

    def _write_in_turn(self, group: Group, rows: list[int], groups: Collection[Group], now: float) -> bool:
        """Write from the end of `rows` as much as fits the window, and take that out; True when none is left.

        Each row has one turn. A small drive makes room for one by giving up another that is in host memory too and so
        is dirty again: who went over the same rows until all were clean would never end.
        """
        size = group.complete_bytes
        while rows and (room := self._window()) > 0:
            part = rows[: -max(1, room // size) - 1 : -1]
            del rows[-len(part) :]
            if not self.write(group, part, groups, now):
                rows += reversed(part)
                break
        return not rows

    def _chains(self, group: Group, coldest: Sequence[int]) -> list[int]:
        """The coldest chain first, but each parents before children: a chain is read so, and of use as far as it goes.

        `coldest` has children before parents.
        """
        parents = group.index.parents
        ordered: list[int] = []
        first = 0
        for at in range(1, len(coldest) + 1):
            if at == len(coldest) or parents[coldest[at - 1]] != coldest[at]:
                ordered += coldest[first:at][::-1]
                first = at
        return ordered

    def sweep(self, groups: Collection[Group], now: float) -> None:
        """Nobody asks for anything: write what is only in host memory, a bounded part of it in each call.

        The next call goes on with the next namespace. Nothing is gone over twice until something was stored again.
        """
        left = SWEEP_ROWS if self._may_write(now) else 0
        for group in _after(self._swept, groups):
            if self._window() <= 0 or left <= 0:
                return
            self._swept = group
            watch, count = self._watch(group), len(group.index.hashes)
            if group.memory_only or not dirty_shards(group) or watch.swept == watch.stored:
                continue
            if not watch.to_sweep:
                watch.to_sweep = self._next_dirty(group, watch, left)
                watch.to_sweep.reverse()
                left -= min(left, count)
            if self._write_in_turn(group, watch.to_sweep, groups, now) and watch.cursor >= count:
                watch.swept, watch.cursor = watch.sweeping, 0

    def write(
        self, group: Group, rows: Sequence[int], groups: Collection[Group], now: float, *, asked: bool = False
    ) -> bool:
        """Begin to write blocks, parents before children; False when the window was full before the last of them.

        What a client `asked` to have written is not weighed.
        """
        if group.memory_only or not self._may_write(now):
            return True
        shards = tuple(group.shards.values())
        dirty = [row for row in rows if any(self._is_dirty(shard, row) for shard in shards)]
        if not asked:
            dirty = group.not_over(dirty)
        admitted = dirty if asked or not dirty else self._rule.admit(group, dirty, now)
        return all(self._write_part(shard, admitted, groups, now) for shard in group.shards.values())

    def _write_part(self, shard: Shard, rows: Sequence[int], groups: Collection[Group], now: float) -> bool:
        """One shard's part of `write`."""
        dirty = [row for row in rows if self._is_dirty(shard, row)]
        batch = _Batch(shard)
        size = shard.slots.block_bytes
        for position, row in enumerate(dirty):
            if self._window() < size and self._writing_bytes:
                self._start_write(batch, now)
                return False
            if not self._is_dirty(shard, row):  # asked for twice, or lost to make room for the one before
                continue
            wanted = min(len(dirty) - position, max(1, self._window() // size))
            if not self._begin_write(batch, row, groups, wanted, now):
                break
            if len(batch.rows) * size >= self.config.chunk_bytes:
                self._start_write(batch, now)
        self._start_write(batch, now)
        return True

    def durable(self, group: Group, rows: Sequence[int]) -> int:
        """How many leading blocks are on the drive."""
        index = group.index
        return next((at for at, row in enumerate(rows) if not index.is_whole_in(row, NVME)), len(rows))

    def coming(self, group: Group, rows: Iterable[int]) -> int:
        """How many of these are being written to the drive."""
        return sum(group.index.is_coming_to(row, NVME) for row in rows)

    def flush(self, groups: Collection[Group], now: float) -> bool:
        """Write all that is in host memory only when this is first called, namespace by namespace, what was last asked
        for first; to be called again whenever a write has ended, and now and then. False when nothing is left, nothing
        can be written, or several tries have failed.
        """
        if self._may_write(now):
            if self._to_flush is None:
                self._flushes += 1
                coldest_first = sorted(groups, key=lambda group: group.last_touch_s)
                self._to_flush = [(group, self._coldest_dirty(group)) for group in coldest_first]
            while self._to_flush and self._write_in_turn(*self._to_flush[-1], groups, now):
                self._to_flush.pop()
        if self.in_flight or not self._last_failed:
            return self.in_flight > 0
        self._to_flush = None  # what failed is dirty still
        return self._flushes < FLUSH_TRIES

    def _coldest_dirty(self, group: Group) -> list[int]:
        if group.memory_only or not dirty_shards(group):
            return []
        rows = group.policies[HOST].coldest(len(group.index.hashes))
        dirty = [row for row in rows if any(self._is_dirty(shard, row) for shard in group.shards.values())]
        return group.not_over(dirty)

    def is_busy(self, group: Group) -> bool:
        """Some of its blocks are under way."""
        return any(transfer.shard.group is group for transfer in self._transfers.values())

    def forget(self, group: Group) -> None:
        """The group is no more."""
        self._watches.pop(group, None)
        self._stirred.pop(group, None)
        self._stirred_now.pop(group, None)
        self._asked.pop(group, None)
        self._swept = None if self._swept is group else self._swept

    def waits(self, now: float) -> bool:
        """Nothing may be written yet, but soon: the tier's slabs are still to be told, or a pause is to end."""
        return self._nvme.tier.slabs_total > 0 and not self._may_write(now)

    def _may_write(self, now: float) -> bool:
        """The tier's slabs are known, and there is a drive whose last writes did not all fail a moment ago."""
        if self._pauses:
            self._pauses = {drive: until_s for drive, until_s in self._pauses.items() if until_s > now}
            self._nvme.tier.barred = frozenset(self._pauses)
        return self.ready and len(self._pauses) < self.config.drives

    def _watch(self, group: Group) -> _Watch:
        return self._watches.setdefault(group, _Watch())

    def _clean_target(self, group: Group, watch: _Watch, now: float) -> int:
        """How many blocks should be able to leave at once: none while there is room without that.

        While blocks leave unwritten: what a burst takes, and what the window holds beside, so that it never runs dry.
        """
        spaces = [shard.slots for shard in group.shards.values()]
        blocks = max(space.count(RESIDENT) for space in spaces)
        target = max(int(blocks * self.config.clean_share), CLEAN_BLOCKS_MIN)
        if watch.is_pressed(now):
            target = max(target, min(watch.burst + self._window_bytes() // group.complete_bytes, blocks // 2))
        target = min(target, CLEAN_BLOCKS_MAX, blocks)
        free = min(space.count(FREE) for space in spaces)
        spare = self._host.tier.slabs_free * min(space.slots_per_slab for space in spaces)
        return max(0, target - free - spare // len(spaces))

    def _next_dirty(self, group: Group, watch: _Watch, limit: int) -> list[int]:
        """The dirty ones of the next `limit` rows."""
        count, first = len(group.index.hashes), watch.cursor
        if not first:
            watch.sweeping = watch.stored
        watch.cursor = min(first + limit, count)
        shards = tuple(group.shards.values())
        return [row for row in range(first, watch.cursor) if any(self._is_dirty(shard, row) for shard in shards)]

    def _is_dirty(self, shard: Shard, row: int) -> bool:
        """This shard's part is in host memory, and neither on the drive nor on its way there."""
        index = shard.group.index
        return (
            index.slot(row, HOST, shard.rank) != NO_SLOT
            and index.slot(row, NVME, shard.rank) == NO_SLOT
            and index.reserved_slot(row, NVME, shard.rank) == NO_SLOT
        )

    def _begin_write(self, batch: _Batch, row: int, groups: Collection[Group], wanted: int, now: float) -> bool:
        shard = batch.shard
        if not self.budget.take(self._wear_bytes(shard), now):
            return False
        shard.group.hold((row,))
        room = self._nvme.ensure(shard, groups, now, wanted)
        if room:
            nvme_slot, _ = shard.group.reserve(shard, row, NVME, self._nvme.tier.barred)
            batch.add(row, shard.group.index.slot(row, HOST, shard.rank), nvme_slot)
            self._writing_bytes += shard.slots.block_bytes
        else:
            self.budget.give_back(self._wear_bytes(shard))
        shard.group.let_go((row,))
        return room != Room.NONE

    @staticmethod
    def _wear_bytes(shard: Shard) -> int:
        """What a block's write writes to the drive: its slot and the header page before it."""
        return shard.spaces[NVME].slot_bytes + PAGE_BYTES

    def _start_write(self, batch: _Batch, now: float) -> None:
        if batch.rows:
            self._begin(Direction.WRITE, batch, now)
            batch.clear()

    def _window_bytes(self) -> int:
        return min(self.config.window_bytes, self._host.tier.capacity_bytes // WINDOW_SHARE)

    def _window(self) -> int:
        return self._window_bytes() - self._writing_bytes

    # Ends

    def done(self, transfer_id: int, verdicts: Sequence[int], checksums: Sequence[int], now: float) -> None:
        """A transfer has ended: one `Verdict` and payload checksum a block. One that was given up is not known."""
        transfer = self._transfers.pop(transfer_id, None)
        if transfer is None:
            return
        asked = self._waiting.pop(transfer_id, None) is None
        self._ahead_bytes -= self._ahead.pop(transfer_id, 0)
        self._ask_ahead()
        if transfer.direction == Direction.LOAD:
            if self.link is not None and asked:
                self._measure(self.link, transfer, verdicts, now)
            self._loaded(transfer, verdicts, checksums, now)
        else:
            self._written(transfer, verdicts, checksums, now)

    def _measure(self, link: Link, transfer: Transfer, verdicts: Sequence[int], now: float) -> None:
        """What was not moved whole says nothing of the link."""
        if any(verdict != Verdict.OK for verdict in verdicts):
            link.cancel(self._payload(transfer))
        else:
            link.done(self._payload(transfer), transfer.started_s, now)

    def _loaded(self, transfer: Transfer, verdicts: Sequence[int], checksums: Sequence[int], now: float) -> None:
        shard, group = transfer.shard, transfer.shard.group
        for row in transfer.rows:
            del self._loading[shard.ns, row]
        self._prefetching_bytes -= self._payload(transfer) if transfer.kept else 0
        good = [i for i, verdict in enumerate(verdicts) if verdict == Verdict.OK]
        failed = [i for i, verdict in enumerate(verdicts) if verdict != Verdict.OK]
        if transfer.cancelled and (transfer.leases or transfer.kept):
            cancelled = [i for i in failed if verdicts[i] == Verdict.CANCELLED]
            failed = [i for i in failed if verdicts[i] != Verdict.CANCELLED]
            self._load_after_all(transfer, cancelled, now)
        if good:
            group.commit(shard, [transfer.rows[i] for i in good], [transfer.host_slots[i] for i in good], now)
        for i in good:
            shard.slots.keep_checksum(transfer.host_slots[i], checksums[i])
        self._counters.promoted_blocks += len(good)
        self._counters.promoted_bytes += len(good) * shard.slots.block_bytes
        for i in failed:
            self._not_loaded(transfer, i, verdicts[i])
        self._tell(transfer, {transfer.rows[i] for i in failed})

    def _load_after_all(self, transfer: Transfer, cancelled: Sequence[int], now: float) -> None:
        """What was cancelled with its last lease and asked for by another since begins anew, into the same slots."""
        batch = _Batch(transfer.shard)
        for i in cancelled:
            batch.add(transfer.rows[i], transfer.host_slots[i], transfer.nvme_slots[i])
        self._prefetching_bytes += len(batch.rows) * transfer.shard.slots.block_bytes if transfer.kept else 0
        self._start_load(batch, [self._leases[lease_id] for lease_id in transfer.leases], now, kept=transfer.kept)

    def _not_loaded(self, transfer: Transfer, i: int, verdict: int) -> None:
        """Give the host slot back; a block that is not what it should be on the drive is not there any more."""
        shard, group, row = transfer.shard, transfer.shard.group, transfer.rows[i]
        counters = self._counters
        counters.promotions_cancelled_blocks += verdict == Verdict.CANCELLED
        counters.promotions_failed_blocks += verdict == Verdict.FAILED
        counters.corrupt_blocks += verdict == Verdict.CORRUPT
        counters.stale_blocks += verdict == Verdict.STALE
        bad = verdict != Verdict.CANCELLED and group.index.slot(row, NVME, shard.rank) == transfer.nvme_slots[i]
        if bad:
            group.pin(row, False)
            group.drop_from(row, NVME, quarantine=verdict != Verdict.STALE)
        group.abort(shard, row, transfer.host_slots[i])

    def _tell(self, transfer: Transfer, failed: set[int]) -> None:
        for lease_id in transfer.leases:
            lease = self._leases.get(lease_id)
            if lease is None:
                continue
            lease.transfers.discard(transfer.transfer_id)
            total = lease.total
            if failed:
                end = (at for at in range(lease.ready, total) if lease.rows[at] in failed)
                lease.total = next(end, total)
            if self.advance(lease) or lease.total < total:
                for session_id in lease.watchers:
                    self._effects.progress.append(LeaseProgress(session_id, lease_id, lease.ready, lease.total))

    def _written(self, transfer: Transfer, verdicts: Sequence[int], checksums: Sequence[int], now: float) -> None:
        shard, group = transfer.shard, transfer.shard.group
        self._writing_bytes -= self._payload(transfer)
        good = []
        self._pause_drives(transfer, verdicts, now)
        for i, verdict in enumerate(verdicts):
            if verdict == Verdict.OK and self._is_what_was_stored(transfer, i, checksums[i]):
                good.append(i)
                continue
            self._counters.demotions_failed_blocks += 1
            if verdict == Verdict.CANCELLED:
                self.budget.give_back(self._wear_bytes(shard))
            group.abort(shard, transfer.rows[i], transfer.nvme_slots[i], tier=NVME)
            if verdict == Verdict.OK:
                self._drop_spoilt(group, transfer.rows[i])
        rows, slots = [transfer.rows[i] for i in good], [transfer.nvme_slots[i] for i in good]
        group.commit(shard, rows, slots, now, NVME)
        if len(good) < len(transfer.rows):
            self._watch(group).stored += 1
        self._last_failed = Verdict.OK not in verdicts
        self._counters.demoted_blocks += len(good)
        self._counters.demoted_bytes += len(good) * shard.slots.block_bytes

    def _pause_drives(self, transfer: Transfer, verdicts: Sequence[int], now: float) -> None:
        """Those on which blocks of the transfer were to be written and none was."""
        space, drives = transfer.shard.spaces[NVME], self.config.drives
        touched, worked = set(), set()
        for slot, verdict in zip(transfer.nvme_slots, verdicts, strict=True):
            drive = space.place(slot)[0] % drives
            touched.add(drive)
            if verdict == Verdict.OK:
                worked.add(drive)
        for drive in touched - worked:
            self._pauses[drive] = now + PAUSE_S

    def _is_what_was_stored(self, transfer: Transfer, i: int, checksum: int) -> bool:
        """The bytes written are those that the block's writer, or the drive it came from, vouched for."""
        slots, host_slot = transfer.shard.slots, transfer.host_slots[i]
        known = slots.checksum(host_slot)
        if known and known != checksum:
            self._counters.corrupt_blocks += 1
            return False
        slots.keep_checksum(host_slot, checksum)
        return True

    def _drop_spoilt(self, group: Group, row: int) -> None:
        """Its bytes in host memory are not what was stored. Who leases it now can tell by the checksum."""
        group.pin(row, False)
        if group.removable(row):
            group.drop(row)

    def give_up_loads(self, shard: Shard, serial: int) -> None:
        """The host slab that these loads were to fill is not there; their end, if still reported, changes nothing."""
        for transfer in list(self._transfers.values()):
            in_slab = (slot // shard.slots.slots_per_slab == serial for slot in transfer.host_slots)
            if transfer.shard is shard and transfer.direction == Direction.LOAD and any(in_slab):
                self._effects.transfers = [each for each in self._effects.transfers if each is not transfer]
                transfer.cancelled = False  # it must not begin anew
                count = len(transfer.rows)
                self.done(transfer.transfer_id, [Verdict.CANCELLED] * count, [0] * count, transfer.started_s)

    # Helpers

    def _begin(self, direction: Direction, batch: _Batch, now: float, *, waits: bool = False) -> Transfer:
        self._last_id += 1
        shard = batch.shard
        generations = [shard.spaces[NVME].generation(slot) for slot in batch.nvme_slots]
        transfer = Transfer(
            self._last_id, direction, shard, batch.rows, batch.host_slots, batch.nvme_slots, generations, now
        )
        self._transfers[self._last_id] = transfer
        if waits:
            self._waiting[self._last_id] = transfer
        else:
            self._ask(transfer)
        return transfer

    @property
    def in_flight(self) -> int:
        """Transfers under way."""
        return len(self._transfers)

    def stats(self, groups: Iterable[Group], now: float) -> MovementStats:
        loads = [t for t in self._transfers.values() if t.direction == Direction.LOAD]
        writes = [t for t in self._transfers.values() if t.direction == Direction.WRITE]
        return MovementStats(
            ready=self.ready,
            loads=len(loads),
            loading_blocks=sum(len(t.rows) for t in loads),
            writes=len(writes),
            writing_blocks=sum(len(t.rows) for t in writes),
            writing_bytes=self._writing_bytes,
            dirty_blocks=sum(map(dirty_shards, groups)),
            budget_bytes_per_day=self.budget.bytes_per_day,
            budget_left_bytes=self.budget.left_bytes(now),
        )

    def holds(self) -> Iterator[tuple[Group, int]]:
        """Every row that a transfer holds, once for each; for `Store.check`."""
        for transfer in self._transfers.values():
            for row in transfer.rows:
                yield transfer.shard.group, row

    def check(self) -> Iterator[str]:
        """Yield each violated invariant."""
        writing = 0
        for transfer in self._transfers.values():
            index, shard = transfer.shard.group.index, transfer.shard
            coming, slots = (
                (HOST, transfer.host_slots) if transfer.direction == Direction.LOAD else (NVME, transfer.nvme_slots)
            )
            if transfer.direction == Direction.WRITE:
                writing += len(transfer.rows) * shard.slots.block_bytes
            for row, slot in zip(transfer.rows, slots, strict=True):
                if index.reserved_slot(row, coming, shard.rank) != slot:
                    yield f"transfer {transfer.transfer_id} brings row {row} to a slot that is not reserved for it"
        if not self._waiting.keys() <= self._transfers.keys() or not self._ahead.keys() <= self._transfers.keys():
            yield "a prefetch that has ended is still to be asked for, or counted"
        if self._waiting and self._ahead_bytes < self.config.ahead_bytes * self.config.drives:
            yield "prefetches wait, and nothing is in their way"
        if self._ahead_bytes != sum(self._ahead.values()):
            yield f"{self._ahead_bytes} bytes counted as prefetched, {sum(self._ahead.values())} are"
        if writing != self._writing_bytes:
            yield f"{self._writing_bytes} bytes counted as being written, {writing} are"


class _Batch:
    """Blocks of one shard that will go in one transfer."""

    __slots__ = ("host_slots", "nvme_slots", "rows", "shard")

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.clear()

    def add(self, row: int, host_slot: int, nvme_slot: int) -> None:
        self.rows.append(row)
        self.host_slots.append(host_slot)
        self.nvme_slots.append(nvme_slot)

    def clear(self) -> None:
        self.rows: list[int] = []
        self.host_slots: list[int] = []
        self.nvme_slots: list[int] = []


def _after(last: Group | None, groups: Collection[Group]) -> list[Group]:
    """All groups, once each, beginning with the one behind `last`."""
    ordered = list(groups)
    first = ordered.index(last) + 1 if last in ordered else 0
    return ordered[first:] + ordered[:first]


def dirty_shards(group: Group) -> int:
    """Parts of blocks that are in host memory and not on the drive."""
    return sum(shard.slots.count(RESIDENT) for shard in group.shards.values()) - group.index.doubled
