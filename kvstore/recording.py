"""What a recorder is told of: the chains that clients ask for, as they come, with their times.

A bounded queue between whoever asks and a recorder that may be slow. What does not fit is dropped and counted, so
nobody who asks waits, and the daemon's memory does not grow. It ends by its own time and number, whatever the recorder
does. What counts as a request is the caller's decision; nothing of a prompt is known here but its blocks' hashes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from forebay.kvstore.groups import Group
from forebay.kvstore.index import NO_ROW

QUEUE_REQUESTS_MAX = 4096
QUEUE_BLOCKS_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request: when it came, in seconds since the recording began, and its chain, root first."""

    after_s: float
    hashes: Sequence[bytes]


class Recording:
    """Of one namespace, for one session.

    Args:
        until: when it ends.
        requests_max: after so many it ends.
    """

    def __init__(self, session_id: int, group: Group, now: float, until: float, requests_max: int) -> None:
        self.session_id = session_id
        self.dropped = 0
        self._group = group
        self._begun = now
        self._until = until
        self._left = requests_max
        self._queue: deque[Recorded] = deque()
        self._blocks = 0

    def ended(self, now: float) -> bool:
        """No request will be added any more; some may wait to be taken."""
        return now >= self._until or self._left <= 0

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def add(self, group: Group, hashes: Sequence[bytes], rows: Sequence[int], now: float) -> None:
        """A request named this chain, whose leading blocks lie in `rows`. O(1), but for one that continues another.

        Of such a chain the blocks above it are put before it.
        """
        if group is not self._group or not hashes or self.ended(now):
            return
        above = _above(group, rows[0]) if rows and group.index.depths[rows[0]] else []
        blocks = len(above) + len(hashes)
        self._left -= 1
        if len(self._queue) >= QUEUE_REQUESTS_MAX or self._blocks + blocks > QUEUE_BLOCKS_MAX:
            self.dropped += 1
            return
        self._blocks += blocks
        self._queue.append(Recorded(now - self._begun, [*above, *hashes] if above else hashes))

    def take(self, blocks_max: int) -> list[Recorded]:
        """The oldest that wait, of so many blocks together at most, but at least one if any waits."""
        taken: list[Recorded] = []
        while self._queue and (not taken or len(self._queue[0].hashes) <= blocks_max):
            taken.append(self._queue.popleft())
            blocks_max -= len(taken[-1].hashes)
        self._blocks -= sum(len(each.hashes) for each in taken)
        return taken


def _above(group: Group, row: int) -> list[bytes]:
    """Hashes of the blocks that a row continues, root first."""
    index, found = group.index, list[bytes]()
    while (row := index.parents[row]) != NO_ROW:
        name = index.hashes[row]
        assert name is not None, f"row {row} leads to one in use and is not"
        found.append(name)
    found.reverse()
    return found
