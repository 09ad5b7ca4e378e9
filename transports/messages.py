"""What travels on the control socket: one frozen record per verb and direction, with its bounds.

A record's fields are the wire's positional fields, in order. Bounds are written out by hand in `check`,
because both sides meet bytes they did not write; a schema library was rejected, since the few rules here fit
on a page and a check costs under a microsecond. Lists of hashes and numbers travel as one blob each:
packing a list of a thousand objects costs 15 times as much. How records become bytes is the codec's business.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any, ClassVar, Self

from forebay.kvstore.errors import BadRequest
from forebay.kvstore.eviction import PRIORITY_MAX
from forebay.kvstore.namespace import NamespaceSpec
from forebay.kvstore.outcome import Scope, StopReason

PROTOCOL_VERSION = 3

MESSAGE_BYTES_MAX = 4 << 20
HASHES_MAX = 1 << 16
HASH_BYTES_MIN = 16
HASH_BYTES_MAX = 32
TOKEN_BYTES = 16
BOOT_ID_BYTES = 16
FINGERPRINT_BYTES = 32
TEXT_CHARS_MAX = 1024
REFUSED_CHARS_MAX = 256
STATUS_CHARS_MAX = 1 << 20
TIERS_MAX = 16
PROBLEMS_MAX = 1024
TTL_MS_MAX = 24 * 3600 * 1000
RANK_MAX = (1 << 10) - 1
U31_MAX = (1 << 31) - 1
U63_MAX = (1 << 63) - 1
REPORTED_MAX = (1 << 48) - 1
EXPECT_MS_MAX = 3600 * 1000
RECORD_MS_MAX = 7 * 24 * 3600 * 1000
TAKEN_BYTES_MAX = 1 << 20
"""Of hashes in one reply, unless a single request has more."""

ADVICE = ("", "load", "recompute")

_BLOB_BYTES_MAX = HASHES_MAX * HASH_BYTES_MAX
_U64_BLOB_BYTES_MAX = HASHES_MAX * 8
_U32_BLOB_BYTES_MAX = HASHES_MAX * 4
_SPLIT_MAX = 1024


class Verb(IntEnum):
    """What a request asks for; the numbers are the wire's and never change meaning."""

    PING = 1
    OPEN_NAMESPACE = 2
    FIND_NAMESPACE = 3
    LOOKUP = 4
    ACQUIRE = 5
    RESOLVE = 6
    RELEASE = 7
    RESERVE = 8
    COMMIT = 9
    ABORT = 10
    PIN = 11
    UNPIN = 12
    EVICT = 13
    TOUCH = 14
    DONE = 15
    PREFETCH = 16
    STATUS = 17
    CHECK = 18
    CLEAR = 19
    PERSIST = 20
    REPORT = 21
    RECORD = 22
    RECORDED = 23
    EXPLAIN = 24
    EXPECT = 25
    PINNED = 26
    STOPPED = 27


EvictScope = Scope
"""What an EVICT removes."""


# --- bounds -------------------------------------------------------------------------------------------------


def check_int(name: str, value: object, low: int, high: int) -> None:
    """Raise BadRequest unless `value` is a plain integer (no bool) from `low` to `high`."""
    if type(value) is not int or not low <= value <= high:
        raise BadRequest(f"{name} must be an integer from {low} to {high}")


def check_bool(name: str, value: object) -> None:
    """Raise BadRequest unless `value` is true or false."""
    if type(value) is not bool:
        raise BadRequest(f"{name} must be true or false")


def check_text(name: str, value: object, chars_max: int = TEXT_CHARS_MAX) -> None:
    """Raise BadRequest unless `value` is text of at most `chars_max` characters."""
    if type(value) is not str or len(value) > chars_max:
        raise BadRequest(f"{name} must be text of at most {chars_max} characters")


def check_bytes(name: str, value: object, bytes_max: int, unit_bytes: int = 1) -> None:
    """Raise BadRequest unless `value` is at most `bytes_max` bytes, in whole units."""
    if type(value) is not bytes or len(value) > bytes_max or len(value) % unit_bytes:
        raise BadRequest(f"{name} must be at most {bytes_max} bytes in units of {unit_bytes}")


def check_exact(name: str, value: object, *lengths: int) -> None:
    """Raise BadRequest unless `value` is bytes of one of the lengths."""
    if type(value) is not bytes or len(value) not in lengths:
        raise BadRequest(f"{name} must be {' or '.join(map(str, lengths))} bytes")


# --- blobs --------------------------------------------------------------------------------------------------


@cache
def _splitter(width: int, count: int) -> struct.Struct:
    return struct.Struct(f"{width}s" * count)


def split_hashes(blob: bytes, width: int, hashes_max: int = HASHES_MAX) -> list[bytes]:
    """The hashes in a blob of `width`-byte hashes, in order; raises BadRequest.

    Blocking: no. Cost: about 12 us per 1 000. Splits by cached structs of power-of-two counts (slices in
    Python take five times as long), at most 1 024 at a time so that the cache stays under 100 KiB a width.
    """
    count, rest = divmod(len(blob), width)
    if rest or count > hashes_max:
        raise BadRequest(f"the hashes must be at most {hashes_max} of {width} bytes each, in {len(blob)} bytes")
    hashes: list[bytes] = []
    done = 0
    while done < count:
        chunk = min(_SPLIT_MAX, 1 << ((count - done).bit_length() - 1))
        hashes += _splitter(width, chunk).unpack_from(blob, done * width)
        done += chunk
    return hashes


def join_hashes(hashes: Sequence[bytes], width: int, hashes_max: int = HASHES_MAX) -> bytes:
    """One blob of the hashes; raises BadRequest when one is not `width` bytes or there are too many."""
    if len(hashes) > hashes_max:
        raise BadRequest(f"at most {hashes_max} hashes a request, not {len(hashes)}")
    if list(map(len, hashes)).count(width) != len(hashes):
        raise BadRequest(f"every hash of this namespace is {width} bytes")
    return b"".join(hashes)


def split_u64(blob: bytes) -> tuple[int, ...]:
    """Little-endian u64 numbers of a blob; raises BadRequest."""
    return _split_numbers(blob, "Q", 8)


def join_u64(numbers: Iterable[int]) -> bytes:
    """A blob of little-endian u64 numbers."""
    values = tuple(numbers)
    return struct.pack(f"<{len(values)}Q", *values)


def split_u32(blob: bytes) -> tuple[int, ...]:
    """Little-endian u32 numbers of a blob; raises BadRequest."""
    return _split_numbers(blob, "I", 4)


def join_u32(numbers: Iterable[int]) -> bytes:
    """A blob of little-endian u32 numbers."""
    values = tuple(numbers)
    return struct.pack(f"<{len(values)}I", *values)


def _split_numbers(blob: bytes, letter: str, width: int) -> tuple[int, ...]:
    count, rest = divmod(len(blob), width)
    if rest:
        raise BadRequest(f"{len(blob)} bytes are no list of {width}-byte numbers")
    return struct.unpack(f"<{count}{letter}", blob)


# --- records ------------------------------------------------------------------------------------------------


def _field_names(record_type: type[Record]) -> tuple[str, ...]:
    names: tuple[str, ...] = record_type.__match_args__  # what a dataclass's constructor takes, in order
    return names


@dataclass(frozen=True, slots=True)
class Record:
    """What all records do."""

    def check(self) -> None:
        """Raise BadRequest naming the first field out of bounds."""

    def to_fields(self) -> list[Any]:
        """Positional wire fields."""
        return [getattr(self, name) for name in _field_names(type(self))]

    @classmethod
    def from_fields(cls, values: Sequence[Any]) -> Self:
        """A checked record of untrusted positional fields; raises BadRequest."""
        if len(values) != len(_field_names(cls)):
            raise BadRequest(f"{cls.__name__} has {len(_field_names(cls))} fields, not {len(values)}")
        record = cls(*values)
        record.check()
        return record


@dataclass(frozen=True, slots=True)
class Request(Record):
    """A record that a client sends."""

    verb: ClassVar[Verb]


@dataclass(frozen=True, slots=True)
class Reply(Record):
    """A record that the daemon sends when it has done what was asked."""


@dataclass(frozen=True, slots=True)
class _BlobRequest(Request):
    ns: int
    blob: bytes

    def check(self) -> None:
        check_int("ns", self.ns, 1, U63_MAX)
        check_bytes("blob", self.blob, _BLOB_BYTES_MAX)


@dataclass(frozen=True, slots=True)
class _CountReply(Reply):
    count: int

    def check(self) -> None:
        check_int("count", self.count, 0, U63_MAX)


@dataclass(frozen=True, slots=True)
class _RemovalReply(Reply):
    """So far; `more` is what the next request is to `resume`, 0 when all is done."""

    removed: int
    kept: int
    more: int = 0

    def check(self) -> None:
        check_int("removed", self.removed, 0, U63_MAX)
        check_int("kept", self.kept, 0, U63_MAX)
        check_int("more", self.more, 0, U63_MAX)


def _check_slots(slots: object, generations: object) -> None:
    check_bytes("slots", slots, _U64_BLOB_BYTES_MAX, 8)
    check_bytes("generations", generations, _U64_BLOB_BYTES_MAX, 8)
    if len(slots) != len(generations):  # type: ignore[arg-type]  # both were just checked to be bytes
        raise BadRequest("slots and generations differ in number")


def _check_readable(slots: bytes, ready: object, checksums: object) -> None:
    """How many of the slots may be read now, and a checksum for each or none at all; the slots were checked."""
    check_int("ready", ready, 0, len(slots) // 8)
    check_exact("checksums", checksums, *{0, len(slots)})


@dataclass(frozen=True, slots=True)
class PingRequest(Request):
    verb = Verb.PING


@dataclass(frozen=True, slots=True)
class PingReply(Reply):
    pass


@dataclass(frozen=True, slots=True)
class OpenNamespaceRequest(Request):
    """Name a namespace shard; it is made when nobody opened it before."""

    verb = Verb.OPEN_NAMESPACE
    spec: NamespaceSpec

    def check(self) -> None:
        if type(self.spec) is not NamespaceSpec:
            raise BadRequest("spec must be a namespace spec")
        self.spec.validate()

    def to_fields(self) -> list[Any]:
        return [self.spec.to_fields()]

    @classmethod
    def from_fields(cls, values: Sequence[Any]) -> Self:
        if len(values) != 1:
            raise BadRequest(f"OpenNamespaceRequest has 1 field, not {len(values)}")
        return cls(NamespaceSpec.from_fields(values[0]))


@dataclass(frozen=True, slots=True)
class OpenNamespaceReply(Reply):
    """The handle of one namespace shard and the arithmetic of its slabs."""

    ns: int
    group_fingerprint: bytes
    block_bytes: int
    slot_bytes: int
    slots_per_slab: int
    hash_bytes: int
    block_tokens: int

    def check(self) -> None:
        check_int("ns", self.ns, 1, U63_MAX)
        check_exact("group_fingerprint", self.group_fingerprint, FINGERPRINT_BYTES)
        check_int("block_bytes", self.block_bytes, 1, U63_MAX)
        check_int("slot_bytes", self.slot_bytes, self.block_bytes, U63_MAX)
        check_int("slots_per_slab", self.slots_per_slab, 1, U31_MAX)
        check_int("hash_bytes", self.hash_bytes, HASH_BYTES_MIN, HASH_BYTES_MAX)
        check_int("block_tokens", self.block_tokens, 1, U31_MAX)


@dataclass(frozen=True, slots=True)
class FindNamespaceRequest(Request):
    """Find a namespace shard that exists, by the first bytes of its group fingerprint."""

    verb = Verb.FIND_NAMESPACE
    fingerprint_prefix: bytes
    rank: int

    def check(self) -> None:
        check_exact("fingerprint_prefix", self.fingerprint_prefix, *range(1, FINGERPRINT_BYTES + 1))
        check_int("rank", self.rank, 0, RANK_MAX)


@dataclass(frozen=True, slots=True)
class FindNamespaceReply(OpenNamespaceReply):
    pass


@dataclass(frozen=True, slots=True)
class LookupRequest(_BlobRequest):
    """`waiting_requests` wait in front of the engine that asks, and `waiting_tokens` of prompts are to be computed."""

    verb = Verb.LOOKUP
    waiting_requests: int = 0
    waiting_tokens: int = 0

    def check(self) -> None:
        _BlobRequest.check(self)
        check_int("waiting_requests", self.waiting_requests, 0, REPORTED_MAX)
        check_int("waiting_tokens", self.waiting_tokens, 0, REPORTED_MAX)


@dataclass(frozen=True, slots=True)
class LookupReply(Reply):
    """How much of a prompt is stored: leading complete blocks, where, and what of them is worth loading.

    The leading `load_blocks` come sooner than they are computed, after `load_us`; the others do not.
    """

    blocks: int
    by_tier: tuple[tuple[str, int], ...]
    load_us: int
    advice: str
    load_blocks: int

    def check(self) -> None:
        check_int("blocks", self.blocks, 0, HASHES_MAX)
        if type(self.by_tier) is not tuple or len(self.by_tier) > TIERS_MAX:
            raise BadRequest(f"by_tier must be a list of at most {TIERS_MAX} pairs")
        for pair in self.by_tier:
            if type(pair) is not tuple or len(pair) != 2:
                raise BadRequest("by_tier must hold pairs of tier and count")
            check_text("tier", pair[0])
            check_int("count", pair[1], 0, HASHES_MAX)
        check_int("load_us", self.load_us, 0, U63_MAX)
        if self.advice not in ADVICE:
            raise BadRequest("advice must be 'load', 'recompute' or empty")
        check_int("load_blocks", self.load_blocks, 0, self.blocks)


@dataclass(frozen=True, slots=True)
class AcquireRequest(Request):
    """Lease the leading complete blocks for `ttl_ms` (0: the daemon's default)."""

    verb = Verb.ACQUIRE
    ns: int
    blob: bytes
    ttl_ms: int

    def check(self) -> None:
        check_int("ns", self.ns, 1, U63_MAX)
        check_bytes("blob", self.blob, _BLOB_BYTES_MAX)
        check_int("ttl_ms", self.ttl_ms, 0, TTL_MS_MAX)


@dataclass(frozen=True, slots=True)
class AcquireReply(Reply):
    """The lease (0: nothing to lease) and the slots of its blocks.

    The leading `ready` blocks may be copied now, the others are being read into their slots: session packets tell
    when they are there. `checksums` has one u64 per slot, 0 where none is known, or is empty when none is at all. After
    `soft_us` (0: never) whoever can compute the blocks that are not there yet had better do so.
    """

    lease: int
    slots: bytes
    generations: bytes
    ready: int
    checksums: bytes
    soft_us: int = 0

    def check(self) -> None:
        check_int("lease", self.lease, 0, U63_MAX)
        check_int("soft_us", self.soft_us, 0, REPORTED_MAX)
        _check_slots(self.slots, self.generations)
        _check_readable(self.slots, self.ready, self.checksums)


@dataclass(frozen=True, slots=True)
class ResolveRequest(Request):
    """The slots of another shard under a lease that a session of the same client group took."""

    verb = Verb.RESOLVE
    ns: int
    lease: int

    def check(self) -> None:
        check_int("ns", self.ns, 1, U63_MAX)
        check_int("lease", self.lease, 1, U63_MAX)


@dataclass(frozen=True, slots=True)
class ResolveReply(Reply):
    """The slots of the lease's blocks in the shard asked for; fields as in AcquireReply."""

    slots: bytes
    generations: bytes
    ready: int
    checksums: bytes

    def check(self) -> None:
        _check_slots(self.slots, self.generations)
        _check_readable(self.slots, self.ready, self.checksums)


@dataclass(frozen=True, slots=True)
class ReleaseRequest(Request):
    verb = Verb.RELEASE
    lease: int

    def check(self) -> None:
        check_int("lease", self.lease, 1, U63_MAX)


@dataclass(frozen=True, slots=True)
class ReleaseReply(Reply):
    pass


@dataclass(frozen=True, slots=True)
class ReserveRequest(Request):
    """Take slots to write blocks that continue `parent` (empty: the first block of a prompt)."""

    verb = Verb.RESERVE
    ns: int
    parent: bytes
    blob: bytes
    priority: int = 0

    def check(self) -> None:
        check_int("ns", self.ns, 1, U63_MAX)
        check_int("priority", self.priority, 0, PRIORITY_MAX)
        check_exact("parent", self.parent, 0, *range(HASH_BYTES_MIN, HASH_BYTES_MAX + 1))
        check_bytes("blob", self.blob, _BLOB_BYTES_MAX)


@dataclass(frozen=True, slots=True)
class ReserveReply(Reply):
    """One outcome byte per hash asked; slots and generations only for those to write, in order."""

    reservation: int
    outcomes: bytes
    slots: bytes
    generations: bytes

    def check(self) -> None:
        check_int("reservation", self.reservation, 0, U63_MAX)
        check_bytes("outcomes", self.outcomes, HASHES_MAX)
        _check_slots(self.slots, self.generations)


@dataclass(frozen=True, slots=True)
class CommitRequest(Request):
    """Publish what was written; `failed` are u32 positions in the list of slots to write, to be given back.

    `checksums` has one u64 per slot to write, 0 where it failed, or is empty when the client computes none.
    """

    verb = Verb.COMMIT
    reservation: int
    failed: bytes = b""
    checksums: bytes = b""

    def check(self) -> None:
        check_int("reservation", self.reservation, 1, U63_MAX)
        check_bytes("failed", self.failed, _U32_BLOB_BYTES_MAX, 4)
        check_bytes("checksums", self.checksums, _U64_BLOB_BYTES_MAX, 8)


@dataclass(frozen=True, slots=True)
class CommitReply(_CountReply):
    pass


@dataclass(frozen=True, slots=True)
class AbortRequest(Request):
    verb = Verb.ABORT
    reservation: int

    def check(self) -> None:
        check_int("reservation", self.reservation, 1, U63_MAX)


@dataclass(frozen=True, slots=True)
class AbortReply(Reply):
    pass


@dataclass(frozen=True, slots=True)
class PinRequest(_BlobRequest):
    verb = Verb.PIN


@dataclass(frozen=True, slots=True)
class PinReply(_CountReply):
    pass


@dataclass(frozen=True, slots=True)
class UnpinRequest(_BlobRequest):
    verb = Verb.UNPIN


@dataclass(frozen=True, slots=True)
class UnpinReply(_CountReply):
    pass


@dataclass(frozen=True, slots=True)
class EvictRequest(Request):
    """Remove blocks on request; `scope` is an EvictScope, `dry_run` counts only.

    `resume` is 0, or `more` of the last reply: go on with what that began, whatever the other fields say.
    """

    verb = Verb.EVICT
    ns: int
    scope: int
    blob: bytes
    dry_run: bool
    resume: int = 0

    def check(self) -> None:
        check_int("ns", self.ns, 1, U63_MAX)
        check_int("scope", int(self.scope) if type(self.scope) is EvictScope else self.scope, 0, 2)
        check_bytes("blob", self.blob, _BLOB_BYTES_MAX)
        check_bool("dry_run", self.dry_run)
        check_int("resume", self.resume, 0, U63_MAX)


@dataclass(frozen=True, slots=True)
class EvictReply(_RemovalReply):
    pass


@dataclass(frozen=True, slots=True)
class TouchRequest(_BlobRequest):
    verb = Verb.TOUCH


@dataclass(frozen=True, slots=True)
class TouchReply(_CountReply):
    pass


@dataclass(frozen=True, slots=True)
class DoneRequest(Request):
    """Hint: the conversation that ends with these blocks is over, but others may ask for its first `keep` blocks."""

    verb = Verb.DONE
    ns: int
    blob: bytes
    keep: int

    def check(self) -> None:
        check_int("ns", self.ns, 1, U63_MAX)
        check_bytes("blob", self.blob, _BLOB_BYTES_MAX)
        check_int("keep", self.keep, 0, U31_MAX)


@dataclass(frozen=True, slots=True)
class DoneReply(_CountReply):
    """Blocks that go first."""


@dataclass(frozen=True, slots=True)
class PrefetchRequest(_BlobRequest):
    verb = Verb.PREFETCH


@dataclass(frozen=True, slots=True)
class PrefetchReply(Reply):
    """Leading blocks already in memory, and those promised from slower tiers."""

    resident: int
    promised: int

    def check(self) -> None:
        check_int("resident", self.resident, 0, HASHES_MAX)
        check_int("promised", self.promised, 0, HASHES_MAX)


@dataclass(frozen=True, slots=True)
class StatusRequest(Request):
    verb = Verb.STATUS


@dataclass(frozen=True, slots=True)
class StatusReply(Reply):
    """The daemon's status document, JSON text."""

    document: str

    def check(self) -> None:
        check_text("document", self.document, STATUS_CHARS_MAX)


@dataclass(frozen=True, slots=True)
class CheckRequest(Request):
    verb = Verb.CHECK


@dataclass(frozen=True, slots=True)
class CheckReply(Reply):
    """Broken invariants in words; empty when all hold."""

    problems: tuple[str, ...]

    def check(self) -> None:
        if type(self.problems) is not tuple or len(self.problems) > PROBLEMS_MAX:
            raise BadRequest(f"problems must be a list of at most {PROBLEMS_MAX} texts")
        for problem in self.problems:
            check_text("problem", problem)


@dataclass(frozen=True, slots=True)
class ClearRequest(Request):
    """As `EvictRequest`, of every namespace."""

    verb = Verb.CLEAR
    dry_run: bool
    resume: int = 0

    def check(self) -> None:
        check_bool("dry_run", self.dry_run)
        check_int("resume", self.resume, 0, U63_MAX)


@dataclass(frozen=True, slots=True)
class ClearReply(_RemovalReply):
    pass


@dataclass(frozen=True, slots=True)
class PersistRequest(_BlobRequest):
    """Bring the leading blocks to storage that outlives the daemon; answered at once, so callers ask again."""

    verb = Verb.PERSIST


@dataclass(frozen=True, slots=True)
class PersistReply(Reply):
    """Leading blocks that are on durable storage now, and how many more are being written or wait for their turn."""

    durable: int
    pending: int

    def check(self) -> None:
        check_int("durable", self.durable, 0, HASHES_MAX)
        check_int("pending", self.pending, 0, HASHES_MAX)


@dataclass(frozen=True, slots=True)
class ReportRequest(Request):
    """What an engine has measured; each part may be all 0.

    It computed `computed_tokens` after `depth_tokens` that were there, in `compute_us`, and copied `copied_bytes` out
    of host memory in `copy_us`. It gave up `late_loads` at their soft deadline.
    """

    verb = Verb.REPORT
    computed_tokens: int
    depth_tokens: int
    compute_us: int
    copied_bytes: int
    copy_us: int
    late_loads: int = 0

    def check(self) -> None:
        for name in ("computed_tokens", "depth_tokens", "compute_us", "copied_bytes", "copy_us", "late_loads"):
            check_int(name, getattr(self, name), 0, REPORTED_MAX)


@dataclass(frozen=True, slots=True)
class ReportReply(Reply):
    pass


@dataclass(frozen=True, slots=True)
class RecordRequest(Request):
    """Keep what is asked of a namespace from now on, for RECORDED; for so long and so many requests at most."""

    verb = Verb.RECORD
    ns: int
    for_ms: int
    requests_max: int

    def check(self) -> None:
        check_int("ns", self.ns, 1, U63_MAX)
        check_int("for_ms", self.for_ms, 1, RECORD_MS_MAX)
        check_int("requests_max", self.requests_max, 1, U63_MAX)


@dataclass(frozen=True, slots=True)
class RecordReply(Reply):
    pass


@dataclass(frozen=True, slots=True)
class RecordedRequest(Request):
    verb = Verb.RECORDED


@dataclass(frozen=True, slots=True)
class RecordedReply(Reply):
    """The oldest items that wait: of each a number, a time in us since RECORD and how many blocks, as three u64.

    The first item of a number is a request; a later one has blocks stored that continue that one's chain. `blob` has
    the hashes of all of them, one item after the other. `dropped` counts from the beginning.
    """

    requests: bytes
    blob: bytes
    dropped: int
    ended: bool

    def check(self) -> None:
        check_bytes("requests", self.requests, _U64_BLOB_BYTES_MAX, 24)
        check_bytes("blob", self.blob, _BLOB_BYTES_MAX)
        check_int("dropped", self.dropped, 0, U63_MAX)
        check_bool("ended", self.ended)


@dataclass(frozen=True, slots=True)
class ExplainRequest(Request):
    """Why a block is where it is."""

    verb = Verb.EXPLAIN
    ns: int
    name: bytes

    def check(self) -> None:
        check_int("ns", self.ns, 1, U63_MAX)
        check_exact("name", self.name, *range(HASH_BYTES_MIN, HASH_BYTES_MAX + 1))


@dataclass(frozen=True, slots=True)
class ExplainReply(Reply):
    """JSON text, an object; without members where nothing is known of the block."""

    document: str

    def check(self) -> None:
        check_text("document", self.document, STATUS_CHARS_MAX)


@dataclass(frozen=True, slots=True)
class ExpectRequest(Request):
    """Hint: the leading blocks will be asked for again within `within_ms`."""

    verb = Verb.EXPECT
    ns: int
    blob: bytes
    within_ms: int

    def check(self) -> None:
        check_int("ns", self.ns, 1, U63_MAX)
        check_bytes("blob", self.blob, _BLOB_BYTES_MAX)
        check_int("within_ms", self.within_ms, 1, EXPECT_MS_MAX)


@dataclass(frozen=True, slots=True)
class ExpectReply(_CountReply):
    """Leading blocks that stay in memory until then."""


@dataclass(frozen=True, slots=True)
class StoppedRequest(Request):
    """Hint: how the answer stopped that ends with the last of these blocks; `reason` is a StopReason."""

    verb = Verb.STOPPED
    ns: int
    blob: bytes
    reason: int

    def check(self) -> None:
        check_int("ns", self.ns, 1, U63_MAX)
        check_bytes("blob", self.blob, _BLOB_BYTES_MAX)
        check_int("reason", int(self.reason) if type(self.reason) is StopReason else self.reason, 1, len(StopReason))


@dataclass(frozen=True, slots=True)
class StoppedReply(_CountReply):
    """Blocks of which that is taken into account."""


@dataclass(frozen=True, slots=True)
class PinnedRequest(Request):
    """What of the daemon's memory GPUs of the session reach by themselves, and why other memory was not pinned."""

    verb = Verb.PINNED
    pinned_bytes: int
    refused: str

    def check(self) -> None:
        check_int("pinned_bytes", self.pinned_bytes, 0, U63_MAX)
        check_text("refused", self.refused, REFUSED_CHARS_MAX)


@dataclass(frozen=True, slots=True)
class PinnedReply(Reply):
    def check(self) -> None:
        pass


REQUESTS: dict[Verb, type[Request]] = {
    request.verb: request
    for request in (
        PingRequest,
        OpenNamespaceRequest,
        FindNamespaceRequest,
        LookupRequest,
        AcquireRequest,
        ResolveRequest,
        ReleaseRequest,
        ReserveRequest,
        CommitRequest,
        AbortRequest,
        PinRequest,
        UnpinRequest,
        EvictRequest,
        TouchRequest,
        DoneRequest,
        PrefetchRequest,
        StatusRequest,
        CheckRequest,
        ClearRequest,
        PersistRequest,
        ReportRequest,
        RecordRequest,
        RecordedRequest,
        ExplainRequest,
        ExpectRequest,
        PinnedRequest,
        StoppedRequest,
    )
}

REPLIES: dict[Verb, type[Reply]] = {
    Verb.PING: PingReply,
    Verb.OPEN_NAMESPACE: OpenNamespaceReply,
    Verb.FIND_NAMESPACE: FindNamespaceReply,
    Verb.LOOKUP: LookupReply,
    Verb.ACQUIRE: AcquireReply,
    Verb.RESOLVE: ResolveReply,
    Verb.RELEASE: ReleaseReply,
    Verb.RESERVE: ReserveReply,
    Verb.COMMIT: CommitReply,
    Verb.ABORT: AbortReply,
    Verb.PIN: PinReply,
    Verb.UNPIN: UnpinReply,
    Verb.EVICT: EvictReply,
    Verb.TOUCH: TouchReply,
    Verb.DONE: DoneReply,
    Verb.PREFETCH: PrefetchReply,
    Verb.STATUS: StatusReply,
    Verb.CHECK: CheckReply,
    Verb.CLEAR: ClearReply,
    Verb.PERSIST: PersistReply,
    Verb.REPORT: ReportReply,
    Verb.RECORD: RecordReply,
    Verb.RECORDED: RecordedReply,
    Verb.EXPLAIN: ExplainReply,
    Verb.EXPECT: ExpectReply,
    Verb.PINNED: PinnedReply,
    Verb.STOPPED: StoppedReply,
}

REPLY_OF: dict[type[Request], type[Reply]] = {REQUESTS[verb]: reply for verb, reply in REPLIES.items()}
"""By type, which hashes at once; an enumeration's member hashes in Python."""
