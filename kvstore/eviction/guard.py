"""A shadow of plain LRU, small enough to carry along, that tells whether LRU would do better.

It follows all blocks of a small cache, and of a large one a share that is chosen by a checksum of their names, in a
cache that is smaller by as much: with chains touched tail first, that LRU's hits are those of the whole one (SHARDS of
fixed size). Both policies are judged by the same blocks, so the choice of blocks, which errs by a point of hit rate,
hardly enters the difference. Roots are followed always, at their own weight: one system prompt may be 4 % of all
references.

Where LRU was ahead by more than half a point over the last windows of ten minutes, and by more than chance explains,
it is LRU that chooses for the next half hour. An older window counts half of the next. Chance is judged request by
request: a small cache holds few chains, and whose chain was asked for once more says little.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from zlib import crc32

WINDOW_S = 600.0
HOLD_WINDOWS = 3
MARGIN = 0.005
SIGMAS = 2.0
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
        self._held = 0
        self._began_s: float | None = None
        self._windows_left = 0
        self._asked = self._ahead = self._squares = 0.0

    def request(self, hashes: Sequence[bytes], present: int, now: float) -> None:
        """A request named this chain, of which the leading `present` blocks were there."""
        self._turn(now)
        shadow, mask = self._shadow, self._mask
        followed: Sequence[int] = range(len(hashes))
        if mask:
            followed = [at for at in followed if not at or not crc32(hashes[at]) & mask]
        asked = ahead = 0
        for at in followed:
            weight = mask + 1 if at else 1
            asked += weight
            ahead += weight * ((hashes[at] in shadow) - (at < present))
        self._asked += asked
        self._ahead += ahead
        self._squares += ahead * ahead
        for at in reversed(followed):
            name, is_root = hashes[at], not at
            before = shadow.pop(name, None)
            if before is None:
                self._held += 1 if is_root else mask + 1
            shadow[name] = is_root if before is None else before
        if self.capacity_blocks:
            while self._held > self.capacity_blocks and shadow:
                self._held -= 1 if shadow.pop(next(iter(shadow))) else mask + 1
        while len(shadow) > SHADOW_MAX:
            self._halve()
            shadow = self._shadow

    def _halve(self) -> None:
        """Follow half as many blocks; what is left of them are as many roots at most."""
        mask = self._mask = min(_MASK_MAX, self._mask * 2 + 1)
        kept = {name: is_root for name, is_root in self._shadow.items() if is_root or not crc32(name) & mask}
        while len(kept) > SHADOW_MAX and mask == _MASK_MAX:
            del kept[next(iter(kept))]
        roots = sum(kept.values())
        self._shadow, self._held = kept, roots + (len(kept) - roots) * (mask + 1)

    def _turn(self, now: float) -> None:
        """Judge the window that has ended, and begin another."""
        if self._began_s is None:
            self._began_s = now
        if now - self._began_s < WINDOW_S:
            return
        self._began_s = now
        if self.lru_ahead:
            self._windows_left -= 1
            self.lru_ahead = self._windows_left > 0
        elif self._ahead > max(MARGIN * self._asked, SIGMAS * sqrt(self._squares)):
            self.lru_ahead, self._windows_left = True, HOLD_WINDOWS
        remembered = 0.0 if self.lru_ahead else REMEMBERED  # what LRU itself did says nothing about the other
        self._asked *= remembered
        self._ahead *= remembered
        self._squares *= remembered * remembered
