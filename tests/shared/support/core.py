"""Small worlds for tests of the core: specs, chains of hashes, and a store of a few slots that checks itself."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from forebay.kvstore.groups import Effects
from forebay.kvstore.namespace import NamespaceSpec
from forebay.kvstore.outcome import Outcome
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
