"""Which blocks forebay holds for an engine, as its ranks tell: one is there when all ranks that have layers of its
group have stored theirs.

Evictions are the daemon's and nobody tells of them: a block counts as there until a load has missed it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

WAITING_MAX = 1 << 16
"""Blocks that some ranks have told of and others not yet; beyond that the oldest are forgotten."""


@dataclass(frozen=True, slots=True)
class Notice:
    """What a rank tells of consecutive blocks of one cache group.

    Attributes:
        stored: they are there; else they were looked for and missing.
        parent: name of the block before the first; empty at the start of a prompt, and where they are missing.
    """

    rank: int
    group: int
    stored: bool
    parent: bytes
    hashes: tuple[bytes, ...]


class Ledger:
    """Puts the ranks' notices together.

    Args:
        ranks: how many have layers in each cache group.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self._ranks = ranks
        self._waiting: dict[tuple[int, bytes], set[int]] = {}

    def take(self, notices: Iterable[Notice]) -> list[Notice]:
        """What is now so for the engine as a whole, in order."""
        told: list[Notice] = []
        for notice in notices:
            told += self._complete(notice) if notice.stored else self._missing(notice)
        while len(self._waiting) > WAITING_MAX:
            del self._waiting[next(iter(self._waiting))]
        return told

    def _missing(self, notice: Notice) -> list[Notice]:
        for name in notice.hashes:
            self._waiting.pop((notice.group, name), None)
        return [notice]

    def _complete(self, notice: Notice) -> Iterator[Notice]:
        """The stretches of blocks which this rank was the last to store."""
        parent, run = notice.parent, []  # type: bytes, list[bytes]
        for name in notice.hashes:
            ranks = self._waiting.setdefault((notice.group, name), set())
            ranks.add(notice.rank)
            if len(ranks) == self._ranks[notice.group]:
                del self._waiting[notice.group, name]
                run.append(name)
                continue
            if run:
                yield Notice(notice.rank, notice.group, True, parent, tuple(run))
            parent, run = name, []
        if run:
            yield Notice(notice.rank, notice.group, True, parent, tuple(run))
