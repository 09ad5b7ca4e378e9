"""What client calls return: frozen records, each with the value that stands for "nothing came of it".

A miss is a result. An engine reads `blocks` and goes on; the reason is for logs and metrics.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import IntEnum

from forebay.kvstore.errors import ForebayError
from forebay.kvstore.outcome import Outcome


class BlockOutcome(IntEnum):
    """What became of one block of a `store`: the daemon's word for it, or the client's own (64 and up)."""

    STORED = Outcome.WRITE
    """Written and published."""
    PRESENT = Outcome.PRESENT
    IN_FLIGHT = Outcome.IN_FLIGHT
    FULL = Outcome.FULL
    ORPHAN = Outcome.ORPHAN
    DRAINING = Outcome.DRAINING
    BYPASSED = Outcome.BYPASSED
    """Not worth its place: all that could make room for it is more likely to be asked for again."""
    FAILED = 64
    """Its copy or its commit failed; nobody can see it."""
    UNAVAILABLE = 65
    """No daemon, or it did not answer."""
    REJECTED = 66
    """A reason this client does not know."""


def reason_of(error: ForebayError) -> str:
    """An error's name as a word for results: ``PeerLost`` -> ``peer_lost``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()


_OUTCOMES = {int(outcome): outcome for outcome in BlockOutcome}


@dataclass(frozen=True, slots=True)
class LookupResult:
    """Leading complete blocks, how many of them in which tier, and what loading them takes.

    Attributes:
        blocks: how many leading blocks are stored; 0 is a miss.
        by_tier: tier name -> blocks.
        load_us: estimated time to load them, microseconds, 0 if unknown.
        advice: ``load``, ``recompute`` or empty.
        load_blocks: with advice, how many leading blocks come sooner than they are computed.
    """

    blocks: int = 0
    by_tier: dict[str, int] = field(default_factory=dict)
    load_us: int = 0
    advice: str = ""
    load_blocks: int = 0

    @property
    def worth_loading(self) -> int:
        """Leading blocks to load: what the daemon advises, all where it has no advice."""
        return self.load_blocks if self.advice else self.blocks


@dataclass(frozen=True, slots=True)
class FetchResult:
    """How many leading blocks were copied and verified; what lies beyond them in the destination is undefined.

    Attributes:
        blocks: leading blocks that are right; the engine computes the rest.
        bytes: bytes of those.
        reason: empty when all blocks asked were loaded, else why not: ``miss`` (not stored), ``stale`` (they were
            given away during the copy), ``failed`` (the copy), ``corrupt`` (a checksum differs), ``timeout`` (the next
            blocks were not read into memory in time), ``deadline`` (all of them were not), ``late`` (they were not by
            the plan's soft deadline: computing them is faster), or the snake-case name of an error.
    """

    blocks: int = 0
    bytes: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class StoreResult:
    """The outcome of every block of a `store`, in order.

    Attributes:
        codes: one `BlockOutcome` a byte.
        committed: blocks that this call wrote and published.
        bytes: bytes of those; blocks already present cost none.
        reason: empty, or the snake-case name of the error that ended the call early.
    """

    codes: bytes = b""
    committed: int = 0
    bytes: int = 0
    reason: str = ""

    @property
    def outcomes(self) -> tuple[BlockOutcome, ...]:
        return tuple(_OUTCOMES.get(code, BlockOutcome.REJECTED) for code in self.codes)

    @property
    def present(self) -> int:
        """Blocks that were already there or are being written by somebody else."""
        return self.codes.count(BlockOutcome.PRESENT) + self.codes.count(BlockOutcome.IN_FLIGHT)

    @property
    def rejected(self) -> int:
        """Blocks that were not stored, for whatever reason."""
        return len(self.codes) - self.committed - self.present

    @classmethod
    def nothing(cls, count: int, outcome: BlockOutcome, reason: str) -> StoreResult:
        return cls(bytes([outcome]) * count, 0, 0, reason)


@dataclass(frozen=True, slots=True)
class RemovalResult:
    """Blocks removed, and blocks kept because they are leased, pinned or being written."""

    removed: int = 0
    kept: int = 0


@dataclass(frozen=True, slots=True)
class PrefetchResult:
    """Leading blocks in memory already, and those promised from slower tiers."""

    resident: int = 0
    promised: int = 0


@dataclass(frozen=True, slots=True)
class PersistResult:
    """Leading blocks on storage that outlives the daemon, and how many more were being written or waited for that."""

    durable: int = 0
    pending: int = 0


@dataclass(frozen=True, slots=True)
class ClientStats:
    """Totals of one client since it was made; `breaker` and `attached` are as of now.

    Attributes:
        calls: operations begun; unavailable: of those, the ones that no daemon answered, or not in time.
        attachments: sessions opened; more than one means that the daemon was restarted or lost.
        stale_fetches: fetches that ended at a block given away meanwhile; corrupt_fetches: at one whose bytes were
            not those of its checksum; late_fetches: at the plan's soft deadline.
        pinned_bytes: memory of the daemon's that GPUs reach by themselves, as of now; pin_refused: why other memory of
            its could not be pinned, and is copied once more on the CPU: the last reason, empty where none was.
        errors: name of the error, as in a result's `reason` -> how often it became a miss.
    """

    calls: int = 0
    unavailable: int = 0
    attachments: int = 0
    fetched_blocks: int = 0
    fetched_bytes: int = 0
    stored_blocks: int = 0
    stored_bytes: int = 0
    stale_fetches: int = 0
    corrupt_fetches: int = 0
    late_fetches: int = 0
    pinned_bytes: int = 0
    pin_refused: str = ""
    errors: dict[str, int] = field(default_factory=dict)
    breaker: str = "closed"
    attached: bool = False
