"""Words of the store's answers that travel on the wire; the numbers are stable."""

from __future__ import annotations

from enum import IntEnum


class Outcome(IntEnum):
    """What became of one block of a store."""

    WRITE = 0
    """The caller has been given a slot to write it to."""
    PRESENT = 1
    """Already stored: nothing to copy."""
    IN_FLIGHT = 2
    """Another session is writing it."""
    FULL = 16
    """No room: every block that could go is leased, pinned or being written."""
    ORPHAN = 17
    """The block before it is absent, so no lookup could ever find it."""
    DRAINING = 18
    """The daemon is shutting down."""
    BYPASSED = 19
    """Less likely to be asked for again than every block that could make room for it."""


class Scope(IntEnum):
    """How far an eviction on request reaches: the blocks named, all that continues them too, or the namespace."""

    BLOCKS = 0
    PREFIX = 1
    NAMESPACE = 2
