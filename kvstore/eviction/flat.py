"""What the reference policies share: rows in an order, of which the first that may go is the victim.

They are what hazard and LRU are compared with in replays, not what a daemon runs; so they are plain rather than fast.
None keeps a block because a child of it is present: a row that may not go is put where its policy puts what was used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forebay.kvstore.eviction.policies import Place
    from forebay.kvstore.outcome import StopReason


class FlatPolicy:
    """Subclasses say what to do with one row: `enter`, `touch`, `leave`, `next` and `defer`."""

    def __init__(self, place: Place) -> None:
        self.hashes = place.index.hashes
        self.depths = place.index.depths
        self.rows: set[int] = set()

    def request(self, hashes: Sequence[bytes], rows: Sequence[int], now: float, *, opens: bool = True) -> None:
        del hashes, now
        if opens:
            for row in reversed(rows):
                if row in self.rows:
                    self.touch(row)

    def grow(self, hashes: Sequence[bytes], rows: Sequence[int], above: int, now: float) -> None:
        """What is stored counts when it has become resident."""

    def insert(self, rows: Sequence[int], now: float) -> None:
        del now
        for row in reversed(rows):
            self.rows.add(row)
            self.enter(row)

    def remove(self, row: int) -> None:
        self.rows.discard(row)
        self.leave(row)

    def demote(self, rows: Sequence[int]) -> None:
        """These policies know no hints."""

    def stopped(self, names: Sequence[bytes], reason: StopReason) -> int:
        del names, reason
        return 0

    def is_over(self, row: int) -> bool:
        del row
        return False

    def victim(self, evictable: Callable[[int], bool | None], newcomer: bytes | None = None) -> int | None:
        del newcomer
        for _ in range(2 * len(self.rows) + 1):
            row = self.next()
            if row is None or evictable(row):
                return row
            self.defer(row)
        return None

    def look_again(self) -> None:
        """Nothing is skipped for longer than one search."""

    def coldest(self, limit: int) -> list[int]:
        return sorted(self.rows)[:limit]

    def chances(self, rows: Sequence[int], within_s: float, now: float) -> None:
        """These policies predict nothing."""
        del rows, within_s, now

    def oldest_touch(self) -> float | None:
        return 0.0 if self.rows else None

    def check(self, rows: Iterable[int]) -> Iterator[str]:
        expected = set(rows)
        if expected != self.rows:
            yield f"the policy knows {len(self.rows)} rows, the index {len(expected)} resident ones"

    def name(self, row: int) -> bytes:
        name = self.hashes[row]
        assert name is not None, f"row {row} is not in use"
        return name

    def enter(self, row: int) -> None:
        raise NotImplementedError

    def touch(self, row: int) -> None:
        """It was asked for again."""

    def leave(self, row: int) -> None:
        raise NotImplementedError

    def next(self) -> int | None:
        """The row that should go next, which stays where it is."""
        raise NotImplementedError

    def defer(self, row: int) -> None:
        """The row that `next` gave may not go."""
        raise NotImplementedError
