"""A shadow of plain LRU, small enough to carry along, that tells whether LRU would do better.

It follows all blocks of a small cache, and of a large one a share that is chosen by a checksum of their names, in a
cache that is smaller by as much: with chains touched tail first, that LRU's hits are those of the whole one (SHARDS of
fixed size). Both policies are judged by the same blocks, so the choice of blocks, which errs by a point of hit rate,
hardly enters the difference. Roots are followed always, at their own weight: one system prompt may be 4 % of all
references.

Where LRU is ahead by more than half a point, and by more than chance explains, it chooses for the next half hour, and
each time that this happens again for twice as long: to try the other once more costs hits where it does badly. There
is a verdict at the end of the first window, for who has just begun to learn does badly anywhere, and from then on at
each request. What was seen in a window counts half in the next. A window lasts ten minutes, and as long as it takes to
see enough requests, or else a quiet daemon would never know; it ends sooner when many have been seen. Chance is judged
request by request: a small cache holds few chains, and whose chain was asked for once more says little.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from math import sqrt
from zlib import crc32

WINDOW_S, REQUESTS_MIN, REQUESTS_MAX = 600.0, 500, 2000
JUDGED_REQUESTS = 100
"""So many are looked at before there is a verdict."""
HOLD_WINDOWS, HOLD_WINDOWS_MAX = 3, 3 << 5
MARGIN = 0.005
SIGMAS = 3.0
REMEMBERED = 0.5
SHADOW_MAX = 8192
"""Blocks that are followed at most; where there would be more, half of them are followed from then on."""
_MASK_MAX = (1 << 16) - 1


class LruGuard:
    """`lru_ahead` is the verdict. Sums are in blocks: one that is followed stands for `_mask` + 1."""

    def __init__(self) -> None:
        self.lru_ahead = False
        self.capacity_blocks = 0
        """Of the policy that is watched; 0 while that has given nothing up."""
        self._mask = 0
        self._shadow: dict[bytes, bool] = {}
        """Whether it is a root, by name, longest untouched first."""
        self._roots = 0
        self._began_s: float | None = None
        self._is_seasoned = False
        """A window has gone by: before, the other has not learned enough to be judged at any time."""
        self._requests = 0
        self._windows_left = 0
        self._hold_windows = HOLD_WINDOWS
        self._asked = self._ahead = self._squares = self._judged = 0.0

    def request(self, hashes: Sequence[bytes], present: int, now: float) -> None:
        """A request named this chain, of which the leading `present` blocks were there."""
        self._turn(now)
        if not hashes:
            return
        shadow, weight = self._shadow, self._mask + 1
        root, here, gone = hashes[0], self._followed(hashes[1:present]), self._followed(hashes[max(1, present) :])
        ahead = weight * (sum(map(shadow.__contains__, here)) - len(here) + sum(map(shadow.__contains__, gone)))
        ahead += (root in shadow) - (present > 0)
        self._asked += weight * (len(here) + len(gone)) + 1
        self._ahead += ahead
        self._squares += ahead * ahead
        self._judged += 1
        if self._is_seasoned:
            self._judge(now)
        names = [*reversed(gone), *reversed(here)]
        self._roots -= sum(map(shadow.pop, names, repeat(False)))
        shadow.update(dict.fromkeys(names, False))
        self._roots += not shadow.pop(root, False)
        shadow[root] = True
        self._shrink()

    def _followed(self, names: Sequence[bytes]) -> Sequence[bytes]:
        mask = self._mask
        return [name for name in names if not crc32(name) & mask] if mask else names

    def _shrink(self) -> None:
        """Down to what the watched policy holds, and to what may be followed at most."""
        shadow = self._shadow
        while self.capacity_blocks and self._held > self.capacity_blocks:
            self._roots -= shadow.pop(next(iter(shadow)))
        while len(self._shadow) > SHADOW_MAX:
            self._halve()

    @property
    def _held(self) -> int:
        return self._roots + (len(self._shadow) - self._roots) * (self._mask + 1)

    def _halve(self) -> None:
        """Follow half as many blocks; when it is roots that are too many, the oldest go."""
        mask = self._mask = min(_MASK_MAX, self._mask * 2 + 1)
        kept = {name: is_root for name, is_root in self._shadow.items() if is_root or not crc32(name) & mask}
        while len(kept) > SHADOW_MAX and mask == _MASK_MAX:
            del kept[next(iter(kept))]
        self._shadow, self._roots = kept, sum(kept.values())

    def _judge(self, now: float) -> None:
        """Whether LRU is to take over."""
        if self.lru_ahead or self._judged < JUDGED_REQUESTS:
            return
        if self._ahead > max(MARGIN * self._asked, SIGMAS * sqrt(self._squares)):
            self.lru_ahead, self._windows_left = True, self._hold_windows
            self._hold_windows = min(2 * self._hold_windows, HOLD_WINDOWS_MAX)
            self._began_s, self._requests = now, 0

    def _turn(self, now: float) -> None:
        """End the window where it has lasted long enough, and begin another."""
        if self._began_s is None:
            self._began_s = now
        self._requests += 1
        least = REQUESTS_MIN if now - self._began_s >= WINDOW_S else REQUESTS_MAX
        if self._requests <= least:
            return
        self._began_s, self._requests = now, 1
        if self.lru_ahead:
            self._windows_left -= 1
            self.lru_ahead = self._windows_left > 0
            self._remember(0.0)  # what LRU itself did says nothing about the other
            return
        self._is_seasoned = True
        self._judge(now)
        if self._ahead <= 0:
            self._hold_windows = max(self._hold_windows // 2, HOLD_WINDOWS)
        self._remember(REMEMBERED)

    def _remember(self, share: float) -> None:
        self._asked *= share
        self._ahead *= share
        self._squares *= share * share
        self._judged *= share
