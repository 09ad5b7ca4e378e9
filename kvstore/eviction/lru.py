"""Least recently used, tail first: the plain policy, exact, at O(pieces) per request.

Touching a chain from its tail to its root makes every ancestor more recent than its descendants, so a flat
LRU list never gives up a parent before its child. Touching 1 000 blocks one by one would cost more than the
lookup that caused it, so the list holds *pieces*: runs of one chain that were last touched together. A piece
moves as a whole and is split only where a later request leaves it. The order is that of the flat list.

A tail that may not go just now (leased, pinned, being written, or with a child in a younger piece) takes its
piece to the young end: it is in use, so it is recent.

Pieces that somebody said are over lie in a list of their own, which is searched first. So do pieces of each priority:
of the oldest pieces of all lists that one goes whose age is the greatest, divided by what its priority makes it worth.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import merge

from forebay.kvstore.eviction import PRIORITY_MAX, PRIORITY_STEP
from forebay.kvstore.outcome import StopReason

_NO_PIECE = -1
_OVER, _PLAIN = 0, 1
"""Lists of pieces: what is over, then the lists of each priority from 0 on."""


class _Piece:
    """`order` is the list that it lies in."""

    __slots__ = ("newer", "number", "older", "order", "rows", "touched")

    def __init__(self, number: int = _NO_PIECE, order: int = _PLAIN) -> None:
        self.number = number
        self.order = order
        self.rows = array("i")
        self.touched = 0.0
        self.older: _Piece = self
        self.newer: _Piece = self


class LruPolicy:
    """Pieces in rings, each around a sentinel: ``ring.newer`` is the oldest, ``ring.older`` the newest."""

    def __init__(self, parents: array[int], depths: array[int], priorities: bytearray | None = None) -> None:
        """They are the index's live columns, read by row. Without priorities all blocks have the same."""
        self.parents = parents
        self._depths = depths
        self._priorities = priorities
        self._now = 0.0
        self._piece_of = array("i")  # numbers of pieces: half as large as references, of which there would be millions
        self._numbered: list[_Piece | None] = []
        self._unused: list[int] = []
        self._rings = [_Piece(order=order) for order in range(_PLAIN + PRIORITY_MAX + 1)]
        self._skipped = list(
            self._rings
        )  # of each, the youngest of the oldest pieces, all of which may not go just now
        self._pieces = 0

    def request(self, hashes: Sequence[bytes], rows: Sequence[int], now: float, *, opens: bool = True) -> None:
        del hashes, opens
        if rows:
            self._touch_path(rows[-1], now)

    def grow(self, hashes: Sequence[bytes], rows: Sequence[int], above: int, now: float) -> None:
        del above
        self.request(hashes, rows, now)

    def insert(self, rows: Sequence[int], now: float) -> None:
        if not rows:
            return
        piece_of, parents, numbered, priorities = self._piece_of, self.parents, self._numbered, self._priorities
        piece_of.extend(array("i", [_NO_PIECE]) * (len(parents) - len(piece_of)))
        for row in rows:
            parent = parents[row]
            number = piece_of[parent] if parent >= 0 else _NO_PIECE
            piece = numbered[number] if number >= 0 else None
            differs = priorities is not None and parent >= 0 and priorities[row] != priorities[parent]
            if piece is None or piece.rows[-1] != parent or differs:  # else it continues its parent's piece
                piece = self._new_piece(self._rings[self._order_of(row)].older)
            piece.rows.append(row)
            piece_of[row] = piece.number
        self._touch_path(rows[-1], now)

    def remove(self, row: int) -> None:
        piece = self._find(row)
        assert piece is not None, f"row {row} is not known to the policy"
        if piece.rows[-1] != row:
            self._split(piece, self._position(piece, row) + 1)
        piece.rows.pop()
        self._piece_of[row] = _NO_PIECE
        if not piece.rows:
            self._unlink(piece)
            self._pieces -= 1
            self._numbered[piece.number] = None
            self._unused.append(piece.number)

    def demote(self, rows: Sequence[int]) -> None:
        at = 0
        while at < len(rows):
            piece = self._find(rows[at])
            if piece is None:
                at += 1
                continue
            if piece.rows[-1] != rows[at]:
                self._split(piece, self._position(piece, rows[at]) + 1)
            above = self._depths[rows[-1]] - self._depths[piece.rows[0]]
            if above > 0:
                piece = self._split(piece, above)
            self._unlink(piece)
            self._link_after(piece, self._rings[_OVER].older)
            at += len(piece.rows)
        self.look_again()

    def stopped(self, names: Sequence[bytes], reason: StopReason) -> int:
        """Recency knows no classes."""
        del names, reason
        return 0

    def is_over(self, row: int) -> bool:
        piece = self._find(row)
        return piece is not None and piece.order == _OVER

    def victim(self, evictable: Callable[[int], bool | None], newcomer: bytes | None = None) -> int | None:
        del newcomer
        row = self._search_all(evictable)
        if row is None and self._skipped != self._rings:
            self.look_again()
            row = self._search_all(evictable)
        return row

    def look_again(self) -> None:
        self._skipped = list(self._rings)

    def _search_all(self, evictable: Callable[[int], bool | None]) -> int | None:
        row = self._search(_OVER, evictable)
        if row is None:
            for order in self._orders():
                row = self._search(order, evictable)
                if row is not None:
                    return row
        return row

    def _orders(self) -> Sequence[int]:
        """The lists that hold pieces which are not over, in the order in which their oldest should go."""
        rings = self._rings
        used = [order for order in range(_PLAIN, len(rings)) if rings[order].newer is not rings[order]]
        return used if len(used) < 2 else sorted(used, key=lambda order: self._due(rings[order].newer))

    def _due(self, piece: _Piece) -> float:
        """The lower, the sooner it should go."""
        age = self._now - piece.touched
        return -age / PRIORITY_STEP ** (piece.order - _PLAIN) if piece.order > _PLAIN else -age

    def _search(self, order: int, evictable: Callable[[int], bool | None]) -> int | None:
        """The first that may go; pieces that may not just now are not asked again until `look_again`."""
        piece, youngest = self._skipped[order], self._rings[order].older
        newer = piece.newer
        while piece is not youngest:
            piece, newer = newer, newer.newer
            tail = piece.rows[-1]
            verdict = evictable(tail)
            if verdict:
                return tail
            if verdict is None:
                self._skipped[order] = piece
            else:
                self._refresh(piece, piece.touched, order)
        return None

    def coldest(self, limit: int) -> list[int]:
        rows: list[int] = []
        orders = self._orders()
        plain = self._around(orders[0]) if len(orders) == 1 else merge(*map(self._around, orders), key=self._due)
        for pieces in (self._around(_OVER), plain):
            for piece in pieces:
                if len(rows) >= limit:
                    return rows
                rows += piece.rows[: -(limit - len(rows)) - 1 : -1]
        return rows

    def chances(self, rows: Sequence[int], within_s: float, now: float) -> None:
        """Recency alone predicts nothing."""
        del rows, within_s, now

    def oldest_touch(self) -> float | None:
        """Of what nobody said is over, where there is such: a hint moves no memory from one namespace to another."""
        orders = self._orders() or (_OVER,)
        return self._rings[orders[0]].newer.touched if self._pieces else None

    def touched(self, row: int) -> float | None:
        """When a row was last asked for, None where it is not known here."""
        piece = self._find(row)
        return None if piece is None else piece.touched

    def check(self, rows: Iterable[int]) -> Iterator[str]:
        seen: set[int] = set()
        pieces = 0
        for piece in self._all():
            pieces += 1
            for position, row in enumerate(piece.rows):
                if self._find(row) is not piece or row in seen:
                    yield f"row {row} is not in exactly one piece"
                if position and self.parents[row] != piece.rows[position - 1]:
                    yield f"row {row} does not follow its parent in its piece"
                seen.add(row)
            if not piece.rows:
                yield "an empty piece"
        if pieces != self._pieces:
            yield f"{pieces} pieces in the ring, {self._pieces} counted"
        if seen != set(rows):
            yield f"the policy knows {len(seen)} rows, the index {len(set(rows))} resident ones"

    def _all(self) -> Iterator[_Piece]:
        for order in range(len(self._rings)):
            for piece in self._around(order):
                assert piece.order == order, "a piece lies in another list than it says"
                yield piece

    def _around(self, order: int) -> Iterator[_Piece]:
        """The pieces of a list, oldest first."""
        ring = self._rings[order]
        piece = ring.newer
        while piece is not ring:
            yield piece
            piece = piece.newer

    def _order_of(self, row: int) -> int:
        return _PLAIN if self._priorities is None else _PLAIN + self._priorities[row]

    def _find(self, row: int) -> _Piece | None:
        number = self._piece_of[row] if row < len(self._piece_of) else _NO_PIECE
        return self._numbered[number] if number >= 0 else None

    def _new_piece(self, older: _Piece) -> _Piece:
        if self._unused:
            piece = _Piece(self._unused.pop())
            self._numbered[piece.number] = piece
        else:
            piece = _Piece(len(self._numbered))
            self._numbered.append(piece)
        self._pieces += 1
        self._link_after(piece, older)
        return piece

    def _touch_path(self, row: int, now: float) -> None:
        """Move the pieces from `row` up to its root to the young end, the root's last."""
        self._now = max(now, self._now)
        while row >= 0 and self._pieces:
            piece = self._find(row)
            if piece is None:
                row = self.parents[row]
                continue
            if piece.rows[-1] != row:
                self._split(piece, self._position(piece, row) + 1)
            self._refresh(piece, now, self._order_of(row))
            row = self.parents[piece.rows[0]]

    def _split(self, piece: _Piece, position: int) -> _Piece:
        """Cut rows[position:] off into a piece of their own, which is returned, beside the old one in its ring."""
        tail = self._new_piece(piece.older)
        tail.rows = piece.rows[position:]
        tail.touched = piece.touched
        del piece.rows[position:]
        for row in tail.rows:
            self._piece_of[row] = tail.number
        self.look_again()  # the piece has another tail
        return tail

    def _position(self, piece: _Piece, row: int) -> int:
        return self._depths[row] - self._depths[piece.rows[0]]

    def _refresh(self, piece: _Piece, now: float, order: int) -> None:
        piece.touched = now
        self._unlink(piece)
        self._link_after(piece, self._rings[order].older)

    def _unlink(self, piece: _Piece) -> None:
        if piece is self._skipped[piece.order]:
            self._skipped[piece.order] = piece.older
        piece.older.newer = piece.newer
        piece.newer.older = piece.older

    def _link_after(self, piece: _Piece, older: _Piece) -> None:
        piece.order = older.order
        piece.older = older
        piece.newer = older.newer
        older.newer.older = piece
        older.newer = piece
