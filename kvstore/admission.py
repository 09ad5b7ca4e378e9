"""Whether a block may be written to the nvme tier: a rule for what is worth it, a budget for what the drive can bear.

Flash wears by writing. The budget is a token bucket in bytes: it fills evenly over the day and holds at most an hour's
share, so that no burst, and no series of bursts, wears the drive faster than its owner allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from forebay.kvstore.groups import Group

DAY_S = 86_400.0
BURST_S = 3_600.0


class AdmissionRule(Protocol):
    """Chooses what is written. One object serves all namespaces."""

    def admit(self, group: Group, chain: Sequence[int], now: float) -> Sequence[int]:
        """Which of these rows, parents before children, are worth writing."""


class WriteOnEvict:
    """Everything that is about to leave host memory is written: measured as never worse than writing through.

    Source: trace replays of five admission rules; writing only what is likely to be asked for again saves up to half of
    the writes and costs 1 to 5 points of hit rate.
    """

    def admit(self, group: Group, chain: Sequence[int], now: float) -> Sequence[int]:
        del group, now
        return chain


class WriteBudget:
    """A token bucket over bytes. `bytes_per_day` 0: no limit. Begins with an hour's share."""

    def __init__(self, bytes_per_day: int) -> None:
        self.bytes_per_day = bytes_per_day
        self._per_s = bytes_per_day / DAY_S
        self._tokens = self._per_s * BURST_S
        self._filled_s: float | None = None

    def left_bytes(self, now: float) -> int:
        """What may be written at once; -1 without a limit."""
        if not self.bytes_per_day:
            return -1
        self._fill(now)
        return int(self._tokens)

    def take(self, size_bytes: int, now: float) -> bool:
        """Spend; False, spending nothing, where there is not enough."""
        if not self.bytes_per_day:
            return True
        self._fill(now)
        if size_bytes > self._tokens:
            return False
        self._tokens -= size_bytes
        return True

    def give_back(self, size_bytes: int) -> None:
        """What was taken and not written."""
        self._tokens = min(self._tokens + size_bytes, self._per_s * BURST_S)

    def _fill(self, now: float) -> None:
        if self._filled_s is not None:
            self._tokens = min(self._per_s * BURST_S, self._tokens + (now - self._filled_s) * self._per_s)
        self._filled_s = now
