"""A circuit breaker: an absent or hung daemon costs an engine one wait, then nothing.

Closed: calls go through. After a failure it is open: every call is told no at once. When the back-off is over
one caller, and only one, may probe (half-open); its success closes the breaker, its failure doubles the
back-off. One failure opens it: a daemon on the same machine either answers or is gone. A probe may wait the longer the
longer nobody did, so that a daemon on a machine that is busy is found again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

BACKOFF_S = 0.1
BACKOFF_MAX_S = 5.0
_PROBING_SHARE = 0.01

State = Literal["closed", "open", "half-open"]


class Breaker:
    """May be used by several threads. `clock` returns monotonic seconds."""

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        backoff_s: float = BACKOFF_S,
        backoff_max_s: float = BACKOFF_MAX_S,
    ) -> None:
        self._clock = clock
        self._first_s = backoff_s
        self._max_s = backoff_max_s
        self._lock = threading.Lock()
        self._next_s = backoff_s
        self._pause_s = 0.0
        self._retry_at: float | None = None
        self._probing = False

    @property
    def state(self) -> State:
        if self._retry_at is None:
            return "closed"
        return "half-open" if self._probing else "open"

    @property
    def probe_s(self) -> float:
        """What a probe may wait without all of them taking more than a hundredth of a caller's time."""
        return _PROBING_SHARE * self._pause_s

    def renewed(self) -> Breaker:
        """A closed breaker of the same settings: a forked child's, whose parent may have held the lock."""
        return Breaker(self._clock, backoff_s=self._first_s, backoff_max_s=self._max_s)

    def allows(self) -> bool:
        """Whether the caller may try now. A True while not closed makes it the one that probes: it must report."""
        if self._retry_at is None:
            return True
        with self._lock:
            if self._retry_at is None:
                return True
            if self._probing or self._clock() < self._retry_at:
                return False
            self._probing = True
            return True

    def succeeded(self) -> None:
        """The daemon answered."""
        with self._lock:
            self._retry_at = None
            self._probing = False
            self._next_s = self._first_s

    def failed(self) -> None:
        """The daemon did not answer: open, for twice as long as the time before."""
        with self._lock:
            self._pause_s = self._next_s
            self._retry_at = self._clock() + self._pause_s
            self._probing = False
            self._next_s = min(2 * self._next_s, self._max_s)
