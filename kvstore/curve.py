"""The miss-ratio curve, live: what share of the blocks asked for a least-recently-used tier of any size would have had.

A chain is touched from its tail to its root, so a prefix cache under LRU is a plain stack of blocks (a parent is always
more recent than its child), and one stack distance a reference gives the hits of every size at once. Kept exactly that
costs memory for each block ever seen; here a sample of blocks is followed, each standing for several (SHARDS,
Waldspurger et al., FAST'15). Where it departs from the paper:

- All distances of a request are taken before any of its blocks is touched, as a lookup happens before the stores.
- First blocks of a prompt are a stratum of their own, each of them followed: one system prompt's root may be 4 % of all
  references, and to have it in the sample or not is an error of that size.
- Of the others one in each run of `every` is followed, chosen by the hash of the first of the run, instead of each by
  its own hash: a chain's share of the sample is that of its length, which left a third of the error on recorded traces.
- The stack is no tree but a list of age classes that grow geometrically with age, a position within a class being
  interpolated. Blocks that an earlier request touched together are counted together, so a request costs a sum over the
  classes (a few hundred at most) and little for each block followed.
- For a bound on memory the oldest are forgotten, and fewer followed where a namespace's blocks are small.

Distances are bytes over all namespaces, which share the memory: a namespace's curve says what it would hit were all of
the memory so large.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, repeat
from math import ceil, exp, log, log2
from operator import add

KEYS_MAX = 32_768
EVERY = 10
HORIZON_BYTES = 0
HALF_LIFE_S = 86_400.0

_STEPS = 8
"""Sizes told apart between a size and its double."""
_LEAST_LOG2 = 12
_SIZES = 40 * _STEPS
"""From 4 KiB to 4 PiB."""
_GRAIN = 0.1
"""An age class is merged with the next older one while both together are less than this share of all that is newer."""
_CLASSES_MAX = 320
_CLASS_KEYS = 8
"""Most blocks in an age class that is made."""
_ALIKE = 0.04
"""Distances that differ by no more than this share are as one: half a class of sizes."""
_NEVER = -(1 << 62)
_DECAYS = 16
"""Steps in which half of the past is forgotten in a half-life."""
_FORGOTTEN = 64
"""Blocks that are forgotten at one time when there are too many."""

_BLOCKS, _ROOTS = 0, 1


class NamespaceCurve:
    """What one namespace asked for, by the size of memory that would have had it; all decayed.

    Args:
        block_bytes: of a block over all shards.
        every: one block in so many is followed.

    Attributes:
        references: blocks asked for.
        followed: how many of them the blocks stood for that were followed.
        weights: how many a followed block stands for, by stratum.
        ages: of the blocks followed, by stratum, oldest first; the number that the last touch gave them.
    """

    __slots__ = ("_depths", "_hits", "ages", "block_bytes", "every", "followed", "references", "weights")

    def __init__(self, block_bytes: int, every: int) -> None:
        self.block_bytes = block_bytes
        self.every = every
        self.weights = (every, 1)
        self.references = 0.0
        self.followed = 0.0
        self.ages: tuple[dict[bytes, int], dict[bytes, int]] = ({}, {})
        self._hits = array("d", bytes(8 * _SIZES))
        self._depths = array("d", bytes(8 * _SIZES))

    def hit_blocks(self, size_bytes: float) -> float:
        """Of the blocks asked for, how many a memory of this size would have had."""
        return self._share() * _below(self._hits, size_bytes)

    def hit_depth(self, size_bytes: float) -> float:
        """Sum of the depths, in blocks, of those."""
        return self._share() * _below(self._depths, size_bytes)

    def count(self, distance_bytes: float, blocks: float, depth: float) -> None:
        """So many blocks, of depths with this sum, would have been had by what is larger than the distance."""
        step = _step(distance_bytes + self.block_bytes)
        self._hits[step] += blocks
        self._depths[step] += depth

    def scale(self, factor: float) -> None:
        self.references *= factor
        self.followed *= factor
        for counts in (self._hits, self._depths):
            for i, count in enumerate(counts):
                if count:
                    counts[i] = count * factor

    def _share(self) -> float:
        return self.references / self.followed if self.followed else 0.0


@dataclass(frozen=True, slots=True)
class _Followed:
    """The blocks of one chain that are followed, in one stratum, root first; parallel lists.

    Attributes:
        origins: age of the last touch plus position: equal for blocks that were touched together.
    """

    stratum: int
    positions: list[int]
    names: list[bytes]
    origins: list[int]


class ReuseCurve:
    """Follows the references of all namespaces. Memory: `keys_max` times about 200 bytes, whatever is asked.

    Args:
        keys_max: most blocks followed.
        every: one block in so many is followed, or one in more where `keys_max` would not reach the horizon.
        horizon_bytes: the largest size that is asked about.
        half_life_s: after so long a reference counts half.
    """

    def __init__(
        self,
        keys_max: int = KEYS_MAX,
        every: int = EVERY,
        horizon_bytes: int = HORIZON_BYTES,
        half_life_s: float = HALF_LIFE_S,
    ) -> None:
        self._keys_max = keys_max
        self._every = every
        self._horizon_bytes = horizon_bytes
        self._half_life_s = half_life_s
        self.namespaces: list[NamespaceCurve] = []
        self._clock = 0
        self._decayed_s: float | None = None
        self._starts: list[int] = []
        self._bytes: list[float] = []
        self.keys = 0
        """Blocks followed now."""

    def weighted_s(self, observed_s: float) -> float:
        """So many seconds of references, once decayed, are as many as these."""
        life_s = self._half_life_s / log(2)
        return life_s * (1 - exp(-observed_s / life_s))

    def open(self, block_bytes: int) -> NamespaceCurve:
        """A namespace's part; `close` it when the namespace goes."""
        every = max(self._every, ceil(self._horizon_bytes / (block_bytes * self._keys_max)))
        made = NamespaceCurve(block_bytes, every)
        self.namespaces.append(made)
        return made

    def close(self, namespace: NamespaceCurve) -> None:
        self.namespaces.remove(namespace)
        self._forget(namespace, _BLOCKS, len(namespace.ages[_BLOCKS]))
        self._forget(namespace, _ROOTS, len(namespace.ages[_ROOTS]))

    def refer(self, namespace: NamespaceCurve, names: Sequence[bytes], depth: int, now: float) -> None:
        """A request asked for this chain, the first of which lies `depth` blocks deep: count it, and touch it."""
        self._decay(now)
        namespace.references += len(names)
        chain = self._follow(namespace, names, depth)
        namespace.followed += sum(namespace.weights[part.stratum] * len(part.positions) for part in chain)
        newer = self._newer() if chain else []
        for part in chain:
            for age_class, begin, end in self._segments(part):
                self._count(namespace, part, (begin, end), newer[age_class], age_class, depth)
        self._touch(namespace, chain, len(names))

    def place(self, namespace: NamespaceCurve, names: Sequence[bytes], depth: int) -> None:
        """This chain was stored, or is in use: it is as recent as one asked for, without having been."""
        self._touch(namespace, self._follow(namespace, names, depth), len(names))

    def _follow(self, namespace: NamespaceCurve, names: Sequence[bytes], depth: int) -> list[_Followed]:
        """What is followed of a chain: its root, if it begins there, and one block of each run after it."""
        count, every = len(names), namespace.every
        chain = []
        if depth == 0 and count:
            chain.append(self._looked_up(namespace, _ROOTS, [0], [names[0]]))
        firsts = range((1 - depth) % every if depth else 1, count, every)
        positions = [first + _number(names[first]) % every for first in firsts]
        if positions and positions[-1] >= count:
            positions.pop()
        if positions:
            chain.append(self._looked_up(namespace, _BLOCKS, positions, [names[i] for i in positions]))
        return chain

    def _looked_up(
        self, namespace: NamespaceCurve, stratum: int, positions: list[int], names: list[bytes]
    ) -> _Followed:
        ages = map(namespace.ages[stratum].get, names, repeat(_NEVER))
        return _Followed(stratum, positions, names, list(map(add, ages, positions)))

    def _segments(self, part: _Followed) -> Iterator[tuple[int, int, int]]:
        """(age class, begin, end) of the blocks in `part` that were touched together before and are in one class."""
        positions, origins, starts = part.positions, part.origins, self._starts
        begin, count = 0, len(positions)
        while begin < count:
            origin = origins[begin]
            stop = begin + 1
            while stop < count and origins[stop] == origin:
                stop += 1
            while origin >= 0 and begin < stop:
                age_class = bisect_right(starts, origin - positions[begin]) - 1
                end = bisect_right(positions, origin - starts[age_class], begin, stop)
                yield age_class, begin, end
                begin = end
            begin = stop

    def _count(
        self,
        namespace: NamespaceCurve,
        part: _Followed,
        segment: tuple[int, int],
        newer: float,
        age_class: int,
        depth: int,
    ) -> None:
        """Enter the distances of a segment: at once where they are as good as one."""
        begin, end = segment
        weight = namespace.weights[part.stratum]
        starts, size = self._starts, self._bytes[age_class]
        stop = starts[age_class + 1] if age_class + 1 < len(starts) else self._clock
        share = namespace._share()
        newer *= share
        each = share * size / (stop - starts[age_class])
        youngest = stop - 1 - part.origins[begin]  # how far from its class's young end the chain's root would lie
        least = newer + each * (youngest + part.positions[begin])
        most = newer + each * (youngest + part.positions[end - 1])
        if most - least <= least * _ALIKE:
            deep = (end - begin) * depth + sum(part.positions[begin:end])
            namespace.count((least + most) / 2, weight * (end - begin), weight * deep)
            return
        for position in part.positions[begin:end]:
            namespace.count(newer + each * (youngest + position), weight, weight * (depth + position))

    def _newer(self) -> list[float]:
        """For each age class the bytes in all newer ones."""
        total = list(accumulate(reversed(self._bytes), initial=0.0))
        total.pop()
        total.reverse()
        return total

    def _touch(self, namespace: NamespaceCurve, chain: list[_Followed], count: int) -> None:
        """Tail first: what is nearer to the root is younger."""
        for part in chain:
            size = namespace.weights[part.stratum] * namespace.block_bytes
            for age_class, begin, end in self._segments(part):
                self._bytes[age_class] -= size * (end - begin)
        last = self._clock + count - 1
        for part in reversed(chain):  # the root comes first, and is the youngest
            size = namespace.weights[part.stratum] * namespace.block_bytes
            positions, ages = part.positions, namespace.ages[part.stratum]
            self.keys -= len(ages)
            for position, name in zip(reversed(positions), reversed(part.names), strict=True):
                ages.pop(name, None)
                ages[name] = last - position
            self.keys += len(ages)
            for end in range(len(positions), 0, -_CLASS_KEYS):
                self._starts.append(last - positions[end - 1])
                self._bytes.append(size * min(end, _CLASS_KEYS))
        self._clock += count
        if len(self._starts) > _CLASSES_MAX:
            self._merge()
        while self.keys > self._keys_max:
            self._forget(*self._oldest(), _FORGOTTEN)

    def _merge(self) -> None:
        """Merge old age classes, youngest first, so that each stays small beside what is newer."""
        starts: list[int] = []
        sizes: list[float] = []
        newer = 0.0  # than the class that is being made
        start, size = self._starts[-1], self._bytes[-1]
        for i in range(len(self._starts) - 2, -1, -1):
            if size + self._bytes[i] <= newer * _GRAIN or not self._bytes[i]:
                size += self._bytes[i]
            else:
                starts.append(start)
                sizes.append(size)
                newer += size
                size = self._bytes[i]
            start = self._starts[i]
        starts.append(start)
        sizes.append(size)
        starts.reverse()
        sizes.reverse()
        self._starts, self._bytes = starts, sizes

    def _oldest(self) -> tuple[NamespaceCurve, int]:
        """Whose oldest block is the oldest of all, and in which stratum."""
        held = [(space, stratum) for space in self.namespaces for stratum in (_BLOCKS, _ROOTS) if space.ages[stratum]]
        return min(held, key=lambda each: next(iter(each[0].ages[each[1]].values())))

    def _forget(self, namespace: NamespaceCurve, stratum: int, count: int) -> None:
        """Follow the oldest so many no longer."""
        ages = namespace.ages[stratum]
        size = namespace.weights[stratum] * namespace.block_bytes
        for name in list(islice(ages, count)):
            self._bytes[bisect_right(self._starts, ages.pop(name)) - 1] -= size
            self.keys -= 1

    def _decay(self, now: float) -> None:
        """Forget a little of the past now and then."""
        if self._decayed_s is None:
            self._decayed_s = now
        steps = int((now - self._decayed_s) * _DECAYS / self._half_life_s)
        if steps > 0:
            self._decayed_s += steps * self._half_life_s / _DECAYS
            for namespace in self.namespaces:
                namespace.scale(0.5 ** (steps / _DECAYS))


def _number(name: bytes) -> int:
    """Evenly spread, whichever hash names the blocks: of the first bytes, which no scheme keeps constant."""
    return name[0] << 8 | name[1]


def _step(size_bytes: float) -> int:
    """The class of a size, of which there are `_STEPS` to a doubling."""
    return min(_SIZES - 1, max(0, int((log2(size_bytes) - _LEAST_LOG2) * _STEPS)))


def _below(counts: array[float], size_bytes: float) -> float:
    """The sum of what lies below a size, the class that it falls into in proportion."""
    if size_bytes < 1 << _LEAST_LOG2:
        return 0.0
    whole, part = divmod((log2(size_bytes) - _LEAST_LOG2) * _STEPS, 1)
    step = min(int(whole), _SIZES)
    return sum(counts[:step]) + (counts[step] * part if step < _SIZES else 0.0)
