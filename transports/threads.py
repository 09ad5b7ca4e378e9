"""Threads whose work nobody waits for as closely as for an answer."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable


class BackgroundThread(threading.Thread):
    """A daemon thread that, woken, waits for a core and takes none from one that runs (SCHED_BATCH, sched(7)).

    So a request and its answer, which pass through six threads, are not held up by each piece of work that becomes
    ready meanwhile; where a core is free nothing changes, and the share of a contended one stays the same. Threads and
    processes that it starts are as it is. What the system refuses is left as it was.
    """

    def __init__(self, target: Callable[..., object], *, name: str) -> None:
        super().__init__(target=target, name=name, daemon=True)

    def run(self) -> None:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        super().run()
