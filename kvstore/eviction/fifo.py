"""First in, first out: what came first goes first, however often it was asked for. A reference for replays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay.kvstore.eviction.flat import FlatPolicy

if TYPE_CHECKING:
    from forebay.kvstore.eviction.policies import Place


class FifoPolicy(FlatPolicy):
    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._queue: dict[int, None] = {}

    def enter(self, row: int) -> None:
        self._queue[row] = None

    def leave(self, row: int) -> None:
        del self._queue[row]

    def next(self) -> int | None:
        return next(iter(self._queue), None)

    def defer(self, row: int) -> None:
        del self._queue[row]
        self._queue[row] = None
