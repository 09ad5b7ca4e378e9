"""What a recorder is told of: the chains that clients ask for, as they come, with their times.

A bounded queue between whoever asks and a recorder that may be slow. What does not fit is dropped and counted, so
nobody who asks waits, and the daemon's memory does not grow. It ends by its own time and number, whatever the recorder
does. What counts as a request is the caller's decision; nothing of a prompt is known here but its blocks' hashes.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from forebay.kvstore.groups import Group
from forebay.kvstore.index import NO_ROW

QUEUE_REQUESTS_MAX = 4096
QUEUE_BLOCKS_MAX = 1 << 16
OPEN_REQUESTS_MAX = 4096


@dataclass(frozen=True, slots=True)
class Recorded:
    """A request's chain, root first; or, under the number of an earlier one, blocks stored that continue its chain.

    Attributes:
        number: of the request, from 1.
        after_s: when it came, in seconds since the recording began.
    """

    number: int
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
        self._number = 0
        self._open: OrderedDict[bytes, int] = OrderedDict()
        """Requests by the last block of their chain: who stores more after it, stores an answer."""

    def ended(self, now: float) -> bool:
        """No request will be added any more; some may wait to be taken."""
        return now >= self._until or self._left <= 0

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def add(self, group: Group, hashes: Sequence[bytes], rows: Sequence[int], now: float) -> None:
        """A request named this chain, whose leading blocks lie in `rows`.

        Of one that continues another chain the blocks above it are put before it. A request whose chain it goes on with
        has had its answer.
        """
        if group is not self._group or not hashes or self.ended(now):
            return
        above = _above(group, rows[0]) if rows and group.index.depths[rows[0]] else []
        chain = [*above, *hashes] if above else hashes
        self._left -= 1
        for name in chain:
            self._open.pop(name, None)
        if self._put(Recorded(self._number + 1, now - self._begun, chain)):
            self._number += 1
            self._open[chain[-1]] = self._number
            if len(self._open) > OPEN_REQUESTS_MAX:
                self._open.popitem(last=False)

    def stored(self, group: Group, parent: bytes, hashes: Sequence[bytes], now: float) -> None:
        """A client stores these blocks, which continue `parent` (empty at a root).

        What comes after the chain of a request, the last of those on the way, is of that one's answer.
        """
        if group is not self._group or self.ended(now):
            return
        ends = [(number, at) for at, name in enumerate(hashes) if (number := self._open.get(name)) is not None]
        number, end = max(ends, default=(self._open.get(parent), -1))
        more = hashes[end + 1 :]
        if number is None or not more:
            return
        del self._open[hashes[end] if end >= 0 else parent]
        self._open[more[-1]] = number
        self._put(Recorded(number, now - self._begun, more))

    def _put(self, item: Recorded) -> bool:
        """Queue it; False where there is no room, which is counted."""
        if len(self._queue) >= QUEUE_REQUESTS_MAX or self._blocks + len(item.hashes) > QUEUE_BLOCKS_MAX:
            self.dropped += 1
            return False
        self._blocks += len(item.hashes)
        self._queue.append(item)
        return True

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
