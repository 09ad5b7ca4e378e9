"""How the threads that work for a drive share the cores with those that answer from memory, and with everybody else."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

SPARE_SHARE = 0.1
"""Cores that idle for this share of the time have some to spare."""
REVIEW_S = 0.2
_IDLE, _IOWAIT, _ALL = 3, 4, 8
"""Columns of /proc/stat (proc(5)); the first eight are disjoint."""


class CoreSharing:
    """Gives way while the cores have time to spare, and asks for its share once they have none.

    Giving way, a thread that is woken takes no core from one that runs (SCHED_BATCH), and one that works lets others
    have its core after each piece: no answer waits for it longer than that. On cores that never idle each of these
    costs milliseconds: 0.3 GB/s were read there, and 1.4 by threads that insist as all others do.
    """

    def __init__(
        self, nice: int = 0, *, stat: Path = Path("/proc/stat"), clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`nice`: steps beyond its own niceness that a thread takes with `be_nice`."""
        self._nice = nice
        self._stat = stat
        self._clock = clock
        self._reviewed_s = clock()
        self._ticks = self._measure()
        self.gives_way = True

    def apply(self) -> None:
        """All threads of this process are scheduled accordingly, and those that they start.

        What the system refuses is left as it was; a thread that has ended needs nothing.
        """
        policy = os.SCHED_BATCH if self.gives_way else os.SCHED_OTHER
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):
                os.sched_setscheduler(int(thread), policy, os.sched_param(0))

    def review(self) -> None:
        """To be called often while there is work: looks at the cores a few times a second, and applies what follows."""
        now = self._clock()
        if now < self._reviewed_s + REVIEW_S:
            return
        self._reviewed_s = now
        (idle_before, before), (idle, whole) = self._ticks, self._measure()
        self._ticks = idle, whole
        if whole > before:
            gives_way = idle - idle_before >= SPARE_SHARE * (whole - before)
            if gives_way != self.gives_way:
                self.gives_way = gives_way
                self.apply()

    def be_nice(self) -> None:
        """The calling thread has a smaller share of a core that others want as well, unless the system refuses.

        Where others keep every core busy a nice 19 read 0.04 GB/s; SCHED_IDLE would get still less.
        """
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, max(self._nice, os.getpriority(os.PRIO_PROCESS, 0)))

    def give_turn(self) -> None:
        """The calling thread lets others have its core, while it is to give way.

        The kernel alone lets one that has just run, as those in the way of an answer have, wait for its next tick: up
        to 4 ms (EEVDF calls it not eligible, whatever the niceness of who is running).
        """
        if self.gives_way:
            os.sched_yield()

    def _measure(self) -> tuple[int, int]:
        """Ticks for which the cores that this process may use have idled, and all; zeros where that is not told."""
        ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        try:
            rows = [line.split() for line in self._stat.read_text().splitlines()]
        except OSError:
            return 0, 0
        ticks = [[int(field) for field in row[1 : 1 + _ALL]] for row in rows if row and row[0] in ours]
        return sum(row[_IDLE] + row[_IOWAIT] for row in ticks), sum(map(sum, ticks))
