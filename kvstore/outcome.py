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


class StopReason(IntEnum):
    """How an engine's answer ended, as far as it says when the conversation goes on."""

    STOP = 1
    """The model had said what it had to say: the turn is its user's."""
    TOOL_CALL = 2
    """A tool is to be run, after which the conversation goes on by itself."""
    LENGTH = 3
    """It was cut off at the longest that was allowed."""
    ABORT = 4
    """Whoever asked does not wait for it any more."""


class Scope(IntEnum):
    """How far an eviction on request reaches: the blocks named, all that continues them too, or the namespace."""

    BLOCKS = 0
    PREFIX = 1
    NAMESPACE = 2
