"""Eviction policies: whole request chains in, victims out. One policy object serves one namespace group.

A policy sees rows (a block's number in the group's index) and the hashes of the request they came from; it
never sees slots, leases or tiers (each tier of a group has a policy of its own). The store asks it for one victim
at a time and says through `evictable` which rows may go: no lease, no pin, no writer, no child that would be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from forebay.kvstore.outcome import StopReason

PRIORITY_MAX = 3
PRIORITY_STEP = 4
"""A block of a priority is worth as much as so many of the priority below it, and kept accordingly longer."""

BYPASS = -1
"""No row: what room is being made for is less likely to be asked for again than all that could make it."""


class EvictionPolicy(Protocol):
    """Chooses who goes. All times are seconds of the store's clock."""

    def request(self, hashes: Sequence[bytes], rows: Sequence[int], now: float, *, opens: bool = True) -> None:
        """A request named this chain, root first; `rows` are its leading present blocks.

        The hashes beyond the present rows let a policy that keeps ghosts learn from what it evicted. Without `opens`
        the request may have named the chain, or a longer one, before.
        """

    def grow(self, hashes: Sequence[bytes], rows: Sequence[int], above: int, now: float) -> None:
        """A request that was seen before stores these blocks, which continue the row `above` (NO_ROW at a root).

        `rows` are the leading ones that are present.
        """

    def insert(self, rows: Sequence[int], now: float) -> None:
        """Blocks that have just become resident, parents before children."""

    def remove(self, row: int) -> None:
        """The block is gone: evicted, removed or expired."""

    def demote(self, rows: Sequence[int]) -> None:
        """A hint: these rows of one chain, the deepest first, will not be asked for again, so they go first.

        Until a request names them, that is: then they are as others.
        """

    def stopped(self, names: Sequence[bytes], reason: StopReason) -> int:
        """A hint: so stopped the answer that ends with the last of these blocks.

        Returns of how many blocks that is taken into account.
        """

    def is_over(self, row: int) -> bool:
        """That hint was given, and no request has named the row since."""

    def victim(self, evictable: Callable[[int], bool | None], newcomer: bytes | None = None) -> int | None:
        """The row that should go next, or None when none may. The caller removes it.

        With the hash of a `newcomer`, for which room is made and which need not be stored, it may be BYPASS.

        `evictable` answers yes, no, or None: not just now, since it is being copied to a slower tier. The first is
        taken, the second is in use and so recent, the third stays where it is in the order.
        """

    def look_again(self) -> None:
        """Copies have ended: rows about which `evictable` said "not just now" are worth asking about again.

        Until then a policy need not, since thousands of them may lie before the next victim while a drive is slow.
        """

    def coldest(self, limit: int) -> list[int]:
        """The next rows in the order in which they would go, whether they may or not; changes nothing."""

    def chances(self, rows: Sequence[int], within_s: float, now: float) -> Sequence[float] | None:
        """Of each of these rows, that it is asked for again within so many seconds; None: nothing was learned yet."""

    def oldest_touch(self) -> float | None:
        """When the block that would go next was last asked for; compares namespaces with each other."""

    def check(self, rows: Iterable[int]) -> Iterable[str]:
        """Yield each violated invariant, given all rows that ought to be known."""
