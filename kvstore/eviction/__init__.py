"""Eviction policies: whole request chains in, victims out. One policy object serves one namespace group.

A policy sees rows (a block's number in the group's index) and the hashes of the request they came from; it
never sees slots, leases or tiers. The store asks it for one victim at a time and says through `evictable`
which rows may go: no lease, no pin, no writer, no present child.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol


class EvictionPolicy(Protocol):
    """Chooses who goes. All times are seconds of the store's clock."""

    def request(self, hashes: Sequence[bytes], rows: Sequence[int], now: float) -> None:
        """A request named this chain, root first; `rows` are its leading present blocks.

        The hashes beyond the present rows let a policy that keeps ghosts learn from what it evicted.
        """

    def insert(self, rows: Sequence[int], now: float) -> None:
        """Blocks that have just become resident, parents before children."""

    def remove(self, row: int) -> None:
        """The block is gone: evicted, removed or expired."""

    def demote(self, rows: Sequence[int]) -> None:
        """A hint: this chain's own tail will not be asked for again."""

    def victim(self, evictable: Callable[[int], bool]) -> int | None:
        """The row that should go next, or None when none may. The caller removes it."""

    def oldest_touch(self) -> float | None:
        """When the block that would go next was last asked for; compares namespaces with each other."""

    def check(self, rows: Iterable[int]) -> Iterable[str]:
        """Yield each violated invariant, given all rows that ought to be known."""
