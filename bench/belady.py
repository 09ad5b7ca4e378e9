"""Belady's bound: who is asked for again last goes first, and what comes back later than all is not stored.

It needs the future, so it serves replays alone. Of a chain no block is asked for later than its descendants, so the
optimum over single blocks never orphans one: ties go deepest first.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from heapq import heappop, heappush

from forebay.bench.trace import Trace
from forebay.kvstore.eviction import BYPASS
from forebay.kvstore.eviction.flat import FlatPolicy
from forebay.kvstore.eviction.policies import Place, PolicyMaker

_NEVER = 1 << 60


class BeladyPolicy(FlatPolicy):
    """`future[name]` are the numbers of the requests that name a block, in order."""

    def __init__(self, place: Place, future: dict[bytes, array[int]]) -> None:
        super().__init__(place)
        self._future = future
        self._request = -1
        self._due: dict[int, int] = {}
        self._heap: list[tuple[int, int, int]] = []
        """(-next use, -depth, row); entries whose next use is not the row's any more are skipped."""

    def request(self, hashes: Sequence[bytes], rows: Sequence[int], now: float, *, opens: bool = True) -> None:
        self._request += opens
        super().request(hashes, rows, now, opens=opens)

    def _next_use(self, name: bytes) -> int:
        uses = self._future.get(name, ())
        at = bisect_right(uses, self._request)
        return uses[at] if at < len(uses) else _NEVER

    def enter(self, row: int) -> None:
        self.touch(row)

    def touch(self, row: int) -> None:
        due = self._due[row] = self._next_use(self.name(row))
        heappush(self._heap, (-due, -self.depths[row], row))

    def leave(self, row: int) -> None:
        del self._due[row]

    def victim(self, evictable: Callable[[int], bool | None], newcomer: bytes | None = None) -> int | None:
        aside = []
        found = None
        while self._heap:
            entry = self._heap[0]
            due, row = -entry[0], entry[2]
            if self._due.get(row) != due:
                heappop(self._heap)
            elif newcomer is not None and self._next_use(newcomer) >= due:
                found = BYPASS
                break
            elif evictable(row):
                found = row
                break
            else:
                aside.append(heappop(self._heap))
        for entry in aside:
            heappush(self._heap, entry)
        return found


def belady(trace: Trace) -> PolicyMaker:
    """The policy that knows what this trace asks for."""
    future: dict[bytes, array[int]] = {}
    for number, request in enumerate(trace.requests):
        for name in request.names:
            future.setdefault(name, array("q")).append(number)
    return lambda place: BeladyPolicy(place, future)
