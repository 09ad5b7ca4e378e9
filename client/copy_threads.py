"""Large copies by several threads: one core does not saturate a machine's memory.

A plan is cut into parts that the calling thread and a few helpers take in turn, so a helper that wakes late, or finds
its core busy, costs nothing: the caller goes on meanwhile. Only plans whose copy lets go of the GIL are cut; those of
small scattered pieces hold it, and two threads would only pass it to and fro. Rejected: an OpenMP runtime of our own
inside the engine's process, and `concurrent.futures`, whose futures cost more than a part's copy is cut down by.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from queue import SimpleQueue

from forebay.client.copier import HELD_PIECE_BYTES_MAX, Copier, CopyPlan, NumpyCopier, lets_go_of_the_gil

THREADS_MAX = 64
THREADS_AUTO_MAX = 4

PLAN_BYTES_MIN = 8 << 20
"""Shorter plans are copied by the caller alone: waking a helper takes as long as copying half a megabyte."""

PART_BYTES_MIN = 4 << 20
SMALL_BLOCKS_PART_BYTES_MIN = 8 << 20
"""Fewer bytes would be so few items that numpy keeps the GIL (`copier.RELEASED_ITEMS`)."""


def auto_threads() -> int:
    """Threads that copy where nobody chose: as many as there are cores for this process, at most 4."""
    return min(THREADS_AUTO_MAX, len(os.sched_getaffinity(0)))


_Copy = Callable[[CopyPlan], Sequence[int]]


class ParallelCopier:
    """A `Copier` of up to `threads` threads, the caller among them; may be used by several threads at once."""

    def __init__(self, threads: int, cpus: Sequence[int] = (), *, inner: Copier | None = None) -> None:
        """The helpers begin with the first large copy. `cpus`: the core of each helper in turn; empty: any."""
        self._threads = threads
        self._cpus = tuple(cpus)
        self._alone: Copier = inner or NumpyCopier()
        self._together: Copier = inner or NumpyCopier(shares=True)
        self._jobs: SimpleQueue[_Job | None]
        self._beginning: threading.Lock
        self._helpers: int | None
        self._renew()
        _live.add(self)

    def gather(self, plan: CopyPlan) -> Sequence[int]:
        return self._copy(plan, self._alone.gather, self._together.gather)

    def scatter(self, plan: CopyPlan) -> Sequence[int]:
        return self._copy(plan, self._alone.scatter, self._together.scatter)

    def _copy(self, plan: CopyPlan, alone: _Copy, together: _Copy) -> Sequence[int]:
        parts = self._parts(plan)
        if len(parts) < 2:
            return alone(plan)
        job = _Job(plan, parts, together)
        for _ in range(min(self._begun(), len(parts) - 1)):
            self._jobs.put(job)
        return job.run()

    def _parts(self, plan: CopyPlan) -> list[slice]:
        blocks, block_bytes = len(plan.addresses), plan.table.block_bytes
        total = blocks * block_bytes
        if self._threads < 2 or total < PLAN_BYTES_MIN or not lets_go_of_the_gil(plan):
            return []
        part_bytes = PART_BYTES_MIN if block_bytes > HELD_PIECE_BYTES_MAX else SMALL_BLOCKS_PART_BYTES_MIN
        return _guided(blocks, max(1, part_bytes // block_bytes), 2 * self._threads)

    def _begun(self) -> int:
        """How many helpers there are; they begin with the first large copy, as many as the system lets us have."""
        with self._beginning:
            if self._helpers is None:
                self._helpers = 0
                for number in range(self._threads - 1):
                    cpu = self._cpus[number % len(self._cpus)] if self._cpus else None
                    name = f"forebay-copy-{number}"
                    try:
                        threading.Thread(target=_help, args=(self._jobs, cpu), name=name, daemon=True).start()
                    except RuntimeError:
                        break  # the process may have no more threads, or is ending: the caller copies what is left
                    self._helpers += 1
            return self._helpers

    def _renew(self) -> None:
        """No helpers yet: a new copier's state, and a forked child's, whose parent's helpers are not here."""
        self._jobs = SimpleQueue()
        self._beginning = threading.Lock()
        self._helpers = None
        weakref.finalize(self, _dismiss, self._jobs, self._threads - 1)


def _guided(blocks: int, least: int, share: int) -> list[slice]:
    """Parts of a `share`-th of what is left each, at least `least` blocks: few cuts, and all threads end together.

    Source: guided self-scheduling (Polychronopoulos and Kuck, 1987).
    """
    parts, first = [], 0
    while first < blocks:
        last = min(blocks, first + max(least, (blocks - first) // share))
        parts.append(slice(first, last))
        first = last
    return parts


class _Job:
    """One plan's parts; whoever works on it takes the next one. Over when its caller says so."""

    def __init__(self, plan: CopyPlan, parts: Sequence[slice], copy: Callable[[CopyPlan], Sequence[int]]) -> None:
        self._plan: CopyPlan | None = plan
        """None when the job is over: a helper that comes later finds nothing to do, and keeps no memory alive."""
        self._copy = copy
        self._parts = deque(parts)
        self._idle = threading.Condition(threading.Lock())
        self._helping = 0
        self._failed: list[int] = []
        self._error: BaseException | None = None

    def run(self) -> list[int]:
        """The caller's share; returns the positions that failed. When it returns or raises nobody copies any more."""
        try:
            if self._plan is not None:
                self._work(self._plan)
        finally:
            self._end()
        if self._error is not None:
            raise self._error
        return sorted(self._failed)

    def help(self) -> None:
        """A helper's share; an error is the caller's to raise."""
        with self._idle:
            if self._plan is None:
                return
            self._helping += 1
            plan = self._plan
        try:
            self._work(plan)
        except BaseException as error:  # noqa: BLE001  # whatever it is, the caller must hear of it
            self._error = error
            self._parts.clear()
        finally:
            with self._idle:
                self._helping -= 1
                self._idle.notify()

    def _work(self, plan: CopyPlan) -> None:
        while True:
            try:
                part = self._parts.popleft()
            except IndexError:
                return
            failed = self._copy(replace(plan, addresses=plan.addresses[part], block_ids=plan.block_ids[part]))
            self._failed.extend([part.start + position for position in failed])

    def _end(self) -> None:
        """Wait for the parts that helpers have begun, which takes no longer than their copy.

        So does a caller whom a signal wants elsewhere: it would give back slots that a helper still writes to.
        """
        interrupted: BaseException | None = None
        while True:
            try:
                self._parts.clear()
                with self._idle:
                    self._plan = None
                    while self._helping:
                        self._idle.wait()
                break
            except BaseException as error:  # noqa: BLE001  # a signal's; it is raised below
                interrupted = error
        if interrupted is not None:
            raise interrupted


def _help(jobs: SimpleQueue[_Job | None], cpu: int | None) -> None:
    """A helper's life. Where the core named cannot be had it copies on any."""
    if cpu is not None:
        try:
            os.sched_setaffinity(threading.get_native_id(), {cpu})
        except (OSError, ValueError, OverflowError):  # not ours to use, or no such number
            pass
    while True:
        job = jobs.get()
        if job is None:
            return
        job.help()
        del job  # it keeps an engine's memory alive


def _dismiss(jobs: SimpleQueue[_Job | None], helpers: int) -> None:
    for _ in range(helpers):
        jobs.put(None)


_live: weakref.WeakSet[ParallelCopier] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for copier in list(_live):
        copier._renew()


os.register_at_fork(after_in_child=_after_fork_in_child)
