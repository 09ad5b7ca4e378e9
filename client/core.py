"""The client without its I/O: each operation is a generator of actions.

An operation yields what must be done (exchange requests, map a slab, copy a plan, await blocks that are still being
read), is sent the result or has the error thrown into it, and returns its own. The sync and the async client are two
loops around these generators, so the dance of a fetch and of a store is written, and tested against faults, once.

Rules of the dance: bytes that were copied out count only if the generations still agree after the copy; only
slots that the daemon said to write are written; after one failed block of a chain the rest of its batch is given
back too, for nobody could find what follows a gap. Where a copy may still be moving bytes (CopyTimeout), neither the
slots nor the lease are given back: the daemon keeps a silent writer's slots from others, and leases end by the clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from forebay.client import checksums
from forebay.client.copier import LEGACY_STREAM, CopyPlan, CopyTimeout, Pinned
from forebay.client.loads import NOTHING, Loads, Progress
from forebay.client.namespaces import Namespace
from forebay.client.options import Planning
from forebay.client.places import Places, SlabMapping, no_places
from forebay.client.results import (
    BlockOutcome,
    FetchResult,
    LookupResult,
    PersistResult,
    PrefetchResult,
    RemovalResult,
    StoreResult,
    reason_of,
)
from forebay.client.segments import Addresses, SegmentTable
from forebay.kvstore.errors import BadRequest, ForebayError, Internal, PeerError, PeerLost, UnknownSession
from forebay.kvstore.eviction import PRIORITY_MAX
from forebay.kvstore.outcome import StopReason
from forebay.kvstore.planner import Backlog
from forebay.transports.messages import (
    EXPECT_MS_MAX,
    REFUSED_CHARS_MAX,
    U31_MAX,
    AbortReply,
    AbortRequest,
    AcquireReply,
    AcquireRequest,
    ClearReply,
    ClearRequest,
    CommitReply,
    CommitRequest,
    DoneReply,
    DoneRequest,
    EvictReply,
    EvictRequest,
    EvictScope,
    ExpectReply,
    ExpectRequest,
    FindNamespaceReply,
    FindNamespaceRequest,
    LookupReply,
    LookupRequest,
    OpenNamespaceReply,
    PersistReply,
    PersistRequest,
    PinnedRequest,
    PinReply,
    PinRequest,
    PrefetchReply,
    PrefetchRequest,
    ReleaseRequest,
    Reply,
    ReportReply,
    ReportRequest,
    Request,
    ReserveReply,
    ReserveRequest,
    ResolveReply,
    ResolveRequest,
    StoppedReply,
    StoppedRequest,
    TouchReply,
    TouchRequest,
    UnpinReply,
    UnpinRequest,
    join_u32,
)
from forebay.transports.packets import Ready
from forebay.transports.session import Notice

BATCH_BYTES = 256 << 20
BATCH_BLOCKS = 256
"""A store reserves at most this much at a time, so that a long one neither hoards slots nor starves others."""

FETCH_DEADLINE_MS = 30_000.0
"""How long a fetch takes at most, unless it says otherwise: as long as a lease lives by default."""

COPIED_BYTES_MIN, COPIED_EVERY_S = 1 << 20, 0.25
"""The daemon is told of fetches of so many bytes, and not more often."""

PERSIST_PAUSE_S = 0.002
PERSIST_PAUSE_MAX_S = 0.25
"""Pauses between two questions whether blocks are durable; each is twice as long as the one before."""

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


@dataclass(frozen=True, slots=True)
class CopyAhead:
    """Send the requests, execute a plan while they travel, take the replies: the result is what both give, as a pair.

    Should the copy raise, what the replies grant is given back.
    """

    copy: Copy
    requests: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class Await:
    """Wait until more than `ready` blocks of a lease are ready, or nothing more will come; the result is its Progress.

    After `timeout_s` (None: the client's time-out) the result is how far it is all the same. From `until_s`
    (time.monotonic) on it is None, whatever has come by then.
    """

    lease: int
    ready: int
    timeout_s: float | None = None
    until_s: float | None = None


@dataclass(frozen=True, slots=True)
class Pause:
    """Let time pass; no result. Ends with an error when the session does."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Compute:
    """Call what takes long, where nothing else has to wait for it; the result is the call's."""

    call: Callable[[], Any]


Action: TypeAlias = Exchange | Post | Map | Copy | CopyAhead | Await | Pause | Compute
Steps: TypeAlias = Generator[Action, Any, T]
Operation: TypeAlias = Callable[["Attachment"], Steps[T]]


@dataclass(slots=True)
class Attachment:
    """What one session with one daemon's life has opened and mapped; thrown away with the session."""

    max_message_bytes: int
    max_hashes: int
    handles: dict[bytes, OpenNamespaceReply] = field(default_factory=dict)
    slabs: dict[tuple[int, int], SlabMapping] = field(default_factory=dict)
    loads: Loads = field(default_factory=Loads)
    copies_told_s: float = float("-inf")
    pinned: Callable[[], Pinned] = Pinned
    pinned_told: Pinned = field(default_factory=Pinned)

    def take(self, notice: Notice) -> None:
        """What the daemon told: a lease is further, or a slab was taken back.

        Copies under way keep a slab mapped, and fail their check.
        """
        if isinstance(notice, Ready):
            self.loads.tell(notice.lease, Progress(notice.ready, notice.total))
        else:
            self.slabs.pop((notice.ns, notice.slab), None)

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
    stream: int | None
    priority: int = 0


def transfer(
    ns: Namespace,
    hashes: Sequence[bytes],
    memory: object,
    block_ids: Iterable[int] | None,
    *,
    writable: bool,
    stream: int | None = LEGACY_STREAM,
) -> Transfer:
    """Check what an engine asks to move; no I/O.

    Args:
        memory: a SegmentTable, or what `SegmentTable.of` takes with blocks along axis 0.
        block_ids: where each hash's block lies in it; None: 0, 1, 2, ...
        stream: see `CopyPlan`.
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
    return Transfer(ns, hashes, table, ids, stream)


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


def lookup(attachment: Attachment, ns: Namespace, blob: bytes, backlog: Backlog, plan: Planning) -> Steps[LookupResult]:
    handle = yield from open_namespace(attachment, ns)
    bytes_max = attachment.hashes_max(ns) * ns.hash_bytes
    asked = blob if len(blob) <= bytes_max else blob[:bytes_max]
    request = LookupRequest(handle.ns, asked, backlog.requests, backlog.tokens)
    reply = yield from call(request, LookupReply)
    blocks = min(reply.blocks, len(asked) // ns.hash_bytes)  # an engine takes it for a part of its prompt
    advice, load_blocks = reply.advice, min(reply.load_blocks, blocks)
    if blocks and plan != "auto":
        advice, load_blocks = ("load", blocks) if plan == "always" else ("recompute", 0)
    return LookupResult(blocks, dict(reply.by_tier), reply.load_us, advice, load_blocks)


def report(
    computed_tokens: int = 0, depth_tokens: int = 0, compute_s: float = 0.0, copied_bytes: int = 0, copy_s: float = 0.0
) -> Steps[bool]:
    """Tell the daemon what was measured; its plans follow."""
    request = ReportRequest(computed_tokens, depth_tokens, int(compute_s * 1e6), copied_bytes, int(copy_s * 1e6))
    yield from call(request, ReportReply)
    return True


def tell_pinned(attachment: Attachment) -> Steps[None]:
    """Tell the daemon what GPUs reach by themselves, if that changed: its status and metrics say it."""
    pinned = attachment.pinned()
    if pinned != attachment.pinned_told:
        attachment.pinned_told = pinned
        yield Post(PinnedRequest(pinned.size_bytes, pinned.refused[:REFUSED_CHARS_MAX]))


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


def done(attachment: Attachment, ns: Namespace, hashes: Sequence[bytes], keep: int) -> Steps[int]:
    """Says that the conversation which ends with these blocks is over; of a longer chain than a request takes, the end.

    Returns how many blocks go first.
    """
    handle = yield from open_namespace(attachment, ns)
    blob = b"".join(hashes[-attachment.hashes_max(ns) :])
    reply = yield from call(DoneRequest(handle.ns, blob, keep), DoneReply)
    return reply.count


def stopped(attachment: Attachment, ns: Namespace, hashes: Sequence[bytes], reason: StopReason) -> Steps[int]:
    """Says how the answer stopped that these blocks end with; returns of how many blocks that is taken into account."""
    handle = yield from open_namespace(attachment, ns)
    blob = b"".join(hashes[-attachment.hashes_max(ns) :])
    reply = yield from call(StoppedRequest(handle.ns, blob, reason), StoppedReply)
    return reply.count


def checked_reason(reason: StopReason) -> StopReason:
    """Raises BadRequest unless it is one."""
    try:
        return StopReason(reason)
    except ValueError as error:
        raise BadRequest(f"no reason for an answer to stop: {error}") from error


def checked_priority(priority: int) -> int:
    """Raises BadRequest unless it is one."""
    if type(priority) is not int or not 0 <= priority <= PRIORITY_MAX:
        raise BadRequest(f"priority must be from 0 to {PRIORITY_MAX}, not {priority}")
    return priority


def kept_blocks(keep: int) -> int:
    """Raises BadRequest unless it is a number of blocks."""
    if type(keep) is not int or not 0 <= keep <= U31_MAX:
        raise BadRequest(f"keep must be from 0 to {U31_MAX}, not {keep}")
    return keep


def expect_blocks(attachment: Attachment, ns: Namespace, hashes: Sequence[bytes], within_ms: int) -> Steps[int]:
    """Says that leading blocks will be asked for again, until one is not kept; returns how many are."""
    handle = yield from open_namespace(attachment, ns)
    kept = 0
    for part in _parts(hashes, attachment.hashes_max(ns)):
        reply = yield from call(ExpectRequest(handle.ns, b"".join(part), within_ms), ExpectReply)
        kept += reply.count
        if reply.count < len(part):
            break
    return kept


def within_ms(within_s: float) -> int:
    """Raises BadRequest unless it is a time from 1 ms to an hour."""
    if not 0.001 <= within_s <= EXPECT_MS_MAX / 1000:
        raise BadRequest(f"within_s must be from 0.001 to {EXPECT_MS_MAX // 1000}, not {within_s}")
    return int(within_s * 1000)


def evict(
    attachment: Attachment, ns: Namespace, hashes: Sequence[bytes], scope: EvictScope, dry_run: bool
) -> Steps[RemovalResult]:
    handle = yield from open_namespace(attachment, ns)
    removed = kept = 0
    parts = [()] if scope == EvictScope.NAMESPACE else _parts(hashes, attachment.hashes_max(ns))
    for part in parts:
        request = EvictRequest(handle.ns, int(scope), b"".join(part), dry_run)
        reply = yield from call(request, EvictReply)
        while reply.more:
            reply = yield from call(EvictRequest(handle.ns, int(scope), b"", dry_run, reply.more), EvictReply)
        removed, kept = removed + reply.removed, kept + reply.kept
    return RemovalResult(removed, kept)


def clear(dry_run: bool) -> Steps[RemovalResult]:
    reply = yield from call(ClearRequest(dry_run), ClearReply)
    while reply.more:
        reply = yield from call(ClearRequest(dry_run, reply.more), ClearReply)
    return RemovalResult(reply.removed, reply.kept)


def persist(attachment: Attachment, ns: Namespace, hashes: Sequence[bytes], timeout_s: float) -> Steps[PersistResult]:
    """Ask that the leading blocks be made durable, and ask again until none is pending; 0 asks once."""
    handle = yield from open_namespace(attachment, ns)
    parts = list(_parts(hashes, attachment.hashes_max(ns)))
    result = yield from _persist(handle, parts)
    pause_s, left_s = PERSIST_PAUSE_S, timeout_s
    while result.pending and left_s > 0:
        pause_s = min(pause_s, left_s)
        yield Pause(pause_s)
        left_s -= pause_s
        pause_s = min(2 * pause_s, PERSIST_PAUSE_MAX_S)
        result = yield from _persist(handle, parts)
    return result


def _persist(handle: OpenNamespaceReply, parts: Sequence[Sequence[bytes]]) -> Steps[PersistResult]:
    """One round of questions; beyond a block that is neither durable nor being written nothing is asked."""
    durable = pending = 0
    for part in parts:
        reply = yield from call(PersistRequest(handle.ns, b"".join(part)), PersistReply)
        durable += 0 if pending else reply.durable
        pending += reply.pending
        if reply.durable + reply.pending < len(part):
            break
    return PersistResult(durable, pending)


CountedRequest: TypeAlias = type[UnpinRequest] | type[TouchRequest]
CountedReply: TypeAlias = type[UnpinReply] | type[TouchReply]


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


def _plan(
    work: Transfer, ids: Addresses, places: Places, handle: OpenNamespaceReply, *, with_checksums: bool
) -> CopyPlan:
    sums = np.zeros(len(ids), np.uint64) if with_checksums else None
    return CopyPlan(work.table, ids, places.addresses, handle.slot_bytes, places.mappings, work.stream, sums)


# --- reading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Held:
    """A lease and where its blocks lie; lease 0 and no places when nothing was there.

    There are fewer places than leased blocks when a slab was taken back before it could be mapped.

    Attributes:
        progress: how many of them were ready when the lease was granted, and how many there are.
        checksums: uint64, one for each leased block, 0 where it is not known; empty when none is.
        soft_until_s: time.monotonic from which on the rest had better be computed; infinite where there is none.
    """

    lease: int
    places: Places
    progress: Progress
    checksums: NDArray[np.uint64]
    soft_until_s: float = math.inf


def holds_nothing(block_bytes: int) -> Held:
    return Held(0, no_places(block_bytes), NOTHING, np.zeros(0, np.uint64))


def acquire(attachment: Attachment, ns: Namespace, hashes: Sequence[bytes], ttl_ms: int) -> Steps[Held]:
    handle = yield from open_namespace(attachment, ns)
    return (yield from _acquire(attachment, handle, ns, hashes[: attachment.hashes_max(ns)], ttl_ms))


def resolve(attachment: Attachment, ns: Namespace, lease: int) -> Steps[Held]:
    """The places, in this shard, of a lease that a session of the same client group holds."""
    handle = yield from open_namespace(attachment, ns)
    reply = yield from call(ResolveRequest(handle.ns, lease), ResolveReply)
    try:
        return (yield from _held(attachment, handle, lease, reply))
    except BaseException:
        attachment.loads.end(lease)
        raise


def _acquire(
    attachment: Attachment, handle: OpenNamespaceReply, ns: Namespace, hashes: Sequence[bytes], ttl_ms: int
) -> Steps[Held]:
    blob = b"".join(hashes)
    reply = yield from call(AcquireRequest(handle.ns, blob, ttl_ms), AcquireReply)
    if not reply.lease:
        return holds_nothing(handle.block_bytes)
    try:
        if len(reply.slots) > 8 * len(hashes):
            raise Internal("the daemon leased more blocks than were asked for")
        return (yield from _held(attachment, handle, reply.lease, reply))
    except BaseException:
        yield Post(ReleaseRequest(reply.lease))
        raise


def _held(
    attachment: Attachment, handle: OpenNamespaceReply, lease: int, reply: AcquireReply | ResolveReply
) -> Steps[Held]:
    """What a reply grants. If not all is ready, its progress is followed from here on, until the lease is released."""
    granted_s = time.monotonic()
    progress = Progress(reply.ready, len(reply.slots) // 8)
    if not progress.ended:
        progress = attachment.loads.begin(lease, progress)
    places = yield from _locate(attachment, handle, reply.slots, reply.generations)
    checksums = np.frombuffer(reply.checksums, np.dtype("<u8"))
    soft_us = reply.soft_us if isinstance(reply, AcquireReply) else 0
    return Held(lease, places, progress, checksums, granted_s + soft_us / 1e6 if soft_us else math.inf)


def more_ready(lease: int, ready: int, timeout_s: float | None) -> Steps[Progress]:
    """How far a lease is once more than `ready` blocks may be read, nothing more will come, or time is up."""
    progress: Progress = yield Await(lease, ready, timeout_s)
    return progress


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a fetch waits for blocks that are still being read.

    Attributes:
        until_s: time.monotonic, at the latest.
        plans: only until the daemon's soft deadline, where that is before: from then on computing should be faster.
    """

    until_s: float
    plans: bool = False

    def until(self, held: Held) -> float:
        return min(self.until_s, held.soft_until_s) if self.plans else self.until_s


def fetch(
    attachment: Attachment, work: Transfer, ttl_ms: int, patience: Patience, *, strict: bool, verify: bool = False
) -> Steps[FetchResult]:
    """Acquire, copy, check, release. Unless `strict`, an error ends the run and what was verified counts.

    With `verify` the bytes that arrived are compared with the blocks' checksums, where those are known.
    """
    loading = _Fetch(attachment, work, ttl_ms, patience, verify=verify)
    try:
        reason = yield from loading.run()
        yield from loading.tell(late=reason == "late")
        yield from tell_pinned(attachment)
    except ForebayError as error:
        if strict:
            raise
        reason = reason_of(error)
    return FetchResult(loading.loaded, loading.loaded * work.ns.block_bytes, reason)


class _Fetch:
    """One fetch: request by request of as many hashes as fit one, and of each lease range by range as it is read.

    Attributes:
        loaded: leading blocks that are right.
    """

    def __init__(
        self, attachment: Attachment, work: Transfer, ttl_ms: int, patience: Patience, *, verify: bool
    ) -> None:
        self.loaded = 0
        self._attachment = attachment
        self._work = work
        self._ttl_ms = ttl_ms
        self._patience = patience
        self._verify = verify
        self._begun_s = time.monotonic()
        self._waited = False

    def run(self) -> Steps[str]:
        """Returns why it ended short of all blocks; empty when it did not."""
        work = self._work
        handle = yield from open_namespace(self._attachment, work.ns)
        for part in _parts(work.hashes, self._attachment.hashes_max(work.ns)):
            held = yield from _acquire(self._attachment, handle, work.ns, part, self._ttl_ms)
            if not held.lease:
                return "miss"
            try:
                blocks, reason = yield from self._load(handle, held)
            except CopyTimeout:  # a device may still read the slots: the lease ends by the clock
                raise
            except BaseException:
                yield Post(ReleaseRequest(held.lease))
                raise
            standing = yield Post(ReleaseRequest(held.lease))
            if not standing:  # nobody moves the generations of a dead daemon on
                raise PeerLost("the daemon went away during the copy")
            self.loaded += blocks
            if reason or blocks < len(part):
                return reason or "miss"
        return ""

    def tell(self, *, late: bool) -> Steps[None]:
        """Tell the daemon, now and then, how long it took to get blocks that were in memory: its plans go by that.

        And of each load that was given up at its soft deadline.
        """
        if late:
            yield Post(ReportRequest(0, 0, 0, 0, 0, late_loads=1))
        size_bytes, now = self.loaded * self._work.ns.block_bytes, time.monotonic()
        attachment, copy_us = self._attachment, int((now - self._begun_s) * 1e6)
        if (
            size_bytes >= COPIED_BYTES_MIN
            and copy_us
            and not self._waited
            and now - attachment.copies_told_s >= COPIED_EVERY_S
        ):
            attachment.copies_told_s = now
            yield Post(ReportRequest(0, 0, 0, size_bytes, copy_us))

    def _load(self, handle: OpenNamespaceReply, held: Held) -> Steps[tuple[int, str]]:
        """Copy what is ready, while the rest is being read; returns the blocks that are right and what stopped them.

        What was checked after its copy is not checked again: those bytes are the engine's own by then. Given up is only
        waiting, never a copy: nothing moves afterwards.
        """
        blocks, progress, until_s = 0, held.progress, self._patience.until(held)
        late = False
        while True:
            last = min(progress.ready, len(held.places))
            if last > blocks:
                right, reason = yield from self._load_range(handle, held, blocks, last)
                blocks += right
                if reason:
                    return blocks, reason
            if progress.ended or last == len(held.places):
                return blocks, "" if blocks == progress.total else "stale"
            if late:
                return blocks, "late"
            self._waited = True
            told: Progress | None = yield Await(held.lease, progress.ready, until_s=until_s)
            if told is None and until_s == self._patience.until_s:
                return blocks, "deadline"
            late = told is None
            progress = self._attachment.loads.progress(held.lease) if told is None else told
            if progress.ready <= blocks and not progress.ended and not late:
                return blocks, "timeout"

    def _load_range(self, handle: OpenNamespaceReply, held: Held, first: int, last: int) -> Steps[tuple[int, str]]:
        """Copy a lease's blocks `first` to `last - 1`; returns how many of them are right and what stopped them."""
        places, expected = held.places.part(first, last), held.checksums[first:last]
        verify = self._verify and bool(expected.any())
        ids = self._work.block_ids[self.loaded + first : self.loaded + last]
        plan = _plan(self._work, ids, places, handle, with_checksums=verify)
        failed: Sequence[int] = yield Copy(plan, to_slots=False)
        right, reason = places.verified(), ""
        if right < len(places):
            reason = "stale"
        if failed and failed[0] < right:
            right, reason = failed[0], "failed"
        if verify:
            corrupt = yield from _corrupt(plan, expected[:right])
            if corrupt is not None:
                right, reason = corrupt, "corrupt"
        return right, reason


def _corrupt(plan: CopyPlan, expected: NDArray[np.uint64]) -> Steps[int | None]:
    """The first of the plan's leading blocks whose bytes in the engine's memory have another checksum; 0 fits any."""
    known = np.flatnonzero(expected)
    if not len(known):
        return None
    if plan.table.device is not None and plan.sums is not None:
        found = plan.sums[known]
    else:
        found = yield Compute(partial(checksums.of_paged, plan.table, plan.block_ids[known]))
    wrong = known[found != expected[known]]
    return int(wrong[0]) if len(wrong) else None


# --- writing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Grant:
    """A reservation: each block's outcome, and where those to be written lie. Reservation 0: nothing to write."""

    reservation: int
    codes: bytes
    places: Places


def reserve(
    attachment: Attachment, ns: Namespace, parent: bytes, hashes: Sequence[bytes], priority: int = 0
) -> Steps[Grant]:
    handle = yield from open_namespace(attachment, ns)
    reply = yield from call(ReserveRequest(handle.ns, parent, b"".join(hashes), priority), ReserveReply)
    return (yield from _granted(attachment, handle, reply, len(hashes)))


@dataclass(frozen=True, slots=True)
class Filled:
    """Slots of a grant that were copied into.

    Attributes:
        failed: positions whose copy failed, ascending, those without a place included.
        sums: checksums that were made on the way, uint64, one for each place; 0 where none was.
        moving: bytes may still be moving; the reservation must be neither committed nor aborted.
    """

    failed: Sequence[int]
    sums: NDArray[np.uint64]
    moving: bool = False


def fill(
    grant: Grant, table: SegmentTable, ids: Addresses, stream: int | None, *, with_checksums: bool
) -> Steps[Filled]:
    """Copy blocks of an engine's memory into a grant's slots: `ids` has one for each block to write."""
    places, everything = grant.places, range(len(ids))
    sums = np.zeros(len(places), np.uint64)
    if not len(places) or not all(mapping.writable for mapping in places.mappings):
        return Filled(everything, sums)
    here, slot_bytes = len(places), places.mappings[0].slot_bytes
    asked = sums if with_checksums else None
    plan = CopyPlan(table, ids[:here], places.addresses, slot_bytes, places.mappings, stream, asked)
    try:
        failed = yield Copy(plan, to_slots=True)
    except CopyTimeout:
        return Filled(everything, sums, moving=True)
    return Filled([*failed, *everything[here:]], sums)


def commit(
    grant: Grant, failed: Sequence[int], *, with_checksums: bool, known: NDArray[np.uint64] | None = None
) -> Steps[int]:
    """Publish what the caller wrote in place; returns how many blocks that were.

    Args:
        known: checksums that need not be made, one for each place; 0 where there is none.
    """
    sums = b""
    try:
        if with_checksums:
            written = sorted(set(range(len(grant.places))).difference(failed))
            sums = yield from _checksums(grant, written, known)
        request = CommitRequest(grant.reservation, join_u32(failed), sums)
    except BaseException:
        yield Post(AbortRequest(grant.reservation))
        raise
    return (yield from call(request, CommitReply)).count


def _checksums(grant: Grant, written: Sequence[int], known: NDArray[np.uint64] | None) -> Steps[bytes]:
    """A blob of one checksum for each block to write, 0 for those not written; what is not known is hashed."""
    sums = np.zeros(grant.codes.count(BlockOutcome.STORED), np.dtype("<u8"))
    at = np.asarray(written, np.int64)
    if known is not None:
        sums[at] = known[at]
        at = at[sums[at] == 0]
    if len(at):
        places = grant.places
        sums[at] = yield Compute(partial(checksums.of_slots, places.addresses[at], places.block_bytes))
    return sums.tobytes()


def abort(attachment: Attachment, reservation: int) -> Steps[None]:
    yield from call(AbortRequest(reservation), AbortReply)


def _granted(attachment: Attachment, handle: OpenNamespaceReply, reply: ReserveReply, asked: int) -> Steps[Grant]:
    try:
        writes = reply.outcomes.count(BlockOutcome.STORED)
        if len(reply.outcomes) != asked or len(reply.slots) != 8 * writes or (writes and not reply.reservation):
            raise Internal("the daemon's reservation does not fit what was asked")
        places = yield from _locate(attachment, handle, reply.slots, reply.generations)
    except BaseException:
        if reply.reservation:
            yield Post(AbortRequest(reply.reservation))
        raise
    return Grant(reply.reservation, reply.outcomes, places)


def store(
    attachment: Attachment, work: Transfer, parent: bytes, *, strict: bool, with_checksums: bool = False
) -> Steps[StoreResult]:
    """Reserve, copy, commit, batch by batch; a batch's commit travels with the next one's reserve.

    Unless `strict`, an error ends the run and what the daemon did not confirm is FAILED or UNAVAILABLE.
    """
    writing = _Store(attachment, work, parent, with_checksums=with_checksums)
    try:
        yield from writing.run()
        yield from tell_pinned(attachment)
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

    def __init__(self, attachment: Attachment, work: Transfer, parent: bytes, *, with_checksums: bool) -> None:
        self._attachment = attachment
        self._work = work
        self._parent = parent
        self._with_checksums = with_checksums
        self._codes = bytearray([BlockOutcome.UNAVAILABLE]) * len(work.hashes)
        self._committed = 0
        self._written: _Written | None = None

    def run(self) -> Steps[None]:
        """Batch by batch; while one is copied, the commit of the one before and the reserve of the next travel.

        What was copied before an error is committed all the same; else its slots would be held for the session's life.
        """
        try:
            yield from self._batches()
        except ForebayError:
            yield from self._exchange(None)
            raise
        except BaseException:  # a cancellation or a signal: nobody waits for the answer
            for request in self._commit():
                yield Post(request)
            raise

    def _batches(self) -> Steps[None]:
        work, total = self._work, len(self._work.hashes)
        self._handle = yield from open_namespace(self._attachment, work.ns)
        by_bytes = max(1, BATCH_BYTES // self._handle.slot_bytes)
        self._size = min(by_bytes, BATCH_BLOCKS, self._attachment.hashes_max(work.ns))
        first, reply = 0, None
        while first < total:
            last = min(first + self._size, total)
            if reply is None:
                reply = yield from self._exchange(self._reserve(first))
            assert reply is not None, "an exchange without a reply"
            grant = yield from _granted(self._attachment, self._handle, expect(reply, ReserveReply), last - first)
            self._codes[first:last] = grant.codes
            self._parent = work.hashes[last - 1]
            reply = None
            if grant.reservation:
                reply = yield from self._write(grant, first, last)
            if self._codes[last - 1] not in _FOUND:
                self._codes[last:] = bytes([BlockOutcome.ORPHAN]) * (total - last)
                unwanted = None if reply is None else undo(reply)
                if unwanted is not None:
                    yield Post(unwanted)
                break
            first = last
        yield from self._exchange(None)

    def result(self, error: ForebayError | None) -> StoreResult:
        if self._written is not None:
            self._settle(error or Internal("not committed"))
        return StoreResult(
            bytes(self._codes),
            self._committed,
            self._committed * self._work.ns.block_bytes,
            reason_of(error) if error else "",
        )

    def _reserve(self, first: int) -> ReserveRequest:
        part = b"".join(self._work.hashes[first : first + self._size])
        return ReserveRequest(self._handle.ns, self._parent, part, self._work.priority)

    def _exchange(self, request: Request | None) -> Steps[Reply | ForebayError | None]:
        """Commit what has been written, if anything, and ask for something else, if anything."""
        commit = self._commit()
        requests = commit if request is None else (*commit, request)
        if not requests:
            return None
        replies = yield Exchange(requests)
        return self._take(commit, replies)

    def _commit(self) -> tuple[Request, ...]:
        return () if self._written is None else (self._written.request,)

    def _take(
        self, commit: tuple[Request, ...], replies: Sequence[Reply | ForebayError]
    ) -> Reply | ForebayError | None:
        """Book the reply to the commit, if there was one; returns the other, if there was one."""
        if commit:
            self._settle(replies[0])
        return replies[-1] if len(replies) > len(commit) else None

    def _write(self, grant: Grant, first: int, last: int) -> Steps[Reply | ForebayError | None]:
        """Copy the blocks granted; from the first that failed on, the batch is given back.

        Returns the reply to the next batch's reserve, which is asked for meanwhile if there is one.
        """
        positions = [first + i for i, code in enumerate(grant.codes) if code == BlockOutcome.STORED]
        ready, sums, known, reply = len(grant.places), b"", None, None
        try:
            if not all(mapping.writable for mapping in grant.places.mappings):
                ready = 0
            if ready:
                ids = self._work.block_ids[positions[:ready]]
                plan = _plan(self._work, ids, grant.places, self._handle, with_checksums=self._with_checksums)
                failed, reply = yield from self._copy(plan, last)
                ready, known = min([ready, *failed]), plan.sums
            if self._with_checksums:
                sums = yield from _checksums(grant, range(ready), known)
        except BaseException as error:
            for position in positions:
                self._codes[position] = BlockOutcome.FAILED
            if not isinstance(error, CopyTimeout):  # a device may still write to the slots: nobody may get them
                yield Post(AbortRequest(grant.reservation))
            unwanted = None if reply is None else undo(reply)
            if unwanted is not None:
                yield Post(unwanted)
            raise
        if ready < len(positions):
            gap, end = positions[ready], first + len(grant.codes)
            self._codes[gap:end] = bytes([BlockOutcome.FAILED] + [BlockOutcome.ORPHAN] * (end - gap - 1))
        request = CommitRequest(grant.reservation, join_u32(range(ready, len(positions))), sums)
        if self._written is not None:  # nothing was copied that its commit could have travelled with
            try:
                yield from self._exchange(None)
            except BaseException:
                yield Post(AbortRequest(grant.reservation))
                raise
        self._written = _Written(request, tuple(positions[:ready]))
        return reply

    def _copy(self, plan: CopyPlan, last: int) -> Steps[tuple[Sequence[int], Reply | ForebayError | None]]:
        goes_on = last < len(self._work.hashes) and self._codes[last - 1] in _FOUND
        commit = self._commit()
        requests = (*commit, self._reserve(last)) if goes_on else commit
        if not requests:
            return (yield Copy(plan, to_slots=True)), None
        failed, replies = yield CopyAhead(Copy(plan, to_slots=True), requests)
        return failed, self._take(commit, replies)

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
