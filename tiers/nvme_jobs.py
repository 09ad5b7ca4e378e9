"""What passes between the owner thread and the NVMe tier: jobs down, events up, what a slab holds, how the tier is.

Plain records. The owner decides, the tier carries out and reports; a block is named by its place (slab, slot) on the
way down and, after a restart, on the way up. Lists run parallel, one entry a block, instead of one object a block.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Literal

MODEL_BYTES_MAX = 256


class IoStatus(IntEnum):
    """What became of one block of a job. All but OK are misses for a load, and not durable for a write."""

    OK = 0
    CANCELLED = 1
    """Not begun when the job was cancelled, or when the tier closed."""
    IO_ERROR = 2
    BAD_HEADER = 3
    """The slot's header is damaged or was never written."""
    BAD_PAYLOAD = 4
    OTHER_BLOCK = 5
    """A sound header of another block or generation: whoever believed in this place was out of date."""
    NO_SPACE = 6
    DOWN = 7
    """The tier, or its writing, is down for now; nothing was tried, or a load was lost with the process that tried."""


@dataclass(frozen=True, slots=True)
class SlabOwner:
    """The namespace shard a slab is cut for, as much of it as the disk needs to know. No secret is among it.

    `group_fingerprint` has 32 bytes; `model` is for people and is cut to 256 bytes of UTF-8 on disk.
    """

    uid: int
    group_fingerprint: bytes
    rank: int
    shard_size: int
    block_bytes: int
    slot_bytes: int
    hash_bytes: int
    block_tokens: int
    model: str

    def namespace_id(self) -> bytes:
        """The 16 bytes that every slot header of this shard carries."""
        return namespace_id(self.uid, self.group_fingerprint, self.rank)


def namespace_id(uid: int, group_fingerprint: bytes, rank: int) -> bytes:
    """16 bytes naming one user's shard of a namespace: the head of a SHA-256 over the three."""
    named = uid.to_bytes(8, "little") + group_fingerprint + rank.to_bytes(8, "little")
    return hashlib.sha256(named).digest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """Blocks of one namespace shard, and the host slots they lie in or go to; a few MiB, so that a cancellation is soon
    heeded.

    `views` are the host slots: `slot_bytes` long, beginning on a page. Where another process does the I/O they are
    empty, and `memory` says where each slot lies: the number of a slab's memory, and the byte offset in it.
    """

    job_id: int
    slot_bytes: int
    payload_bytes: int
    namespace_id: bytes
    slabs: Sequence[int]
    slots: Sequence[int]
    hashes: Sequence[bytes]
    generations: Sequence[int]
    views: Sequence[memoryview] = ()
    memory: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadJob(_Job):
    """Blocks to read into host slots.

    The host slots are the tier's from `load` until the job's `JobDone`, whatever their status, and hold anything at
    all after a status other than OK.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteJob(_Job):
    """Blocks to write from host slots; `parents` are empty for roots.

    The host slots are read until `JobDone`. Bytes that change meanwhile are not an error here: the checksum then fails
    later.
    """

    parents: Sequence[bytes]
    depths: Sequence[int]


@dataclass(frozen=True, slots=True)
class JobDone:
    """A job's end: one `IoStatus` a block, and the payload checksums (0 where not OK).

    A written block that is OK is on the medium and so is its index record.
    """

    job_id: int
    statuses: bytes
    checksums: array[int]


RestoredBlock = tuple[int, int, bytes, bytes, int, int]
"""(slab, slot, hash, parent hash or empty, depth, generation)."""


@dataclass(frozen=True, slots=True)
class RestoredSlabs:
    """Every assigned slab of all drives: (slab, owner, assigned generation). Comes once a start, before any block.

    No slab may be assigned before it has come; whatever it does not name is free.
    """

    slabs: list[tuple[int, SlabOwner, int]]


@dataclass(frozen=True, slots=True)
class RestoredBlocks:
    """At most 2 000 blocks found on disk, parents before children when they come from an index.

    From a rebuild they come slab by slab, and one hash may come at two places; both hold the right bytes.
    """

    blocks: list[RestoredBlock]


@dataclass(frozen=True, slots=True)
class RestoreDone:
    """All that is on disk has been told. `rebuilt`: some index was made anew from slot headers; `problems` says why."""

    blocks: int
    seconds: float
    rebuilt: bool
    problems: tuple[str, ...]


Event = JobDone | RestoredSlabs | RestoredBlocks | RestoreDone


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmeOptions:
    """Where the tier lives and how hard it works its drives. Each path is a directory of its own, one a drive."""

    paths: tuple[Path, ...]
    bytes_per_path: int
    slab_bytes: int
    queue_depth: int = 8
    """Reads, and again writes, under way at a drive at one time."""
    staging: Literal["auto", "always", "never"] = "auto"
    """Whether calls go through buffers beside the host's memory (nvme_staging.py). auto: on virtual disks."""
    io_nice: int = 0
    """Niceness of the drives' I/O processes, where there are such."""
    index_batch_s: float = 0.01
    """How long an index transaction waits for company. Longer saves syncs, and holds the host's slots longer."""
    index_batch_blocks: int = 1024
    """How many blocks make it wait no longer."""
    walk_timeout_s: float = 30.0
    """How long reading the index may take at start, beside what its size explains, before it is rebuilt."""
    down_s: float = 1.0
    """The first pause of writing after repeated errors; doubles up to a minute."""
    life_bytes: int = 0
    """What the drives together are rated to have written to them; 0: unknown. Only told on, in `NvmeInfo`."""


LATENCY_BOUNDS_S = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005),
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
)


@dataclass(frozen=True, slots=True)
class Latency:
    """A histogram of I/O calls: `counts[i]` took at most `LATENCY_BOUNDS_S[i]`, the last one longer than all."""

    counts: tuple[int, ...]
    sum_s: float


@dataclass(frozen=True, slots=True)
class DriveInfo:
    """One configured path. `io` is "direct", "staged" (direct, through buffers) or "buffered", that for `io_reason`.

    `lifetime_written_bytes` outlives the daemon; 0 for a drive that is not up.
    `io_process_ends` counts I/O processes of the drive that ended by themselves or could not be started, the last of
    them for `io_process_reason`; `io_memory_bytes` is what the one that runs takes beside the host's slabs.
    `index` is "loading" (queued until the old one has been read), "rebuilding", "up", or "failing" for `index_reason`.
    """

    path: str
    up: bool
    reason: str
    io: str
    io_reason: str
    writing: bool
    queued_load_blocks: int
    queued_write_blocks: int
    loading: int
    storing: int
    index: str
    index_reason: str
    index_records: int
    index_queue: int
    lifetime_written_bytes: int
    io_process_ends: int = 0
    io_process_reason: str = ""
    io_memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class NvmeInfo:
    """What `TierInfo` has no room for. Counters only grow. `errors` counts blocks by cause, sorted by name.

    `restored_fraction` is of slabs in a rebuild, else of index records; 1.0 when the restore is done.
    """

    drives: tuple[DriveInfo, ...]
    read_bytes: int
    written_bytes: int
    read_blocks: int
    written_blocks: int
    load_latency: Latency
    write_latency: Latency
    errors: tuple[tuple[str, int], ...]
    restored_blocks: int
    restored_fraction: float
    restored: bool
    rebuilt: bool
    life_bytes: int
