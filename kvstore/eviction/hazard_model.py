"""When a block of a class comes back: hazards by age, learned while serving, and the index by which victims are chosen.

Per class and age bin (half octaves from 0.25 s) two sums are kept, in blocks: those that were asked for again at that
age, and those that reached it (Kaplan-Meier; what is still there, or was given up and is remembered, has reached its
age and no more). Their ratio, shrunk to that of all classes, is the hazard. The index of an age is

    G(age) = max over t of P(asked for again within t) / E[time until then, at most t]

(Gittins): how fast a place pays that is kept as long as it is worth while. A chat's hazard rises to a peak and falls,
which no count of uses and no recency expresses.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from math import log2

BINS = 40
FIRST_BIN_S = 0.25
HORIZON_S = 7200.0
"""What stays away longer is forgotten, unless it is still there: of that, all ages are learned."""
PRIOR_BLOCKS = 200.0
"""So many blocks of the pooled hazard are added to what a class has seen."""
DECAY = 0.98
"""What is left, at a refresh, of all that was learned before."""

_HAZARD_MAX = 0.999_999
_NOTHING = [0.0] * BINS
_EDGES_S = [0.0, *(FIRST_BIN_S * 2 ** (k / 2) for k in range(BINS))]


def bin_of(age_s: float) -> int:
    """The bin of an age; bin 0 is below 0.25 s, the last holds all that is older."""
    return min(BINS - 1, 1 + int(2 * log2(age_s / FIRST_BIN_S))) if age_s >= FIRST_BIN_S else 0


class HazardModel:
    """Hazards and indices of `classes` classes; all are 0 until the first refresh."""

    def __init__(self, classes: int) -> None:
        self._returned = [array("d", bytes(8 * BINS)) for _ in range(classes)]
        self._ended = [array("d", bytes(8 * BINS)) for _ in range(classes)]
        """Blocks by the bin in which they were asked for again or given up for good."""
        self._index = [[0.0] * BINS for _ in range(classes)]
        self._hazards = [[0.0] * BINS for _ in range(classes)]
        self._seen: set[int] = set()

    def value(self, kind: int, age_s: float) -> float:
        """The index of a block of this class and age, in 1/s; between the beginnings of two bins it is interpolated."""
        index, at = self._index[kind], bin_of(age_s)
        if at == BINS - 1:
            return index[at]
        start, end = _EDGES_S[at], _EDGES_S[at + 1]
        return index[at] + (index[at + 1] - index[at]) * (age_s - start) / (end - start)

    def returned(self, kind: int, age_s: float, blocks: int) -> None:
        """Blocks of a class were asked for again at this age."""
        at = bin_of(age_s)
        self._seen.add(kind)
        self._returned[kind][at] += blocks
        self._ended[kind][at] += blocks

    def given_up(self, kind: int, age_s: float, blocks: int) -> None:
        """Blocks are forgotten, of which it is known only that they had not been asked for until this age."""
        self._seen.add(kind)
        self._ended[kind][bin_of(age_s)] += blocks

    def refresh(self, waiting: Sequence[Sequence[float]]) -> None:
        """Compute the indices anew; `waiting[class][bin]` are the blocks that are known and have that age.

        A class of which nothing was ever seen costs nothing: it is what all classes are.
        """
        self._seen.update(kind for kind, counts in enumerate(waiting) if any(counts))
        seen = sorted(self._seen)
        reached = {kind: from_above(map(sum, zip(self._ended[kind], waiting[kind], strict=True))) for kind in seen}
        all_returned = [sum(column) for column in zip(*(self._returned[kind] for kind in seen), strict=True)]
        all_reached = [sum(column) for column in zip(*reached.values(), strict=True)]
        pooled = [d / r if r else 0.0 for d, r in zip(all_returned, all_reached, strict=True)] or _NOTHING
        self._hazards = [shrunk(_NOTHING, _NOTHING, pooled)] * len(self._index)
        self._index = [gittins(self._hazards[0])] * len(self._index)
        for kind in seen:
            self._hazards[kind] = shrunk(self._returned[kind], reached[kind], pooled)
            self._index[kind] = gittins(self._hazards[kind])
            for sums in (self._returned[kind], self._ended[kind]):
                for at, value in enumerate(sums):
                    sums[at] = value * DECAY

    def hazards(self, kind: int) -> list[float]:
        """By age bin: of what reaches it, the share that is asked for again in it."""
        return self._hazards[kind]


def shrunk(returned: Sequence[float], reached: Sequence[float], prior: Sequence[float]) -> list[float]:
    """Hazards from blocks by bin, as if so many more had been seen that behaved as `prior` says."""
    return [
        min(_HAZARD_MAX, (came + PRIOR_BLOCKS * p) / (were + PRIOR_BLOCKS))
        for came, were, p in zip(returned, reached, prior, strict=True)
    ]


def chance_within(hazards: Sequence[float], age_s: float, within_s: float) -> float:
    """That a block of this age is asked for again within so many seconds."""
    stays, until = 1.0, age_s + within_s
    for at in range(bin_of(age_s), BINS):
        start, end = max(age_s, _EDGES_S[at]), _EDGES_S[at + 1]
        if start >= until:
            break
        stays *= (1 - hazards[at]) ** ((min(until, end) - start) / (end - _EDGES_S[at]))
    return 1 - stays


def gittins(hazards: Sequence[float]) -> list[float]:
    """The index of each bin's beginning.

    The best stopping time from a bin is found by pooling: a later run of bins is joined while it pays better than what
    was joined so far, so all are done in one pass from the last bin to the first.
    """
    index = [0.0] * len(hazards)
    stays = [1.0]
    for hazard in hazards:
        stays.append(stays[-1] * (1 - hazard))
    runs: list[tuple[float, float]] = []
    for at in reversed(range(len(hazards))):
        gain = stays[at] - stays[at + 1]
        time = (_EDGES_S[at + 1] - _EDGES_S[at]) * (stays[at] + stays[at + 1]) / 2
        while runs and runs[-1][0] * time >= gain * runs[-1][1]:
            more_gain, more_time = runs.pop()
            gain, time = gain + more_gain, time + more_time
        runs.append((gain, time))
        index[at] = gain / time if time > 0 else 0.0
    return index


def from_above(counts: Iterable[float]) -> list[float]:
    """How many lie in each bin or a later one."""
    sums = list(counts)
    for at in reversed(range(len(sums) - 1)):
        sums[at] += sums[at + 1]
    return sums
