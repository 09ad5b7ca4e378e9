"""The state machine of the daemon: an event and the time go in, a decision and its effects come out.

Every method is one event. It answers at once, or raises a `ForebayError` and changes nothing. What must be
carried out before the answer is sent (memory for a slab, bumped generations) waits in `drain_effects`. The
caller reports time by passing `now` and by calling `expire` when `next_deadline` has passed; nothing here
reads a clock.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from forebay.kvstore.allocation import Allocator
from forebay.kvstore.errors import (
    BadRequest,
    Busy,
    Draining,
    Expired,
    Forbidden,
    LayoutError,
    NotLeased,
    QuotaExceeded,
    UnknownNamespace,
    UnknownSession,
)
from forebay.kvstore.eviction.policies import PolicyMaker, lru
from forebay.kvstore.explanation import BlockStory, explain
from forebay.kvstore.groups import HOST, NVME, Effects, Group, Room, Shard
from forebay.kvstore.index import NO_ROW
from forebay.kvstore.leases import Deadlines, Lease, Reservation, Session
from forebay.kvstore.movement import Movement, NvmeConfig
from forebay.kvstore.namespace import NamespaceSpec
from forebay.kvstore.outcome import Outcome, Scope, StopReason
from forebay.kvstore.physics import NOTHING_KNOWN, Physics, PhysicsConfig
from forebay.kvstore.recording import Recorded, Recording
from forebay.kvstore.removal import Removal, every_root, named, remove
from forebay.kvstore.restoration import FoundBlock, Owner, Restoration
from forebay.kvstore.slabs import FREE, QUARANTINED, RESERVED, RESIDENT, ShardSlots, Slab, SlabFormat, TierSpace
from forebay.kvstore.stats import Counters, StoreStats, TierStats

TIER_NAMES = ("host", "nvme")
PREFERRED_SHARE = 0.25
"""Of memory, so much may be blocks that were stored with a priority."""
_REFUSALS_TOLD = 8
_REMOVALS_MAX = 16
"""Of one session, not done yet: as many threads of a client may remove blocks at a time."""
_QUICK_BLOCKS = 100
"""So many blocks that nobody uses, or free slots, are given up in the time of looking at one block in use."""
_TIDIED_ROWS, _TIDIED_ROWS_IDLE = 100, 1000
"""Unreachable blocks of an earlier life that a plan, and a sweep, look at: a millisecond, and ten."""


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Sizes and limits. Times are seconds."""

    capacity_bytes: int
    slab_bytes: int
    ttl_max_s: float = 300.0
    reservation_ttl_s: float = 60.0
    pin_quota: float = 0.25
    slab_idle_s: float = 60.0
    sessions_max: int = 1024
    namespaces_max: int = 1024
    leases_max: int = 65_536
    reservations_max: int = 65_536
    nvme: NvmeConfig | None = None
    host_policy: PolicyMaker = lru
    physics: PhysicsConfig = NOTHING_KNOWN


@dataclass(frozen=True, slots=True)
class Acquired:
    """Leading blocks leased for reading: `slots[i]` and the generation to compare after copying.

    The first `ready` may be copied now, the others are being brought to their slots. `checksums` are those of the
    payloads, 0 where not known, or empty where none is. After `soft_s` what has not been brought is better computed; 0:
    there is no such time.
    """

    lease_id: int
    slots: array[int]
    generations: array[int]
    ready: int
    checksums: array[int]
    soft_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Reserved:
    """One outcome per hash; slots and generations of those to WRITE, in order."""

    reservation_id: int
    outcomes: bytearray
    slots: array[int]
    generations: array[int]


@dataclass(frozen=True, slots=True)
class Removed:
    """What was removed and kept so far; `more` is the number of the removal while it is not done, then 0."""

    removed: int
    kept: int
    more: int = 0


@dataclass(frozen=True, slots=True)
class Durability:
    """Leading blocks on the drive, and how many of the others are on their way there or wait for their turn."""

    durable: int
    pending: int


def _nothing() -> None:
    """Hand nothing over."""


_NOTHING_ACQUIRED = Acquired(0, array("Q"), array("Q"), 0, array("Q"))


class Store:
    """All sessions, namespaces, leases and reservations over a host tier and, where there is one, an nvme tier.

    Args:
        config: sizes and limits.
        new_id: makes an unguessable id of 63 bits that is not 0 and not in use; injected so that a seed replays.
    """

    def __init__(self, config: StoreConfig, new_id: Callable[[], int]) -> None:
        self.config = config
        self.draining = False
        self.effects = Effects()
        self.counters = Counters()
        forms = [SlabFormat(config.slab_bytes, checksums=True)]
        capacities = [config.capacity_bytes]
        if config.nvme is not None:
            forms.append(config.nvme.form)
            capacities.append(config.nvme.capacity_bytes)
        self.tiers = tuple(map(TierSpace, TIER_NAMES, capacities, forms))
        self._allocators = tuple(
            Allocator(tier, level, self.effects, self.counters, config.slab_idle_s)
            for level, tier in enumerate(self.tiers)
        )
        self._allocator = self._allocators[HOST]
        self.physics = Physics(config.physics, sum(capacities))
        self._new_id = new_id
        self._sessions: dict[int, Session] = {}
        self._groups: dict[tuple[int, bytes], Group] = {}
        self._shards: dict[int, Shard] = {}
        self._leases: dict[int, Lease] = {}
        self._reservations: dict[int, Reservation] = {}
        self._last_ns = 0
        self._last_asked_s = 0.0
        self._lease_deadlines = Deadlines()
        self._reservation_deadlines = Deadlines()
        self._expected_deadlines = Deadlines()
        self.movement: Movement | None = None
        if config.nvme is not None:
            host, nvme = self._allocators
            self.movement = Movement(
                config.nvme, (host, nvme), self.effects, self.counters, self._leases, self.physics.prefill
            )
            self.movement.link = self.physics.links[NVME]
            self._restoration = Restoration(self.tiers[NVME], self.effects, self.counters, self._restored_shard)

    def reconfigure(self, config: StoreConfig) -> None:
        """Take over other limits and rates while running; sizes stay what they are."""
        self.config = config
        self.physics.config = config.physics
        if self.movement is not None and config.nvme is not None:
            self.movement.reconfigure(config.nvme)

    # Sessions

    def open_session(self, session_id: int, uid: int, client_group: bytes = b"", *, operator: bool = False) -> None:
        """A client connected; `session_id` was never used before. Raises Busy when `sessions_max` are open."""
        assert session_id not in self._sessions, f"session {session_id} is open"
        if len(self._sessions) >= self.config.sessions_max:
            raise Busy(f"{len(self._sessions)} sessions are open, which is the limit")
        # Wider than any group a client may name, so that nobody can join a session that named none.
        group = client_group or session_id.to_bytes(64, "little")
        self._sessions[session_id] = Session(session_id, uid, group, operator)
        self.counters.sessions_opened += 1

    def close_session(self, session_id: int) -> None:
        """A client died or left: its leases and reservations end, its half-written slots are free at once."""
        session = self._sessions.pop(session_id)
        for lease_id in list(session.leases):
            self._end_lease(self._leases[lease_id])
        for reservation_id in list(session.reservations):
            self._give_up(self._reservations[reservation_id])
        for group in self._groups.values():
            group.end_session(session_id)
        recording = self.physics.recording
        if recording is not None and recording.session_id == session_id:
            self.physics.recording = None
        self.counters.sessions_closed += 1

    # Namespaces

    def open_namespace(self, session_id: int, spec: NamespaceSpec) -> Shard:
        """The shard of a namespace, made when it is new.

        At `namespaces_max` the one that has gone longest unused makes way, of those that no session has open and
        that hold no pin. Where a block fits no nvme slab its blocks stay in memory alone. Raises BadRequest,
        LayoutError (a block fits no slab of host memory), QuotaExceeded (none may go).
        """
        session = self._session(session_id)
        spec.validate()
        merged = spec.merged()
        key = (session.uid, merged.group_fingerprint())
        group = self._groups.get(key)
        shard = group.shards.get(merged.shard_rank) if group else None
        if shard is None:
            shard = self._new_shard(merged, key)
        elif (shard.slots.block_bytes, shard.group.index.shard_size) != (merged.block_bytes, merged.shard_size):
            raise LayoutError("what the drive says of this namespace contradicts its spec")
        shard.group.spec = merged  # that of a restored namespace lacked what is not on disk
        session.namespaces.add(shard.ns)
        return shard

    def find_namespace(self, session_id: int, fingerprint_prefix: bytes, rank: int = 0) -> Shard:
        """The namespace of any user whose group fingerprint begins so.

        Raises Forbidden (fingerprints are public, so who is no operator has to know the spec and its salt),
        UnknownNamespace, BadRequest (more than one begins so).
        """
        session = self._session(session_id)
        if not session.operator:
            raise Forbidden("only an operator may find namespaces by fingerprint; open it by its spec")
        found = [group for group in self._groups.values() if group.fingerprint.startswith(fingerprint_prefix)]
        if len(found) > 1:
            raise BadRequest(f"{len(found)} namespaces begin with {fingerprint_prefix.hex()}; give more digits")
        shard = found[0].shards.get(rank) if found else None
        if shard is None:
            raise UnknownNamespace(f"no namespace begins with {fingerprint_prefix.hex()} at rank {rank}")
        session.namespaces.add(shard.ns)
        return shard

    def shard(self, session_id: int, ns: int) -> Shard:
        """The shard a session opened under this handle."""
        session = self._session(session_id)
        if ns not in session.namespaces:
            raise UnknownNamespace(f"namespace {ns} is not open in this session")
        return self._shards[ns]

    def slab(self, session_id: int, ns: int, serial: int) -> tuple[Shard, Slab]:
        """A slab that this session may map."""
        shard = self.shard(session_id, ns)
        slab = shard.slots.slabs.get(serial)
        if slab is None:
            raise UnknownNamespace(f"namespace {ns} has no slab {serial}")
        return shard, slab

    def sessions_of(self, ns: int) -> list[int]:
        """Sessions that opened the namespace and so may map its slabs."""
        return [session_id for session_id, session in self._sessions.items() if ns in session.namespaces]

    # Reading

    def lookup(self, session_id: int, ns: int, hashes: Sequence[bytes], now: float) -> Sequence[int]:
        """Rows of the leading complete blocks. Takes no lease, but counts as a use."""
        group = self.shard(session_id, ns).group
        rows = group.index.walk(hashes)
        counters = self.counters
        counters.lookups += 1
        counters.lookup_hashes += len(hashes)
        counters.lookup_hit_blocks += len(rows)
        group.request(hashes, rows, now, opens=True)
        self.physics.asked(group, hashes, rows, now)
        return rows

    def acquire(
        self,
        session_id: int,
        ns: int,
        hashes: Sequence[bytes],
        ttl_s: float,
        now: float,
        hand_over: Callable[[], None] = _nothing,
    ) -> Acquired:
        """Lease the leading complete blocks until released or for `ttl_s`, at most `ttl_max_s`.

        `hand_over` is called while a long lease is being made, between parts of it that have to be read from a drive:
        it may carry out the effects so far. Raises Busy at `leases_max`, Draining while shutting down.
        """
        session, shard = self._session(session_id), self.shard(session_id, ns)
        self._refuse_when_draining()
        if len(self._leases) >= self.config.leases_max:
            raise Busy(f"{len(self._leases)} leases are held, which is the limit")
        group = shard.group
        rows = group.index.walk(hashes)
        if not rows:
            self.physics.leased(group, hashes, rows, 0, now)
            return _NOTHING_ACQUIRED
        group.request(hashes, rows, now)
        group.hold(rows)
        deadline = now + min(ttl_s, self.config.ttl_max_s)
        lease = Lease(self._fresh_id(self._leases), session, group, rows, deadline)
        on_drive = 0 if self.movement is None else group.index.count_by_tier(rows)[NVME]
        load_s = self.physics.leased(group, hashes, rows, on_drive, now)
        self._leases[lease.lease_id] = lease
        session.leases.add(lease.lease_id)
        self._lease_deadlines.add(lease.lease_id, deadline)
        self._bring(lease, now, hand_over)
        if lease.lease_id not in self._leases:
            return _NOTHING_ACQUIRED
        rows = lease.rows
        self.physics.granted(group, hashes, rows, load_s, now)
        soft_s = 0.0
        if lease.ready < len(rows):
            self.physics.expect(lease.lease_id, load_s, now)
            soft_s = self.physics.soft_deadline_s(group, rows[lease.ready :], load_s)
        self.counters.acquired_blocks += len(rows)
        self.counters.acquired_bytes += len(rows) * shard.slots.block_bytes
        return _acquired(lease, shard, soft_s)

    def resolve(self, session_id: int, ns: int, lease_id: int) -> Acquired:
        """The slots of a lease in another shard of its group, for a session of the holder's client group."""
        session, shard = self._session(session_id), self.shard(session_id, ns)
        lease = self._leases.get(lease_id)
        if lease is None or lease.session.client_group != session.client_group or lease.session.uid != session.uid:
            raise NotLeased(f"lease {lease_id} is not held by this client group, or has ended")
        if lease.group is not shard.group:
            raise NotLeased(f"lease {lease_id} is not of namespace {ns}")
        lease.watchers.add(session_id)
        return _acquired(lease, shard)

    def prefetch(self, session_id: int, ns: int, hashes: Sequence[bytes], now: float) -> tuple[int, int]:
        """Begin to bring the leading blocks to host memory; returns how many are there, and how many will be."""
        group = self.shard(session_id, ns).group
        rows = group.index.walk(hashes)
        group.request(hashes, rows, now)
        if self.movement is None or not rows:
            return len(rows), 0
        if self.draining:
            return group.index.count_by_tier(rows)[HOST], 0
        group.hold(rows)
        covered = self.movement.promote(group, rows, None, self._groups.values(), now)
        group.unhold(rows)
        resident = sum(group.index.is_whole_in(row, HOST) for row in rows[:covered])
        return resident, covered - resident

    def release(self, session_id: int, lease_id: int) -> None:
        """End a lease. Raises NotLeased when it is not the session's, was released, or expired."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.session is not self._session(session_id):
            raise NotLeased(f"lease {lease_id} is not held by this session, or has ended")
        self._end_lease(lease)

    # Writing

    def reserve(
        self, session_id: int, ns: int, parent: bytes, hashes: Sequence[bytes], now: float, *, priority: int = 0
    ) -> Reserved:
        """Slots for the blocks of a chain that are not here yet; room is made now.

        Args:
            parent: hash of the block before `hashes`, empty at a root.
            priority: 0 to `PRIORITY_MAX`, of the blocks that get slots; 0 where blocks of others take `PREFERRED_SHARE`
                of memory.
        """
        session, shard = self._session(session_id), self.shard(session_id, ns)
        group = shard.group
        present = group.index.walk(hashes)
        parent_row = self._parent_row(group, parent)
        if self.physics.recording is not None:
            self.physics.recording.stored(group, parent, hashes, now)
        group.grow(hashes, present, parent_row, now)
        self._last_asked_s = now
        outcomes = bytearray([Outcome.PRESENT]) * len(present)
        rows: list[int] = []
        slots, generations = array("Q"), array("Q")
        above = present[-1] if present else parent_row
        first = present[0] if present else above
        self.physics.stored(group, hashes, group.index.depths[first] + (not present) if first != NO_ROW else 0, now)
        refusal = self._refusal(group, parent, above)
        partial = self._hold_partial(group, hashes[len(present) :])
        preferred = self._preferred_room(group) if priority else 0
        for position in range(len(present), len(hashes)):
            outcome = refusal
            if outcome is None:
                allowed = priority if len(rows) < preferred else 0
                outcome, above, place = self._reserve_one(shard, hashes, position, above, now, allowed)
                if outcome in (Outcome.FULL, Outcome.BYPASSED):
                    refusal = outcome
                elif place is not None:
                    rows.append(above)
                    slots.append(place[0])
                    generations.append(place[1])
            outcomes.append(outcome)
        group.let_go(partial)
        self._count(outcomes)
        self.counters.unpreferred_blocks += max(0, len(rows) - max(0, preferred)) if priority else 0
        reservation_id = self._new_reservation(session, shard, rows, slots, now) if rows else 0
        return Reserved(reservation_id, outcomes, slots, generations)

    def commit(
        self, session_id: int, reservation_id: int, failed: Sequence[int], now: float, checksums: Sequence[int] = ()
    ) -> int:
        """Make the written blocks visible; `failed` are indices into the reservation that were not written.

        `checksums` are the payloads', one for each reserved block (0: not known), or none at all.
        What continues a failed block is given back with it: nobody could find it. Returns how many were committed.
        Raises NotLeased, Expired (too late: nothing was published, the slots are given back), BadRequest (an index
        out of range).
        """
        reservation = self._reservation(session_id, reservation_id)
        count = len(reservation.rows)
        if any(not 0 <= index < count for index in failed):
            raise BadRequest(f"a failed index is outside the {count} reserved blocks")
        if len(checksums) not in (0, count):
            raise BadRequest(f"{len(checksums)} checksums for {count} reserved blocks")
        if reservation.expired:
            self._give_up(reservation)
            raise Expired(f"reservation {reservation_id} ran out by the clock; nothing was stored")
        lost = _with_followers(reservation, failed) if failed else set()
        shard, group = reservation.shard, reservation.shard.group
        good = [index for index in range(count) if index not in lost]
        group.commit(shard, [reservation.rows[i] for i in good], [reservation.slots[i] for i in good], now)
        if checksums:
            for index in good:
                shard.slots.keep_checksum(reservation.slots[index], checksums[index])
        for index in lost:
            group.abort(shard, reservation.rows[index], reservation.slots[index])
        self._stir(group, now)
        self.counters.committed_blocks += len(good)
        self.counters.committed_bytes += len(good) * shard.slots.block_bytes
        self.counters.aborted_blocks += len(lost)
        self._forget(reservation)
        return len(good)

    def abort(self, session_id: int, reservation_id: int) -> None:
        """Give all slots of a reservation back. The writer is done with them."""
        self._give_up(self._reservation(session_id, reservation_id))

    # Keeping and removing

    def pin(self, session_id: int, ns: int, hashes: Sequence[bytes]) -> int:
        """Keep the leading complete blocks until unpinned; returns how many are pinned now. Idempotent.

        Raises QuotaExceeded, pinning nothing, beyond `pin_quota` of the tier.
        """
        group = self.shard(session_id, ns).group
        rows = group.index.walk(hashes)
        fresh = sum(not group.index.pinned[row] for row in set(rows))
        wanted = sum(g.pinned_bytes for g in self._groups.values()) + fresh * group.complete_bytes
        allowed = int(self.config.pin_quota * self.tiers[HOST].capacity_bytes)
        if wanted > allowed:
            raise QuotaExceeded(f"{wanted} bytes would be pinned, {allowed} are allowed")
        for row in rows:
            group.pin(row, True)
        return len(rows)

    def unpin(self, session_id: int, ns: int, hashes: Sequence[bytes]) -> int:
        """Returns how many pins were cleared. Idempotent."""
        group = self.shard(session_id, ns).group
        rows = {row for row in map(group.index.find, hashes) if row != NO_ROW}
        return sum(group.pin(row, False) for row in rows)

    def evict(
        self, session_id: int, ns: int, scope: Scope, hashes: Sequence[bytes], *, dry_run: bool = False
    ) -> Removed:
        """Remove blocks on request; those leased, pinned or being written are kept, and so is what leads to them.

        Of many only a first part; `remove_more` does the next.
        """
        session, group = self._session(session_id), self.shard(session_id, ns).group
        removal = Removal(dry_run)
        if scope == Scope.NAMESPACE:
            removal.work = self._clear_group(group, removal)
            return self._go_on(session, removal, 0)
        found = {row for row in map(group.index.find, hashes) if row != NO_ROW}
        below = scope == Scope.PREFIX
        tops = named(group, group.index.topmost(found) if below else found)
        removal.work = remove(group, tops, removal, below=below)
        return self._go_on(session, removal, 0)

    def clear(self, session_id: int, *, dry_run: bool = False) -> Removed:
        """Remove every block of every namespace, as `evict` does.

        Raises Forbidden unless the session is an operator's.
        """
        session = self._session(session_id)
        if not session.operator:
            raise Forbidden("only an operator may clear all namespaces")
        removal = Removal(dry_run)
        removal.work = self._clear_all(removal)
        return self._go_on(session, removal, 0)

    def remove_more(self, session_id: int, number: int) -> Removed:
        """The next part of a removal of which there was `more`. Raises NotLeased where the session has none such."""
        session = self._session(session_id)
        removal = session.removals.pop(number, None)
        if removal is None:
            raise NotLeased(f"removal {number} is not this session's, is done, or made way for later ones")
        return self._go_on(session, removal, number)

    def touch(self, session_id: int, ns: int, hashes: Sequence[bytes], now: float) -> int:
        """Hint: these blocks are in use (an engine that hits its own HBM cache asks for nothing)."""
        group = self.shard(session_id, ns).group
        rows = group.index.walk(hashes)
        group.request(hashes, rows, now)
        return len(rows)

    def done(self, session_id: int, ns: int, hashes: Sequence[bytes], keep: int = 0) -> int:
        """Hint: the conversation that ends with these blocks is over, so what nobody else continues of it goes first.

        Args:
            keep: leading blocks of the prompt that others may ask for all the same.
        Returns how many blocks go first. Those that are still being written will, and count.
        """
        group = self.shard(session_id, ns).group
        blocks = group.end_chain(group.index.deepest(hashes), keep)
        self.counters.done_hints += 1
        self.counters.done_blocks += blocks
        return blocks

    def stopped(self, session_id: int, ns: int, hashes: Sequence[bytes], reason: StopReason) -> int:
        """Hint: how the answer stopped that ends with the last known of these blocks.

        Returns of how many blocks that is taken into account: 0 where eviction goes by recency alone.
        """
        group = self.shard(session_id, ns).group
        self.counters.stopped_hints += 1
        return group.policies[HOST].stopped(hashes, reason)

    def expect(self, session_id: int, ns: int, hashes: Sequence[bytes], within_s: float, now: float) -> int:
        """Hint: these blocks will be asked for within so long; the leading ones stay where they are until then.

        Returns how many do: together at most a share of what the namespace has in a tier. The session's end is the end
        of that, and so is a store that finds no other room (`expectations`).
        """
        group = self.shard(session_id, ns).group
        rows = group.index.walk(hashes)
        kept = group.expect(session_id, rows, now + within_s)
        self.counters.expect_hints += 1
        self.counters.expected_blocks += kept
        self.counters.unexpected_blocks += len(rows) - kept
        if kept:
            self._await_expected(ns, group)
        return kept

    # Between tiers

    def persist(self, session_id: int, ns: int, hashes: Sequence[bytes], now: float) -> Durability:
        """Write the leading blocks to the drive, as fast as its window allows; ask again for how far that has come."""
        group, movement = self.shard(session_id, ns).group, self.movement
        rows = group.index.walk(hashes)
        if movement is None or group.memory_only:
            return Durability(0, 0)
        group.hold(rows)
        all_begun = movement.ask(group, rows, self._groups.values(), now)
        group.unhold(rows)
        durable = movement.durable(group, rows)
        if not all_begun:
            return Durability(durable, len(rows) - durable)
        return Durability(durable, movement.coming(group, rows))

    def transfer_done(self, transfer_id: int, verdicts: Sequence[int], checksums: Sequence[int], now: float) -> None:
        """A transfer has ended, with one `Verdict` and payload checksum (0: none) for each of its blocks."""
        assert self.movement is not None, "a transfer without an nvme tier"
        self.movement.done(transfer_id, verdicts, checksums, now)
        for told in self.effects.progress:
            if told.ready == told.total:
                self.physics.arrived(told.lease_id, now)

    def plan_writes(self, now: float) -> None:
        """Decide what to write to the drive next; call when what was asked has been answered."""
        if self.movement is not None and not self.draining:
            self.movement.plan(self._groups.values(), now)
            self._restoration.go_on(_TIDIED_ROWS)

    def sweep(self, now: float) -> None:
        """Call about once a second: when nobody has asked for anything lately, what is only in memory is written."""
        movement = self.movement
        if movement is not None and not self.draining:
            self._restoration.go_on(_TIDIED_ROWS_IDLE)
        if movement is not None and not self.draining and now - self._last_asked_s >= movement.config.idle_s:
            movement.sweep(self._groups.values(), now)

    def flush(self, now: float) -> bool:
        """Shutting down: write all that is worth it, what was last asked for first; False when nothing is left."""
        movement = self.movement
        if movement is None:
            return False
        return movement.flush(self._groups.values(), now)

    def restore_slabs(self, found: Iterable[tuple[int, Owner, int]], first_generation: int) -> None:
        """The slabs that an earlier life used; from here on others may be assigned, from this generation on."""
        assert self.movement is not None, "slabs without an nvme tier"
        self.tiers[NVME].first_generation = first_generation
        self._restoration.slabs(found)
        self.movement.ready = True

    def restore_blocks(self, found: Sequence[FoundBlock], now: float) -> None:
        """Blocks found in those slabs; visible at once."""
        self._restoration.blocks(found, now)

    def restore_done(self) -> None:
        """All has been found."""
        self._restoration.done()

    # Clients' GPUs

    def pinned(self, session_id: int, size_bytes: int, refused: str) -> None:
        """A client tells what its GPUs reach of its mappings, and why not the rest."""
        session = self._session(session_id)
        session.gpu_pinned_bytes, session.gpu_pin_refused = size_bytes, refused

    # Explaining

    def explain(self, session_id: int, ns: int, name: bytes, now: float) -> BlockStory | None:
        """What is known of a block, None where nothing is. Raises Forbidden (who is no operator)."""
        if not self._session(session_id).operator:
            raise Forbidden("only an operator may ask why a block is where it is")
        group = self.shard(session_id, ns).group
        tiers = tuple(tier.name for tier in self.tiers)
        return explain(group, self.physics, self._leases.values(), tiers, name, now)

    # Recording

    def record(self, session_id: int, ns: int, seconds: float, requests_max: int, now: float) -> None:
        """Begin to keep what is asked of a namespace, for `recorded`; it ends with the session at the latest.

        Raises Forbidden (who is no operator), Busy (another session records).
        """
        if not self._session(session_id).operator:
            raise Forbidden("only an operator may record what others ask for")
        active = self.physics.recording
        if active is not None and active.session_id != session_id and not active.ended(now):
            raise Busy("another session records")
        group = self.shard(session_id, ns).group
        self.physics.recording = Recording(session_id, group, now, now + seconds, requests_max)

    def recorded(self, session_id: int, blocks_max: int, now: float) -> tuple[list[Recorded], int, bool]:
        """The oldest requests that wait, how many were dropped so far, and whether no more will come.

        Raises NotLeased when the session does not record.
        """
        recording = self.physics.recording
        if recording is None or recording.session_id != self._session(session_id).session_id:
            raise NotLeased("this session does not record")
        ended = recording.ended(now)
        taken = recording.take(blocks_max)
        return taken, recording.dropped, ended and not recording.waiting

    # Time, faults, shutdown

    def next_deadline(self) -> float | None:
        """When `expire` has something to do."""
        kinds = (self._lease_deadlines, self._reservation_deadlines, self._expected_deadlines)
        return min((t for kind in kinds if (t := kind.next()) is not None), default=None)

    def expire(self, now: float) -> None:
        """End leases whose time has come; give up late writers' blocks, but not their slots."""
        for lease_id in self._lease_deadlines.due(now):
            self._end_lease(self._leases[lease_id])
            self.counters.expired_leases += 1
        for reservation_id in self._reservation_deadlines.due(now):
            reservation = self._reservations[reservation_id]
            reservation.expired = True
            for row, slot_id in zip(reservation.rows, reservation.slots, strict=True):
                reservation.shard.group.abort(reservation.shard, row, slot_id, quarantine=True)
            self.counters.expired_reservations += 1
        for ns in self._expected_deadlines.due(now):
            shard = self._shards.get(ns)
            if shard is not None:
                shard.group.end_expected(now)
                self._await_expected(ns, shard.group)

    def drain(self) -> None:
        """Shutting down: no new leases or slots; what is under way may finish."""
        self.draining = True

    @property
    def in_use(self) -> int:
        """Leases and reservations that a shutdown waits for."""
        return len(self._leases) + sum(not r.expired for r in self._reservations.values())

    def slab_failed(self, ns: int, serial: int) -> None:
        """The tier could not provide a slab's memory: give up everything on it and take the slab back."""
        shard = self._shards[ns]
        slab = shard.slots.slabs.get(serial)
        if slab is None:
            return
        per_slab = shard.slots.slots_per_slab
        for reservation in list(self._reservations.values()):
            if reservation.shard is shard and any(slot // per_slab == serial for slot in reservation.slots):
                self._give_up(reservation)
        if self.movement is not None:
            self.movement.give_up_loads(shard, serial)
        if shard.slots.is_empty(slab):
            self._allocator.retire(shard, [slab])

    def has_no_effects(self) -> bool:
        return not self.effects

    def drain_effects(self) -> Effects:
        """What must be carried out before the next answer is sent; the caller owns it."""
        return self.effects.drain()

    # Telling

    def stats(self, now: float = 0.0) -> StoreStats:
        groups = self._groups.values()
        return StoreStats(
            tiers=tuple(self._tier_stats(level) for level in range(len(self.tiers))),
            namespaces=tuple(group.stats() for group in groups),
            sessions=len(self._sessions),
            leases=len(self._leases),
            leased_blocks=sum(len(lease.rows) for lease in self._leases.values()),
            reservations=sum(not r.expired for r in self._reservations.values()),
            quarantined_reservations=sum(r.expired for r in self._reservations.values()),
            pinned_blocks=sum(group.pinned_blocks for group in groups),
            draining=self.draining,
            movement=self.movement.stats(groups, now) if self.movement is not None else None,
            counters=replace(self.counters),
            warnings=self._restoration.warnings if self.movement is not None else (),
            physics=self.physics.stats(now),
            gpu_pinned_bytes=sum(session.gpu_pinned_bytes for session in self._sessions.values()),
            gpu_unpinned_sessions=sum(bool(session.gpu_pin_refused) for session in self._sessions.values()),
            gpu_refusals=tuple(sorted({s.gpu_pin_refused for s in self._sessions.values()} - {""})[:_REFUSALS_TOLD]),
        )

    def check(self) -> list[str]:
        """Every violated invariant, in words; empty when all hold. Cost: a walk over everything."""
        problems = [problem for group in self._groups.values() for problem in group.check()]
        for level in range(len(self.tiers)):
            problems += self._check_tier(level)
        problems += self._check_holds()
        if self.movement is not None:
            problems += self.movement.check()
        return problems

    def _check_tier(self, level: int) -> Iterator[str]:
        tier = self.tiers[level]
        physical = [slab.physical for shard in self._shards.values() for slab in shard.spaces[level].slabs.values()]
        if len(set(physical)) != len(physical):
            yield f"a physical slab of the {tier.name} tier is assigned twice"
        if len(physical) + tier.slabs_free != tier.slabs_total:
            yield f"{tier.name}: {len(physical)} slabs assigned, {tier.slabs_free} free, {tier.slabs_total} in all"

    def _check_holds(self) -> Iterator[str]:
        expected: dict[tuple[int, int], int] = {}
        for lease in self._leases.values():
            for row in lease.rows:
                expected[id(lease.group), row] = expected.get((id(lease.group), row), 0) + 1
        quarantined = dict.fromkeys(self._shards, 0)
        for reservation in self._reservations.values():
            if reservation.expired:
                quarantined[reservation.shard.ns] += len(reservation.slots)
                continue
            for row in reservation.rows:
                key = (id(reservation.shard.group), row)
                expected[key] = expected.get(key, 0) + 1
        for group, row in self.movement.holds() if self.movement is not None else ():
            expected[id(group), row] = expected.get((id(group), row), 0) + 1
        for group in self._groups.values():
            for row in group.index.rows():
                if group.index.holds[row] != expected.get((id(group), row), 0):
                    yield f"row {row} has {group.index.holds[row]} holds, leases and writers make another number"
        for ns, count in quarantined.items():
            if self._shards[ns].slots.count(QUARANTINED) != count:
                yield f"namespace {ns}: late writers hold {count} slots, another number is quarantined"

    # Helpers

    def _session(self, session_id: int) -> Session:
        session = self._sessions.get(session_id)
        if session is None:
            raise UnknownSession("the session has ended or was never opened")
        return session

    def _reservation(self, session_id: int, reservation_id: int) -> Reservation:
        reservation = self._reservations.get(reservation_id)
        if reservation is None or reservation.session is not self._session(session_id):
            raise NotLeased(f"reservation {reservation_id} is not this session's, or has ended")
        return reservation

    def _refuse_when_draining(self) -> None:
        if self.draining:
            raise Draining("the daemon is shutting down")

    def _fresh_id(self, taken: dict[int, Lease] | dict[int, Reservation]) -> int:
        while (new := self._new_id()) in taken or new == 0:
            pass
        return new

    def _new_shard(self, spec: NamespaceSpec, key: tuple[int, bytes]) -> Shard:
        spaces = tuple(ShardSlots(tier.form, spec.block_bytes) for tier in self.tiers)
        if not spaces[HOST].slots_per_slab:
            raise LayoutError(_does_not_fit(spec, self.tiers[HOST]))
        if len(self._shards) >= self.config.namespaces_max:
            self._forget_coldest(but=key)
        group = self._groups.get(key)
        if group is None:
            uid, fingerprint = key
            group = Group(spec, fingerprint, uid, self.effects, self.counters, len(self.tiers), self.config.host_policy)
            self._groups[key] = group
            if not spaces[-1].slots_per_slab:
                group.memory_only = _does_not_fit(spec, self.tiers[NVME])
                self.effects.warnings.append(
                    f"namespace {fingerprint.hex()[:12]} is kept in memory alone: {group.memory_only}"
                )
        self._last_ns += 1
        shard = Shard(self._last_ns, spec.shard_rank, group, spaces)
        group.shards[spec.shard_rank] = shard
        self._shards[shard.ns] = shard
        return shard

    def _restored_shard(self, uid: int, fingerprint: bytes, spec: NamespaceSpec) -> Shard:
        group = self._groups.get((uid, fingerprint))
        shard = group.shards.get(spec.shard_rank) if group is not None else None
        if group is not None and group.index.shard_size != spec.shard_size:
            raise BadRequest("the slab of a namespace with another number of shards")
        if shard is None and len(self._shards) >= self.config.namespaces_max:
            raise QuotaExceeded(f"{len(self._shards)} namespaces are in use, which is the limit")
        return shard or self._new_shard(spec, (uid, fingerprint))

    def _bring(self, lease: Lease, now: float, hand_over: Callable[[], None]) -> None:
        """Have the lease's blocks brought to host memory, as many leading ones as fit; where none do, end it."""
        lease.total = len(lease.rows)
        lease.watchers.add(lease.session.session_id)
        self._last_asked_s = now
        if self.movement is None:
            lease.ready = lease.total
            return
        covered = self.movement.fetch(lease, self._groups.values(), now, hand_over)
        if lease.lease_id not in self._leases:
            return  # its session died meanwhile
        lease.group.unhold(lease.rows[covered:])
        lease.rows = lease.rows[:covered]
        lease.total = min(lease.total, covered)
        self.movement.advance(lease)
        self.movement.stir(lease.group)
        if not lease.total:
            self._end_lease(lease)

    def _await_expected(self, ns: int, group: Group) -> None:
        self._expected_deadlines.remove(ns)
        until = group.expectations.until
        if until is not None:
            self._expected_deadlines.add(ns, until)

    def _stir(self, group: Group, now: float) -> None:
        self._last_asked_s = now
        if self.movement is not None:
            self.movement.stir(group, stored=True)

    def _forget_coldest(self, but: tuple[int, bytes]) -> None:
        """Make room for a namespace among `namespaces_max`; raises QuotaExceeded."""
        open_now = {ns for session in self._sessions.values() for ns in session.namespaces}
        idle = [
            (group.last_touch_s, key)
            for key, group in self._groups.items()
            if key != but and not group.pinned_blocks and not any(s.ns in open_now for s in group.shards.values())
            if self.movement is None or not self.movement.is_busy(group)
        ]
        if not idle:
            raise QuotaExceeded(f"{len(self._shards)} namespaces are in use, which is the limit")
        group = self._groups.pop(min(idle)[1])
        assert not any(group.index.holds), "a namespace that no session has open was in use"
        self.counters.removed_blocks += len(group.index.complete)
        for shard in group.shards.values():
            del self._shards[shard.ns]
        self._give_up_blocks(group)
        self.physics.forget(group)

    def _give_up_blocks(self, group: Group) -> None:
        """Take back the slabs of a namespace that nobody uses, whole: a million blocks cost what one does."""
        for shard in group.shards.values():
            for allocator in self._allocators:
                allocator.retire_all(shard)
        if self.movement is not None:
            self.movement.forget(group)
            self._restoration.forget(group)
        group.begin_anew()

    def _parent_row(self, group: Group, parent: bytes) -> int:
        return group.index.find(parent) if parent else NO_ROW

    def _refusal(self, group: Group, parent: bytes, above: int) -> Outcome | None:
        """Why no block of this request may be written at all."""
        if self.draining:
            return Outcome.DRAINING
        if len(self._reservations) >= self.config.reservations_max:
            raise Busy(f"{len(self._reservations)} reservations are held, which is the limit")
        index = group.index
        if parent and (above == NO_ROW or not (index.is_resident(above) or index.holds[above])):
            return Outcome.ORPHAN
        return None

    def _hold_partial(self, group: Group, hashes: Sequence[bytes]) -> list[int]:
        """Hold what other ranks have stored of these blocks, so that room for one is not made of the next."""
        if group.index.shard_size == 1:
            return []
        rows = [row for row in map(group.index.find, hashes) if row != NO_ROW]
        group.hold(rows)
        return rows

    def _reserve_one(
        self, shard: Shard, hashes: Sequence[bytes], position: int, above: int, now: float, priority: int
    ) -> tuple[Outcome, int, tuple[int, int] | None]:
        """Returns (outcome, the block's row, (slot, generation) when it is to be written) for one of `hashes`."""
        group, name = shard.group, hashes[position]
        index = group.index
        row = index.find(name)
        if row == NO_ROW:
            row = index.add(name, above)
        elif any(index.slot(row, level, shard.rank) >= 0 for level in range(len(self.tiers))):
            return Outcome.PRESENT, row, None
        elif index.reserved_slot(row, HOST, shard.rank) >= 0:
            return Outcome.IN_FLIGHT, row, None
        else:
            index.attach(row, above)
        if shard.slots.has_free():
            group.prefer(row, priority)
            return Outcome.WRITE, row, group.reserve(shard, row)
        group.hold((row,))
        newcomers = hashes[position:] if group.may_bypass() and not priority else ()
        room = self._allocator.ensure(shard, self._groups.values(), now, len(hashes) - position, newcomers)
        place = group.reserve(shard, row) if room == Room.MADE else None
        if place is not None:
            group.prefer(row, priority)
        group.let_go((row,))
        if place is not None:
            return Outcome.WRITE, row, place
        return Outcome.BYPASSED if room == Room.DECLINED else Outcome.FULL, above, None

    def _preferred_room(self, group: Group) -> int:
        """How many more blocks of the group may have a priority."""
        taken = sum(each.preferred_bytes for each in self._groups.values())
        return int(PREFERRED_SHARE * self.tiers[HOST].capacity_bytes - taken) // group.complete_bytes

    def _new_reservation(self, session: Session, shard: Shard, rows: list[int], slots: array[int], now: float) -> int:
        deadline = now + self.config.reservation_ttl_s
        reservation = Reservation(self._fresh_id(self._reservations), session, shard, rows, list(slots), deadline)
        self._reservations[reservation.reservation_id] = reservation
        session.reservations.add(reservation.reservation_id)
        self._reservation_deadlines.add(reservation.reservation_id, deadline)
        self.counters.reserved_blocks += len(rows)
        return reservation.reservation_id

    def _end_lease(self, lease: Lease) -> None:
        lease.group.unhold(lease.rows)
        self.physics.ended(lease.lease_id)
        if self.movement is not None:
            self.movement.let_go(lease)
            index = lease.group.index
            for row in lease.rows[lease.total :]:  # what could not be read may have been kept by this lease alone
                if index.hashes[row] is not None:  # unless it went with another of them, or was named twice
                    index.forget_if_empty(row)
        del self._leases[lease.lease_id]
        lease.session.leases.discard(lease.lease_id)
        self._lease_deadlines.remove(lease.lease_id)

    def _give_up(self, reservation: Reservation) -> None:
        """Free all slots of a reservation, quarantined ones too: its writer is done or dead."""
        shard = reservation.shard
        for row, slot_id in zip(reservation.rows, reservation.slots, strict=True):
            if reservation.expired:
                shard.group.free_slot(shard, slot_id)
            else:
                shard.group.abort(shard, row, slot_id)
        self.counters.aborted_blocks += len(reservation.rows)
        self._forget(reservation)

    def _forget(self, reservation: Reservation) -> None:
        del self._reservations[reservation.reservation_id]
        reservation.session.reservations.discard(reservation.reservation_id)
        self._reservation_deadlines.remove(reservation.reservation_id)

    def _go_on(self, session: Session, removal: Removal, number: int) -> Removed:
        """Do the next part of a removal that has this number, or none yet."""
        before = removal.removed
        more = removal.do_part()
        self.counters.removed_blocks += 0 if removal.dry_run else removal.removed - before
        if not more:
            return Removed(removal.removed, removal.kept)
        if not number:
            session.removals_begun += 1
            number = session.removals_begun
        session.removals[number] = removal
        if len(session.removals) > _REMOVALS_MAX:
            del session.removals[next(iter(session.removals))]
        return Removed(removal.removed, removal.kept, number)

    def _clear_all(self, removal: Removal) -> Iterator[int]:
        for key, group in list(self._groups.items()):
            if self._groups.get(key) is group:  # it may have made way for another since the last part
                yield from self._clear_group(group, removal)

    def _clear_group(self, group: Group, removal: Removal) -> Iterator[int]:
        """Remove all of a namespace, quickly where nobody uses it; yields what each step costs."""
        if group.is_idle():
            removed = group.index.resident_count()
            removal.removed += removed
            if not removal.dry_run:
                self._give_up_blocks(group)
            yield 1 + removed // _QUICK_BLOCKS
            return
        if self.movement is not None and not removal.dry_run:
            self._restoration.take_no_more(group)
        yield from remove(group, every_root(group), removal, below=True)
        if removal.dry_run:
            return
        if self.movement is not None:
            self._restoration.abandon(group)
            group.free_quarantined(NVME)
        for level, allocator in enumerate(self._allocators):
            free = sum(shard.spaces[level].count(FREE) for shard in group.shards.values())
            yield free // _QUICK_BLOCKS
            allocator.retire_empty(group)

    def _count(self, outcomes: bytearray) -> None:
        counters = self.counters
        counters.present_blocks += outcomes.count(Outcome.PRESENT)
        counters.in_flight_blocks += outcomes.count(Outcome.IN_FLIGHT)
        counters.bypassed_blocks += outcomes.count(Outcome.BYPASSED)
        counters.rejected_full_blocks += outcomes.count(Outcome.FULL)
        counters.rejected_orphan_blocks += outcomes.count(Outcome.ORPHAN)
        counters.rejected_draining_blocks += outcomes.count(Outcome.DRAINING)

    def _tier_stats(self, level: int) -> TierStats:
        tier = self.tiers[level]
        spaces = [shard.spaces[level] for shard in self._shards.values()]
        return TierStats(
            tier=tier.name,
            capacity_bytes=tier.capacity_bytes,
            slab_bytes=tier.slab_bytes,
            slabs_total=tier.slabs_total,
            slabs_assigned=tier.slabs_total - tier.slabs_free,
            resident_bytes=sum(group.resident_bytes(level) for group in self._groups.values()),
            slots_total=sum(s.slots_total for s in spaces),
            slots_free=sum(s.count(FREE) for s in spaces),
            slots_reserved=sum(s.count(RESERVED) for s in spaces),
            slots_quarantined=sum(s.count(QUARANTINED) for s in spaces),
            slots_resident=sum(s.count(RESIDENT) for s in spaces),
        )


def _does_not_fit(spec: NamespaceSpec, tier: TierSpace) -> str:
    return (
        f"a block of {spec.block_bytes} bytes does not fit into a slab of {tier.name}, which has {tier.slab_bytes} "
        f"bytes ({tier.name}.slab_bytes)"
    )


def _with_followers(reservation: Reservation, failed: Sequence[int]) -> set[int]:
    """The failed indices and those whose block continues a failed one; a reservation lists parents first."""
    index = reservation.shard.group.index
    lost = set(failed)
    lost_rows = {reservation.rows[i] for i in failed}
    for i, row in enumerate(reservation.rows):
        if i not in lost and index.parents[row] in lost_rows:
            lost.add(i)
            lost_rows.add(row)
    return lost


def _acquired(lease: Lease, shard: Shard, soft_s: float = 0.0) -> Acquired:
    index, rows, slots = lease.group.index, lease.rows[: lease.total], shard.slots
    places = index.slots(rows, HOST, shard.rank)
    checksums = array("Q", map(slots.checksum, places) if slots.knows_checksums else ())
    generations = index.generations(rows, shard.rank)
    return Acquired(lease.lease_id, places, generations, lease.ready, checksums, soft_s)
