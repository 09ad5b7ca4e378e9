"""The client without its I/O: each operation is a generator of actions.

An operation yields what must be done (exchange requests, map a slab, copy a plan), is sent the result or has the
error thrown into it, and returns its own. The sync and the async client are two loops around these generators,
so the dance of a fetch and of a store is written, and tested against faults, once.

Rules of the dance: bytes that were copied out count only if the generations still agree after the copy; only
slots that the daemon said to write are written; after one failed block of a chain the rest of its batch is given
back too, for nobody could find what follows a gap.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np

from forebay.client.copier import CopyPlan
from forebay.client.namespaces import Namespace
from forebay.client.places import Places, SlabMapping, no_places
from forebay.client.results import (
    BlockOutcome,
    FetchResult,
    LookupResult,
    PrefetchResult,
    RemovalResult,
    StoreResult,
    reason_of,
)
from forebay.client.segments import Addresses, SegmentTable
from forebay.kvstore.errors import BadRequest, ForebayError, Internal, PeerError, PeerLost, UnknownSession
from forebay.transports.messages import (
    AbortReply,
    AbortRequest,
    AcquireReply,
    AcquireRequest,
    CommitReply,
    CommitRequest,
    DoneReply,
    DoneRequest,
    EvictReply,
    EvictRequest,
    EvictScope,
    FindNamespaceReply,
    FindNamespaceRequest,
    LookupReply,
    LookupRequest,
    OpenNamespaceReply,
    PinReply,
    PinRequest,
    PrefetchReply,
    PrefetchRequest,
    ReleaseRequest,
    Reply,
    Request,
    ReserveReply,
    ReserveRequest,
    ResolveReply,
    ResolveRequest,
    TouchReply,
    TouchRequest,
    UnpinReply,
    UnpinRequest,
    join_u32,
)

BATCH_BYTES = 256 << 20
BATCH_BLOCKS = 256
"""A store reserves at most this much at a time, so that a long one neither hoards slots nor starves others."""

_ENVELOPE_BYTES = 1024

T = TypeVar("T")
R = TypeVar("R", bound=Reply)


# --- actions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Exchange:
    """Send the requests in one go; the result is a reply or a ForebayError for each, in order."""

    requests: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class Post:
    """Send a request whose reply nobody waits for; never fails. The result: whether the session still stands."""

    request: Request


@dataclass(frozen=True, slots=True)
class Map:
    """Map a slab; the result is a SlabMapping."""

    ns: int
    slab: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Execute a plan; the result is the positions whose copy failed."""

    plan: CopyPlan
    to_slots: bool


Action: TypeAlias = Exchange | Post | Map | Copy
Steps: TypeAlias = Generator[Action, Any, T]
Operation: TypeAlias = Callable[["Attachment"], Steps[T]]


@dataclass(slots=True)
class Attachment:
    """What one session with one daemon's life has opened and mapped; thrown away with the session."""

    max_message_bytes: int
    max_hashes: int
    handles: dict[bytes, OpenNamespaceReply] = field(default_factory=dict)
    slabs: dict[tuple[int, int], SlabMapping] = field(default_factory=dict)

    def retire(self, ns: int, slab: int) -> None:
        """The daemon took a slab back: forget its mapping. Copies under way keep it mapped, and fail their check."""
        self.slabs.pop((ns, slab), None)

    def hashes_max(self, ns: Namespace) -> int:
        """How many hashes fit one request."""
        return max(1, min(self.max_hashes, (self.max_message_bytes - _ENVELOPE_BYTES) // ns.hash_bytes))


@dataclass(frozen=True, slots=True)
class Transfer:
    """Blocks to move between an engine's memory and the store; everything about it was checked."""

    ns: Namespace
    hashes: Sequence[bytes]
    table: SegmentTable
    block_ids: Addresses


def transfer(
    ns: Namespace, hashes: Sequence[bytes], memory: object, block_ids: Iterable[int] | None, *, writable: bool
) -> Transfer:
    """Check what an engine asks to move; no I/O.

    Args:
        memory: a SegmentTable, or what `SegmentTable.of` takes with blocks along axis 0.
        block_ids: where each hash's block lies in it; None: 0, 1, 2, ...
    Raises:
        LayoutError, BadRequest: the caller's bug.
    """
    ns.check_hashes(hashes)
    table = memory if isinstance(memory, SegmentTable) else SegmentTable.of(memory)
    table.check_layout(ns.spec.segment_bytes if ns.spec is not None else (ns.block_bytes,))
    if writable:
        table.check_writable()
    ids = table.checked_ids(range(len(hashes)) if block_ids is None else block_ids, len(hashes))
    if writable and len(set(ids.tolist())) != len(ids):
        raise BadRequest("two hashes may not be fetched into one block")
    return Transfer(ns, hashes, table, ids)


# --- small operations ---------------------------------------------------------------------------------------


def call(request: Request, reply_type: type[R]) -> Steps[R]:
    """One request, one reply; raises what the daemon answered."""
    replies = yield Exchange((request,))
    return expect(replies[0], reply_type)


def expect(reply: Reply | ForebayError, reply_type: type[R]) -> R:
    if isinstance(reply, ForebayError):
        raise reply
    if not isinstance(reply, reply_type):
        raise Internal(f"the daemon answered {type(reply).__name__} where {reply_type.__name__} was due")
    return reply


def open_namespace(attachment: Attachment, ns: Namespace) -> Steps[OpenNamespaceReply]:
    """The namespace's handle in this attachment, opened when it was not yet."""
    known = attachment.handles.get(ns.key)
    if known is None:
        reply_type = FindNamespaceReply if ns.spec is None else OpenNamespaceReply
        known = yield from call(ns.opener, reply_type)
        if (known.block_bytes, known.hash_bytes) != (ns.block_bytes, ns.hash_bytes):
            raise Internal("the daemon opened a namespace of another shape")
        attachment.handles[ns.key] = known
    return known


def find_namespace(attachment: Attachment, prefix: bytes, rank: int) -> Steps[Namespace]:
    request = FindNamespaceRequest(prefix, rank)
    return Namespace.found(request, (yield from call(request, FindNamespaceReply)))


def lookup(attachment: Attachment, ns: Namespace, blob: bytes) -> Steps[LookupResult]:
    handle = yield from open_namespace(attachment, ns)
    bytes_max = attachment.hashes_max(ns) * ns.hash_bytes
    asked = blob if len(blob) <= bytes_max else blob[:bytes_max]
    reply = yield from call(LookupRequest(handle.ns, asked), LookupReply)
    return LookupResult(reply.blocks, dict(reply.by_tier), reply.load_us, reply.advice)


def prefetch(attachment: Attachment, ns: Namespace, hashes: Sequence[bytes]) -> Steps[PrefetchResult]:
    handle = yield from open_namespace(attachment, ns)
    blob = b"".join(hashes[: attachment.hashes_max(ns)])
    reply = yield from call(PrefetchRequest(handle.ns, blob), PrefetchReply)
    return PrefetchResult(reply.resident, reply.promised)


def pin(attachment: Attachment, ns: Namespace, hashes: Sequence[bytes]) -> Steps[int]:
    """Pins leading blocks until one is absent; returns how many."""
    handle = yield from open_namespace(attachment, ns)
    pinned = 0
    for part in _parts(hashes, attachment.hashes_max(ns)):
        reply = yield from call(PinRequest(handle.ns, b"".join(part)), PinReply)
        pinned += reply.count
        if reply.count < len(part):
            break
    return pinned


def unpin(attachment: Attachment, ns: Namespace, hashes: Sequence[bytes]) -> Steps[int]:
    return (yield from _counted(attachment, ns, hashes, UnpinRequest, UnpinReply))


def touch(attachment: Attachment, ns: Namespace, hashes: Sequence[bytes]) -> Steps[int]:
    return (yield from _counted(attachment, ns, hashes, TouchRequest, TouchReply))


def done(attachment: Attachment, ns: Namespace, hashes: Sequence[bytes]) -> Steps[int]:
    return (yield from _counted(attachment, ns, hashes, DoneRequest, DoneReply))


def evict(
    attachment: Attachment, ns: Namespace, hashes: Sequence[bytes], scope: EvictScope, dry_run: bool
) -> Steps[RemovalResult]:
    handle = yield from open_namespace(attachment, ns)
    removed = kept = 0
    parts = [()] if scope == EvictScope.NAMESPACE else _parts(hashes, attachment.hashes_max(ns))
    for part in parts:
        request = EvictRequest(handle.ns, int(scope), b"".join(part), dry_run)
        reply = yield from call(request, EvictReply)
        removed, kept = removed + reply.removed, kept + reply.kept
    return RemovalResult(removed, kept)


CountedRequest: TypeAlias = type[UnpinRequest] | type[TouchRequest] | type[DoneRequest]
CountedReply: TypeAlias = type[UnpinReply] | type[TouchReply] | type[DoneReply]


def _counted(
    attachment: Attachment,
    ns: Namespace,
    hashes: Sequence[bytes],
    request_type: CountedRequest,
    reply_type: CountedReply,
) -> Steps[int]:
    handle = yield from open_namespace(attachment, ns)
    count = 0
    for part in _parts(hashes, attachment.hashes_max(ns)):
        reply = yield from call(request_type(handle.ns, b"".join(part)), reply_type)
        count += reply.count
    return count


def _parts(hashes: Sequence[bytes], size: int) -> Iterator[Sequence[bytes]]:
    for first in range(0, len(hashes), size):
        yield hashes[first : first + size]


# --- places -------------------------------------------------------------------------------------------------


def _locate(
    attachment: Attachment, handle: OpenNamespaceReply, slots_blob: bytes, generations_blob: bytes
) -> Steps[Places]:
    """The places of the leading slots whose slabs could be mapped; a slab just taken back ends the run."""
    slots = np.frombuffer(slots_blob, np.dtype("<u8"))
    generations = np.frombuffer(generations_blob, np.dtype("<u8"))
    if not len(slots):
        return no_places(handle.block_bytes)
    serials, indices = np.divmod(slots, np.uint64(handle.slots_per_slab))
    bounds = [0, *(np.flatnonzero(serials[1:] != serials[:-1]) + 1).tolist(), len(slots)]
    mappings: list[SlabMapping] = []
    for serial in serials[bounds[:-1]].tolist():
        try:
            mappings.append((yield from _mapped(attachment, handle, serial)))
        except (PeerError, UnknownSession):
            raise
        except ForebayError:
            break
    bounds = bounds[: len(mappings) + 1]
    part = slice(0, bounds[-1])
    return Places.resolve(mappings, bounds, indices[part].astype(np.int64), generations[part], handle.block_bytes)


def _mapped(attachment: Attachment, handle: OpenNamespaceReply, slab: int) -> Steps[SlabMapping]:
    mapping = attachment.slabs.get((handle.ns, slab))
    if mapping is None:
        mapping = yield Map(handle.ns, slab)
        if mapping.slot_bytes != handle.slot_bytes:
            raise Internal("the daemon mapped a slab of another slot size")
        attachment.slabs[handle.ns, slab] = mapping
    return mapping


def _plan(work: Transfer, first: int, places: Places, handle: OpenNamespaceReply) -> CopyPlan:
    ids = work.block_ids[first : first + len(places)]
    return CopyPlan(work.table, ids, places.addresses, handle.slot_bytes, places.mappings)


# --- reading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Held:
    """A lease and where its blocks lie; lease 0 and no places when nothing was there.

    There are fewer places than leased blocks when a slab was taken back before it could be mapped.
    """

    lease: int
    leased_blocks: int
    places: Places


def acquire(attachment: Attachment, ns: Namespace, hashes: Sequence[bytes], ttl_ms: int) -> Steps[Held]:
    handle = yield from open_namespace(attachment, ns)
    return (yield from _acquire(attachment, handle, ns, hashes[: attachment.hashes_max(ns)], ttl_ms))


def resolve(attachment: Attachment, ns: Namespace, lease: int) -> Steps[Held]:
    """The places, in this shard, of a lease that a session of the same client group holds."""
    handle = yield from open_namespace(attachment, ns)
    reply = yield from call(ResolveRequest(handle.ns, lease), ResolveReply)
    return Held(lease, len(reply.slots) // 8, (yield from _locate(attachment, handle, reply.slots, reply.generations)))


def _acquire(
    attachment: Attachment, handle: OpenNamespaceReply, ns: Namespace, hashes: Sequence[bytes], ttl_ms: int
) -> Steps[Held]:
    blob = b"".join(hashes)
    reply = yield from call(AcquireRequest(handle.ns, blob, ttl_ms), AcquireReply)
    if not reply.lease:
        return Held(0, 0, no_places(handle.block_bytes))
    try:
        if len(reply.slots) > 8 * len(hashes):
            raise Internal("the daemon leased more blocks than were asked for")
        places = yield from _locate(attachment, handle, reply.slots, reply.generations)
    except BaseException:
        yield Post(ReleaseRequest(reply.lease))
        raise
    return Held(reply.lease, len(reply.slots) // 8, places)


def fetch(attachment: Attachment, work: Transfer, ttl_ms: int, *, strict: bool) -> Steps[FetchResult]:
    """Acquire, copy, check, release. Unless `strict`, an error ends the run and what was verified counts."""
    loaded, reason = 0, ""
    try:
        handle = yield from open_namespace(attachment, work.ns)
        size = attachment.hashes_max(work.ns)
        for first in range(0, len(work.hashes), size):
            part = work.hashes[first : first + size]
            blocks, reason = yield from _fetch_part(attachment, handle, work, first, part, ttl_ms)
            loaded += blocks
            if reason:
                break
    except ForebayError as error:
        if strict:
            raise
        reason = reason_of(error)
    return FetchResult(loaded, loaded * work.ns.block_bytes, reason)


def _fetch_part(
    attachment: Attachment,
    handle: OpenNamespaceReply,
    work: Transfer,
    first: int,
    hashes: Sequence[bytes],
    ttl_ms: int,
) -> Steps[tuple[int, str]]:
    held = yield from _acquire(attachment, handle, work.ns, hashes, ttl_ms)
    if not held.lease:
        return 0, "miss"
    try:
        failed: Sequence[int] = ()
        if len(held.places):
            failed = yield Copy(_plan(work, first, held.places, handle), to_slots=False)
        verified = held.places.verified()
    finally:
        standing = yield Post(ReleaseRequest(held.lease))
    if not standing:  # nobody moves the generations of a dead daemon on
        raise PeerLost("the daemon went away during the copy")
    if failed and failed[0] < verified:
        return failed[0], "failed"
    if verified < held.leased_blocks:
        return verified, "stale"
    return verified, "" if verified == len(hashes) else "miss"


# --- writing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Grant:
    """A reservation: each block's outcome, and where those to be written lie. Reservation 0: nothing to write."""

    reservation: int
    codes: bytes
    places: Places


def reserve(attachment: Attachment, ns: Namespace, parent: bytes, hashes: Sequence[bytes]) -> Steps[Grant]:
    handle = yield from open_namespace(attachment, ns)
    reply = yield from call(ReserveRequest(handle.ns, parent, b"".join(hashes)), ReserveReply)
    return (yield from _granted(attachment, handle, reply, len(hashes)))


def commit(attachment: Attachment, reservation: int, failed: Sequence[int]) -> Steps[int]:
    return (yield from call(CommitRequest(reservation, join_u32(failed)), CommitReply)).count


def abort(attachment: Attachment, reservation: int) -> Steps[None]:
    yield from call(AbortRequest(reservation), AbortReply)


def _granted(attachment: Attachment, handle: OpenNamespaceReply, reply: ReserveReply, asked: int) -> Steps[Grant]:
    if not reply.reservation:
        return Grant(0, reply.outcomes, no_places(handle.block_bytes))
    try:
        writes = reply.outcomes.count(BlockOutcome.STORED)
        if len(reply.outcomes) != asked or len(reply.slots) != 8 * writes:
            raise Internal("the daemon's reservation does not fit what was asked")
        places = yield from _locate(attachment, handle, reply.slots, reply.generations)
    except BaseException:
        yield Post(AbortRequest(reply.reservation))
        raise
    return Grant(reply.reservation, reply.outcomes, places)


def store(attachment: Attachment, work: Transfer, parent: bytes, *, strict: bool) -> Steps[StoreResult]:
    """Reserve, copy, commit, batch by batch; a batch's commit travels with the next one's reserve.

    Unless `strict`, an error ends the run and what the daemon did not confirm is FAILED or UNAVAILABLE.
    """
    writing = _Store(attachment, work, parent)
    try:
        yield from writing.run()
    except ForebayError as error:
        if strict:
            raise
        return writing.result(error)
    return writing.result(None)


@dataclass(frozen=True, slots=True)
class _Written:
    """A batch whose bytes are in place: its commit, and which blocks that would publish."""

    request: CommitRequest
    positions: tuple[int, ...]


class _Store:
    """The state of one store between its batches."""

    def __init__(self, attachment: Attachment, work: Transfer, parent: bytes) -> None:
        self._attachment = attachment
        self._work = work
        self._parent = parent
        self._codes = bytearray([BlockOutcome.UNAVAILABLE]) * len(work.hashes)
        self._committed = 0
        self._written: _Written | None = None

    def run(self) -> Steps[None]:
        work, total = self._work, len(self._work.hashes)
        handle = yield from open_namespace(self._attachment, work.ns)
        by_bytes = max(1, BATCH_BYTES // handle.slot_bytes)
        size = min(by_bytes, BATCH_BLOCKS, self._attachment.hashes_max(work.ns))
        for first in range(0, total, size):
            last = min(first + size, total)
            reply = yield from self._reserve(handle, first, last)
            grant = yield from _granted(self._attachment, handle, reply, last - first)
            self._codes[first:last] = grant.codes
            if grant.reservation:
                yield from self._write(handle, grant, first)
            if self._codes[last - 1] not in _FOUND:
                self._codes[last:] = bytes([BlockOutcome.ORPHAN]) * (total - last)
                break
            self._parent = work.hashes[last - 1]
        if self._written is not None:
            replies = yield Exchange((self._written.request,))
            self._settle(replies[0])

    def result(self, error: ForebayError | None) -> StoreResult:
        if self._written is not None:
            self._settle(error or Internal("not committed"))
        return StoreResult(
            bytes(self._codes),
            self._committed,
            self._committed * self._work.ns.block_bytes,
            reason_of(error) if error else "",
        )

    def _reserve(self, handle: OpenNamespaceReply, first: int, last: int) -> Steps[ReserveReply]:
        blob = b"".join(self._work.hashes[first:last])
        request = ReserveRequest(handle.ns, self._parent, blob)
        if self._written is None:
            replies = yield Exchange((request,))
        else:
            replies = yield Exchange((self._written.request, request))
            self._settle(replies[0])
        return expect(replies[-1], ReserveReply)

    def _write(self, handle: OpenNamespaceReply, grant: Grant, first: int) -> Steps[None]:
        """Copy the blocks granted; from the first that failed on, the batch is given back."""
        positions = [first + i for i, code in enumerate(grant.codes) if code == BlockOutcome.STORED]
        ready = len(grant.places)
        try:
            if not all(mapping.writable for mapping in grant.places.mappings):
                ready = 0
            if ready:
                ids = self._work.block_ids[positions[:ready]]
                places = grant.places
                plan = CopyPlan(self._work.table, ids, places.addresses, handle.slot_bytes, places.mappings)
                failed = yield Copy(plan, to_slots=True)
                ready = min([ready, *failed])
        except BaseException:
            yield Post(AbortRequest(grant.reservation))
            raise
        if ready < len(positions):
            gap, last = positions[ready], first + len(grant.codes)
            self._codes[gap:last] = bytes([BlockOutcome.FAILED] + [BlockOutcome.ORPHAN] * (last - gap - 1))
        request = CommitRequest(grant.reservation, join_u32(range(ready, len(positions))))
        self._written = _Written(request, tuple(positions[:ready]))

    def _settle(self, reply: Reply | ForebayError) -> None:
        """Book the answer to a commit. A count other than ours says that some block is not there: trust none."""
        written, self._written = self._written, None
        if written is None:
            return
        if isinstance(reply, CommitReply) and reply.count == len(written.positions):
            self._committed += reply.count
            return
        for position in written.positions:
            self._codes[position] = BlockOutcome.FAILED


_FOUND = (BlockOutcome.STORED, BlockOutcome.PRESENT, BlockOutcome.IN_FLIGHT)


def undo(reply: Reply | ForebayError) -> Request | None:
    """What gives back the grant of a reply that came after its caller had gone."""
    if isinstance(reply, AcquireReply) and reply.lease:
        return ReleaseRequest(reply.lease)
    if isinstance(reply, ReserveReply) and reply.reservation:
        return AbortRequest(reply.reservation)
    return None
