"""Timing: bound and measurement by turns, so that both meet the same machine, and samples that were held up marked.

A sample in which the thread waited long for a core says more about the machine's other work than about forebay. It is
kept in the output but not used, unless all are like that. The kernel counts that wait per thread (schedstat), which,
unlike cpu time over wall time, does not mistake waiting for a reply for being held up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

HELD_UP_SHARE_MAX = 0.05
BUDGET_S = 60.0
_SCHEDSTAT = Path("/proc/thread-self/schedstat")

Action = Callable[[], float]
"""Does the work once and returns the seconds that count."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One repetition: the seconds that count, and the share of its wall time spent waiting for a core."""

    seconds: float
    held_up_share: float

    @property
    def usable(self) -> bool:
        return self.held_up_share <= HELD_UP_SHARE_MAX


@dataclass(frozen=True, slots=True)
class Series:
    """Repetitions of one thing."""

    samples: tuple[Sample, ...]

    @property
    def usable(self) -> tuple[Sample, ...]:
        """Those not held up; all of them when there is none."""
        return tuple(sample for sample in self.samples if sample.usable) or self.samples

    @property
    def best_s(self) -> float:
        return min(sample.seconds for sample in self.usable)

    @property
    def rejected(self) -> int:
        return sum(not sample.usable for sample in self.samples)

    def scaled(self, scale: Callable[[float], float]) -> list[float]:
        """All samples' seconds in another unit."""
        return [scale(sample.seconds) for sample in self.samples]


@dataclass(frozen=True, slots=True)
class Pair:
    """A measurement and its bound, taken by turns."""

    bound: Series
    measured: Series

    @property
    def time_ratio(self) -> float:
        """Best measured time over best bound time; 1 is the bound."""
        return self.measured.best_s / self.bound.best_s

    @property
    def rate_ratio(self) -> float:
        """Best measured rate over best bound rate; 1 is the bound."""
        return self.bound.best_s / self.measured.best_s

    @property
    def typical_rate_ratio(self) -> float:
        """Median over the turns of measured rate over bound rate: for a bound that itself moves from turn to turn."""
        return median(bound.seconds / got.seconds for bound, got in zip(self.bound.samples, self.measured.samples))

    def note(self) -> str:
        """Which samples were not used."""
        rejected, total = self.measured.rejected + self.bound.rejected, 2 * len(self.measured.samples)
        if not rejected:
            return ""
        if rejected == total:
            return "all samples were held up by other work"
        return f"{rejected} of {total} samples held up"


Take = Callable[[Action], Sample]


def take(action: Action) -> Sample:
    """One repetition."""
    waited, started = _waited_s(), time.perf_counter()
    seconds = action()
    wall = time.perf_counter() - started
    return Sample(seconds, (_waited_s() - waited) / wall if wall > 0 else 0.0)


def take_latency(action: Action) -> Sample:
    """One repetition of something that mostly waits.

    Its thread and the socket's own share a core and wake each other, so waiting for a core is part of it; what
    guards against other work is that a repetition is the median of many calls.
    """
    return Sample(action(), 0.0)


def by_turns(
    bound: Action, measured: Action, repetitions: int, *, take: Take = take, budget_s: float = BUDGET_S
) -> Pair:
    """Bound, measurement, bound, measurement, ...; fewer than `repetitions` (at least two) when time runs out."""
    ends = time.monotonic() + budget_s
    bounds: list[Sample] = []
    measurements: list[Sample] = []
    for done in range(repetitions):
        if done >= 2 and time.monotonic() > ends:
            break
        bounds.append(take(bound))
        measurements.append(take(measured))
    return Pair(Series(tuple(bounds)), Series(tuple(measurements)))


def timed(work: Callable[[], object]) -> Action:
    """The wall time of one call."""

    def action() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return action


def typical(work: Callable[[], object], calls: int) -> Action:
    """The median time of `calls` calls."""
    return lambda: median(each(work, calls))


def each(work: Callable[[], object], calls: int) -> list[float]:
    """The time of each of `calls` calls, in seconds."""
    clock = time.perf_counter
    taken = []
    for _ in range(calls):
        started = clock()
        work()
        taken.append(clock() - started)
    return taken


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of the values do not exceed."""
    ordered = sorted(values)
    rank = max(0, -(-len(ordered) * percent // 100) - 1)
    return ordered[int(rank)]


def _waited_s() -> float:
    """Seconds this thread has waited for a core; 0 where the kernel does not tell."""
    try:
        return int(_SCHEDSTAT.read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0
