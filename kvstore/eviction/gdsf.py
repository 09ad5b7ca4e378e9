"""GDSF: uses times what a block costs to compute again, over an age that rises with each victim.

Source: Cherkasova, "Improving WWW proxies performance with greedy-dual-size-frequency caching policy", 1998; all blocks
are of one size, and cost rises with depth. A reference for replays.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING

from forebay.kvstore.eviction.flat import FlatPolicy

if TYPE_CHECKING:
    from forebay.kvstore.eviction.policies import Place

EQUAL_COST_TOKENS = 54_000
"""Depth at which attention costs as much as all else, of a 70B model."""


class GdsfPolicy(FlatPolicy):
    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._equal_depth = EQUAL_COST_TOKENS / place.block_tokens
        self._age = 0.0
        self._uses: dict[int, int] = {}
        self._worth: dict[int, float] = {}
        self._heap: list[tuple[float, int, int]] = []
        """(worth, order, row); entries whose worth is not the row's any more are skipped."""
        self._order = 0

    def enter(self, row: int) -> None:
        self._uses[row] = 0
        self.touch(row)

    def touch(self, row: int) -> None:
        self._uses[row] += 1
        self._push(row, self._age + self._uses[row] * (1 + self.depths[row] / self._equal_depth))

    def leave(self, row: int) -> None:
        self._age = max(self._age, self._worth.pop(row))
        del self._uses[row]

    def next(self) -> int | None:
        while self._heap:
            worth, _, row = self._heap[0]
            if self._worth.get(row) == worth:
                return row
            heappop(self._heap)
        return None

    def defer(self, row: int) -> None:
        worth, _, _ = heappop(self._heap)
        self._push(row, worth + 1)

    def _push(self, row: int, worth: float) -> None:
        self._order += 1
        self._worth[row] = worth
        heappush(self._heap, (worth, self._order, row))
