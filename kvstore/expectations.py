"""Blocks of one namespace that clients said they would ask for again within a time: until then they stay in their tier.

Blocks in memory stay in memory; of those on a slower tier alone it is that tier which keeps them. An expectation ends
with its time, with the session that has it, as a lease does, or for the whole tier with a store that finds no other
room: it is a hint. Of a block that several expect the one that ends last counts alone. How much of a tier may be kept
is bounded, and so is how much is remembered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

SHARE = 0.25
"""Of a namespace's blocks in a tier, so many may be kept: at least one, where there is any."""
CALLS_MAX = 4096
NAMES_MAX = 1 << 20
"""Of all calls together, whose blocks may be the same."""


@dataclass(frozen=True, slots=True, order=True)
class _Call:
    until: float
    session_id: int
    names: Sequence[tuple[bytes, int]] = field(compare=False)


class Expectations:
    """`kept[tier]` has the names of blocks that may not leave a tier, each with until when and for which session."""

    def __init__(self, tiers: int) -> None:
        self.kept: list[dict[bytes, tuple[float, int]]] = [{} for _ in range(tiers)]
        self._calls: list[_Call] = []
        self._names = 0

    def add(self, session_id: int, until: float, names: Iterable[tuple[bytes, int]], room: Sequence[int]) -> int:
        """Keep the leading blocks, given with their tiers, up to the first for which its tier has no room.

        Returns how many; none where too much is remembered.

        Args:
            room: how many names each tier may have.
        """
        if len(self._calls) >= CALLS_MAX or self._names >= NAMES_MAX:
            return 0
        added: list[tuple[bytes, int]] = []
        for name, tier in names:
            kept = self.kept[tier]
            if name not in kept and len(kept) >= room[tier]:
                break
            kept[name] = max((until, session_id), kept.get(name, (until, session_id)))
            added.append((name, tier))
        if added:
            heappush(self._calls, _Call(until, session_id, added))
            self._names += len(added)
        return len(added)

    def give_up(self, tier: int) -> bool:
        """Room is needed that there is not otherwise; returns whether anything may go now that could not."""
        had = bool(self.kept[tier])
        self.kept[tier].clear()
        return had

    def expire(self, now: float) -> None:
        while self._calls and self._calls[0].until <= now:
            call = heappop(self._calls)
            self._names -= len(call.names)
            for name, tier in call.names:
                if self.kept[tier].get(name, (now, 0))[0] <= now:
                    self.kept[tier].pop(name, None)

    def end_session(self, session_id: int) -> bool:
        """Returns whether the session had any."""
        ended = [call for call in self._calls if call.session_id == session_id]
        for call in ended:
            self._names -= len(call.names)
            for name, tier in call.names:
                if self.kept[tier].get(name, (0.0, 0))[1] == session_id:
                    del self.kept[tier][name]
        if ended:
            self._calls = [call for call in self._calls if call.session_id != session_id]
            heapify(self._calls)
        return bool(ended)

    @property
    def until(self) -> float | None:
        """When `expire` has something to do."""
        return self._calls[0].until if self._calls else None
