"""How long an engine's prefills take, told to the daemon now and then: its plans go by that.

Measured from before a step's kernels to after them: on a GPU by the stream's own clock, which other steps in flight do
not disturb. Read and told on a thread of its own; the engine's thread starts and stops a watch four times a second.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeAlias

from forebay.client.vllm_work import Prefill
from forebay.kvstore.errors import ForebayError

EVERY_S = 0.25

Seconds: TypeAlias = Callable[[], float]
"""Waits until the work has been done and says how long it took."""
Stop: TypeAlias = Callable[[], Seconds]
Start: TypeAlias = Callable[[], Stop]

_log = logging.getLogger("forebay.client")


class ReportClient(Protocol):
    """What this asks of a client; `forebay.client.Client` is one."""

    def report_prefill(self, tokens: int, depth_tokens: int, seconds: float) -> bool: ...


class PrefillMeter:
    """For one engine's thread; of several ranks one is enough."""

    def __init__(self, client: ReportClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._next_s = float("-inf")
        self._running: tuple[Prefill, Stop] | None = None
        self._told: Future[None] | None = None
        self._teller = ThreadPoolExecutor(1, "forebay-prefill")

    def begin(self, prefill: Prefill | None, start: Start) -> None:
        """Before a step's kernels; `prefill` is what the step's time will be that of, if of one."""
        self._running = None
        if prefill is None or (self._told is not None and not self._told.done()):
            return
        now = self._clock()
        if now >= self._next_s:
            self._next_s = now + EVERY_S
            self._running = prefill, start()

    def end(self) -> None:
        """After them."""
        running, self._running = self._running, None
        if running is not None:
            prefill, stop = running
            self._told = self._teller.submit(self._tell, prefill, stop())

    def close(self) -> None:
        """Nothing is told any more. Idempotent."""
        self._next_s, self._running = float("inf"), None
        self._teller.shutdown(wait=False, cancel_futures=True)

    def _tell(self, prefill: Prefill, seconds: Seconds) -> None:
        try:
            self._client.report_prefill(prefill.tokens, prefill.depth_tokens, seconds())
        except ForebayError as error:
            _log.warning("a prefill was not measured: %s: %s", type(error).__name__, error)
