"""What every tier is to the rest: a fixed number of slabs that can be opened, closed and described.

A tier knows memory, not blocks: which namespace owns a slab and what lies in its slots is the core's business. How
a slab's bytes are reached (a memfd, a device pointer) differs per tier and is left to the implementations, so that
this interface asks for nothing that one of them would have to fake.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class TierInfo:
    """What a tier is and what it got from the machine, for the status, the metrics and the log.

    `pages` is the page kind asked for new slabs; `slabs_by_pages` counts the ones that exist, spares included.
    `numa_node` is -1 when the tier is bound to no single node. `populated_bytes` and `locked_bytes` are of the
    memory that exists now. `up` is false while no slab can be opened, for `reason`.
    """

    tier: str
    capacity_bytes: int
    slab_bytes: int
    slabs: int
    pages: str
    slabs_by_pages: tuple[tuple[str, int], ...]
    populated_bytes: int
    locked_bytes: int
    numa_node: int
    warnings: tuple[str, ...]
    up: bool
    reason: str


class Describable(Protocol):
    """Any tier, as the status sees it."""

    def describe(self) -> TierInfo:
        """The state now. Cheap, never blocks on the tier's own work."""


class Tier(Protocol):
    """Slabs 0 .. slabs-1, each closed at first. Whoever calls is one thread; implementations may have others."""

    @property
    def name(self) -> str:
        """The tier's word in status, metrics and replies: "host", "device", ..."""

    def describe(self) -> TierInfo:
        """The state now. Cheap, never blocks on the tier's own work."""

    def start(self) -> None:
        """Begin background work; returns at once. A tier that cannot work is not up and says why; it never raises."""

    def open_slab(self, slab: int) -> None:
        """Give the slab fresh memory that reads as zeros, never what a previous owner wrote.

        Raises OSError when the machine refuses (the slab stays closed), ValueError for a slab that does not exist or
        is open.
        """

    def close_slab(self, slab: int) -> None:
        """Free the slab's memory now, even if a peer still maps it (who then reads zeros).

        The caller has made every reader fail first (its generations are bumped). Raises ValueError for a slab that
        is not open.
        """

    def close(self, timeout_s: float) -> None:
        """Stop background work within `timeout_s` and let go of all memory; open slabs are left to their readers.

        Unlike `close_slab` this zeroes nothing under a peer, who may be in the middle of a copy. Idempotent.
        """
