"""Requests to decisions: what each verb of the wire asks of the store, and how the store's answer is packed.

Pure apart from the clock that is handed in: no sockets, no memory. The owner loop decodes, calls `answer`, carries
out the store's effects and sends the reply.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from forebay.kvstore.errors import BadRequest
from forebay.kvstore.groups import Shard
from forebay.kvstore.outcome import Scope, StopReason
from forebay.kvstore.planner import Backlog
from forebay.kvstore.store import Acquired, Removed, Store
from forebay.transports import messages as m


class Verbs:
    """Answers requests of sessions from one store.

    Args:
        store: the state machine.
        lease_ttl_s: what a request that names no time gets.
        status: makes the status document.
        hashes_max: most hashes in one request.
        hand_over: carries out what the store has decided, in the middle of a long lease.
    """

    def __init__(
        self,
        store: Store,
        lease_ttl_s: float,
        status: Callable[[], str],
        hashes_max: int,
        hand_over: Callable[[], None],
    ) -> None:
        self.store = store
        self.lease_ttl_s = lease_ttl_s
        self._status = status
        self._hashes_max = hashes_max
        self._hand_over = hand_over
        self._by_type: dict[type[m.Request], Callable[[int, Any, float], m.Reply]] = {
            m.PingRequest: self._ping,
            m.OpenNamespaceRequest: self._open_namespace,
            m.FindNamespaceRequest: self._find_namespace,
            m.LookupRequest: self._lookup,
            m.AcquireRequest: self._acquire,
            m.ResolveRequest: self._resolve,
            m.ReleaseRequest: self._release,
            m.ReserveRequest: self._reserve,
            m.CommitRequest: self._commit,
            m.AbortRequest: self._abort,
            m.PinRequest: self._pin,
            m.UnpinRequest: self._unpin,
            m.EvictRequest: self._evict,
            m.TouchRequest: self._touch,
            m.DoneRequest: self._done,
            m.PrefetchRequest: self._prefetch,
            m.StatusRequest: self._status_document,
            m.CheckRequest: self._check,
            m.ClearRequest: self._clear,
            m.PersistRequest: self._persist,
            m.ReportRequest: self._report,
            m.PinnedRequest: self._pinned,
            m.RecordRequest: self._record,
            m.RecordedRequest: self._recorded,
            m.ExplainRequest: self._explain,
            m.ExpectRequest: self._expect,
            m.StoppedRequest: self._stopped,
        }

    def answer(self, session_id: int, request: m.Request, now: float) -> m.Reply:
        """The reply to a checked request; raises ForebayError."""
        return self._by_type[type(request)](session_id, request, now)

    def _hashes(self, session_id: int, ns: int, blob: bytes) -> list[bytes]:
        return m.split_hashes(blob, self.store.shard(session_id, ns).group.spec.hash_bytes, self._hashes_max)

    def _ping(self, session_id: int, request: m.PingRequest, now: float) -> m.PingReply:
        return m.PingReply()

    def _open_namespace(self, session_id: int, request: m.OpenNamespaceRequest, now: float) -> m.OpenNamespaceReply:
        return m.OpenNamespaceReply(*_geometry(self.store.open_namespace(session_id, request.spec)))

    def _find_namespace(self, session_id: int, request: m.FindNamespaceRequest, now: float) -> m.FindNamespaceReply:
        return m.FindNamespaceReply(
            *_geometry(self.store.find_namespace(session_id, request.fingerprint_prefix, request.rank))
        )

    def _lookup(self, session_id: int, request: m.LookupRequest, now: float) -> m.LookupReply:
        hashes = self._hashes(session_id, request.ns, request.blob)
        rows = self.store.lookup(session_id, request.ns, hashes, now)
        group = self.store.shard(session_id, request.ns).group
        counts = group.index.count_by_tier(rows)
        by_tier = tuple((tier.name, count) for tier, count in zip(self.store.tiers, counts, strict=True) if count)
        backlog = Backlog(request.waiting_requests, request.waiting_tokens)
        made = self.store.physics.plan(group, hashes, rows, counts, backlog)
        advice = ("load" if made.blocks else "recompute") if rows else ""
        return m.LookupReply(len(rows), by_tier, int(made.load_s * 1e6), advice, made.blocks)

    def _acquire(self, session_id: int, request: m.AcquireRequest, now: float) -> m.AcquireReply:
        hashes = self._hashes(session_id, request.ns, request.blob)
        ttl_s = request.ttl_ms / 1000 or self.lease_ttl_s
        acquired = self.store.acquire(session_id, request.ns, hashes, ttl_s, now, self._hand_over)
        soft_us = min(int(acquired.soft_s * 1e6), m.REPORTED_MAX)
        return m.AcquireReply(acquired.lease_id, *_readable(acquired), soft_us)

    def _resolve(self, session_id: int, request: m.ResolveRequest, now: float) -> m.ResolveReply:
        return m.ResolveReply(*_readable(self.store.resolve(session_id, request.ns, request.lease)))

    def _release(self, session_id: int, request: m.ReleaseRequest, now: float) -> m.ReleaseReply:
        self.store.release(session_id, request.lease)
        return m.ReleaseReply()

    def _reserve(self, session_id: int, request: m.ReserveRequest, now: float) -> m.ReserveReply:
        hashes = self._hashes(session_id, request.ns, request.blob)
        width = self.store.shard(session_id, request.ns).group.spec.hash_bytes
        if len(request.parent) not in (0, width):
            raise BadRequest(f"parent must be empty or {width} bytes")
        reserved = self.store.reserve(session_id, request.ns, request.parent, hashes, now, priority=request.priority)
        return m.ReserveReply(
            reserved.reservation_id,
            bytes(reserved.outcomes),
            reserved.slots.tobytes(),
            reserved.generations.tobytes(),
        )

    def _commit(self, session_id: int, request: m.CommitRequest, now: float) -> m.CommitReply:
        failed, checksums = m.split_u32(request.failed), m.split_u64(request.checksums)
        return m.CommitReply(self.store.commit(session_id, request.reservation, failed, now, checksums))

    def _abort(self, session_id: int, request: m.AbortRequest, now: float) -> m.AbortReply:
        self.store.abort(session_id, request.reservation)
        return m.AbortReply()

    def _pin(self, session_id: int, request: m.PinRequest, now: float) -> m.PinReply:
        hashes = self._hashes(session_id, request.ns, request.blob)
        return m.PinReply(self.store.pin(session_id, request.ns, hashes))

    def _unpin(self, session_id: int, request: m.UnpinRequest, now: float) -> m.UnpinReply:
        hashes = self._hashes(session_id, request.ns, request.blob)
        return m.UnpinReply(self.store.unpin(session_id, request.ns, hashes))

    def _evict(self, session_id: int, request: m.EvictRequest, now: float) -> m.EvictReply:
        if request.resume:
            return m.EvictReply(*_removed(self.store.remove_more(session_id, request.resume)))
        hashes = self._hashes(session_id, request.ns, request.blob)
        done = self.store.evict(session_id, request.ns, Scope(request.scope), hashes, dry_run=request.dry_run)
        return m.EvictReply(*_removed(done))

    def _touch(self, session_id: int, request: m.TouchRequest, now: float) -> m.TouchReply:
        hashes = self._hashes(session_id, request.ns, request.blob)
        return m.TouchReply(self.store.touch(session_id, request.ns, hashes, now))

    def _done(self, session_id: int, request: m.DoneRequest, now: float) -> m.DoneReply:
        hashes = self._hashes(session_id, request.ns, request.blob)
        return m.DoneReply(self.store.done(session_id, request.ns, hashes, request.keep))

    def _expect(self, session_id: int, request: m.ExpectRequest, now: float) -> m.ExpectReply:
        hashes = self._hashes(session_id, request.ns, request.blob)
        return m.ExpectReply(self.store.expect(session_id, request.ns, hashes, request.within_ms / 1000, now))

    def _stopped(self, session_id: int, request: m.StoppedRequest, now: float) -> m.StoppedReply:
        hashes = self._hashes(session_id, request.ns, request.blob)
        return m.StoppedReply(self.store.stopped(session_id, request.ns, hashes, StopReason(request.reason)))

    def _prefetch(self, session_id: int, request: m.PrefetchRequest, now: float) -> m.PrefetchReply:
        hashes = self._hashes(session_id, request.ns, request.blob)
        return m.PrefetchReply(*self.store.prefetch(session_id, request.ns, hashes, now))

    def _status_document(self, session_id: int, request: m.StatusRequest, now: float) -> m.StatusReply:
        return m.StatusReply(self._status())

    def _check(self, session_id: int, request: m.CheckRequest, now: float) -> m.CheckReply:
        problems = self.store.check()[: m.PROBLEMS_MAX]
        return m.CheckReply(tuple(problem[: m.TEXT_CHARS_MAX] for problem in problems))

    def _clear(self, session_id: int, request: m.ClearRequest, now: float) -> m.ClearReply:
        if request.resume:
            return m.ClearReply(*_removed(self.store.remove_more(session_id, request.resume)))
        return m.ClearReply(*_removed(self.store.clear(session_id, dry_run=request.dry_run)))

    def _persist(self, session_id: int, request: m.PersistRequest, now: float) -> m.PersistReply:
        hashes = self._hashes(session_id, request.ns, request.blob)
        found = self.store.persist(session_id, request.ns, hashes, now)
        return m.PersistReply(found.durable, found.pending)

    def _report(self, session_id: int, request: m.ReportRequest, now: float) -> m.ReportReply:
        if request.computed_tokens and request.compute_us:
            self.store.physics.computed(request.computed_tokens, request.depth_tokens, request.compute_us / 1e6)
        if request.copied_bytes and request.copy_us:
            self.store.physics.copied(request.copied_bytes, request.copy_us / 1e6)
        self.store.physics.late(request.late_loads)
        return m.ReportReply()

    def _pinned(self, session_id: int, request: m.PinnedRequest, now: float) -> m.PinnedReply:
        self.store.pinned(session_id, request.pinned_bytes, request.refused)
        return m.PinnedReply()

    def _record(self, session_id: int, request: m.RecordRequest, now: float) -> m.RecordReply:
        self.store.record(session_id, request.ns, request.for_ms / 1000, request.requests_max, now)
        return m.RecordReply()

    def _recorded(self, session_id: int, request: m.RecordedRequest, now: float) -> m.RecordedReply:
        blocks_max = m.TAKEN_BYTES_MAX // m.HASH_BYTES_MAX
        taken, dropped, ended = self.store.recorded(session_id, blocks_max, now)
        numbers = m.join_u64(n for each in taken for n in (each.number, int(each.after_s * 1e6), len(each.hashes)))
        return m.RecordedReply(numbers, b"".join(name for each in taken for name in each.hashes), dropped, ended)

    def _explain(self, session_id: int, request: m.ExplainRequest, now: float) -> m.ExplainReply:
        width = self.store.shard(session_id, request.ns).group.spec.hash_bytes
        if len(request.name) != width:
            raise BadRequest(f"a hash of this namespace has {width} bytes")
        story = self.store.explain(session_id, request.ns, request.name, now)
        return m.ExplainReply(json.dumps({} if story is None else asdict(story)))


def _geometry(shard: Shard) -> tuple[int, bytes, int, int, int, int, int]:
    """The fields of a namespace reply, in the wire's order."""
    spec, slots = shard.group.spec, shard.slots
    return (
        shard.ns,
        shard.group.fingerprint,
        slots.block_bytes,
        slots.slot_bytes,
        slots.slots_per_slab,
        spec.hash_bytes,
        spec.block_tokens,
    )


def _removed(done: Removed) -> tuple[int, int, int]:
    return done.removed, done.kept, done.more


def _readable(acquired: Acquired) -> tuple[bytes, bytes, int, bytes]:
    """Slots, generations, how many are ready, checksums, as the wire has them."""
    slots, generations = acquired.slots.tobytes(), acquired.generations.tobytes()
    return slots, generations, acquired.ready, acquired.checksums.tobytes()
