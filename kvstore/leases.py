"""Who may read and who may write, and until when: sessions, leases, reservations, deadlines."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forebay.kvstore.groups import Group, Shard
    from forebay.kvstore.removal import Removal


@dataclass(slots=True)
class Session:
    """One client process. Its death ends everything it holds, at once.

    Sessions of one engine name the same `client_group` and may resolve each other's leases.

    Attributes:
        removals: those that it asked for and that are not done, by number; those it gave up make way for others.
        removals_begun: the number of the last one.
        gpu_pinned_bytes: what of its mappings its GPUs reach by themselves. gpu_pin_refused: why not of others; '' if
            none were refused. Both as the client told.
    """

    session_id: int
    uid: int
    client_group: bytes
    operator: bool
    namespaces: set[int] = field(default_factory=set)
    leases: set[int] = field(default_factory=set)
    reservations: set[int] = field(default_factory=set)
    removals: dict[int, Removal] = field(default_factory=dict)
    removals_begun: int = 0
    gpu_pinned_bytes: int = 0
    gpu_pin_refused: str = ""


@dataclass(slots=True)
class Lease:
    """The right to read `rows` in place until released or until `deadline`.

    Attributes:
        ready: leading rows that are in host memory; the others are being brought there.
        total: leading rows that are or will be; less than all when one could not be read.
        transfers: loads that bring them.
        watchers: sessions to be told as `ready` grows: the holder's, and those that resolved the lease.
    """

    lease_id: int
    session: Session
    group: Group
    rows: Sequence[int]
    deadline: float
    ready: int = 0
    total: int = 0
    transfers: set[int] = field(default_factory=set)
    watchers: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Reservation:
    """Slots a session may write; `rows[i]` goes to `slots[i]`.

    Past its deadline the blocks are given up but the slots stay quarantined (`expired`): the writer may only be
    stopped, with a copy in flight. They come back when it commits or aborts late, or dies.
    """

    reservation_id: int
    session: Session
    shard: Shard
    rows: list[int]
    slots: list[int]
    deadline: float
    expired: bool = False


class Deadlines:
    """A heap of (deadline, id) with lazy removal, rebuilt when most of it is stale."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._live: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._live)

    def add(self, key: int, deadline: float) -> None:
        self._live[key] = deadline
        heapq.heappush(self._heap, (deadline, key))

    def remove(self, key: int) -> None:
        self._live.pop(key, None)
        if len(self._heap) > 64 + 2 * len(self._live):
            self._heap = [(deadline, key) for key, deadline in self._live.items()]
            heapq.heapify(self._heap)

    def next(self) -> float | None:
        """The earliest deadline still live."""
        while self._heap and self._live.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> list[int]:
        """Remove and return the keys whose time has come."""
        keys = []
        while (deadline := self.next()) is not None and deadline <= now:
            _, key = heapq.heappop(self._heap)
            del self._live[key]
            keys.append(key)
        return keys
