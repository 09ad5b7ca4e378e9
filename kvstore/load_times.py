"""How long whole loads take, by size, out of what clients report of theirs: the link of a tier that clients read.

A load has a part that does not depend on its size and a rate that does: large copies are shared by threads, and leave
the processor's caches. So a median is kept of the last few loads of each size class, and between two classes time is a
line, whose start is the latency of that size and whose slope its bandwidth. What other loads take away is in what was
measured. A median, since on a busy machine one load in a hundred takes five times as long as most; on recorded loads it
foresaw as well with the last 5 as with the last 31, and better than with the trend of the last few added to it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from statistics import median

from forebay.kvstore.planner import Link, Origin

SAMPLES = 9
"""Loads of each size class that are remembered."""


class LoadTimes(Link):
    """A link of which whole loads are measured; until one was, it goes by what it was made with.

    Sizes are those that one client loads: of a block that several ranks share, each loads its part, beside the others.
    """

    __slots__ = ("_samples", "_seconds", "_sizes")

    def __init__(self, name: str, gb_s: float, latency_s: float = 0.0) -> None:
        super().__init__(name, gb_s, latency_s)
        self._samples: dict[int, deque[tuple[int, float]]] = {}
        self._sizes: list[float] = []
        self._seconds: list[float] = []

    @property
    def origin(self) -> Origin:
        return Origin.MEASURED if self._sizes else super().origin

    def measured(self, size_bytes: int, busy_s: float) -> None:
        """A load of so many bytes took so long."""
        self._samples.setdefault(size_bytes.bit_length(), deque(maxlen=SAMPLES)).append((size_bytes, busy_s))
        self._sizes, self._seconds = [], []
        longest_s = 0.0
        for _, samples in sorted(self._samples.items()):
            longest_s = max(longest_s, median(seconds for _, seconds in samples))  # more bytes never take less
            self._sizes.append(median(size for size, _ in samples))
            self._seconds.append(longest_s)
        self.latency_s = self.eta_s(0)

    def bytes_per_s(self, size_bytes: int) -> float:
        """What comes on top of the latency; the assumption, until a load was measured."""
        if not self._sizes:
            return super().bytes_per_s(size_bytes)
        return size_bytes / max(self.eta_s(size_bytes) - self.latency_s, 1e-9)

    def eta_s(self, size_bytes: int, piece_bytes: int = 0) -> float:
        """For a load of so many bytes, whatever it is made of."""
        sizes, seconds = self._sizes, self._seconds
        if not sizes:
            return super().eta_s(size_bytes)
        above = bisect_left(sizes, size_bytes)
        if above == len(sizes):
            return seconds[-1] * size_bytes / sizes[-1]
        first = max(above - 1, 0)
        if first + 1 == len(sizes):
            return seconds[0] * size_bytes / sizes[0]
        slope = (seconds[first + 1] - seconds[first]) / (sizes[first + 1] - sizes[first])
        reached_s = seconds[first] + slope * (size_bytes - sizes[first])
        return reached_s if above else max(reached_s, seconds[0] * size_bytes / sizes[0])

    def blocks_s(self, blocks: int, block_bytes: int, shards: int) -> float:
        return self.eta_s(blocks * block_bytes // shards)
