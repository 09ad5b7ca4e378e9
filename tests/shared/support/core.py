"""Small worlds for tests of the core: specs, chains of hashes, and a store of a few slots that checks itself."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from forebay.kvstore.groups import HOST, NVME, DriveSlabAssigned, DriveSlabRetired, Effects, Transfer
from forebay.kvstore.index import BlockIndex
from forebay.kvstore.movement import PAGE_BYTES, NvmeConfig, Verdict
from forebay.kvstore.namespace import NamespaceSpec
from forebay.kvstore.outcome import Outcome
from forebay.kvstore.stats import Counters, TierStats
from forebay.kvstore.store import Reserved, Store, StoreConfig

BLOCK_BYTES = 4096
UID = 1000


def spec(model: str = "m", *, blocks_of: int = BLOCK_BYTES, **other: Any) -> NamespaceSpec:
    return NamespaceSpec(model, "r1", "bfloat16", 16, (blocks_of,), **other)


def chain(label: str, length: int) -> list[bytes]:
    """Names of a chain of blocks; chains of different labels share none."""
    return [hashlib.sha256(f"{label}/{position}".encode()).digest() for position in range(length)]


def outcomes(reserved: Reserved) -> list[Outcome]:
    return [Outcome(code) for code in reserved.outcomes]


class World:
    """A store with ids 1, 2, 3..., one session and one namespace; `now` is moved by hand.

    Args:
        slabs: physical slabs of the tier.
        slots: slots of one block of 4 KiB in a slab.
    """

    def __init__(self, slabs: int = 4, slots: int = 4, **config: Any) -> None:
        ids = itertools.count(1)
        slab_bytes = slots * BLOCK_BYTES
        self.store = Store(StoreConfig(slabs * slab_bytes, slab_bytes, **config), lambda: next(ids))
        self.now = 0.0
        self.session = self.open_session(1)
        self.ns = self.open(spec())

    def open_session(self, session_id: int, uid: int = UID, group: bytes = b"", *, operator: bool = False) -> int:
        self.store.open_session(session_id, uid, group, operator=operator)
        return session_id

    def open(self, namespace: NamespaceSpec, session: int | None = None) -> int:
        return self.store.open_namespace(session or self.session, namespace).ns

    def reserve(
        self, hashes: Sequence[bytes], *, ns: int | None = None, session: int | None = None, parent: bytes = b""
    ) -> Reserved:
        return self.store.reserve(session or self.session, ns or self.ns, parent, hashes, self.now)

    def commit(self, reserved: Reserved, failed: Sequence[int] = (), *, session: int | None = None) -> int:
        return self.store.commit(session or self.session, reserved.reservation_id, failed, self.now)

    def write(self, hashes: Sequence[bytes], *, ns: int | None = None, session: int | None = None) -> Reserved:
        """Reserve and commit; the caller looks at the outcomes."""
        reserved = self.reserve(hashes, ns=ns, session=session)
        if reserved.reservation_id:
            self.commit(reserved, session=session)
        self.check()
        return reserved

    def acquire(
        self, hashes: Sequence[bytes], ttl_s: float = 30.0, *, ns: int | None = None, session: int | None = None
    ) -> tuple[int, list[int], list[int]]:
        got = self.store.acquire(session or self.session, ns or self.ns, hashes, ttl_s, self.now)
        return got.lease_id, got.slots.tolist(), got.generations.tolist()

    def hits(self, hashes: Sequence[bytes], *, ns: int | None = None, session: int | None = None) -> int:
        return len(self.store.lookup(session or self.session, ns or self.ns, hashes, self.now))

    def present(self, hashes: Iterable[bytes], *, ns: int | None = None) -> list[bytes]:
        """Which of these are complete, whatever leads to them; touches nothing."""
        complete = self.store.shard(self.session, ns or self.ns).group.index.complete
        return [name for name in hashes if name in complete]

    def at(self, now: float) -> None:
        """Let the clock say `now`."""
        self.now = now
        self.store.expire(now)
        self.check()

    def effects(self) -> Effects:
        return self.store.drain_effects()

    def tier(self) -> Any:
        return self.store.stats().tiers[0]

    def check(self) -> None:
        assert self.store.check() == []


def numbers(values: array[int]) -> list[int]:
    return values.tolist()


class Drive:
    """What the nvme tier of a `TwoTiers` did and has still to do; nothing ends by itself."""

    def __init__(self) -> None:
        self.pending: list[Transfer] = []
        self.cancelled: list[int] = []
        self.forgotten: list[tuple[int, int]] = []
        self.progress: list[tuple[int, int, int, int]] = []
        self.slabs: list[DriveSlabAssigned | DriveSlabRetired] = []


class TwoTiers(World):
    """A `World` over a drive whose slabs are known and empty; slots of one block of 4 KiB, as many in a slab of either.

    Args:
        drive_slabs: physical slabs of the drive.
        restored: whether the drive has already told what it holds.
        nvme: fields of the core's `NvmeConfig`; sizes are set so that small worlds may write all they hold at once.
    """

    def __init__(
        self,
        slabs: int = 4,
        slots: int = 4,
        *,
        drive_slabs: int = 8,
        restored: bool = True,
        nvme: dict[str, Any] | None = None,
        **config: Any,
    ) -> None:
        slab_bytes = PAGE_BYTES + slots * (PAGE_BYTES + BLOCK_BYTES)
        sizes = {"capacity_bytes": drive_slabs * slab_bytes, "slab_bytes": slab_bytes}
        given = {"window_bytes": 1 << 20, "chunk_bytes": 1 << 20, "prefetch_share": 1.0, **sizes, **(nvme or {})}
        super().__init__(slabs, slots, nvme=NvmeConfig(**given), **config)
        self.drive = Drive()
        if restored:
            self.store.restore_slabs([], 1 << 32 | 1)
            self.store.restore_done()

    @property
    def index(self) -> BlockIndex:
        return self.store.shard(self.session, self.ns).group.index

    @property
    def counters(self) -> Counters:
        return self.store.counters

    def step(self) -> list[Transfer]:
        """Take the effects in; returns the transfers that are new."""
        effects = self.effects()
        drive = self.drive
        drive.pending += effects.transfers
        drive.cancelled += effects.cancelled
        drive.forgotten += effects.forgotten
        drive.slabs += effects.drive_slabs
        drive.progress += [(p.session_id, p.lease_id, p.ready, p.total) for p in effects.progress]
        self.check()
        return effects.transfers

    def told(self) -> list[tuple[int, int, int, int]]:
        """(session, lease, ready, total) of each notice since the last call."""
        self.step()
        progress, self.drive.progress = self.drive.progress, []
        return progress

    def finish(self, transfer: Transfer, *verdicts: Verdict, checksum: int = 0) -> None:
        """End a transfer; without verdicts, well."""
        self.drive.pending.remove(transfer)
        count = len(transfer.rows)
        ends = list(verdicts) * (count if len(verdicts) == 1 else 1) or [Verdict.OK] * count
        self.store.transfer_done(transfer.transfer_id, ends, [checksum] * count, self.now)
        self.step()

    def finish_all(self, *verdicts: Verdict, checksum: int = 0) -> None:
        self.step()
        while self.drive.pending:
            self.finish(self.drive.pending[0], *verdicts, checksum=checksum)

    def names_of(self, transfer: Transfer) -> list[bytes]:
        hashes = transfer.shard.group.index.hashes
        return [hashes[row] or b"" for row in transfer.rows]

    def persist(self, hashes: Sequence[bytes], *, ns: int | None = None) -> None:
        """Write them down, as many as the drive takes, and let that end."""
        while self.store.persist(self.session, ns or self.ns, hashes, self.now).pending:
            self.finish_all()

    def store_on_drive(self, hashes: Sequence[bytes]) -> None:
        """Written down, and no longer in host memory; one by one, so that they may be more than that holds."""
        group = self.store.shard(self.session, self.ns).group
        for position, name in enumerate(hashes):
            assert outcomes(self.write(hashes[: position + 1]))[-1] == Outcome.WRITE
            self.persist(hashes[: position + 1])
            group.evict(group.index.find(name), HOST)
            self.step()

    def where(self, hashes: Iterable[bytes]) -> str:
        """A letter for each block: (h)ost, (d)rive, (b)oth, or a dot."""
        letters = {(False, False): ".", (True, False): "h", (False, True): "d", (True, True): "b"}
        rows = map(self.index.find, hashes)
        return "".join(
            letters[row >= 0 and self.index.is_in(row, HOST), row >= 0 and self.index.is_in(row, NVME)] for row in rows
        )

    def drive_tier(self) -> TierStats:
        return self.store.stats().tiers[NVME]


@dataclass(frozen=True)
class SlabOwner:
    """Whose a slab of the drive was."""

    uid: int
    group_fingerprint: bytes
    rank: int = 0
    shard_size: int = 1
    block_bytes: int = BLOCK_BYTES
    slot_bytes: int = BLOCK_BYTES
    hash_bytes: int = 32
    block_tokens: int = 16
    model: str = "m"
