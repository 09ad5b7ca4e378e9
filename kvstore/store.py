"""The state machine of the daemon: an event and the time go in, a decision and its effects come out.

Every method is one event. It answers at once, or raises a `ForebayError` and changes nothing. What must be
carried out before the answer is sent (memory for a slab, bumped generations) waits in `drain_effects`. The
caller reports time by passing `now` and by calling `expire` when `next_deadline` has passed; nothing here
reads a clock.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from forebay.kvstore.allocation import Allocator
from forebay.kvstore.errors import (
    BadRequest,
    Busy,
    Draining,
    Expired,
    Forbidden,
    NotLeased,
    QuotaExceeded,
    UnknownNamespace,
    UnknownSession,
)
from forebay.kvstore.groups import HOST, Effects, Group, Shard
from forebay.kvstore.index import NO_ROW
from forebay.kvstore.leases import Deadlines, Lease, Reservation, Session
from forebay.kvstore.namespace import NamespaceSpec
from forebay.kvstore.outcome import Outcome, Scope
from forebay.kvstore.slabs import FREE, QUARANTINED, RESERVED, RESIDENT, ShardSlots, Slab, TierSpace
from forebay.kvstore.stats import Counters, StoreStats, TierStats


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


@dataclass(frozen=True, slots=True)
class Acquired:
    """Leading blocks leased for reading: `slots[i]` and the generation to compare after copying."""

    lease_id: int
    slots: array[int]
    generations: array[int]


@dataclass(frozen=True, slots=True)
class Reserved:
    """One outcome per hash; slots and generations of those to WRITE, in order."""

    reservation_id: int
    outcomes: bytearray
    slots: array[int]
    generations: array[int]


@dataclass(frozen=True, slots=True)
class Removed:
    removed: int
    kept: int


_NOTHING_ACQUIRED = Acquired(0, array("Q"), array("Q"))


class Store:
    """All sessions, namespaces, leases and reservations over one host tier.

    Args:
        config: sizes and limits.
        new_id: makes an unguessable id of 63 bits that is not 0 and not in use; injected so that a seed replays.
    """

    def __init__(self, config: StoreConfig, new_id: Callable[[], int]) -> None:
        self.config = config
        self.draining = False
        self.effects = Effects()
        self.counters = Counters()
        self.tier = TierSpace("host", config.capacity_bytes, config.slab_bytes)
        self._allocator = Allocator(self.tier, self.effects, self.counters, config.slab_idle_s)
        self._new_id = new_id
        self._sessions: dict[int, Session] = {}
        self._groups: dict[tuple[int, bytes], Group] = {}
        self._shards: dict[int, Shard] = {}
        self._leases: dict[int, Lease] = {}
        self._reservations: dict[int, Reservation] = {}
        self._last_ns = 0
        self._lease_deadlines = Deadlines()
        self._reservation_deadlines = Deadlines()

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
        self.counters.sessions_closed += 1

    # Namespaces

    def open_namespace(self, session_id: int, spec: NamespaceSpec) -> Shard:
        """The shard of a namespace, made when it is new.

        At `namespaces_max` the one that has gone longest unused makes way, of those that no session has open and
        that hold no pin. Raises BadRequest, LayoutError (a block fits no slab), QuotaExceeded (none may go).
        """
        session = self._session(session_id)
        spec.validate()
        merged = spec.merged()
        key = (session.uid, merged.group_fingerprint())
        group = self._groups.get(key)
        shard = group.shards.get(merged.shard_rank) if group else None
        if shard is None:
            shard = self._new_shard(session, merged, key)
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
        group.touch(hashes, rows, now)
        return rows

    def acquire(self, session_id: int, ns: int, hashes: Sequence[bytes], ttl_s: float, now: float) -> Acquired:
        """Lease the leading complete blocks until released or for `ttl_s`, at most `ttl_max_s`.

        Raises Busy at `leases_max`, Draining while shutting down.
        """
        session, shard = self._session(session_id), self.shard(session_id, ns)
        self._refuse_when_draining()
        if len(self._leases) >= self.config.leases_max:
            raise Busy(f"{len(self._leases)} leases are held, which is the limit")
        group = shard.group
        rows = group.index.walk(hashes)
        if not rows:
            return _NOTHING_ACQUIRED
        group.touch(hashes, rows, now)
        group.hold(rows)
        deadline = now + min(ttl_s, self.config.ttl_max_s)
        lease = Lease(self._fresh_id(self._leases), session, group, rows, deadline)
        self._leases[lease.lease_id] = lease
        session.leases.add(lease.lease_id)
        self._lease_deadlines.add(lease.lease_id, deadline)
        self.counters.acquired_blocks += len(rows)
        self.counters.acquired_bytes += len(rows) * shard.slots.block_bytes
        return _acquired(lease, shard)

    def resolve(self, session_id: int, ns: int, lease_id: int) -> Acquired:
        """The slots of a lease in another shard of its group, for a session of the holder's client group."""
        session, shard = self._session(session_id), self.shard(session_id, ns)
        lease = self._leases.get(lease_id)
        if lease is None or lease.session.client_group != session.client_group or lease.session.uid != session.uid:
            raise NotLeased(f"lease {lease_id} is not held by this client group, or has ended")
        if lease.group is not shard.group:
            raise NotLeased(f"lease {lease_id} is not of namespace {ns}")
        return _acquired(lease, shard)

    def release(self, session_id: int, lease_id: int) -> None:
        """End a lease. Raises NotLeased when it is not the session's, was released, or expired."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.session is not self._session(session_id):
            raise NotLeased(f"lease {lease_id} is not held by this session, or has ended")
        self._end_lease(lease)

    # Writing

    def reserve(self, session_id: int, ns: int, parent: bytes, hashes: Sequence[bytes], now: float) -> Reserved:
        """Slots for the blocks of a chain that are not here yet; room is made now.

        Args:
            parent: hash of the block before `hashes`, empty at a root.
        """
        session, shard = self._session(session_id), self.shard(session_id, ns)
        group = shard.group
        present = group.index.walk(hashes)
        group.touch(hashes, present, now)
        outcomes = bytearray([Outcome.PRESENT]) * len(present)
        rows: list[int] = []
        slots, generations = array("Q"), array("Q")
        above = present[-1] if present else self._parent_row(group, parent)
        refusal = self._refusal(group, parent, above)
        partial = self._hold_partial(group, hashes[len(present) :])
        for position in range(len(present), len(hashes)):
            outcome = refusal
            if outcome is None:
                left = len(hashes) - position
                outcome, above, place = self._reserve_one(shard, hashes[position], above, now, left)
                if outcome == Outcome.FULL:
                    refusal = outcome
                elif place is not None:
                    rows.append(above)
                    slots.append(place[0])
                    generations.append(place[1])
            outcomes.append(outcome)
        group.let_go(partial)
        self._count(outcomes)
        reservation_id = self._new_reservation(session, shard, rows, slots, now) if rows else 0
        return Reserved(reservation_id, outcomes, slots, generations)

    def commit(self, session_id: int, reservation_id: int, failed: Sequence[int], now: float) -> int:
        """Make the written blocks visible; `failed` are indices into the reservation that were not written.

        What continues a failed block is given back with it: nobody could find it. Returns how many were committed.
        Raises NotLeased, Expired (too late: nothing was published, the slots are given back), BadRequest (an index
        out of range).
        """
        reservation = self._reservation(session_id, reservation_id)
        count = len(reservation.rows)
        if any(not 0 <= index < count for index in failed):
            raise BadRequest(f"a failed index is outside the {count} reserved blocks")
        if reservation.expired:
            self._give_up(reservation)
            raise Expired(f"reservation {reservation_id} ran out by the clock; nothing was stored")
        lost = _with_followers(reservation, failed) if failed else set()
        shard, group = reservation.shard, reservation.shard.group
        good = [index for index in range(count) if index not in lost]
        group.commit(shard, [reservation.rows[i] for i in good], [reservation.slots[i] for i in good], now)
        for index in lost:
            group.abort(shard, reservation.rows[index], reservation.slots[index])
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
        allowed = int(self.config.pin_quota * self.tier.capacity_bytes)
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
        """Remove blocks on request; those leased, pinned or being written are kept, and so is what leads to them."""
        group = self.shard(session_id, ns).group
        found = {row for row in map(group.index.find, hashes) if row != NO_ROW}
        if scope == Scope.BLOCKS:
            return self._remove(group, found, dry_run, keep_ancestors=False)
        if scope == Scope.PREFIX:
            return self._remove(group, group.index.subtrees(found), dry_run, keep_ancestors=True)
        return self._clear_group(group, dry_run)

    def clear(self, session_id: int, *, dry_run: bool = False) -> Removed:
        """Remove every block of every namespace. Raises Forbidden unless the session is an operator's."""
        if not self._session(session_id).operator:
            raise Forbidden("only an operator may clear all namespaces")
        done = [self._clear_group(group, dry_run) for group in self._groups.values()]
        return Removed(sum(d.removed for d in done), sum(d.kept for d in done))

    def touch(self, session_id: int, ns: int, hashes: Sequence[bytes], now: float) -> int:
        """Hint: these blocks are in use (an engine that hits its own HBM cache asks for nothing)."""
        group = self.shard(session_id, ns).group
        rows = group.index.walk(hashes)
        group.touch(hashes, rows, now)
        return len(rows)

    def done(self, session_id: int, ns: int, hashes: Sequence[bytes]) -> int:
        """Hint: the conversation that ends with these blocks is over; its own tail goes first."""
        group = self.shard(session_id, ns).group
        rows = group.index.walk(hashes)
        group.policy.demote(rows)
        return len(rows)

    # Time, faults, shutdown

    def next_deadline(self) -> float | None:
        """When `expire` has something to do."""
        times = [t for t in (self._lease_deadlines.next(), self._reservation_deadlines.next()) if t is not None]
        return min(times, default=None)

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
        if shard.slots.is_empty(slab):
            self._allocator.retire(shard, [slab])

    def has_no_effects(self) -> bool:
        return not (self.effects.slabs or self.effects.generations)

    def drain_effects(self) -> Effects:
        """What must be carried out before the next answer is sent; the caller owns it."""
        effects = replace(self.effects)
        self.effects.slabs, self.effects.generations = [], []
        return effects

    # Telling

    def stats(self) -> StoreStats:
        groups = self._groups.values()
        return StoreStats(
            tiers=(self._tier_stats(),),
            namespaces=tuple(group.stats() for group in groups),
            sessions=len(self._sessions),
            leases=len(self._leases),
            leased_blocks=sum(len(lease.rows) for lease in self._leases.values()),
            reservations=sum(not r.expired for r in self._reservations.values()),
            quarantined_reservations=sum(r.expired for r in self._reservations.values()),
            pinned_blocks=sum(group.pinned_blocks for group in groups),
            draining=self.draining,
            counters=replace(self.counters),
        )

    def check(self) -> list[str]:
        """Every violated invariant, in words; empty when all hold. Cost: a walk over everything."""
        problems = [problem for group in self._groups.values() for problem in group.check()]
        problems += self._check_tier()
        problems += self._check_holds()
        return problems

    def _check_tier(self) -> Iterator[str]:
        physical = [slab.physical for shard in self._shards.values() for slab in shard.slots.slabs.values()]
        if len(set(physical)) != len(physical):
            yield "a physical slab is assigned twice"
        if len(physical) + self.tier.slabs_free != self.tier.slabs_total:
            yield f"{len(physical)} slabs assigned, {self.tier.slabs_free} free, {self.tier.slabs_total} in all"

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

    def _new_shard(self, session: Session, spec: NamespaceSpec, key: tuple[int, bytes]) -> Shard:
        slots = ShardSlots(self.tier.slab_bytes, spec.block_bytes)
        if len(self._shards) >= self.config.namespaces_max:
            self._forget_coldest(but=key)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = Group(spec, session.uid, self.effects, self.counters)
        self._last_ns += 1
        shard = Shard(self._last_ns, spec.shard_rank, group, slots)
        group.shards[spec.shard_rank] = shard
        self._shards[shard.ns] = shard
        return shard

    def _forget_coldest(self, but: tuple[int, bytes]) -> None:
        """Make room for a namespace among `namespaces_max`; raises QuotaExceeded."""
        open_now = {ns for session in self._sessions.values() for ns in session.namespaces}
        idle = [
            (group.last_touch_s, key)
            for key, group in self._groups.items()
            if key != but and not group.pinned_blocks and not any(s.ns in open_now for s in group.shards.values())
        ]
        if not idle:
            raise QuotaExceeded(f"{len(self._shards)} namespaces are in use, which is the limit")
        group = self._groups.pop(min(idle)[1])
        gone = self._clear_group(group, dry_run=False)
        assert gone.kept == 0, "a namespace that no session has open was in use"
        for shard in group.shards.values():
            del self._shards[shard.ns]

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
        self, shard: Shard, name: bytes, above: int, now: float, left: int
    ) -> tuple[Outcome, int, tuple[int, int] | None]:
        """Returns (outcome, the block's row, (slot, generation) when it is to be written); `left` are yet to come."""
        group = shard.group
        index = group.index
        row = index.find(name)
        if row == NO_ROW:
            row = index.add(name, above)
        elif index.slot(row, HOST, shard.rank) >= 0:
            return Outcome.PRESENT, row, None
        elif index.reserved_slot(row, HOST, shard.rank) >= 0:
            return Outcome.IN_FLIGHT, row, None
        if shard.slots.has_free():
            return Outcome.WRITE, row, group.reserve(shard, row)
        group.hold((row,))
        room = self._allocator.ensure(shard, self._groups.values(), now, left)
        place = group.reserve(shard, row) if room else None
        group.let_go((row,))
        return (Outcome.WRITE, row, place) if place else (Outcome.FULL, above, None)

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

    def _clear_group(self, group: Group, dry_run: bool) -> Removed:
        done = self._remove(group, set(group.index.rows()), dry_run, keep_ancestors=True)
        if not dry_run:
            self._allocator.retire_empty(group)
        return done

    def _remove(self, group: Group, rows: set[int], dry_run: bool, *, keep_ancestors: bool) -> Removed:
        """Remove children before parents; with `keep_ancestors` what leads to a kept block stays reachable."""
        index = group.index
        kept: set[int] = set()
        removed = 0
        for row in sorted(rows, key=lambda r: -index.depths[r]):
            if not index.is_resident(row) and not index.holds[row]:
                continue
            leads_to_kept = keep_ancestors and any(child in kept for child in index.children(row))
            if leads_to_kept or not group.removable(row):
                kept.add(row)
                continue
            removed += 1
            if not dry_run:
                group.drop(row)
        self.counters.removed_blocks += 0 if dry_run else removed
        return Removed(removed, len(kept))

    def _count(self, outcomes: bytearray) -> None:
        counters = self.counters
        counters.present_blocks += outcomes.count(Outcome.PRESENT)
        counters.in_flight_blocks += outcomes.count(Outcome.IN_FLIGHT)
        counters.rejected_full_blocks += outcomes.count(Outcome.FULL)
        counters.rejected_orphan_blocks += outcomes.count(Outcome.ORPHAN)
        counters.rejected_draining_blocks += outcomes.count(Outcome.DRAINING)

    def _tier_stats(self) -> TierStats:
        spaces = [shard.slots for shard in self._shards.values()]
        return TierStats(
            tier=self.tier.name,
            capacity_bytes=self.tier.capacity_bytes,
            slab_bytes=self.tier.slab_bytes,
            slabs_total=self.tier.slabs_total,
            slabs_assigned=self.tier.slabs_total - self.tier.slabs_free,
            resident_bytes=sum(group.resident_bytes for group in self._groups.values()),
            slots_total=sum(s.slots_total for s in spaces),
            slots_free=sum(s.count(FREE) for s in spaces),
            slots_reserved=sum(s.count(RESERVED) for s in spaces),
            slots_quarantined=sum(s.count(QUARANTINED) for s in spaces),
            slots_resident=sum(s.count(RESIDENT) for s in spaces),
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


def _acquired(lease: Lease, shard: Shard) -> Acquired:
    index, rows = lease.group.index, lease.rows
    return Acquired(lease.lease_id, index.slots(rows, HOST, shard.rank), index.generations(rows, HOST, shard.rank))
