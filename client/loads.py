"""Loads: how far the leases of one session have been read into memory, as the daemon's notices tell.

Notices come by another socket than replies, so one may be here before the reply that names its lease: those of
unknown leases are kept, for a bounded number of leases. Whoever reads the session socket calls `tell`; whoever
waits, waits on `changed` (the blocking link) or is woken by the reader (the asyncio one). Leases that were ready
from the start, which is most of them, are never entered here and cost nothing.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

EARLY_LEASES_MAX = 4096
"""Leases whose notices may come before their reply does; the oldest is forgotten beyond that.

An event loop that was busy for a while finds the notices of all the leases that its tasks have asked for at once, and
one that is forgotten may have been the last of its lease.
"""

ENDED_LEASES_MAX = 256
"""Leases remembered after their end, so that their last notices are not taken for those of a lease to come."""


class Progress(NamedTuple):
    """The leading `ready` blocks of a lease may be read; those from `total` on will never come."""

    ready: int
    total: int

    @property
    def ended(self) -> bool:
        """Nothing more will come."""
        return self.ready >= self.total

    def merged(self, other: Progress) -> Progress:
        """Both are true, in whatever order they came: more became ready, or less will come."""
        total = min(self.total, other.total)
        return Progress(min(max(self.ready, other.ready), total), total)


NOTHING = Progress(0, 0)


@dataclass(slots=True)
class _Load:
    progress: Progress
    holders: int


class Loads:
    """The leases of one session that are being read; may be used by several threads.

    Attributes:
        changed: notified whenever a lease's progress changed or a lease ended. Its lock guards this object, and is
            taken by every method, so a thread may hold it while asking.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._open: dict[int, _Load] = {}
        self._early: dict[int, Progress] = {}
        self._ended: deque[int] = deque(maxlen=ENDED_LEASES_MAX)

    def __len__(self) -> int:
        """Leases that somebody holds or that a notice named."""
        return len(self._open) + len(self._early)

    def begin(self, lease: int, progress: Progress) -> Progress:
        """A reply granted a lease of which `progress` was true; returns what is true by now.

        To be called once for each reply with more blocks than are ready, with an `end` for each.
        """
        with self.changed:
            early = self._early.pop(lease, progress)
            load = self._open.setdefault(lease, _Load(progress, 0))
            load.holders += 1
            load.progress = load.progress.merged(progress).merged(early)
            return load.progress

    def end(self, lease: int) -> bool:
        """One holder of the lease is done with it; True when it was the last. No harm if it was never begun.

        Notices that still come are dropped; whoever waits for one is told that nothing more will come.
        """
        if not self:
            return False
        with self.changed:
            self._early.pop(lease, None)
            load = self._open.get(lease)
            if load is None:
                return False
            load.holders -= 1
            if load.holders:
                return False
            del self._open[lease]
            self._ended.append(lease)
            self.changed.notify_all()
            return True

    def tell(self, lease: int, progress: Progress) -> None:
        """The daemon told how far it is."""
        with self.changed:
            load = self._open.get(lease)
            if load is not None:
                load.progress = load.progress.merged(progress)
                self.changed.notify_all()
            elif lease not in self._ended:
                known = self._early.pop(lease, progress)
                self._early[lease] = known.merged(progress)
                if len(self._early) > EARLY_LEASES_MAX:
                    del self._early[next(iter(self._early))]

    def progress(self, lease: int) -> Progress:
        """What is known of a lease; NOTHING of one that was never begun or has ended."""
        with self.changed:
            load = self._open.get(lease)
            return NOTHING if load is None else load.progress

    def news(self, lease: int, ready: int) -> Progress | None:
        """The lease's progress if more than `ready` blocks are ready or nothing more will come; else None."""
        progress = self.progress(lease)
        return progress if progress.ready > ready or progress.ended else None
