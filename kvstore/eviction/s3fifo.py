"""S3-FIFO: a small queue for what is new, a main one for what was asked for again, ghosts of what left the small one.

Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP'23; small queue 10 %, as many ghosts as
there are blocks. A reference for replays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay.kvstore.eviction.flat import FlatPolicy

if TYPE_CHECKING:
    from forebay.kvstore.eviction.policies import Place

SMALL_SHARE = 0.1
USES_MAX = 3


class S3FifoPolicy(FlatPolicy):
    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._small: dict[int, None] = {}
        self._main: dict[int, None] = {}
        self._uses: dict[int, int] = {}
        self._ghosts: dict[bytes, None] = {}

    def enter(self, row: int) -> None:
        known = self._ghosts.pop(self.name(row), self) is None
        (self._main if known else self._small)[row] = None
        self._uses[row] = 0

    def touch(self, row: int) -> None:
        self._uses[row] = min(USES_MAX, self._uses[row] + 1)

    def leave(self, row: int) -> None:
        if row in self._small:
            del self._small[row]
            self._ghosts[self.name(row)] = None
            while len(self._ghosts) > len(self.rows):
                del self._ghosts[next(iter(self._ghosts))]
        else:
            del self._main[row]
        del self._uses[row]

    def next(self) -> int | None:
        while self.rows:
            if self._small and (not self._main or len(self._small) >= SMALL_SHARE * len(self.rows)):
                row = next(iter(self._small))
                if self._uses[row] <= 1:
                    return row
                del self._small[row]
                self._main[row], self._uses[row] = None, 0
            else:
                row = next(iter(self._main))
                if not self._uses[row]:
                    return row
                self._uses[row] -= 1
                self._to_end(self._main, row)
        return None

    def defer(self, row: int) -> None:
        self._to_end(self._small if row in self._small else self._main, row)

    def _to_end(self, queue: dict[int, None], row: int) -> None:
        del queue[row]
        queue[row] = None
