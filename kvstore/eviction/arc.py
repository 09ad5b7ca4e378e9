"""ARC: what was seen once and what was seen again in two LRU lists, their balance learned from ghosts of both.

Source: Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", FAST'03. Room is made here before the
newcomer is known to the lists, so the balance is moved when it enters. A reference for replays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay.kvstore.eviction.flat import FlatPolicy

if TYPE_CHECKING:
    from forebay.kvstore.eviction.policies import Place


class ArcPolicy(FlatPolicy):
    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._once: dict[int, None] = {}
        self._again: dict[int, None] = {}
        self._ghosts_once: dict[bytes, None] = {}
        self._ghosts_again: dict[bytes, None] = {}
        self._target = 0.0
        """How many blocks seen once are to be kept."""
        self._capacity = 0
        self._deferred = 0
        """How many of one list may not go, of those looked at since the last that did."""

    def enter(self, row: int) -> None:
        self._capacity = max(self._capacity, len(self.rows))
        name, once, again = self.name(row), self._ghosts_once, self._ghosts_again
        if name in once:
            self._target = min(self._capacity, self._target + max(1.0, len(again) / len(once)))
            del once[name]
            self._again[row] = None
        elif name in again:
            self._target = max(0.0, self._target - max(1.0, len(once) / len(again)))
            del again[name]
            self._again[row] = None
        else:
            self._once[row] = None

    def touch(self, row: int) -> None:
        (self._once if row in self._once else self._again).pop(row)
        self._again[row] = None

    def leave(self, row: int) -> None:
        if row in self._once:
            del self._once[row]
            self._ghosts_once[self.name(row)] = None
        else:
            del self._again[row]
            self._ghosts_again[self.name(row)] = None
        self._deferred = 0
        while self._ghosts_once and len(self._once) + len(self._ghosts_once) > self._capacity:
            del self._ghosts_once[next(iter(self._ghosts_once))]
        while self._ghosts_again and len(self.rows) + len(self._ghosts_once) + len(self._ghosts_again) > (
            2 * self._capacity
        ):
            del self._ghosts_again[next(iter(self._ghosts_again))]

    def next(self) -> int | None:
        prefers_once = len(self._once) > self._target
        first, second = (self._once, self._again) if prefers_once else (self._again, self._once)
        queue = first if self._deferred < len(first) else second
        return next(iter(queue), None)

    def defer(self, row: int) -> None:
        self._deferred += 1
        queue = self._once if row in self._once else self._again
        del queue[row]
        queue[row] = None
